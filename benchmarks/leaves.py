"""How many items a search scans for a recall, if it chooses leaves in other ways than the nearest so many.

    python -m benchmarks.leaves --set sift128 --codebook-size 1024 64 256 256
    python -m benchmarks.leaves --set sift128 --index FILE        # an index that was built before

Nothing is searched: a true neighbour counts as found when its leaf is open (or one of its two). A line says how many
items are in open leaves, on average, when .90, .95, .98 and .99 are found. What it led to: docs/decisions/0021.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # read when the libraries load
    os.environ[name] = "1"

import numpy as np

import semid_index as semid
from benchmarks import datasets
from semid_index import SemanticIndex
from semid_index.metrics import normalized
from semid_index.segments import SearchState

RECALLS = (0.9, 0.95, 0.98, 0.99)
NEAR = 16  # leaves, for what is near
SECOND_LEAF_BATCH = 1_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=datasets.DEFAULT_FOLDER)
    parser.add_argument("--set", default="debian", dest="name")
    parser.add_argument("--index", type=Path, help="one of these items, whose ids are their rows")
    parser.add_argument("--codebook-size", type=int, nargs="+", default=[256] * 4)
    parser.add_argument("--leaf-size", type=int, default=128)
    arguments = parser.parse_args()
    data = datasets.load(arguments.name, arguments.data)
    with opened(data, arguments) as index:
        index.search(data.queries[0])
        (state,) = index._live.latest.states
        count_ideas(state, data)


def opened(data: datasets.Dataset, arguments: argparse.Namespace) -> SemanticIndex:
    if arguments.index:
        return semid.open(arguments.index, read_only=True)
    sizes = arguments.codebook_size
    index = semid.create(
        dim=data.base.shape[1],
        metric=data.metric,
        levels=len(sizes),
        codebook_size=sizes,
        leaf_size=arguments.leaf_size,
        vectors="float16",
    )
    index.train(data.base)
    index.add(data.base)
    return index


def count_ideas(state: SearchState, data: datasets.Dataset) -> None:
    queries, leaves, scorer = data.queries[1::2], state.leaves, state.scorer
    place = np.empty(len(state), dtype=np.int64)
    place[state.ids_at(np.arange(len(state)))] = np.arange(len(state))
    true = place[data.neighbours[1::2]]
    homes = np.searchsorted(leaves.starts, true, side="right") - 1
    sizes = leaves.sizes.astype(np.float64)
    scores = scorer.scores(scorer.table(queries))
    words = np.zeros((len(leaves), queries.shape[1]), dtype=np.float32)
    for reached, term in scorer.terms:
        words[slice(None) if reached is None else reached] += scorer.words[term]
    means, spreads, radii = moments(state, words)

    def show(idea: str, scores: np.ndarray) -> None:
        fixed, reach = ranks(scores), above_near(scores)
        print(f"{data.name}: {idea:40} same for all {needed(fixed, homes, sizes)}  as far as near "
              f"{needed(reach, homes, sizes)}", flush=True)  # fmt: skip

    show("leaves by their words", scores)
    show("and a quarter of their variance", scores + spreads / 4)
    of_means = np.einsum("ij,ij->i", means, means) - 2 * queries @ means.T
    show("leaves by the means of their items", of_means)
    show("and a quarter of their variance", of_means + spreads / 4)
    tenth = np.sqrt(
        [np.square(as_queries(state, own) - q).sum(axis=1).max() for own, q in zip(true, queries, strict=True)]
    )
    squared = np.maximum(scores + np.einsum("ij,ij->i", queries, queries)[:, None], 0)
    for part in (0.5, 1):
        of_tenth = needed(squared - part * np.square(tenth)[:, None], homes, sizes)
        print(f"{data.name}: as far as {part} of the true tenth's squared distance says {of_tenth}", flush=True)
    left = (np.sqrt(squared) - radii <= tenth[:, None]) @ sizes / len(queries) / sizes.sum()
    print(f"{data.name}: {left.sum():.1%} of the items are in leaves that may hold a true neighbour, by their radius")
    for share, twice, second in second_leaves(state, words, true):
        more = sizes + twice
        nearer = np.where(second < 0, homes, second)
        for way, keys in (("same for all", ranks(scores)), ("as far as near", above_near(scores))):
            kept = np.minimum(*(np.take_along_axis(keys, own, axis=1) for own in (homes, nearer)))
            print(
                f"{data.name}: {share:.0%} of the items in a second leaf, {way}: {summed(keys, kept, more)}", flush=True
            )


def as_queries(state: SearchState, positions: np.ndarray) -> np.ndarray:
    """The items at some positions, as leaves are scored for queries."""
    vectors = state.vectors.take(positions)
    return normalized(vectors) if state.config.metric == "cosine" else vectors


def moments(state: SearchState, words: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each leaf: the mean of its items, their mean squared distance to it, and the largest one to its words."""
    means, spreads, radii = [], [], []
    for start, end, word in zip(state.leaves.starts[:-1], state.leaves.starts[1:], words, strict=True):
        items = as_queries(state, np.arange(start, end))
        means.append(items.mean(axis=0))
        spreads.append(np.square(items - means[-1]).sum(axis=1).mean())
        radii.append(np.sqrt(np.square(items - word).sum(axis=1).max()))
    return np.array(means), np.array(spreads, dtype=np.float32), np.array(radii)


