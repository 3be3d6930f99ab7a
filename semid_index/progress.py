"""Progress of long work: none, a callback of the caller's, or bars on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from semid_index.quantizer import ProgressCallback


@contextmanager
def progress_callback(progress: bool | ProgressCallback) -> Iterator[ProgressCallback | None]:
    """What to call with (steps done, steps in all, what is being done); None if nobody wants to know."""
    if callable(progress):
        yield progress
        return
    if not progress:
        yield None
        return
    # imported here: rich costs 50 ms, and most programs want no bars
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=None)

        def show(done: int, total: int, what: str) -> None:
            bars.update(task, completed=done, total=total, description=what)

        yield show
