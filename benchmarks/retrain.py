"""How many items keep their IDs when codebooks are learned again, and what that costs.

    python -m benchmarks.retrain             # debian, trained on half, retrained on all
    python -m benchmarks.retrain --tiny      # the bundled sample

Two halves: at random, and by section (debian), where the new half speaks of other things than the old. Three ways: from
scratch; from scratch with the codes renamed to fit (alignment); and from the old codebooks, then aligned, which is what
``index.retrain`` does. ``again`` goes on from the old codebooks for more or fewer iterations.

Churn is the share of items whose first 1, 2, ... codes are not what they were. The error is the mean squared one of all
items, divided by that of training from scratch. Candidates: how many a search looks at until 95 % of the true 10
nearest are among them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks import datasets
from benchmarks.prefixes import candidates
from semid_index.alignment import aligned, changed
from semid_index.metrics import normalized
from semid_index.quantizers import balanced_rq, rq
from semid_index.quantizers.balanced_rq import BalancedResidualKMeans
from semid_index.quantizers.rq import ResidualKMeans

TRAINED_ON = 65_536
SETTINGS = (
    ("rq", ResidualKMeans, {}),
    ("balanced-rq", BalancedResidualKMeans, {}),
    ("rq, refined", ResidualKMeans, {"refine": 4, "prefix_levels": 1}),
)
ITERATIONS = (1, 3, 5, 10, 20)


def measure(what: str, data: datasets.Dataset, old_rows: np.ndarray, size: int, *, all_ways: bool) -> None:
    """One line for each way to learn again."""
    rows = sample(data.base)
    for name, kind, options in SETTINGS if all_ways else SETTINGS[:1]:
        old = kind(4, size, **options).fit(sample(old_rows))
        scratch = kind(4, size, **options).fit(rows)
        before, base = old.encode(data.base), error(scratch, data.base)
        ways = [("as it was", old), ("from scratch", scratch), ("from scratch, aligned", aligned(old, scratch, rows))]
        for iterations in ITERATIONS if name == "rq" else (rq.REFIT_ITERATIONS,):
            with refit_iterations(iterations):
                again = kind.restore(old.get_config(), old.state()).refit(rows)
            ways.append((f"retrain, {iterations} iterations", aligned(old, again, rows)))
        for way, quantizer in ways:
            codes = quantizer.encode(data.base)
            per_level, prefixes = (counts / len(codes) for counts in changed(before, codes))
            needed = candidates(codes, quantizer, data)[1]
            shown = "  ".join(f"{share:6.1%}" for share in prefixes)
            print(
                f"{what:10} {name:12} {way:24} churn {shown}  (levels alone {' '.join(f'{s:.1%}' for s in per_level)})"
                f"  error {error(quantizer, data.base) / base:.4f}  candidates {needed:7,.0f}",
                flush=True,
            )


def sample(vectors: np.ndarray) -> np.ndarray:
    """At most as many rows as ``index.train`` takes."""
    return vectors[np.sort(np.random.default_rng(0).permutation(len(vectors))[:TRAINED_ON])]


def error(quantizer: ResidualKMeans, vectors: np.ndarray) -> float:
    """The mean squared error."""
    return float(np.square(vectors - quantizer.decode(quantizer.encode(vectors))).sum(axis=1).mean())


@contextmanager
def refit_iterations(count: int) -> Iterator[None]:
    """Learn on with another number of iterations than usual."""
    before = rq.REFIT_ITERATIONS
    rq.REFIT_ITERATIONS = balanced_rq.REFIT_ITERATIONS = count
    try:
        yield
    finally:
        rq.REFIT_ITERATIONS = balanced_rq.REFIT_ITERATIONS = before


def half_of_the_sections(data: datasets.Dataset, folder: Path) -> np.ndarray:
    """The rows of debian's base that belong to sections, chosen at random, which have about half of the packages."""
    vectors = normalized(np.load(folder / "debian.minilm384.f16.npy").astype(np.float32))
    section = np.array(pq.read_table(folder / "debian.items.parquet")["section"].to_pylist())
    base = np.random.default_rng(0).permutation(len(vectors))[datasets.HELD_OUT :]
    names, counts = np.unique(section[base], return_counts=True)
    order = np.random.default_rng(1).permutation(len(names))
    chosen = names[order[: np.searchsorted(np.cumsum(counts[order]), len(base) // 2)]]
    return data.base[np.isin(section[base], chosen)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=datasets.DEFAULT_FOLDER, help="the folder with the data sets")
    parser.add_argument("--tiny", action="store_true", help="the bundled sample instead")
    arguments = parser.parse_args()
    if arguments.tiny:
        data = datasets.load("sample")
        measure("half", data, data.base[: len(data.base) // 2], 32, all_ways=True)
        return
    data = datasets.load("debian", arguments.data)
    measure("half", data, data.base[: len(data.base) // 2], 256, all_ways=True)
    measure("sections", data, half_of_the_sections(data, arguments.data), 256, all_ways=False)


if __name__ == "__main__":
    main()
