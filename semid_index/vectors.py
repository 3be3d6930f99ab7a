"""Reads embeddings in batches, and checks them.

Everything that comes in is made into one kind of array: (n, dim) float32, C-contiguous, native byte order.

- :func:`as_vectors` and :func:`as_queries` check what is in memory, and copy it only if it is not yet of that kind.
- :func:`open_vectors` gives a :class:`VectorSource`, which reads a file, a table or an array one batch at a time. A
  batch is one slice and one conversion, so a catalogue that does not fit into memory is no different from a small one.
- :func:`bad_rows` finds the rows that no index can use.
- :func:`read_ids` reads the ids that belong to the rows.

Nothing is unpickled. What a file's header promises is compared with the file's size before memory is taken for it.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate, chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from semid_index.errors import (
    DimensionMismatchError,
    InvalidArgumentError,
    InvalidIdsError,
    InvalidVectorsError,
    MissingDependencyError,
    SemidError,
    SourceNotFoundError,
    StorageError,
)
from semid_index.quantizer import Vectors

if TYPE_CHECKING:
    import pyarrow as pa

Rows = slice | NDArray[np.int64]  # which rows to read: a range of them, or their numbers in ascending order

_STREAM_VALUES = 1 << 24  # values held at once while a sample is picked from a stream: 64 MB as float32
_NAMED_ROWS = 5  # an error names this many rows, its attribute `rows` has all of them
_ID_FILES = (".ivecs", ".ibin")
_NOT_NUMBERS = {
    "b": "booleans (for 0 and 1 give x.astype(np.float32))",
    "c": "complex numbers",
    "O": "Python objects",
    "U": "text",
    "T": "text",
    "S": "bytes",
    "M": "dates",
    "m": "durations",
}


# ---------------------------------------------------------------------------------------------- arrays in memory


def as_vectors(vectors: Any, *, dim: int | None = None, what: str = "vectors", finite: bool = True) -> Vectors:
    """The vectors as an array of shape (n, dim), float32, C-contiguous, in native byte order.

    Takes whatever NumPy can read as an (n, dim) array of real numbers, and columns of lists from Arrow, pandas and
    polars. An array that is already of the right kind comes back as the same memory; n may be 0.

    ``what`` is what errors call the vectors. With ``finite=False``, NaN and infinite values are let through.
    Raises :class:`InvalidVectorsError` for anything else, and :class:`DimensionMismatchError` if ``dim`` is given and
    differs.

    >>> as_vectors([[1, 2], [3, 4]], dim=2)
    array([[1., 2.],
           [3., 4.]], dtype=float32)
    """
    return _checked(_read_array(vectors, what, dim), dim, what, finite=finite)


def _checked(array: NDArray[Any], dim: int | None, what: str, *, finite: bool = True) -> Vectors:
    array = _matrix(array, what)
    if dim is not None and array.shape[1] != dim:
        raise DimensionMismatchError(dim, array.shape[1], what=what)
    converted = _to_float32(array)
    if finite:
        _refuse_not_finite(converted, array, what)
    return converted


def as_queries(queries: Any, *, dim: int, finite: bool = True) -> tuple[Vectors, bool]:
    """One query of shape (dim,), or many of shape (q, dim), as (q, dim) vectors; and whether it was one.

    With ``finite=False``, NaN and infinite values are let through.

    >>> as_queries([1, 2], dim=2)
    (array([[1., 2.]], dtype=float32), True)
    """
    array = _read_array(queries, "queries", dim)
    is_one = array.ndim == 1
    return _checked(array[np.newaxis] if is_one else array, dim, "queries", finite=finite), is_one


def bad_rows(vectors: Vectors, *, zero: bool) -> NDArray[np.int64]:
    """The rows that hold NaN or infinite values and, if ``zero``, those of length zero, in ascending order.

    A length counts as zero if its square is zero in float32 (below about 1e-23): no direction is left to compare.
    """
    # One pass: NaN and infinity survive in a sum of squares. The square of a large finite value can overflow to
    # infinity as well, so a suspicious row is looked at value by value.
    with np.errstate(all="ignore"):
        squares = np.einsum("ij,ij->i", vectors, vectors)
    suspects = np.flatnonzero(~np.isfinite(squares) | (squares == 0) if zero else ~np.isfinite(squares))
    if not len(suspects):  # nearly always
        return suspects
    bad: NDArray[np.int64] = suspects[(squares[suspects] == 0) | ~np.isfinite(vectors[suspects]).all(axis=1)]
    return bad


def _read_array(data: Any, what: str, dim: int | None = None) -> NDArray[Any]:
    """The data as an array of any shape and type, copied only if there is no other way.

    ``dim`` is needed for columns of lists that have no row to learn it from.
    """
    if type(data) is np.ndarray and data.dtype.kind in "fiu":  # nearly always, and a single query has no time to lose
        return data
    column = _arrow_column(data, None, what)
    if column is not None:
        width = _list_width(column.type, column.chunks) or dim or 0
        starts = accumulate(map(len, column.chunks), initial=0)
        parts = [_list_rows(chunk, width, start, what) for chunk, start in zip(column.chunks, starts, strict=False)]
        return _concatenated(parts, width)
    if hasattr(data, "toarray") and hasattr(data, "nnz"):
        raise InvalidVectorsError(f"{what}: a sparse matrix. Indexes hold dense vectors: give x.toarray().")
    if np.ma.is_masked(data):
        raise InvalidVectorsError(
            f"{what}: some values are masked. Fill them with x.filled(value), or drop those rows."
        )
    try:
        can_only_dlpack = hasattr(data, "__dlpack__") and not hasattr(data, "__array__")
        array = np.from_dlpack(data) if can_only_dlpack else np.asarray(data)
    except MemoryError:
        raise
    except ValueError as error:  # lists of different lengths: Arrow can say which
        return _read_lists(data, what, error)
    except Exception as error:  # tensors on a GPU or with a gradient say themselves what to do, each with its own type
        raise InvalidVectorsError(f"{what}: cannot be read as an array. {error}") from error
    return _read_objects(array, what)


def _read_objects(array: NDArray[Any], what: str) -> NDArray[Any]:
    """The array; if it is a column of lists, which NumPy holds as objects, the lists as rows."""
    return _read_lists(array, what) if array.dtype == object and array.ndim == 1 else array


def _read_lists(
    lists: Iterable[Any], what: str, reason: object = "Its values are no lists of numbers."
) -> NDArray[Any]:
    """The rows given as an iterable of lists."""
    import pyarrow as pa  # heavy, and rarely needed here

    try:
        column = pa.array(list(lists))
    except (pa.ArrowException, TypeError, OverflowError):
        column = None
    if column is None or not _is_vector_type(column.type):
        raise InvalidVectorsError(f"{what}: cannot be read as numbers of shape (n, dim). {reason}")
    return _list_rows(column, _list_width(column.type, [column]), 0, what)


def _matrix(array: NDArray[Any], what: str) -> NDArray[Any]:
    """The array, checked to be (n, dim) real numbers with at least one dimension."""
    if array.dtype.kind not in "fiu":
        holds = _NOT_NUMBERS.get(array.dtype.kind, "records")
        raise InvalidVectorsError(f"{what}: {array.dtype} array of {holds}. Give floats or integers of shape (n, dim).")
    if array.ndim != 2:
        advice = {0: "That is one number.", 1: "For one vector give x.reshape(1, -1)."}
        if array.shape == (0,):
            advice[1] = "This is empty: give one vector or more."
        last = array.shape[-1] if array.ndim else 0
        raise InvalidVectorsError(
            f"{what}: shape {array.shape}, but (n, dim) is needed, one row for each vector. "
            + advice.get(array.ndim, f"If the last axis is the vector, give x.reshape(-1, {last}).")
        )
    if array.shape[1] == 0:
        raise InvalidVectorsError(f"{what}: shape {array.shape}, but a vector needs at least one dimension.")
    return array


def _to_float32(array: NDArray[Any]) -> Vectors:
    """The same values in the one layout that everything else expects; the same memory if it has that layout."""
    if type(array) is np.ndarray and array.dtype == np.float32 and array.flags.c_contiguous and array.flags.aligned:
        return array
    with np.errstate(all="ignore"):  # a float64 beyond float32 becomes infinite, which bad_rows finds
        return np.require(array, np.float32, ["C_CONTIGUOUS", "ALIGNED", "ENSUREARRAY"])


def _refuse_not_finite(converted: Vectors, array: NDArray[Any], what: str) -> None:
    rows = bad_rows(converted, zero=False)
    if not rows.size:
        return
    if np.isfinite(array[rows]).all(axis=1).any():
        problem = f"beyond float32, which ends at {np.finfo(np.float32).max:.2g}"
    else:
        problem = "NaN or infinite"
    raise InvalidVectorsError(f"{what}: {_name_rows(rows)} with values {problem}. Repair or drop.", rows=rows.tolist())


def _name_rows(rows: NDArray[np.int64]) -> str:
    named = ", ".join(str(row) for row in rows[:_NAMED_ROWS])
    more = f" and {len(rows) - _NAMED_ROWS:,} more" if len(rows) > _NAMED_ROWS else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {named}{more}"


# ------------------------------------------------------------------------------------------------------- sources


class VectorSource(ABC):
    """Vectors in a fixed order that are read one batch at a time. :func:`open_vectors` makes one."""

    rows: int
    dim: int
    description: str
    """What errors and logs call it."""

    @abstractmethod
    def batches(self, size: int) -> Iterator[Vectors]:
        """All rows in order, ``size`` at a time (the last batch may be smaller), each batch (b, dim) float32.

        Batches can be views of memory that belongs to someone else: do not write to them. Their values are not yet
        checked; :func:`bad_rows` does that.
        """

    def sample(self, n: int, *, seed: int) -> Vectors:
        """``n`` distinct rows chosen at random, or all if there are no more, in ascending order: (min(n, rows), dim).

        The same seed picks the same rows from every source with as many rows.
        """
        rows = self._sample_rows(n, seed)
        picked = np.empty((len(rows), self.dim), dtype=np.float32)
        seen = done = 0
        for batch in self.batches(max(1, _STREAM_VALUES // self.dim)):
            upto = int(np.searchsorted(rows, seen + len(batch)))
            picked[done:upto] = batch[rows[done:upto] - seen]
            seen, done = seen + len(batch), upto
        return picked

    def _sample_rows(self, n: int, seed: int) -> NDArray[np.int64]:
        if n < 0:
            raise InvalidArgumentError(f"A sample of {n} rows was asked for; give 0 or more.")
        if n >= self.rows:
            return np.arange(self.rows)
        return np.sort(np.random.default_rng(seed).choice(self.rows, n, replace=False))

    def _starts(self, size: int) -> range:
        if size < 1:
            raise InvalidArgumentError(f"Batches of {size} rows were asked for; give 1 or more.")
        return range(0, self.rows, size)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.description}: {self.rows:,} x {self.dim}>"


class ArraySource(VectorSource):
    """An array of shape (n, dim), in memory or mapped from a file."""

    def __init__(self, array: NDArray[Any], description: str) -> None:
        self._array = _matrix(array, description)
        self.rows, self.dim = array.shape
        self.description = description

    def batches(self, size: int) -> Iterator[Vectors]:
        """See :class:`VectorSource`."""
        for start in self._starts(size):
            yield self._read(slice(start, start + size))

    def sample(self, n: int, *, seed: int) -> Vectors:
        """See :class:`VectorSource`."""
        return self._read(slice(None) if n >= self.rows else self._sample_rows(n, seed))

    def _read(self, rows: Rows) -> Vectors:
        return _to_float32(self._array[rows])


class RecordSource(ArraySource):
    """Rows of ``.fvecs`` and ``.bvecs``: before each vector stands its number of dimensions.

    The numbers are compared when their rows are read: to read them all at once would be to read the whole file.
    """

    def __init__(self, records: NDArray[np.void], description: str) -> None:
        super().__init__(records["vector"], description)
        self._dims = records["dim"]

    def _read(self, rows: Rows) -> Vectors:
        odd = np.flatnonzero(self._dims[rows] != self.dim)
        if odd.size:
            numbers = range(self.rows)[rows] if isinstance(rows, slice) else rows
            raise _uneven(int(numbers[odd[0]]), int(self._dims[rows][odd[0]]), self.dim, self.description)
        return super()._read(rows)


class ArrowSource(VectorSource):
    """A column of lists, all of one length, that comes in Arrow chunks of any size.

    ``chunks`` is called with the number of rows wanted at a time, and may give more or fewer.
    """

    def __init__(
        self, chunks: Callable[[int], Iterable[pa.Array]], type_: pa.DataType, rows: int, description: str
    ) -> None:
        self._chunks = chunks
        self.rows = rows
        self.dim = _list_width(type_, chunks(1))
        self.description = description
        if not self.dim:
            raise InvalidVectorsError(
                f"{description}: the first list is empty, null or not there, so the number of dimensions is unknown.",
                rows=[0] if rows else [],
            )

    def batches(self, size: int) -> Iterator[Vectors]:
        """See :class:`VectorSource`."""
        self._starts(size)  # checks the size
        parts: list[NDArray[Any]] = []
        seen = held = 0
        for chunk in self._chunks(size):
            start = 0
            while start < len(chunk):
                part = chunk.slice(start, size - held)
                parts.append(_list_rows(part, self.dim, seen, self.description))
                start, seen, held = start + len(part), seen + len(part), held + len(part)
                if held == size:
                    yield _to_float32(_concatenated(parts, self.dim))
                    parts, held = [], 0
        if parts:
            yield _to_float32(_concatenated(parts, self.dim))
        if seen != self.rows:
            raise _changed(self.description)


class SpooledSource(ArraySource):
    """Batches that can be had only once, such as those of a generator: written to a temporary file, and read from it.

    Adding vectors reads them twice, once to check and once to store, and needs to know how many there are. The file is
    in the folder for temporary files, has no name, and goes away with the source.
    """

    def __init__(self, batches: Iterator[Any], description: str) -> None:
        rows = dim = 0
        with tempfile.TemporaryFile() as file:  # what is mapped stays until the map goes
            for batch in batches:
                part = as_vectors(batch, what=f"{description}, from row {rows}", finite=False)
                if rows and part.shape[1] != dim:
                    raise _uneven(rows, part.shape[1], dim, description)
                rows, dim = rows + len(part), part.shape[1]
                try:
                    file.write(part.data)
                    file.flush()
                except OSError as error:
                    raise StorageError(
                        f"{description} cannot be kept in {tempfile.gettempdir()}: {error.strerror}. Make room there, "
                        "or set TMPDIR to another folder."
                    ) from error
            if not rows:
                raise InvalidVectorsError(f"{description}: there were no rows. Give batches of shape (n, dim).")
            super().__init__(np.memmap(file, np.float32, "r", shape=(rows, dim)), description)


class Hdf5Source(VectorSource):
    """A dataset of shape (n, dim) in an HDF5 file."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name
        self.description = f"{path}, dataset '{name}'"
        with self._dataset() as dataset:
            # A view of one value stands for the dataset: the same checks, nothing read.
            _matrix(np.broadcast_to(np.zeros((), dataset.dtype), dataset.shape or ()), self.description)
            self.rows, self.dim = dataset.shape

    def batches(self, size: int) -> Iterator[Vectors]:
        """See :class:`VectorSource`."""
        with self._dataset() as dataset:
            if dataset.shape != (self.rows, self.dim):
                raise _changed(self.description)
            for start in self._starts(size):
                yield _to_float32(dataset[start : start + size])

    @contextmanager
    def _dataset(self) -> Iterator[Any]:
        h5py = _import_h5py()
        with reading_file(self._path), h5py.File(self._path, "r") as file:
            dataset = file.get(self._name)
            if not isinstance(dataset, h5py.Dataset):
                raise InvalidArgumentError(
                    f"{self._path}: no dataset '{self._name}'. It has {_listed(file)}; choose with column= (--column)."
                )
            yield dataset


