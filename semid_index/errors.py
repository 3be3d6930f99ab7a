"""Every error that semid-index raises on purpose.

All of them are :class:`SemidError`, and each is also the built-in error that a caller would expect
(``ValueError`` for a bad argument, ``OSError`` for a file that cannot be used). A message says what was
wrong, what is allowed and what to do next; the values it speaks of are kept as attributes.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any


class SemidError(Exception):
    """The parent of every error raised on purpose."""


class InvalidArgumentError(SemidError, ValueError):
    """An argument has a value that is not allowed."""


class InvalidVectorsError(SemidError, ValueError):
    """Vectors that cannot be used: wrong shape or type, NaN, infinite, zero under cosine."""

    def __init__(self, message: str, *, rows: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.rows = tuple(rows)


class DimensionMismatchError(InvalidVectorsError):
    """Vectors have another number of dimensions than the index."""

    def __init__(self, expected: int, got: int, *, what: str = "vectors") -> None:
        super().__init__(
            f"{what} have {got} dimensions, the index has {expected}. Give arrays of shape (n, {expected})."
        )
        self.expected = expected
        self.got = got


class InvalidCodesError(SemidError, ValueError):
    """Codes or a prefix that do not fit the levels of the index."""


class InvalidIdsError(SemidError, ValueError):
    """Ids of the wrong length or type."""


class DuplicateIdError(InvalidIdsError):
    """An id occurs twice, in one batch or against the index."""

    def __init__(self, message: str, *, ids: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.ids = tuple(ids)


class UnknownIdError(SemidError, LookupError):
    """No item has this id."""


class NotTrainedError(SemidError, RuntimeError):
    """A quantizer or an index was used before it was trained."""


class AlreadyTrainedError(SemidError, RuntimeError):
    """Training again would change IDs that were already given."""


class PrefixNotSupportedError(SemidError, ValueError):
    """A prefix was asked of codes that have no order from coarse to fine."""

    def __init__(self, quantizer: str, what: str = "Prefixes") -> None:
        super().__init__(
            f"{what}: the codes of '{quantizer}' are not a hierarchy, so a prefix of them means nothing. "
            "Build the index with quantizer='rq' (or 'balanced-rq') to use prefixes."
        )
        self.quantizer = quantizer


class PluginError(SemidError, RuntimeError):
    """A plugin cannot be used as it is, or two plugins claim one name."""


class UnknownNameError(SemidError, LookupError):
    """No plugin offers this name."""

    def __init__(self, kind: str, name: str, available: Iterable[str], *, hint: str = "") -> None:
        self.kind = kind
        self.name = name
        self.available = tuple(sorted(available))
        close = difflib.get_close_matches(name, self.available, n=1)
        meant = f" Did you mean '{close[0]}'?" if close else ""
        listed = ", ".join(self.available) or "none"
        super().__init__(f"No {kind} named '{name}'. Installed: {listed}.{meant} {hint or 'semid plugins lists them.'}")

    def __str__(self) -> str:  # LookupError subclasses of KeyError kind would print a repr
        return str(self.args[0])


class MissingDependencyError(SemidError, ImportError):
    """An optional package is needed and not installed; the message has the line that installs it."""


class DeviceError(SemidError, RuntimeError):
    """A GPU was asked for and cannot be used, or its memory is too small; the message says what mends it."""


class IndexFileError(SemidError, OSError):
    """The file of an index cannot be used."""


class IndexExistsError(IndexFileError, FileExistsError):
    """``create`` was asked to write over an existing file."""


class IndexNotFoundError(IndexFileError, FileNotFoundError):
    """There is no file at this path."""


class SourceNotFoundError(SemidError, FileNotFoundError):
    """There is no file to read vectors or ids from."""


class NotAnIndexError(IndexFileError):
    """The file exists but is no index of semid-index."""


class NewerFormatError(IndexFileError):
    """The file was written by a later version of semid-index."""


class CorruptIndexError(IndexFileError):
    """The content of the file contradicts itself."""


RESTORE = "Restore it from a copy, or build it again."
"""What to do with a damaged file."""


class IndexLockedError(IndexFileError):
    """Another process has the file open."""


class ConflictError(IndexFileError):
    """Something else in this process wrote the same rows at the same time; the index is as it was before."""


class ReadOnlyError(IndexFileError):
    """A write was asked of an index that is open for reading only."""


class StorageError(IndexFileError):
    """Writing failed (disk full, no permission); the index is as it was before."""


class IndexClosedError(SemidError, RuntimeError):
    """The index was closed."""


class FilterError(SemidError, ValueError):
    """A ``where`` expression that is not allowed or cannot be parsed."""


class SearchTimeoutError(SemidError, TimeoutError):
    """A search ran past its ``timeout``."""


def is_interrupt(error: Exception) -> bool:
    """Whether this is what DuckDB raises in place of KeyboardInterrupt."""
    return isinstance(error, RuntimeError) and str(error) == "Query interrupted"
