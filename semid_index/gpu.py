"""Searching on a GPU: what of a snapshot goes there, and which searches do.

The leaves of an index are cut for the CPU. A GPU gives each list that a query probes to a block of threads of its own,
which lists of some dozen vectors would leave idle; so there, small leaves are made larger first. Everything else about
the items is shared with the search on the CPU, and so are all steps but the scan.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import cached_property
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary, ref

from semid_index.devices import GpuState, device_name
from semid_index.lookup import Leaves, Matches, make_leaves
from semid_index.rerank import ScanData
from semid_index.search import SearchRequest
from semid_index.segments import SearchState, Segment, Snapshot, default_leaf_size
from semid_index.vector_lists import (
    PRECISIONS,
    Precision,
    VectorListExecutor,
    candidates_for,
    most_for,
    needed_bytes,
    typical_sizes,
)

LEAST_QUERIES = 8
"""From so many queries in a batch on, a GPU searches; for fewer, handing them over is estimated to take longer than
the search on the CPU. Not measured."""
LEAST_MEAN = 128
"""Items that a leaf is to have on average, on a GPU. Not measured."""


def why_not(request: SearchRequest, precision: Precision, dim: int) -> str:
    """Why a search is carried out on the CPU although a GPU was chosen; "" if it is not."""
    most = most_for(precision, dim)
    if request.exact:
        return "exact=True"
    if len(request.queries) < LEAST_QUERIES:
        return f"fewer than {LEAST_QUERIES} queries"
    if max(request.k, request.rerank or candidates_for(request.k, precision)) > most:
        return f"more than {most:,} candidates to re-rank"
    return ""


class SearchOnGpu:
    """The snapshots of one index, with the vectors on a GPU, or on several."""

    def __init__(self, gpu: int | None, precision: Precision, *, spread: bool = False) -> None:
        """``gpu``: None for the CPU, where all but the copying is the same. ``spread``: take others if need be."""
        self.gpu, self.precision, self.spread = gpu, precision, spread
        self._states: WeakKeyDictionary[SearchState, StateOnGpu] = WeakKeyDictionary()
        self._latest: tuple[ref[Snapshot], Snapshot] | None = None
        self._making = Lock()

    def snapshot(self, snapshot: Snapshot) -> Snapshot:
        """The same items, to be searched on the GPU; segments that are always compared one and all stay as they are.

        Raises :class:`DeviceError` if they do not fit.
        """
        with self._making:
            latest = self._latest
            if latest is not None and latest[0]() is snapshot:
                return latest[1]
            self._latest = None
            segments = [self._segment(segment) for segment in snapshot.segments]
            made = Snapshot(tuple(segments), snapshot.stamp)
            self._latest = ref(snapshot, self._forget), made
            return made

    def stats(self, items: int, dim: int, state: GpuState | None) -> dict[str, Any]:
        """What is used, and what would be needed for each precision: by the lists on the GPU, or for typical ones."""
        made = [] if self._latest is None else self._latest[1].states
        placed = [state for state in made if isinstance(state, StateOnGpu)]
        sizes = [size for state in placed for size in state.leaves.sizes.tolist()] or typical_sizes(items)
        needs = {precision: needed_bytes(sizes, dim, precision) for precision in PRECISIONS}
        return {
            "used": ", ".join(dict.fromkeys(state.executor.device for state in placed)) or device_name(self.gpu),
            "vectors": self.precision,
            "bytes": sum(state.executor.gpu_bytes for state in placed),
            "needs": needs,
            "fits": None if state is None else [name for name, need in needs.items() if need <= state.free],
            "gpu": None if state is None else asdict(state),
        }

    def _segment(self, segment: Segment) -> Segment:
        state = segment.state
        if state.few or not len(state):
            return segment
        if state not in self._states:
            self._states[state] = StateOnGpu(state, self.gpu, self.precision, spread=self.spread)
        placed = self._states[state]
        return Segment(placed, None if segment.live is None else Matches.among(placed.leaves, segment.live.allowed))

    def _forget(self, dead: ref[Snapshot]) -> None:
        """Let go of what was made of a snapshot that nothing else uses."""
        latest = self._latest
        if latest is not None and latest[0] is dead:
            self._latest = None


class StateOnGpu(SearchState):
    """The items of another state, whose vectors are scanned on a GPU."""

    def __init__(self, state: SearchState, gpu: int | None, precision: Precision, *, spread: bool = False) -> None:
        left_out = {"executor"}
        if leaves_are_small(state.leaves) and len(state.leaves) > 1:
            left_out |= {"leaves", "scorer"}
        vars(self).update({name: value for name, value in vars(state).items() if name not in left_out})
        self._gpu, self._precision, self._spread = gpu, precision, spread
        _ = self.scorer, self.executor  # at once, while nobody else makes them too

    @cached_property
    def leaves(self) -> Leaves:
        """Leaves with enough items on average."""
        size = self.config.leaf_size or default_leaf_size(len(self))
        while leaves_are_small(leaves := make_leaves(self.codes.sids, self.layout, size)) and len(leaves) > 1:
            size *= 2
        return leaves

    @cached_property
    def executor(self) -> VectorListExecutor:
        """Scans the vectors."""
        data = ScanData(
            self.leaves, self.codes, self._quantizer, self.vectors, self.config.metric, None, self._read_tail
        )
        return VectorListExecutor(data, precision=self._precision, gpu=self._gpu, spread=self._spread)


def leaves_are_small(leaves: Leaves) -> bool:
    """Whether they would leave a GPU idle."""
    return int(leaves.starts[-1]) < LEAST_MEAN * len(leaves)
