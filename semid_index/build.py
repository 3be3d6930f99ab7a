"""Vectors -> codebooks -> codes -> store."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from semid_index.codes import CodeLayout, pack, pack_rest
from semid_index.errors import (
    AlreadyTrainedError,
    DimensionMismatchError,
    DuplicateIdError,
    InvalidArgumentError,
    InvalidIdsError,
    InvalidVectorsError,
    NotTrainedError,
)
from semid_index.metrics import normalized
from semid_index.quantizer import ProgressCallback, Quantizer, Vectors
from semid_index.quantizers.tail import Tail, default_tail
from semid_index.records import IdType, IndexConfig, LevelReport, TrainReport
from semid_index.rerank import to_stored
from semid_index.store import ItemBatch, Store
from semid_index.vectors import VectorSource, bad_rows, open_vectors

log = logging.getLogger("semid_index")

_SAMPLE_PER_CODEWORD = 256
_SMALLEST_SAMPLE = 65_536
_REPORT_ROWS = 20_000
_TAIL_LEAST_ROWS = 256  # with fewer training rows a tail would learn next to nothing
_LARGEST_FLOAT16 = 65_504.0
_TAIL_ARRAY = "tail_codebooks"


# -- training ---------------------------------------------------------------------------------------------------------


def train(
    store: Store, quantizer: Quantizer, vectors: Any, *, sample: int | None, progress: ProgressCallback | None
) -> tuple[TrainReport, Tail | None]:
    """Learn codebooks, and tail codebooks, from (a sample of) vectors, and save them."""
    if store.is_trained:
        raise AlreadyTrainedError(
            "The index is trained already, and training again would change the meaning of its IDs. Create a new index."
        )
    config = store.config
    source = _open(vectors, config.dim)
    started = time.perf_counter()
    rows = _training_sample(source, quantizer, config, sample)
    quantizer.on_progress = progress
    try:
        quantizer.fit(rows, seed=config.seed)
    finally:
        quantizer.on_progress = None
    parts = config.tail if config.tail is not None else default_tail(config.dim) * (len(rows) >= _TAIL_LEAST_ROWS)
    tail = Tail.train(rows, parts, seed=config.seed) if parts else None
    layout = CodeLayout(tuple(quantizer.codebook_sizes))
    report = TrainReport(
        len(rows), 0.0, level_reports(quantizer, rows[:: max(1, len(rows) // _REPORT_ROWS)][:_REPORT_ROWS])
    )
    report = replace(report, seconds=time.perf_counter() - started)
    arrays = {**quantizer.state(), **({_TAIL_ARRAY: tail.codebooks} if tail else {})}
    config = replace(config, tail=parts, quantizer_config=quantizer.get_config())
    store.save_training(config, asdict(report), layout, arrays, hierarchical=quantizer.hierarchical)
    return report, tail


def restore(store: Store, quantizer_class: type[Quantizer]) -> tuple[Quantizer, Tail | None]:
    """The trained quantizer of an index, and its tail quantizer."""
    arrays = store.learned_arrays()
    tail = arrays.pop(_TAIL_ARRAY, None)
    quantizer = quantizer_class.restore(dict(store.config.quantizer_config), arrays)
    return quantizer, None if tail is None else Tail(tail)


def level_reports(quantizer: Quantizer, vectors: Vectors) -> tuple[LevelReport, ...]:
    """How the error falls level by level, for quantizers whose codewords add up."""
    if quantizer.codebooks is None or not len(vectors):
        return ()
    codes = quantizer.encode(vectors)
    variance = float(np.square(vectors - vectors.mean(axis=0)).sum(axis=1).mean()) or 1.0
    residuals = vectors.copy()
    reports = []
    for level, codebook in enumerate(quantizer.codebooks):
        residuals -= codebook[codes[:, level]]
        error = float(np.einsum("ij,ij->i", residuals, residuals).mean())
        counts = np.bincount(codes[:, level], minlength=len(codebook))
        shares = counts[counts > 0] / len(codes)
        perplexity = float(np.exp(-(shares * np.log(shares)).sum()))
        reports.append(
            LevelReport(level + 1, len(codebook), error, error / variance, perplexity, int((counts == 0).sum()))
        )
    return tuple(reports)


def _training_sample(source: VectorSource, quantizer: Quantizer, config: IndexConfig, sample: int | None) -> Vectors:
    if sample is not None and (isinstance(sample, bool) or not isinstance(sample, int | np.integer) or sample < 1):
        raise InvalidArgumentError(f"sample must be a whole number of rows, at least 1, not {sample!r}.")
    wanted = sample or max(_SMALLEST_SAMPLE, _SAMPLE_PER_CODEWORD * max(quantizer.codebook_sizes, default=0))
    rows = source.sample(min(int(wanted), source.rows), seed=config.seed)
    _refuse(bad_rows(rows, zero=config.metric == "cosine"), config, "of the training sample ")
    return normalized(rows) if config.metric == "cosine" else rows


# -- adding -----------------------------------------------------------------------------------------------------------


def add(
    store: Store,
    quantizer: Quantizer,
    tail: Tail | None,
    vectors: Any,
    ids: Any,
    *,
    metadata: Any,
    batch_size: int,
    on_bad_vectors: Literal["error", "drop"],
    progress: ProgressCallback | None,
) -> Any:
    """Encode vectors and store them in one transaction; the ids that were added, as a list or an integer array.

    Everything is checked before anything is written, at the price of reading a file twice.
    """
    if not store.is_trained:
        raise NotTrainedError("The index is not trained. Call index.train(vectors) before index.add.")
    if on_bad_vectors not in ("error", "drop"):
        raise InvalidArgumentError(f"on_bad_vectors must be 'error' or 'drop', not {on_bad_vectors!r}.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise InvalidArgumentError(f"batch_size must be a whole number, at least 1, not {batch_size!r}.")
    config = store.config
    source = _open(vectors, config.dim)
    good = _check_rows(source, config, batch_size, drop=on_bad_vectors == "drop")
    id_array = _ids_to_add(store, ids, source.rows)
    table = _metadata_table(metadata, source.rows, id_array)
    _check_new(store, id_array)
    kept = id_array if good is None else id_array.filter(_arrow_mask(good))
    first_row, done = store.next_row, 0
    counts = [np.zeros(size, dtype=np.int64) for size in quantizer.codebook_sizes] if _capacity(quantizer) else None
    if counts is not None:
        _count_codes(store, counts)
    with store.appending(_id_type(id_array)) as appending:
        for start, batch in zip(range(0, source.rows, batch_size), source.batches(batch_size), strict=True):
            part = slice(start, start + len(batch))
            part_ids, part_table = id_array[part], None if table is None else table.slice(start, len(batch))
            if good is not None:
                keep = good[part]
                batch, mask = batch[keep], _arrow_mask(keep)
                part_ids, part_table = part_ids.filter(mask), None if part_table is None else part_table.filter(mask)
            if len(batch):
                rows = np.arange(first_row + done, first_row + done + len(batch))
                appending.add(_encoded(batch, quantizer, tail, config, rows, part_ids, part_table, counts))
                done += len(batch)
            if progress is not None:
                progress(
                    start + len(part_ids) if good is None else min(start + batch_size, source.rows),
                    source.rows,
                    "encode and store",
                )
    log.info("added %d items", done)
    return kept.to_numpy() if _id_type(kept) == "int" else kept.to_pylist()


def _encoded(
    batch: Vectors,
    quantizer: Quantizer,
    tail: Tail | None,
    config: IndexConfig,
    rows: NDArray[np.int64],
    ids: Any,
    metadata: Any,
    counts: list[NDArray[np.int64]] | None,
) -> ItemBatch:
    layout = CodeLayout(tuple(quantizer.codebook_sizes))
    comparable = normalized(batch) if config.metric == "cosine" else batch
    if counts is None:
        codes = quantizer.encode(comparable)
    else:
        codes = quantizer.encode_within(comparable, counts)  # type: ignore[attr-defined]
        for level, count in enumerate(counts):
            count += np.bincount(codes[:, level], minlength=len(count))
    decoded = quantizer.decode(codes)
    stored = to_stored(batch, config.vectors)
    if tail is not None:
        stored["tail"] = tail.encode(comparable)
    rest = pack_rest(codes, layout) if layout.rest_levels else None
    norms = np.einsum("ij,ij->i", decoded, decoded)
    return ItemBatch(rows, ids, pack(codes, layout), rest, norms, stored, metadata)


def _capacity(quantizer: Quantizer) -> bool:
    """Whether the quantizer limits how many items may have a code, also for items added later."""
    return getattr(quantizer, "capacity", None) is not None


def _count_codes(store: Store, counts: list[NDArray[np.int64]]) -> None:
    """Count the codes that items have already, level by level."""
    from semid_index.codes import unpack

    stored = store.codes()
    codes = unpack(stored.sids, store.layout, stored.rest)
    for level, count in enumerate(counts):
        count += np.bincount(codes[:, level], minlength=len(count))


# -- checks -----------------------------------------------------------------------------------------------------------


def _open(vectors: Any, dim: int) -> VectorSource:
    source = open_vectors(vectors)
    if source.dim != dim:
        raise DimensionMismatchError(dim, source.dim)
    if source.rows == 0:
        raise InvalidVectorsError("There are no vectors: the array has 0 rows.")
    return source


def _check_rows(source: VectorSource, config: IndexConfig, batch_size: int, *, drop: bool) -> NDArray[np.bool_] | None:
    """Which rows can be used; None if all of them."""
    bad = [np.empty(0, dtype=np.int64)]
    start = 0
    for batch in source.batches(batch_size):
        rows = bad_rows(batch, zero=config.metric == "cosine")
        if config.vectors == "float16":
            rows = np.union1d(rows, np.flatnonzero(np.abs(batch).max(axis=1) > _LARGEST_FLOAT16))
        bad.append(rows + start)
        start += len(batch)
    rows = np.concatenate(bad)
    if not len(rows):
        return None
    if not drop:
        _refuse(rows, config, "")
    if len(rows) == source.rows:
        raise InvalidVectorsError(
            f"None of the {source.rows} vectors can be used: {_allowed(config)}", rows=rows[:10].tolist()
        )
    log.warning("dropped %d of %d vectors that cannot be used", len(rows), source.rows)
    good = np.ones(source.rows, dtype=bool)
    good[rows] = False
    return good


def _refuse(rows: NDArray[np.int64], config: IndexConfig, where: str) -> None:
    if len(rows):
        listed = ", ".join(str(row) for row in rows[:5]) + (" ..." if len(rows) > 5 else "")
        raise InvalidVectorsError(
            f"{len(rows)} vectors cannot be used, in rows {where}{listed}: {_allowed(config)} "
            "Mend them, or pass on_bad_vectors='drop' to add.",
            rows=rows[:10].tolist(),
        )


def _allowed(config: IndexConfig) -> str:
    zero = "; and under cosine the zero vector has no direction" if config.metric == "cosine" else ""
    large = f"; and float16 reaches up to {_LARGEST_FLOAT16:,.0f}" if config.vectors == "float16" else ""
    return f"NaN and infinite values are not allowed{zero}{large}."


def as_ids(ids: ArrayLike | Sequence[Any], *, count: int | None = None) -> Any:
    """Ids as an Arrow array of int64 or string; mixed, missing and other types are refused."""
    import pyarrow as pa

    try:
        array = ids if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array(_plain_ids(ids))
    except (
        pa.ArrowInvalid,
        pa.ArrowTypeError,
        pa.ArrowNotImplementedError,
        OverflowError,
        UnicodeEncodeError,
        TypeError,
    ) as error:
        raise InvalidIdsError(f"Ids must be all whole numbers or all strings: {str(error).splitlines()[0]}.") from error
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if count is not None and len(array) != count:
        raise InvalidIdsError(f"There are {len(array)} ids for {count} vectors. Give one id for each vector.")
    if array.null_count:
        raise InvalidIdsError(f"{array.null_count} ids are missing (None). Give every vector an id.")
    if pa.types.is_integer(array.type):
        try:
            return array.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise InvalidIdsError(f"Whole-number ids must fit in 64 bits with sign: {error}.") from error
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type) or pa.types.is_string_view(array.type):
        return array.cast(pa.string())
    if not len(array):
        return array.cast(pa.int64())
    raise InvalidIdsError(f"Ids must be whole numbers or strings, not {array.type}.")


def _plain_ids(ids: Any) -> Any:
    if isinstance(ids, str | bytes):
        raise InvalidIdsError(f"Ids must be a list or array of ids, not one {type(ids).__name__}.")
    if isinstance(ids, np.ndarray) and ids.dtype.kind == "U":
        return ids.tolist()
    if isinstance(ids, np.ndarray) and ids.ndim != 1:
        raise InvalidIdsError(f"Ids must be one-dimensional, not of shape {ids.shape}.")
    if isinstance(ids, np.ndarray) and not ids.dtype.isnative:
        return ids.astype(ids.dtype.newbyteorder("="))
    return ids if hasattr(ids, "__array__") or isinstance(ids, list) else list(ids)


def _ids_to_add(store: Store, ids: Any, count: int) -> Any:
    import pyarrow as pa

    if ids is not None:
        array = as_ids(ids, count=count)
        kind = _id_type(array)
        if store.id_type not in (None, kind):
            raise InvalidIdsError(
                f"The ids of this index are of type {store.id_type}; these are of type {kind}. The first add fixed the type."
            )
        return array
    if store.id_type == "str":
        raise InvalidIdsError("The ids of this index are strings, so every vector needs one. Pass ids=[...].")
    first = store.largest_id() + 1
    return pa.array(np.arange(first, first + count))


def _id_type(ids: Any) -> IdType:
    import pyarrow as pa

    return "int" if pa.types.is_int64(ids.type) else "str"


def _check_new(store: Store, ids: Any) -> None:
    import pyarrow.compute as pc

    counts = pc.value_counts(ids)
    if len(counts) != len(ids):
        twice = [entry["values"].as_py() for entry in counts.filter(pc.greater(counts.field("counts"), 1))[:5]]
        raise DuplicateIdError(
            f"Ids occur more than once in this batch: {_listed(twice)}. Each item needs an id of its own.", ids=twice
        )
    if store.id_type is not None and (known := store.existing_ids(ids)):
        raise DuplicateIdError(f"Ids are in the index already: {_listed(known)}. Leave them out.", ids=known)


def _listed(values: list[Any]) -> str:
    return ", ".join(repr(value)[:80] for value in values[:5]) + (" ..." if len(values) >= 5 else "")


def _metadata_table(metadata: Any, count: int, ids: Any) -> Any:
    """The metadata as an Arrow table with one row for each vector, without a column ``id``."""
    import pyarrow as pa

    if metadata is None:
        return None
    try:
        table = metadata if isinstance(metadata, pa.Table) else pa.table(metadata)
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"metadata must be an Arrow table, a data frame or a dict of columns: {error}."
        ) from error
    if table.num_rows != count:
        raise InvalidArgumentError(
            f"metadata has {table.num_rows} rows for {count} vectors. Give one row for each vector, in the same order."
        )
    names = [name.lower() for name in table.column_names]
    if len(set(names)) != len(names):
        raise InvalidArgumentError(
            "Two columns of the metadata have the same name (SQL does not tell upper from lower case)."
        )
    if "id" in names:
        position = names.index("id")
        column = table.column(position).combine_chunks()
        if not as_ids(column).equals(ids):
            raise InvalidArgumentError(
                "The metadata has a column 'id' that differs from ids. Pass it as ids=, or rename it."
            )
        table = table.remove_column(position)
    return table


def _arrow_mask(mask: NDArray[np.bool_]) -> Any:
    import pyarrow as pa

    return pa.array(mask)
