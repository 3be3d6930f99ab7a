"""How many candidates a search needs when the first codes are chosen in other ways than the nearest codewords.

    python -m benchmarks.prefixes             # debian and sift128, 4 x 256
    python -m benchmarks.prefixes --tiny      # the bundled sample, 4 x 32

Leaves are opened best first until a budget of candidates is reached. A true neighbour counts as found when its leaf is
open, so no distances but those to the leaves are involved. The table gives the candidates at which 90, 95 and 98 % of
the true 10 nearest are found, and the error of the codes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks import datasets
from semid_index.codes import CodeLayout, pack
from semid_index.lookup import additive_scorer, choose_probes, make_leaves
from semid_index.quantizers.rq import ResidualKMeans
from semid_index.segments import default_leaf_size

QUERIES = 1_000
TRAINED_ON = 65_536
BUDGETS = (500, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 128_000)
RECALLS = (0.9, 0.95, 0.98)
GREEDY = {"beam": 1, "prefix_levels": 0, "prefix_beam": 1}
TRAINED = ({"refine": 0}, {"refine": 4}, {"refine": 4, "prefix_levels": 1})
ENCODED = (
    ("greedy", {}),
    ("best pair first", {"prefix_levels": 2, "prefix_beam": 32}),
    ("beam of 5", {"beam": 5}),
    ("beam of 5 after level 1", {"beam": 5, "prefix_levels": 1}),
)


def measure(data: datasets.Dataset, size: int) -> None:
    """One line for each way to train and to encode."""
    rows = data.base[np.random.default_rng(0).permutation(len(data.base))[:TRAINED_ON]]
    for options in TRAINED:
        trained = ResidualKMeans(4, size, **options).fit(rows)
        for way, encoding in ENCODED:
            quantizer = ResidualKMeans.restore({**trained.get_config(), **GREEDY, **encoding}, trained.state())
            codes = quantizer.encode(data.base)
            needed = candidates(codes, quantizer, data)
            sample = rows[:20_000]
            left = np.square(sample - quantizer.decode(quantizer.encode(sample))).sum()
            error = left / np.square(sample - sample.mean(axis=0)).sum()
            training = ", ".join(f"{name} {value}" for name, value in options.items())
            figures = "  ".join(f"{count:8,.0f}" for count in needed)
            print(f"{data.name:8} {training:28} {way:24} error {error:.4f}  candidates {figures}", flush=True)


def candidates(codes: np.ndarray, quantizer: ResidualKMeans, data: datasets.Dataset) -> list[float]:
    """How many candidates each of ``RECALLS`` takes, between budgets by interpolation."""
    layout, n = CodeLayout(quantizer.codebook_sizes), len(data.base)
    sids = pack(codes, layout)
    order = np.argsort(sids, kind="stable")
    leaves = make_leaves(sids[order], layout, default_leaf_size(n))
    scorer = additive_scorer(leaves, quantizer.codebooks, sids[order], "l2")
    position = np.empty(n, dtype=np.int64)
    position[order] = np.arange(n)
    leaf_of = np.searchsorted(leaves.starts, position[data.neighbours[:QUERIES]], side="right") - 1
    held, recalls = [], []
    for budget in BUDGETS:
        probes = choose_probes(
            scorer, data.queries[:QUERIES], np.diff(leaves.starts), at_least=10, budget=min(budget, n), probes=None
        )
        held.append(probes.candidates.mean())
        recalls.append(
            np.mean([np.isin(own, opened).mean() for own, opened in zip(leaf_of, probes.leaves, strict=True)])
        )
    return [float(np.exp(np.interp(recall, recalls, np.log(held)))) for recall in RECALLS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=datasets.DEFAULT_FOLDER, help="the folder with the data sets")
    parser.add_argument("--set", action="append", dest="sets", help="only this set; may be repeated")
    parser.add_argument("--tiny", action="store_true", help="the bundled sample instead")
    arguments = parser.parse_args()
    if arguments.tiny:
        measure(datasets.load("sample"), 32)
        return
    for name in arguments.sets or ("debian", "sift128"):
        measure(datasets.load(name, arguments.data), 256)


if __name__ == "__main__":
    main()
