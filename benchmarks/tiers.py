"""The two small tiers, and FAISS beside them: codes alone (``none``), and vectors left in the file (``file``).

    python -m benchmarks.tiers --data DIR [--set sift128] [--tier none] [--folder DIR] [--json FILE]

``none``: recall@10 of IDs of 16 codes of 256 words, searched as ``index.search`` does it with all leaves open, and of
their first codes, beside FAISS's OPQ of 16 bytes, compared one and all. Bytes are those of the code, of what a scan
needs beside it (the squared length of a sum of words: 2 bytes here), and the share of an item in codebooks and
rotation: among the items of the set, and among ten million.

``file``: recall@10, milliseconds of a single query and of one in a batch, and bytes of memory per item: as the index
counts them, and as Linux does (private memory, less that of a process with a small index). DuckDB's cache of the file
is part of the latter; ``--cache`` limits it. Beside it FAISS's IVF-PQ fast scan, re-ranked from a mapped file of rows.

``--folder`` keeps the indexes that were built, and takes those that are there. Milliseconds of wall time only mean
something on a quiet machine; those of processor time, of all threads, suffer less from what else it does.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

TIERS = ("none", "file")
SETS = ("sift128", "debian", "mnist784", "sample")
LEVELS = 16
FEWER_LEVELS = (10, 12, 13, 14)
LARGE_CATALOGUE = 10_000_000
RERANKED = (60, 100, 200)
SINGLES = 100
_NORM_BYTES = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the real sets")
    parser.add_argument("--set", action="append", dest="sets", choices=SETS, help="only this one; may be repeated")
    parser.add_argument("--tier", action="append", dest="tiers", choices=TIERS, help="only this one; may be repeated")
    parser.add_argument("--rows", type=int, help="only so many items")
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--codebook-size", type=int, default=256)
    parser.add_argument("--refine", type=int, default=0, help="of the quantizer of the tier none")
    parser.add_argument("--beam", type=int, default=1, help="of the quantizer of the tier none")
    parser.add_argument("--train-rows", type=int, default=65_536, help="that FAISS's OPQ learns from")
    parser.add_argument("--cache", default="64MiB", help="most that DuckDB may hold while the tier file is searched")
    parser.add_argument("--folder", type=Path, help="where indexes are kept, and looked for")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    arguments = parser.parse_args()
    measured = []
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.folder or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.sets or ["sift128", "debian"]:
            for tier in arguments.tiers or TIERS:
                dataset = _dataset(name, arguments)
                found = {"none": measure_codes, "file": measure_file}[tier](dataset, folder, arguments)
                measured.append({"set": name, "tier": tier, "items": len(dataset.base), **found})
                _print(measured[-1])
    if arguments.json:
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def _dataset(name: str, arguments: argparse.Namespace):
    from benchmarks import datasets

    dataset = datasets.load(name, arguments.data or datasets.DEFAULT_FOLDER)
    if arguments.rows:
        return datasets.tiny(dataset, arguments.rows, arguments.queries)
    queries, neighbours = dataset.queries[: arguments.queries], dataset.neighbours[: arguments.queries]
    return datasets.Dataset(dataset.name, dataset.metric, dataset.base, queries, neighbours)


def _built(path: Path, dataset, **options: object) -> Path:
    import semid_index as semid

    if not path.exists():
        part = path.with_suffix(".part.duckdb")
        dim = dataset.base.shape[1]
        with semid.create(part, dim=dim, metric=dataset.metric, overwrite=True, **options) as index:
            index.train(dataset.base)
            index.add(dataset.base)
        part.replace(path)
    return path


# -- codes alone ------------------------------------------------------------------------------------------------------


def measure_codes(dataset, folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Recall of the IDs, of their first codes, and of OPQ; and what each costs."""
    import semid_index as semid
    from semid_index.bench.referee import nearest_decoded

    size, refine, beam = arguments.codebook_size, arguments.refine, arguments.beam
    kind = f"{LEVELS}x{size}" + (f"-refine{refine}-beam{beam}" if refine or beam > 1 else "")
    options = {"vectors": "none", "levels": LEVELS, "codebook_size": size, "refine": refine, "beam": beam}
    path = _built(folder / f"{dataset.name}-{len(dataset.base)}-none-{kind}.duckdb", dataset, **options)
    items, dim = dataset.base.shape
    rows: list[dict[str, object]] = []
    with semid.open(path, read_only=True) as index:
        trace = index.explain(dataset.queries[0])
        seconds, cpu, hits = _timed(lambda: index.search(dataset.queries, 10, probes=trace.leaves))
        usual_seconds, usual_cpu, usual = _timed(lambda: index.search(dataset.queries, 10))
        memory = {name: held / items for name, held in index.stats()["memory_bytes"].items()}
        codes, codebooks = _codes_and_codebooks(index)
    decoded = np.zeros_like(dataset.base)
    for levels in range(1, LEVELS + 1):
        decoded += codebooks[levels - 1][codes[:, levels - 1]]
        if levels in (*FEWER_LEVELS, LEVELS):
            found = nearest_decoded(dataset.queries, decoded, dataset.metric, 10, round_norms=False)
            own = levels * np.log2(size) / 8 + _NORM_BYTES
            rows.append(_code_row(f"rq {levels} x {size}", own, 4 * levels * size * dim, items, found, dataset))
    found, shared = _opq(dataset, size, arguments.train_rows)
    rows.append(_code_row(f"faiss OPQ{LEVELS}", LEVELS * np.log2(size) / 8, shared, items, found, dataset))
    per_query = 1e3 / len(dataset.queries)
    return {
        "executor": trace.executor,
        "codes": rows,
        "search, all leaves": {
            "recall": _recall(np.array(hits.ids), dataset.neighbours),
            "wall_ms": seconds * per_query,
            "cpu_ms": cpu * per_query,
        },
        "search, as by default": {
            "recall": _recall(np.array(usual.ids), dataset.neighbours),
            "candidates": usual.trace.candidates,
            "wall_ms": usual_seconds * per_query,
            "cpu_ms": usual_cpu * per_query,
        },
        "memory": memory,
    }


