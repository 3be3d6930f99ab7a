"""The process that a subject runs in: reads one request a line, answers with one line of JSON.

    python -m semid_index.bench.worker

A subject has a process of its own so that its memory can be measured, its threads disturb nobody, and its crash is its
own. The harness lets only one of them work at a time. Whatever a library prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from semid_index.bench.data import read_in_worker
from semid_index.bench.machine import Others, peak_bytes, private_bytes
from semid_index.bench.measures import checked_ids
from semid_index.bench.subject import Subject
from semid_index.errors import SemidError
from semid_index.plugins import installed

_WARM_UP = 5  # queries that a subject sees before its time counts


class Session:
    """One subject, and what it searches."""

    def __init__(self, kind: type[Subject], data_folder: Path, index_folder: Path, parameters: dict[str, Any]) -> None:
        self.data, self.folder, self.parameters = read_in_worker(data_folder), index_folder, parameters
        kind.load()
        self.subject = kind()
        self._before: int | None = None

    def build(self, *, threads: int) -> dict[str, Any]:
        """Build it; seconds, bytes on disk, the peak of memory, and the processors that others had meanwhile."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        others, started = Others(), time.perf_counter()
        self.subject.build(self.data.base, self.data.shape, self.parameters, self.folder, threads=threads)
        seconds, busy = time.perf_counter() - started, others.processors()
        size = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        return {"seconds": seconds, "disk_bytes": size, "peak_bytes": peak_bytes(), "others": busy}

    def open(self, *, threads: int) -> dict[str, Any]:
        """Make it ready to search; seconds, and the bytes that its libraries had taken before, whatever they search."""
        bare = private_bytes()
        self.subject.take_once(self.data.shape.dim)
        self._before = private_bytes()
        started = time.perf_counter()
        self.subject.open(self.folder, self.data.shape, self.parameters, threads=threads)
        seconds = time.perf_counter() - started
        return {
            "seconds": seconds,
            "once": self._before - bare if self._before is not None and bare is not None else None,
        }

    def memory(self) -> dict[str, Any]:
        """What it says it holds, and by how much the process's own memory has grown since before it was opened."""
        now = private_bytes()
        grown = None if now is None or self._before is None else now - self._before
        return {"parts": self.subject.memory(), "measured": grown}

    def batch(self, *, search: dict[str, Any], queries: int, k: int, ids: str | None = None) -> dict[str, Any]:
        """Search for the first queries, all at once; seconds, and how many of them processors were at work on it.

        Ids go into a file if one is named.
        """
        wanted = self.data.queries[:queries]
        self.subject.prepare(search)
        self.subject.search(wanted[:_WARM_UP], k)
        started, worked = time.perf_counter(), time.process_time()
        found = self.subject.search(wanted, k)
        seconds, worked = time.perf_counter() - started, time.process_time() - worked
        if ids is not None:
            np.save(ids, checked_ids(found, k, len(self.data.base)), allow_pickle=False)
        return {"seconds": seconds, "worked": worked}

    def close(self) -> None:
        """Let go of everything."""
        self.subject.close()

    def single(self, *, search: dict[str, Any], queries: int, k: int) -> dict[str, Any]:
        """Search for the first queries one by one; the seconds of each."""
        self.subject.prepare(search)
        ask, wanted = self.subject.search, self.data.queries[:queries]
        for query in range(min(_WARM_UP, queries)):
            ask(wanted[query : query + 1], k)
        seconds = []
        for query in range(queries):
            one = wanted[query : query + 1]
            started = time.perf_counter()
            ask(one, k)
            seconds.append(time.perf_counter() - started)
        return {"seconds": seconds}


def start(*, subject: str, data: str, index: str, parameters: dict[str, Any], threads: int) -> Session:
    """The session that a first request asks for, on as many cores as it may have threads.

    Some libraries take all cores whatever they are told; so they are not given them.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])
    kind = installed().named("subject").get(subject)
    if kind is None:
        raise SemidError(f"No subject '{subject}' is installed here.")
    return Session(kind, Path(data), Path(index), parameters)


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a library that prints must not spoil an answer
    session: Session | None = None
    for line in sys.stdin:
        request = json.loads(line)
        name = request.pop("do")
        try:
            if session is None:
                session = start(**request)
                answer: dict[str, Any] = {}
            else:
                action: Callable[..., dict[str, Any]] = getattr(session, name)
                answer = action(**request)
        except Exception as error:  # a subject may fail in any way; the harness is told how
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
