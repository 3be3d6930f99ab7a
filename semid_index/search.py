"""lookup -> rerank -> result, with a trace of each step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from semid_index.devices import cores
from semid_index.errors import InvalidArgumentError, SearchTimeoutError
from semid_index.incoming import LARGEST_SQUARE
from semid_index.items import check_count
from semid_index.lookup import Leaves, Matches, Probes, choose_probes
from semid_index.metrics import divisors, normalized
from semid_index.native import Scanned, ScannedOne, opened_leaves
from semid_index.quantizer import Vectors
from semid_index.records import Metric, Probe, SearchResult, SearchTrace
from semid_index.rerank import Distances, Positions, faiss_threads, faiss_works, search_matches, smallest
from semid_index.scan import NativeScan
from semid_index.segments import SearchState, Segment, Snapshot
from semid_index.vector_lists import VectorListExecutor, candidates_for

Rows = NDArray[np.int64]
Lengths = NDArray[np.float32] | None

_BLOCK = 1_024  # queries carried through all steps at once, at most; time is looked at in between
_NATIVE_BLOCK = 8_192  # the same where compiled code carries out all steps, and deals out queries to threads
_COUNTS = (int, type(None))
_PREPARED = 64  # choices of options that a snapshot remembers
_BLOCK_CANDIDATES = 1 << 24  # candidates that a block of queries may have: 200 MB
_FIRST_TIMED_BLOCK = 16  # queries, where there is a timeout
_TIMED_BLOCK_SECONDS = 0.1  # that the blocks after it are to take
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
_NEARLY_ALL = 0.75  # from here on what does not match, or was deleted, is passed over during the scan
_FILTER_SECONDS = 60.0  # that a filter may take in a search without a timeout


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
        check_count("k", self.k)
        for name, value in (("probes", self.probes), ("rerank", self.rerank), ("threads", self.threads)):
            if value is not None:
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
    booked: float = 0.0
    """The sum of the seconds."""

    def step(self, name: str) -> _Step:
        """Counts the time inside a ``with`` statement; what is counted meanwhile as a step of its own, only as that."""
        return _Step(self, name)

    def book(self, name: str, seconds: float) -> None:
        """Count a step that took so long."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.booked += seconds

    def book_parts(self, name: str, whole: float, **parts: float) -> None:
        """Count a step, and parts of it, given in seconds of all threads together, as steps of their own."""
        together = sum(parts.values())
        share = whole / max(whole, together)
        self.book(name, whole - share * together)
        for part, seconds in parts.items():
            self.book(part, share * seconds)

    def left(self, otherwise: float) -> float:
        """Seconds until the timeout, or another number of seconds where there is none."""
        return otherwise if self.timeout is None else self.timeout - (time.perf_counter() - self.started)

    def check(self) -> None:
        if self.timeout is not None and time.perf_counter() - self.started > self.timeout:
            raise SearchTimeoutError(
                f"The search ran past its timeout of {self.timeout} s. Allow more, or ask for fewer probes."
            )


class _Step:
    """A step that is being timed. A class of its own, for a generator as context manager takes four times as long."""

    __slots__ = ("before", "clock", "name", "others")

    def __init__(self, clock: _Clock, name: str) -> None:
        self.clock, self.name = clock, name

    def __enter__(self) -> None:
        self.others = self.clock.booked
        self.before = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        clock = self.clock
        inside = clock.booked - self.others
        clock.book(self.name, time.perf_counter() - self.before - inside)


class _Plan(NamedTuple):
    """How a segment is searched, and why."""

    way: Literal["nothing", "exact", "matches", "scan"]
    """``matches``: exact distances to the matches of the best leaves. ``scan``: let the executor scan the best leaves,
    drop what does not match, and re-rank."""
    budget: int
    """Items to look at, of those that match."""
    text: str


@dataclass(frozen=True)
class _Part:
    """A segment, and what of it a search looks at."""

    state: SearchState
    start: int
    """What numbers its positions through all segments."""
    matches: Matches | None
    """The items that can be hits; None for all."""
    plan: _Plan

    def __len__(self) -> int:
        return len(self.state) if self.matches is None else len(self.matches)


class _Hits(NamedTuple):
    """What one block of queries found in a part, or in all: each (q, k), padded with -1 and inf; and how it went."""

    positions: Positions
    distances: Distances
    probed: NDArray[np.int64] | int
    """(q,) leaves opened."""
    candidates: NDArray[np.int64] | int
    """(q,) items looked at."""
    reranked: float
    shown: Callable[[], tuple[Probe, ...]] = tuple
    """The leaves opened for the first query, best first."""


