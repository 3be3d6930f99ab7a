"""What the tests of reliability share: a process that runs jobs in children, which may be killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONG = bool(os.environ.get("SEMID_LONG"))
collect_ignore = ["zygote.py"]  # a script: no module to look for tests in


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    said: list[list[Any]]
    """What it said, line by line, until it ended."""
    status: int
    """Its exit code; the negative number of the signal that ended it."""
    hung: bool
    """Whether it had to be killed because it took too long."""
    seconds: float

    def of(self, word: str) -> list[list[Any]]:
        """What it said after this word."""
        return [line[1:] for line in self.said if line[0] == word]

    def one(self, word: str) -> Any:
        """The one thing that it said after this word; a failure of the test if it failed."""
        assert self.status == 0, self.explain()
        [[thing]] = self.of(word)
        return thing

    def explain(self) -> str:
        """For the message of a failed test."""
        errors = "\n".join(error[-1] for error in self.of("error"))
        return f"status {self.status}, hung: {self.hung}, {self.seconds:.2f} s\n{errors}"


class Zygote:
    """Runs jobs of ``jobs.py``, each in a forked child of a process that has imported everything."""

    def __init__(self) -> None:
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        path = [str(ROOT), *(entry for entry in sys.path if entry)]
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            env={**os.environ, **one_thread, "PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, job: str, *, limit: float = 60, kill_after: float | None = None, **arguments: Any) -> Outcome:
        """Run one job to its end, or until so many seconds after it said that it started."""
        request = {"job": job, "arguments": arguments, "limit": limit, "kill_after": kill_after}
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request, default=str) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that forks the others is gone"
        return Outcome(**json.loads(answer))

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """Runs jobs in children: ``zygote.run("name", argument=..., kill_after=seconds)``."""
    if not hasattr(os, "fork"):
        pytest.skip("this system cannot fork")
    process = Zygote()
    yield process
    process.close()


@pytest.fixture(scope="session")
def long() -> bool:
    """Whether the long form of a test was asked for (``make test-long``)."""
    return LONG
