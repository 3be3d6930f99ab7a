"""What was measured, as JSON that is written after every step, so that a run goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from semid_index.errors import InvalidArgumentError

FORMAT = 1
_QUIET = 0.1  # processors that others may have while something is built
Mode = Literal["batch", "single"]


def key_of(parameters: Mapping[str, Any]) -> str:
    """Parameters as one text, to compare and to show: ``probes=8 rerank=100``."""
    return " ".join(f"{name}={json.dumps(value).strip(chr(34))}" for name, value in parameters.items())


@dataclass(frozen=True)
class Built:
    """A subject that was built."""

    subject: str
    parameters: dict[str, Any]
    threads: int
    seconds: float
    """From vectors in memory to files that can be opened."""
    disk_bytes: int
    peak_bytes: int | None
    """The most memory of the process that built, mapped vectors counted as far as they were read."""
    others: float | None = None
    """How many processors other programs had meanwhile, on average."""
    earlier: bool = False
    """Not in this run: the files were in a folder of builds."""

    @property
    def quiet(self) -> bool:
        """Whether the time means something: other programs had next to nothing to do, as far as is known."""
        return not self.earlier if self.others is None else self.others <= _QUIET


@dataclass(frozen=True)
class Opened:
    """A subject that was opened to be searched."""

    subject: str
    parameters: dict[str, Any]
    threads: int
    seconds: float
    memory: dict[str, int]
    """Bytes by what they are for, as the subject counts them."""
    measured: int | None
    """By how much the process's own memory grew from before it was opened until after it was searched."""
    once: int | None = None
    """What its libraries had taken before, whatever the number of items; not in what was measured."""

    @property
    def counted(self) -> int:
        """The sum of what the subject counts."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class Point:
    """One way to search one subject: what it finds, and a first time, to choose what is worth racing."""

    subject: str
    parameters: dict[str, Any]
    search: dict[str, Any]
    threads: int
    recall: float
    queries: int
    """How many of the queries it was given; fewer than all for slow subjects."""
    seconds: float
    short: int = 0
    """How many hits were missing, in all."""
    worked: float | None = None
    """Seconds of processors that were at work on it."""

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from others of its threads."""
        return self.subject, key_of(self.parameters), key_of(self.search)

    @property
    def cost(self) -> float:
        """Seconds for a query, to choose by. With one thread those of the processor, which others do not disturb."""
        disturbed = self.threads > 1 or not self.worked
        return (self.seconds if disturbed else self.worked or 0.0) / self.queries


@dataclass(frozen=True)
class Race:
    """Contestants that ran in turn, round after round."""

    mode: Mode
    threads: int
    contestants: list[Point]
    rounds: list[list[list[float]]] = field(default_factory=list)
    """Round, contestant: [seconds a query, processor seconds a query] for a batch; [median, 99th percentile] of single
    queries."""

    def seconds(self, contestant: int, figure: int = 0) -> list[float]:
        """One figure of a contestant, a value for each round."""
        return [round_[contestant][figure] for round_ in self.rounds]

    @property
    def waited(self) -> float | None:
        """The share of the time in which others had the processor; only one thread's batches tell."""
        if self.mode != "batch" or self.threads != 1 or not self.rounds:
            return None
        total, worked = (sum(times[part] for one in self.rounds for times in one) for part in (0, 1))
        return max(0.0, 1 - worked / total)


@dataclass
class Results:
    """Everything that was measured on one set of data."""

    data: dict[str, Any]
    k: int
    machine: dict[str, Any]
    versions: dict[str, str]
    skipped: dict[str, str] = field(default_factory=dict)
    """Subjects that could not run, and why."""
    failed: dict[str, str] = field(default_factory=dict)
    """Subjects, with their parameters, that failed while they ran, and how."""
    built: list[Built] = field(default_factory=list)
    opened: list[Opened] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    races: list[Race] = field(default_factory=list)

    def find_built(self, subject: str, parameters: Mapping[str, Any]) -> Built | None:
        """The build of a subject with these parameters, if it was done."""
        return next((b for b in self.built if b.subject == subject and b.parameters == parameters), None)

    def find_opened(self, subject: str, parameters: Mapping[str, Any], threads: int) -> Opened | None:
        """What was seen when it was opened."""
        found = (o for o in self.opened if (o.subject, o.threads) == (subject, threads) and o.parameters == parameters)
        return next(found, None)

    def points_of(self, threads: int, subject: str | None = None) -> list[Point]:
        """The points measured with so many threads."""
        return [p for p in self.points if p.threads == threads and subject in (None, p.subject)]

    def race(self, mode: Mode, threads: int) -> Race | None:
        """The latest race of this kind."""
        return next((r for r in reversed(self.races) if (r.mode, r.threads) == (mode, threads)), None)

    def put_race(self, race: Race) -> None:
        """Keep a race, in the place of an older one of its kind."""
        if not any(kept is race for kept in self.races):
            self.races = [r for r in self.races if (r.mode, r.threads) != (race.mode, race.threads)] + [race]

    @property
    def threads(self) -> list[int]:
        """The numbers of threads that were raced with."""
        return sorted({race.threads for race in self.races})

    # -- files --------------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write a file, one record a line; there is never half of it."""
        part = path.with_suffix(".part")
        part.write_text("".join(self._lines()), encoding="utf-8")
        part.replace(path)

    def _lines(self) -> Iterator[str]:
        yield "{"
        for name, value in {"format": FORMAT, **asdict(self)}.items():
            yield ("\n" if name == "format" else ",\n") + f"{json.dumps(name)}: "
            if isinstance(value, list):
                yield "[\n" + ",\n".join(json.dumps(record) for record in value) + "\n]" if value else "[]"
            else:
                yield json.dumps(value)
        yield "\n}\n"

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file."""
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InvalidArgumentError(f"{path} has no results: {error}") from error
        if not isinstance(said, dict) or said.pop("format", None) != FORMAT:
            raise InvalidArgumentError(f"{path} has no results of format {FORMAT}. Choose another folder.")
        said["built"] = [Built(**record) for record in said["built"]]
        said["opened"] = [Opened(**record) for record in said["opened"]]
        said["points"] = [Point(**record) for record in said["points"]]
        said["races"] = [
            Race(**{**record, "contestants": [Point(**point) for point in record["contestants"]]})
            for record in said["races"]
        ]
        return cls(**said)

    def check_same(self, data: Mapping[str, Any], k: int, machine: Mapping[str, Any], path: Path) -> None:
        """Refuse to go on with results of something else."""
        for what, here, there in (("data", data, self.data), ("k", k, self.k), ("machine", machine, self.machine)):
            if here != there:
                raise InvalidArgumentError(
                    f"{path} has results for another {what}, {there}, not {here}. Choose another folder for --output, "
                    "or begin anew with --fresh."
                )

    def compact(self, kept: Sequence[Point]) -> Results:
        """The same with only some of the points, to be published."""
        keys = {(point.key, point.threads) for point in kept}
        return Results(**{**vars(self), "points": [p for p in self.points if (p.key, p.threads) in keys]})
