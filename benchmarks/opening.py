"""What it costs to make an index, and to open it: until it has answered its first search.

    python -m benchmarks.opening --data DIR                    # sift128
    python -m benchmarks.opening --rows 100000 --threads 1 2   # fewer vectors; on one core, and on two
    python -m benchmarks.opening --tiny                        # 2,000 rows of the bundled sample

Building: create, train and add, the file and all in it included, against training and filling FAISS's index of the same
task, which writes no file. Opening: the file is opened in a fresh process, and searched; what it needs is in the
system's memory, for it was read before. Each step is a process of its own, kept to so many cores, and they take turns;
each figure is the least of all rounds. Seconds of processor time are of all threads together. Hits are compared with
those of an exact search.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

K = 10
TIERS = ("float32", "float16", "int8")
FACTORY = "IVF4096,PQ64x4fs,RFlat"
SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "fast": {"codebook_size": [1024, 64, 256, 256], "leaf_size": 128},  # the shape of docs/decisions/0014
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the real sets")
    parser.add_argument("--tiny", action="store_true", help="2,000 rows of the bundled sample")
    parser.add_argument("--rows", type=int, help="only so many vectors")
    parser.add_argument("--tiers", nargs="+", choices=TIERS, default=list(TIERS), help="how vectors are stored")
    parser.add_argument("--shape", choices=SHAPES, default="default", help="levels and leaves")
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="processor cores to use")
    parser.add_argument("--factory", help=f"FAISS's index; by default {FACTORY}")
    parser.add_argument(
        "--only", choices=("build", "open"), help="only this part; the other runs once, as far as needed"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--step", choices=("build", "faiss", "open"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        print(json.dumps(STEPS[arguments.step](arguments)))
        return
    figures = compare(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


# -- one step, in a process of its own --------------------------------------------------------------------------------


def measured(work) -> dict[str, float]:
    """The time that a call takes, and the processor time of all threads meanwhile."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return {"s": time.perf_counter() - wall, "cpu s": time.process_time() - processor}


def dataset(arguments):
    from benchmarks import datasets

    found = datasets.load("sample" if arguments.tiny else "sift128", arguments.data or datasets.DEFAULT_FOLDER)
    rows = 2_000 if arguments.tiny else arguments.rows
    return found, found.base[:rows]


def build(arguments) -> dict[str, Any]:
    """An index in a file."""
    import semid_index as semid

    data, base = dataset(arguments)
    shape = {"codebook_size": 64} if arguments.tiny else SHAPES[arguments.shape]
    index = semid.create(
        arguments.file, dim=base.shape[1], metric=data.metric, vectors=arguments.tiers[0], overwrite=True, **shape
    )
    found = {"train": measured(lambda: index.train(base)), "add": measured(lambda: index.add(base))}
    found["close"] = measured(index.close)
    return {"parts": found, "total": total(found), "bytes per item": arguments.file.stat().st_size / len(base)}


def faiss(arguments) -> dict[str, Any]:
    """FAISS's index of the same task, in memory."""
    import faiss as library

    data, base = dataset(arguments)
    metric = library.METRIC_L2 if data.metric == "l2" else library.METRIC_INNER_PRODUCT
    index = library.index_factory(base.shape[1], factory(arguments), metric)
    found = {"train": measured(lambda: index.train(base)), "add": measured(lambda: index.add(base))}
    return {"parts": found, "total": total(found)}


def factory(arguments) -> str:
    return arguments.factory or ("IVF16,PQ32x4fs,RFlat" if arguments.tiny else FACTORY)


def open_and_search(arguments) -> dict[str, Any]:
    """Opening the file, the first search and the second; what importing the package takes belongs to opening."""
    import numpy as np

    queries = np.load(arguments.file.with_suffix(".npy"))
    opened = {}

    def open_file() -> None:
        import semid_index as semid

        opened["index"] = semid.open(arguments.file, read_only=True)

    def search(query) -> None:
        opened["result"] = opened["index"].search(query, K)

    found = {"open": measured(open_file), "first search": measured(lambda: search(queries[0]))}
    result = {"total": total(found), "second search": measured(lambda: search(queries[1]))}
    search(queries)
    ids = [[int(id) for id in row] for row in opened["result"].ids]
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {"parts": found, **result, "resident MB": resident / 1e6, "ids": ids}


