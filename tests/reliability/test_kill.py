"""A process that is killed at any moment leaves all that it had finished, and nothing by halves.

A child does one step after the other, and says of each that it is done. It is killed between two of its SQL statements
(or changes to files), or at some moment, which may be inside DuckDB. Then the file must hold what it held
after the last step that was done, or after the one that was not; both are known from a run that no one disturbed. What
"holds" means is in ``jobs.content``: every row of every table, the view, the macros, and what searches find.

This is the kill of a process. A power cut is another thing: see docs/reliability.md.
"""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "v1" / "plain.duckdb.gz"
SCENARIOS: dict[str, list[str]] = {
    "new": ["create", "train", "add", "close"],
    "change": ["open", "append", "upsert", "delete", "append_more", "delete_where", "close", "open", "upsert", "close"],
    "compact": ["open", "delete", "compact", "append", "compact", "close"],
    "retrain": ["open", "retrain", "append", "close"],
    "migrate": ["open", "close"],
    "many": ["open", "append_many", "close"],
}
QUICK = {"new": 10, "change": 14, "compact": 8, "retrain": 8, "migrate": 6}  # kills of each in `make test`
LONG_MOMENTS = 40  # kills at random moments of each in the long form, beside those at every statement


@dataclass
class Course:
    """What a scenario goes through when no one disturbs it."""

    steps: list[str]
    start: Path | None
    """The file that it starts from."""
    contents: list[dict[str, str] | None]
    """Before the first step, and after each."""
    statements: int
    seconds: float


@pytest.fixture(scope="module")
def begun(zygote, tmp_path_factory) -> Path:
    """An index with items, to start from."""
    path = tmp_path_factory.mktemp("begun") / "index.duckdb"
    outcome = zygote.run("live", path=path, steps=["create", "train", "add", "close"])
    assert outcome.status == 0, outcome.explain()
    return path


@pytest.fixture(scope="module")
def course(zygote, begun, tmp_path_factory) -> Callable[[str], Course]:
    """Goes through a scenario once, undisturbed."""
    known: dict[str, Course] = {}
    offered = zygote.run("has_steps").one("steps")

    def go(name: str) -> Course:
        if name in known:
            return known[name]
        folder = tmp_path_factory.mktemp(name)
        start = None if name == "new" else begun
        if name == "migrate":
            start = folder / "golden.duckdb"
            start.write_bytes(gzip.decompress(GOLDEN.read_bytes()))
        steps = [step for step in SCENARIOS[name] if step in offered]
        if start is not None:
            shutil.copy(start, folder / "looked.duckdb")
            shutil.copy(start, folder / "timed.duckdb")
        looked = zygote.run("live_and_look", path=folder / "looked.duckdb", steps=steps, limit=600)
        assert looked.status == 0, looked.explain()
        timed = zygote.run("live", path=folder / "timed.duckdb", steps=steps, limit=600)
        contents = [content for [content] in looked.of("content")]
        assert [content["problems"] for content in contents if content] == [""] * (len(contents) - contents.count(None))
        known[name] = Course(steps, start, contents, timed.one("statements"), timed.seconds)
        return known[name]

    return go


def kills_of(course: Course, count: int | None, random: np.random.Generator) -> list[dict[str, Any]]:
    """How to kill: at so many moments, every other one at a statement; or, without a number, at every statement."""
    points = [{"at": at} for at in range(course.statements)]
    if count is not None:
        chosen = np.sort(random.choice(len(points), min(len(points), count - count // 2), replace=False))
        points = [points[i] for i in chosen]
    moments = random.uniform(0, course.seconds, LONG_MOMENTS if count is None else count // 2)
    return [*points, *({"kill_after": float(moment)} for moment in moments)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_killed_process_leaves_what_it_had_finished(zygote, course, name, long, tmp_path):
    if not long and name not in QUICK:
        pytest.skip("only in the long form: make test-long")
    undisturbed = course(name)
    if len(undisturbed.steps) < 2:
        pytest.skip("an index cannot do this yet")
    random = np.random.default_rng(sum(map(ord, name)))
    kills = kills_of(undisturbed, None if long else QUICK[name], random)
    path = tmp_path / "index.duckdb"
    hit = 0
    for number, kill in enumerate(kills):
        for old in tmp_path.iterdir():  # among them a folder in which DuckDB had put what its memory had no room for
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        if undisturbed.start is not None:
            shutil.copy(undisturbed.start, path)
        outcome = zygote.run("live", path=path, steps=undisturbed.steps, **kill)
        assert outcome.status == -9 or (outcome.status == 0 and "kill_after" in kill), (kill, outcome.explain())
        hit += outcome.status == -9
        done = len(outcome.of("done"))
        look = zygote.run("read_all", path=path, read_only=False)
        assert look.status == 0, (kill, done, look.explain())
        allowed = undisturbed.contents[done : done + 2]
        if look.of("refused"):
            assert allowed[0] is None, f"{kill}: after {done} steps the file is refused: {look.of('refused')}"
            assert look.of("refused")[0][0] in ("IndexNotFoundError", "NotAnIndexError"), look.of("refused")
            assert zygote.run("start_anew", path=path).status == 0
            continue
        found = look.one("content")
        assert found in allowed, explain(undisturbed, kill, done, found)
        if number % 5 == 0:
            assert zygote.run("use", path=path).status == 0, "it cannot be used any more"
    print(f"\n{name}: {hit} processes killed, at {undisturbed.statements} statements and other moments")


def explain(course: Course, kill: dict[str, Any], done: int, found: dict[str, str]) -> str:
    """What differs, in words."""
    lines = [f"{kill}: {done} steps were done, next was {course.steps[done : done + 1]}. Problems: {found['problems']}"]
    for step, content in zip([*course.steps[done - 1 :], "the end"], course.contents[done : done + 2], strict=False):
        if content is not None:
            differs = {part: (content.get(part), found.get(part)) for part in {*content, *found}}
            lines.append(f"after {step}: { ({part: both for part, both in differs.items() if both[0] != both[1]}) }")
    return "\n".join(lines)