def ranks(scores: np.ndarray) -> np.ndarray:
    found = np.empty(scores.shape, dtype=np.float32)
    np.put_along_axis(found, np.argsort(scores, axis=1), np.arange(scores.shape[1], dtype=np.float32)[None], axis=1)
    return found


def above_near(scores: np.ndarray) -> np.ndarray:
    best = np.partition(scores, (0, NEAR), axis=1)
    return scores - (best[:, :1] + best[:, NEAR : NEAR + 1]) / 2


def needed(keys: np.ndarray, homes: np.ndarray, sizes: np.ndarray) -> str:
    return summed(keys, np.take_along_axis(keys, homes, axis=1), sizes)


def summed(keys: np.ndarray, of_neighbours: np.ndarray, sizes: np.ndarray) -> str:
    """Items in leaves whose key is at most that which so many neighbours are within."""
    limits = np.quantile(of_neighbours, RECALLS, method="inverted_cdf")
    counts = [np.where(keys <= limit, sizes, 0).sum() / len(keys) for limit in limits]
    return " ".join(f"{count:8,.0f}" for count in counts)


def second_leaves(
    state: SearchState, words: np.ndarray, true: np.ndarray
) -> Iterator[tuple[float, np.ndarray, np.ndarray]]:
    """As SOAR chooses them: what is left over in the second leaf is to point elsewhere than what is left in the first.

    Yields shares; items that each leaf gets more, from a sample; and the second leaves of the neighbours, -1 for none.
    """
    n = len(state)
    sample = np.random.default_rng(0).choice(n, min(n, 60_000), replace=False)
    chosen, loss = second_leaf(state, words, np.concatenate([sample, true.ravel()]))
    for share in (0.3, 0.6, 1.0):
        limit = np.quantile(loss[: len(sample)], share)
        taken = np.where(loss <= limit, chosen, -1)
        of_sample = taken[: len(sample)]
        twice = np.bincount(of_sample[of_sample >= 0], minlength=len(words)) * (n / len(sample))
        yield share, twice, taken[len(sample) :].reshape(true.shape)


def second_leaf(state: SearchState, words: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    chosen, losses = [], []
    squares = np.einsum("ij,ij->i", words, words)
    for start in range(0, len(positions), SECOND_LEAF_BATCH):
        part = positions[start : start + SECOND_LEAF_BATCH]
        items = as_queries(state, part)
        own = np.searchsorted(state.leaves.starts, part, side="right") - 1
        left = items - words[own]
        length = np.maximum(np.einsum("ij,ij->i", left, left), 1e-9)
        loss = np.einsum("ij,ij->i", items, items)[:, None] + squares - 2 * items @ words.T
        loss += np.square(np.einsum("ij,ij->i", items, left)[:, None] - left @ words.T) / length[:, None]
        loss[np.arange(len(part)), own] = np.inf
        chosen.append(loss.argmin(axis=1))
        losses.append(loss.min(axis=1) / length)
    return np.concatenate(chosen), np.concatenate(losses)


if __name__ == "__main__":
    main()
