"""The harness's side of a worker process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from semid_index.bench.subject import Parameters
from semid_index.errors import SemidError

_TAIL = 400  # characters of a crashed worker's log to show
_LIBRARIES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class SubjectError(SemidError, RuntimeError):
    """A subject failed: it raised, crashed, took too long, or answered what cannot be."""


class Worker(Protocol):
    """What runs a subject; see :class:`semid_index.bench.worker.Session`."""

    def build(self, *, threads: int) -> dict[str, Any]:
        """Build it."""

    def open(self, *, threads: int) -> dict[str, Any]:
        """Make it ready to search."""

    def memory(self) -> dict[str, Any]:
        """What it holds."""

    def batch(self, *, search: Parameters, queries: int, k: int, ids: str | None = None) -> dict[str, Any]:
        """Search for all at once."""

    def single(self, *, search: Parameters, queries: int, k: int) -> dict[str, Any]:
        """Search one by one."""

    def close(self) -> None:
        """Let go of everything."""


class WorkerProcess:
    """A subject in a process of its own, with so many threads for every library in it, and as many cores."""

    def __init__(
        self,
        subject: str,
        parameters: Parameters,
        *,
        data: Path,
        index: Path,
        log: Path,
        threads: int,
        seconds: float = 7200.0,
    ) -> None:
        self._name, self._log, self._seconds = subject, log, seconds
        environment = {**os.environ, **dict.fromkeys(_LIBRARIES, str(threads))}
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "semid_index.bench.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        try:
            place = {"data": str(data), "index": str(index)}
            self._ask("start", subject=subject, parameters=dict(parameters), threads=threads, **place)
        except BaseException:
            self.close()
            raise

    def build(self, *, threads: int) -> dict[str, Any]:
        """Build it."""
        return self._ask("build", threads=threads)

    def open(self, *, threads: int) -> dict[str, Any]:
        """Make it ready to search."""
        return self._ask("open", threads=threads)

    def memory(self) -> dict[str, Any]:
        """What it holds."""
        return self._ask("memory")

    def batch(self, *, search: Parameters, queries: int, k: int, ids: str | None = None) -> dict[str, Any]:
        """Search for all at once."""
        return self._ask("batch", search=dict(search), queries=queries, k=k, ids=ids)

    def single(self, *, search: Parameters, queries: int, k: int) -> dict[str, Any]:
        """Search one by one."""
        return self._ask("single", search=dict(search), queries=queries, k=k)

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):  # it died before it read all
                self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _ask(self, action: str, **values: Any) -> dict[str, Any]:
        if self._process.stdin is None or self._process.stdout is None:
            raise SubjectError(f"{self._name} has no process.")
        watchdog = threading.Timer(self._seconds, self._process.kill)
        watchdog.start()
        try:
            self._process.stdin.write(json.dumps({"do": action, **values}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            watchdog.cancel()
        if not line:
            code = self._process.wait()
            raise SubjectError(f"{self._name} ended with exit code {code} while it was to {action}. {self._said()}")
        answer: Mapping[str, Any] = json.loads(line)
        if "error" in answer:
            raise SubjectError(f"{self._name}: {answer['error']}")
        return dict(answer)

    def _said(self) -> str:
        text = self._log.read_text(encoding="utf-8", errors="replace").strip()
        return f"Its last words: ...{text[-_TAIL:]}" if text else "It said nothing."
