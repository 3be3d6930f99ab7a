"""Balanced k-means beside plain k-means and its alternatives: squared error, sizes of clusters, seconds, memory.

    python -m benchmarks.balanced --data DIR                   # everything, on debian, debian100k and sift128
    python -m benchmarks.balanced --data DIR kmeans --set debian -k 4096
    python -m benchmarks.balanced --tiny                       # everything, on 2,000 rows of the bundled sample

Parts: ``kmeans`` (one level), ``rounds`` (what prices and more rounds are worth), ``codes`` (a whole quantizer and
``encode_within``), ``oracle`` (small cases beside the optimal assignment), ``copies`` (many identical points), ``flow``
(20,000 rows beside k-means-constrained, if installed: takes minutes).
``debian100k`` is debian with 38,334 of its rows drawn again, each with Gaussian noise of 0.01 on every dimension;
``sift1m`` is sift128 filled up to 1,000,000 rows in the same way, with noise of 1.

Errors are ratios to k-means by FAISS on all rows, 20 iterations. Seconds are medians of runs taken in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import numpy as np

from benchmarks import datasets
from semid_index.quantizers import balanced_rq
from semid_index.quantizers.balanced_rq import BalancedResidualKMeans, assign_with_room, balanced_kmeans
from semid_index.quantizers.kmeans import import_faiss, kmeans, nearest
from semid_index.quantizers.rq import ResidualKMeans


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], help="default: all")
    parser.add_argument("--data", type=Path, default=datasets.DEFAULT_FOLDER, help="folder with the real sets")
    parser.add_argument("--tiny", action="store_true", help="2,000 rows of the bundled sample, 16 clusters")
    parser.add_argument("--set", action="append", dest="sets", help="only this set; may be repeated")
    parser.add_argument("-k", type=int, default=256, help="clusters")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    k = 16 if arguments.tiny else arguments.k
    for part in arguments.parts or PARTS:
        for name in ["sample"] if arguments.tiny else arguments.sets or SETS[part]:
            points = vectors_of(name, arguments.data)[: 2_000 if arguments.tiny else None]
            for row in PARTS[part](points, k, arguments.runs):
                print(f"{part:7} {name:10} n={len(points)} k={k} {json.dumps(row)}", flush=True)


def vectors_of(name: str, folder: Path) -> np.ndarray:
    """The rows to cluster, queries held out."""
    if name == "debian100k":
        base = vectors_of("debian", folder)
        rng = np.random.default_rng(0)
        again = base[rng.choice(len(base), 100_000 - len(base), replace=False)]
        return np.concatenate([base, again + rng.normal(scale=0.01, size=again.shape).astype(np.float32)])
    if name == "sift128":
        return np.load(folder / "sift128.base.u8.npy").astype(np.float32)
    if name == "sift1m":
        base = vectors_of("sift128", folder)
        rng = np.random.default_rng(0)
        again = base[rng.choice(len(base), 1_000_000 - len(base), replace=False)]
        return np.concatenate([base, again + rng.normal(size=again.shape).astype(np.float32)])
    return datasets.load(name, folder).base


# ------------------------------------------------------------------------------------------------ parts


def one_level(points: np.ndarray, k: int, runs: int) -> list[dict[str, object]]:
    """Plain, balanced, and (on sets that are not too large) OneRec's way."""
    kmeans(points[: 10 * k], k, seed=0)  # loads FAISS
    forget_peak()
    before = memory_mb("VmRSS")
    balanced_kmeans(points, k, seed=0)
    extra = memory_mb("VmHWM") - before
    methods: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
        "plain, all rows": lambda: plain_kmeans(points, k),
        "plain, 256 rows a cluster": lambda: with_nearest(points, kmeans(points, k, seed=1)),
        "balanced": lambda: balanced_kmeans(points, k, seed=1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    results = {}
    for _ in range(runs):
        for name, method in methods.items():
            started = time.perf_counter()
            results[name] = method()
            seconds[name].append(time.perf_counter() - started)
    if len(points) * k <= 20_000_000:
        started = time.perf_counter()
        results["OneRec, 10 sweeps"] = onerec_kmeans(points, k, sweeps=10)
        seconds["OneRec, 10 sweeps"] = [time.perf_counter() - started]
    unit = squared_error(points, *results["plain, all rows"])
    rows = [
        {"method": name, "seconds": round(statistics.median(seconds[name]), 2)} | figures(points, *result, unit)
        for name, result in results.items()
    ]
    centroids, _ = results["balanced"]
    rows.append({"method": "balanced, then nearest"} | figures(points, *with_nearest(points, centroids), unit))
    ratios = [mine / its for mine, its in zip(seconds["balanced"], seconds["plain, all rows"], strict=True)]
    return [
        *rows,
        {"time of balanced / plain": round(statistics.median(ratios), 2), "MB beyond the rows": round(extra)},
    ]


def rounds(points: np.ndarray, k: int, runs: int) -> list[dict[str, object]]:
    """Error by number of rounds, with prices and with quotas alone."""
    unit = squared_error(points, *plain_kmeans(points, k))
    rows = []
    for iterations in (1, 5, 10, 20, 40):
        with patch.object(balanced_rq, "_FIRST_STEP", 1e-12), patch.object(balanced_rq, "_LAST_STEP", 1e-12):
            quotas_only = balanced_kmeans(points, k, seed=1, iterations=iterations)
        with_prices = balanced_kmeans(points, k, seed=1, iterations=iterations)
        errors = {
            name: round(squared_error(points, *result) / unit, 4)
            for name, result in (("with prices", with_prices), ("quotas only", quotas_only))
        }
        rows.append({"iterations": iterations} | errors)
    return rows


def codes(points: np.ndarray, k: int, runs: int) -> list[dict[str, object]]:
    """Largest code of each level and error of a quantizer of three levels: rq, nearest, and within 1.05."""
    plain = ResidualKMeans(3, k).fit(points, seed=1)
    balanced = BalancedResidualKMeans(3, k, capacity=1.05).fit(points, seed=1)
    counts = [np.zeros(size, dtype=np.int64) for size in balanced.codebook_sizes]
    within = []
    for batch in np.array_split(points, 10):
        within.append(balanced.encode_within(batch, counts))
        for level, taken in enumerate(counts):
            taken += np.bincount(within[-1][:, level], minlength=k)
    rows = []
    for name, quantizer, encoded in (
        ("rq", plain, plain.encode(points)),
        ("balanced-rq", balanced, balanced.encode(points)),
        ("balanced-rq within 1.05, 10 batches", balanced, np.concatenate(within)),
    ):
        largest = [round(float(share(encoded[:, level], k).max()), 2) for level in range(3)]
        error = float(np.square(points - quantizer.decode(encoded), dtype=np.float64).sum())
        rows.append({"codes": name, "largest of each level": largest, "error": error, "distinct": distinct(encoded)})
    return [row | {"error": round(row["error"] / rows[0]["error"], 4)} for row in rows]


def oracle(points: np.ndarray, k: int, runs: int) -> list[dict[str, object]]:
    """400 rows, 8 clusters: the error beside that of the best assignment to the same centroids."""
    from scipy.optimize import linear_sum_assignment

    rows = []
    for seed in range(4):
        few = points[np.random.default_rng(seed).choice(len(points), 400, replace=False)]
        centroids, assigned = balanced_kmeans(few, 8, seed=seed)
        costs = np.square(few[:, None, :] - centroids[None]).sum(axis=2, dtype=np.float64).repeat(50, axis=1)
        best = costs[linear_sum_assignment(costs)].sum()
        greedy = assign_with_room(few, centroids, np.full(8, 50)).codes
        ratios = {
            "with prices / best": round(squared_error(few, centroids, assigned) / best, 4),
            "quotas only / best": round(squared_error(few, centroids, greedy) / best, 4),
        }
        rows.append({"seed": seed} | ratios)
    return rows


def copies(points: np.ndarray, k: int, runs: int) -> list[dict[str, object]]:
    """Half of the rows replaced by one and the same: seconds beside plain k-means, and the sizes."""
    points = points.copy()
    points[::2] = points[0]
    started = time.perf_counter()
    plain_kmeans(points, k)
    between = time.perf_counter()
    _, assigned = balanced_kmeans(points, k, seed=1)
    ended = time.perf_counter()
    ratio = round((ended - between) / (between - started), 2)
    return [{"time of balanced / plain": ratio, "largest": round(float(share(assigned, k).max()), 4)}]


def flow(points: np.ndarray, k: int, runs: int) -> list[dict[str, object]]:
    """20,000 rows beside k-means-constrained, which assigns by min-cost flow: the optimum for its centroids, slowly."""
    try:
        from k_means_constrained import KMeansConstrained
    except ImportError as error:
        return [{"skipped": f"pip install k-means-constrained ({error})"}]
    few = points[:20_000]
    started = time.perf_counter()
    centroids, assigned = balanced_kmeans(few, k, seed=0)
    seconds = time.perf_counter() - started
    error = squared_error(few, centroids, assigned)
    rows: list[dict[str, object]] = [{"ours": "20 moves", "seconds": round(seconds, 1)}]
    for moves in (1, 5):
        started = time.perf_counter()
        theirs = KMeansConstrained(k, len(few) // k, -(-len(few) // k), n_init=1, max_iter=moves, random_state=0)
        found = theirs.fit_predict(few.astype(np.float64))
        seconds = time.perf_counter() - started
        ratio = squared_error(few, theirs.cluster_centers_.astype(np.float32), found) / error
        rows.append({"min-cost flow": f"{moves} moves", "seconds": round(seconds, 1), "error / ours": round(ratio, 4)})
    return rows


PARTS = {"kmeans": one_level, "rounds": rounds, "codes": codes, "oracle": oracle, "copies": copies, "flow": flow}
SETS = {
    "kmeans": ["debian", "debian100k", "sift128"],
    "rounds": ["debian"],
    "codes": ["debian"],
    "oracle": ["debian"],
    "copies": ["debian"],
    "flow": ["debian"],
}


# ------------------------------------------------------------------------------------------------ methods and figures


def plain_kmeans(points: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """k-means by FAISS as it comes, except that it takes every row."""
    clustering = import_faiss().Kmeans(points.shape[1], k, niter=20, seed=1, max_points_per_centroid=len(points))
    clustering.train(points)
    return with_nearest(points, clustering.centroids)


def with_nearest(points: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return centroids, nearest(points, centroids)


def onerec_kmeans(points: np.ndarray, k: int, sweeps: int) -> tuple[np.ndarray, np.ndarray]:
    """Balanced k-means of the OneRec paper (arXiv 2502.18965, algorithm 1).

    Clusters take their share one after the other, each the nearest of the points still free, and move at once.
    """
    rng = np.random.default_rng(1)
    centroids = points[rng.choice(len(points), k, replace=False)].copy()
    quotas = np.full(k, len(points) // k)
    quotas[: len(points) % k] += 1
    assigned = np.empty(len(points), dtype=np.int64)
    best = (np.inf, centroids, assigned)
    for _ in range(sweeps):
        free = np.arange(len(points))
        rest = points
        for cluster in range(k):
            distances = np.square(centroids[cluster]).sum() - 2 * (rest @ centroids[cluster])
            distances += np.einsum("nd,nd->n", rest, rest)
            order = np.argpartition(distances, min(quotas[cluster], len(free) - 1))
            taken, kept = order[: quotas[cluster]], np.sort(order[quotas[cluster] :])
            assigned[free[taken]] = cluster
            centroids[cluster] = rest[taken].mean(axis=0)
            free, rest = free[kept], rest[kept]
        error = squared_error(points, centroids, assigned)
        best = min(best, (error, centroids.copy(), assigned.copy()), key=lambda each: each[0])
    return best[1:]


def figures(points: np.ndarray, centroids: np.ndarray, assigned: np.ndarray, unit: float) -> dict[str, object]:
    shares = share(assigned, len(centroids))
    return {
        "error": round(squared_error(points, centroids, assigned) / unit, 4),
        "largest": round(float(shares.max()), 4),
        "smallest": round(float(shares.min()), 4),
    }


def squared_error(points: np.ndarray, centroids: np.ndarray, assigned: np.ndarray) -> float:
    tile = 65_536
    starts = range(0, len(points), tile)
    return sum(
        float(np.square(points[s : s + tile] - centroids[assigned[s : s + tile]]).sum(dtype=float)) for s in starts
    )


def share(assigned: np.ndarray, k: int) -> np.ndarray:
    """Sizes in units of an even share, N/K."""
    return np.bincount(assigned, minlength=k) * (k / len(assigned))


def distinct(encoded: np.ndarray) -> float:
    """Different codes per row."""
    return round(len(np.unique(encoded, axis=0)) / len(encoded), 4)


def memory_mb(what: str) -> float:
    """Memory of this process (Linux): VmRSS, in use now, or VmHWM, the most since the peak was last forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
