"""Queries per second of the native scan beside FAISS's quickest index for CPUs, at equal recall, in one process.

    python -m benchmarks.speed --data DIR [--set debian] [--rounds 5]

FAISS: IVF-PQ fast scan with exact refining, at several shapes, probes and refine factors. Both use one thread; subjects
run in turn, and the least processor time of each counts, which suffers least from what else the machine does. Of each
the quickest setting with at least a recall@10 of .90, .95, .98 and .99 is compared.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

SHAPES = {"sift128": [1024, 64, 256, 256], "debian": [256] * 4, "mnist784": [256] * 4, "sample": [64] * 4}
LEAF_SIZES = {"sift128": 128, "debian": 128, "mnist784": 128, "sample": 64}
PEERS = {
    "sift128": ["IVF4096,PQ64x4fs"],
    "debian": ["IVF256,PQ96x4fs", "IVF512,PQ96x4fs"],
    "mnist784": ["IVF256,PQ98x4fs", "IVF512,PQ98x4fs"],
    "sample": ["IVF64,PQ96x4fs"],
}
PROBED = {
    "sift128": [32, 44, 48, 64, 68, 72, 80, 96, 128, 136, 192, 256],
    "debian": [16, 24, 48, 64, 96, 128, 200],
    "mnist784": [4, 6, 8, 12, 16, 24],
}
FACTORS = {"sift128": [4, 6, 10, 20]}
SHARES = {"sift128": [0.012, 0.015, 0.017, 0.02, 0.022, 0.028, 0.04, 0.055, 0.08]}
OTHER_SHARES = [0.012, 0.017, 0.022, 0.028, 0.04, 0.07, 0.12, 0.17, 0.22, 0.3, 0.5]
RERANKED = {"sift128": [40, 60, 80, 120, 200]}
LEVELS = (0.90, 0.95, 0.98, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the real sets")
    parser.add_argument("--set", action="append", dest="sets", help="only this set; may be repeated")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # read when the libraries load
        os.environ[name] = "1"
    from benchmarks import datasets

    for name in arguments.sets or ["mnist784", "debian", "sift128"]:
        compare(datasets.load(name, arguments.data or datasets.DEFAULT_FOLDER), arguments.rounds)


def compare(dataset, rounds: int) -> None:
    """Print the settings that matter, and the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        subjects = {**_ours(dataset, Path(folder)), **_faiss(dataset)}
        found = {}
        seconds = dict.fromkeys(subjects, float("inf"))
        for _ in range(rounds):
            for label, search in subjects.items():
                started = time.thread_time()
                rows = search()
                seconds[label] = min(seconds[label], time.thread_time() - started)
                found.setdefault(label, _recall(rows, dataset.neighbours))
    micros = {label: 1e6 * seconds[label] / len(dataset.queries) for label in subjects}
    for level in LEVELS:
        best = {}
        for who in ("ours", "faiss"):
            enough = [label for label in subjects if label[0] == who and found[label] >= level]
            if enough:
                best[who] = min(enough, key=micros.__getitem__)
        if len(best) == 2:
            for label in best.values():
                print(f"{dataset.name:9} {level:.2f}  {found[label]:.4f}  {micros[label]:6.1f} us  {label}", flush=True)
            print(f"{dataset.name:9} {level:.2f}  ours is {micros[best['faiss']] / micros[best['ours']]:.2f} x as fast")


def _ours(dataset, folder: Path) -> dict[tuple[object, ...], Callable]:
    import semid_index as semid
    from semid_index.index import SemanticIndex

    path, shape = folder / "searched.duckdb", SHAPES[dataset.name]
    options = {"levels": len(shape), "codebook_size": shape, "leaf_size": LEAF_SIZES[dataset.name]}
    dim = dataset.base.shape[1]
    index: SemanticIndex = semid.create(path, dim=dim, metric=dataset.metric, vectors="float16", **options)
    index.train(dataset.base)
    index.add(dataset.base)
    trace = index.explain(dataset.queries[0])
    memory = {name: round(size / len(index), 1) for name, size in index.stats()["memory_bytes"].items()}
    print(f"{dataset.name}: {trace.executor}, {trace.leaves:,} leaves; bytes per item: {memory}", flush=True)

    def search(probes: int, rerank: int):
        import numpy as np

        return np.array(index.search(dataset.queries, 10, probes=probes, rerank=rerank, threads=1).ids)

    chosen = sorted({max(1, round(share * trace.leaves)) for share in SHARES.get(dataset.name, OTHER_SHARES)})
    reranked = RERANKED.get(dataset.name, [25, 40, 60, 100])
    return {("ours", probes, rerank): partial(search, probes, rerank) for probes in chosen for rerank in reranked}


def _faiss(dataset) -> dict[tuple[object, ...], Callable]:
    import faiss
    import numpy as np

    base, queries = dataset.base, dataset.queries
    flat = faiss.IndexFlatL2(base.shape[1])
    flat.add(base)
    subjects: dict[tuple[object, ...], Callable] = {}
    for factory in PEERS[dataset.name]:
        index = faiss.index_factory(base.shape[1], factory)
        rows = np.sort(np.random.default_rng(0).choice(len(base), min(len(base), 64 * index.nlist), replace=False))
        index.train(base[rows])
        index.add(base)
        refined = faiss.IndexRefine(index, flat)

        def search(probes: int, factor: int, index=index, refined=refined):
            index.nprobe, refined.k_factor = probes, factor
            return refined.search(queries, 10)[1]

        for probes in PROBED.get(dataset.name, [4, 8, 16]):
            for factor in FACTORS.get(dataset.name, [3, 4, 6, 10]):
                subjects["faiss", factory, probes, factor] = partial(search, probes, factor)
    return subjects


def _recall(found, neighbours) -> float:
    return float((found[:, :, None] == neighbours[:, None, :]).any(axis=1).mean())


if __name__ == "__main__":
    main()
