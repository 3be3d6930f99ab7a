"""The contract of a benchmark subject: something that finds nearest neighbours.

A subject is built once, in a process of its own, and writes what it needs into a folder. It is then opened in other
processes, told how to search, and searched. So what it takes to open it, the memory it has when it is searched, and
its bytes on disk can be measured, and what building leaves behind in memory cannot disturb anything.

A subject gives ids only. Distances are the harness's business: it computes them from the ids, so that nobody has to
be believed.

Offer your own by the hook ``semid_register_subjects``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from semid_index.quantizer import Vectors
from semid_index.records import Metric

Parameters = Mapping[str, Any]  # names and JSON values
Effort = Literal["tiny", "quick", "hour", "full"]


@dataclass(frozen=True)
class Shape:
    """What a subject may choose its parameters by."""

    rows: int
    dim: int
    metric: Metric

    def lists(self, factor: float) -> int:
        """A number of inverted lists: the power of two nearest to ``factor`` times the root of the rows."""
        return int(max(2, min(2 ** round(float(np.log2(factor * self.rows**0.5))), self.rows // 4)))

    def pieces(self, dims: int) -> int:
        """Into how many even pieces of about ``dims`` dimensions a vector can be cut."""
        wanted = max(1, self.dim / dims)
        return min((m for m in range(1, self.dim + 1) if self.dim % m == 0), key=lambda m: (abs(m - wanted), m))


@dataclass(frozen=True)
class Build:
    """One way to build a subject, and the ways to search it that are tried."""

    parameters: Parameters
    searches: Sequence[Parameters] = field(default=({},))


class Subject(ABC):
    """Something that finds nearest neighbours. Vectors under cosine come at length 1."""

    name: ClassVar[str]
    """As it is called in results; never reused for something else."""

    requires: ClassVar[tuple[str, ...]] = ()
    """Distributions whose versions belong to a result, the first being the one to install."""

    @classmethod
    @abstractmethod
    def load(cls) -> None:
        """Import what is needed. An ImportError or OSError tells why the subject cannot run; others are its faults."""

    @classmethod
    def unavailable(cls) -> str | None:
        """Why the subject cannot run here; None if it can."""
        try:
            cls.load()
        except (ImportError, OSError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            return f"{reason}. Install it with: pip install {cls.requires[0]}" if cls.requires else reason
        return None

    @classmethod
    def supports(cls, shape: Shape) -> str | None:
        """Why the subject cannot search such data; None if it can."""
        return None

    @classmethod
    @abstractmethod
    def grid(cls, shape: Shape) -> list[Build]:
        """The ways to build and search it that are tried, the most promising first."""

    @classmethod  # noqa: B027 - most libraries take next to nothing
    def take_once(cls, dim: int) -> None:
        """Have libraries take the memory that they take once, whatever the number of items: it is told apart."""

    @abstractmethod
    def build(self, vectors: Vectors, shape: Shape, parameters: Parameters, folder: Path, *, threads: int) -> None:
        """Build it from (n, dim) vectors, and write all that searching needs into a folder; ids are row numbers."""

    @abstractmethod
    def open(self, folder: Path, shape: Shape, parameters: Parameters, *, threads: int) -> None:
        """Make ready to search what was built with these parameters."""

    @abstractmethod
    def prepare(self, search: Parameters) -> None:
        """Settings for the searches that follow. Not timed."""

    @abstractmethod
    def search(self, queries: Vectors, k: int) -> NDArray[np.integer] | Sequence[NDArray[np.integer]]:
        """The ids of the k nearest of each query (q, dim), nearest first; -1, or a shorter row, where there are fewer.

        Only this is timed.
        """

    @abstractmethod
    def memory(self) -> dict[str, int]:
        """Bytes in memory while it is searched, by what they are for."""

    def close(self) -> None:  # noqa: B027 - most have nothing to let go of but memory
        """Let go of everything."""


def ladder(first: int, last: int) -> list[int]:
    """Whole numbers from first to last, each half as large again or a third larger: 1, 2, 3, 4, 6, 8, 12 ..."""
    steps = sorted({base << shift for base in (2, 3) for shift in range(20)} | {1})
    return [step for step in steps if first <= step <= last] or [first]
