"""Copies of an index, as small as they can be: beside it, or in its place.

A copy is written under another name in the same folder and takes its own when it is complete and on the disk. So
whatever happens, there is the file that was there before, or the whole new one.
"""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from semid_index.arrow import fixed_size_matrix
from semid_index.build import uses_all_bits
from semid_index.database import check_not_in_use, remove_log, sync_file, sync_folder
from semid_index.errors import IndexFileError, IndexLockedError, ReadOnlyError, StorageError
from semid_index.export import check_place
from semid_index.records import CompactReport
from semid_index.store import Store

_PROBED_ROWS = 256  # stored vectors looked at to choose how they are written
_ATTEMPTS = 3  # copies that compact writes while others go on changing the file
_parts: set[str] = set()  # files that copies in this process are being written to


def save_copy(store: Store, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a copy of the index, as it is at one moment, to a file of its own; returns its path."""
    target = Path(path)
    with _complete(target, f".{target.name}.{uuid.uuid4().hex[:8]}.part") as part:
        check_place(target, store.path, overwrite=overwrite)
        if target.exists():
            check_not_in_use(target)
        _remove_leftovers(target)
        store.write_copy(part, target, compress=_compresses(store))
        sync_file(part)
        remove_log(target)  # of the file that is replaced
        part.replace(target)
        sync_folder(target)
    return target


def compact(store: Store, release: Callable[[], None]) -> CompactReport:
    """Write the file anew, sorted by sid and without what was deleted, and go on with that one.

    ``release`` lets go of all connections but the store's own.
    """
    started = time.perf_counter()
    before = store.file_bytes()
    if store.read_only:
        raise ReadOnlyError(f"{store.path} is open for reading only. Open it without read_only=True to compact it.")
    with store.unchanging():
        store.refresh_macros()
        if store.path is None:
            store.sort_codes()
        else:
            _write_anew(store, store.path, release)
    return CompactReport(before, store.file_bytes(), time.perf_counter() - started)


def _write_anew(store: Store, path: Path, release: Callable[[], None]) -> None:
    for _ in range(_ATTEMPTS):
        state = store.checkpoint()
        with _complete(path, f".{path.name}.compact.part") as part:  # one name: what a crash leaves is replaced
            store.write_copy(part, path, compress=_compresses(store))
            sync_file(part)
            if store.replace_file(part, state, release):
                return
    raise IndexLockedError(
        f"{path} was changed again and again while it was compacted, by another index that is open on it or a "
        "connection of engine(). Try again when they are done."
    )


@contextmanager
def _complete(target: Path, name: str) -> Iterator[Path]:
    """Where to write what is to become ``target``: a file beside it, of which nothing is left if that fails."""
    part = target.with_name(name)
    _parts.add(os.path.realpath(part))
    try:
        _remove_part(part)
        yield part
    except IndexFileError:
        raise
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {error.strerror}. Use another path.") from error
    finally:
        with suppress(OSError):
            _remove_part(part)
        _parts.discard(os.path.realpath(part))


def _remove_leftovers(target: Path) -> None:
    """Remove what earlier copies to the same place left when their processes were killed.

    Another process may be writing one just now: then DuckDB holds a lock on it.
    """
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.part")
    for part in [entry for entry in target.parent.iterdir() if name.fullmatch(entry.name)]:
        if os.path.realpath(part) not in _parts:
            with suppress(OSError, IndexLockedError):
                check_not_in_use(part)
                _remove_part(part)


def _remove_part(part: Path) -> None:
    part.unlink(missing_ok=True)
    remove_log(part)


def _compresses(store: Store) -> bool:
    """Whether DuckDB's compression makes the stored vectors smaller; see docs/decisions/0005."""
    if not store.is_trained or store.config.vectors != "float32":
        return True
    few = store.arrow(f"SELECT v FROM semid_vectors LIMIT {_PROBED_ROWS}")["v"]
    return not uses_all_bits(np.ascontiguousarray(fixed_size_matrix(few)))
