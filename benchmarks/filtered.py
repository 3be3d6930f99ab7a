"""Filtered search at several selectivities: ours, brute force, and FAISS with the same filters.

    python -m benchmarks.filtered --data DIR                # debian and sift128
    python -m benchmarks.filtered --tiny                    # 2,000 rows of the bundled sample

All subjects run in turn in one process, several rounds each; medians are printed, in milliseconds a query, once for a
batch and once for single queries. Ours takes the filter as SQL, so its time includes DuckDB's; the others are given the
matching rows for nothing. Recall is against brute force over the matches; rows is the smallest number of hits that any
query got, of the min(k, matches) that exist.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import datasets
from semid_index.metrics import exact_search

K = 10
PATIENCE = 10.0  # seconds: what takes longer for a batch is not asked again and again
SHARES = (0.0001, 0.001, 0.01, 0.1, 0.5, 0.9)
LISTS = {"sift128": 4_096, "debian": 256}
PROBES = {"sift128": 64, "debian": 64}
Search = Callable[[np.ndarray], list[np.ndarray]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=datasets.DEFAULT_FOLDER, help="folder with the real sets")
    parser.add_argument("--tiny", action="store_true", help="2,000 rows of the bundled sample")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--queries", type=int, default=500, help="in a batch; a tenth of them one by one, at least 20")
    parser.add_argument("--set", action="append", dest="sets", help="only this set; may be repeated")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    figures = {}
    for name in ["sample"] if arguments.tiny else arguments.sets or ["debian", "sift128"]:
        dataset = datasets.load(name, arguments.data)
        figures[name] = measure(dataset, metadata(dataset, arguments.data, tiny=arguments.tiny), arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


def metadata(dataset, folder: Path, *, tiny: bool) -> dict[str, np.ndarray]:
    """The columns that filters go by, one value for each row of a set."""
    if dataset.name == "sift128":
        photo = np.load(folder / "sift128.base-image.u16.npy").astype(np.int32)
        return {"photo": photo, "number": np.arange(len(photo)) - np.searchsorted(photo, photo)}
    import pyarrow.parquet as pq

    if tiny:
        from semid_index.demo import load_sample

        order = np.random.default_rng(0).permutation(len(load_sample().vectors))[200:]
        table = load_sample().metadata
    else:
        order = np.random.default_rng(0).permutation(len(dataset.base) + datasets.HELD_OUT)[datasets.HELD_OUT :]
        table = pq.read_table(folder / "debian.items.parquet")
    return {name: table[name].to_numpy(zero_copy_only=False)[order] for name in ("section", "installed_kb")}


def conditions(columns: dict[str, np.ndarray]) -> dict[str, tuple[str, np.ndarray]]:
    """Filters in SQL that let through about each share of the rows, and the rows that they let through."""
    found: dict[str, tuple[str, np.ndarray]] = {}
    if "photo" in columns:
        photo, number = columns["photo"], columns["number"]
        photos = np.random.default_rng(1).permutation(np.unique(photo))
        for share in SHARES:
            wanted = photos[: max(1, round(share * len(photos)))]
            mine = np.isin(photo, wanted)
            sql = f"photo IN ({', '.join(map(str, wanted.tolist()))})"
            if mine.sum() > 1.5 * share * len(photo):  # less than one photograph
                most = round(share * len(photo))
                mine, sql = mine & (number < most), f"{sql} AND number < {most}"
            found[f"{share:.2%}"] = sql, np.flatnonzero(mine)
        return found
    sections, size = columns["section"], columns["installed_kb"]
    for share in SHARES:
        limit = int(np.quantile(size, share if share >= 0.1 else 1 - share))
        sql, mine = (f"installed_kb < {limit}", size < limit) if share >= 0.1 else (
            f"installed_kb > {limit}", size > limit)  # fmt: skip
        found[f"{share:.2%}"] = sql, np.flatnonzero(mine)
    names, counts = np.unique(sections.astype(str), return_counts=True)
    for name in (names[counts.argmax()], names[np.abs(counts - 0.01 * len(sections)).argmin()]):
        found[f"section {name}"] = f"section = '{name}'", np.flatnonzero(sections == name)
    return found


def measure(dataset, columns: dict[str, np.ndarray], arguments) -> dict[str, object]:
    import semid_index as semid

    batch = dataset.queries[: 50 if arguments.tiny else arguments.queries]
    base, metric = dataset.base, dataset.metric
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        shape = {"codebook_size": 64} if arguments.tiny else {}
        with semid.create(
            Path(folder) / "filtered.duckdb", dim=dataset.base.shape[1], metric=dataset.metric, **shape
        ) as index:
            index.train(dataset.base)
            index.add(dataset.base, metadata=columns)
            index.search(batch[:2])  # reads what searching needs
            peers = peers_of(dataset)
            for label, (sql, rows) in conditions(columns).items():
                subjects = ours(index, sql) | {
                    "NumPy over the matches": lambda queries, rows=rows: list(
                        rows[exact_search(queries, base[rows], K, metric)[0]]
                    ),
                    **{name: peer(rows) for name, peer in peers.items()},
                }
                figures[label] = compare(dataset, subjects, rows, batch, arguments.rounds)
                print(f"{dataset.name} {label}: {len(rows):,} of {len(dataset.base):,} rows")
                print(f"    {index.explain(batch[0], K, where=sql).plan}")
                for name, row in figures[label].items():
                    print(f"    {name:38} {row}", flush=True)
    return figures


def ours(index, sql: str) -> dict[str, Search]:
    """The index as it is, compared with all matches, and without its filter compared with everything."""
    return {
        "ours": lambda queries: list(index.search(queries, K, where=sql).ids),
        "exact on the matches": lambda queries: list(index.search(queries, K, where=sql, exact=True).ids),
        "brute force over all rows": lambda queries: list(index.search(queries, K, exact=True).ids),
    }


def peers_of(dataset) -> dict[str, Callable[[np.ndarray], Search]]:
    """Other libraries, built over the same rows; each takes the rows that match and gives a search."""
    import faiss

    base, n = dataset.base, len(dataset.base)
    inner = dataset.metric != "l2"
    lists = LISTS.get(dataset.name, 32)
    peer = faiss.index_factory(
        base.shape[1], f"IVF{lists},Flat", faiss.METRIC_INNER_PRODUCT if inner else faiss.METRIC_L2
    )
    peer.train(base[np.sort(np.random.default_rng(0).choice(n, min(n, 64 * lists), replace=False))])
    peer.add(base)
    peer.nprobe = PROBES.get(dataset.name, 8)

    def in_filter(rows: np.ndarray) -> Search:
        bits = np.packbits(np.isin(np.arange(n), rows), bitorder="little")
        selector = faiss.IDSelectorBitmap(bits)
        parameters = faiss.SearchParametersIVF(sel=selector, nprobe=peer.nprobe)
        # FAISS keeps bare pointers, so the bits and the selector are held here
        return lambda queries, _held=(bits, selector): hits(peer.search(queries, K, params=parameters)[1])

    def post_filter(rows: np.ndarray) -> Search:
        allowed = np.zeros(n + 1, dtype=bool)  # the last for the -1 of a missing hit
        allowed[rows] = True
        wanted = min(n, 2_048, int(1.5 * K * n / max(len(rows), 1)))

        def search(queries: np.ndarray) -> list[np.ndarray]:
            found = peer.search(queries, wanted)[1]
            return [row[allowed[row]][:K] for row in found]

        return search

    found = {
        f"FAISS IVF{lists},Flat, selector, {peer.nprobe} probes": in_filter,
        "FAISS, the same, filtered afterwards": post_filter,
    }
    try:
        import hnswlib
    except ImportError as error:
        print(f"hnswlib is left out: {error}. It has no wheels; pip install hnswlib needs a C++ compiler.")
        return found
    graph = hnswlib.Index(space="ip" if inner else "l2", dim=base.shape[1])
    graph.init_index(max_elements=n, M=16, ef_construction=200)
    graph.add_items(base)
    graph.set_ef(80)

    def in_graph(rows: np.ndarray) -> Search:
        allowed = np.zeros(n, dtype=bool)
        allowed[rows] = True

        def search(queries: np.ndarray) -> list[np.ndarray]:
            for wanted in range(min(K, len(rows)), 0, -1):  # it fails, whole, if one query finds fewer
                try:
                    return list(graph.knn_query(queries, k=wanted, filter=allowed.__getitem__, num_threads=1)[0])
                except RuntimeError:
                    continue
            return [np.empty(0, dtype=np.int64)] * len(queries)

        return search

    return found | {"hnswlib, filter function, ef 80": in_graph}


def hits(found: np.ndarray) -> list[np.ndarray]:
    return [row[row >= 0] for row in found]


def compare(dataset, subjects: dict[str, Search], rows: np.ndarray, batch: np.ndarray, rounds: int):
    """Recall, rows and times of each subject; all of them in turn, several times."""
    true = rows[exact_search(batch, dataset.base[rows], K, dataset.metric)[0]]
    found, in_batch, alone = {}, {}, {}
    for name, subject in subjects.items():
        started = time.perf_counter()
        found[name] = subject(batch)
        in_batch[name] = [(time.perf_counter() - started) / len(batch)]
    slow = {name for name in subjects if in_batch[name][0] * len(batch) > PATIENCE}  # once is enough for these
    for name in slow:
        alone[name] = [seconds(subjects[name], query[None]) for query in batch[:3]]
    for name in subjects.keys() - slow:
        in_batch[name], alone[name] = [], []
    # in another order each time, so that none always pays for what the one before left behind
    shuffled = partial(np.random.default_rng(0).permutation, [name for name in subjects if name not in slow])
    for _ in range(rounds):
        for name in shuffled():
            in_batch[name].append(seconds(subjects[name], batch) / len(batch))
    for query in batch[: max(20, len(batch) // 10)]:
        for name in shuffled():
            alone[name].append(seconds(subjects[name], query[None]))
    return {
        name: {
            "recall@10": None if name.startswith("brute") else round(recall(found[name], true), 4),
            "rows": min(map(len, found[name])),
            "batch ms": round(1000 * statistics.median(in_batch[name]), 3),
            "single ms": round(1000 * statistics.median(alone[name]), 2),
        }
        for name in subjects
    }


def seconds(search: Search, queries: np.ndarray) -> float:
    started = time.perf_counter()
    search(queries)
    return time.perf_counter() - started


def recall(found: list[np.ndarray], true: np.ndarray) -> float:
    """The mean share of the true nearest matches that were found; 1 where nothing matches."""
    if not true.shape[1]:
        return 1.0
    return float(np.mean([np.isin(row, mine).mean() for row, mine in zip(true, found, strict=True)]))


if __name__ == "__main__":
    sys.exit(main())
