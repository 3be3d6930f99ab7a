"""Whether an index is whole: what its tables say must fit together, and fit its vectors.

Every check looks at the file itself, and not at what was read from it before. All of them see one moment. A check that
cannot be carried out has failed, and says why; the others go on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semid_index import checksums
from semid_index.arrow import fixed_size_matrix, numpy_column
from semid_index.coder import Coder
from semid_index.codes import CodeLayout, format_id, unpack
from semid_index.collisions import Digit, Share, own_quantizer
from semid_index.database import Snapshot
from semid_index.errors import IndexClosedError, IndexLockedError
from semid_index.incoming import unusable_rows
from semid_index.items import check_count
from semid_index.macros import NAMES
from semid_index.metrics import normalized
from semid_index.quantizer import Codes, ProgressCallback, Quantizer, Vectors
from semid_index.records import Check, IndexConfig, VerifyReport
from semid_index.rerank import from_stored, stored_dtype
from semid_index.store import Store, fingerprints
from semid_index.tables import FORMAT_VERSION, bucket_depth, bucket_shift, literal, quoted

_BATCH = 65_536
_NORM_TOLERANCE = 1e-4  # relative; sums of the same float32 numbers in another order
_TIE = 1e-4  # relative; codes whose squared errors are that close are equally good
_LOSSY_SHARE = 0.01  # of the sample: rounded vectors may send a search with a beam another way
_ROUNDING = {"float32": 0.0, "float16": 2.0**-11}  # relative error of a value; that of int8 is in its scale
_COMPARED_IDS = 256  # rows of the view, and calls of macros, compared with what Python makes of the codes


def verify(
    store: Store,
    coder: Coder,
    *,
    sample: int,
    progress: ProgressCallback | None,
) -> VerifyReport:
    """Carry out all checks; ``sample`` is how many vectors are encoded again."""
    check_count("sample", sample)
    started = time.perf_counter()
    checks = []
    with store.snapshot() as snapshot:
        index = _Contents(snapshot, store, coder, sample)
        for done, (name, check) in enumerate(_CHECKS.items()):
            if progress is not None:
                progress(done, len(_CHECKS), f"verify: {name}")
            checks.append(_carried_out(name, check, index))
    return VerifyReport(tuple(checks), time.perf_counter() - started)


@dataclass(frozen=True)
class _Found:
    """What a check found: a problem, or none."""

    examined: int
    text: str
    problem: bool = False


class _CannotTell(Exception):  # noqa: N818, it is no error
    """Why a check does not apply to an index."""


def _carried_out(name: str, check: Callable[[_Contents], _Found], index: _Contents) -> Check:
    try:
        found = check(index)
    except _CannotTell as reason:
        return Check(name, "skipped", str(reason), 0)
    except (IndexClosedError, IndexLockedError):  # which says nothing of the file
        raise
    except Exception as error:  # whatever comes of a damaged file
        said = (str(error).strip().splitlines() or ["no reason given"])[0]
        return Check(name, "failed", f"cannot be checked: {type(error).__name__}: {said}", 0)
    return Check(name, "failed" if found.problem else "ok", found.text, found.examined)


# -- what the checks look at ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _CodesPass:
    """What reading all of ``semid_codes`` in the order of the table gave."""

    rows: NDArray[np.int64]
    outside: int
    """Items with a code that is not in its codebook."""
    wrong_buckets: int
    wrong_norms: int
    breaks: NDArray[np.int64]
    """Where an item has a smaller ID than the one before it."""
    checked: int
    """Items with a checksum."""
    wrong_checksums: int


@dataclass(frozen=True)
class _VectorsPass:
    """What reading all of ``semid_vectors`` gave."""

    rows: NDArray[np.int64]
    unusable: int
    """Stored vectors that ``add`` would refuse."""
    checked: int
    """Stored vectors with a checksum, or tail codes where there are only those."""
    wrong_checksums: int
    """Of vectors and of tail codes."""


@dataclass(frozen=True)
class _Sample:
    """Some items with their stored vectors, as they were encoded, near enough."""

    vectors: Vectors
    slack: NDArray[np.float64]
    """(n,) how far rounding may have moved each."""
    codes: Codes
    tail: NDArray[np.uint8] | None


class _Contents:
    """An index at one moment."""

    def __init__(self, snapshot: Snapshot, store: Store, coder: Coder, sample_size: int) -> None:
        self.snapshot, self.sample_size = snapshot, sample_size
        self.quantizer, self.policy, self.tail = coder.quantizer, coder.policy, coder.tail
        self.store, self.config = store, store.config
        self.trained = store.is_trained

    @property
    def layout(self) -> CodeLayout:
        """How codes are packed."""
        return self.store.layout

    def need_training(self) -> None:
        """Skip a check of what training makes."""
        if not self.trained:
            raise _CannotTell("the index is not trained yet")

    def count(self, query: str) -> int:
        """The one number that a query gives."""
        return int(self.snapshot.rows(query)[0][0] or 0)

    def has_table(self, name: str) -> bool:
        """Whether the file has this table."""
        return bool(self.count(f"SELECT count(*) FROM duckdb_tables() WHERE table_name = '{name}' AND NOT internal"))

    def setting(self, key: str) -> Any:
        """A setting as it is in the file; None if it was never written."""
        found = dict(self.snapshot.rows("SELECT key, value FROM semid_meta"))
        return json.loads(found[key]) if key in found else None

    def columns(self, table: str) -> list[str]:
        """The columns of a table."""
        return [name for name, *_ in self.snapshot.rows(f"DESCRIBE {table}")]

    @cached_property
    def codes(self) -> _CodesPass:
        """All codes, read once."""
        return _read_codes(self)

    @cached_property
    def vectors(self) -> _VectorsPass:
        """All vectors, read once."""
        return _read_vectors(self)

    @cached_property
    def sample(self) -> _Sample:
        """Items that are encoded again."""
        return _read_sample(self)


def _codes_of(batch: Any, layout: CodeLayout) -> Codes:
    rest = fixed_size_matrix(batch.column("sid_rest")) if layout.rest_levels else None
    return unpack(batch.column("sid").to_numpy(), layout, rest)


def _read_codes(index: _Contents) -> _CodesPass:
    layout, sizes = index.layout, np.array(index.layout.codebook_sizes)
    rows, breaks = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    outside = wrong_buckets = wrong_norms = seen = checked = wrong_checksums = 0
    names = ["row", "sid", *(["sid_rest"] if layout.rest_levels else []), "bucket", "norm2"]
    names += ["id", "checksum"] if "checksum" in index.columns("semid_codes") else []
    last: NDArray[np.int64] | None = None
    for batch in index.snapshot.batches(f"SELECT {', '.join(names)} FROM semid_codes", _BATCH):
        sids, codes = batch.column("sid").to_numpy(), _codes_of(batch, layout)
        fits = (sids >= 0) & (sids >> layout.sid_bits == 0) & (codes < sizes).all(axis=1)
        outside += int((~fits).sum())
        wrong_buckets += int((batch.column("bucket").to_numpy() != sids >> bucket_shift(layout)).sum())
        norms = _squared_lengths(index.quantizer.decode(np.ascontiguousarray(codes[fits])))
        stored = batch.column("norm2").to_numpy()[fits]
        wrong_norms += int((~np.isclose(stored, norms, rtol=_NORM_TOLERANCE, atol=1e-12)).sum())
        keys = np.column_stack([sids, codes[:, layout.packed_levels :]])
        before = keys[:-1] if last is None else np.vstack([last, keys[:-1]])
        after = keys[1:] if last is None else keys
        breaks.append(np.flatnonzero(_precedes(after, before)) + seen + (last is None))
        rows.append(batch.column("row").to_numpy())
        last, seen = keys[-1:], seen + len(keys)
        if "checksum" in names:
            written = numpy_column(batch.column("checksum"))
            packed_rest = fixed_size_matrix(batch.column("sid_rest")) if layout.rest_levels else None
            now = checksums.of_codes(rows[-1], batch.column("id"), sids, packed_rest)
            checked += int(np.count_nonzero(written))
            wrong_checksums += int(np.count_nonzero(checksums.wrong(written, now)))
    return _CodesPass(
        np.concatenate(rows), outside, wrong_buckets, wrong_norms, np.concatenate(breaks), checked, wrong_checksums
    )


def _precedes(keys: NDArray[np.int64], others: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each row of keys sorts before the one beside it, the first column counting most."""
    differs = keys != others
    first = differs.argmax(axis=1)
    each = np.arange(len(keys))
    found: NDArray[np.bool_] = keys[each, first] < others[each, first]
    return found