def search(
    load: Callable[[Callable[[], Rows | None]], tuple[Snapshot, Rows | None]],
    request: SearchRequest,
    match: Callable[[float], Rows] | None = None,
) -> SearchResult:
    """The k nearest items for each query.

    ``load``: gives a snapshot, and what a function that it is given returns at the same moment. ``match``: with a
    filter, gives the rows that fulfil it, within the number of seconds that it is called with.
    """
    clock = _Clock(request.timeout)

    def matching() -> Rows | None:
        if match is None:
            return None
        clock.check()
        with clock.step("filter"):
            return match(clock.left(_FILTER_SECONDS))

    with clock.step("load"):
        snapshot, rows = load(matching)
        parts = _parts(snapshot, request, None) if rows is None else []
    if rows is not None:
        with clock.step("filter"):
            parts = _parts(snapshot, request, rows)
    items = sum(map(len, parts))
    k = min(int(request.k), items)
    blocks: list[_Hits] = []
    natively = all(_native_scan(part) for part in parts if len(part))
    for block in _blocks(request, items, k, clock, _NATIVE_BLOCK if natively else _BLOCK) if k else ():
        queries, lengths = request.queries[block], None
        if parts[0].state.config.metric == "cosine":
            if natively:  # divided by them there, each by the thread that searches for it
                lengths = divisors(queries)
            else:
                queries = normalized(queries)
        blocks.append(_search_block(parts, request, queries, lengths, k, clock))
    clock.check()
    return _result(snapshot, parts, request, blocks, clock, filtered=match is not None)


def search_one(
    load: Callable[[], Snapshot], queries: Vectors, single: bool, options: tuple[int, int | None, int | None]
) -> SearchResult | None:
    """What :func:`search` finds for one query (1, dim), in less time; None where it takes more than one native call.

    ``load``: gives a snapshot of items whose vectors are in memory. ``options``: k, probes and rerank.
    """
    started = time.perf_counter()
    k, probes, rerank = options
    if type(k) is not int or type(probes) not in _COUNTS or type(rerank) not in _COUNTS:
        return None
    snapshot = load()
    cosine = snapshot.segments[0].state.config.metric == "cosine"
    square = float(np.einsum("ij,ij->i", queries, queries)[0])
    if not (0 < square <= LARGEST_SQUARE or (square == 0 and not cosine)):
        return None
    prepared = snapshot.prepared
    one: _OneQuery | None = prepared.get(options)
    if one is None:
        if options in prepared:
            return None
        if len(prepared) >= _PREPARED:
            prepared.clear()
        request = SearchRequest(queries.copy(), True, k, probes, rerank)
        one = prepared[options] = _OneQuery.prepare(snapshot, request)
        if one is None:
            return None
    return one.search(snapshot, queries[0], math.sqrt(square) if cosine else 1.0, single, started)


