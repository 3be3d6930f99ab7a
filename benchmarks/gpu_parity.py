"""Search on a GPU: does it find what the CPU finds, and how quickly; beside FAISS's own indexes on the same GPU.

    python -m benchmarks.gpu_parity --json benchmarks/results/gpu-1m-768.json          # 1M x 768, and all of parity
    python -m benchmarks.gpu_parity --rows 10000000 --dim 128 --json FILE speed        # one part, another size
    python -m benchmarks.gpu_parity --cpu-only                                         # the same code, small, without

Parts: ``parity`` compares lists of vectors in each precision with exact distances, and a GPU with the CPU; ``training``
compares codebooks that were learned on each; ``bandwidth`` copies memory, to say what part of it the scan reaches;
``speed`` measures queries per second at each recall, in turn with brute force, IVF-Flat, IVF-SQ and IVF-PQ with
re-ranking. Each part has a process of its own, and figures are written row by row: if one ends early, the others stay.
``--seconds`` is for all of them; what it has no time for is left out, and said to be. Ends with status 1 if anything
disagrees. A row says ``gpu`` only if FAISS's index is of one of its GPU types. Needs NumPy, FAISS and pluggy, and no
DuckDB. Data are made from a seed: clusters within clusters.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also as a file, where nothing is installed

import numpy as np

from semid_index import vector_lists
from semid_index.codes import CodeLayout, pack
from semid_index.devices import choose_gpu, device_name, gpu_state, installed_faiss
from semid_index.lookup import Leaves, Probes, additive_scorer, choose_probes, make_leaves
from semid_index.quantizers.kmeans import clustering_on, import_faiss, lloyd, nearest, training_device
from semid_index.quantizers.rq import ResidualKMeans
from semid_index.rerank import MemoryVectors, ScanData, smallest
from semid_index.vector_lists import MOST, PRECISIONS, VectorListExecutor, candidates_for, on_gpu

K = 10
RECALL = 0.95
ROUNDING = {"float32": 1e-4, "float16": 4e-3, "int8": 4e-2}  # of a distance, as a part of the largest one
PARTS = ("parity", "training", "bandwidth", "speed")
CASES = ("padding", "empty lists", "k above candidates", "duplicates", "filter")
CHECKED = 256  # queries of a batch that are compared with brute force
LAST_SECONDS = 15  # for a part to end by itself before it is ended


class WrongDeviceError(Exception):
    """FAISS's index is not where it was to be."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {' '.join(PARTS)}; default: all")
    parser.add_argument("--cpu-only", action="store_true", help="no GPU; small unless --rows is given")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--rows", type=int, help="of the speed part; default 1,000,000, or 3,000 with --cpu-only")
    parser.add_argument("--dim", type=int, help="default 768, or 32")
    parser.add_argument("--batch", type=int, action="append", dest="batches", help="may be repeated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=540, help="for all parts; default 540")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"there is no part {' '.join(unknown)}; there are {', '.join(PARTS)}")
    arguments.deadline = time.monotonic() + arguments.seconds
    parts = arguments.parts or list(PARTS)
    figures = one_part(arguments, parts[0]) if len(parts) == 1 else all_parts(arguments, parts)
    print(f"{figures['failed']} failed")
    return 1 if figures["failed"] else 0


def all_parts(arguments, parts: list[str]) -> dict[str, object]:
    """Each part in a process of its own: FAISS ends its process where it does not expect to go on."""
    figures: dict[str, object] = {"failed": 0}
    given = [argument for argument in sys.argv[1:] if argument not in parts]
    for part in parts:
        with tempfile.TemporaryDirectory() as folder:
            file, left = Path(folder) / "part.json", max(0.0, arguments.deadline - time.monotonic())
            command = [sys.executable, __file__, *given, "--json", str(file), "--seconds", f"{left:.3f}", part]
            try:
                ended = f"status {subprocess.run(command, timeout=left + LAST_SECONDS, check=False).returncode}"
            except subprocess.TimeoutExpired:
                ended = f"no end after {left + LAST_SECONDS:.0f} s"
            found = json.loads(file.read_text()) if file.exists() else {}
        figures = {"environment": found.get("environment"), **{k: v for k, v in figures.items() if v is not None}}
        figures[part] = found.get(part, [])
        if not found.get("complete"):
            figures[part].append({"error": f"the process of this part ended early: {ended}", "ok": False})
            found["failed"] = found.get("failed", 0) + 1
        figures["failed"] += found["failed"]
        write(arguments.json, figures)
    return figures


def one_part(arguments, part: str) -> dict[str, object]:
    """The rows of a part, which are written down one by one."""
    small = arguments.cpu_only
    arguments.gpu = None if small else choose_gpu(int(arguments.device.removeprefix("cuda:")))
    arguments.rows = arguments.rows or (3_000 if small else 1_000_000)
    arguments.dim = arguments.dim or (32 if small else 768)
    rows: list[dict[str, object]] = []
    figures = {"environment": environment(arguments.gpu), part: rows, "failed": 0, "complete": False}

    def keep(row: dict[str, object]) -> None:
        print(f"{part:9} {json.dumps(row)}", flush=True)
        rows.append(row)
        figures["failed"] += not row.get("ok", True)
        write(arguments.json, figures)

    try:
        for row in globals()[part](arguments):
            keep(row)
            if time.monotonic() > arguments.deadline:
                keep({"left_out": "the rest of this part: no time was left"})
                break
    except Exception as error:  # and write down what there is
        keep({"error": f"{type(error).__name__}: {error}", "ok": False})
    figures["complete"] = True
    write(arguments.json, figures)
    return figures


def write(path: Path | None, figures: dict[str, object]) -> None:
    """Put a new file in the place of the old one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(figures, indent=1))
        new.replace(path)


def environment(gpu: int | None) -> dict[str, object]:
    """What was measured on."""
    faiss, state = import_faiss(), None if gpu is None else gpu_state(gpu)
    maps = Path("/proc/self/maps")
    wanted = ("libcuda", "libcublas", "libfaiss")
    paths = {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device_name(gpu),
        "gpu": None if state is None else state.name,
        "gpu_bytes": None if state is None else state.total,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "faiss": f"{faiss.__version__}, {installed_faiss()}",
        "faiss_options": faiss.get_compile_options().strip(),
        "libraries": sorted(path for path in paths if any(name in path for name in wanted)),
    }


def claims_gpu(index: object, gpu: int | None) -> bool:
    """Whether FAISS's index is on a GPU, by its type; anything else than what was asked for ends the benchmark."""
    is_gpu = type(index).__name__.startswith("GpuIndex")
    if is_gpu != (gpu is not None):
        raise WrongDeviceError(f"{type(index).__name__} is not an index on {device_name(gpu)}")
    return is_gpu


# -- parity -----------------------------------------------------------------------------------------------------------


def parity(arguments) -> Iterator[dict[str, object]]:
    """Every precision, batch and case against exact distances, and on a GPU against the CPU too."""
    batches = (1, 32, 1_024) if arguments.gpu is None else (1, 32, 1_024, 10_000)
    for metric in ("l2",) if arguments.gpu is None else ("l2", "ip"):
        data = random_lists(metric, *((1_000, 24, 60) if arguments.gpu is None else (20_000, 96, 150)))
        for precision in PRECISIONS:
            on_cpu = VectorListExecutor(data, precision=precision)
            for shares in (1,) if arguments.gpu is None else (1, 2):
                with dealt_out(arguments.gpu, shares):
                    executor = VectorListExecutor(data, precision=precision, gpu=arguments.gpu)
                for batch in batches:
                    for case in CASES:
                        row = {"metric": metric, "precision": precision, "shares": shares, "batch": batch, "case": case}
                        row["gpu"] = claims_gpu(executor._shares[-1].index, arguments.gpu)
                        yield row | compare(executor, on_cpu, data, batch, case)


@contextmanager
def dealt_out(gpu: int | None, shares: int) -> Iterator[None]:
    """As if leaves were dealt out over so many GPUs, all of which are this one."""
    before = vector_lists.deal_out
    vector_lists.deal_out = lambda *_, **__: (gpu,) * shares
    try:
        yield
    finally:
        vector_lists.deal_out = before


def random_lists(metric: str, rows: int, dim: int, lists: int) -> ScanData:
    """Random vectors, many of them the same, in lists of all lengths, some with nothing."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((rows, dim), dtype=np.float32)
    vectors[100:140] = vectors[0]
    cuts = np.sort(rng.integers(0, rows + 1, lists - 1))
    cuts[5:8] = cuts[5]
    starts = np.concatenate([[0], cuts, [rows]])
    zeros = np.zeros(lists, dtype=np.int64)
    leaves = Leaves(CodeLayout((256,)), zeros, zeros, starts)
    return ScanData(leaves, None, None, MemoryVectors(vectors, None, metric), metric, None, None)


def compare(executor, on_cpu, data: ScanData, batch: int, case: str) -> dict[str, object]:
    """One case: the greatest errors of distances by rank, and whether all hits are allowed, new and enough."""
    rng = np.random.default_rng(batch)
    lists, sizes = len(data.leaves), data.leaves.sizes
    queries = rng.standard_normal((batch, data.vectors.dim), dtype=np.float32)
    probed = np.argsort(rng.random((batch, lists)), axis=1)[:, :12].astype(np.int64)
    k, allowed = K, np.ones(data.vectors.count, dtype=bool)
    if case == "padding":
        probed[np.arange(12) >= rng.integers(0, 13, batch)[:, None]] = -1
    elif case == "empty lists":
        probed[:, :3] = np.flatnonzero(sizes == 0)[:2].repeat(2)[:3]
        probed[:, 1] = -1  # no list twice
        probed[:, 2] = np.flatnonzero(sizes == 0)[1]
        probed[:, 3:] = np.where(sizes[probed[:, 3:]] == 0, -1, probed[:, 3:])
    elif case == "k above candidates":
        k, probed = executor.most, probed[:, :3]
    elif case == "duplicates":
        queries[:] = data.vectors.take(np.array([0]))
        probed[:, 0] = home = int(np.searchsorted(data.leaves.starts, 100, side="right") - 1)
        probed[:, 1:] = np.where(probed[:, 1:] == home, -1, probed[:, 1:])
    else:
        allowed = rng.random(data.vectors.count) < 0.5
    opened = np.zeros((batch, lists + 1), dtype=bool)
    np.put_along_axis(opened, probed, True, axis=1)
    item_opened = np.repeat(opened[:, :-1], sizes, axis=1)
    probes = Probes(probed, np.zeros(probed.shape, dtype=np.float32), item_opened.sum(axis=1))
    wanted = k if case != "filter" else 200  # more than enough: half of them is dropped
    near, found = executor.search(queries, probes, wanted)
    checked = np.sort(rng.choice(batch, min(batch, CHECKED), replace=False))  # brute force over all takes too long
    queries, probes, near, found = queries[checked], probes.of(checked), near[checked], found[checked]
    item_opened = item_opened[checked]
    cpu_near, _ = on_cpu.search(queries, probes, wanted)
    everything = exact_distances(queries, data)
    right = np.sort(np.where(item_opened, everything, np.float32(np.inf)), axis=1)[:, :wanted]
    right = np.pad(right, ((0, 0), (0, wanted - right.shape[1])), constant_values=np.inf)
    hit = found >= 0
    largest = max(1.0, float(np.abs(right[np.isfinite(right)]).max(initial=0)))
    if data.metric == "l2":  # rounding goes by the length of vectors, and not by the distance, which may be 0
        largest = max(largest, float(np.linalg.norm(queries, axis=1).max()))
    errors = [float(np.abs(near[hit] - other[hit]).max(initial=0)) / largest for other in (right, cpu_near)]
    row = {"error": errors[0], "error_against_cpu": errors[1]}
    inside = np.take_along_axis(item_opened, found, axis=1)[hit].all()
    in_order = np.sort(found, axis=1)
    repeated = ((np.diff(in_order, axis=1) == 0) & (in_order[:, 1:] >= 0)).any()
    enough = (hit.sum(axis=1) == np.minimum(probes.candidates, wanted)).all()
    row["ok"] = bool(inside and not repeated and enough and max(errors) <= ROUNDING[executor.precision])
    if case == "filter":  # what is left after dropping, re-ranked, is what brute force over the allowed ones finds
        kept = np.where(hit & allowed[found], found, -1)
        _, best = smallest(kept, data.vectors.distances(queries, kept), k)
        oracle = np.sort(np.where(item_opened & allowed, everything, np.float32(np.inf)), axis=1)[:, :k]
        there = np.isfinite(oracle) & np.isfinite(best)
        agrees = np.isclose(best, oracle, rtol=1e-4, atol=1e-4)[there]
        row["filter_agrees"] = float(agrees.mean()) if agrees.size else 1.0
        row["ok"] = row["ok"] and row["filter_agrees"] >= 0.999
    return row


def exact_distances(queries: np.ndarray, data: ScanData) -> np.ndarray:
    """(q, n), computed in float64, so that those near 0 are right."""
    queries, vectors = queries.astype(np.float64), data.vectors.take(slice(None)).astype(np.float64)
    products = queries @ vectors.T
    if data.metric == "ip":
        return -products.astype(np.float32)
    squares = np.square(queries).sum(axis=1)[:, None] + np.square(vectors).sum(axis=1) - 2 * products
    return np.sqrt(np.maximum(squares, 0)).astype(np.float32)


# -- training ---------------------------------------------------------------------------------------------------------


def training(arguments) -> Iterator[dict[str, object]]:
    """The same k-means on each device: from one start, and all of a residual quantizer from one seed."""
    small = arguments.gpu is None
    points = clusters(8_000 if small else 200_000, 32 if small else 128)
    size = 32 if small else 1_024
    start = points[np.random.default_rng(1).choice(len(points), size, replace=False)]
    learned, seconds, used = [], [], []
    for gpu in (None, arguments.gpu):
        begun = time.perf_counter()
        with clustering_on(gpu):
            learned.append(lloyd(points, start, seed=0, iterations=5))
            used.append(training_device())
        seconds.append(round(time.perf_counter() - begun, 3))
    if used != ["cpu", device_name(arguments.gpu)]:
        raise WrongDeviceError(f"k-means ran on {used[1]}, not on {device_name(arguments.gpu)}")
    codes = [nearest(points, codebook) for codebook in learned]
    errors = []
    for gpu in (None, arguments.gpu):
        with clustering_on(gpu):
            quantizer = ResidualKMeans(2, 16 if small else 256).fit(points[:60_000], seed=0)
        left = points[:5_000] - quantizer.decode(quantizer.encode(points[:5_000]))
        errors.append(float(np.square(left).sum(axis=1).mean()))
    row = {
        "gpu": used[1] != "cpu",
        "rows": len(points),
        "codewords": size,
        "largest_difference": float(np.abs(learned[0] - learned[1]).max()),
        "other_codes": int((codes[0] != codes[1]).sum()),
        "seconds": dict(zip(("cpu", "device"), seconds, strict=True)),
        "rq_error_ratio": errors[1] / errors[0],
    }
    row["ok"] = row["other_codes"] <= 0.01 * len(points) and abs(row["rq_error_ratio"] - 1) < 0.02
    yield row


# -- bandwidth --------------------------------------------------------------------------------------------------------


def bandwidth(arguments) -> Iterator[dict[str, object]]:
    """Bytes read and written per second by a copy within the device's memory."""
    yield copied(arguments)


def copied(arguments) -> dict[str, object]:
    """See :func:`bandwidth`."""
    size, times = (64 << 20, 5) if arguments.gpu is None else (1 << 30, 20)
    try:
        with numpy_copy(size) if arguments.gpu is None else cuda_copy(size, arguments.gpu) as copy:
            copy()
            seconds = []
            for _ in range(times):
                begun = time.perf_counter()
                copy()
                seconds.append(time.perf_counter() - begun)
    except (OSError, AttributeError, MemoryError) as error:
        return {"gpu": arguments.gpu is not None, "bytes_per_second": None, "error": str(error), "ok": True}
    return {"gpu": arguments.gpu is not None, "bytes_per_second": 2 * size / statistics.median(seconds), "ok": True}


@contextmanager
def numpy_copy(size: int) -> Iterator[Callable[[], None]]:
    source, target = np.ones(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8)
    yield lambda: np.copyto(target, source)


@contextmanager
def cuda_copy(size: int, gpu: int) -> Iterator[Callable[[], None]]:
    """By the CUDA runtime that FAISS has loaded."""
    loaded = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libcudart" in line]
    runtime = ctypes.CDLL(loaded[0] if loaded else "libcudart.so.12")
    source, target = ctypes.c_void_p(), ctypes.c_void_p()

    def call(name: str, *values: object) -> None:
        if (code := getattr(runtime, name)(*values)) != 0:
            raise OSError(f"{name} returned {code}")

    def copy() -> None:
        call("cudaMemcpy", target, source, ctypes.c_size_t(size), 3)  # device to device
        call("cudaDeviceSynchronize")

    call("cudaSetDevice", gpu)
    try:
        for pointer in (source, target):
            call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(size))
        yield copy
    finally:
        for pointer in (source, target):
            runtime.cudaFree(pointer)