def total(parts: dict[str, dict[str, float]]) -> dict[str, float]:
    return {unit: sum(part[unit] for part in parts.values()) for unit in ("s", "cpu s")}


STEPS = {"build": build, "faiss": faiss, "open": open_and_search}

# -- all steps --------------------------------------------------------------------------------------------------------


def compare(arguments) -> dict[str, Any]:
    """Figures of all steps, for each number of threads."""
    import numpy as np

    from semid_index.metrics import exact_search

    data, base = dataset(arguments)
    queries = data.queries[:100]
    truth = exact_search(queries, base, K, data.metric)[0]
    figures: dict[str, Any] = {"rows": len(base), "dim": base.shape[1], "shape": arguments.shape}
    with tempfile.TemporaryDirectory() as folder:
        files = {tier: Path(folder) / f"{tier}.duckdb" for tier in arguments.tiers}
        for file in files.values():
            np.save(file.with_suffix(".npy"), queries)
        for threads in arguments.threads:
            made = figures[f"{threads} threads"] = builds(arguments, files, threads)
            if arguments.only != "build":
                made |= openings(arguments, files, threads, truth)
    return figures


def builds(arguments, files: dict[str, Path], threads: int) -> dict[str, Any]:
    """Each tier and FAISS, in turn."""
    best: dict[str, Any] = {}
    for _ in range(1 if arguments.only == "open" else arguments.rounds):
        for tier, file in files.items():
            if arguments.only != "open" or not file.exists():
                keep_best(best, f"build {tier}", run(arguments, "build", threads, tier, file))
        if arguments.only != "open":
            keep_best(best, f"build {factory(arguments)}", run(arguments, "faiss", threads))
    if arguments.only != "open":
        theirs = best[f"build {factory(arguments)}"]["total"]
        for tier in files:
            mine = best[f"build {tier}"]
            mine["times FAISS's"] = {unit: mine["total"][unit] / theirs[unit] for unit in theirs}
    shown(best, threads)
    return best


def openings(arguments, files: dict[str, Path], threads: int, truth) -> dict[str, Any]:
    """Each tier, in turn."""
    best: dict[str, Any] = {}
    for _ in range(arguments.rounds):
        for tier, file in files.items():
            found = run(arguments, "open", threads, tier, file)
            hits = found.pop("ids")
            found["recall"] = sum(len(set(a) & set(b)) for a, b in zip(hits, truth.tolist(), strict=True)) / truth.size
            keep_best(best, f"open {tier}", found)
    shown(best, threads)
    return best


def keep_best(best: dict[str, Any], name: str, found: dict[str, Any]) -> None:
    """Of two runs the one that took less processor time: what other programs do changes it least."""
    if name not in best or found["total"]["cpu s"] < best[name]["total"]["cpu s"]:
        best[name] = found


def run(arguments, step: str, threads: int, tier: str = "float32", file: Path | None = None) -> dict[str, Any]:
    """One step in a fresh process that has so many cores."""
    command = [sys.executable, "-m", "benchmarks.opening", "--step", step, "--tiers", tier, "--shape", arguments.shape]
    command += ["--tiny"] if arguments.tiny else []
    for name in ("data", "rows", "factory"):
        if getattr(arguments, name) is not None:
            command += [f"--{name}", str(getattr(arguments, name))]
    command += ["--file", str(file)] if file else []
    cores = sorted(os.sched_getaffinity(0))[:threads]
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(len(cores))}
    done = subprocess.run(
        command,
        env=environment,
        cwd=Path(__file__).parent.parent,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def shown(figures: dict[str, Any], threads: int) -> None:
    for name, found in figures.items():
        print(f"{threads} threads, {name}: {json.dumps(rounded(found))}", flush=True)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return round(value, 4 if value < 1 else 2)


if __name__ == "__main__":
    sys.exit(main())