def _codes_and_codebooks(index) -> tuple[np.ndarray, list[np.ndarray]]:
    """(items, levels) in the order they were added, and (words, dim) of each level."""
    columns = ", ".join(f"c{level}" for level in range(1, LEVELS + 1))
    found = index.sql(f"SELECT {columns} FROM semantic_ids ORDER BY id").to_arrow_table()
    words = index.sql("SELECT level, codeword FROM semid_codebook ORDER BY level, code").to_arrow_table()
    levels = words["level"].to_numpy()
    centroids = words["codeword"].combine_chunks().flatten().to_numpy().reshape(len(levels), -1)
    codebooks = [centroids[levels == level] for level in np.unique(levels)]
    return np.stack([column.to_numpy() for column in found.columns], axis=1), codebooks


def _code_row(name: str, own: float, shared: int, items: int, found: np.ndarray, dataset) -> dict[str, object]:
    return {
        "codes": name,
        "recall": _recall(found, dataset.neighbours),
        "bytes": own,
        f"bytes of {items:,}": own + shared / items,
        f"bytes of {LARGE_CATALOGUE:,}": own + shared / LARGE_CATALOGUE,
    }


def _opq(dataset, size: int, train_rows: int) -> tuple[np.ndarray, int]:
    """The nearest rows by FAISS's OPQ of as many bytes, compared one and all; and bytes of rotation and codebooks."""
    import faiss

    dim = dataset.base.shape[1]
    bits = size.bit_length() - 1
    rotation, learned_with = faiss.OPQMatrix(dim, LEVELS), faiss.ProductQuantizer(dim, LEVELS, bits)
    rotation.pq = learned_with
    codes = faiss.IndexPQ(dim, LEVELS, bits)
    index = faiss.IndexPreTransform(rotation, codes)
    sample = np.random.default_rng(0).permutation(len(dataset.base))[:train_rows]
    index.train(dataset.base[np.sort(sample)])
    index.add(dataset.base)
    return index.search(dataset.queries, 10)[1], 4 * dim * size + 4 * dim * dim


# -- vectors in the file ----------------------------------------------------------------------------------------------