def _squared_lengths(vectors: Vectors) -> NDArray[np.float32]:
    lengths: NDArray[np.float32] = np.einsum("ij,ij->i", vectors, vectors)
    return lengths


def _vector_columns(index: _Contents) -> list[str]:
    """The columns of ``semid_vectors`` that hold an item's vector."""
    return {"none": [], "int8": ["v", "scale"]}.get(index.config.vectors, ["v"])


def _as_float32(batch: Any, config: IndexConfig) -> tuple[Vectors, NDArray[np.float32] | None]:
    """Stored vectors as float32, and their scales."""
    scale = batch.column("scale").to_numpy() if config.vectors == "int8" else None
    stored = fixed_size_matrix(batch.column("v")).view(stored_dtype(config.vectors))
    return from_stored(stored, scale), scale


def _read_vectors(index: _Contents) -> _VectorsPass:
    if not index.has_table("semid_vectors"):
        raise _CannotTell('vectors="none" without a tail keeps nothing of the vectors')
    columns = [*_vector_columns(index), *(["tail"] if index.config.tail else [])]
    columns += [name for name in ("v_checksum", "tail_checksum") if name in index.columns("semid_vectors")]
    rows, unusable, checked, wrong_checksums = [np.empty(0, dtype=np.int64)], 0, 0, 0
    for batch in index.snapshot.batches(f"SELECT row, {', '.join(columns)} FROM semid_vectors", _BATCH):
        rows.append(batch.column("row").to_numpy())
        if "v" in columns:
            vectors, scale = _as_float32(batch, index.config)
            with np.errstate(over="ignore", invalid="ignore"):
                fine = np.isfinite(_squared_lengths(vectors))  # as no value or its square is infinite or NaN
            # a scale is never 0; and rounding can make a tiny vector zero, which is then no damage
            unusable += int((~(fine if scale is None else fine & (scale > 0))).sum())
        values = {name: numpy_column(batch.column(name)) for name in columns}
        numbers = np.zeros(len(rows[-1]), dtype=bool)
        for name in ("v", "tail"):
            if f"{name}_checksum" in columns:
                written = values[f"{name}_checksum"]
                now = checksums.of_vectors(rows[-1], values[name], values.get("scale") if name == "v" else None)
                numbers |= written != 0
                wrong_checksums += int(np.count_nonzero(checksums.wrong(written, now)))
        checked += int(np.count_nonzero(numbers))
    return _VectorsPass(np.concatenate(rows), unusable, checked, wrong_checksums)


