"""All figures of docs/benchmarks.md, by one command; what is done already is not done again.

    python -m benchmarks.published --data FOLDER            # everything: expect 15 hours on 2 quiet cores
    python -m benchmarks.published --data FOLDER --quick    # fewer builds, rounds, sizes: expect 2 hours

(These are reckoned from the times of single steps.)

``FOLDER`` (or the environment variable SEMID_DATA) has the sets of benchmarks/datasets.py. Results go, as they come,
into ``--output`` (benchmarks/results/tmp), where a run that was stopped goes on; then the compact results, the plots of
docs/benchmarks and the page are written. ``--page`` only writes these again. ``--only`` names some of the steps.

It takes up to 40 GB of disk. Nothing else should run meanwhile: the page tells how much of the time other programs had
the processor.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import datasets
from semid_index.bench.command import draw_everything, run_referee, run_subjects
from semid_index.bench.data import Data, held_out, load_data, make_data
from semid_index.bench.page import RULINGS, read_folder
from semid_index.bench.referee import Rulings
from semid_index.bench.results import Results
from semid_index.bench.subject import Effort

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PLOTS = ROOT / "docs" / "benchmarks"
SETS = ("beauty", "mnist784", "debian", "sift128")
JUDGED = ("debian", "sift128")
BYTES = (4, 8, 16, 32, 64)
GROWN_DIM = 96
GROWN = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
GROWN_QUICK = (10_000, 30_000, 100_000)
LARGE_SUBJECTS = "semid-float32,semid-int8,faiss-ivf-pq,hnswlib,scann"
"""What is quick enough on a million rows."""
GROWN_SUBJECTS = "semid-float32,semid-int8,faiss-flat,faiss-ivf-pq,hnswlib"
GROWN_LARGE = 1_000_000  # above, a graph takes too long to build, and float32 rows too much memory
GROWN_LARGE_SUBJECTS = "semid-int8,faiss-ivf-pq"


def named(name: str, folder: Path) -> Data:
    """One of the real sets, as the harness wants it."""
    if name == "beauty":
        return held_out("beauty", "cosine", datasets.beauty(folder)[0], datasets.HELD_OUT)
    found = datasets.load(name, folder)
    return make_data(name, found.metric, found.base, found.queries)


def steps(folder: Path, output: Path, *, quick: bool) -> dict[str, Callable[[], object]]:
    """Everything that is to be done: name -> what does it."""

    def search(load: Callable[[], Data], subjects: str | None, threads: str, effort: Effort) -> Callable[[], object]:
        return lambda: run_subjects(load(), output, subjects=subjects, threads=threads, effort=effort, say=say)

    planned: dict[str, Callable[[], object]] = {}
    for name in SETS:
        subjects = LARGE_SUBJECTS if quick and name == "sift128" else None
        planned[name] = search(
            lambda name=name: named(name, folder), subjects, *(("1", "quick") if quick else ("1,all", "full"))
        )
    for name in JUDGED[:1] if quick else JUDGED:
        planned[f"bytes-{name}"] = lambda name=name: run_referee(
            named(name, folder), output, BYTES[:3] if quick else BYTES, kinds=None, fresh=False, say=say
        )
    for rows in GROWN_QUICK if quick else GROWN:
        subjects = GROWN_SUBJECTS if rows <= GROWN_LARGE else GROWN_LARGE_SUBJECTS
        source = f"generated-{rows}x{GROWN_DIM}"
        planned[source] = search(lambda source=source: load_data(source, metric="l2"), subjects, "1", "quick")
    return planned


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def publish(output: Path) -> None:
    """Compact results, plots and the page."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    PLOTS.mkdir(parents=True, exist_ok=True)
    results, rulings = read_folder(output)
    for one in results:
        one.compact([point for race in one.races for point in race.contestants]).save(
            RESULTS / f"{one.data['name']}.json"
        )
    for one in rulings:
        one.save(RESULTS / f"{one.data['name']}{RULINGS}")
    published: tuple[list[Results], list[Rulings]] = read_folder(RESULTS)
    for path in draw_everything(*published, PLOTS):
        say(f"drew {path.name}")
    say("now: python docs/generate.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=datasets.DEFAULT_FOLDER, help="the folder with the real sets")
    parser.add_argument("--output", type=Path, default=RESULTS / "tmp", help="where the run is kept")
    parser.add_argument("--quick", action="store_true", help="fewer builds, rounds and sizes")
    parser.add_argument("--only", nargs="*", help="only these steps, such as debian bytes-debian")
    parser.add_argument("--page", action="store_true", help="run nothing: only write the page of what there is")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    planned = steps(arguments.data, arguments.output, quick=arguments.quick)
    if unknown := [name for name in arguments.only or () if name not in planned]:
        parser.error(f"there is no step '{unknown[0]}'; there are {', '.join(planned)}")
    for name, work in planned.items():
        if not arguments.page and (not arguments.only or name in arguments.only):
            work()
    publish(arguments.output)


if __name__ == "__main__":
    main()
