"""What is to be stored, as a user gave it: vectors, ids and metadata, checked before anything is written."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from semid_index.errors import (
    DimensionMismatchError,
    DuplicateIdError,
    InvalidArgumentError,
    InvalidIdsError,
    InvalidVectorsError,
    NotTrainedError,
)
from semid_index.items import as_ids, as_metadata, check_count, id_type
from semid_index.quantizer import ProgressCallback, Vectors
from semid_index.records import IndexConfig, Metric
from semid_index.store import Store
from semid_index.vectors import VectorSource, open_vectors

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger("semid_index")

LARGEST_SQUARE = 1e37  # the squared length of a vector, so that squared distances stay within float32
_LARGEST_FLOAT16 = 65_504.0
_SMALLEST_FLOAT16 = 2.0**-14  # below, a float16 has fewer and fewer bits, and none below 3e-8
_CHECKED_AT_ONCE = 50_000
_LARGEST_ID = 2**63 - 1


@dataclass(frozen=True)
class Items:
    """Some of the items that are to be written."""

    ids: pa.Array
    vectors: Vectors
    metadata: pa.Table | None

    def take(self, positions: NDArray[np.int64]) -> Items:
        """Those at some positions."""
        metadata = None if self.metadata is None else self.metadata.take(positions)
        return Items(self.ids.take(positions), self.vectors[positions], metadata)


@dataclass(frozen=True)
class Incoming:
    """Items that are to be written, checked."""

    source: VectorSource
    good: pa.BooleanArray | None
    """(source.rows,) which of them can be used; None if all."""
    all_ids: pa.Array
    """(source.rows,)"""
    ids: pa.Array
    """(n,) of those that can be used, as are all below."""
    metadata: pa.Table | None

    def batches(self, batch_size: int, progress: ProgressCallback | None) -> Iterator[Items]:
        """The items that can be used, some at a time."""
        done = seen = 0
        for batch in self.source.batches(batch_size):
            seen += len(batch)
            if self.good is not None:
                batch = batch[self.good[seen - len(batch) : seen].to_numpy(zero_copy_only=False)]
            if len(batch):
                metadata = None if self.metadata is None else self.metadata.slice(done, len(batch))
                yield Items(self.ids[done : done + len(batch)], batch, metadata)
                done += len(batch)
            if progress is not None:
                progress(seen, self.source.rows, "encode and store")


def check_incoming(
    store: Store,
    vectors: Any,
    ids: Any,
    *,
    metadata: Any,
    batch_size: int,
    on_bad_vectors: Literal["error", "drop"],
) -> Incoming:
    """Vectors, ids and metadata as a user gave them, checked; raises what is wrong with them."""
    if not store.is_trained:
        raise NotTrainedError("The index is not trained. Call index.train(vectors) before adding items.")
    store.check_writable()
    drop = drops(on_bad_vectors)
    check_count("batch_size", batch_size)
    config = store.config
    source = open_source(vectors, config.dim)
    good = _check_rows(source, config, batch_size, drop=drop)
    all_ids = _ids_to_add(store, ids, source.rows)
    table = as_metadata(metadata, all_ids)
    _check_different(all_ids)
    if good is None:
        return Incoming(source, None, all_ids, all_ids, table)
    return Incoming(source, good, all_ids, all_ids.filter(good), None if table is None else table.filter(good))


def refuse_known(store: Store, incoming: Incoming) -> None:
    """Raise :class:`DuplicateIdError` if some of the items are in the index already."""
    if store.id_type is not None and (known := store.existing_ids(incoming.all_ids)):
        raise DuplicateIdError(
            f"Ids are in the index already: {_listed(known)}. Leave them out, or use index.upsert (--upsert).",
            ids=known,
        )


def check_source(vectors: Any, config: IndexConfig) -> VectorSource:
    """Vectors as a user gave them; refuses those that cannot be used."""
    source = open_source(vectors, config.dim)
    _check_rows(source, config, _CHECKED_AT_ONCE, drop=False)
    return source


def open_source(vectors: Any, dim: int) -> VectorSource:
    """Vectors as a user gave them, some and of these dimensions; their values are still to be looked at."""
    source = open_vectors(vectors)
    if source.dim != dim:
        raise DimensionMismatchError(dim, source.dim)
    if source.rows == 0:
        raise InvalidVectorsError("There are no vectors: the array has 0 rows. Give one or more.")
    return source


def _check_rows(source: VectorSource, config: IndexConfig, batch_size: int, *, drop: bool) -> pa.BooleanArray | None:
    """Which rows can be used; None if all of them."""
    import pyarrow as pa

    bad = [np.empty(0, dtype=np.int64)]
    start = 0
    for batch in source.batches(batch_size):
        rows = unusable_rows(batch, config.metric)
        if config.vectors == "float16":
            rows = np.union1d(rows, _no_float16_rows(batch, config.metric))
        bad.append(rows + start)
        start += len(batch)
    rows = np.concatenate(bad)
    if not len(rows):
        return None
    if not drop:
        refuse_unusable(rows, config, "")
    refuse_all_dropped(source.rows - len(rows), rows, config)
    log.warning("dropped %d of %d vectors that cannot be used", len(rows), source.rows)
    good = np.ones(source.rows, dtype=bool)
    good[rows] = False
    return pa.array(good)


def drops(on_bad_vectors: str) -> bool:
    """Whether vectors that cannot be used are to be left out, not refused."""
    if on_bad_vectors not in ("error", "drop"):
        raise InvalidArgumentError(f"on_bad_vectors must be 'error' or 'drop', not {on_bad_vectors!r}.")
    return on_bad_vectors == "drop"


def refuse_all_dropped(left: int, rows: NDArray[np.int64], config: IndexConfig) -> None:
    """Raise :class:`InvalidVectorsError` if no vectors are left once these rows are dropped."""
    if not left:
        raise InvalidVectorsError(
            f"None of the {len(rows)} vectors can be used: {allowed(config)}", rows=rows[:10].tolist()
        )


def unusable_rows(vectors: Vectors, metric: Metric) -> NDArray[np.int64]:
    """The rows that have no distances to others: NaN, infinite, far too long, or zero under cosine."""
    squares = np.einsum("ij,ij->i", vectors, vectors)  # which warns of no overflow
    least = np.float32(0) if metric == "cosine" else np.float32(-1)
    if len(squares) == 1 and least < squares[0] <= LARGEST_SQUARE:  # a single query has no time to lose
        return np.empty(0, dtype=np.int64)
    return np.flatnonzero(~((squares > least) & (squares <= LARGEST_SQUARE)))  # no comparison with NaN is true


def _no_float16_rows(vectors: Vectors, metric: Metric) -> NDArray[np.int64]:
    """The rows that float16 cannot hold: too large or, under cosine, so small that little is left of their direction.

    Under the other metrics small values are a matter of absolute error, and that is at most 3e-8.
    """
    largest = np.abs(vectors).max(axis=1)
    least = _SMALLEST_FLOAT16 if metric == "cosine" else 0.0
    return np.flatnonzero((largest > _LARGEST_FLOAT16) | (largest < least))


def refuse_unusable(rows: NDArray[np.int64], config: IndexConfig, where: str) -> None:
    """Raise :class:`InvalidVectorsError` if there are such rows; ``where`` is what they are rows of, or nothing."""
    if len(rows):
        listed = ", ".join(str(row) for row in rows[:5]) + (" ..." if len(rows) > 5 else "")
        raise InvalidVectorsError(
            f"{len(rows)} vectors cannot be used, in rows {where}{listed}: {allowed(config)} "
            "Mend them, or leave them out (train and add do with on_bad_vectors='drop', or --on-bad-vectors drop).",
            rows=rows[:10].tolist(),
        )


def allowed(config: IndexConfig) -> str:
    """Which vectors an index takes, in words."""
    cosine, halves = config.metric == "cosine", config.vectors == "float16"
    said = f"NaN, infinite values and lengths above {math.sqrt(LARGEST_SQUARE):.0e} are not allowed"
    if cosine:
        said += "; and under cosine the zero vector has no direction"
    if halves:
        said += f"; and float16 reaches up to {_LARGEST_FLOAT16:,.0f}"
    if cosine and halves:
        said += f", and loses the direction of vectors without any value of {_SMALLEST_FLOAT16:.1e} or more"
    return f"{said}."


def _ids_to_add(store: Store, ids: Any, count: int) -> Any:
    import pyarrow as pa

    if ids is not None:
        array = as_ids(ids, count=count)
        kind = id_type(array)
        if store.id_type not in (None, kind):
            raise InvalidIdsError(
                f"The ids of this index are of type {store.id_type}; these are of type {kind}. "
                "The first add fixed the type."
            )
        return array
    if store.id_type == "str":
        raise InvalidIdsError("The ids of this index are strings, so every vector needs one. Pass ids=[...] (--ids).")
    first = store.largest_id() + 1
    if first + count - 1 > _LARGEST_ID:
        raise InvalidIdsError(
            f"There are no {count} whole numbers of 64 bits above the largest id, {first - 1}. Pass ids=[...] (--ids)."
        )
    return pa.array(np.arange(first, first + count))


def _check_different(ids: Any) -> None:
    import pyarrow.compute as pc

    counts = pc.value_counts(ids)
    if len(counts) != len(ids):
        twice = [entry["values"].as_py() for entry in counts.filter(pc.greater(counts.field("counts"), 1))[:5]]
        raise DuplicateIdError(
            f"Ids occur more than once in this batch: {_listed(twice)}. Each item needs an id of its own.", ids=twice
        )


def _listed(values: list[Any]) -> str:
    return ", ".join(repr(value)[:80] for value in values[:5]) + (" ..." if len(values) >= 5 else "")
