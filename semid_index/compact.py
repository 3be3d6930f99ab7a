"""Copies of an index, as small as they can be: beside it, or in its place.

A copy takes its name when it is complete and on the disk (see ``whole_files``).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from semid_index.appending import uses_all_bits
from semid_index.arrow import fixed_size_matrix
from semid_index.database import sync_file
from semid_index.errors import IndexLockedError, ReadOnlyError
from semid_index.records import CompactReport
from semid_index.store import Store
from semid_index.whole_files import new_index, part_of, storage_errors

_PROBED_ROWS = 256  # stored vectors looked at to choose how they are written
_ATTEMPTS = 3  # copies that compact writes while others go on changing the file


def save_copy(store: Store, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write a copy of the index, as it is at one moment, to a file of its own; returns its path."""
    target = Path(path)
    with new_index(target, store.path, overwrite=overwrite) as part:
        store.write_copy(part, target, compress=_compresses(store))
    return target


def save_codebooks(store: Store, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write an index with the same codebooks, and without items, to a file of its own; returns its path."""
    target = Path(path)
    with new_index(target, store.path, overwrite=overwrite) as part:
        empty = Store.create(part, store.config)
        try:
            if store.is_trained:
                report, arrays = store.meta("train_report"), store.learned_arrays()
                empty.save_training(store.config, report, store.layout, arrays, hierarchical=store.hierarchical)
        finally:
            empty.close()
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
        with storage_errors(path), part_of(path, f".{path.name}.compact.part") as part:
            store.write_copy(part, path, compress=_compresses(store))
            sync_file(part)
            if store.replace_file(part, state, release):
                return
    raise IndexLockedError(
        f"{path} was changed again and again while it was compacted, by another index that is open on it or a "
        "connection of engine(). Try again when they are done."
    )


def _compresses(store: Store) -> bool:
    """Whether DuckDB's compression makes the stored vectors smaller; see docs/decisions/0005."""
    if not store.is_trained or store.config.vectors != "float32":
        return True
    few = store.arrow(f"SELECT v FROM semid_vectors LIMIT {_PROBED_ROWS}")["v"]
    return not uses_all_bits(np.ascontiguousarray(fixed_size_matrix(few)))
