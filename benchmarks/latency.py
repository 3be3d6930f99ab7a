"""How long one query takes, and what a second thread brings, as a user sees it: through ``index.search``.

    python -m benchmarks.latency --data DIR [--set debian] [--rounds 7] [--json FILE]

Single queries: ours with its defaults, and with the fewest probes and re-ranked items that reach a recall@10 of .95;
beside FAISS's quickest index for CPUs (IVF-PQ fast scan with exact refining), tuned in the same way and called
directly. All on one thread. Each round puts every query to every subject, in turn; of each subject the round with the
least median counts, which suffers least from what else the machine does. Threads: batches, with one and with two.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.speed import LEAF_SIZES, PEERS, PROBED, SHAPES

TARGET = 0.95
SHARES = [0.02, 0.03, 0.04, 0.05, 0.07, 0.09, 0.12, 0.15, 0.18, 0.22, 0.3]
RERANKED = [25, 40, 60, 100]
FACTORS = [3, 4, 6, 10]
QUERIES = 1_000
K = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the real sets")
    parser.add_argument("--set", action="append", dest="sets", help="only this set; may be repeated")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--tiny", action="store_true", help="on some of the bundled sample")
    arguments = parser.parse_args()
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # read when the libraries load
        os.environ[name] = "1"
    from benchmarks import datasets

    figures = {}
    for name in ["sample"] if arguments.tiny else arguments.sets or ["debian", "sift128"]:
        dataset = datasets.load(name, arguments.data or datasets.DEFAULT_FOLDER)
        if arguments.tiny:
            dataset = datasets.tiny(dataset)
        figures[name] = compare(dataset, arguments.rounds)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def compare(dataset, rounds: int) -> dict[str, dict[str, float]]:
    """Print and return the microseconds of a single query, and the queries per second of one and two threads."""
    queries = dataset.queries[:QUERIES]
    with tempfile.TemporaryDirectory() as folder, _ours(dataset, Path(folder) / "searched.duckdb") as index:
        settings = _tuned_ours(index, dataset)
        found, one_by_one = {}, {}
        for label, options in (("ours, tuned", settings), ("ours, defaults", {})):
            hits = index.search(dataset.queries, K, threads=1, **options)
            found[label] = _recall(hits.ids, dataset.neighbours), str(options)
            one_by_one[label] = _searching(index, options)
        faiss_search, recall, setting = _tuned_faiss(dataset)
        found["FAISS, tuned"], one_by_one["FAISS, tuned"] = (recall, setting), faiss_search
        micros = _latencies(one_by_one, queries, rounds)
        threads = _threads(index, dataset.queries, settings, rounds)
    figures = {}
    for label, (recall, setting) in found.items():
        figures[label] = {"recall@10": round(recall, 4), "setting": setting, **micros[label]}
        print(
            f"{dataset.name:8} {label:15} {recall:.4f}  p50 {micros[label]['p50']:6.1f} us  "
            f"p99 {micros[label]['p99']:6.1f} us  {setting}",
            flush=True,
        )
    figures["batch"] = threads
    print(f"{dataset.name:8} batch: two threads {threads['ratio']:.2f} x as fast as one", flush=True)
    return figures


def _ours(dataset, path: Path):
    import semid_index as semid

    shape = SHAPES[dataset.name]
    options = {"levels": len(shape), "codebook_size": shape, "leaf_size": LEAF_SIZES[dataset.name]}
    index = semid.create(path, dim=dataset.base.shape[1], metric=dataset.metric, **options)
    index.train(dataset.base)
    index.add(dataset.base)
    return index


def _searching(index, options: dict[str, int]) -> Callable:
    return lambda query: index.search(query, K, threads=1, **options).ids


def _tuned_ours(index, dataset) -> dict[str, int]:
    """Of the settings that reach the target, the quickest by processor time."""

    def batch(options):
        return index.search(dataset.queries, K, threads=1, **options).ids

    leaves = index.explain(dataset.queries[0]).leaves
    probes = sorted({max(1, round(share * leaves)) for share in [*SHARES, 1.0]})
    return _quickest(batch, ([{"probes": p, "rerank": r} for p in probes] for r in RERANKED), dataset.neighbours)[0]


def _tuned_faiss(dataset) -> tuple[Callable, float, str]:
    """FAISS at its quickest setting that reaches the target: how it searches for one query, its recall, and which."""
    import faiss
    import numpy as np

    faiss.omp_set_num_threads(1)
    flat = faiss.IndexFlatL2(dataset.base.shape[1])
    flat.add(dataset.base)
    made = {}
    for factory in PEERS[dataset.name]:
        index = faiss.index_factory(dataset.base.shape[1], factory)
        rows = np.random.default_rng(0).permutation(len(dataset.base))[: 64 * index.nlist]
        index.train(dataset.base[np.sort(rows)])
        index.add(dataset.base)
        made[factory] = index, faiss.IndexRefine(index, flat)

    def chosen(options):
        factory, probes, factor = options
        index, refined = made[factory]
        index.nprobe, refined.k_factor = probes, factor
        return refined

    probed = PROBED.get(dataset.name, [4, 8, 16, 32, 64])
    ladders = ([(factory, p, factor) for p in probed] for factory in made for factor in FACTORS)
    options, recall = _quickest(lambda o: chosen(o).search(dataset.queries, K)[1], ladders, dataset.neighbours)
    refined = chosen(options)
    factory, probes, factor = options
    return lambda query: refined.search(query[None], K)[1], recall, f"{factory}, nprobe {probes}, k_factor {factor}"


def _quickest(search: Callable, ladders: Iterable[list], neighbours) -> tuple:
    """The quickest setting that reaches the target, and its recall; each ladder is climbed until it does.

    If none reaches it, the one with the highest recall.
    """
    reached, best, highest = [], None, -1.0
    for ladder in ladders:
        for options in ladder:
            started = time.thread_time()
            found = search(options)
            seconds = time.thread_time() - started
            recall = _recall(found, neighbours)
            if recall > highest:
                best, highest = options, recall
            if recall >= TARGET:
                reached.append((seconds, recall, options))
                break
    if reached:
        _, highest, best = min(reached, key=lambda row: row[0])
    return best, highest


def _latencies(subjects: dict[str, Callable], queries, rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds of wall time for one query: those of the round with the least median."""
    import numpy as np

    best: dict[str, np.ndarray] = {}
    for _ in range(rounds):
        for label, search in subjects.items():
            search(queries[0])
            micros = []
            for query in queries:
                started = time.perf_counter_ns()
                search(query)
                micros.append((time.perf_counter_ns() - started) / 1e3)
            if label not in best or np.median(micros) < np.median(best[label]):
                best[label] = np.array(micros)
    return {
        label: {f"p{share}": round(float(np.percentile(micros, share)), 1) for share in (50, 99)}
        for label, micros in best.items()
    }


def _threads(index, queries, options: dict[str, int], rounds: int) -> dict[str, float]:
    """Queries per second in batches, with one thread and with two, in turn; the best rounds."""
    best = {1: 0.0, 2: 0.0}
    for _ in range(rounds):
        for threads in best:
            started = time.perf_counter()
            index.search(queries, K, threads=threads, **options)
            best[threads] = max(best[threads], len(queries) / (time.perf_counter() - started))
    return {"1": round(best[1]), "2": round(best[2]), "ratio": round(best[2] / best[1], 3)}


def _recall(found, neighbours) -> float:
    import numpy as np

    return float((np.array(found)[:, :, None] == neighbours[:, None, :]).any(axis=1).mean())


if __name__ == "__main__":
    main()
