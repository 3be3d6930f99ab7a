"""All figures of docs/benchmarks.md, by one command; what is done already is not done again.

    python -m benchmarks.published --data FOLDER --hour --prepare    # builds the peers, as long as it takes
    python -m benchmarks.published --data FOLDER --hour --minutes 55 # the figures, in half an hour of a quiet machine
    python -m benchmarks.published --data FOLDER                     # everything: expect 15 hours on 2 quiet cores

``FOLDER`` (or the environment variable SEMID_DATA) has the sets of benchmarks/datasets.py. Results go, as they come,
into ``--output`` (benchmarks/results/tmp), where a run that was stopped goes on, and built indexes into ``--builds``,
which other runs may use too. At the end, and when ``--minutes`` are over, the compact results, the plots of
docs/benchmarks and the page are written; ``--page`` only writes these again. ``--only`` names some of the steps, and
``--list`` lists them, in order, the most important first, with the minutes that each was reckoned to take.

``--hour`` races what would be chosen with some thought: of this index the tiers float16 and int8, of peers the builds
that did best in earlier runs. With ``--prepare`` the peers are built and searched once in every way, for which the
machine need not be quiet: what is found does not depend on it, and which ways race is decided by processor time. How
long those builds took is published with how busy the machine was.

It takes up to 40 GB of disk. Nothing else should run meanwhile: the page tells how much of the time other programs had
the processor.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks import datasets
from semid_index.bench.command import draw_everything, run_referee, run_subjects
from semid_index.bench.data import Data, generated, held_out, load_data, make_data, true_neighbours
from semid_index.bench.page import RULINGS, read_folder
from semid_index.bench.referee import KINDS, Rulings
from semid_index.bench.results import Results
from semid_index.bench.subject import Effort

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLOTS = ROOT / "docs" / "benchmarks"
SCRIPTS = "scripts"
"""The folder, beside results, with what the other benchmark scripts found."""
SETS = ("beauty", "mnist784", "debian", "sift128")
JUDGED = ("debian", "sift128")
BYTES = (4, 8, 16, 32, 64)
GROWN_DIM = 96
GROWN = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
GROWN_QUICK = (10_000, 30_000, 100_000)
LARGE_SUBJECTS = "semid-float32,semid-int8,faiss-ivf-pq,hnswlib,scann"
"""What is quick enough on a million rows."""
GROWN_SUBJECTS = "semid-float32,semid-int8,faiss-flat,faiss-ivf-pq,hnswlib"
GROWN_LARGE = 1_000_000  # above, a graph takes too long to build, and float32 rows too much memory
GROWN_LARGE_SUBJECTS = "semid-int8,faiss-ivf-pq"

HOUR_OURS = "semid-float16,semid-int8"
HOUR_FAST = f"{HOUR_OURS},faiss-ivf-pq"
HOUR_QUERIES = 2_000
HOUR_ROUNDS = 5
HOUR_WAYS = {"faiss-ivf-pq": 6, "scann": 2}  # of others one
HOUR_WAYS_SMALL = {"faiss-ivf-pq": 5, "scann": 1}  # a rotation of many dimensions takes minutes to learn
HOUR_PEERS = {
    "sift128": "hnswlib,scann",
    "debian": "hnswlib,scann,faiss,usearch",
    "mnist784": "hnswlib,scann,faiss,usearch",
}
HOUR_BYTES = (4, 8, 16)
HOUR_GROWN = (100_000, 1_000_000, 3_000_000, 300_000, 10_000_000, 30_000, 10_000)
"""If time runs out, sizes far apart say more than what is between them."""
HOUR_GROWN_WAYS = {"faiss-ivf-pq": 2}
HOUR_GROWN_BOTH = 3_000_000  # above, FAISS would take minutes to build
HOUR_GROWN_QUERIES = 1_000


@dataclass(frozen=True)
class Step:
    """Something to be done."""

    name: str
    work: Callable[[float], object]
    """Gets the value of ``time.monotonic()`` after which it begins nothing new."""
    minutes: float = 0.0
    """That it was reckoned to take on 2 quiet cores."""
    whole: bool = False
    """It cannot stop half-way, and is left out if there is no time for all of it."""


@dataclass(frozen=True)
class Plan:
    """Where things are, and how much is wanted."""

    folder: Path
    output: Path
    builds: Path | None = None
    rows: int | None = field(default=None)
    """Only so many rows of each set, to see whether everything runs."""

    def named(self, name: str, queries: int | None = None) -> Data:
        """One of the real sets, as the harness wants it."""
        if name == "beauty":
            data = held_out("beauty", "cosine", datasets.beauty(self.folder)[0], datasets.HELD_OUT)
        else:
            found = datasets.load(name, self.folder)
            data = make_data(name, found.metric, found.base, found.queries)
        rows = self.rows or len(data.base)
        queries = min(queries or len(data.queries), rows // 10)
        return data.first(rows, queries) if (rows, queries) != (len(data.base), len(data.queries)) else data

    def grown(self, rows: int) -> Data:
        """Generated vectors, in a file."""
        place = self.output / "work"
        place.mkdir(parents=True, exist_ok=True)
        made = generated(min(rows, self.rows or rows), GROWN_DIM, folder=place)
        return Data(made.name, made.metric, made.base, made.queries[:HOUR_GROWN_QUERIES], made.file)

    # -- the long form ------------------------------------------------------------------------------------------------

    def steps(self, *, quick: bool) -> list[Step]:
        """Everything that is to be done."""

        def search(load: Callable[[], Data], subjects: str | None, threads: str, effort: Effort) -> Callable:
            options = {"subjects": subjects, "threads": threads, "effort": effort, "builds": self.builds, "say": say}
            return lambda until: run_subjects(load(), self.output, until=until, **options)

        planned = []
        for name in SETS:
            subjects = LARGE_SUBJECTS if quick and name == "sift128" else None
            how: tuple[str, Effort] = ("1", "quick") if quick else ("1,all", "full")
            planned.append(Step(name, search(partial(self.named, name), subjects, *how)))
        for name in JUDGED[:1] if quick else JUDGED:
            planned.append(self.referee(name, BYTES[:3] if quick else BYTES))
        for rows in GROWN_QUICK if quick else GROWN:
            subjects = GROWN_SUBJECTS if rows <= GROWN_LARGE else GROWN_LARGE_SUBJECTS
            source = f"generated-{rows}x{GROWN_DIM}"
            planned.append(Step(source, search(partial(load_data, source, metric="l2"), subjects, "1", "quick")))
        return planned

    def referee(self, name: str, budgets: tuple[int, ...], kinds: tuple[str, ...] = KINDS) -> Step:
        """Codes alone, at equal bytes."""

        def work(_until: float) -> None:
            data = self.named(name, HOUR_QUERIES)
            run_referee(data, self.output, budgets, kinds=",".join(kinds), fresh=False, say=say)

        return Step(f"bytes-{name}", work)

    # -- an hour ------------------------------------------------------------------------------------------------------

    def hour(self) -> list[Step]:
        """What an hour of a quiet machine is for, the most important first."""
        races = [Step(name, self._race(name), m) for name, m in _MINUTES["races"].items()]
        scripts = [self._script(name, m) for name, m in _MINUTES["scripts"].items()]
        grown = [Step(f"growth-{n}", partial(self._grow, n), m, whole=m > 2) for n, m in _GROWN_MINUTES.items()]
        return [*races, *scripts, *grown]

    def preparations(self) -> list[Step]:
        """What the hour need not do: peers built and searched in each way, vectors generated, codes judged alone."""
        peers = [Step(f"{name}-peers", self._race(name, race=False)) for name in HOUR_PEERS]
        grown = [Step(f"growth-{rows}", partial(self._grow_ready, rows)) for rows in HOUR_GROWN]
        quickly = tuple(kind for kind in KINDS if kind not in ("lsq", "balanced-rq"))
        judged = [self.referee("debian", HOUR_BYTES), self.referee("sift128", HOUR_BYTES, quickly)]
        return [*peers, *grown, *judged]

    def _race(self, name: str, *, race: bool = True) -> Callable[[float], None]:
        """All with one thread, then batches with all threads, of the fast ones that raced with one."""

        def work(until: float) -> None:
            data = self.named(name, HOUR_QUERIES)
            ways = HOUR_WAYS if name == "sift128" else HOUR_WAYS_SMALL
            options = self._hourly(ways, until)
            if not race:
                run_subjects(data, self.output, subjects=f"faiss-ivf-pq,{HOUR_PEERS[name]}", modes=(), **options)
                return
            run_subjects(data, self.output, subjects=f"{HOUR_FAST},{HOUR_PEERS[name]}", **options)
            run_subjects(data, self.output, subjects=HOUR_FAST, threads="all", modes=("batch",), **options)

        return work

    def _grow(self, rows: int, until: float) -> None:
        subjects = "semid-int8,faiss-ivf-pq" if rows <= HOUR_GROWN_BOTH else "semid-int8"
        options = {"subjects": subjects, "modes": ("batch",), **self._hourly(HOUR_GROWN_WAYS, until)}
        run_subjects(self.grown(rows), self.output, **options)

    def _grow_ready(self, rows: int, _until: float) -> None:
        data = self.grown(rows)
        true_neighbours(data, self.output / "work")

    def _hourly(self, ways: dict[str, int], until: float) -> dict:
        known = {"builds": self.builds, "ways": ways, "until": until, "say": say}
        return {**known, "effort": "hour", "rounds": HOUR_ROUNDS, "keep": True}

    def _script_options(self, name: str) -> list[str]:
        real, tiny = _OPTIONS[name]
        if self.rows:
            return tiny
        kept = ["--folder", str(self.builds / name)] if name == "tiers" and self.builds else []
        return ["--data", str(self.folder), *real, *kept]

    def _script(self, name: str, minutes: float) -> Step:
        """One of the other benchmark scripts, which writes JSON."""

        def work(until: float) -> None:
            path = self.output / SCRIPTS / f"{name}.json"
            if path.exists():
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(part), *self._script_options(name)]
            left = None if until == float("inf") else max(1.0, until - time.monotonic())
            try:
                subprocess.run(command, cwd=ROOT, check=True, timeout=left)
                part.replace(path)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired, FileNotFoundError) as error:
                say(f"  {name} FAILED: {error}")

        return Step(name, work, minutes, whole=True)


# What a script is called with: for figures, and to see whether it runs.
_OPTIONS = {
    "latency": (["--set", "debian", "--rounds", "5"], ["--tiny", "--rounds", "1"]),
    "opening": (["--shape", "fast", "--tiers", "float16", "--rounds", "2"], ["--tiny", "--rounds", "1"]),
    "tiers": ([], ["--set", "sample", "--rows", "2000", "--queries", "50", "--codebook-size", "16"]),
}
_MINUTES = {
    "races": {"sift128": 3.0, "debian": 4.5, "mnist784": 3.5},
    "scripts": {"latency": 1.0, "opening": 4.0, "tiers": 6.0},
}
_GROWN_MINUTES = dict(zip(HOUR_GROWN, (0.5, 2.5, 5.0, 1.0, 3.0, 0.5, 0.5), strict=True))


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def run(planned: list[Step], until: float) -> None:
    """One after the other; what there is no time for is left out, and said."""
    for step in planned:
        left = until - time.monotonic()
        if left < 60 * (step.minutes if step.whole else min(1.0, step.minutes / 2)):
            say(f"{step.name} is left out: {left / 60:.1f} minutes are left")
            continue
        started = time.monotonic()
        step.work(until)
        say(f"{step.name} took {(time.monotonic() - started) / 60:.1f} minutes, reckoned: {step.minutes:g}")


def publish(output: Path) -> None:
    """Compact results, plots and the page."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    PLOTS.mkdir(parents=True, exist_ok=True)
    results, rulings = read_folder(output)
    for one in results:
        raced = [point for race in one.races for point in race.contestants]
        if raced:
            one.compact(raced).save(RESULTS / f"{one.data['name']}.json")
    for one in rulings:
        one.save(RESULTS / f"{one.data['name']}{RULINGS}")
    for path in sorted((output / SCRIPTS).glob("*.json")):
        (RESULTS / SCRIPTS).mkdir(exist_ok=True)
        shutil.copyfile(path, RESULTS / SCRIPTS / path.name)
    published: tuple[list[Results], list[Rulings]] = read_folder(RESULTS)
    for path in draw_everything(*published, PLOTS):
        say(f"drew {path.name}")
    say("now: python docs/generate.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=datasets.DEFAULT_FOLDER, help="the folder with the real sets")
    parser.add_argument("--output", type=Path, default=RESULTS / "tmp", help="where the run is kept")
    parser.add_argument("--builds", type=Path, help="where built indexes are kept (OUTPUT/builds)")
    parser.add_argument("--quick", action="store_true", help="fewer builds, rounds and sizes")
    parser.add_argument("--hour", action="store_true", help="what an hour is enough for")
    parser.add_argument("--prepare", action="store_true", help="with --hour: build the peers, and race nothing")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin nothing new after so long")
    parser.add_argument("--rows", type=int, help="only so many rows of each set, to see whether everything runs")
    parser.add_argument("--only", nargs="*", help="only these steps, such as debian bytes-debian")
    parser.add_argument("--list", action="store_true", help="run nothing: list the steps")
    parser.add_argument("--page", action="store_true", help="run nothing: only write the page of what there is")
    arguments = parser.parse_args()
    until = time.monotonic() + 60 * arguments.minutes
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    plan = Plan(arguments.data, output, arguments.builds or output / "builds", arguments.rows)
    planned = plan.steps(quick=arguments.quick)
    if arguments.hour:
        planned = plan.preparations() if arguments.prepare else plan.hour()
    if unknown := [name for name in arguments.only or () if name not in [step.name for step in planned]]:
        parser.error(f"there is no step '{unknown[0]}'; there are {', '.join(step.name for step in planned)}")
    planned = [step for step in planned if not arguments.only or step.name in arguments.only]
    if arguments.list:
        for step in planned:
            print(f"{step.name:20} {step.minutes:5.1f} minutes")
        return
    if not arguments.page:
        run(planned, until)
    if arguments.rows is None and not arguments.prepare:
        publish(output)


if __name__ == "__main__":
    main()
