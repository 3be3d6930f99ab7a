"""What changing an index costs: upsert, add and delete of 100,000 items in about a million.

    python -m benchmarks.lifecycle --folder /tmp

Of the upserted items one half are known. Encoding is timed by itself, just before, and taken off. Wall seconds, and
CPU seconds of all threads in brackets.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

import semid_index as semid
from benchmarks.datasets import load
from semid_index.index import SemanticIndex
from semid_index.records import UpsertResult

_CHANGED = 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="sift128")
    parser.add_argument("--folder", type=Path, required=True, help="where the index goes; it stays there")
    parser.add_argument("--changed", type=int, default=_CHANGED)
    arguments = parser.parse_args()
    base = load(arguments.dataset).base
    rows, changed = len(base), arguments.changed
    random = np.random.default_rng(0)
    with semid.create(arguments.folder / "lifecycle.duckdb", dim=base.shape[1], overwrite=True) as index:
        index.train(base)
        with measured(f"add {rows:,}"):
            index.add(base, metadata={"number": np.arange(rows)})
        index.search(base[0])
        vectors = base[random.choice(rows, changed, replace=False)]
        vectors = vectors + random.normal(0, 10, vectors.shape).astype(np.float32)
        known = random.choice(rows, changed // 2, replace=False)
        ids = np.concatenate([known, np.arange(rows, rows + changed - len(known))])
        for what, write in (
            ("upsert", lambda: index.upsert(vectors, ids, metadata={"number": ids})),
            ("the same upsert again", lambda: index.upsert(vectors, ids)),
            ("add", lambda: index.add(vectors, ids + 10 * rows)),
        ):
            beyond_encoding(index, vectors, what, write)
        with measured("next search"):
            index.search(base[0])
        with measured(f"delete {changed:,} by ids"):
            index.delete(ids + 10 * rows)
        with measured("delete by where"):
            print(f"{index.delete(where='number % 10 = 3'):,} items:", end=" ")
        with measured("next search"):
            index.search(base[0])


def beyond_encoding(index: SemanticIndex, vectors: np.ndarray, what: str, write: Callable[[], object]) -> None:
    with measured(f"encode {len(vectors):,}") as encoding:
        index.encode(vectors)
    with measured(f"{what} {len(vectors):,}") as writing:
        done = write()
    if isinstance(done, UpsertResult):
        print(f"    {done}")
    print(f"    beyond encoding: {writing[0] - encoding[0]:.2f} s ({writing[1] - encoding[1]:.2f})")


@contextmanager
def measured(what: str) -> Iterator[list[float]]:
    """Print, and hand out when it is over, how long something took."""
    found: list[float] = []
    wall, cpu = time.perf_counter(), time.process_time()
    yield found
    found += [time.perf_counter() - wall, time.process_time() - cpu]
    print(f"{what}: {found[0]:.2f} s ({found[1]:.2f})", flush=True)


if __name__ == "__main__":
    main()
