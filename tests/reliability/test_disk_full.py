"""A disk without room: a typed error, the index as it was, and everything works again once there is room.

The short form limits the size of files (RLIMIT_FSIZE) to many different numbers of bytes, so that a write fails early,
late, in the log, in the file itself or in a copy. The long form also fills a small disk in memory, if it may mount one.
"""

from __future__ import annotations

import gzip
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("resource", reason="only Unix limits the size of files")
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "v1" / "plain.duckdb.gz"
STEPS = ["train", "append", "upsert", "delete", "delete_where", "compact", "retrain", "save_copy", "export", "open"]
LIMITS = [0, 3_000, 40_000, 300_000, 1_200_000, "size", "size + 300000"]
ROOM = [0, 4_096, 65_536, 262_144, 600_000, 1_200_000]  # bytes left on the small disk


@pytest.fixture(scope="module")
def starts(zygote, tmp_path_factory) -> dict[str, Path]:
    """The file that each step starts from, untouched."""
    folder = tmp_path_factory.mktemp("starts")
    files = {name: folder / f"{name}.duckdb" for name in ("untrained", "filled", "golden")}
    assert zygote.run("live", path=files["untrained"], steps=["create", "close"]).status == 0
    assert zygote.run("live", path=files["filled"], steps=["create", "train", "add", "close"]).status == 0
    files["golden"].write_bytes(gzip.decompress(GOLDEN.read_bytes()))
    return files


def start_of(step: str, starts: dict[str, Path]) -> Path:
    return starts[{"train": "untrained", "open": "golden"}.get(step, "filled")]


def check(zygote: Any, starts: dict[str, Path], step: str, path: Path, **how: Any) -> str:
    """Do the step without room; what came of it."""
    before = zygote.run("look_at_copy", path=start_of(step, starts)).one("content")
    outcome = zygote.run("without_room", path=path, step=step, **how)
    assert outcome.status == 0, (how, outcome.explain())
    said = {word: outcome.of(word) for word in ("outcome", "content", "again")}
    [[first]] = said["outcome"]
    assert first == "done" or first.startswith("StorageError"), (how, first)
    assert said["again"] == [["done"]], (how, first, said["again"])
    if first != "done" and step != "open":
        [[content]] = said["content"]
        differs = {part: (before.get(part), content.get(part)) for part in {*before, *content}}
        assert content == before, (how, first, {part: both for part, both in differs.items() if both[0] != both[1]})
    look = zygote.run("look", path=path)
    assert look.one("content")["problems"] == ""
    if step in ("save_copy", "export"):
        assert look.one("content") == before
    left = sorted(each.name for each in path.parent.iterdir())
    assert set(left) <= {path.name, "copy.duckdb", "ids.parquet", "filler"}, left
    return str(first)


@pytest.mark.parametrize("step", STEPS)
def test_files_that_may_not_grow(zygote, starts, step, tmp_path, long):
    if step not in zygote.run("has_steps").one("steps"):
        pytest.skip("an index cannot do this yet")
    start, outcomes = start_of(step, starts), []
    for number, limit in enumerate(LIMITS if long else LIMITS[::3]):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = Path(shutil.copy(start, folder / "index.duckdb"))
        size = path.stat().st_size
        most = {"size": size, "size + 300000": size + 300_000}.get(limit, limit)
        outcomes.append(check(zygote, starts, step, path, most=most))
    print(f"\n{step}: " + " | ".join(outcome[:60] for outcome in outcomes))
    assert outcomes[0] != "done"


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A folder on a disk of 16 MB, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("this user cannot mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("step", STEPS)
def test_a_disk_that_is_full(zygote, starts, step, long, request):
    if not long:
        pytest.skip("only in the long form: make test-long")
    if step not in zygote.run("has_steps").one("steps"):
        pytest.skip("an index cannot do this yet")
    disk = request.getfixturevalue("small_disk")
    outcomes = []
    for room in ROOM:
        for old in disk.iterdir():
            old.unlink()
        path = Path(shutil.copy(start_of(step, starts), disk / "index.duckdb"))
        filler = disk / "filler"
        filler.write_bytes(bytes(shutil.disk_usage(disk).free - room))
        outcomes.append(check(zygote, starts, step, path, filler=filler))
    print(f"\n{step}: " + " | ".join(outcome[:60] for outcome in outcomes))
    assert outcomes[0] != "done"


def test_a_file_that_is_deleted_while_it_is_open(zygote, starts, tmp_path):
    """Who has it open goes on; it is gone afterwards, and opening it says so."""
    path = Path(shutil.copy(starts["filled"], tmp_path / "index.duckdb"))
    outcome = zygote.run("delete_while_open", path=path)
    assert outcome.status == 0, outcome.explain()
    assert outcome.of("searched") == [[5]]
    assert outcome.of("reopened")[0][0].startswith("IndexNotFoundError")
