"""The figures of a quality report, as pure functions on arrays: one each, with its formula and where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semid_index.codes import CodeLayout, pack
from semid_index.errors import InvalidArgumentError, MissingDependencyError

Counts = NDArray[np.int64]

MOST_CLASSES = 50  # numbers with more different values than this are a quantity, not a name of something
BINS = 10
_DENSE_ENTRIES = 1 << 22  # pairs are counted in a table of at most so many entries, 32 MB; beyond, by sorting them


# -- use of the codes -------------------------------------------------------------------------------------------------


def entropy(counts: Counts) -> float:
    """Shannon entropy of code frequencies (K,), in nats: ``-sum(p ln p)`` with ``p = counts / sum(counts)``.

    From 0 to ln K (Shannon, 1948); ``scipy.stats.entropy`` gives the same.

    >>> round(entropy(np.array([2, 2, 0, 0])), 4)  # ln 2
    0.6931
    """
    shares = counts[counts > 0] / counts.sum()
    return float(abs((shares * np.log(shares)).sum()))  # abs, because -0.0 looks odd


def perplexity(counts: Counts) -> float:
    """``exp(entropy)``: how many codewords, equally used, would have this entropy; from 1 to K.

    The usual figure for the use of a codebook, since VQ-VAE (van den Oord et al., 2017).
    """
    return float(np.exp(entropy(counts)))


def gini(counts: Counts) -> float:
    """Gini coefficient of how items fall on all K codewords, unused ones included: 0 is even, 1 - 1/K is all on one.

    ``2 sum(i x_i) / (K sum(x)) - (K + 1) / K`` with x ascending and i from 1 (Gini, 1912): half the mean difference of
    two codewords, over the mean. Some programs leave unused codewords out, which flatters.

    >>> gini(np.array([0, 0, 0, 8]))
    0.75
    """
    ranks = np.arange(1, len(counts) + 1)
    value = 2 * float(ranks @ np.sort(counts)) / (len(counts) * float(counts.sum())) - (len(counts) + 1) / len(counts)
    return max(0.0, value)  # rounding can give -1e-16


# -- whole IDs and their prefixes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SortedIds:
    """IDs in ascending order, from which the prefixes of every depth can be read off."""

    order: NDArray[np.int64]
    """(n,) rows in the order of their IDs; those that share one, in ascending order."""
    departs: NDArray[np.int64]
    """(n,) the first level, from 0, where an ID differs from the one before it; ``levels`` if nowhere."""
    levels: int

    def distinct(self, depth: int) -> int:
        """How many different prefixes of this depth there are."""
        return int((self.departs < depth).sum())

    def sizes(self, depth: int) -> Counts:
        """Items of each prefix, in the order of the prefixes: (distinct,)."""
        return np.diff(self.starts(depth), append=len(self.order))

    def first_rows(self, depth: int) -> NDArray[np.int64]:
        """The first row, in the order of whole IDs, that has each prefix: (distinct,)."""
        return self.order[self.starts(depth)]

    def groups(self, depth: int) -> NDArray[np.int64]:
        """(n,) the number of each row's prefix, counted from 0 in the order of the prefixes."""
        groups = np.empty(len(self.order), dtype=np.int64)
        groups[self.order] = np.cumsum(self.departs < depth) - 1
        return groups

    def starts(self, depth: int) -> NDArray[np.int64]:
        """Where in ``order`` each prefix begins: (distinct,)."""
        return np.flatnonzero(self.departs < depth)


def sort_ids(codes: NDArray[np.integer], layout: CodeLayout) -> SortedIds:
    """Sort the IDs (n, levels), of any length, and see where each departs from the one before."""
    words: list[NDArray[np.int64]] = []  # 63 bits each; lexsort takes the last as the most significant
    start = 0
    while start < layout.levels:
        part = CodeLayout(layout.codebook_sizes[start:])
        words.insert(0, pack(codes[:, start:], part))
        start += part.packed_levels
    order = np.lexsort(words)
    departs = np.full(len(codes), layout.levels, dtype=np.int64)
    departs[:1] = 0
    for level in reversed(range(layout.levels)):
        column = codes[order, level]
        departs[1:][column[1:] != column[:-1]] = level
    return SortedIds(order, departs, layout.levels)


