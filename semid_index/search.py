"""lookup -> rerank -> result, with a trace of each step."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from semid_index.codes import unpack
from semid_index.errors import InvalidArgumentError, SearchTimeoutError
from semid_index.items import check_count
from semid_index.lookup import (
    LeafScorer,
    Leaves,
    Matches,
    Probes,
    additive_scorer,
    centroid_scorer,
    choose_probes,
    make_leaves,
    whole_index,
)
from semid_index.metrics import normalized
from semid_index.quantizer import Quantizer, Vectors
from semid_index.quantizers.tail import Tail
from semid_index.records import Metric, Probe, SearchResult, SearchTrace
from semid_index.rerank import (
    DecodedVectors,
    Distances,
    Executor,
    FileVectors,
    MemoryVectors,
    Positions,
    ScanData,
    VectorsByPosition,
    choose_executor,
    faiss_threads,
    faiss_works,
    search_matches,
    smallest,
    stored_in_place,
)
from semid_index.store import Store

_BLOCK = 1_024  # queries carried through all steps at once; time is looked at in between
_LEAST_RERANK = 100
_RERANK_PER_HIT = 4
_LEAST_BUDGET = 4_096
_BUDGET_PER_ROOT = 48.0
_SHOWN_PROBES = 64
# of searches with a filter; what was measured: docs/decisions/0011
_FEW_BUDGETS = 3  # up to so many budgets, matches are compared one and all: in a block each costs less
_LEAST_MATCHES = 4_096  # the smallest budget
_MATCHES_POWER = 2 / 3
_MANY_SHARE = 0.25  # from here on all items are scanned, and those that do not match dropped
_SCAN_MARGIN = 1.5
_FILTER_SECONDS = 60.0  # that a filter may take in a search without a timeout


def default_leaf_size(items: int) -> int:
    """sqrt(n) items, at least 128: opening a leaf costs a fixed time, and so does scoring one (docs/decisions/0003)."""
    return int(np.clip(math.sqrt(items), 128, 2_048))


def default_budget(items: int) -> int:
    """Candidates that a search looks at by default: 48 sqrt(n), at least 4,096 (docs/decisions/0003)."""
    return max(_LEAST_BUDGET, int(_BUDGET_PER_ROOT * math.sqrt(items)))


def filtered_budget(matches: int, items: int) -> int:
    """Matches that a search with a filter looks at by default: fewer than without, but not in proportion.

    The rarer matches are, the farther away are the nearest of them, and the more leaves have to be opened.
    """
    return max(_LEAST_MATCHES, int(default_budget(items) * (matches / max(items, 1)) ** _MATCHES_POWER))


def default_rerank(k: int, metric: Metric = "l2") -> int:
    """Candidates whose exact distance is computed for k hits: 4 k, at least 100; four times as many under ip.

    Inner products grow with the length of a vector, and so does the error of a scan by codes.
    """
    return max(_LEAST_RERANK, _RERANK_PER_HIT * k) * (4 if metric == "ip" else 1)


class SearchState:
    """What searching needs in memory, read from the store when first needed. A write makes a new one necessary."""

    def __init__(
        self, store: Store, quantizer: Quantizer, tail: Tail | None, *, vectors_in: Literal["memory", "file"]
    ) -> None:
        self._store, self._quantizer, self._tail, self._vectors_in = store, quantizer, tail, vectors_in
        self.config = store.config
        self.layout = store.layout
        self.codes = store.codes()

    def __len__(self) -> int:
        return len(self.codes.rows)

    @cached_property
    def leaves(self) -> Leaves:
        """The leaves; one with everything, if the codes are not a hierarchy."""
        if not self._quantizer.hierarchical:
            return whole_index(len(self), self.layout)
        return make_leaves(self.codes.sids, self.layout, self.config.leaf_size or default_leaf_size(len(self)))

    @cached_property
    def scorer(self) -> LeafScorer:
        """Scores the leaves for a query."""
        if self._quantizer.codebooks is not None:
            return additive_scorer(self.leaves, self._quantizer.codebooks, self.codes.sids, self.config.metric)
        return centroid_scorer(self.leaves, self._decoded.take, self.config.metric)

    @cached_property
    def vectors(self) -> VectorsByPosition:
        """Where exact distances come from."""
        if self.config.vectors == "none":
            return self._decoded
        if self._vectors_in == "file":
            return FileVectors(self._store, self.codes.rows, self.config.metric)
        return MemoryVectors.load(self._store, self.position_of_row, self.config.metric)

    @cached_property
    def executor(self) -> Executor:
        """Scans the leaves."""
        return choose_executor(
            ScanData(
                self.leaves, self.codes, self._quantizer, self.vectors, self.config.metric, self._tail, self._read_tail
            )
        )

    @cached_property
    def ids(self) -> Any:
        """The ids of all items, an Arrow array."""
        return self._store.ids()

    @cached_property
    def position_of_row(self) -> NDArray[np.int64]:
        """For each row number ever given, the position of its item; -1 if there is none."""
        rows = self.codes.rows
        positions = np.full(int(rows.max(initial=-1)) + 1, -1, dtype=np.int64)
        positions[rows] = np.arange(len(rows))
        return positions

    def prepare(self) -> SearchState:
        """Read all that a search needs, while no one writes, so that it belongs together."""
        _ = self.scorer, self.vectors, self.executor, self.ids
        return self

    def matches(self, rows: NDArray[np.int64]) -> Matches:
        """The items with these rows; rows that were added after this state was read are left out."""
        found = self.position_of_row[rows[rows < len(self.position_of_row)]]
        allowed = np.zeros(len(self), dtype=bool)
        allowed[found[found >= 0]] = True
        return Matches.among(self.leaves, allowed)

    def codes_at(self, positions: Positions) -> NDArray[np.int32]:
        """The codes at some positions: (m, levels)."""
        return unpack(
            self.codes.sids[positions], self.layout, None if self.codes.rest is None else self.codes.rest[positions]
        )

    def memory(self) -> dict[str, int]:
        """Bytes held for searching, part by part; only of what was read already."""
        loaded = vars(self)
        parts = {
            "codes": self.codes.rows.nbytes
            + self.codes.sids.nbytes
            + (0 if self.codes.rest is None else self.codes.rest.nbytes)
        }
        if "vectors" in loaded:
            parts["vectors"] = self.vectors.nbytes
        if "executor" in loaded:
            parts["executor"] = self.executor.nbytes
        if "ids" in loaded:
            parts["ids"] = int(self.ids.nbytes)
        if "scorer" in loaded:
            parts["leaves"] = (
                self.leaves.starts.nbytes
                + self.leaves.lowest.nbytes
                + self.leaves.bits.nbytes
                + 2 * self.scorer.words.nbytes
            )
        if "position_of_row" in loaded:
            parts["positions"] = self.position_of_row.nbytes
        return parts

    @cached_property
    def _decoded(self) -> DecodedVectors:
        return DecodedVectors(self._quantizer, self.codes, self.leaves, self.config.dim, self.config.metric)

    def _read_tail(self) -> NDArray[np.uint8]:
        codes: NDArray[np.uint8] | None = None
        for places, batch in stored_in_place(self._store, self.position_of_row, "tail"):
            if codes is None:
                codes = np.empty((len(self), batch["tail"].shape[1]), dtype=np.uint8)
            codes[places] = batch["tail"]
        return np.empty((0, 0), dtype=np.uint8) if codes is None else codes


@dataclass(frozen=True)
class SearchRequest:
    """One checked call of search."""

    queries: Vectors
    single: bool
    k: int
    probes: int | None = None
    rerank: int | None = None
    exact: bool = False
    threads: int | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        for name in ("k", "probes", "rerank", "threads"):
            value = getattr(self, name)
            if value is not None or name == "k":
                check_count(name, value)
        if self.rerank is not None and self.rerank < self.k:
            raise InvalidArgumentError(f"rerank={self.rerank} candidates cannot give k={self.k} hits. Use at least k.")
        if self.timeout is not None and not (isinstance(self.timeout, int | float) and self.timeout > 0):
            raise InvalidArgumentError(f"timeout must be a number of seconds above 0, not {self.timeout!r}.")


@dataclass
class _Clock:
    """Sums up the time of each step, and ends a search that runs past its timeout."""

    timeout: float | None
    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - before

    def left(self, otherwise: float) -> float:
        """Seconds until the timeout, or another number of seconds where there is none."""
        return otherwise if self.timeout is None else self.timeout - (time.perf_counter() - self.started)

    def check(self) -> None:
        if self.timeout is not None and time.perf_counter() - self.started > self.timeout:
            raise SearchTimeoutError(
                f"The search ran past its timeout of {self.timeout} s. Allow more, or ask for fewer probes."
            )


@dataclass(frozen=True)
class _Hits:
    """What one block of queries found: each (q, k), padded with -1 and inf; and how it went."""

    positions: Positions
    distances: Distances
    probes: Probes | None = None
    reranked: float = 0.0


def search(
    load: Callable[[], SearchState],
    request: SearchRequest,
    match: Callable[[float], NDArray[np.int64]] | None = None,
) -> SearchResult:
    """The k nearest items for each query.

    ``match``: with a filter, gives the rows that fulfil it, within the number of seconds that it is called with.
    """
    clock = _Clock(request.timeout)
    with clock.step("load"):
        state = load()
    matches = None
    if match is not None:
        clock.check()
        with clock.step("filter"):
            matches = state.matches(match(clock.left(_FILTER_SECONDS)))
    k = min(int(request.k), len(state) if matches is None else len(matches))
    plan = _plan(state, request, matches)
    blocks: list[_Hits] = []
    with faiss_threads(request.threads):
        for start in range(0, len(request.queries), _BLOCK) if k else ():
            clock.check()
            queries = request.queries[start : start + _BLOCK]
            if state.config.metric == "cosine":
                queries = normalized(queries)
            blocks.append(_search_block(state, request, queries, k, plan, matches, clock))
    clock.check()
    return _result(state, request, blocks, plan, matches, clock)


@dataclass(frozen=True)
class _Plan:
    """How a search is carried out, and why."""

    way: Literal["nothing", "exact", "matches", "scan"]
    """``matches``: exact distances to the matches of the best leaves. ``scan``: let the executor scan the best leaves,
    drop what does not match, and re-rank."""
    budget: int
    """Items to look at, of those that match."""
    text: str


def _plan(state: SearchState, request: SearchRequest, matches: Matches | None) -> _Plan:
    if matches is not None:
        return _filtered_plan(state, request, matches)
    items, leaves = len(state), len(state.leaves)
    if not items:
        return _Plan("nothing", 0, "no item can be a hit")
    if request.exact:
        return _Plan("exact", items, "distances to all items, because exact=True")
    return _Plan("scan", default_budget(items), f"probe the best of {leaves:,} leaves")


def _filtered_plan(state: SearchState, request: SearchRequest, matches: Matches) -> _Plan:
    """Few matches are compared one and all; many are found by a search as without a filter; others leaf by leaf."""
    found, items, leaves = len(matches), len(state), len(state.leaves)
    budget = filtered_budget(found, items)
    share = f"{found:,} of {items:,} items match"
    if not found:
        return _Plan("nothing", 0, "no item can be a hit: none matches the filter")
    if request.exact:
        return _Plan("exact", found, f"{share}: distances to all of them, because exact=True")
    few = _Plan("exact", found, f"{share}: distances to all of them, because they are few")
    if found <= max(_LEAST_MATCHES, _FEW_BUDGETS * request.k):
        return few
    if found >= _MANY_SHARE * items and not state.executor.exact:
        text = f"{share}: scan the best of {leaves:,} leaves and drop what does not match, because many do"
        return _Plan("scan", budget, text)
    if found <= _FEW_BUDGETS * budget:
        return few
    if leaves == 1:
        return _Plan("exact", found, f"{share}: distances to all of them, because there is only one leaf")
    holding = np.count_nonzero(matches.counts)
    until = f"until {request.probes:,} are open" if request.probes else f"until they hold {budget:,} matches"
    text = f"{share}, in {holding:,} of {leaves:,} leaves: open the best of these {until}, and only look at the matches"
    return _Plan("matches", budget, text)


def _search_block(
    state: SearchState,
    request: SearchRequest,
    queries: Vectors,
    k: int,
    plan: _Plan,
    matches: Matches | None,
    clock: _Clock,
) -> _Hits:
    if plan.way == "exact":
        allowed = None if matches is None else matches.positions
        with clock.step("rerank"):
            positions, distances = state.vectors.nearest(queries, k, allowed)
        return _Hits(positions, distances, reranked=float(plan.budget))
    with clock.step("lookup"):
        probes = choose_probes(
            state.scorer,
            queries,
            state.leaves.sizes if matches is None else matches.counts,
            at_least=k,
            budget=plan.budget,
            probes=request.probes,
            threads=request.threads or os.cpu_count() or 1,
        )
    if plan.way == "matches" and matches is not None:
        with clock.step("rerank"):
            positions, distances = search_matches(state.vectors, queries, matches, probes, k)
        return _Hits(positions, distances, probes, float(probes.candidates.mean()))
    rerank = min(max(int(request.rerank or default_rerank(k, state.config.metric)), k), int(probes.candidates.max()))
    if matches is not None:
        return _scan_and_check(state, queries, probes, matches, k, rerank, clock)
    with clock.step("scan"):
        distances, positions = state.executor.search(queries, probes, k if state.executor.exact else rerank)
    if state.executor.exact:
        return _Hits(positions, distances, probes, float(probes.candidates.mean()))
    with clock.step("rerank"):
        distances = state.vectors.distances(queries, positions)
        positions, distances = smallest(positions, distances, k)
    return _Hits(positions, distances, probes, float(rerank))


def _scan_and_check(
    state: SearchState, queries: Vectors, probes: Probes, matches: Matches, k: int, rerank: int, clock: _Clock
) -> _Hits:
    """Scan for more than enough, and re-rank what matches; where that was too little, look at the matches alone."""
    with clock.step("scan"):
        opened = np.where(probes.leaves >= 0, state.leaves.sizes[probes.leaves], 0).sum(axis=1)
        wanted = min(math.ceil(_SCAN_MARGIN * rerank * len(state) / len(matches)), int(opened.max()))
        scanned = state.executor.search(queries, probes, wanted)[1]
        kept = _first_allowed(scanned, matches.allowed, rerank)
    with clock.step("rerank"):
        positions, distances = smallest(kept, state.vectors.distances(queries, kept), k)
        enough = (kept >= 0).sum(axis=1) >= np.minimum(rerank, probes.candidates)
        if not enough.all():
            few = np.flatnonzero(~enough)
            again = search_matches(state.vectors, queries[few], matches, probes.of(few), k)
            positions[few], distances[few] = again
    return _Hits(positions, distances, probes, float(rerank))


def _first_allowed(positions: Positions, allowed: NDArray[np.bool_], count: int) -> Positions:
    """The first positions of each row that are allowed, at most so many, padded with -1."""
    fits = (positions >= 0) & allowed[positions]
    first = np.argsort(~fits, axis=1, kind="stable")[:, :count]
    return np.where(np.take_along_axis(fits, first, axis=1), np.take_along_axis(positions, first, axis=1), -1)


def _result(
    state: SearchState,
    request: SearchRequest,
    blocks: list[_Hits],
    plan: _Plan,
    matches: Matches | None,
    clock: _Clock,
) -> SearchResult:
    queries = len(request.queries)
    if blocks:
        found = np.concatenate([block.positions for block in blocks])
        near = np.concatenate([block.distances for block in blocks])
    else:
        found, near = np.empty((queries, 0), dtype=np.int64), np.empty((queries, 0), dtype=np.float32)
    hit = found >= 0
    positions = found[hit]
    with clock.step("ids"):
        ids = state.ids.take(positions)
        flat_ids = ids.to_numpy(zero_copy_only=False)
    probes = [block.probes for block in blocks if block.probes is not None]
    sizes = [len(block.positions) for block in blocks]
    trace = SearchTrace(
        queries=queries,
        k=int(request.k),
        leaves=len(state.leaves),
        probed=_mean([part.counts for part in probes]),
        candidates=_mean([part.candidates for part in probes])
        if probes
        else float(np.average([b.reranked for b in blocks], weights=sizes) if blocks else 0),
        reranked=float(np.average([block.reranked for block in blocks], weights=sizes)) if blocks else 0.0,
        matches=None if matches is None else len(matches),
        distances="exact" if state.vectors.exact else "decoded",
        executor=_executor_name(state, plan),
        seconds=dict(clock.seconds, total=time.perf_counter() - clock.started),
        probes=_shown_probes(state, request, probes[0]) if request.single and probes else (),
        plan=plan.text,
    )
    offsets = np.concatenate([[0], np.cumsum(hit.sum(axis=1))])
    return SearchResult(flat_ids, near[hit], lambda: state.codes_at(positions), offsets, request.single, trace)


def _executor_name(state: SearchState, plan: _Plan) -> str:
    """What scanned."""
    if plan.way == "matches":
        return "faiss-flat" if faiss_works() else "numpy"
    return state.executor.name if plan.way == "scan" else "brute force"


def _mean(parts: list[NDArray[np.int64]]) -> float:
    return float(np.concatenate(parts).mean()) if parts else 0.0


def _shown_probes(state: SearchState, request: SearchRequest, probes: Probes) -> tuple[Probe, ...]:
    query = normalized(request.queries)[0] if state.config.metric == "cosine" else request.queries[0]
    leaves = probes.leaves[0][probes.leaves[0] >= 0][:_SHOWN_PROBES].tolist()
    scores = state.scorer.distances(query, probes.scores[0, : len(leaves)], state.config.metric)
    return tuple(
        Probe(state.leaves.text(leaf), float(score), int(state.leaves.sizes[leaf]))
        for leaf, score in zip(leaves, scores, strict=True)
    )