# --------------------------------------------------------------------------------------------------------- opening


def open_vectors(source: Any, *, column: str | None = None) -> VectorSource:
    """A source of vectors: a file, an Arrow table or a data frame, or anything that :func:`as_vectors` takes.

    An iterator, such as a generator, gives batches of shape (n, dim). They go through a temporary file, as float32.

    ``column`` names the column of a table, of ``.parquet``, ``.arrow`` and ``.feather``, the array of an ``.npz``, or
    the dataset of an HDF5 file ("train" unless said). Arrays are not copied: a batch is converted when it is read.

    Raises :class:`InvalidVectorsError` if there are no vectors in it, :class:`InvalidArgumentError` for an unknown
    suffix or column, ``FileNotFoundError`` (also a :class:`SemidError`) if there is no such file.
    """
    if isinstance(source, str | os.PathLike):
        return _open_file(Path(source), column)
    if isinstance(source, VectorSource):
        _refuse_column(column, source.description)
        return source
    if isinstance(source, Iterator):
        _refuse_column(column, "vectors")
        return SpooledSource(source, "vectors")
    arrow = _arrow_column(source, column, "vectors")
    if arrow is not None:
        return ArrowSource(lambda _size: arrow.chunks, arrow.type, len(arrow), "vectors")
    _refuse_column(column, "vectors")
    return ArraySource(_read_array(source, "vectors"), "vectors")


