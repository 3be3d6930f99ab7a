"""Any sequence of calls leaves the index as a dict would be left, and searches find what NumPy finds.

Hypothesis chooses the calls and, where one sequence goes wrong, finds a short one that does. The long form can be done
in several goes, each of which chooses other calls: ``SEMID_RUNS=2000 pytest -n 2 -s`` does 2,000 runs, and says after
each of the 20 parts how many it did.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from numpy.typing import NDArray

import semid_index as semid
from semid_index.appending import Appending
from semid_index.build import ItemWriter
from semid_index.errors import DuplicateIdError, InvalidIdsError, InvalidVectorsError
from semid_index.index import SemanticIndex
from semid_index.live import Live
from semid_index.store import Store

DIM = 6
LONG = bool(os.environ.get("SEMID_LONG"))
# of all kinds of index below together; with the older DuckDB, where `make test` comes a second time, it does fewer
RUNS = int(os.environ.get("SEMID_RUNS") or (10_000 if LONG else 200 if duckdb.__version__ >= "2" else 40))
STEPS = 50
PARTS = 5  # of the runs of each kind, which several processes share out among them
SEARCH_EVERY = 3  # steps
SELDOM = 5  # steps until what takes longest, compact and retrain, may come again
MEMORY = Path("/dev/shm")  # where no step waits for a disk; what a disk holds is the matter of test_kill.py
POOL = (
    4 * np.random.default_rng(5).standard_normal((12, DIM))[np.random.default_rng(6).integers(12, size=400)]
    + np.random.default_rng(7).standard_normal((400, DIM))
).astype(np.float32)
POOL[50:60] = POOL[40:50]  # some vectors occur twice

places = st.integers(0, len(POOL) - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
numbers = st.integers(-(2**63), 2**63 - 1) | st.integers(-5, 60)
KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "strings": (texts, {"metric": "l2"}),
    "whole numbers": (numbers, {"metric": "cosine"}),
    "file": (st.integers(-5, 60), {"metric": "ip", "vectors_in": "file"}),
    "no vectors": (st.sampled_from([*"abcdefgh", "", "\0", "a\0", "ä", "a\u0308", "😀", "A"]), {"vectors": "none"}),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[str], Path]:
    """A trained index without items, for each kind."""
    folder = tmp_path_factory.mktemp("trained")

    def get(kind: str) -> Path:
        path = folder / f"{kind}.duckdb"
        if not path.exists():
            options = {name: value for name, value in KINDS[kind][1].items() if name != "vectors_in"}
            with semid.create(path, dim=DIM, levels=3, codebook_size=4, tail=0, **options) as index:
                index.train(POOL)
        return path

    return get


def machine(kind: str, start: Path) -> type[RuleBasedStateMachine]:
    """The state machine for one kind of index."""
    ids, options = KINDS[kind]
    metric, stores = options.get("metric", "l2"), options.get("vectors") != "none"
    items_to_come = st.lists(st.tuples(ids, places), min_size=1, max_size=12, unique_by=lambda item: item[0])

    class Life(RuleBasedStateMachine):
        index: SemanticIndex
        runs = calls = 0  # of all such machines

        def __init__(self) -> None:
            super().__init__()
            self.folder = tempfile.TemporaryDirectory(dir=folder_for_many_files())
            self.path = Path(shutil.copy(start, Path(self.folder.name) / "index.duckdb"))
            self.model: dict[Any, int] = {}  # id -> place of its vector in POOL, which is its metadata, too
            self.names: dict[Any, str] = {}  # id -> semantic ID
            self.versions = [1]  # of the IDs
            self.steps = self.compacted = self.retrained = 0
            self.open()

        def open(self) -> None:
            self.index = semid.open(self.path, vectors_in=options.get("vectors_in", "memory"))

        # -- what changes the index -----------------------------------------------------------------------------------

        @rule(items=items_to_come)
        def add(self, items: list[tuple[Any, int]]) -> None:
            """New items; none of them, if one is known already."""
            given, held = [id for id, _ in items], [place for _, place in items]
            if any(id in self.model for id in given):
                with pytest.raises(DuplicateIdError):
                    self.index.add(POOL[held], given, metadata={"place": held})
            else:
                self.index.add(POOL[held], given, metadata={"place": held})
                self.model.update(items)
                self.learn(given)

        @rule(items=items_to_come)
        def upsert(self, items: list[tuple[Any, int]]) -> None:
            given, held = [id for id, _ in items], [place for _, place in items]
            result = self.index.upsert(POOL[held], given, metadata={"place": held})
            known = sum(id in self.model for id in given)
            assert (result.inserted, result.updated) == (len(given) - known, known)
            self.model.update(items)
            self.learn(given)

        @rule(given=st.lists(ids, max_size=6))
        def delete(self, given: list[Any]) -> None:
            self.drop(self.index.delete(given) if given else 0, {id for id in given if id in self.model})

        @precondition(lambda self: self.model)
        @rule(data=st.data())
        def delete_known(self, data: st.DataObject) -> None:
            some = data.draw(st.lists(st.sampled_from(sorted(self.model, key=repr)), min_size=1, max_size=5))
            self.drop(self.index.delete(some), set(some))

        @precondition(lambda self: self.model)
        @rule(least=places)
        def delete_where(self, least: int) -> None:
            fits = {id for id, place in self.model.items() if least <= place < least + 20}
            self.drop(self.index.delete(where="place >= ? AND place < ?", params=[least, least + 20]), fits)

        def drop(self, deleted: int, expected: set[Any]) -> None:
            assert deleted == len(expected)
            for id in expected:
                del self.model[id], self.names[id]

        @rule()
        def bad_vectors(self) -> None:
            with pytest.raises(InvalidVectorsError):
                self.index.add(np.full((1, DIM), np.nan), [next(iter(self.model), 0)])

        @rule()
        def bad_ids(self) -> None:
            wrong = 1.5 if not self.model else 1 if isinstance(next(iter(self.model)), str) else "x"
            with pytest.raises(InvalidIdsError):
                self.index.add(POOL[:1], [wrong])

        @rule()
        def reopen(self) -> None:
            self.index.close()
            self.open()

        @precondition(lambda self: self.steps >= self.compacted + SELDOM)
        @rule()
        def compact(self) -> None:
            self.index.compact()
            self.compacted = self.steps

        @precondition(lambda self: len(self.model) >= 4 and self.steps >= self.retrained + SELDOM)
        @rule()
        def retrain(self) -> None:
            """Names may change, and nothing else; those of before are kept as an older version."""
            if stores:
                report = self.index.retrain(POOL[:100], compare=False)
            else:
                report = self.index.retrain(POOL[list(self.model.values())], ids=list(self.model), compare=False)
            assert report.version == self.versions[-1] + 1
            self.versions.append(report.version)
            self.learn(self.model)
            self.retrained = self.steps

        @precondition(lambda self: len(self.versions) > 1)
        @rule()
        def drop_version(self) -> None:
            self.index.drop_version(self.versions.pop(0))

        # -- what asks it ---------------------------------------------------------------------------------------------

        @rule(place=places, k=st.integers(1, 8), least=st.none() | places)
        def search(self, place: int, k: int, least: int | None) -> None:
            self.find(place, k, least)

        def find(self, place: int, k: int, least: int | None = None) -> None:
            fits = [id for id, held in self.model.items() if least is None or held >= least]
            if least is not None and not self.names and self.index._store.id_type is None:
                return  # no column to ask for
            where = {} if least is None else {"where": "place >= ?", "params": [least]}
            query = POOL[place] + np.float32(0.1)
            expected = np.sort(distances(query, POOL[[self.model[id] for id in fits]], metric))[:k]
            for exact in (False, True):
                hits = self.index.search(query, k, exact=exact, **where)
                assert len(hits.ids) == len(set(hits.ids.tolist())) == min(k, len(fits))
                assert set(hits.ids.tolist()) <= set(fits)
                assert hits.semantic_ids.tolist() == [self.names[id] for id in hits.ids.tolist()]
                if stores:  # so few items are all looked at
                    own = distances(query, POOL[[self.model[id] for id in hits.ids.tolist()]], metric)
                    np.testing.assert_allclose(hits.distances, own, atol=1e-3)
                    np.testing.assert_allclose(hits.distances, expected, atol=1e-3)

        @rule(given=st.lists(ids, max_size=6))
        def get(self, given: list[Any]) -> None:
            given = [*given, *list(self.model)[:3]]
            rows = self.index.get(given, vectors=stores).to_pylist() if given else []
            assert [row["id"] for row in rows] == [id for id in given if id in self.model]
            for row in rows:
                assert row["place"] == self.model[row["id"]]
                assert row["semantic_id"] == self.names[row["id"]]
                if stores:
                    assert row["vector"] == POOL[row["place"]].tolist()

        @rule()
        def verify(self) -> None:
            report = self.index.verify()
            assert report.ok, report
            assert list(self.index._store.versions()) == self.versions

        @invariant()
        def holds_what_the_model_holds(self) -> None:
            self.steps += 1
            assert len(self.index) == len(self.model)
            if self.model:
                found = self.index._store._fetch(
                    "SELECT id, semantic_id, place FROM semantic_ids FULL JOIN items USING (id)"
                )
                assert {id: name for id, name, _ in found} == self.names
                assert {id: place for id, _, place in found} == self.model
                assert len(found) == len(self.model)
            if self.steps % SEARCH_EVERY == 0:  # more often than the rule comes, to see whether searches follow writes
                self.find(7 * self.steps % len(POOL), 4)

        # -- parts ----------------------------------------------------------------------------------------------------

        def learn(self, given: Iterable[Any]) -> None:
            """The names that items are to have now: those of their vectors, while no other item's changes."""
            known = list(given)
            codes = self.index.encode(POOL[[self.model[id] for id in known]])
            self.names |= {id: "-".join(map(str, row)) for id, row in zip(known, codes.tolist(), strict=True)}

        def teardown(self) -> None:
            try:
                report = self.index.verify(sample=len(POOL))  # all vectors, all codes
                assert report.ok, report
                type(self).runs += 1
                type(self).calls += self.steps - 1  # the first look comes before any call
            finally:
                self.index.close()
                self.folder.cleanup()

    return Life


