"""Times of the SQL macros, in milliseconds, over an index of generated vectors: what any DuckDB client gets.

    python -m benchmarks.sql_search --rows 1000000 --dim 384 --folder /tmp

Brute force over the stored vectors is measured beside them. All queries are asked in turn, round after round, so that
whatever else the machine does meets all of them alike. Medians; the smallest value says what a quiet machine does.
Reads as well as writes use ``--threads``.
"""

import argparse
import time
from pathlib import Path

import duckdb
import numpy as np

import semid_index as semid
from semid_index.metrics import SQL_FUNCTIONS, exact_search

_BATCH = 50_000
_QUERIES = 20
_LATENT = 48  # dimensions in which the vectors vary most; the others have little noise
_CENTRES = 20_000
_K = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--metric", choices=list(SQL_FUNCTIONS), default="cosine")
    parser.add_argument("--codebook-size", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, required=True, help="where the files go; they stay there")
    arguments = parser.parse_args()
    vectors, built = arguments.folder / "clusters.npy", arguments.folder / "clusters.duckdb"
    if not vectors.exists():
        generate(vectors, arguments.rows + _QUERIES, arguments.dim)
    everything = np.load(vectors, mmap_mode="r")
    base, queries = everything[:-_QUERIES], np.array(everything[-_QUERIES:])
    if not built.exists():
        with semid.create(
            built, dim=arguments.dim, metric=arguments.metric, codebook_size=arguments.codebook_size
        ) as index:
            index.train(base)
            index.add(base)
    true, _ = exact_search(queries, np.asarray(base), _K, arguments.metric)
    with duckdb.connect(built, read_only=True, config={"threads": arguments.threads}) as connection:
        [[items, buckets]] = connection.execute(
            "SELECT (SELECT count(*) FROM semid_codes), (SELECT count(*) FROM semid_buckets)"
        ).fetchall()
        print(f"DuckDB {duckdb.__version__}, {items:,} items in {buckets:,} buckets, {arguments.threads} threads")
        show(connection, calls(arguments.metric, arguments.dim), queries, true, arguments.rounds)
        show_many(connection, queries, arguments.dim)


def generate(path: Path, rows: int, dim: int) -> None:
    """Clusters of many sizes in a few dimensions of falling weight, turned into all of them."""
    rng = np.random.default_rng(0)
    latent = min(_LATENT, dim)
    weights = (1 / np.sqrt(np.arange(1, latent + 1))).astype(np.float32)
    centres = rng.standard_normal((_CENTRES, latent), dtype=np.float32)
    popularity = rng.dirichlet(np.ones(_CENTRES))
    turn = np.linalg.qr(rng.standard_normal((dim, latent)))[0].T.astype(np.float32)
    vectors = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, dim))
    for start in range(0, rows, _BATCH):
        part = vectors[start : start + _BATCH]
        points = centres[rng.choice(_CENTRES, len(part), p=popularity)]
        points += 0.5 * rng.standard_normal(points.shape, dtype=np.float32)
        part[:] = (points * weights) @ turn
        part += 0.02 * rng.standard_normal(part.shape, dtype=np.float32)
    vectors.flush()


def calls(metric: str, dim: int) -> dict[str, str]:
    """What is measured: name -> query with one parameter, which gives ids."""
    near = f"SELECT id FROM semid_vectors JOIN semid_codes USING (row) ORDER BY {SQL_FUNCTIONS[metric]}"
    return {
        "semid_search, 64 probes": f"SELECT id FROM semid_search(?, {_K}, 64)",
        "semid_search, 256 probes": f"SELECT id FROM semid_search(?, {_K}, 256)",
        "semid_search, 1,024 probes": f"SELECT id FROM semid_search(?, {_K}, 1024)",
        "semid_scan": f"SELECT id FROM semid_scan(?, {_K})",
        "semid_search_exact, 256 probes, 200 re-ranked": f"SELECT id FROM semid_search_exact(?, {_K}, 256, 200)",
        "semid_search_exact, 1,024 probes, 1,000 re-ranked": f"SELECT id FROM semid_search_exact(?, {_K}, 1024, 1000)",
        "brute force": f"{near}(v, ?::FLOAT[{dim}]) LIMIT {_K}",
        "only planning semid_search": f"EXPLAIN SELECT id FROM semid_search(?, {_K}, 256)",
    }


def show(connection, named: dict[str, str], queries: np.ndarray, true: np.ndarray, rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in named}
    found: dict[str, list[int]] = {name: [] for name in named}
    for number in range(rounds * len(queries)):
        query, nearest = queries[number % len(queries)], true[number % len(queries)]
        for name, call in named.items():
            if name == "brute force" and number % 5:
                continue
            started = time.perf_counter()
            rows = connection.execute(call, [query]).fetchall()
            seconds[name].append(time.perf_counter() - started)
            found[name].append(len({row[0] for row in rows} & set(nearest.tolist())))
    for name, taken in seconds.items():
        recall = "" if "planning" in name else f", recall@{_K} {np.mean(found[name]) / _K:.3f}"
        print(f"{name}: {1000 * np.median(taken):.1f} ms, least {1000 * min(taken):.1f}{recall}", flush=True)


def show_many(connection, queries: np.ndarray, dim: int) -> None:
    connection.execute(f"CREATE TEMP TABLE asked (qid INTEGER, v FLOAT[{dim}])")
    for number, query in enumerate(queries):
        connection.execute("INSERT INTO asked VALUES (?, ?)", [number, query])
    started = time.perf_counter()
    connection.execute(f"FROM semid_search_many('asked', {_K}, 256)").fetchall()
    seconds = time.perf_counter() - started
    print(f"semid_search_many, 256 probes, {len(queries)} queries: {1000 * seconds / len(queries):.1f} ms a query")


if __name__ == "__main__":
    main()