def _open_file(path: Path, column: str | None) -> VectorSource:
    suffix = path.suffix.lower()
    if not path.is_file():
        raise SourceNotFoundError(f"There is no file '{path}'. Give the path of one file with vectors.")
    if suffix in _COLUMN_FILES:
        return _COLUMN_FILES[suffix](path, column)
    if suffix not in _ARRAY_FILES:
        ids = " Such files hold ids (the true neighbours of a benchmark)." if suffix in _ID_FILES else ""
        known = ", ".join(sorted(_ARRAY_FILES | _COLUMN_FILES))
        raise InvalidArgumentError(
            f"Vectors cannot be read from '{path}'.{ids} Known are {known}. Or load it yourself, and give the array."
        )
    _refuse_column(column, str(path))
    return _ARRAY_FILES[suffix](path)


def _refuse_column(column: str | None, where: str) -> None:
    if column is not None:
        raise InvalidArgumentError(
            f"{where}: column='{column}' was given, but there are no columns to choose from. Leave it out."
        )


@contextmanager
def reading_file(path: Path, error: type[SemidError] = InvalidVectorsError) -> Iterator[None]:
    """Errors of the libraries that parse files, as one of ours that names the file."""
    try:
        yield
    except SemidError:
        raise
    except Exception as problem:  # damaged files raise anything: SyntaxError, BadZipFile, OSError, MemoryError ...
        reason = str(problem).rstrip(".")
        raise error(f"{path} cannot be read: {reason}. Is it whole, and what its suffix says?") from problem


