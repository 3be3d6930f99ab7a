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

from semid_index.arrow import Values, numpy_column
from semid_index.code_scan import fastest_executor
from semid_index.coder import Coder
from semid_index.codes import pack, pack_rest, unpack
from semid_index.contents import Stamp, StoredCodes
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
from semid_index.scan import NativeScan
from semid_index.store import Store

if TYPE_CHECKING:
    import pyarrow as pa


def default_leaf_size(items: int) -> int:
    """sqrt(n) items, at least 128: opening a leaf costs a fixed time, and so does scoring one (docs/decisions/0003)."""
    return int(np.clip(math.sqrt(items), 128, 2_048))


class SearchState:
    """What searching some of the items needs in memory, read from the store when first needed."""

    _scan: NativeScan | None = None
    """Holds the codes, where nobody else does."""
    _ids_are_rows = False

    def __init__(
        self,
        store: Store,
        coder: Coder,
        *,
        vectors_in: Literal["memory", "file"],
        rows: range,
        few: bool = False,
    ) -> None:
        """``rows``: the items are those with one of these rows. ``few``: all of them are always compared."""
        self._store, self._vectors_in = store, vectors_in
        self._quantizer, self._tail = coder.quantizer, coder.tail
        self.config = store.config
        self.layout = store.layout
        self.rows = rows
        self.few = few
        self._count = len(self.codes.rows)

    def __len__(self) -> int:
        return self._count

    @cached_property
    def codes(self) -> StoredCodes:
        """The codes of all items, sorted; where only the scan still holds them, they are read from there."""
        if self._scan is None:
            return self._store.codes(self.rows)
        codes = self._scan.codes_at(np.arange(len(self)))
        rest = pack_rest(codes, self.layout) if self.layout.rest_levels else None
        return StoredCodes(self._rows.astype(np.int64), pack(codes, self.layout), rest)

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
            return FileVectors(self._store, self._rows, self.config.metric, self.rows)
        return MemoryVectors.load(self._store, self.places, self.config.metric)

    @cached_property
    def executor(self) -> Executor:
        """Scans the leaves."""
        data = ScanData(
            self.leaves, self.codes, self._quantizer, self.vectors, self.config.metric, self._tail, self._read_tail
        )
        return fastest_executor(data, lambda: self.scorer)

    @cached_property
    def ids(self) -> pa.Array | None:
        """The ids of the items; None if they equal the rows, or are fetched from the file."""
        ids = self._store.ids(self.rows, of=self.codes)
        if self.config.vectors != "none" and self._vectors_in == "memory":
            return ids
        self._ids_are_rows = str(ids.type) == "int64" and np.array_equal(_values(ids), self._rows)
        fetched = self._vectors_in == "file" and not self.few
        return None if self._ids_are_rows or fetched else ids

    def ids_at(self, positions: Positions) -> NDArray[Any]:
        """The ids of the items at some positions."""
        if self.ids is not None:
            return self._id_values.at(positions)
        rows = self._rows[positions].astype(np.int64)
        return rows if self._ids_are_rows else _values(self._store.ids_and_codes_of(rows)[0])

    @cached_property
    def _id_values(self) -> Values:
        return Values(self.ids)

    @cached_property
    def places(self) -> Places:
        """The positions of rows."""
        return Places(self.codes.rows, self.rows)

    def prepare(self) -> SearchState:
        """Read all that a search needs, at the same moment, so that it belongs together."""
        _ = self.ids, self.vectors  # vectors last: once they are read, DuckDB lets go of what it holds of the file
        if not self.few:
            _ = self.scorer, self.executor
            self._let_go()
        return self

    def _let_go(self) -> None:
        """Of what few searches need, where memory counts: it can be made again from what the scan holds."""
        scan = self.executor
        if isinstance(self.vectors, MemoryVectors) or not isinstance(scan, NativeScan) or not scan.holds_codes:
            return
        _ = self._rows
        self._scan = scan
        for name in ("codes", "places"):
            vars(self).pop(name, None)

    def among(self, rows: NDArray[np.int64]) -> Matches:
        """Those of the items that have one of these rows; rows of other items, or of none, are left out."""
        if isinstance(self.vectors, MemoryVectors):
            found = self.places.of(rows)
            allowed = np.zeros(len(self), dtype=bool)
            allowed[found[found >= 0]] = True
        else:
            allowed = _is_among(self._rows, rows, self.rows)
        return Matches.among(self.leaves, allowed)

    def codes_at(self, positions: Positions) -> NDArray[np.int32]:
        """The codes at some positions: (m, levels)."""
        if self._scan is not None:
            return self._scan.codes_at(positions)
        return unpack(
            self.codes.sids[positions], self.layout, None if self.codes.rest is None else self.codes.rest[positions]
        )

    def memory(self) -> dict[str, int]:
        """Bytes held for searching, part by part; only of what was read already."""
        loaded = vars(self)
        parts = {"codes": 0}
        if "_rows" in loaded:
            parts["codes"] += self._rows.nbytes
        if "codes" in loaded:
            held = (self.codes.rows, self.codes.sids, self.codes.rest)
            parts["codes"] += sum(array.nbytes for array in held if array is not None)
        if "vectors" in loaded:
            parts["vectors"] = self.vectors.nbytes
        if "executor" in loaded:
            parts["executor"] = self.executor.nbytes
        ids = loaded.get("ids")
        if ids is not None:
            parts["ids"] = int(ids.nbytes)
        if "scorer" in loaded:
            leaves = self.leaves
            held = (leaves.starts, leaves.lowest, leaves.bits)
            parts["leaves"] = sum(array.nbytes for array in held) + self.scorer.nbytes
        if "places" in loaded:
            parts["positions"] = self.places.nbytes
        return parts

    @cached_property
    def _rows(self) -> NDArray[np.int32] | NDArray[np.int64]:
        """The row of the item at each position, as small as it can be."""
        small = self.rows.stop <= np.iinfo(np.int32).max
        return self.codes.rows.astype(np.int32) if small else self.codes.rows

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

    @cached_property
    def prepared(self) -> dict[Any, Any]:
        """What searches have worked out for all others with the same options. Nothing in it may hold the snapshot."""
        return {}

    @property
    def states(self) -> tuple[SearchState, ...]:
        """The items as they were read."""
        return tuple(segment.state for segment in self.segments)

    def ids_at(self, hits: Positions) -> NDArray[Any]:
        """The ids of hits."""
        if len(self.segments) == 1:
            return self.states[0].ids_at(hits)
        return self._gather(hits, lambda state, mine: state.ids_at(mine))

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


def _is_among(items: NDArray[np.integer], rows: NDArray[np.int64], span: range) -> NDArray[np.bool_]:
    """For each item, given by its row, whether that is one of some rows; all items have rows within the span."""
    rows = rows[(rows >= span.start) & (rows < span.stop)]
    if len(span) > 64 * max(len(items), 1):
        return np.isin(items, rows)
    wanted = np.zeros(len(span), dtype=bool)
    wanted[rows - span.start] = True
    found: NDArray[np.bool_] = wanted[items - span.start]
    return found


def _values(column: pa.Array) -> NDArray[Any]:
    return numpy_column(column)