def collision_rate(items: int, distinct: int) -> float:
    """``(N - distinct) / N``: the share of items that would have to go for all IDs to be different.

    The figure of the papers on generative retrieval (TIGER, Rajput et al., 2023, and after).
    """
    return (items - distinct) / items


def chance_collision_rate(items: int, possible: int) -> float:
    """The collision rate to expect of N draws, each uniform over M possible IDs: ``1 - M (1 - (1 - 1/M)^N) / N``.

    N draws hit each ID with probability ``1 - (1 - 1/M)^N``, and so ``M (1 - (1 - 1/M)^N)`` different ones (the
    occupancy problem; Feller, 1968). M may be as large as 65,536^64.

    >>> round(chance_collision_rate(2, 4), 12)  # in 1 of 4 cases both draws are equal, and one of two items too many
    0.125
    """
    x = 1 / possible
    if items * x > 0.01:
        return float(1 + np.expm1(items * np.log1p(-x)) / (items * x))
    # The formula would lose all digits where 1 - (almost 1) is left. Its binomial series, (N-1)/2 x -
    # (N-1)(N-2)/6 x^2 + ..., has terms that shrink by N x / (j + 1) each.
    term = rate = (items - 1) * x / 2
    for j in range(2, 10):
        term *= -(items - j) * x / (j + 1)
        rate += term
    return rate


# -- labels -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contingency:
    """How many items are in each group and have each label, without the pairs that do not occur."""

    groups: NDArray[np.int64]
    """(m,) ascending."""
    labels: NDArray[np.int64]
    """(m,)"""
    counts: Counts
    """(m,) all above 0."""


def contingency(groups: NDArray[np.int64], labels: NDArray[np.int64]) -> Contingency:
    """Count the pairs of numbers from 0: (n,) and (n,) in."""
    width = int(labels.max(initial=0)) + 1
    pairs = groups * width + labels
    if (int(groups.max(initial=0)) + 1) * width <= _DENSE_ENTRIES:
        table = np.bincount(pairs)
        found = np.flatnonzero(table)
        counts = table[found]
    else:
        found, counts = np.unique(pairs, return_counts=True)
    return Contingency(found // width, found % width, counts)


def purity(table: Contingency) -> float:
    """Share of items that have the most frequent label of their group: ``sum over groups of max over labels / N``.

    (Manning, Raghavan and Schütze, 2008, chapter 16.) Small groups are pure by chance, so look at the lift too.
    """
    starts = np.flatnonzero(np.diff(table.groups, prepend=-1))
    return float(np.maximum.reduceat(table.counts, starts).sum() / table.counts.sum())


def nmi(table: Contingency) -> float:
    """Mutual information of group and label over the mean of their entropies: 0 unrelated, 1 the same partition.

    ``I(G; L) / ((H(G) + H(L)) / 2)``, as ``sklearn.metrics.normalized_mutual_info_score`` has it; 1 if there is only
    one group and one label. (Strehl and Ghosh, 2002, who divide by the geometric mean.)
    """
    of_groups, of_labels = np.bincount(table.groups, table.counts), np.bincount(table.labels, table.counts)
    mean_entropy = (entropy(of_groups) + entropy(of_labels)) / 2
    if mean_entropy == 0:
        return 1.0
    shares = table.counts / table.counts.sum()
    expected = of_groups[table.groups] * of_labels[table.labels] / float(table.counts.sum()) ** 2
    information = float((shares * np.log(shares / expected)).sum())
    return min(1.0, max(0.0, information / mean_entropy))


def lift(observed: float, shuffled: float) -> float:
    """``purity / shuffled purity``: how much more the groups know of a label than groups of these sizes by chance.

    1 is nothing. (Lift, as of association rules: Brin et al., 1997.)
    """
    return observed / shuffled


def classes(values: Any, *, name: str, items: int) -> NDArray[np.int64]:
    """The values of a label (n,) as numbers from 0, and -1 where the value is missing: None, NaN, NaT.

    Whatever Arrow can read as a column. Numbers and dates with more than 50 different values are put into 10 bins with
    about equally many items each; give numbers that name something as strings. Raises :class:`InvalidArgumentError`
    for columns of lists, for mixed types, and if there are not as many values as items or all are missing.
    """
    column = _arrow_column(values, name)
    if len(column) != items:
        raise InvalidArgumentError(f"The label '{name}' has {len(column):,} values for {items:,} items. Give one each.")
    try:
        encoded = column.dictionary_encode()
    except Exception as error:  # Arrow's, which are of several kinds
        raise InvalidArgumentError(
            f"The label '{name}' is a column of type {column.type}; give one plain value for each item."
        ) from error
    numbers: NDArray[np.int64] = encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    quantities = _quantities(encoded.dictionary)
    if quantities is not None:
        numbers[np.append(np.isnan(quantities), False)[numbers]] = -1
    known = numbers[numbers >= 0]
    if not len(known):
        raise InvalidArgumentError(f"The label '{name}' has no value for any item. Leave it out.")
    if quantities is None or len(quantities) <= MOST_CLASSES:
        return numbers
    edges = np.unique(np.quantile(quantities[known], np.arange(1, BINS) / BINS, method="inverted_cdf"))
    bins = np.append(np.searchsorted(edges, quantities, side="left"), -1)
    return bins[numbers]


def _arrow_column(values: Any, name: str) -> Any:
    import pyarrow as pa  # imported here: it costs 50 ms

    try:
        column = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values, from_pandas=True)
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        if pa.types.is_dictionary(column.type):  # two categories may have one name
            column = column.cast(column.type.value_type)
        return column.cast(pa.float32()) if pa.types.is_float16(column.type) else column
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise InvalidArgumentError(
            f"The label '{name}' cannot be read as one column of one type ({error}). Give (n,) values of one type."
        ) from error


