"""What ``semid bench`` does: read the data, run the subjects or the referee, write results, plots and a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from semid_index.bench.data import Data, true_neighbours
from semid_index.bench.harness import LIMITS, Bench, thread_counts
from semid_index.bench.machine import machine, versions
from semid_index.bench.page import RULINGS, body, growth_plot, read_folder
from semid_index.bench.plots import draw_all, draw_bytes
from semid_index.bench.referee import KINDS, Judged, Rulings, judge
from semid_index.bench.results import Mode, Results
from semid_index.bench.subject import Effort, Subject
from semid_index.errors import InvalidArgumentError, UnknownNameError
from semid_index.plugins import installed

Say = Callable[[str], None]


def chosen_subjects(names: str | None) -> dict[str, type[Subject]]:
    """The subjects of a text such as ``semid-int8,hnswlib``, in its order; ``faiss`` stands for all of the family."""
    known = installed().named("subject")
    if names is None:
        return dict(known)
    chosen: dict[str, type[Subject]] = {}
    for name in (part.strip() for part in names.split(",")):
        family = {one: kind for one, kind in known.items() if one == name or one.startswith(f"{name}-")}
        if not family:
            raise UnknownNameError("subject", name, known)
        chosen |= family
    return chosen


def run_subjects(
    data: Data,
    folder: Path,
    *,
    subjects: str | None = None,
    k: int = 10,
    threads: str = "1",
    effort: Effort = "quick",
    rounds: int | None = None,
    fresh: bool = False,
    keep: bool = False,
    builds: Path | None = None,
    ways: Mapping[str, int] | None = None,
    until: float = math.inf,
    modes: Sequence[Mode] = ("batch", "single"),
    say: Say,
) -> Results:
    """Race subjects over some data; results go to ``<folder>/<data>.json``.

    ``builds``: a folder of builds that other runs use too; ``ways``: how many builds of a subject, where not as many as
    the effort says; ``until``: the value of ``time.monotonic()`` after which nothing new is begun; ``modes``: the
    races, if any; without, subjects are only built, opened and searched once in each way.
    """
    if not 1 <= k <= min(100, len(data.base)):
        raise InvalidArgumentError(f"k must be 1 to 100, and at most the number of rows, not {k}.")
    limits = LIMITS[effort]
    if rounds is not None:
        if rounds < 1:
            raise InvalidArgumentError(f"rounds must be at least 1, not {rounds}.")
        limits = limits.of(rounds=rounds)
    bench = Bench(
        data,
        chosen_subjects(subjects),
        folder,
        k=k,
        threads=thread_counts(threads),
        limits=limits,
        modes=modes,
        fresh=fresh,
        ways=ways or {},
        builds=builds,
        until=until,
        say=say,
    )
    results = bench.run()
    if not keep:
        bench.clean()
    return results


def run_referee(
    data: Data, folder: Path, budgets: Sequence[int], *, kinds: str | None, fresh: bool, say: Say
) -> Rulings:
    """Judge codes at equal bytes; results go to ``<folder>/<data>.bytes.json``."""
    wanted = KINDS if kinds is None else tuple(part.strip() for part in kinds.split(","))
    if unknown := [kind for kind in wanted if kind not in KINDS]:
        raise UnknownNameError("kind of code", unknown[0], KINDS, hint="These can be judged.")
    work = folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    path = folder / f"{data.name}{RULINGS}"
    before = Rulings.load(path) if path.exists() and not fresh else None
    if before is not None and before.data["fingerprint"] != data.fingerprint:
        raise InvalidArgumentError(f"{path} is about other data. Choose another folder, or begin anew with --fresh.")
    _, truth = true_neighbours(data, work)
    say(f"{data.name}: codes alone, in {', '.join(map(str, budgets))} bytes")
    rulings = Rulings(data.description, machine(), versions(["faiss-cpu"]), [], {})

    def keep(judged: list[Judged], left_out: dict[str, str]) -> None:
        rulings.judged, rulings.left_out = judged, left_out
        rulings.save(path)

    done = before.judged if before is not None else ()
    keep(*judge(data, truth, budgets, kinds=wanted, done=done, keep=keep, say=say))
    return rulings


def write_pages(folder: Path) -> list[Path]:
    """Plots of everything that a folder has results of, and a page ``README.md`` that shows them."""
    results, rulings = read_folder(folder)
    drawn = draw_everything(results, rulings, folder)
    page = folder / "README.md"
    page.write_text(f"# Benchmark\n\n{body(folder, '.')}", encoding="utf-8")
    return [page, *drawn]


def draw_everything(results: Iterable[Results], rulings: Iterable[Rulings], folder: Path) -> list[Path]:
    """All plots."""
    everything = list(results)
    drawn = [
        path for one in everything if not one.data["name"].startswith("generated-") for path in draw_all(one, folder)
    ]
    drawn += [path for one in rulings if (path := draw_bytes(one, folder / f"{one.data['name']}-bytes.png"))]
    grown = growth_plot(everything, folder / "growth.png")
    return [*drawn, *([grown] if grown else [])]


def parse_budgets(text: str) -> list[int]:
    """Numbers of bytes from a text such as ``4,8,16``."""
    parts = [part.strip() for part in text.split(",")]
    if wrong := [part for part in parts if not part.isdecimal() or not int(part)]:
        raise InvalidArgumentError(f"--bytes takes whole numbers such as 4,8,16, not '{wrong[0]}'.")
    return sorted({int(part) for part in parts})


def ruling_rows(rulings: Rulings) -> Iterable[dict[str, Any]]:
    """What the referee found, as plain records."""
    for row in rulings.judged:
        yield {
            "bytes": row.bytes,
            "items": row.items,
            "code": row.shape["kind"],
            "options": " ".join(f"{name}={value}" for name, value in row.shape["options"].items()),
            "total": row.total,
            **{f"recall@{k}": round(value, 4) for k, value in row.recall.items()},
            "error": round(row.error, 4),
        }
