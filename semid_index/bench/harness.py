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

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from semid_index.bench.data import Data, true_neighbours, write_for_workers
from semid_index.bench.machine import available_bytes, machine, versions
from semid_index.bench.measures import Truth, checked_ids, distances_of, front, near_front, recall
from semid_index.bench.results import Built, Mode, Opened, Point, Race, Results, key_of
from semid_index.bench.subject import Build, Effort, Parameters, Subject
from semid_index.bench.workers import SubjectError, Worker, WorkerProcess
from semid_index.devices import cores
from semid_index.errors import InvalidArgumentError, SemidError

TARGETS = (0.9, 0.95, 0.99)
"""Recalls at which subjects are compared."""

_SLACK = 1.15  # what is at most so much slower than a subject's best is raced with it
_WORTH_RACING = 0.6  # the least recall
_ENOUGH = 0.9995  # the recall after which more effort is not tried
_PATIENCE = 12  # ways to search in a row that find no more than others before them, after which no more are tried
_TRIAL = 10  # queries to see how fast a subject is
_LEAST_QUERIES = 50
_SINGLES = 300

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
    thinned: bool = False
    """Only the first and the last way to search each build."""

    def of(self, *, rounds: int) -> Limits:
        """The same with another number of rounds."""
        return replace(self, rounds=rounds)