def _uneven(row: int, got: int, dim: int, what: str) -> InvalidVectorsError:
    return InvalidVectorsError(
        f"{what}: row {row} has {got} values where {dim} are expected. All rows need as many.", rows=[row]
    )


def _changed(what: str) -> InvalidVectorsError:
    return InvalidVectorsError(f"{what}: it has not as many rows as when it was opened. Open it again.")


# ---------------------------------------------------------------------------------------- files that are one array


def _open_npy(path: Path) -> VectorSource:
    with reading_file(path):
        return ArraySource(_map_npy(path), str(path))


def _map_npy(path: Path) -> NDArray[Any]:
    """The array of an ``.npy`` file, mapped; of any shape and type except Python objects."""
    with path.open("rb") as file:
        shape, fortran_order, dtype = _npy_header(file)
        offset = file.tell()
    _check_size(shape, dtype, path.stat().st_size - offset)
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran_order else "C")


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether in Fortran order, and type."""
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    return np.lib.format.read_array_header_2_0(file)


def _check_size(shape: tuple[int, ...], dtype: np.dtype[Any], size: int) -> None:
    """Compare what a header promises with the bytes that follow it, in integers that cannot overflow."""
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which would have to be unpickled.")
    promised = dtype.itemsize
    for length in shape:
        promised *= length
    if promised != size:
        raise ValueError(f"its header promises {promised:,} bytes (shape {shape}, {dtype}), but {size:,} follow.")


def _open_bin(dtype: str) -> Callable[[Path], VectorSource]:
    """A reader of the big-ann files: the number of rows, that of dimensions, both uint32, then the values."""

    def open_bin(path: Path) -> VectorSource:
        with reading_file(path):
            header = np.fromfile(path, "<u4", count=2)
            if len(header) < 2:
                raise ValueError("it is shorter than its header of 8 bytes.")
            shape = int(header[0]), int(header[1])
            _check_size(shape, np.dtype(dtype), path.stat().st_size - 8)
            return ArraySource(np.memmap(path, dtype, "r", 8, shape), str(path))

    return open_bin


def _open_vecs(dtype: str) -> Callable[[Path], VectorSource]:
    """A reader of the TEXMEX files: each vector follows its number of dimensions, an int32."""

    def open_vecs(path: Path) -> VectorSource:
        with reading_file(path):
            size = path.stat().st_size
            first = np.fromfile(path, "<i4", count=1)
            dim = int(first[0]) if first.size else 0
            row_bytes = 4 + dim * np.dtype(dtype).itemsize
            if dim < 1 or size % row_bytes:
                raise ValueError(
                    f"its first row says {dim} dimensions, which does not divide its {size:,} bytes into whole rows."
                )
            record = np.dtype([("dim", "<i4"), ("vector", dtype, (dim,))])
            source = RecordSource(np.memmap(path, record, "r"), str(path))
            source._read(slice(-1, None))  # rows of different lengths rarely leave a right one at the end
            return source

    return open_vecs


# ------------------------------------------------------------------------------------- files with a choice of columns


def _open_npz(path: Path, column: str | None) -> VectorSource:
    """One array of the archive, held in memory: it may be compressed, so it cannot be mapped."""
    with reading_file(path), zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        name = column or _choose(
            [name for name, info in members.items() if _is_matrix(archive, info)], list(members), str(path)
        )
        if name not in members:
            raise InvalidArgumentError(
                f"{path}: no array '{name}'. It has {_listed(members)}; choose with column= (--column)."
            )
        with archive.open(members[name]) as file:
            shape, _, dtype = _npy_header(file)
            _check_size(shape, dtype, members[name].file_size - file.tell())
        with archive.open(members[name]) as file:
            return ArraySource(np.lib.format.read_array(file, allow_pickle=False), f"{path}, array '{name}'")


def _is_matrix(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bool:
    if not info.filename.endswith(".npy"):
        return False
    with archive.open(info) as file:
        shape, _, dtype = _npy_header(file)
    return len(shape) == 2 and dtype.kind in "fiu"


def _open_hdf5(path: Path, column: str | None) -> VectorSource:
    return Hdf5Source(path, column or "train")


def _import_h5py() -> Any:
    try:
        import h5py  # heavy, and an optional dependency
    except ImportError as error:
        raise MissingDependencyError("HDF5 files need h5py. Run: pip install 'semid-index[bench]'") from error
    return h5py


def _open_parquet(path: Path, column: str | None) -> VectorSource:
    import pyarrow.parquet as pq  # heavy

    with reading_file(path), pq.ParquetFile(path) as file:
        field = _vector_field(file.schema_arrow, column, str(path))
        rows = file.metadata.num_rows

        def chunks(size: int) -> Iterator[pa.Array]:
            # Mapped and not pre-buffered, memory holds a few batches; otherwise, it holds a whole row group.
            with reading_file(path), pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
                for batch in file.iter_batches(size, columns=[field.name]):
                    yield batch.column(field.name)

        return ArrowSource(chunks, field.type, rows, f"{path}, column '{field.name}'")


def _open_ipc(path: Path, column: str | None) -> VectorSource:
    """A file of record batches, with a table of contents (``.feather``, most ``.arrow``) or as a stream."""
    import pyarrow as pa  # heavy

    def batches(only: list[int] | None = None) -> Iterator[pa.RecordBatch]:
        options = pa.ipc.IpcReadOptions(included_fields=only)
        with reading_file(path), pa.memory_map(str(path)) as file:
            if file.read(6) == b"ARROW1":
                reader = pa.ipc.open_file(file, options=options)
                found = map(reader.get_batch, range(reader.num_record_batches))
            else:
                file.seek(0)
                found = iter(pa.ipc.open_stream(file, options=options))
            for batch in found:
                batch.validate(full=True)  # a damaged offset would be followed to memory outside of the file
                yield batch

    with reading_file(path):
        first = next(batches(), None)
        if first is None:
            raise ValueError("it has no rows.")
        field = _vector_field(first.schema, column, str(path))
        only = [first.schema.get_field_index(field.name)]

        def chunks(_size: int) -> Iterator[pa.Array]:
            return (batch.column(0) for batch in batches(only))

        return ArrowSource(chunks, field.type, sum(map(len, chunks(0))), f"{path}, column '{field.name}'")


_ARRAY_FILES: dict[str, Callable[[Path], VectorSource]] = {
    ".npy": _open_npy,
    ".fvecs": _open_vecs("<f4"),
    ".bvecs": _open_vecs("u1"),
    ".fbin": _open_bin("<f4"),
    ".u8bin": _open_bin("u1"),
    ".i8bin": _open_bin("i1"),
}
_COLUMN_FILES: dict[str, Callable[[Path, str | None], VectorSource]] = {
    ".npz": _open_npz,
    ".parquet": _open_parquet,
    ".arrow": _open_ipc,
    ".feather": _open_ipc,
    ".hdf5": _open_hdf5,
    ".h5": _open_hdf5,
}


# ------------------------------------------------------------------------------------------------- columns of lists


def _arrow_column(data: Any, column: str | None, what: str) -> pa.ChunkedArray | None:
    """The column of lists that the data is or, if it is a table, has; None if it is neither."""
    if not (hasattr(data, "__arrow_c_stream__") or hasattr(data, "__arrow_c_array__")):
        return None
    import pyarrow as pa  # heavy

    try:
        chunked = pa.chunked_array(data if hasattr(data, "__arrow_c_stream__") else [pa.array(data)])
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise InvalidVectorsError(f"{what}: cannot be read as Arrow data. {error}") from error
    if pa.types.is_struct(chunked.type):
        field = _vector_field(chunked.type, column, what)
        chunked = pa.Table.from_struct_array(chunked).column(field.name)
    else:
        _refuse_column(column, what)
    return chunked if _is_vector_type(chunked.type) else None


def _vector_field(fields: Iterable[pa.Field], column: str | None, what: str) -> pa.Field:
    """The field called ``column``, or the only one that holds vectors."""
    fields = list(fields)
    names = [field.name for field in fields]
    name = column or _choose([field.name for field in fields if _is_vector_type(field.type)], names, what)
    if names.count(name) != 1:
        raise InvalidArgumentError(
            f"{what}: {names.count(name) or 'no'} columns named '{name}'. It has {_listed(names)}."
        )
    field = fields[names.index(name)]
    if not _is_vector_type(field.type):
        raise InvalidVectorsError(
            f"{what}: column '{name}' holds {field.type}. Vectors are lists of floats or integers."
        )
    return field


def _choose(candidates: list[str], names: Iterable[str], what: str) -> str:
    """The only candidate."""
    if len(candidates) > 1:
        raise InvalidArgumentError(
            f"{what}: vectors could be in {_listed(candidates)}. Choose with column= (--column)."
        )
    if not candidates:
        raise InvalidVectorsError(
            f"{what}: none of {_listed(names)} holds vectors, one row or list of numbers for each item. "
            "If each dimension is a column of its own, give the array: table.to_numpy() in pandas and polars."
        )
    return candidates[0]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "nothing"


def _is_vector_type(type_: pa.DataType) -> bool:
    import pyarrow.types as pt  # heavy

    lists = pt.is_list, pt.is_large_list, pt.is_fixed_size_list, pt.is_list_view, pt.is_large_list_view
    return any(is_kind(type_) for is_kind in lists) and (
        pt.is_floating(type_.value_type) or pt.is_integer(type_.value_type)
    )


def _list_width(type_: pa.DataType, chunks: Iterable[pa.Array]) -> int:
    """The length of the lists: as the type says, or as the first list is; 0 if there is none."""
    if hasattr(type_, "list_size"):
        return int(type_.list_size)
    first = next(chain.from_iterable(chunks), None)
    return len(first) if first is not None and first.is_valid else 0


def _list_rows(lists: pa.Array, dim: int, first_row: int, what: str) -> NDArray[Any]:
    """The lists as an array of shape (n, dim), without a copy; ``first_row`` is the number of the first one."""
    if lists.null_count:
        raise _missing(np.flatnonzero(lists.is_null()) + first_row, what)
    if not hasattr(lists.type, "list_size"):
        lengths = lists.value_lengths().to_numpy()
        odd = np.flatnonzero(lengths != dim)
        if odd.size:
            raise _uneven(first_row + int(odd[0]), int(lengths[odd[0]]), dim, what)
    values = lists.flatten()
    if values.null_count:
        raise _missing(np.unique(np.flatnonzero(values.is_null()) // dim) + first_row, what)
    array: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return array.reshape(len(lists), dim)


def _missing(rows: NDArray[np.int64], what: str) -> InvalidVectorsError:
    return InvalidVectorsError(
        f"{what}: {_name_rows(rows)} with missing values (null). Repair or drop.", rows=rows.tolist()
    )


def _concatenated(parts: list[NDArray[Any]], dim: int) -> NDArray[Any]:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty((0, dim), dtype=np.float32)


# ------------------------------------------------------------------------------------------------------------- ids


def read_ids(path: str | os.PathLike[str], *, column: str | None = None) -> list[str] | NDArray[np.int64]:
    """The ids in a file, in order: text as a list of str, integers as an int64 array.

    ``.txt`` has one id a line, in UTF-8; ``.npy`` a 1-D array of integers or text; ``.parquet`` a column, the first
    unless ``column`` names another. Raises :class:`InvalidIdsError` for anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise SourceNotFoundError(f"There is no file '{path}'. Give the path of one file with ids.")
    suffix = path.suffix.lower()
    with reading_file(path, InvalidIdsError):
        if suffix == ".parquet":
            return _parquet_ids(path, column)
        _refuse_column(column, str(path))
        if suffix == ".txt":
            return _text_ids(path)
        if suffix == ".npy":
            return _npy_ids(path)
    raise InvalidIdsError(f"Ids cannot be read from '{path}'. Known are .npy, .parquet and .txt, one id a line.")


