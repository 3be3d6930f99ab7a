"""A folder of built indexes, so that what takes minutes to build is built once, and not in every run.

    FOLDER/<data>-<fingerprint>/<subject>-<key>/        the files of the subject
    FOLDER/<data>-<fingerprint>/<subject>-<key>.json    how long it took, how busy the machine was, with what versions

The key is a hash of the parameters and of the versions that a result would name; the fingerprint is one of the data. So
another version, other parameters or other data never meet a build that is not theirs. Of this library itself only the
number of its version counts: who changes its code removes its builds.

An index without its .json was not finished, and is built again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from semid_index.bench.machine import versions
from semid_index.bench.results import Built
from semid_index.bench.subject import Parameters


@dataclass(frozen=True)
class Builds:
    """The builds of one set of data. ``folder`` belongs to it alone."""

    folder: Path

    @classmethod
    def of_data(cls, folder: Path, name: str, fingerprint: str) -> Builds:
        """Those of a set in a folder for many."""
        return cls(folder.resolve() / f"{name}-{fingerprint}")

    def index(self, subject: str, parameters: Parameters, requires: Iterable[str]) -> Path:
        """Where the files of a subject are, or would be."""
        said = json.dumps([dict(parameters), versions(requires)], sort_keys=True)
        return self.folder / f"{subject}-{hashlib.blake2b(said.encode(), digest_size=6).hexdigest()}"

    @staticmethod
    def find(index: Path) -> Built | None:
        """How an index was built, if it was finished."""
        note = _note(index)
        if not note.exists() or not index.is_dir():
            return None
        said: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
        return Built(**{**said["built"], "earlier": True})

    def keep(self, index: Path, built: Built, requires: Iterable[str]) -> None:
        """An index is finished."""
        said = {"built": asdict(built), "versions": versions(requires), "data": self.folder.name}
        part = index.with_suffix(".part")
        part.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
        part.replace(_note(index))

    @staticmethod
    def drop(index: Path) -> None:
        """Remove one."""
        _note(index).unlink(missing_ok=True)
        shutil.rmtree(index, ignore_errors=True)


def _note(index: Path) -> Path:
    return index.with_suffix(".json")