LIMITS: Mapping[Effort, Limits] = {
    "tiny": Limits(builds=1, rounds=1, contestants=2, turn_seconds=0.2, thinned=True),
    "quick": Limits(builds=2, rounds=3, contestants=6, turn_seconds=0.5),
    "full": Limits(builds=99, rounds=7, contestants=12, turn_seconds=1.0),
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
    say: Say = lambda _text: None
    start: Start | None = None
    """Starts the worker of a subject; a process, unless a test says otherwise."""
    results: Results = field(init=False)

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()  # ScaNN loses files whose path is relative
        self.path = self.folder / f"{self.data.name}.json"
        self._work = self.folder / "work" / f"{self.data.name}-{self.data.fingerprint}"
        described = self.data.description
        if self.path.exists() and not self.fresh:
            self.results = Results.load(self.path)
            self.results.check_same(described, self.k, machine(), self.path)
        else:
            self.results = Results(described, self.k, machine(), {})

    def run(self) -> Results:
        """Everything, in order; what the results file has already is not done again."""
        self.say(f"{self.data.name}: {len(self.data.base):,} x {self.data.base.shape[1]}, {self.data.metric}")
        self.results.failed = {}
        usable = self._usable()
        self.results.versions |= versions(name for kind in usable.values() for name in kind.requires)
        builds = [(name, build) for name, kind in usable.items() for build in self._builds(kind)]
        for name, build in builds:
            self._attempt(name, build.parameters, partial(self._build, name, build.parameters))
        for threads in self.threads:
            for name, build in builds:
                if self.results.find_built(name, build.parameters):
                    self._attempt(name, build.parameters, partial(self._scan, name, build, threads))
            for mode in self.modes:
                self._race(mode, threads, list(usable))
        self._save()
        return self.results

    def clean(self) -> None:
        """Remove what was needed meanwhile: indexes and copies of the vectors."""
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
        builds = kind.grid(self.data.shape)[: self.limits.builds]
        if not self.limits.thinned:
            return builds
        ends = [(build, [build.searches[0], build.searches[-1]]) for build in builds]
        return [Build(build.parameters, both if both[0] != both[1] else both[:1]) for build, both in ends]

    def _attempt(self, name: str, parameters: Parameters, work: Callable[[], None]) -> None:
        """Do something with a subject; if it fails, write down how and go on with the others."""
        try:
            work()
        except SemidError as error:
            self._failed(f"{name} {key_of(parameters)}".strip(), str(error))

    def _failed(self, name: str, how: str) -> None:
        how = how.replace(str(self.folder), "...")  # results are published, and tell no paths
        self.results.failed[name] = how
        self.say(f"  {name} FAILED: {how}")
        self._save()

    def _save(self) -> None:
        self.results.save(self.path)

    # -- workers ------------------------------------------------------------------------------------------------------

    def _index_folder(self, name: str, parameters: Parameters) -> Path:
        code = hashlib.blake2b(json.dumps(dict(parameters), sort_keys=True).encode(), digest_size=4).hexdigest()
        return self._work / f"{name}-{code}"

    @cached_property
    def _truth(self) -> Truth:
        self._work.mkdir(parents=True, exist_ok=True)
        return true_neighbours(self.data, self._work.parent)[1]

    def _started(self, name: str, parameters: Parameters, threads: int) -> Worker:
        self._work.mkdir(parents=True, exist_ok=True)
        write_for_workers(self.data, self._work)
        index = self._index_folder(name, parameters)
        if self.start is not None:
            return self.start(name, parameters, index, threads)
        log = index.with_suffix(".log")
        return WorkerProcess(name, parameters, data=self._work, index=index, log=log, threads=threads)

    def _opened(self, name: str, parameters: Parameters, threads: int) -> tuple[Worker, float]:
        if not self._index_folder(name, parameters).exists():
            self._build_files(name, parameters)  # an earlier run built it, and its files have gone
        worker = self._started(name, parameters, threads)
        try:
            return worker, worker.open(threads=threads)["seconds"]
        except BaseException:
            worker.close()
            raise

    # -- steps --------------------------------------------------------------------------------------------------------

    def _build(self, name: str, parameters: Parameters) -> None:
        if self.results.find_built(name, parameters) is None:
            self.results.built.append(self._build_files(name, parameters))
            self._save()

    def _build_files(self, name: str, parameters: Parameters) -> Built:
        threads = max(self.threads)
        worker = self._started(name, parameters, threads)
        try:
            seen = worker.build(threads=threads)
        finally:
            worker.close()
        self.say(f"  built {name} {key_of(parameters)} in {seen['seconds']:.1f} s")
        return Built(name, dict(parameters), threads, **seen)

    def _scan(self, name: str, build: Build, threads: int) -> None:
        """Search a build once in each way, until more effort finds no more. What was tried before is not done again."""
        known = {p.key: p for p in self.results.points_of(threads, name)}
        worker: Worker | None = None
        seconds, best, in_vain = 0.0, 0.0, 0
        try:
            for search in build.searches:
                point = known.get((name, key_of(build.parameters), key_of(search)))
                if point is None:
                    if worker is None:
                        worker, seconds = self._opened(name, build.parameters, threads)
                    point = self._point(worker, name, build.parameters, search, threads)
                    self.results.points.append(point)
                best, in_vain = (point.recall, 0) if point.recall > best else (best, in_vain + 1)
                if point.recall >= _ENOUGH or in_vain >= _PATIENCE:
                    break
            if worker is None:
                return
            if self.results.find_opened(name, build.parameters, threads) is None:
                held = worker.memory()
                self.results.opened.append(
                    Opened(name, dict(build.parameters), threads, seconds, held["parts"], held["measured"])
                )
        finally:
            if worker is not None:
                worker.close()
        self.say(f"  searched {name} {key_of(build.parameters)}, recall to {best:.3f}, threads {threads}")
        self._save()

    def _point(self, worker: Worker, name: str, parameters: Parameters, search: Parameters, threads: int) -> Point:
        everything = len(self.data.queries)
        trial = min(_TRIAL, everything)
        rate = trial / max(1e-9, worker.batch(search=search, queries=trial, k=self.k)["seconds"])
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
            self.results.races = [r for r in self.results.races if (r.mode, r.threads) != (mode, threads)] + [race]
        stable = Stable(self, threads)
        try:
            while len(race.rounds) < self.limits.rounds:
                number = len(race.rounds)
                race.rounds.append(self._round(race, stable, np.random.default_rng(number)))
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
            worker, _ = self._bench._opened(point.subject, point.parameters, self._threads)
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
