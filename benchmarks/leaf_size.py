"""Recall and speed of batch search on one thread, for several leaf sizes and numbers of candidates.

python -m benchmarks.leaf_size --data DIR --set debian --leaf-size 128 256 512 --candidates 6000 10000 14000
"""

import argparse
import os
import time
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # read when the libraries load
    os.environ[name] = "1"

import numpy as np

import semid_index as semid
from benchmarks import datasets
from benchmarks.main_job import recall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=datasets.DEFAULT_FOLDER)
    parser.add_argument("--set", default="debian", dest="name")
    parser.add_argument("--leaf-size", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--candidates", type=int, nargs="+", default=[6_000, 10_000, 14_000])
    parser.add_argument("--codebook-size", type=int, nargs="+", default=[256])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    data = datasets.load(arguments.name, arguments.data)
    sizes = arguments.codebook_size if len(arguments.codebook_size) > 1 else arguments.codebook_size * 4
    for leaf_size in arguments.leaf_size:
        with semid.create(
            dim=data.base.shape[1], metric=data.metric, levels=len(sizes), codebook_size=sizes, leaf_size=leaf_size
        ) as index:
            index.train(data.base)
            index.add(data.base)
            index.search(data.queries[0])
            leaves = index.stats()["leaves"]
            for candidates in arguments.candidates:
                probes = max(1, round(candidates * leaves / len(data.base)))
                show(index, data, leaf_size, leaves, probes, arguments.rounds)


def show(index, data, leaf_size: int, leaves: int, probes: int, rounds: int) -> None:
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        hits = index.search(data.queries, 10, probes=probes, threads=1)
        seconds.append(time.perf_counter() - started)
    found = recall(np.array(hits.ids), data.neighbours)
    rate = len(data.queries) / min(seconds)
    print(
        f"{data.name}: at most {leaf_size} items, {leaves} leaves, {probes} opened, {hits.trace.candidates:,.0f} "
        f"candidates, recall@10 {found:.4f}, {rate:,.0f} queries/s",
        flush=True,
    )


if __name__ == "__main__":
    main()
