"""Searching an index that changes: what the first search after a write costs, and all later ones.

    python -m benchmarks.live --data DIR                    # sift128
    python -m benchmarks.live --tiny                        # 2,000 rows of the bundled sample

An index of most of the vectors is searched, written to and searched again, several times over. After each write two
searches are timed, the first of which takes in what changed, and compared with opening the file anew. Then shares of
the items are added, deleted or replaced, and the time of a search is compared with that of a fresh index of the same
items, in turn in one process; recall is against brute force over the items that are there, and over the newest alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

import semid_index as semid
from benchmarks import datasets
from semid_index.metrics import exact_search

K = 10
HELD_BACK = 0.12  # of the vectors, to be added later


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=datasets.DEFAULT_FOLDER, help="folder with the real sets")
    parser.add_argument("--tiny", action="store_true", help="2,000 rows of the bundled sample")
    parser.add_argument("--rows", type=int, help="only so many vectors")
    parser.add_argument("--only", choices=("writes", "shares"), help="only this part")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--queries", type=int, default=500, help="queries in a batch; a tenth of them one by one")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    dataset = datasets.load("sample" if arguments.tiny else "sift128", arguments.data)
    base = dataset.base[: 2_000 if arguments.tiny else arguments.rows]
    shape = {"codebook_size": 64} if arguments.tiny else {}
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), dataset.metric, base, dataset.queries[: arguments.queries], arguments.rounds, shape)
        for part in [arguments.only] if arguments.only else ["writes", "shares"]:
            for label, row in getattr(bench, part)():
                figures[label] = row
                print(f"{label:42} {row}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


class Bench:
    """One index that is written to, and fresh ones beside it; ids are rows of ``vectors``."""

    def __init__(self, folder: Path, metric: str, vectors, queries, rounds: int, shape: dict[str, int]) -> None:
        self.folder, self.metric, self.vectors, self.queries = folder, metric, vectors, queries
        self.rounds = rounds
        self.random = np.random.default_rng(0)
        with semid.create(folder / "trained.duckdb", dim=vectors.shape[1], metric=metric, **shape) as index:
            index.train(vectors)

    def index(self, name: str, ids) -> semid.SemanticIndex:
        """A fresh index of these items."""
        index = semid.open(shutil.copy(self.folder / "trained.duckdb", self.folder / name))
        index.add(self.vectors[ids], ids=ids)
        index.search(self.queries[:2])
        return index

    def writes(self):
        """The first search after a write, and the next ones."""
        n = int((1 - HELD_BACK) * len(self.vectors))
        with self.index("writes.duckdb", np.arange(n)) as index:
            usual = self.ms(lambda: index.search(self.queries[0], K), 20)
            for count in (1, n // 1_000, n // 100):
                first, second = [], []
                for _ in range(self.rounds):
                    ids = np.arange(n, n + count)
                    n += count
                    index.add(self.vectors[ids], ids=ids)
                    first.append(self.ms(lambda: index.search(self.queries[0], K), 1))
                    second.append(self.ms(lambda: index.search(self.queries[0], K), 5))
                anew = self.ms(lambda: self.reopened(index), 2)
                yield f"add {count:,} to {n:,}", row(first, second, usual, anew)
            for count in (1, n // 1_000):
                first, second = [], []
                gone = self.random.permutation(n)[: count * self.rounds].reshape(self.rounds, count)
                for ids in gone:
                    index.delete(ids)
                    first.append(self.ms(lambda: index.search(self.queries[0], K), 1))
                    second.append(self.ms(lambda: index.search(self.queries[0], K), 5))
                yield f"delete {count:,} of {n:,}", row(first, second, usual, anew)

    def reopened(self, index: semid.SemanticIndex) -> None:
        """A search that has to read everything."""
        index._live.forget()
        index.search(self.queries[0], K)

    def shares(self):
        """Searches where a share of the items came later or went, against a fresh index of the same items."""
        n = int((1 - HELD_BACK) * len(self.vectors))
        with self.index("fresh.duckdb", np.arange(n)) as fresh:
            for share in (0.0, 0.01, 0.08):
                count = int(share * n)
                later = np.arange(n - count, n)
                yield f"{share:.1%} came later", self.compared(fresh, n, np.arange(n - count), later, [])
            for share in (0.01, 0.095):
                ids = np.arange(n, n + int(share * n))
                yield f"{share:.1%} deleted", self.compared(fresh, n, np.concatenate([np.arange(n), ids]), [], ids)

    def compared(self, fresh, n: int, first, later, gone) -> dict[str, object]:
        """An index of items 0 to n - 1 that came to be in steps, beside a fresh one."""
        with self.index("steps.duckdb", first) as steps:
            if len(later):
                steps.add(self.vectors[later], ids=later)
            if len(gone):
                steps.delete(gone)
            steps.search(self.queries[0])
            both = {"fresh": fresh, "steps": steps}
            few = self.queries[: max(1, len(self.queries) // 10)]
            batch: dict[str, list[float]] = {name: [] for name in both}
            single: dict[str, list[float]] = {name: [] for name in both}
            for _ in range(self.rounds):
                for name, index in both.items():
                    batch[name].append(self.ms(partial(index.search, self.queries, K), 1) / len(self.queries))
                    single[name] += [self.ms(partial(index.search, query, K), 1) for query in few]
            truth = exact_search(self.queries, self.vectors[:n], K, self.metric)[0]
            own = self.vectors[later[:1_000]] if len(later) else None
            return {
                "batch ms": {name: round(statistics.median(times), 4) for name, times in batch.items()},
                "single ms": {name: round(statistics.median(times), 3) for name, times in single.items()},
                "recall": {name: recall(index.search(self.queries, K).ids, truth) for name, index in both.items()},
                "newest find themselves": None if own is None else found(steps, own, later[:1_000]),
                "plan": steps.explain(self.queries[0], K).plan,
            }

    @staticmethod
    def ms(call: Callable[[], object], times: int) -> float:
        """The median time of a call, in milliseconds."""
        taken = []
        for _ in range(times):
            started = time.perf_counter()
            call()
            taken.append(1_000 * (time.perf_counter() - started))
        return statistics.median(taken)


def row(first: list[float], second: list[float], usual: float, anew: float) -> dict[str, float]:
    """The medians, and the slowest."""
    return {
        "first search ms": round(statistics.median(first), 2),
        "slowest": round(max(first), 2),
        "later ones": round(statistics.median(second), 2),
        "before the writes": round(usual, 2),
        "everything read anew": round(anew, 1),
    }


def recall(ids, truth) -> float:
    return round(float(np.mean([np.isin(mine, theirs).mean() for mine, theirs in zip(ids, truth, strict=True)])), 4)


def found(index: semid.SemanticIndex, vectors, ids) -> float:
    """The share of items that are at distance 0 of themselves."""
    hits = index.search(vectors, 1)
    return float(np.mean(np.concatenate(hits.distances) <= 1e-3))


if __name__ == "__main__":
    sys.exit(main())
