"""Speed, memory and bytes of the main job: train, encode, build, open, search; beside FAISS doing the same work.

    python -m benchmarks.main_job --data DIR                 # everything, on debian and sift128
    python -m benchmarks.main_job --data DIR search          # one part
    python -m benchmarks.main_job --tiny                     # everything, on 2,000 rows of the bundled sample

Two things that are compared run in turn in one process, several rounds each; medians, their spread and the ratio are
printed. ``--threads 1`` holds FAISS and BLAS to one thread. Machines are noisy: believe ratios, not seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help="default: all")
    parser.add_argument("--data", type=Path, help="folder with the real sets")
    parser.add_argument("--tiny", action="store_true", help="2,000 rows of the bundled sample")
    parser.add_argument("--threads", type=int, help="threads for FAISS and BLAS; default: all cores")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", action="append", dest="sets", help="only this set; may be repeated")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    if arguments.threads:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # read when the libraries load
            os.environ[name] = str(arguments.threads)
    from benchmarks import datasets

    figures: dict[str, object] = {}
    for part in arguments.parts or PARTS:
        for name in ["sample"] if arguments.tiny else arguments.sets or SETS[part]:
            dataset = datasets.load(name, arguments.data or datasets.DEFAULT_FOLDER)
            dataset = datasets.tiny(dataset) if arguments.tiny else dataset
            found = PARTS[part](dataset, arguments)
            figures[f"{part} {name}"] = found
            print(f"{part:8} {name:9} {json.dumps(found)}", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1))


def in_turn(rounds: int, **subjects: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each subject, A B A B ..., after one run of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in subjects}
    for round_ in range(rounds + 1):
        for name, subject in subjects.items():
            started = time.perf_counter()
            subject()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def summary(seconds: Iterable[float]) -> dict[str, float]:
    """Median, least and largest, in seconds."""
    values = list(seconds)
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def ratio(ours: list[float], theirs: list[float]) -> float:
    """Median over rounds of our time divided by theirs."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def train(dataset, arguments):
    """`rq` 4 levels against FAISS k-means called directly, level after level, with the same points and settings."""
    from semid_index.quantizers.kmeans import import_faiss
    from semid_index.quantizers.rq import ResidualKMeans

    faiss = import_faiss()
    size = 64 if arguments.tiny else 256
    points = dataset.base[:65_536]

    def ours() -> None:
        ResidualKMeans(levels=4, codebook_size=size).fit(points, seed=0)

    def theirs() -> None:
        residuals = points.copy()
        for level in range(4):
            kmeans = faiss.Kmeans(
                points.shape[1], size, niter=20, seed=level, min_points_per_centroid=1,
                init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
            )  # fmt: skip
            kmeans.train(residuals)
            _, chosen = kmeans.index.search(residuals, 1)
            residuals -= kmeans.centroids[chosen[:, 0]]

    seconds = in_turn(arguments.rounds, ours=ours, faiss=theirs)
    return {
        "rows": len(points),
        "ours": summary(seconds["ours"]),
        "faiss": summary(seconds["faiss"]),
        "ratio": ratio(seconds["ours"], seconds["faiss"]),
    }


def encode(dataset, arguments):
    """Rows per second of greedy encoding, 4 levels."""
    from semid_index.quantizers.rq import ResidualKMeans

    quantizer = ResidualKMeans(levels=4, codebook_size=64 if arguments.tiny else 256).fit(dataset.base[:65_536], seed=0)
    rows = dataset.base[:100_000]
    seconds = in_turn(arguments.rounds, ours=lambda: quantizer.encode(rows))["ours"]
    return {"rows": len(rows), "rows per second": int(len(rows) / statistics.median(seconds)), **summary(seconds)}