def _text_ids(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig") as file:  # -sig: a byte order mark is no part of the first id
        ids = [line.rstrip("\n") for line in file]
    if "" in ids:
        raise InvalidIdsError(f"{path}: line {ids.index('') + 1} is empty. Give one id a line.")
    return ids


def _npy_ids(path: Path) -> list[str] | NDArray[np.int64]:
    ids = _map_npy(path)
    if ids.ndim != 1 or ids.dtype.kind not in "iuU":
        raise InvalidIdsError(
            f"{path}: {ids.dtype} array of shape {ids.shape}. Ids are a 1-D array of integers or text."
        )
    if ids.dtype.kind == "U":
        return [str(name) for name in ids]
    if ids.dtype == np.uint64 and ids.size and ids.max() > np.iinfo(np.int64).max:
        raise InvalidIdsError(f"{path}: ids beyond 64-bit signed integers. Give them as text.")
    return np.array(ids, dtype=np.int64)


def _parquet_ids(path: Path, column: str | None) -> list[str] | NDArray[np.int64]:
    import pyarrow as pa  # heavy
    import pyarrow.parquet as pq

    schema = pq.read_schema(path)
    name = schema.names[0] if column is None else column
    if name not in schema.names:
        raise InvalidArgumentError(f"{path}: no column '{name}'. It has {_listed(schema.names)}.")
    ids = pq.read_table(path, columns=[name]).column(name)
    if pa.types.is_dictionary(ids.type):
        ids = ids.cast(ids.type.value_type)
    if ids.null_count:
        row = int(np.flatnonzero(ids.is_null())[0])
        raise InvalidIdsError(f"{path}, column '{name}': row {row} has no id (null).")
    if pa.types.is_integer(ids.type):
        return np.asarray(ids.cast(pa.int64()))
    if pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type):
        return [str(text) for text in ids.to_pylist()]
    raise InvalidIdsError(
        f"{path}: column '{name}' holds {ids.type}. Ids are integers or text; choose with column= (--id-column)."
    )