# -- speed ------------------------------------------------------------------------------------------------------------


def clusters(rows: int, dim: int, *, seed: int = 0) -> np.ndarray:
    """Clusters within clusters, the same ones for every seed: (rows, dim)."""
    large, small = np.random.default_rng(0).standard_normal((2, 1_024, dim), dtype=np.float32)
    vectors = np.empty((rows, dim), dtype=np.float32)
    for start in range(0, rows, 65_536):
        block = vectors[start : start + 65_536]
        rng = np.random.default_rng((seed, start))
        rng.standard_normal(block.shape, dtype=np.float32, out=block)
        block *= np.float32(0.5)
        block += large[rng.integers(len(large), size=len(block))]
        block += np.float32(0.7) * small[rng.integers(len(small), size=len(block))]
    return vectors


class Ours:
    """Leaves chosen by prefixes, scanned, and re-ranked: the steps of a search, without DuckDB."""

    def __init__(self, vectors: np.ndarray, precision: str, gpu: int | None, made: dict[str, object]) -> None:
        self.data = self.make(vectors, gpu, made)
        self.scorer, self.ids = made["scorer"], made["order"]
        self.executor = VectorListExecutor(self.data, precision=precision, gpu=gpu)
        self.index, self.bytes = self.executor._shares[0].index, self.executor._bytes
        self.seconds: dict[str, float] = {}

    @staticmethod
    def make(vectors: np.ndarray, gpu: int | None, made: dict[str, object]) -> ScanData:
        """Train, encode and sort once for all precisions."""
        if not made:
            rows = len(vectors)
            sample = np.random.default_rng(0).choice(rows, min(rows, 65_536), replace=False)
            with clustering_on(gpu):
                quantizer = ResidualKMeans(3, min(256, max(8, rows // 256))).fit(vectors[np.sort(sample)], seed=0)
            layout = CodeLayout(quantizer.codebook_sizes)
            blocks = (quantizer.encode(vectors[start : start + 50_000]) for start in range(0, rows, 50_000))
            sids = np.concatenate([pack(codes, layout) for codes in blocks])
            order = np.argsort(sids, kind="stable")
            size = int(np.clip(np.sqrt(rows), 128, 2_048))  # as segments.default_leaf_size, and gpu.StateOnGpu
            while rows < 128 * len(leaves := make_leaves(sids[order], layout, size)) and len(leaves) > 1:
                size *= 2
            scorer = additive_scorer(leaves, quantizer.codebooks, sids[order], "l2")
            memory = MemoryVectors(vectors[order], None, "l2")
            made.update(order=order, scorer=scorer, data=ScanData(leaves, None, None, memory, "l2", None, None))
        return made["data"]

    def search(self, queries: np.ndarray, budget: int) -> np.ndarray:
        data, clock = self.data, [time.perf_counter()]
        sizes, threads = data.leaves.sizes, os.cpu_count() or 1
        parts = []
        for start in range(0, len(queries), 1_024):
            part = queries[start : start + 1_024]
            parts.append(
                choose_probes(self.scorer, part, sizes, at_least=K, budget=budget, probes=None, threads=threads)
            )
        width = max(part.leaves.shape[1] for part in parts)
        padded = [
            np.pad(part.leaves, ((0, 0), (0, width - part.leaves.shape[1])), constant_values=-1) for part in parts
        ]
        leaves, candidates = np.concatenate(padded), np.concatenate([part.candidates for part in parts])
        clock.append(time.perf_counter())
        probes = Probes(leaves, np.zeros(leaves.shape, dtype=np.float32), candidates)
        _, found = self.executor.search(queries, probes, candidates_for(K, self.executor.precision))
        clock.append(time.perf_counter())
        best, _ = smallest(found, data.vectors.distances(queries, found), K)
        clock.append(time.perf_counter())
        self.seconds = dict(zip(("lookup", "scan", "rerank"), np.diff(clock).tolist(), strict=True))
        self.scanned = float(candidates.sum())
        return np.where(best >= 0, self.ids[best], -1)


class FaissIndex:
    """One of FAISS's own; where its distances are rough, with candidates re-ranked on the CPU, as ours are."""

    def __init__(self, key: str, vectors: np.ndarray, gpu: int | None, bytes_per_item: float) -> None:
        faiss = import_faiss()
        self.index = faiss.index_factory(vectors.shape[1], key)
        if gpu is not None:
            self.resources = faiss.StandardGpuResources()
            self.index = on_gpu(self.index, gpu, resources=self.resources, halves="PQ" in key)
        if not self.index.is_trained:
            sample = np.random.default_rng(0).choice(len(vectors), min(len(vectors), 65_536), replace=False)
            self.index.train(vectors[np.sort(sample)])
        for start in range(0, len(vectors), 500_000):
            self.index.add(vectors[start : start + 500_000])
        self.vectors = MemoryVectors(vectors, None, "l2")
        self.bytes = int(len(vectors) * bytes_per_item)
        self.seconds: dict[str, float] = {}

    def search(self, queries: np.ndarray, setting: int | tuple[int, int]) -> np.ndarray:
        probes, rerank = setting if isinstance(setting, tuple) else (setting, 0)
        begun = time.perf_counter()
        if probes:
            self.index.nprobe = probes
        _, found = self.index.search(queries, max(K, rerank))
        self.seconds = {"scan": time.perf_counter() - begun}
        if rerank:
            begun = time.perf_counter()
            found, _ = smallest(found, self.vectors.distances(queries, found), K)
            self.seconds["rerank"] = time.perf_counter() - begun
        return found[:, :K]


def pq_parts(dim: int) -> int:
    """Sub-vectors of the product codes that they are compared with: those that FAISS has on a GPU, 4 values or more."""
    return next(m for m in (96, 64, 48, 32, 16, 8, 4, 2, 1) if dim % m == 0 and m <= max(dim // 4, 1))


def speed(arguments) -> Iterator[dict[str, object]]:
    """Queries per second, and bytes, of each subject at each setting until it reaches the recall."""
    rows, dim, gpu = arguments.rows, arguments.dim, arguments.gpu
    batches = arguments.batches or ([32, 256] if gpu is None else [32, 1_024, 10_000])
    vectors, queries = clusters(rows, dim), clusters(max(batches), dim, seed=1)
    rate = copied(arguments)["bytes_per_second"]
    lists = int(2 ** np.round(np.log2(4 * np.sqrt(rows))))
    parts, bits = pq_parts(dim), 4 if gpu is None else 8  # a GPU takes 8 only; those take 14 s to train on a CPU
    budgets = [int(share * 48 * np.sqrt(rows)) for share in (0.25, 0.5, 1, 2, 4, 8)]
    widths = [width for width in (4, 8, 16, 32, 64, 128, 256, 512) if width <= min(lists, MOST)]
    made: dict[str, object] = {}

    deep = [(width, rerank) for rerank in (100, 400) for width in widths]

    def faiss_index(key: str, bytes_per_item: float) -> Callable[[], FaissIndex]:
        return lambda: FaissIndex(key, vectors, gpu, bytes_per_item)

    def ours(precision: str) -> Callable[[], Ours]:
        return lambda: Ours(vectors, precision, gpu, made)

    subjects = {  # those that matter most first, should time run out
        "brute force": (faiss_index("Flat", 4 * dim), [0]),
        "ours float16": (ours("float16"), budgets),
        f"IVF-PQ{parts}, re-ranked": (faiss_index(f"IVF{lists},PQ{parts}x{bits}", parts + 8), deep),
        "ours int8": (ours("int8"), budgets),
        "IVF-SQ16": (faiss_index(f"IVF{lists},SQfp16", 2 * dim + 8), widths),
        "ours float32": (ours("float32"), budgets),
        "IVF-Flat": (faiss_index(f"IVF{lists},Flat", 4 * dim + 8), widths),
    }
    truth = None
    for name, (make, settings) in subjects.items():
        row = {"subject": name, "rows": rows, "dim": dim}
        begun, before = time.perf_counter(), free_bytes(gpu)
        try:
            subject = make()
            row |= {"build_seconds": round(time.perf_counter() - begun, 1), "bytes": subject.bytes}
            if before is not None:
                row["bytes_taken"] = before - free_bytes(gpu)  # with those for intermediate results
            row["gpu"] = claims_gpu(subject.index, gpu)
            truth = subject.search(queries, 0) if truth is None else truth
            yield from tried(row, subject, queries, truth, batches, settings, rate, arguments)
        except Exception as error:  # the others are worth having without it
            if truth is None:
                raise
            yield row | {"error": f"{type(error).__name__}: {error}", "ok": False}
        subject = None  # its memory on the GPU too


def tried(row, subject, queries, truth, batches, settings, rate, arguments) -> Iterator[dict[str, object]]:
    """One subject at each setting, in batches of each size, until it reaches the recall."""
    width = {"float32": 4, "float16": 2, "int8": 1}
    for batch in batches:
        for setting in settings:
            found = row | {"batch": batch, "setting": setting}
            found |= measure(subject, queries[:batch], truth[:batch], setting, arguments.rounds)
            if isinstance(subject, Ours) and rate:
                read = subject.scanned * arguments.dim * width[subject.executor.precision]
                found["share_of_copy_bandwidth"] = round(read / subject.seconds["scan"] / rate, 4)
            yield found
            if found["recall@10"] >= RECALL:
                break


def free_bytes(gpu: int | None) -> int | None:
    """Of a GPU's memory."""
    state = None if gpu is None else gpu_state(gpu)
    return None if state is None else state.free


def measure(subject, queries: np.ndarray, truth: np.ndarray, setting, rounds: int) -> dict[str, object]:
    """Median of some rounds, after one that does not count."""
    got = subject.search(queries, setting)
    seconds = []
    for _ in range(rounds):
        begun = time.perf_counter()
        subject.search(queries, setting)
        seconds.append(time.perf_counter() - begun)
    hits = (got[:, :, None] == truth[:, None, :]).any(axis=2).mean()
    return {
        "recall@10": round(float(hits), 4),
        "queries_per_second": round(len(queries) / statistics.median(seconds), 1),
        "spread": [round(len(queries) / max(seconds), 1), round(len(queries) / min(seconds), 1)],
        "steps": {name: round(value, 5) for name, value in subject.seconds.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