def _read_sample(index: _Contents) -> _Sample:
    import pyarrow as pa

    config, layout = index.config, index.layout
    columns = _vector_columns(index)
    if not columns:
        raise _CannotTell('vectors="none" keeps no vectors to encode')
    all_rows = index.codes.rows
    chosen = np.random.default_rng(config.seed).choice(all_rows, min(index.sample_size, len(all_rows)), replace=False)
    names = [*columns, *(["tail"] if config.tail else [])]
    rest = ", c.sid_rest" if layout.rest_levels else ""
    found = index.snapshot.arrow(
        f"SELECT c.sid{rest}, {', '.join('v.' + name for name in names)} "
        "FROM sampled JOIN semid_codes c USING (row) JOIN semid_vectors v USING (row)",
        sampled=pa.table({"row": chosen}),
    )
    # what is out of bounds is for other checks to find
    codes = _codes_of(found, layout)
    fits = np.asarray((codes < np.array(layout.codebook_sizes)).all(axis=1))
    fits[unusable_rows(_as_float32(found, config)[0], config.metric)] = False
    found, codes = found.filter(pa.array(fits)), codes[fits]
    vectors, scale = _as_float32(found, config)
    if scale is not None:
        slack = scale.astype(np.float64) / 2 * np.sqrt(config.dim)
    else:
        slack = np.sqrt(_squared_lengths(vectors).astype(np.float64)) * _ROUNDING[config.vectors]
    if config.metric == "cosine":
        lengths = np.maximum(np.sqrt(_squared_lengths(vectors).astype(np.float64)), 1e-30)
        vectors, slack = normalized(vectors), 2 * slack / lengths
    tail = fixed_size_matrix(found.column("tail")) if config.tail else None
    return _Sample(vectors, slack, codes, tail)


