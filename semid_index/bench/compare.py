"""Subjects compared at equal recall: what is the fastest of each, how much memory it takes, and who wins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from semid_index.bench.measures import Spread, Verdict, ratio, spread, verdict
from semid_index.bench.results import Built, Mode, Opened, Point, Race, Results

OURS = "semid-"
"""How the names of our own subjects begin."""


@dataclass(frozen=True)
class Best:
    """The fastest way of a subject to reach a recall, in one race."""

    point: Point
    seconds: list[float]
    """For a query, round by round; of single queries the medians."""
    tails: list[float] | None = None
    """The 99th percentiles of single queries."""
    opened: Opened | None = None
    built: Built | None = None

    @property
    def rate(self) -> Spread:
        """Queries a second."""
        return spread([1 / value for value in self.seconds])

    @property
    def memory(self) -> int | None:
        """Bytes in memory."""
        return None if self.opened is None else self.opened.counted


@dataclass(frozen=True)
class Compared:
    """One of ours beside a peer."""

    target: float
    ours: Best
    peer: Best
    times: Spread
    """How many times as long the peer takes."""

    @property
    def verdict(self) -> Verdict:
        """Of ours."""
        return verdict(self.times)


def all_best(results: Results, mode: Mode, threads: int, target: float) -> dict[str, Best]:
    """Of each subject that reaches a recall in a race, the fastest way; the fastest subject first."""
    race = results.race(mode, threads)
    if race is None or not race.rounds:
        return {}
    found: dict[str, Best] = {}
    for number, point in enumerate(race.contestants):
        if point.recall < target:
            continue
        best = _as_best(results, race, number)
        if point.subject not in found or best.rate.median > found[point.subject].rate.median:
            found[point.subject] = best
    return dict(sorted(found.items(), key=lambda item: -item[1].rate.median))


def raced(results: Results, mode: Mode, threads: int) -> list[Best]:
    """All that raced."""
    race = results.race(mode, threads)
    return [] if race is None or not race.rounds else [_as_best(results, race, n) for n in range(len(race.contestants))]


def compared(results: Results, mode: Mode, threads: int, targets: Iterable[float]) -> list[Compared]:
    """At each recall each peer beside the fastest of ours with no more memory; left out where none is so small."""
    rows = []
    for target in targets:
        everyone = [best for best in raced(results, mode, threads) if best.point.recall >= target]
        mine = [best for best in everyone if best.point.subject.startswith(OURS)]
        for name, peer in all_best(results, mode, threads, target).items():
            able = [best for best in mine if peer.memory is None or (best.memory or 0) <= peer.memory]
            if name.startswith(OURS) or not able:
                continue
            ours = max(able, key=lambda best: best.rate.median)
            rows.append(Compared(target, ours, peer, ratio(ours.seconds, peer.seconds)))
    return rows


def _as_best(results: Results, race: Race, number: int) -> Best:
    point = race.contestants[number]
    return Best(
        point,
        race.seconds(number),
        race.seconds(number, 1) if race.mode == "single" else None,
        results.find_opened(point.subject, point.parameters, race.threads),
        results.find_built(point.subject, point.parameters),
    )