def measure_file(dataset, folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Memory, recall and time of vectors in the file, in a process of its own; and of FAISS with a mapped file."""
    size = {"codebook_size": arguments.codebook_size}
    path = _built(
        folder / f"{dataset.name}-{len(dataset.base)}-float32-{arguments.codebook_size}.duckdb", dataset, **size
    )
    with tempfile.TemporaryDirectory() as made:
        np.save(f"{made}/queries.npy", dataset.queries)
        np.save(f"{made}/neighbours.npy", dataset.neighbours)
        context = multiprocessing.get_context("spawn")  # a child that holds nothing of what is held here
        with context.Pool(1) as pool:
            ours = pool.apply(_measured_file, (path, made, arguments.cache))
        return {**ours, "faiss": _faiss_with_a_file(dataset, Path(made))}


def _measured_file(path: Path, made: str, cache: str) -> dict[str, object]:
    import semid_index as semid
    from benchmarks.memory import private_bytes

    queries, neighbours = np.load(f"{made}/queries.npy"), np.load(f"{made}/neighbours.npy")
    small = Path(made) / "small.duckdb"
    rng = np.random.default_rng(0)
    with semid.create(small, dim=16, codebook_size=16) as index:  # so that all libraries are loaded, and did something
        vectors = rng.standard_normal((5_000, 16), dtype=np.float32)
        index.train(vectors)
        index.add(vectors)
    with semid.open(small, read_only=True, vectors_in="file") as index:
        index.search(vectors[:100])
    before = _trimmed(private_bytes)
    started = time.perf_counter()
    index = semid.open(path, read_only=True, vectors_in="file")
    trace = index.explain(queries[0])
    opened = time.perf_counter() - started
    index.sql(f"SET memory_limit = '{cache}'")
    items = len(index)
    ways = []
    for rerank in RERANKED:
        for query in queries[:5]:
            index.search(query, 10, rerank=rerank)
        singles = [
            _timed(lambda query=query, rerank=rerank: index.search(query, 10, rerank=rerank))
            for query in queries[:SINGLES]
        ]
        seconds, cpu, hits = _timed(lambda rerank=rerank: index.search(queries, 10, rerank=rerank))
        ways.append(
            {
                "rerank": rerank,
                "recall": _recall(np.array(hits.ids), neighbours),
                "single_wall_ms": 1e3 * float(np.median([single[0] for single in singles])),
                "single_cpu_ms": 1e3 * float(np.median([single[1] for single in singles])),
                "batch_wall_ms": 1e3 * seconds / len(queries),
                "batch_cpu_ms": 1e3 * cpu / len(queries),
            }
        )
    held = _trimmed(private_bytes) - before
    cached = index.sql("SELECT sum(memory_usage_bytes) FROM duckdb_memory()").fetchall()[0][0]
    memory = {name: size / items for name, size in index.stats()["memory_bytes"].items()}
    index.close()
    return {
        "executor": trace.executor,
        "opened_s": opened,
        "memory": memory,
        "bytes, counted": sum(memory.values()),
        "bytes, of the process": held / items,
        "bytes, of the process without DuckDB's cache": (held - int(cached)) / items,
        "searches": ways,
    }


def _trimmed(private_bytes: Callable[[], int]) -> int:
    """Private memory, once what was freed was given back to the system."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    return private_bytes()


def _faiss_with_a_file(dataset, folder: Path) -> dict[str, object]:
    """IVF-PQ fast scan with 16 bytes of code and 8 of id an item at 128 dimensions, re-ranked from a mapped file."""
    import faiss

    items, dim = dataset.base.shape
    cells = int(max(16, 2 ** np.round(np.log2(np.sqrt(items)))))
    parts = dim // 4
    index = faiss.index_factory(dim, f"IVF{cells},PQ{parts}x4fs")
    rows = np.sort(np.random.default_rng(0).permutation(items)[: 64 * cells])
    index.train(dataset.base[rows])
    index.add(dataset.base)
    np.save(folder / "rows.npy", dataset.base)
    mapped = np.load(folder / "rows.npy", mmap_mode="r")
    index.nprobe = max(1, cells // 16)

    def search(queries: np.ndarray, rerank: int) -> np.ndarray:
        kept = index.search(queries, rerank)[1]
        near = np.square(mapped[kept] - queries[:, None]).sum(axis=2)
        near[kept < 0] = np.inf
        return np.take_along_axis(kept, np.argsort(near, axis=1)[:, :10], axis=1)

    ways = []
    for rerank in RERANKED:
        singles = [
            _timed(lambda query=query, rerank=rerank: search(query[None], rerank))
            for query in dataset.queries[:SINGLES]
        ]
        ways.append(
            {
                "rerank": rerank,
                "recall": _recall(search(dataset.queries, rerank), dataset.neighbours),
                "single_wall_ms": 1e3 * float(np.median([single[0] for single in singles])),
                "single_cpu_ms": 1e3 * float(np.median([single[1] for single in singles])),
            }
        )
    counted = -(-parts // 2) + 8 + 4 * cells * dim / items
    return {"index": f"IVF{cells},PQ{parts}x4fs", "bytes, counted": counted, "searches": ways}


# -- both -------------------------------------------------------------------------------------------------------------


def _timed(work: Callable):
    """Seconds of wall time and of processor time, and what came of it."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - wall, time.process_time() - cpu, result


def _recall(found: np.ndarray, neighbours: np.ndarray) -> float:
    return float((found[:, :, None] == neighbours[:, None, :]).any(axis=1).mean())


def _print(measured: dict[str, object]) -> None:
    print(f"\n{measured['set']}, {measured['tier']}, {measured['items']:,} items, scanned by {measured['executor']}")
    for name, value in measured.items():
        if isinstance(value, list):
            for row in value:
                print("   " + "  ".join(f"{key} {_short(entry)}" for key, entry in row.items()))
        elif isinstance(value, dict):
            rows = value.get("searches", [])
            print(f"{name}: " + "  ".join(f"{k} {_short(v)}" for k, v in value.items() if k != "searches"))
            for row in rows:
                print("   " + "  ".join(f"{key} {_short(entry)}" for key, entry in row.items()))
        elif name not in ("set", "tier", "items", "executor"):
            print(f"{name}: {_short(value)}", flush=True)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