def _quantities(values: Any) -> NDArray[np.float64] | None:
    """Numbers and dates as float64; None for anything else."""
    import pyarrow as pa

    kind = values.type
    if pa.types.is_temporal(kind) and not pa.types.is_interval(kind):
        values = values.view(pa.int32() if kind.bit_width == 32 else pa.int64())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        return None
    numbers: NDArray[np.float64] = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return numbers


# -- neighbours -------------------------------------------------------------------------------------------------------


def overlap(found: NDArray[np.int64], truth: NDArray[np.int64]) -> Counts:
    """How many items two rankings have in common within their first 1, 2, ... k: (q, k) and (q, k) in, (q, k) out.

    Rankings hold no item twice.
    """
    queries, k = truth.shape
    row = np.arange(queries)[:, None]
    offset = row * (max(int(found.max(initial=0)), int(truth.max(initial=0))) + 1)  # rows keep to themselves
    ranks = np.argsort(found, axis=1)
    keys = (np.take_along_axis(found, ranks, axis=1) + offset).ravel()
    at = np.minimum(np.searchsorted(keys, truth + offset), keys.size - 1)
    both = keys[at] == truth + offset
    # an item counts from the depth on at which both rankings have it
    since = np.maximum(ranks.ravel()[at], np.arange(k))
    counts = np.bincount((row * k + since)[both], minlength=queries * k).reshape(queries, k)
    return np.cumsum(counts, axis=1)


