"""What searching needs in memory: segments of the items, read from the store, and the snapshots that they make up.

A *segment* holds the items that were read together. It never changes: an item that is deleted later stays in it, and is
passed over. A *snapshot* is all segments at one moment; searches that go on with an old one are not disturbed by those
who write. How one snapshot follows from another is in :mod:`semid_index.live`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from semid_index.codes import unpack
from semid_index.lookup import (
    LeafScorer,
    Leaves,
    Matches,
    Places,
    additive_scorer,
    centroid_scorer,
    make_leaves,
    whole_index,
)
from semid_index.quantizer import Quantizer
from semid_index.quantizers.tail import Tail
from semid_index.rerank import (
    DecodedVectors,
    Executor,
    FileVectors,
    MemoryVectors,
    Positions,
    ScanData,
    VectorsByPosition,
    stored_in_place,
)
from semid_index.scan import fastest_executor
from semid_index.store import Stamp, Store

if TYPE_CHECKING:
    import pyarrow as pa


def default_leaf_size(items: int) -> int:
    """sqrt(n) items, at least 128: opening a leaf costs a fixed time, and so does scoring one (docs/decisions/0003)."""
    return int(np.clip(math.sqrt(items), 128, 2_048))


class SearchState:
    """What searching some of the items needs in memory, read from the store when first needed."""

    def __init__(
        self,
        store: Store,
        quantizer: Quantizer,
        tail: Tail | None,
        *,
        vectors_in: Literal["memory", "file"],
        rows: range,
        few: bool = False,
    ) -> None:
        """``rows``: the items are those with one of these rows. ``few``: all of them are always compared."""
        self._store, self._quantizer, self._tail, self._vectors_in = store, quantizer, tail, vectors_in
        self.config = store.config
        self.layout = store.layout
        self.rows = rows
        self.few = few
        self.codes = store.codes(rows)

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
        if self._vectors_in == "file" and not self.few:
            return FileVectors(self._store, self.codes.rows, self.config.metric)
        return MemoryVectors.load(self._store, self.places, self.config.metric)

    @cached_property
    def executor(self) -> Executor:
        """Scans the leaves."""
        data = ScanData(
            self.leaves, self.codes, self._quantizer, self.vectors, self.config.metric, self._tail, self._read_tail
        )
        return fastest_executor(data, lambda: self.scorer)

    @cached_property
    def ids(self) -> pa.Array:
        """The ids of the items."""
        return self._store.ids(self.rows)

    @cached_property
    def places(self) -> Places:
        """The positions of rows."""
        return Places(self.codes.rows, self.rows)

    def prepare(self) -> SearchState:
        """Read all that a search needs, at the same moment, so that it belongs together."""
        _ = self.vectors, self.ids
        if not self.few:
            _ = self.scorer, self.executor
        return self

    def among(self, rows: NDArray[np.int64]) -> Matches:
        """Those of the items that have one of these rows; rows of other items, or of none, are left out."""
        found = self.places.of(rows)
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
        if "places" in loaded:
            parts["positions"] = self.places.nbytes
        return parts

    @cached_property
    def _decoded(self) -> DecodedVectors:
        return DecodedVectors(self._quantizer, self.codes, self.leaves, self.config.dim, self.config.metric)

    def _read_tail(self) -> NDArray[np.uint8]:
        codes: NDArray[np.uint8] | None = None
        for positions, batch in stored_in_place(self._store, self.places, "tail"):
            if codes is None:
                codes = np.empty((len(self), batch["tail"].shape[1]), dtype=np.uint8)
            codes[positions] = batch["tail"]
        return np.empty((0, 0), dtype=np.uint8) if codes is None else codes


@dataclass(frozen=True)
class Segment:
    """Some of the items at one moment."""

    state: SearchState
    """The items as they were read."""
    live: Matches | None = None
    """Those that are still there; None if all are."""

    def __len__(self) -> int:
        return len(self.state) if self.live is None else len(self.live)

    def matches(self, rows: NDArray[np.int64]) -> Matches:
        """The items that are still there and have one of these rows."""
        found = self.state.among(rows)
        return found if self.live is None else Matches.among(self.state.leaves, found.allowed & self.live.allowed)

    def without(self, remaining: NDArray[np.int64]) -> Segment:
        """The same at a later moment, when only these rows are left."""
        live = self.state.among(remaining)
        return Segment(self.state, live if len(live) < len(self.state) else None)


@dataclass(frozen=True)
class Snapshot:
    """All items at one moment.

    Hits are numbered through all segments: by their positions, counted from segment to segment.
    """

    segments: tuple[Segment, ...]
    """In the order in which their items were added."""
    stamp: Stamp
    """Tells it from all others."""

    def __len__(self) -> int:
        return sum(len(segment) for segment in self.segments)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """(segments,) what to add to a position in a segment to number it through all segments."""
        return np.cumsum([0, *(len(segment.state) for segment in self.segments[:-1])])

    @property
    def states(self) -> tuple[SearchState, ...]:
        """The items as they were read."""
        return tuple(segment.state for segment in self.segments)

    def ids_at(self, hits: Positions) -> NDArray[Any]:
        """The ids of hits."""
        if len(self.segments) == 1:
            return _values(self.states[0].ids.take(hits))
        return self._gather(hits, lambda state, mine: _values(state.ids.take(mine)))

    def codes_at(self, hits: Positions) -> NDArray[np.int32]:
        """The codes of hits: (m, levels)."""
        return self._gather(hits, lambda state, mine: state.codes_at(mine))

    def memory(self) -> dict[str, int]:
        """Bytes held for searching, part by part."""
        parts: dict[str, int] = {}
        for segment in self.segments:
            for name, size in segment.state.memory().items():
                parts[name] = parts.get(name, 0) + size
            if segment.live is not None:
                deleted = segment.live.allowed.nbytes + segment.live.positions.nbytes + segment.live.starts.nbytes
                parts["deleted"] = parts.get("deleted", 0) + deleted
        return parts

    def _gather(self, hits: Positions, read: Callable[[SearchState, Positions], NDArray[Any]]) -> NDArray[Any]:
        of_segment = np.searchsorted(self.starts, hits, side="right") - 1
        parts, order = [], []
        for number, (state, start) in enumerate(zip(self.states, self.starts, strict=True)):
            mine = np.flatnonzero(of_segment == number)
            parts.append(read(state, hits[mine] - start))
            order.append(mine)
        found = np.concatenate(parts)
        found[np.concatenate(order)] = found.copy()
        return found


def _values(column: pa.Array) -> NDArray[Any]:
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values