def folder_for_many_files() -> Path | None:
    """One in memory, if there is one with room; else None, the folder for all that is temporary."""
    return MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 1 << 30 else None


def distances(query: NDArray[np.float32], vectors: NDArray[np.float32], metric: str) -> NDArray[np.float64]:
    if metric == "l2":
        return np.linalg.norm(vectors - query, axis=1)
    products = vectors @ query
    if metric == "ip":
        return -products
    return 1 - products / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)


@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", KINDS)
def test_any_sequence_of_calls(kind, part, trained):
    life, started = machine(kind, trained(kind)), time.process_time()
    wanted = max(1, RUNS // len(KINDS) // PARTS)
    run_state_machine_as_test(
        life,
        settings=settings(
            max_examples=wanted,
            stateful_step_count=STEPS,
            derandomize=False,  # the parts would do the same
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    seconds = time.process_time() - started
    did = f"{life.runs} runs, {life.calls} calls, {seconds:.0f} s of processor time"
    said = f"{kind}, part {part + 1} of {PARTS}: {did}"
    print(said, file=sys.stderr, flush=True)  # with -s the workers of pytest-xdist show this, and not what they print
    assert life.runs >= wanted


# -- does it notice? --------------------------------------------------------------------------------------------------


def older_snapshot(real, live):
    """Searches find what the first of them found."""
    return live._latest or real(live)


def another_items_code(real, writer, proposed, comparable):
    return np.roll(real(writer, proposed, comparable), 1, axis=0)


def metadata_as_they_were(real, appending, batch):
    """Those of items that are known already stay."""
    if not appending._replaced:
        real(appending, batch)


def one_deleted_too_few(real, store, rows):
    return (real(store, rows[:-1]) if len(rows) > 1 else 0) + 1


def one_match_too_few(real, store, *given, **options):
    return real(store, *given, **options)[:-1]


def wrong_distance(real, index, *given, **options):
    found = real(index, *given, **options)
    found.flat_distances[-1:] *= np.float32(1.01)
    return found


def nearest_left_out(real, index, query, k, **options):
    found = real(index, query, k + 1, **options)
    if len(found.ids) <= k:
        return found
    return replace(
        found,
        flat_ids=found.flat_ids[1:],
        flat_distances=found.flat_distances[1:],
        read_codes=lambda: found.read_codes()[1:],
        offsets=found.offsets - (found.offsets > 0),
    )


DEFECTS = {
    older_snapshot: (Live, "_follow"),
    another_items_code: (ItemWriter, "place"),
    metadata_as_they_were: (Appending, "_add_metadata"),
    one_deleted_too_few: (Store, "delete"),
    one_match_too_few: (Store, "matching_rows"),
    wrong_distance: (SemanticIndex, "search"),
    nearest_left_out: (SemanticIndex, "search"),
}


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_a_defect_is_noticed(defect, trained, monkeypatch):
    """An oracle that finds nothing wrong may be one that never would."""
    life = machine("whole numbers", trained("whole numbers"))
    owner, name = DEFECTS[defect]
    real = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *given, **options: defect(real, *given, **options))
    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            life,
            settings=settings(
                max_examples=40,
                stateful_step_count=STEPS,
                derandomize=True,
                database=None,
                deadline=None,
                phases=[Phase.generate],  # the shortest sequence does not matter
                report_multiple_bugs=False,
                suppress_health_check=list(HealthCheck),
            ),
        )
    print(f"{defect.__name__}: noticed after {life.runs} runs", file=sys.stderr, flush=True)