def jaccard(found: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """``|A and B| / |A or B|`` of two sets of k items (Jaccard, 1901), mean over queries: (q, k) and (q, k) in."""
    common = overlap(found, truth)[:, -1]
    return float((common / (2 * truth.shape[1] - common)).mean())


def recall(found: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """Share of the true k items that were found, mean over queries: (q, k) and (q, k) in."""
    return float((overlap(found, truth)[:, -1] / truth.shape[1]).mean())


def rbo(found: NDArray[np.int64], truth: NDArray[np.int64], *, p: float = 0.9) -> float:
    """Rank-biased overlap of two rankings of k items, extrapolated, mean over queries: (q, k) and (q, k) in.

    ``X_k / k p^k + (1 - p) / p sum over d = 1..k of X_d / d p^d``, X_d being how many items the first d have in common:
    RBO_ext, equation 30 of Webber, Moffat and Zobel (2010), which takes the agreement at k to go on below. 1 for equal
    rankings, 0 for disjoint ones. At p = 0.9 the first ten ranks have 86 % of the weight.
    """
    depths = np.arange(1, truth.shape[1] + 1)
    agreement = overlap(found, truth) / depths
    values = agreement[:, -1] * p ** depths[-1] + (1 - p) / p * (agreement * p**depths).sum(axis=1)
    return float(values.mean())


def prefix_probe_recall(
    scores: NDArray[np.floating], sizes: Counts, truth: NDArray[np.int64], budgets: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What is found when groups are opened, best score first, until they hold at least so many items.

    ``scores`` (q, g), smaller is better; ``sizes`` (g,) items of each group; ``truth`` (q, k) the groups of the true
    neighbours; ``budgets`` (b,) items to open. Gives the share of true neighbours in the opened groups, and the items
    in them, each (q, b). The recall at a number of candidates by which inverted files are judged (Jégou, Douze and
    Schmid, 2011).
    """
    order = np.argsort(scores, axis=1, kind="stable")
    opened = np.cumsum(sizes[order], axis=1)
    before = np.empty_like(opened)  # items in the groups that are opened before each group
    np.put_along_axis(before, order, opened - sizes[order], axis=1)
    needed = np.take_along_axis(before, truth, axis=1)
    recalls = np.stack([(needed < budget).mean(axis=1) for budget in budgets], axis=1)
    last = np.stack([np.minimum((opened < budget).sum(axis=1), len(sizes) - 1) for budget in budgets], axis=1)
    return recalls, np.take_along_axis(opened, last, axis=1).astype(np.float64)


# -- between versions, and memory -------------------------------------------------------------------------------------


def churn(old: NDArray[np.integer], new: NDArray[np.integer]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Share of items whose first 1, 2, ... codes changed, after alignment and as they are: (n, levels) twice in.

    Codewords have no order of their own, so codebooks learned again can be the same up to their numbers. At each level
    the new codes are renamed, one to one, so that as many items as possible keep their code, among those that kept all
    codes before it: an assignment problem (Kuhn, 1955). The levels that one version has more are left out.
    """
    aligned, unaligned = [], []
    same, same_name = np.ones(len(old), dtype=np.bool_), np.ones(len(old), dtype=np.bool_)
    for before, after in zip(old.T, new.T, strict=False):
        same_name &= before == after
        rows = np.flatnonzero(same)
        same[rows] = best_names(before[rows], after[rows])[after[rows]] == before[rows]
        aligned.append(1 - float(same.mean()))
        unaligned.append(1 - float(same_name.mean()))
    return tuple(aligned), tuple(unaligned)


def best_names(old: NDArray[np.integer], new: NDArray[np.integer]) -> NDArray[np.int64]:
    """The old code for each new code, no two the same, that lets most items keep theirs; -1 where none is left.

    Equals ``scipy.optimize.linear_sum_assignment`` on the table of overlaps, without its zeros.
    """
    try:
        # imported here: SciPy is not needed for anything else
        from scipy.sparse import csr_matrix
        from scipy.sparse.csgraph import min_weight_full_bipartite_matching
    except ImportError as error:
        raise MissingDependencyError(
            "SciPy is needed to align the codes of two versions. Run: pip install scipy"
        ) from error
    table = contingency(new.astype(np.int64), old.astype(np.int64))
    named, rows = np.unique(table.groups, return_inverse=True)
    names, columns = np.unique(table.labels, return_inverse=True)
    alone = np.arange(len(named))
    # Each new code may also stay alone, at weight 1, so that a full matching exists; all others weigh 1 more.
    weights = np.append(table.counts + 1, np.ones(len(named))).astype(np.float64)
    edges = (np.append(rows, alone), np.append(columns, len(names) + alone))
    graph = csr_matrix((weights, edges), shape=(len(named), len(names) + len(named)))
    matched, chosen = min_weight_full_bipartite_matching(graph, maximize=True)
    renamed = np.full(int(named.max(initial=-1)) + 1, -1, dtype=np.int64)
    renamed[named[matched]] = np.append(names, np.full(len(named), -1))[chosen]
    return renamed


def parameters(codebook_sizes: Sequence[int], dim: int) -> int:
    """Floats of codebooks with whole-length codewords: ``sum(K) dim``; an embedding table has ``N dim``.

    >>> parameters((256, 256, 256, 256), 256), 1_000_000 * 256 // parameters((256, 256, 256, 256), 256)
    (262144, 976)
    """
    return sum(codebook_sizes) * dim
