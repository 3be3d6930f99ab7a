"""The snapshot that searches use, which follows what is written without reading everything again.

As in a log-structured merge tree, items that were added since the last look become a new *segment*, which is small and
quickly read. Segments that have become small beside those after them are read anew as one. So an item is read again
only when its segment has grown by a tenth, and there are never more than a few segments to search.

O'Neil, Cheng, Gawlick, O'Neil, *The log-structured merge-tree*, Acta Informatica 33, 1996.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import Protocol, TypeVar

from semid_index.contents import Stamp
from semid_index.errors import RESTORE, CorruptIndexError
from semid_index.segments import SearchState, Segment, Snapshot
from semid_index.store import Store

T = TypeVar("T")

FEW = 4_096
"""Up to so many items, a later segment is compared one and all, and needs no leaves."""
_GROWTH = 10  # a segment is read anew when the next one has a tenth of its items, and when a tenth of it is deleted


class Read(Protocol):
    """Reads the items with some rows from the store."""

    def __call__(self, rows: range, *, few: bool) -> SearchState:
        """``few``: all of them are always compared."""


class Live:
    """Gives the snapshot of now. May be called from several threads, also while another one writes."""

    def __init__(self, store: Store, read: Read) -> None:
        self._store, self._read = store, read
        self._reading = RLock()
        self._latest: tuple[Snapshot, int] | None = None
        """The last snapshot, and how often the store had written when it was last compared with the file."""

    @property
    def latest(self) -> Snapshot | None:
        """The last snapshot that was used; None before the first search."""
        latest = self._latest
        return None if latest is None else latest[0]

    def now(self) -> Snapshot:
        """A snapshot that has all that was written before this call. Costs nothing if nothing was."""
        return self._now()[0]

    def now_and(self, read: Callable[[], T]) -> tuple[Snapshot, T]:
        """Such a snapshot, and what a function reads from the store at the same moment."""
        begun = self._store.writes_begun
        snapshot, writes = self._now()
        if writes == begun:  # if nothing is committed until all is read, there was only one moment
            found = read()
            if self._store.writes_begun == begun:
                return snapshot, found
        with self.moment() as snapshot:
            return snapshot, read()

    @contextmanager
    def moment(self) -> Iterator[Snapshot]:
        """Such a snapshot; all that this thread reads from the store inside is of the same moment."""
        with ExitStack() as moment:
            with self._reading:  # the moment begins inside, so that snapshots come to be in the order of their moments
                moment.enter_context(self._store.reading())
                snapshot, _ = self._follow()
            yield snapshot

    def forget(self) -> None:
        """Let go of what was read; the next search reads everything."""
        with self._reading:
            self._latest = None

    def _now(self) -> tuple[Snapshot, int]:
        latest = self._latest
        if latest is not None and latest[1] == self._store.writes:
            return latest
        with self._reading, self._store.reading():
            return self._follow()

    def _follow(self) -> tuple[Snapshot, int]:
        """The latest snapshot once it was compared with the file, as the file is at the store's moment."""
        writes, stamp = self._store.writes, self._store.stamp()
        snapshot = self.latest
        if snapshot is None or snapshot.stamp != stamp:
            segments, first = [], 0
            if snapshot is not None and snapshot.stamp.version == stamp.version:
                segments, first = list(snapshot.segments), snapshot.stamp.next_row
            snapshot = self._latest = None  # what is read anew does not stay beside the new, unless a search uses it
            snapshot = Snapshot(self._segments(segments, first, stamp), stamp)
        self._latest = snapshot, writes
        return self._latest

    def _segments(self, segments: list[Segment], first: int, stamp: Stamp) -> tuple[Segment, ...]:
        """What segments become, given those that had the rows up to ``first``; takes the list apart."""
        end = stamp.next_row
        added = self._store.count(range(first, end)) if end > first else 0
        if sum(map(len, segments)) + added != stamp.items:
            remaining = self._store.rows()
            segments[:] = [segment.without(remaining) for segment in segments]
        known = {segment.state.rows: segment for segment in segments}
        spans = [(segment.state.rows, len(segment)) for segment in segments] + [(range(first, end), added)]
        merged = merged_spans(spans) or [(range(end), 0)]
        kept = {rows: known[rows] for rows, count in merged if rows in known and not _worn(known[rows])}
        segments.clear()
        known.clear()
        made = tuple(
            kept[rows] if rows in kept else Segment(self._read(rows, few=number > 0 and count <= FEW).prepare())
            for number, (rows, count) in enumerate(merged)
        )
        if sum(map(len, made)) != stamp.items:
            raise CorruptIndexError(f"{self._store.path} has items whose rows were never given. {RESTORE}")
        return made


def merged_spans(spans: list[tuple[range, int]]) -> list[tuple[range, int]]:
    """Spans of rows with the number of their items, joined where one is small beside those that come after it.

    Small is ten times as many, and also what is compared one and all in any case.

    >>> merged_spans([(range(0, 50_000), 50_000), (range(50_000, 50_900), 900), (range(50_900, 51_000), 100)])
    [(range(0, 50000), 50000), (range(50000, 51000), 1000)]
    """
    merged: list[tuple[range, int]] = []  # from the last to the first
    spans = [span for span in spans if span[1]]
    for number, (rows, count) in reversed(list(enumerate(spans))):
        if merged and count <= max(FEW if number else 0, _GROWTH * merged[-1][1]):
            later, more = merged.pop()
            merged.append((range(rows.start, later.stop), count + more))
        else:
            merged.append((rows, count))
    return merged[::-1]


def _worn(segment: Segment) -> bool:
    """Whether so many of its items are deleted that it is better read anew."""
    return _GROWTH * (len(segment.state) - len(segment)) > len(segment.state)