def _blocks(request: SearchRequest, items: int, k: int, clock: _Clock, most: int) -> Iterator[slice]:
    """The queries, block by block: few at once if each has many candidates, or if a block must not take long."""
    candidates = min(int(request.rerank or _RERANK_PER_HIT * k), items)
    most = max(1, min(most, _BLOCK_CANDIDATES // max(k, candidates)))
    size = most if request.timeout is None else min(most, _FIRST_TIMED_BLOCK)
    start = 0
    while start < len(request.queries):
        clock.check()
        before = time.perf_counter()
        yield slice(start, start + size)
        start += size
        if request.timeout is not None:
            took = max(time.perf_counter() - before, 1e-6)
            size = int(np.clip(size * _TIMED_BLOCK_SECONDS / took, 1, min(most, 4 * size)))


def _parts(snapshot: Snapshot, request: SearchRequest, rows: Rows | None) -> list[_Part]:
    """How each segment is searched. ``rows``: those that fulfil the filter, if there is one."""
    parts = []
    for segment, start in zip(snapshot.segments, snapshot.starts.tolist(), strict=True):
        if rows is None:
            parts.append(_Part(segment.state, start, segment.live, _plan(segment, request)))
        else:
            matches = segment.matches(rows)
            parts.append(_Part(segment.state, start, matches, _filtered_plan(segment, request, matches)))
    return parts


def _plan(segment: Segment, request: SearchRequest) -> _Plan:
    state, items = segment.state, len(segment)
    if not items:
        return _Plan("nothing", 0, "no item can be a hit")
    if request.exact:
        return _Plan("exact", items, "distances to all items, because exact=True")
    if state.few:
        return _Plan("exact", items, "distances to all, because they are few")
    deleted = len(state) - items
    return _plan_to_probe(len(state.leaves), items, deleted, state.executor.exact)


@lru_cache(maxsize=64)
def _plan_to_probe(leaves: int, items: int, deleted: int, exact: bool) -> _Plan:
    """Made once for each state of a segment: to write its text takes a single query a noticeable time."""
    text = f"probe the best of {leaves:,} leaves"
    if not deleted:
        return _Plan("scan", default_budget(items), text)
    text += f", passing over {deleted:,} deleted items"
    return _Plan("matches" if exact else "scan", default_budget(items), text)


def _filtered_plan(segment: Segment, request: SearchRequest, matches: Matches) -> _Plan:
    """Few matches are compared one and all; many are found by a search as without a filter; others leaf by leaf."""
    state, found, items = segment.state, len(matches), len(segment)
    leaves, budget = len(state.leaves), filtered_budget(found, items)
    share = f"{found:,} of {items:,} items match"
    if not found:
        return _Plan("nothing", 0, "no item can be a hit: none matches the filter")
    if request.exact:
        return _Plan("exact", found, f"{share}: distances to all of them, because exact=True")
    few = _Plan("exact", found, f"{share}: distances to all of them, because they are few")
    if state.few or found <= max(_LEAST_MATCHES, _FEW_BUDGETS * request.k):
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
    parts: list[_Part], request: SearchRequest, queries: Vectors, lengths: Lengths, k: int, clock: _Clock
) -> _Hits:
    """The k nearest items of all parts."""
    found = [_search_part(part, request, queries, lengths, min(k, len(part)), clock) for part in parts if len(part)]
    if len(found) == 1:
        return found[0]
    with clock.step("merge"):
        positions = np.concatenate([hits.positions for hits in found], axis=1)
        distances = np.concatenate([hits.distances for hits in found], axis=1)
        positions, distances = smallest(positions, distances, k)
    return _Hits(
        positions,
        distances,
        sum(hits.probed for hits in found),
        sum(hits.candidates for hits in found),
        sum(hits.reranked for hits in found),
        lambda: tuple(sorted((probe for hits in found for probe in hits.shown()), key=lambda probe: probe.score)),
    )


def _native_scan(part: _Part) -> NativeScan | None:
    """What carries out all steps in compiled code, if that is how the part is searched."""
    if part.plan.way != "scan" or len(part) < _NEARLY_ALL * len(part.state):
        return None
    executor = part.state.executor
    return executor if isinstance(executor, NativeScan) else None


def _search_part(
    part: _Part, request: SearchRequest, queries: Vectors, lengths: Lengths, k: int, clock: _Clock
) -> _Hits:
    """The k nearest items of a part, numbered through all of them."""
    if (executor := _native_scan(part)) is not None:
        return _search_natively(part, executor, request, queries, lengths, k, clock)
    with faiss_threads(request.threads):
        return _search_in_steps(part, request, queries, k, clock)


def _search_in_steps(part: _Part, request: SearchRequest, queries: Vectors, k: int, clock: _Clock) -> _Hits:
    """The k nearest items of a part: leaves are chosen, then scanned, then the best are re-ranked; or all compared."""
    state, matches, plan = part.state, part.matches, part.plan
    if plan.way == "exact":
        with clock.step("rerank"):
            allowed = None if matches is None else matches.positions
            positions, distances = state.vectors.nearest(queries, k, allowed, between=clock.check)
        return _Hits(positions + part.start, distances, 0, plan.budget, plan.budget)
    with clock.step("lookup"):
        probes = choose_probes(
            state.scorer,
            queries,
            state.leaves.sizes if matches is None else matches.counts,
            at_least=k,
            budget=plan.budget,
            probes=_probes(state, request),
            threads=_threads(request),
        )
    if plan.way == "matches" and matches is not None:
        with clock.step("rerank"):
            positions, distances = search_matches(state.vectors, queries, matches, probes, k)
        reranked = float(probes.candidates.mean())
    else:
        positions, distances, reranked = _scan(part, request, queries, probes, k, clock)
    return _Hits(
        np.where(positions >= 0, positions + part.start, -1),
        distances,
        probes.counts,
        probes.candidates,
        reranked,
        _shown_probes(state, queries[0], probes) if request.single else tuple,
    )


def _threads(request: SearchRequest) -> int:
    return min(int(request.threads or cores()), len(request.queries))


def _search_natively(
    part: _Part,
    executor: NativeScan,
    request: SearchRequest,
    queries: Vectors,
    lengths: Lengths,
    k: int,
    clock: _Clock,
) -> _Hits:
    """The k nearest items of a part: leaves chosen, scanned and re-ranked in one call."""
    rerank = _rerank(part.state, request, k)
    before = time.perf_counter()
    found = executor.search_leaves(
        queries,
        k,
        rerank=rerank,
        budget=part.plan.budget,
        probes=_probes(part.state, request),
        matches=part.matches,
        shown=_SHOWN_PROBES if request.single else 0,
        threads=_threads(request),
        lengths=lengths,
    )
    _, scan, reranking = found.seconds.tolist()
    clock.book_parts("lookup", time.perf_counter() - before, scan=scan, rerank=reranking)
    return _Hits(
        np.where(found.positions >= 0, found.positions + part.start, -1) if part.start else found.positions,
        found.distances,
        found.opened,
        found.candidates,
        float(min(rerank, max(found.candidates.tolist()))),
        _native_probes(part.state, executor, queries, lengths, found) if request.single else tuple,
    )


def _native_probes(
    state: SearchState, executor: NativeScan, queries: Vectors, lengths: Lengths, found: Scanned
) -> Callable[[], tuple[Probe, ...]]:
    leaves, metric, distances = state.leaves, state.config.metric, executor.leaf_distances
    query = queries[0].copy() if lengths is None else queries[0] / lengths[0]  # its owner may change it

    def shown() -> tuple[Probe, ...]:
        chosen = found.leaves[0][found.leaves[0] >= 0]
        return _written(leaves, chosen, distances(query, found.scores[0, : len(chosen)], metric))

    return shown


@lru_cache(maxsize=64)
def _offsets_of_one(hits: int) -> NDArray[np.int64]:
    """Of the results of one query with so many hits."""
    offsets = np.array([0, hits])
    offsets.setflags(write=False)
    return offsets


class _OneQuery:
    """Searches for one query at a time, with the same options in the same snapshot; what can be, is worked out before.

    It holds the part that it searches, and not the snapshot, which holds it.
    """

    def __init__(
        self,
        part: _Part,
        request: SearchRequest,
        scan: Callable[[Vectors, float], ScannedOne],
        leaf_distances: Callable[[Vectors, NDArray[np.float32], str], NDArray[np.float32]],
    ) -> None:
        self._part, self._request, self._scan, self._leaf_distances = part, request, scan, leaf_distances
        self._rerank = _rerank(part.state, request, min(request.k, len(part)))

    @classmethod
    def prepare(cls, snapshot: Snapshot, request: SearchRequest) -> _OneQuery | None:
        """None unless compiled code carries out all steps, in a single segment."""
        if len(snapshot.segments) != 1:
            return None
        (part,) = _parts(snapshot, request, None)
        executor, k = _native_scan(part), min(request.k, len(part))
        if executor is None or not k:
            return None
        scan = executor.search_for_one(
            k,
            rerank=_rerank(part.state, request, k),
            budget=part.plan.budget,
            probes=_probes(part.state, request),
            matches=part.matches,
        )
        return None if scan is None else cls(part, request, scan, executor.leaf_distances)

    def search(self, snapshot: Snapshot, query: Vectors, length: float, single: bool, started: float) -> SearchResult:
        """The hits of a query (dim,), which is divided by its length; ``single``: whether it came alone."""
        loaded = time.perf_counter()
        found = self._scan(query, length)
        searched = time.perf_counter()
        hits, distances = found.positions, found.distances
        if hits[-1] < 0:
            filled = hits >= 0
            hits, distances = hits[filled], distances[filled]
        ids = snapshot.ids_at(hits)
        times = started, loaded, searched, time.perf_counter()
        return SearchResult(
            ids,
            distances,
            partial(snapshot.codes_at, hits),
            _offsets_of_one(len(hits)),
            single,
            partial(self._trace, found, length, single, times),
        )

    def _trace(
        self, found: ScannedOne, length: float, single: bool, times: tuple[float, float, float, float]
    ) -> SearchTrace:
        started, loaded, searched, ended = times
        clock = _Clock(None)
        clock.book("load", loaded - started)
        _, scan, reranking = found.seconds
        clock.book_parts("lookup", searched - loaded, scan=scan, rerank=reranking)
        clock.book("ids", ended - searched)
        candidates, opened = found.counts
        hits = _Hits(
            found.positions[np.newaxis],
            found.distances[np.newaxis],
            np.array([opened]),
            np.array([candidates]),
            float(min(self._rerank, candidates)),
            partial(self._probes, found, length) if single else tuple,
        )
        seconds = dict(clock.seconds, total=ended - started)
        return _trace([self._part], self._request, [hits], seconds, filtered=False)

    def _probes(self, found: ScannedOne, length: float) -> tuple[Probe, ...]:
        state, dim = self._part.state, self._part.state.config.dim
        chosen, scores = opened_leaves(found.opened[dim:])
        query = found.opened[:dim] / np.float32(length)
        distances = self._leaf_distances(query, scores[:_SHOWN_PROBES], state.config.metric)
        return _written(state.leaves, chosen[:_SHOWN_PROBES], distances)


def _scan(
    part: _Part, request: SearchRequest, queries: Vectors, probes: Probes, k: int, clock: _Clock
) -> tuple[Positions, Distances, float]:
    """Let the executor scan what was probed, and re-rank; also how many are re-ranked for a query."""
    state, matches = part.state, part.matches
    rerank = min(_rerank(state, request, k), int(probes.candidates.max()))
    if matches is not None:
        return *_scan_and_check(state, queries, probes, matches, k, rerank, clock), float(rerank)
    with clock.step("scan"):
        distances, positions = state.executor.search(queries, probes, k if state.executor.exact else rerank)
    if state.executor.exact:
        return positions, distances, float(probes.candidates.mean())
    with clock.step("rerank"):
        distances = state.vectors.distances(queries, positions)
        positions, distances = smallest(positions, distances, k)
    return positions, distances, float(rerank)


def _rerank(state: SearchState, request: SearchRequest, k: int) -> int:
    """Candidates to compute exact distances for; at most all items, for memory is made for so many."""
    if request.rerank:
        wanted = max(int(request.rerank), k)
    elif isinstance(state.executor, VectorListExecutor):  # which scans vectors, and not codes
        wanted = max(candidates_for(k, state.executor.precision), k)
    else:
        wanted = default_rerank(k, state.config.metric)
    return min(wanted, len(state))


def _probes(state: SearchState, request: SearchRequest) -> int | None:
    """Leaves to open, if that was asked for: at most all."""
    return None if request.probes is None else min(int(request.probes), len(state.leaves))


def _scan_and_check(
    state: SearchState, queries: Vectors, probes: Probes, matches: Matches, k: int, rerank: int, clock: _Clock
) -> tuple[Positions, Distances]:
    """Scan for more than enough, and re-rank what matches; where that was too little, look at the matches alone."""
    with clock.step("scan"):
        opened = np.where(probes.leaves >= 0, state.leaves.sizes[probes.leaves], 0).sum(axis=1)
        enough = min(math.ceil(_SCAN_MARGIN * rerank * len(state) / len(matches)), rerank + len(state) - len(matches))
        most = state.executor.most if isinstance(state.executor, VectorListExecutor) else enough
        scanned = state.executor.search(queries, probes, min(enough, int(opened.max()), most))[1]
        kept = _first_allowed(scanned, matches.allowed, rerank)
    with clock.step("rerank"):
        positions, distances = smallest(kept, state.vectors.distances(queries, kept), k)
        short = (kept >= 0).sum(axis=1) < np.minimum(rerank, probes.candidates)
        if short.any():
            few = np.flatnonzero(short)
            again = search_matches(state.vectors, queries[few], matches, probes.of(few), k)
            positions[few], distances[few] = again
    return positions, distances


def _first_allowed(positions: Positions, allowed: NDArray[np.bool_], count: int) -> Positions:
    """The first positions of each row that are allowed, at most so many, padded with -1."""
    fits = (positions >= 0) & allowed[positions]
    first = np.argsort(~fits, axis=1, kind="stable")[:, :count]
    return np.where(np.take_along_axis(fits, first, axis=1), np.take_along_axis(positions, first, axis=1), -1)


def _result(
    snapshot: Snapshot,
    parts: list[_Part],
    request: SearchRequest,
    blocks: list[_Hits],
    clock: _Clock,
    *,
    filtered: bool,
) -> SearchResult:
    queries = len(request.queries)
    if len(blocks) == 1:
        found, near = blocks[0].positions, blocks[0].distances
    elif blocks:
        found = np.concatenate([block.positions for block in blocks])
        near = np.concatenate([block.distances for block in blocks])
    else:
        found, near = np.empty((queries, 0), dtype=np.int64), np.empty((queries, 0), dtype=np.float32)
    hits, distances, width = found.ravel(), near.ravel(), found.shape[1]
    if width and (found >= 0).all():  # nearly always
        offsets = np.arange(0, len(hits) + 1, width)
    else:
        hit = found >= 0
        hits, distances = found[hit], near[hit]
        offsets = np.concatenate([[0], np.cumsum(hit.sum(axis=1))])
    with clock.step("ids"):
        flat_ids = snapshot.ids_at(hits)
    seconds = dict(clock.seconds, total=time.perf_counter() - clock.started)
    read_trace = partial(_trace, parts, request, blocks, seconds, filtered=filtered)
    if not request.single:  # what it is made from would be held as long as the result
        trace = read_trace()
        read_trace = partial(lambda: trace)
    return SearchResult(flat_ids, distances, lambda: snapshot.codes_at(hits), offsets, request.single, read_trace)


def _trace(
    parts: list[_Part], request: SearchRequest, blocks: list[_Hits], seconds: dict[str, float], *, filtered: bool
) -> SearchTrace:
    searched = [part for part in parts if len(part)] or parts[:1]
    return SearchTrace(
        queries=len(request.queries),
        k=int(request.k),
        leaves=sum(len(part.state.leaves) for part in parts),
        probed=_mean([block.probed for block in blocks], blocks),
        candidates=_mean([block.candidates for block in blocks], blocks),
        reranked=_mean([block.reranked for block in blocks], blocks),
        matches=sum(map(len, parts)) if filtered else None,
        distances="exact" if parts[0].state.vectors.exact else "decoded",
        executor=_executor_names(searched),
        seconds=seconds,
        read_probes=_first_probes(blocks[0].shown) if blocks else tuple,
        plan=_plan_text(searched),
        device=_devices(searched),
    )


def _first_probes(shown: Callable[[], tuple[Probe, ...]]) -> Callable[[], tuple[Probe, ...]]:
    return lambda: shown()[:_SHOWN_PROBES]


def _plan_text(parts: list[_Part]) -> str:
    """One sentence about all parts that were searched."""
    first, *later = parts
    others = [f"and in {len(part.state):,} items added later: {part.plan.text}" for part in later]
    return "; ".join([first.plan.text, *others])


def _executor_names(parts: list[_Part]) -> str:
    """What scanned."""
    names = []
    for part in parts:
        if part.plan.way == "matches":
            names.append("faiss-flat" if faiss_works() else "numpy")
        else:
            names.append(part.state.executor.name if part.plan.way == "scan" else "brute force")
    return ", ".join(dict.fromkeys(names))


def _devices(parts: list[_Part]) -> str:
    """Where it scanned."""
    scanned = [part.state.executor for part in parts if part.plan.way == "scan"]
    used = [executor.device for executor in scanned if isinstance(executor, VectorListExecutor)]
    return ", ".join(dict.fromkeys(used)) or "cpu"


def _mean(values: list[NDArray[np.int64] | float], blocks: list[_Hits]) -> float:
    """The mean over all queries of what is known of each query of a block, or of the block."""
    if not blocks:
        return 0.0
    counts = [len(block.positions) for block in blocks]
    sums = [
        sum(value.tolist()) if isinstance(value, np.ndarray) else count * value
        for count, value in zip(counts, values, strict=True)
    ]
    return float(sum(sums) / sum(counts))


def _shown_probes(state: SearchState, query: Vectors, probes: Probes) -> Callable[[], tuple[Probe, ...]]:
    chosen = probes.leaves[0][probes.leaves[0] >= 0][:_SHOWN_PROBES]
    scores = state.scorer.distances(query, probes.scores[0, : len(chosen)], state.config.metric)
    leaves = state.leaves  # what is called later holds these, and not all else
    return lambda: _written(leaves, chosen, scores)


def _written(leaves: Leaves, chosen: NDArray[np.int64], scores: NDArray[np.float32]) -> tuple[Probe, ...]:
    """The leaves that were chosen, written out."""
    return tuple(
        Probe(leaves.text(leaf), score, int(leaves.sizes[leaf]))
        for leaf, score in zip(chosen.tolist(), scores.tolist(), strict=True)
    )
