"""An index under load for a long time: 80 % searches, 15 % upserts, 5 % deletes. Does it stay as quick and as small?

    python -m benchmarks.soak --minutes 60
    python -m benchmarks.soak --minutes 10 --items 50000 --dim 64 --threads 2

Upserts write batches of ``--batch`` items, half of them known; deletes take out as many as that adds. So the number of
items stays about the same, and so should memory, the file and the time of a search. ``compact()`` is called every
``--compact-every`` minutes (0: never). Private memory is read from /proc (Linux only). At the end the index is
verified, and every item is compared with what was written last.

Printed: the slope of memory and of the file's size, by least squares over the last three quarters of the time; and the
99th percentile of each kind of call in the first five minutes (a tenth of the time, if that is shorter) after a warm-up
as long, and in the last.
"""

import argparse
import json
import tempfile
import threading
import time
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import semid_index as semid

KINDS = "search", "upsert", "delete"
_MB = 1 << 20


@dataclass
class Load:
    """What is done to the index, and how it went."""

    index: semid.SemanticIndex
    dim: int
    batch: int
    seed: int
    written: dict[int, int] = field(default_factory=dict)
    """id -> the seed of its vector"""
    seconds: "dict[str, array[float]]" = field(default_factory=lambda: {kind: array("f") for kind in KINDS})
    """For each kind of call: when, since the start, and how long, in turn. Eight bytes a call: this is memory, too."""
    failures: list[BaseException] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def vectors(self, seeds: np.ndarray) -> np.ndarray:
        """A vector for each seed, around one of a thousand centres: (n, dim)."""
        centres = np.random.default_rng(1).standard_normal((1_000, self.dim), dtype=np.float32)
        noise = np.random.default_rng(2).standard_normal((4_096, self.dim), dtype=np.float32)
        return centres[seeds % 1_000] + 0.5 * noise[seeds * 7 % 4_096]

    def work(self, thread: int, started: float, end: float) -> None:
        try:
            self.calls(thread, started, end)
        except BaseException as error:  # else it would end with this thread, and nobody would know
            self.failures.append(error)

    def calls(self, thread: int, started: float, end: float) -> None:
        random = np.random.default_rng([self.seed, thread])
        while (now := time.perf_counter()) < end and not self.failures:
            kind = random.choice(KINDS, p=[0.80, 0.15, 0.05])
            if kind == "search":
                self.index.search(self.vectors(random.integers(1 << 40, size=1))[0], 10)
            else:
                with self.lock:  # so that what was written last is known
                    getattr(self, kind)(random)
            self.seconds[kind].extend((now - started, time.perf_counter() - now))

    def upsert(self, random: np.random.Generator) -> None:
        known = np.fromiter(self.written, dtype=np.int64)
        new = max(self.written, default=-1) + 1 + np.arange(self.batch - self.batch // 2)
        ids = np.concatenate([random.choice(known, self.batch // 2, replace=False), new])
        seeds = random.integers(1 << 40, size=len(ids))
        self.index.upsert(self.vectors(seeds), ids, metadata={"number": ids % 100})
        self.written.update(zip(ids.tolist(), seeds.tolist(), strict=True))

    def delete(self, random: np.random.Generator) -> None:
        ids = random.choice(np.fromiter(self.written, dtype=np.int64), 3 * (self.batch // 2), replace=False)
        assert self.index.delete(ids) == len(ids)
        for id in ids.tolist():
            del self.written[id]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--batch", type=int, default=50, help="items of one upsert")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compact-every", type=float, default=5.0, help="minutes; 0 for never")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the index goes; by default a folder that is removed")
    parser.add_argument("--json", type=Path, help="where the figures go, too")
    parser.add_argument("--samples", type=Path, help="a CSV file for memory and file size, second by second")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        figures = soak(arguments, (arguments.folder or Path(temporary)) / "soak.duckdb")
    for name, figure in figures.items():
        print(f"{name}: {figure}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


def soak(arguments: argparse.Namespace, path: Path) -> dict[str, object]:
    with semid.create(path, dim=arguments.dim, levels=3, codebook_size=64, overwrite=True) as index:
        load = Load(index, arguments.dim, arguments.batch, arguments.seed)
        seeds = np.random.default_rng(arguments.seed).integers(1 << 40, size=arguments.items)
        index.train(load.vectors(seeds))
        index.add(load.vectors(seeds), metadata={"number": np.arange(arguments.items) % 100})
        load.written = dict(enumerate(seeds.tolist()))
        started = time.perf_counter()
        end = started + 60 * arguments.minutes
        threads = [threading.Thread(target=load.work, args=(i, started, end)) for i in range(arguments.threads)]
        for thread in threads:
            thread.start()
        samples = np.array(watched(load, path, started, end, 60 * arguments.compact_every))
        for thread in threads:
            thread.join()
        if load.failures:
            raise load.failures[0]
        report = index.verify()
        assert report.ok, report
        check(load)
        index.compact()
        compacted = path.stat().st_size
    if arguments.samples:
        np.savetxt(arguments.samples, samples, fmt="%.1f", delimiter=",", header="seconds,private bytes,file bytes")
    return summary(load, samples, 60 * arguments.minutes) | {"file after compact()": f"{compacted / _MB:.1f} MB"}


def watched(
    load: Load, path: Path, started: float, end: float, compact_every: float
) -> list[tuple[float, float, float]]:
    """Seconds, bytes of private memory and bytes of the file, again and again; compacts now and then."""
    samples = []
    compacted = started
    while (now := time.perf_counter()) < end and not load.failures:
        log = path.with_name(path.name + ".wal")
        samples.append(
            (now - started, private_bytes(), path.stat().st_size + (log.stat().st_size if log.exists() else 0))
        )
        if compact_every and now - compacted > compact_every:
            load.index.compact()
            compacted = now
        time.sleep(min(1.0, max(0.01, end - time.perf_counter())))
    return samples


def check(load: Load) -> None:
    """Every item has the vector that was written last, and there are no others."""
    ids = np.fromiter(load.written, dtype=np.int64)
    assert len(load.index) == len(ids)
    for start in range(0, len(ids), 10_000):
        part = ids[start : start + 10_000]
        found = load.index.get(part, vectors=True)
        assert found["id"].to_pylist() == part.tolist()
        expected = load.vectors(np.array([load.written[id] for id in part.tolist()]))
        assert np.array_equal(np.stack(found["vector"].to_numpy(zero_copy_only=False)), expected)


def summary(load: Load, samples: np.ndarray, seconds: float) -> dict[str, object]:
    span = min(300.0, seconds / 10)
    late = samples[samples[:, 0] > seconds / 4]
    figures: dict[str, object] = {"minutes": round(seconds / 60, 1), "items at the end": len(load.written)}
    for name, column in (("memory", 1), ("file", 2)):
        slope = np.polyfit(late[:, 0], late[:, column], 1)[0] * 3_600 / _MB
        first, last = late[0, column] / _MB, late[-1, column] / _MB
        figures[name] = f"{first:.1f} MB -> {last:.1f} MB, slope {slope:+.1f} MB an hour"
    for kind, calls in load.seconds.items():
        when, took = np.array(calls).reshape(-1, 2).T
        first, last = took[(when > span) & (when <= 2 * span)], took[when > seconds - span]
        p99 = [f"{1_000 * np.quantile(part, 0.99):.1f}" if len(part) else "-" for part in (first, last)]
        p50 = 1_000 * np.quantile(took, 0.5)
        figures[kind] = f"{len(took):,} calls, p50 {p50:.1f} ms, p99 first {p99[0]} ms, last {p99[1]} ms"
    return figures


def private_bytes() -> float:
    """Memory of this process that no file stands behind."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1_024


if __name__ == "__main__":
    main()
