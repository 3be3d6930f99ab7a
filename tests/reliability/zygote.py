"""A process that imports everything once and forks a child for each job: a killed or crashed child costs milliseconds.

Started as a script by the fixture ``zygote``. It reads one job a line from stdin, as JSON, and answers with one line.
A job is a function of ``jobs.py``; what it says with ``say`` is kept even if the child is killed in the next moment.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pkgutil
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

# imported here, so that no child has to
import duckdb  # noqa: F401
import faiss  # noqa: F401
import jobs
import pyarrow.compute
import pyarrow.parquet  # noqa: F401

import semid_index
from semid_index.plugins import installed

with contextlib.suppress(ImportError):
    import pandas  # noqa: F401  # pyarrow imports it as soon as it converts something

for module in pkgutil.walk_packages(semid_index.__path__, "semid_index."):
    with contextlib.suppress(ImportError):  # of what needs a package that is not installed
        importlib.import_module(module.name)
installed()

START = "started"  # what a job says when the time until it is killed begins to run


def run(request: dict[str, Any]) -> dict[str, Any]:
    """Run one job in a child; kill it when it is time to."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        work(request, writing)
    os.close(writing)
    started, received, hung, killed = time.monotonic(), b"", False, False
    deadline = started + request["limit"]
    kill_at = None
    while True:
        now = time.monotonic()
        if kill_at is not None and now >= kill_at and not killed:
            os.kill(child, signal.SIGKILL)
            killed = True
        elif now >= deadline and not killed:
            os.kill(child, signal.SIGKILL)
            killed = hung = True
        wait = 1.0 if killed else max(0.0, min(deadline, deadline if kill_at is None else kill_at) - now)
        if select.select([reading], [], [], wait)[0]:
            part = os.read(reading, 65_536)
            if not part:
                break
            received += part
            if kill_at is None and request.get("kill_after") is not None and START.encode() in received:
                kill_at = time.monotonic() + request["kill_after"]
    os.close(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = [json.loads(line) for line in received.decode().splitlines()]
    return {"said": said, "status": status, "hung": hung, "seconds": time.monotonic() - started}


def work(request: dict[str, Any], writing: int) -> None:
    """The child: do the job, and leave without a look back."""

    def say(*words: object) -> None:
        os.write(writing, (json.dumps(words) + "\n").encode())

    code = 0
    try:
        job: Callable[..., object] = getattr(jobs, request["job"])
        job(say, **request["arguments"])
    except BaseException as error:
        say("error", [kind.__name__ for kind in type(error).__mro__], str(error), traceback.format_exc())
        code = 1
    os._exit(code)


def main() -> None:
    """Answer one request after the other, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no answer
    for line in sys.stdin:
        answers.write(json.dumps(run(json.loads(line))) + "\n")
        with contextlib.suppress(BrokenPipeError):
            answers.flush()


if __name__ == "__main__":
    main()