# -- the checks -------------------------------------------------------------------------------------------------------


def _readable(index: _Contents) -> _Found:
    """DuckDB has a checksum in every block, and looks at it when it reads one."""
    tables = index.snapshot.rows(
        "SELECT schema_name, table_name FROM duckdb_tables() "
        "WHERE database_name = current_database() AND NOT internal AND table_name <> 'semid_vectors'"
    )
    read = 0
    for schema, name in tables:  # the vectors have a check of their own
        table = f"{quoted(schema)}.{quoted(name)}"
        read += int(index.snapshot.rows(f"SELECT count(*), bit_xor(hash(t)) FROM {table} AS t")[0][0])
    problems = {"settings that DuckDB does not find by their keys": len(_lost_settings(index))}
    return _problems(read, f"all rows of {len(tables)} tables can be read", problems)


def _lost_settings(index: _Contents) -> list[str]:
    """Those that are not there once by DuckDB's index of their keys, which writing goes by."""
    by_index = "SELECT count(*) FROM semid_meta WHERE key = "
    keys = index.snapshot.rows("SELECT key FROM semid_meta")
    return [key for (key,) in keys if index.count(by_index + literal(key)) != 1]


def _codebooks(index: _Contents) -> _Found:
    index.need_training()
    arrays = index.store.learned_arrays()
    values = sum(array.size for array in arrays.values())
    odd = [name for name, array in arrays.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
    if odd:
        return _Found(values, f"{odd[0]} has NaN or infinite values", problem=True)
    recorded = index.setting("fingerprints")
    if recorded is None:
        return _Found(values, f"{len(arrays)} arrays are finite; fingerprints were not recorded when they were learned")
    now = fingerprints(arrays)
    if changed := sorted(name for name in recorded.keys() | now.keys() if recorded.get(name) != now.get(name)):
        return _Found(values, f"not as training left them: {_listed(changed)}", problem=True)
    return _Found(values, f"{len(arrays)} arrays are finite, with the SHA-256 that training wrote down")


def _ids(index: _Contents) -> _Found:
    index.need_training()
    items, different = index.snapshot.rows("SELECT count(*), count(DISTINCT id) FROM semid_codes")[0]
    text = f"{items:,} different ids" if items == different else f"{items:,} items have {different:,} different ids"
    return _Found(items, text, problem=items != different)


def _metadata(index: _Contents) -> _Found:
    index.need_training()
    items = index.count("SELECT count(*) FROM items")
    problems = {
        "items without metadata": "SELECT count(*) FROM semid_codes ANTI JOIN items USING (id)",
        # an older version of the IDs lacks the items that were added since
        **(
            {}
            if index.store.is_old_version
            else {"rows of metadata without an item": "SELECT count(*) FROM items ANTI JOIN semid_codes USING (id)"}
        ),
        "ids with several rows of metadata": "SELECT count(*) FROM "
        "(SELECT id FROM items GROUP BY id HAVING count(*) > 1)",
    }
    return _problems(items, f"{items:,} rows, one for each item", {k: index.count(q) for k, q in problems.items()})


def _rows(index: _Contents) -> _Found:
    index.need_training()
    rows, next_row = index.codes.rows, index.store.next_row
    problems = {
        "row numbers that several items have": len(rows) - len(np.unique(rows)),
        f"row numbers that were not given yet (the next is {next_row:,})": int(((rows < 0) | (rows >= next_row)).sum()),
    }
    return _problems(len(rows), f"{len(rows):,} different row numbers below {next_row:,}", problems)


def _code_range(index: _Contents) -> _Found:
    index.need_training()
    sizes = " x ".join(map(str, index.layout.codebook_sizes[:8])) + (" ..." if index.layout.levels > 8 else "")
    problems = {"items with a code that is not in its codebook": index.codes.outside}
    return _problems(len(index.codes.rows), f"all codes lie within codebooks of {sizes}", problems)


def _order(index: _Contents) -> _Found:
    """The items of one write are sorted, and have larger row numbers than those before: so breaks are allowed there."""
    index.need_training()
    rows, breaks = index.codes.rows, index.codes.breaks
    if len(breaks):
        largest_before = np.maximum.accumulate(rows)[breaks - 1]
        smallest_after = np.minimum.accumulate(rows[::-1])[::-1][breaks]
        breaks_inside = int((largest_before > smallest_after).sum())
    else:
        breaks_inside = 0
    runs = len(breaks) + 1
    text = "sorted by ID" if runs == 1 else f"{runs:,} sorted runs, one after the other; compact makes them one"
    return _problems(len(rows), text, {"items in the wrong place": breaks_inside})


def _ranks(index: _Contents) -> _Found:
    index.need_training()
    key = "sid, sid_rest, dup_rank" if index.layout.rest_levels else "sid, dup_rank"
    twice = index.count(f"SELECT count(*) FROM (SELECT {key} FROM semid_codes GROUP BY ALL HAVING count(*) > 1)")
    negative = index.count("SELECT count(*) FROM semid_codes WHERE dup_rank < 0")
    problems = {"pairs of ID and dup_rank that several items have": twice, "negative dup_ranks": negative}
    return _problems(len(index.codes.rows), "the ID and dup_rank of an item are its own", problems)


def _history(index: _Contents) -> _Found:
    index.need_training()
    if not index.has_table("semid_history"):
        raise _CannotTell("files of older formats have no history")
    key = "sid, sid_rest, dup_rank" if index.layout.rest_levels else "sid, dup_rank"
    of_now = f"version = {index.setting('version') or 1}"
    again = index.count(
        f"SELECT count(*) FROM semid_codes SEMI JOIN (SELECT {key} FROM semid_history WHERE {of_now}) USING ({key})"
    )
    past = index.count("SELECT count(*) FROM semid_history")
    text = f"none of the {past:,} IDs of earlier was given again"
    return _problems(past, text, {"items with an ID and dup_rank that another had before": again})


def _norms(index: _Contents) -> _Found:
    index.need_training()
    problems = {"items whose norm2 is not that of their codes": index.codes.wrong_norms}
    return _problems(len(index.codes.rows), "norm2 is the squared length of what the codes decode to", problems)


def _buckets(index: _Contents) -> _Found:
    index.need_training()
    codebooks, layout = index.quantizer.codebooks, index.layout
    problems = {"items whose bucket is not that of their codes": index.codes.wrong_buckets}
    if codebooks is None or not index.quantizer.hierarchical:
        return _problems(len(index.codes.rows), "the buckets of items are those of their codes", problems)
    if not index.has_table("semid_buckets"):
        _need_this_format(index)
    found = index.snapshot.arrow("SELECT bucket, norm2 FROM semid_buckets")
    buckets, norms = found["bucket"].to_numpy().astype(np.int64), found["norm2"].to_numpy()
    part = CodeLayout(layout.codebook_sizes[: bucket_depth(layout)])
    codes = unpack(buckets, part)
    known = (buckets >= 0) & (buckets >> part.sid_bits == 0) & (codes < np.array(part.codebook_sizes)).all(axis=1)
    sums = np.zeros((int(known.sum()), codebooks[0].shape[1]), dtype=np.float32)
    for level, codebook in enumerate(codebooks[: part.levels]):
        sums += codebook[codes[known, level]]
    # one product after the other, as SQL adds them up: where codewords nearly cancel out, digits are lost
    right = np.isclose(
        norms[known], _squared_lengths(sums), rtol=1e-3, atol=1e-4 * float(np.abs(norms[known]).max(initial=0))
    )
    problems |= {
        "buckets with items that semid_buckets lacks": index.count(
            "SELECT count(DISTINCT bucket) FROM semid_codes ANTI JOIN semid_buckets USING (bucket)"
        ),
        "buckets that are there twice": len(buckets) - len(np.unique(buckets)),
        "buckets that no codes can have": int((~known).sum()),
        "buckets whose norm2 is wrong": int((~right).sum()),
    }
    return _problems(len(buckets), f"{len(buckets):,} buckets, with those of all items", problems)


def _checksums(index: _Contents) -> _Found:
    """DuckDB's checksums do not tell whether a block is where it belongs: those of each item do."""
    index.need_training()
    if "checksum" not in index.columns("semid_codes"):
        _need_this_format(index)
        raise _CannotTell("this version of the IDs was written in a format without checksums")
    problems = {"items whose number, id and codes do not belong together": index.codes.wrong_checksums}
    checked, items = index.codes.checked, len(index.codes.rows)
    if index.has_table("semid_vectors"):
        problems["vectors or tail codes that are not those of their item"] = index.vectors.wrong_checksums
        checked = min(checked, index.vectors.checked)
    text = f"{checked:,} items are as they were written"
    if checked < items:
        text += f"; {items - checked:,} were written in a format without checksums"
    return _problems(checked, text, problems)


def _one_vector_each(index: _Contents) -> _Found:
    index.need_training()
    vectors, rows = index.vectors.rows, index.codes.rows
    problems = {
        "items without a stored vector": int((~np.isin(rows, vectors)).sum()),
        "stored vectors without an item": int((~np.isin(vectors, rows)).sum()),
        "stored vectors of an item that has one already": len(vectors) - len(np.unique(vectors)),
    }
    return _problems(len(vectors), f"{len(vectors):,} stored vectors, one for each item", problems)


def _values(index: _Contents) -> _Found:
    index.need_training()
    if not _vector_columns(index):
        raise _CannotTell('vectors="none" keeps no vectors')
    rows = index.vectors.rows
    problems = {"stored vectors that are not finite, or far too long": index.vectors.unusable}
    return _problems(len(rows), f"all values of {len(rows):,} stored vectors are finite", problems)


def _encoded_again(index: _Contents) -> _Found:
    """Codes are right if no others are clearly better where the two first differ, or in all."""
    index.need_training()
    own = own_quantizer(index.quantizer)
    if getattr(own, "capacity", None) is not None:
        raise _CannotTell("with a limited capacity, codes depend on the items that came before")
    depth = own.levels if isinstance(index.policy, Share | Digit) else own.levels - 1
    if not depth:
        raise _CannotTell(f"the collision policy '{index.policy.name}' may change the only level")
    sample = index.sample
    stored, again = sample.codes[:, : own.levels], own.encode(sample.vectors)
    differ = np.flatnonzero((stored != again)[:, :depth].any(axis=1))
    worse = _clearly_worse(own, sample, stored, again, differ, depth)
    allowed = 0.0 if index.config.vectors == "float32" else _LOSSY_SHARE * len(stored)
    levels = "all codes" if depth == own.levels else f"the first {depth} codes (the policy may change the last)"
    text = f"{levels} of {len(stored):,} items, encoded again: {len(differ):,} differ"
    if len(differ):
        text += f", {len(differ) - int(worse.sum()):,} of them by as good ones"
    return _Found(len(stored), text, problem=int(worse.sum()) > allowed)


def _clearly_worse(
    quantizer: Quantizer, sample: _Sample, stored: Codes, again: Codes, rows: NDArray[np.int64], depth: int
) -> NDArray[np.bool_]:
    """Whether the stored codes of some rows are worse than others by more than rounding and ties explain."""
    vectors, slack = sample.vectors[rows], sample.slack[rows]
    stored, again = stored[rows], again[rows]
    if depth < quantizer.levels:  # levels that are not compared are as they would be
        stored = np.column_stack([stored[:, :depth], again[:, depth:]])
    worse = _is_worse(vectors, quantizer.decode(stored), quantizer.decode(again), slack)
    codebooks = quantizer.codebooks
    if codebooks is None or not quantizer.hierarchical or not len(rows):
        return worse
    first = (stored != again).argmax(axis=1)
    sums = [np.zeros_like(vectors), np.zeros_like(vectors)]
    for level, codebook in enumerate(codebooks):
        reached = first >= level
        for part, codes in zip(sums, (stored, again), strict=True):
            part[reached] += codebook[codes[reached, level]]
    return worse & _is_worse(vectors, sums[0], sums[1], slack)


def _is_worse(vectors: Vectors, stored: Vectors, again: Vectors, slack: NDArray[np.float64]) -> NDArray[np.bool_]:
    exact = vectors.astype(np.float64)
    old, new = (np.square(exact - decoded).sum(axis=1) for decoded in (stored, again))
    # a vector that moves by s changes |v - a|^2 - |v - b|^2 by at most 2 s |a - b|
    moved = 2 * slack * np.sqrt(np.square(stored.astype(np.float64) - again).sum(axis=1))
    tolerance = _TIE * np.maximum(old, new) + 1e-6 * np.square(exact).sum(axis=1) + moved
    worse: NDArray[np.bool_] = old > new + tolerance
    return worse


def _tail_codes(index: _Contents) -> _Found:
    index.need_training()
    if index.tail is None:
        raise _CannotTell("the index has no tail")
    if not len(index.codes.rows):
        return _Found(0, "there are no items yet")
    sample = index.sample
    stored, again = sample.tail, index.tail.encode(sample.vectors)
    if stored is None or stored.shape != again.shape:
        return _Found(0, "the tail codes do not have the length that training chose", problem=True)
    old, new = (index.tail.decode(codes)[:, : index.config.dim] for codes in (stored, again))
    worse = _is_worse(sample.vectors, old, new, sample.slack)
    differ = int((stored != again).any(axis=1).sum())
    text = f"the tails of {len(stored):,} items, encoded again: {differ:,} differ"
    if differ:
        text += f", {differ - int(worse.sum()):,} of them by as good ones"
    return _Found(len(stored), text, problem=bool(worse.any()))


def _macros(index: _Contents) -> _Found:
    _need_this_format(index)
    known = index.snapshot.rows("SELECT DISTINCT function_name FROM duckdb_functions() WHERE NOT internal")
    if missing := sorted(set(NAMES) - {name for (name,) in known}):
        return _Found(len(NAMES), f"missing: {_listed(missing)}", problem=True)
    if index.setting("macros") != index.store.macros_fingerprint():
        text = "written by another version of semid-index; index.compact() writes those of this one"
        return _Found(len(NAMES), text, problem=True)
    key = "sid, sid_rest" if index.layout.rest_levels else "sid"
    parsed = "{'sid': sid, 'sid_rest': sid_rest}" if index.layout.rest_levels else "sid"
    wrong = 0
    for batch in _some_ids(
        index, f"SELECT *, semid_text({key}) AS text, semid_parse(semid_text({key})) = {parsed} AS same"
    ):
        texts = [format_id(codes) for codes in _codes_of(batch, index.layout).tolist()]
        wrong += sum(a != b for a, b in zip(texts, batch.column("text").to_pylist(), strict=True))
        wrong += batch.column("same").to_pylist().count(False)
    return _problems(len(NAMES), f"all {len(NAMES)}, as this version writes them", {"wrong answers of macros": wrong})


def _view(index: _Contents) -> _Found:
    _need_this_format(index)
    layout, shown = index.layout, min(index.layout.levels, 64)
    wrong = looked_at = 0
    for batch in _some_ids(index, "SELECT s.*, c.dup_rank AS rank", view=True):
        codes = _codes_of(batch, layout)
        texts = [format_id(row) for row in codes.tolist()]
        columns = [np.array(batch.column("semantic_id").to_pylist(), dtype=object) != np.array(texts, dtype=object)]
        columns += [batch.column(f"c{level + 1}").to_numpy() != codes[:, level] for level in range(shown)]
        columns += [batch.column("dup_rank").to_numpy() != batch.column("rank").to_numpy()]
        if index.quantizer.hierarchical:
            sids = batch.column("sid").to_numpy()
            columns += [batch.column(f"p{at}").to_numpy() != sids >> by for at, by in enumerate(layout.shifts, 1)]
        wrong += int(np.any(columns, axis=0).sum())
        looked_at += len(codes)
    shown_items, items = index.count("SELECT count(*) FROM semantic_ids"), len(index.codes.rows)
    problems = {
        "rows that are not as the codes say": wrong,
        "items more or fewer than there are": abs(shown_items - items),
    }
    return _problems(looked_at, f"semantic_ids shows {shown_items:,} items", problems)


def _some_ids(index: _Contents, select: str, *, view: bool = False) -> Iterator[Any]:
    """Some items, spread over the table."""
    step = max(1, len(index.codes.rows) // _COMPARED_IDS)
    source = "semid_codes c JOIN semantic_ids s USING (id)" if view else "semid_codes c"
    yield from index.snapshot.batches(f"{select} FROM {source} WHERE c.row % {step} = 0 LIMIT {_COMPARED_IDS}", _BATCH)


def _need_this_format(index: _Contents) -> None:
    index.need_training()
    if (found := index.setting("format_version")) != FORMAT_VERSION:
        raise _CannotTell(f"the file has format {found}; opening it for writing brings it to format {FORMAT_VERSION}")


_CHECKS: dict[str, Callable[[_Contents], _Found]] = {
    "blocks": _readable,
    "codebooks": _codebooks,
    "ids": _ids,
    "metadata": _metadata,
    "rows": _rows,
    "codes": _code_range,
    "order": _order,
    "dup_rank": _ranks,
    "history": _history,
    "norms": _norms,
    "buckets": _buckets,
    "vectors": _one_vector_each,
    "checksums": _checksums,
    "values": _values,
    "encoding": _encoded_again,
    "tail": _tail_codes,
    "view": _view,
    "macros": _macros,
}


def _problems(examined: int, text: str, problems: dict[str, int]) -> _Found:
    """The first problems that there are, or the text if there is none."""
    found = [f"{count:,} {what}" for what, count in problems.items() if count]
    return _Found(examined, "; ".join(found) or text, problem=bool(found))


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
