"""Builds, opens, searches and races subjects, and writes down what it sees.

What makes the figures believable:

- Distances are computed here, from the ids. What a subject says of them is not asked for.
- An id given twice, or one that does not exist, ends the subject's run. Missing hits count as missed.
- Only the search is timed.
- First, each subject's whole grid is searched once. What comes near its front of recall and speed then races: every
  contestant once a round, in an order drawn anew for each round, so that a noisy machine hits all alike.
- Each subject has a process of its own, and only one of them works at a time.
- Everything is written to the results file as it comes, and what is there is not done again.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from semid_index.bench.builds import Builds
from semid_index.bench.data import Data, true_neighbours, write_for_workers
from semid_index.bench.machine import available_bytes, machine, versions
from semid_index.bench.measures import Truth, checked_ids, distances_of, front, near_front, recall
from semid_index.bench.results import Built, Mode, Opened, Point, Race, Results, key_of
from semid_index.bench.subject import Build, Effort, Parameters, Subject
from semid_index.bench.workers import SubjectError, Worker, WorkerProcess
from semid_index.devices import cores
from semid_index.errors import InvalidArgumentError, SemidError

TARGETS = (0.9, 0.95, 0.98, 0.99)
"""Recalls at which subjects are compared."""

_SLACK = 1.15  # what is at most so much slower than a subject's best is raced with it
_WORTH_RACING = 0.6  # the least recall
_PATIENCE = 12  # ways to search in a row that find no more than others before them, after which no more are tried
_TRIAL = 10  # queries to see how fast a subject is
_LEAST_QUERIES = 50
_SINGLES = 300
_STEP = 0.05  # of an effort, the least difference that is tried
_MOST_SECONDS = 7_200.0  # that a worker may take for one request
_GRACE = 60.0  # seconds that it may take after the time is up

Start = Callable[[str, Parameters, Path, int], Worker]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Limits:
    """How much is tried."""

    builds: int
    rounds: int
    contestants: int
    """Of one subject, in a race of batches."""
    turn_seconds: float
    """A slow subject gets fewer queries, so that its turn takes about so long."""
    enough: float = 0.9995
    """The recall after which more effort is not tried."""
    narrowed: int = 0
    """How often the step between two ways of the grid is halved, for each recall that subjects are compared at."""
    thinned: bool = False
    """Only the first and the last way to search each build."""

    def of(self, *, rounds: int) -> Limits:
        """The same with another number of rounds."""
        return replace(self, rounds=rounds)


LIMITS: Mapping[Effort, Limits] = {
    "tiny": Limits(builds=1, rounds=1, contestants=2, turn_seconds=0.2, thinned=True),
    "quick": Limits(builds=2, rounds=3, contestants=6, turn_seconds=0.5),
    "hour": Limits(builds=1, rounds=5, contestants=10, turn_seconds=1.0, enough=0.996, narrowed=2),
    "full": Limits(builds=99, rounds=7, contestants=12, turn_seconds=1.0, narrowed=2),
}


@dataclass
class Bench:
    """One run over one set of data. ``folder`` gets ``<data>.json``, and ``work`` what is needed meanwhile."""

    data: Data
    subjects: Mapping[str, type[Subject]]
    folder: Path
    k: int = 10
    threads: Sequence[int] = (1,)
    limits: Limits = LIMITS["full"]
    modes: Sequence[Mode] = ("batch", "single")
    fresh: bool = False
    ways: Mapping[str, int] = field(default_factory=dict)
    """How many builds of a subject are tried, where it is not what the limits say."""
    builds: Path | None = None
    """A folder of builds, which outlives the run; see :mod:`semid_index.bench.builds`."""
    until: float = math.inf
    """The value of ``time.monotonic()`` after which nothing new is begun."""
    say: Say = lambda _text: None
    start: Start | None = None
    """Starts the worker of a subject; a process, unless a test says otherwise."""
    results: Results = field(init=False)

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()  # ScaNN loses files whose path is relative
        self.path = self.folder / f"{self.data.name}.json"
        self._work = self.folder / "work" / f"{self.data.name}-{self.data.fingerprint}"
        where = self.folder / "work" if self.builds is None else self.builds
        self._indexes = Builds.of_data(where, self.data.name, self.data.fingerprint)
        described = self.data.description
        if self.path.exists() and not self.fresh:
            self.results = Results.load(self.path)
            self.results.check_same(described, self.k, machine(), self.path)
        else:
            self.results = Results(described, self.k, machine(), {})

    def run(self) -> Results:
        """Everything, in order; what the results file has already is not done again.

        With the first number of threads, subjects are searched in all ways; with the others, in those that raced then.
        """
        self.say(f"{self.data.name}: {len(self.data.base):,} x {self.data.base.shape[1]}, {self.data.metric}")
        self.results.failed = {}
        usable = self._usable()
        self.results.versions |= versions(name for kind in usable.values() for name in kind.requires)
        builds = [(name, build) for name, kind in usable.items() for build in self._builds(kind)]
        for name, build in builds:
            self._attempt(name, build.parameters, partial(self._build, name, build.parameters))
        for threads in self.threads:
            for name, build in self._as_raced_before(builds, threads):
                if self.results.find_built(name, build.parameters):
                    self._attempt(name, build.parameters, partial(self._scan, name, build, threads))
            for mode in self.modes:
                self._race(mode, threads, list(usable))
        self._save()
        return self.results

    def clean(self) -> None:
        """Remove what was needed meanwhile: copies of the vectors, and indexes that are not in a folder of builds."""
        shutil.rmtree(self._work, ignore_errors=True)

    # -- what takes part ----------------------------------------------------------------------------------------------

    def _usable(self) -> dict[str, type[Subject]]:
        usable, shape = {}, self.data.shape
        for name, kind in self.subjects.items():
            try:
                reason = kind.unavailable() or kind.supports(shape)
            except Exception as error:  # a subject may fail in any way, and the others go on
                self._failed(name, f"{type(error).__name__}: {error}")
                continue
            if reason is None:
                usable[name] = kind
                self.results.skipped.pop(name, None)
            else:
                self.results.skipped[name] = reason
                self.say(f"  {name} is left out: {reason}")
        return usable

    def _builds(self, kind: type[Subject]) -> list[Build]:
        builds = kind.grid(self.data.shape)[: self.ways.get(kind.name, self.limits.builds)]
        if not self.limits.thinned:
            return builds
        ends = [(build, [build.searches[0], build.searches[-1]]) for build in builds]
        return [Build(build.parameters, both if both[0] != both[1] else both[:1]) for build, both in ends]

    def _as_raced_before(self, builds: list[tuple[str, Build]], threads: int) -> list[tuple[str, Build]]:
        """With more threads than in an earlier race, only what took part in it: what is found is the same."""
        races = (race for race in self.results.races if race.mode == "batch" and race.threads < threads)
        before = next(races, None)
        if before is None:
            return builds
        kept = []
        for name, build in builds:
            mine = name, key_of(build.parameters)
            searches = [point.search for point in before.contestants if point.key[:2] == mine]
            if searches:
                kept.append((name, Build(build.parameters, searches)))
        return kept

    @property
    def _late(self) -> bool:
        return time.monotonic() > self.until

    def _attempt(self, name: str, parameters: Parameters, work: Callable[[], None]) -> None:
        """Do something with a subject, if there is time; if it fails, write down how and go on with the others."""
        if self._late:
            return
        try:
            work()
        except SemidError as error:
            if self._late:
                self.say(f"  {name} was stopped: the time is up")
                return
            self._failed(f"{name} {key_of(parameters)}".strip(), str(error))

    def _failed(self, name: str, how: str) -> None:
        how = how.replace(str(self.folder), "...")  # results are published, and tell no paths
        self.results.failed[name] = how
        self.say(f"  {name} FAILED: {how}")
        self._save()

    def _save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results.save(self.path)

    # -- workers ------------------------------------------------------------------------------------------------------

    def _index_folder(self, name: str, parameters: Parameters) -> Path:
        return self._indexes.index(name, parameters, self.subjects[name].requires)

    @cached_property
    def _truth(self) -> Truth:
        self._work.mkdir(parents=True, exist_ok=True)
        return true_neighbours(self.data, self._work.parent)[1]

    def _started(self, name: str, parameters: Parameters, threads: int) -> Worker:
        self._work.mkdir(parents=True, exist_ok=True)
        write_for_workers(self.data, self._work)
        index = self._index_folder(name, parameters)
        index.parent.mkdir(parents=True, exist_ok=True)
        if self.start is not None:
            return self.start(name, parameters, index, threads)
        log = index.with_suffix(".log")
        seconds = min(_MOST_SECONDS, max(1.0, self.until - time.monotonic()) + _GRACE)
        return WorkerProcess(name, parameters, data=self._work, index=index, log=log, threads=threads, seconds=seconds)

    def _opened(self, name: str, parameters: Parameters, threads: int) -> tuple[Worker, dict[str, Any]]:
        if Builds.find(self._index_folder(name, parameters)) is None:
            self._build_files(name, parameters)  # an earlier run built it, and its files have gone
        worker = self._started(name, parameters, threads)
        try:
            return worker, worker.open(threads=threads)
        except BaseException:
            worker.close()
            raise

    def _opened_again(self, point: Point, threads: int, seconds: float) -> None:
        """The fastest opening counts: the first one may have had to read from disk, or was on a busy machine."""
        before = self.results.find_opened(point.subject, point.parameters, threads)
        if before is not None and seconds < before.seconds:
            self.results.opened[self.results.opened.index(before)] = replace(before, seconds=seconds)

    # -- steps --------------------------------------------------------------------------------------------------------

    def _build(self, name: str, parameters: Parameters) -> None:
        if self.results.find_built(name, parameters) is None:
            kept = None if self.fresh and self.builds is None else Builds.find(self._index_folder(name, parameters))
            self.results.built.append(kept or self._build_files(name, parameters))
            self._save()

    def _build_files(self, name: str, parameters: Parameters) -> Built:
        threads, index = cores(), self._index_folder(name, parameters)  # nobody builds with less than all
        Builds.drop(index)
        worker = self._started(name, parameters, threads)
        try:
            seen = worker.build(threads=threads)
        finally:
            worker.close()
        self.say(f"  built {name} {key_of(parameters)} in {seen['seconds']:.1f} s")
        built = Built(name, dict(parameters), threads, **seen)
        self._indexes.keep(index, built, self.subjects[name].requires)
        return built

    def _scan(self, name: str, build: Build, threads: int) -> None:
        """Search a build once in each way, until more effort finds no more. What was tried before is not done again."""
        known = {p.key: p for p in self.results.points_of(threads, name)}
        worker: Worker | None = None
        opening: dict[str, Any] = {}
        best, in_vain = 0.0, 0
        try:
            for search in build.searches:
                point = known.get((name, key_of(build.parameters), key_of(search)))
                if point is None:
                    if worker is None:
                        worker, opening = self._opened(name, build.parameters, threads)
                    point = self._point(worker, name, build.parameters, search, threads)
                    self.results.points.append(point)
                best, in_vain = (point.recall, 0) if point.recall > best else (best, in_vain + 1)
                if point.recall >= self.limits.enough or in_vain >= _PATIENCE or self._late:
                    break
            if worker is None:
                return
            self._narrow(worker, name, build, threads)
            if self.results.find_opened(name, build.parameters, threads) is None:
                held = worker.memory()
                seen = opening["seconds"], held["parts"], held["measured"], opening.get("once")
                self.results.opened.append(Opened(name, dict(build.parameters), threads, *seen))
        finally:
            if worker is not None:
                worker.close()
        self.say(f"  searched {name} {key_of(build.parameters)}, recall to {best:.3f}, threads {threads}")
        self._save()

    def _narrow(self, worker: Worker, name: str, build: Build, threads: int) -> None:
        """Search between the ways of the grid, where a recall that subjects are compared at is just reached."""
        for target in TARGETS:
            for _ in range(self.limits.narrowed):
                points = [p for p in self.results.points_of(threads, name) if p.parameters == build.parameters]
                search = between(points, target)
                if search is None or self._late:
                    break
                self.results.points.append(self._point(worker, name, build.parameters, search, threads))

    def _point(self, worker: Worker, name: str, parameters: Parameters, search: Parameters, threads: int) -> Point:
        everything = len(self.data.queries)
        trial = min(_TRIAL, everything)
        tried = worker.batch(search=search, queries=trial, k=self.k)
        rate = trial / max(1e-9, min(tried["seconds"], tried["worked"] / threads or math.inf))  # as if it were quiet
        count = min(everything, max(_LEAST_QUERIES, int(rate * self.limits.turn_seconds)))
        path = self._work / f"found-{name}.npy"
        taken = worker.batch(search=search, queries=count, k=self.k, ids=str(path))
        ids = checked_ids(np.load(path, allow_pickle=False), self.k, len(self.data.base))
        path.unlink()
        distances = distances_of(ids, self.data.queries[:count], self.data.base, self.data.metric)
        found = recall(distances, self._truth, self.k)
        short = int((ids < 0).sum())
        seconds, worked = taken["seconds"], taken["worked"]
        return Point(name, dict(parameters), dict(search), threads, found, count, seconds, short, worked)

    # -- races --------------------------------------------------------------------------------------------------------

    def contestants(self, mode: Mode, threads: int, names: Iterable[str]) -> list[Point]:
        """What races: of each subject the front; for single queries, what is cheapest at each target."""
        chosen = []
        for name in names:
            points = [p for p in self.results.points_of(threads, name) if p.recall >= _WORTH_RACING]
            points = points or self.results.points_of(threads, name)
            if mode == "single":
                chosen += cheapest(points, TARGETS) or points[-1:]
            else:
                chosen += worth_racing(points, self.limits.contestants)
        return chosen

    def _race(self, mode: Mode, threads: int, names: list[str]) -> None:
        points = self.contestants(mode, threads, names)
        if not points:
            return
        race = self.results.race(mode, threads)
        if race is None or [p.key for p in race.contestants] != [p.key for p in points]:
            race = Race(mode, threads, points)
        stable = Stable(self, threads)
        try:
            while len(race.rounds) < self.limits.rounds and not self._late:
                number = len(race.rounds)
                race.rounds.append(self._round(race, stable, np.random.default_rng(number)))
                self.results.put_race(race)  # with its first round, and not before, it takes the place of an older one
                self.say(f"  {mode}, threads {threads}: round {number + 1} of {self.limits.rounds}")
                self._save()
        finally:
            stable.close()

    def _round(self, race: Race, stable: Stable, random: np.random.Generator) -> list[list[float]]:
        """Every contestant once. Those of one build follow each other, the builds in an order drawn at random."""
        seconds: list[list[float]] = [[] for _ in race.contestants]
        builds: dict[tuple[str, str], list[int]] = {}
        for number, point in enumerate(race.contestants):
            builds.setdefault(point.key[:2], []).append(number)
        order = list(builds.values())
        for place in random.permutation(len(order)):
            for number in random.permutation(order[place]).tolist():
                point = race.contestants[number]
                worker = stable.worker(point)
                if race.mode == "batch":
                    taken = worker.batch(search=point.search, queries=point.queries, k=self.k)
                    seconds[number] = [taken["seconds"] / point.queries, taken["worked"] / point.queries]
                else:
                    count = min(_SINGLES, max(20, int(self.limits.turn_seconds / point.cost)), len(self.data.queries))
                    each = worker.single(search=point.search, queries=count, k=self.k)["seconds"]
                    seconds[number] = [float(np.median(each)), float(np.percentile(each, 99))]
        return seconds


class Stable:
    """Workers that stay open between rounds, as long as the machine has memory for them."""

    def __init__(self, bench: Bench, threads: int) -> None:
        self._bench, self._threads = bench, threads
        self._open: dict[tuple[str, str], tuple[Worker, int]] = {}
        self._room = (available_bytes() or 8 << 30) // 2

    def worker(self, point: Point) -> Worker:
        """The open worker of a point."""
        key = point.key[:2]
        if key not in self._open:
            needed = self._needed(point)
            while self._open and needed + sum(size for _, size in self._open.values()) > self._room:
                self._close(next(iter(self._open)))
            worker, opening = self._bench._opened(point.subject, point.parameters, self._threads)
            self._bench._opened_again(point, self._threads, opening["seconds"])
            self._open[key] = worker, needed
        return self._open[key][0]

    def close(self) -> None:
        """Close all."""
        for key in list(self._open):
            self._close(key)

    def _close(self, key: tuple[str, str]) -> None:
        worker, _ = self._open.pop(key)
        with suppress(SubjectError):
            worker.close()

    def _needed(self, point: Point) -> int:
        opened = self._bench.results.find_opened(point.subject, point.parameters, self._threads)
        return 0 if opened is None else max(opened.counted, opened.measured or 0)


def cheapest(points: Sequence[Point], targets: Sequence[float]) -> list[Point]:
    """For each recall the cheapest point that reaches it; no point twice."""
    chosen: list[Point] = []
    for target in targets:
        able = [point for point in points if point.recall >= target]
        best = min(able, key=lambda point: point.cost, default=None)
        if best is not None and best not in chosen:
            chosen.append(best)
    return chosen


def between(points: Sequence[Point], target: float) -> Parameters | None:
    """Half-way from what misses a recall to the cheapest that reaches it; None if they are as near as makes sense.

    Both differ in the first parameter of a search alone, a number that stands for effort.
    """
    best = next(iter(cheapest([point for point in points if point.search], [target])), None)
    if best is None:
        return None
    effort, value = next(iter(best.search.items()))
    others = {**best.search, effort: None}
    less = [p.search[effort] for p in points if {**p.search, effort: None} == others and p.recall < target]
    most = max((other for other in less if other < value), default=None)
    if most is None or (value - most) // 2 < max(1, _STEP * value):
        return None
    return {**best.search, effort: (most + value) // 2}


def worth_racing(points: Sequence[Point], most: int) -> list[Point]:
    """The front and what is near it, at most so many: first what is cheapest at each target, then evenly by recall."""
    best = front(points, lambda p: p.recall, lambda p: p.cost)
    must = cheapest(points, TARGETS)
    close = near_front(points, lambda p: p.recall, lambda p: p.cost, slack=_SLACK)
    near_targets = [p for p in close if p not in must and any(t <= p.recall <= t + 0.02 for t in TARGETS)]
    others = [p for p in best if p not in must and p not in near_targets]
    wanted = must + near_targets[: max(0, (most - len(must)) // 2)]
    free = max(0, most - len(wanted))
    if len(others) > free:
        others = (
            [others[place] for place in np.unique(np.linspace(0, len(others) - 1, free).round().astype(int))]
            if free
            else []
        )
    return sorted(wanted + others, key=lambda point: point.recall)


def thread_counts(asked: str) -> list[int]:
    """Numbers of threads from a text such as ``1,all``."""
    counts = []
    for part in asked.split(","):
        text = part.strip()
        if text != "all" and not (text.isdecimal() and int(text) > 0):
            raise InvalidArgumentError(f"threads are numbers from 1, or 'all', such as 1,all, not '{part}'.")
        counts.append(cores() if text == "all" else int(text))
    return list(dict.fromkeys(counts))