def build(dataset, arguments):
    """Vectors into a file: seconds of training and adding, peak memory beyond the input, bytes per item of the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "built.duckdb"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        with make(dataset, path, arguments) as (index, seconds):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            columns = {name: round(size / len(index), 2) for name, size in index.stats()["file_column_bytes"].items()}
        return {
            "rows": len(dataset.base),
            **seconds,
            "peak GB beyond what was there": round((peak - before) / 1e9, 2),
            "file bytes per item": round(path.stat().st_size / len(dataset.base), 1),
            "data blocks per item": columns,
        }


def open_(dataset, arguments):
    """Open and search once in a new process, with and without stored vectors."""
    found = {}
    for tier in ("none", "float32"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "built.duckdb"
            with make(dataset, path, arguments, vectors=tier):
                pass
            program = (
                "import sys, time, numpy, json; t0 = time.perf_counter(); import semid_index as semid\n"
                f"index = semid.open({str(path)!r}); t1 = time.perf_counter()\n"
                f"hits = index.search(numpy.zeros({dataset.base.shape[1]}, 'f') + 1); t2 = time.perf_counter()\n"
                "print(json.dumps({'open': t1 - t0, 'first search': t2 - t1, 'second search': None}))"
            ).replace("'second search': None", "'hits': len(hits)")
            output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
            found[tier] = {name: round(value, 3) for name, value in json.loads(output).items()}
    return found


def search(dataset, arguments):
    """Batch search at several efforts, against FAISS's IVF-PQ fast scan with exact refining, in turn."""
    import numpy as np

    from semid_index.quantizers.kmeans import import_faiss

    faiss = import_faiss()
    base, queries = dataset.base, dataset.queries
    lists, parts = (64, base.shape[1] // 4) if arguments.tiny else PEER[dataset.name]
    peer = faiss.index_factory(base.shape[1], f"IVF{lists},PQ{parts}x4fs")
    started = time.perf_counter()
    peer.train(base[np.sort(np.random.default_rng(0).choice(len(base), min(len(base), 64 * lists), replace=False))])
    peer.add(base)
    found = {
        "faiss build": round(time.perf_counter() - started, 1),
        "rows": len(base),
        "threads": arguments.threads or os.cpu_count(),
    }

    def faiss_search(probes: int, refined: int) -> np.ndarray:
        peer.nprobe = probes
        _, rows = peer.search(queries, refined)
        exact = np.empty(rows.shape, dtype=np.float32)
        faiss.fvec_L2sqr_by_idx(*(faiss.swig_ptr(a) for a in (exact, queries, base, rows)), base.shape[1], *rows.shape)
        exact[rows < 0] = np.inf
        best = np.argpartition(exact, 9, axis=1)[:, :10]
        return np.take_along_axis(rows, best, axis=1)

    with tempfile.TemporaryDirectory() as folder:
        for shape in SHAPES.get(dataset.name, [256]) if not arguments.tiny else [32]:
            path = Path(folder) / "searched.duckdb"
            with make(dataset, path, arguments, codebook_size=shape) as (index, seconds):
                index.search(queries[:10])  # loads what searching needs

                def ours(probes: int, index=index) -> np.ndarray:
                    return np.array(index.search(queries, 10, probes=probes, threads=arguments.threads).ids)

                usual = index.explain(queries[0]).probed
                subjects: dict[str, Callable[[], np.ndarray]] = {}
                for probes in [8] if arguments.tiny else PROBES[dataset.name]:
                    subjects[f"faiss nprobe={probes}"] = partial(faiss_search, probes, 100)
                for share in (0.5, 0.75, 1.0, 1.5):
                    probes = max(1, int(share * usual))
                    subjects[f"ours probes={probes}"] = partial(ours, probes)
                timed = in_turn(arguments.rounds, **subjects)
                rows = {
                    name: {
                        "recall@10": round(recall(subjects[name](), dataset.neighbours), 4),
                        "QPS": int(len(queries) / statistics.median(timed[name])),
                        "QPS spread": [int(len(queries) / max(timed[name])), int(len(queries) / min(timed[name]))],
                    }
                    for name in subjects
                }
                found[f"codebooks {shape}"] = {"build": seconds, "leaves": index.stats()["leaves"], **rows}
                found[f"codebooks {shape}"]["memory bytes per item"] = {
                    name: round(size / len(base), 2) for name, size in index.stats()["memory_bytes"].items()
                }
                for name, row in rows.items():
                    print(f"         {dataset.name} {shape} {name:22} {row}", file=sys.stderr, flush=True)
    return found


def imports(dataset, arguments):
    """Seconds of `import semid_index`, and of `import numpy` alone, in new processes."""

    def run(module: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", f"import {module}"], check=True)

    seconds = in_turn(
        arguments.rounds,
        python=run("sys"),
        numpy=run("numpy"),
        semid_index=run("semid_index"),
        index=run("semid_index.index"),
    )
    return {name: summary(values) for name, values in seconds.items()}


def recall(found, neighbours) -> float:
    """The mean share of true neighbours that were found."""
    return float((found[:, :, None] == neighbours[:, None, :]).any(axis=1).mean())


class make:  # noqa: N801 - reads as a verb where it is used
    """A context that builds an index file of a data set, and gives it with the seconds that each step took."""

    def __init__(self, dataset, path, arguments, **options) -> None:
        import semid_index as semid

        shape = {"codebook_size": 64 if arguments.tiny else 256} | options
        started = time.perf_counter()
        self._index = semid.create(path, dim=dataset.base.shape[1], metric=dataset.metric, overwrite=True, **shape)
        self._index.train(dataset.base)
        trained = time.perf_counter()
        self._index.add(dataset.base)
        added = time.perf_counter()
        self._seconds = {
            "train": round(trained - started, 1),
            "add": round(added - trained, 1),
            "total": round(added - started, 1),
        }

    def __enter__(self):
        return self._index, self._seconds

    def __exit__(self, *_: object) -> None:
        self._index.close()


PARTS = {"train": train, "encode": encode, "build": build, "open": open_, "search": search, "import": imports}
SETS = {
    "train": ["debian", "sift128"],
    "encode": ["debian", "sift128"],
    "build": ["debian", "sift128"],
    "open": ["sift128"],
    "search": ["debian", "sift128"],
    "import": ["sample"],
}
PEER = {"sift128": (4096, 64), "debian": (256, 96), "mnist784": (256, 98)}  # lists and 4-bit codes, the best found
PROBES = {"sift128": [48, 64, 96], "debian": [32, 64, 96], "mnist784": [8, 16]}
SHAPES = {"sift128": [256, [4096, 256, 256, 256]]}

if __name__ == "__main__":
    main()
