"""Files that take their names only when they are complete.

What is to become a file is written under another name beside it, as its part. So whatever happens, there is the file
that was there before, or the whole new one. A process that is killed leaves its part behind; the next one that writes
the same file removes it.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from semid_index.database import check_not_in_use, remove_log, sync_file, sync_folder
from semid_index.errors import IndexExistsError, IndexFileError, IndexLockedError, StorageError

_parts: set[str] = set()  # those that this process is writing


@contextmanager
def new_file(target: Path, index: Path | None, *, overwrite: bool) -> Iterator[Path]:
    """Where to write what is to become ``target``, which must not be the file of the ``index`` that it comes from.

    The caller gives it its name in the end, with ``replace``.
    """
    with storage_errors(target):
        check_place(target, index, overwrite=overwrite)
        with part_of(target) as part:
            yield part


@contextmanager
def new_index(target: Path, index: Path | None, *, overwrite: bool) -> Iterator[Path]:
    """The same for an index, which takes its name in the end, on the disk; not that of one that somebody has open."""
    with new_file(target, index, overwrite=overwrite) as part:
        if target.exists():
            check_not_in_use(target)
        yield part
        put_in_place(part, target)


def put_in_place(part: Path, target: Path) -> None:
    """Give an index that is complete and closed its name, once all of it is on the disk."""
    sync_file(part)
    remove_log(target)  # of the file that is replaced
    part.replace(target)
    sync_folder(target)


@contextmanager
def storage_errors(target: Path) -> Iterator[None]:
    """What the system refuses, as an error that names the file that was to be written."""
    try:
        yield
    except IndexFileError:  # some are errors of the system as well
        raise
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {error.strerror}. Use another path.") from error


@contextmanager
def part_of(target: Path, name: str = "") -> Iterator[Path]:
    """A path beside ``target`` to write it at; what is there in the end, and was not renamed, is removed."""
    part = target.with_name(name or f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    _parts.add(os.path.realpath(part))
    try:
        _remove_leftovers(target)
        with suppress(OSError):
            _remove_part(part)
        yield part
    finally:
        with suppress(OSError):
            _remove_part(part)
        _parts.discard(os.path.realpath(part))


def check_place(target: Path, index: Path | None, *, overwrite: bool) -> None:
    """Refuse to write a file where it cannot be, or must not."""
    if not target.parent.is_dir():
        raise IndexFileError(f"There is no folder {target.parent}. Create it first.")
    if target.is_dir():
        raise IndexExistsError(f"{target} is a folder. Give the path of a file.")
    if target.exists() and index is not None and target.samefile(index):
        raise IndexExistsError(f"{target} is the index itself. Give the path of another file.")
    if target.exists() and not overwrite:
        raise IndexExistsError(f"{target} exists. Replace it with overwrite=True (--overwrite), or use another path.")


def _remove_leftovers(target: Path) -> None:
    """Remove the parts that killed processes left.

    Another process may be writing one just now, or about to rename it: its number is in the name. Should it run on
    another machine that has this folder, too, DuckDB holds a lock on what it writes, a database or what COPY makes.
    """
    name = re.compile(rf"\.{re.escape(target.name)}\.(\d+)-[0-9a-f]{{8}}\.part")
    with suppress(OSError):  # a folder that is not there, or cannot be listed
        left = {entry: match for entry in target.parent.iterdir() if (match := name.fullmatch(entry.name))}
        for part, match in left.items():
            process = int(match[1])
            in_use = os.path.realpath(part) in _parts if process == os.getpid() else _is_running(process)
            if not in_use:
                with suppress(OSError, IndexLockedError):
                    check_not_in_use(part)
                    _remove_part(part)


def _is_running(process: int) -> bool:
    """Whether a process of this machine has this number: the one that is meant, or a later one."""
    if sys.platform == "win32":  # where asking would interrupt it
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _remove_part(part: Path) -> None:
    part.unlink(missing_ok=True)
    remove_log(part)
    # where DuckDB puts what memory has no room for
    shutil.rmtree(part.with_name(part.name + ".tmp"), ignore_errors=True)
