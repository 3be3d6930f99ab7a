"""Eight threads read while one writes: every answer is that of one moment, and never of a mixture of two.

The writer goes from one generation to the next: items are added, replaced and deleted. What each generation holds is
known beforehand, from a dict. A reader notes which generations there were while it asked; its answer must be right for
one of these, as NumPy computes it.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import semid_index as semid
from semid_index.index import SemanticIndex

DIM, READERS, K = 8, 8, 6
SECONDS = 60.0 if os.environ.get("SEMID_LONG") else 3.0
FIRST = 600


@dataclass(frozen=True)
class Generation:
    """What the index holds at one time."""

    items: dict[int, tuple[NDArray[np.float32], int]]
    """id -> vector and number"""

    def arrays(self) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
        ids = np.fromiter(self.items, dtype=np.int64)
        vectors = np.array([vector for vector, _ in self.items.values()])
        return ids, vectors, np.array([number for _, number in self.items.values()])


@dataclass
class Shared:
    """What the threads know of each other."""

    generations: list[Generation]
    started: int = 0
    """The newest generation that may be seen."""
    finished: int = 0
    """The newest one that must be seen."""
    stop: threading.Event = field(default_factory=threading.Event)
    wrong: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    asked: Counter[str] = field(default_factory=Counter)


def vectors_of(rows: int, random: np.random.Generator) -> NDArray[np.float32]:
    centres = 5 * np.random.default_rng(3).standard_normal((20, DIM))
    return (centres[random.integers(20, size=rows)] + random.standard_normal((rows, DIM))).astype(np.float32)


def write(index: SemanticIndex, shared: Shared) -> None:
    """One generation after the other."""
    random = np.random.default_rng(1)
    next_id = FIRST
    turn = 0
    while not shared.stop.is_set():
        items = dict(shared.generations[-1].items)
        kind = ("add", "upsert", "delete", "upsert", "delete_where")[turn % 5]
        if not hasattr(index, kind.split("_")[0]):
            kind = "add"
        turn += 1
        old = random.choice(np.fromiter(items, dtype=np.int64), 25, replace=False)
        if kind == "add":
            ids = np.arange(next_id, next_id + 30)
        elif kind == "upsert":
            ids = np.concatenate([old, np.arange(next_id, next_id + 5)])
        else:
            ids = old
        numbers = random.integers(1_000, size=len(ids))
        vectors = vectors_of(len(ids), random)
        where = f"number BETWEEN {numbers[0]} AND {numbers[0] + 40}"
        if kind in ("add", "upsert"):
            next_id = max(next_id, int(ids[-1]) + 1)
            items |= {int(id): (vector, int(n)) for id, vector, n in zip(ids, vectors, numbers, strict=True)}
        elif kind == "delete":
            items = {id: item for id, item in items.items() if id not in set(ids.tolist())}
        else:
            items = {id: item for id, item in items.items() if not numbers[0] <= item[1] <= numbers[0] + 40}
        shared.generations.append(Generation(items))
        shared.started += 1
        if kind == "add":
            index.add(vectors, ids, metadata={"number": numbers})
        elif kind == "upsert":
            index.upsert(vectors, ids, metadata={"number": numbers})
        elif kind == "delete":
            index.delete(ids)
        else:
            index.delete(where=where)
        shared.finished += 1
        if turn % 20 == 0 and hasattr(index, "compact"):
            index.compact()


def read(index: SemanticIndex, shared: Shared, seed: int) -> None:
    """Ask again and again, and compare."""
    random = np.random.default_rng(seed)
    kinds = ["search", "exact", "filtered", "filtered exact", "get", "len"]
    while not shared.stop.is_set():
        kind = str(random.choice(kinds))
        query = vectors_of(1, random)[0]
        low = int(random.integers(800))
        where = f"number BETWEEN {low} AND {low + 200}" if "filtered" in kind else None
        oldest = shared.finished
        wanted = random.choice(oldest * 8 + FIRST, 20, replace=False)
        before = time.perf_counter()
        if kind == "get":
            table = index.get(wanted, vectors=True)
            answer: Any = {row["id"]: (row["vector"], row["number"]) for row in table.to_pylist()}
        elif kind == "len":
            answer = len(index)
        else:
            hits = index.search(query, K, where=where, exact="exact" in kind)
            answer = hits.ids, hits.distances
        shared.seconds.setdefault(kind, []).append(time.perf_counter() - before)
        newest = shared.started
        shared.asked[kind] += 1
        generations = shared.generations[oldest : newest + 1]
        said = [what_is_wrong(kind, answer, generation, query, low, wanted) for generation in generations]
        if all(said):
            shared.wrong.append(f"{kind}, generations {oldest} to {newest}: {said}")


def what_is_wrong(
    kind: str, answer: Any, generation: Generation, query: NDArray[np.float32], low: int, wanted: NDArray[np.int64]
) -> str:
    """Why this is not the answer for this generation; nothing, if it is."""
    items = generation.items
    if kind == "len":
        return "" if answer == len(items) else f"{answer} items instead of {len(items)}"
    if kind == "get":
        expected = {int(id): items[int(id)] for id in wanted if int(id) in items}
        if answer.keys() != expected.keys():
            return f"ids {answer.keys() ^ expected.keys()}"
        pairs = [(answer[id], expected[id]) for id in expected]
        same = all(got[0] == vector.tolist() and got[1] == number for got, (vector, number) in pairs)
        return "" if same else "another vector or number"
    ids, distances = answer
    known, vectors, numbers = generation.arrays()
    fits = (numbers >= low) & (numbers <= low + 200) if "filtered" in kind else np.ones(len(known), dtype=bool)
    allowed = dict(zip(known[fits].tolist(), np.linalg.norm(vectors[fits] - query, axis=1), strict=True))
    if len(ids) != min(K, len(allowed)):
        return f"{len(ids)} hits of {len(allowed)}"
    if strangers := set(ids.tolist()) - allowed.keys():
        return f"items {strangers} that are not there"
    if not np.allclose([allowed[id] for id in ids.tolist()], distances, atol=1e-3):
        return "the distance of another vector"
    if "exact" in kind and not np.allclose(np.sort(list(allowed.values()))[:K], distances, atol=1e-3):
        return "not the nearest"
    return ""


@pytest.mark.parametrize("vectors_in", ["memory", "file"])
def test_readers_see_one_moment_while_another_thread_writes(tmp_path, vectors_in):
    random = np.random.default_rng(0)
    vectors, numbers = vectors_of(FIRST, random), np.arange(FIRST)
    path = tmp_path / "index.duckdb"
    with semid.create(path, dim=DIM, levels=3, codebook_size=8, tail=0) as index:
        index.train(vectors)
        index.add(vectors, metadata={"number": numbers})
    first = Generation({i: (vectors[i], i) for i in range(FIRST)})
    shared = Shared([first])
    failures: list[BaseException] = []
    with semid.open(path, vectors_in=vectors_in) as index:

        def guarded(work: Any, *arguments: Any) -> None:
            try:
                work(index, shared, *arguments)
            except BaseException as error:
                failures.append(error)
                shared.stop.set()

        threads = [threading.Thread(target=guarded, args=(write,))]
        threads += [threading.Thread(target=guarded, args=(read, seed)) for seed in range(READERS)]
        for thread in threads:
            thread.start()
        shared.stop.wait(SECONDS)
        shared.stop.set()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        assert not shared.wrong, f"{len(shared.wrong)} of {shared.asked.total()}: " + "\n".join(shared.wrong[:5])
        assert len(index) == len(shared.generations[-1].items)
    for kind, seconds in sorted(shared.seconds.items()):
        p50, p99 = 1_000 * np.quantile(seconds, [0.5, 0.99])
        print(f"\n{vectors_in}: {kind}: {len(seconds)} answers, p50 {p50:.1f} ms, p99 {p99:.1f} ms", end="")
    print(f"\n{vectors_in}: {shared.finished} generations, {shared.asked.total()} answers, none wrong")
    assert shared.finished >= 3
    assert shared.asked.total() > 50
