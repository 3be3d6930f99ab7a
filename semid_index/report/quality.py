"""The quality of a set of semantic IDs, measured.

:func:`quality` looks at arrays alone, so it serves the IDs of an index and those that others made. The figures to look
at first are whether items of a prefix belong together (purity, lift) and whether neighbours stay neighbours (Jaccard,
recall). Balance (perplexity, Gini) says how well the codes are used, not whether they are good.

Each figure is a function in ``measures.py``, with its formula and where it comes from; what comes back is in
``records.py``; the passes over vectors are in ``reconstruction.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semid_index.codes import MAX_CODEBOOK_SIZE, CodeLayout, pack
from semid_index.errors import InvalidArgumentError, InvalidCodesError
from semid_index.items import check_count
from semid_index.metrics import check_metric
from semid_index.quantizer import Codes, ProgressCallback, Vectors
from semid_index.records import Metric
from semid_index.report.measures import (
    SortedIds,
    chance_collision_rate,
    churn,
    classes,
    collision_rate,
    contingency,
    entropy,
    gini,
    jaccard,
    lift,
    nmi,
    parameters,
    perplexity,
    purity,
    rbo,
    recall,
    sort_ids,
)
from semid_index.report.reconstruction import (
    Comparison,
    Decoder,
    Items,
    compare,
    estimate_codebooks,
    probe_recall,
    survey,
)
from semid_index.report.records import (
    ChurnQuality,
    IdQuality,
    LabelQuality,
    LevelQuality,
    MemoryCost,
    NeighbourQuality,
    ProbeQuality,
    QualityReport,
)
from semid_index.vectors import VectorSource, as_vectors, open_vectors

_SHARES = (0.001, 0.003, 0.01, 0.03, 0.1)  # of the items, opened by probing
_SHUFFLES = 5  # of the labels, for what chance would give


def quality(
    codes: Any,
    codebook_sizes: int | Sequence[int],
    *,
    vectors: Any = None,
    decoded: Any = None,
    decode: Callable[[Codes], Any] | None = None,
    codebooks: Sequence[Any] | None = None,
    labels: Mapping[str, Any] | None = None,
    held_out: tuple[Any, Any] | None = None,
    previous: Any = None,
    k: int = 10,
    queries: Any = 1_000,
    metric: Metric = "l2",
    seed: int = 0,
    hierarchical: bool = True,
    bytes_per_item: float | None = None,
    progress: ProgressCallback | None = None,
) -> QualityReport:
    """Measure the IDs of n items, from arrays: an index is not needed.

    Args:
        codes: (n, levels) integers, coarsest first.
        codebook_sizes: how many codewords each level has, or one number for all.
        vectors: (n, dim), an array or whatever :func:`~semid_index.vectors.open_vectors` takes; read twice, a batch at
            a time. Without them there are no errors and no neighbours.
        decoded: (n, dim) what each row's ID decodes to; rows that share an ID are taken to decode alike.
        decode: the same as a function, from codes (b, levels) to (b, dim). If neither is given, it is the sum of the
            codewords.
        codebooks: one (K, dim) array for each level, whose codewords add up to the decoded vector. If there are neither
            these nor decoded vectors, codewords are estimated from the vectors: level by level, the mean of what is
            left of those that have the code. That is the least that could be reconstructed from such IDs; their errors
            are measured on the vectors the estimate is from, and flatter where few items have a code.
        labels: name -> (n,) values that say what an item is. Missing ones (None, NaN) are left out. Numbers and dates
            with more than 50 different values are put into 10 bins of about equally many items.
        held_out: (codes, vectors) of items that nothing was learned from; for their errors.
        previous: (n, levels) the codes of the same items in an earlier version, -1 in the rows of new items.
        k: how many neighbours to compare, at most n - 1.
        queries: how many items, chosen at random, to ask as queries (an item is not its own neighbour), at most n; or
            (q, dim) vectors to ask instead.
        metric: that of neighbours. Under "cosine" everything is measured on vectors brought to length 1.
        seed: chooses the queries and shuffles labels.
        hierarchical: whether the codes are ordered from coarse to fine. If not, figures of prefixes are None, labels
            are compared with whole IDs only, and nothing is probed.
        bytes_per_item: all that is stored over n, if known; only handed on.
        progress: called with (done, total, what).

    Raises :class:`InvalidArgumentError`, :class:`InvalidCodesError` or :class:`InvalidVectorsError` for arrays that do
    not fit together, :class:`MissingDependencyError` if ``previous`` is given and SciPy is not installed.
    """
    started = time.perf_counter()
    layout, codes = _checked_codes(codes, codebook_sizes, "codes")
    check_metric(metric)
    _check_arguments(k, queries, labels)
    ids = sort_ids(codes, layout)
    measured = _measure(
        _Arrays(codes, layout, ids, hierarchical, metric, seed),
        vectors,
        Decoder(_checked_codebooks(codebooks, layout), decode, _checked_decoded(decoded, vectors)),
        k,
        queries,
        progress,
    )
    held = _measure_held_out(held_out, layout, measured.decoder, metric, hierarchical)
    dim = measured.dim
    return QualityReport(
        items=len(codes),
        dim=dim,
        codebook_sizes=layout.codebook_sizes,
        levels=_levels(codes, layout, ids if hierarchical else None, measured.errors, measured.variance),
        ids=_id_quality(ids, layout, measured.distinct),
        labels={
            name: _label_quality(ids, classes(values, name=name, items=len(codes)), layout.levels, hierarchical, seed)
            for name, values in (labels or {}).items()
        },
        neighbours=measured.neighbours,
        memory=None if dim is None else _memory(len(codes), dim, layout, bytes_per_item),
        held_out=held,
        churn=None if previous is None else _churn(codes, previous),
        seconds=time.perf_counter() - started,
        hierarchical=hierarchical,
        codebooks_estimated=measured.estimated,
        metric=metric,
    )


@dataclass(frozen=True)
class _Arrays:
    """The IDs, checked, and how to look at them."""

    codes: Codes
    layout: CodeLayout
    ids: SortedIds
    hierarchical: bool
    metric: Metric
    seed: int


@dataclass(frozen=True)
class _Measured:
    """What the vectors said."""

    decoder: Decoder
    dim: int | None = None
    errors: Sequence[float | None] = ()
    variance: float = 1.0
    distinct: int | None = None
    neighbours: NeighbourQuality | None = None
    estimated: bool = False


def _measure(
    arrays: _Arrays, vectors: Any, decoder: Decoder, k: int, queries: Any, progress: ProgressCallback | None
) -> _Measured:
    """Both passes over the vectors, and the probing."""
    if vectors is None:
        return _Measured(decoder, None if decoder.codebooks is None else decoder.codebooks[0].shape[1])
    items = _open(vectors, arrays.codes, arrays.metric, "vectors", progress)
    n, dim = items.source.rows, items.source.dim
    asked = None if np.ndim(queries) == 0 else as_vectors(queries, dim=dim, what="queries")
    _check_decoder(decoder, n, dim)
    rows = np.empty(0, dtype=np.int64)
    if asked is None and n > 1:
        rows = np.sort(np.random.default_rng(arrays.seed).choice(n, min(int(queries), n), replace=False))
    estimated = decoder.codebooks is None and decoder.decode is None and decoder.decoded is None
    seen = survey(items, rows, sizes=arrays.layout.codebook_sizes if estimated else ())
    if estimated:
        decoder = Decoder(estimate_codebooks(arrays.codes, seen.sums))
    if asked is not None:
        seen = replace(seen, queries=items.prepared(asked))
        rows = np.full(len(asked), -1, dtype=np.int64)
    k = min(k, n - int(asked is None))
    depth = _probe_depth(arrays.ids, arrays.layout.levels) if arrays.hierarchical and len(rows) else None
    compared = compare(items, decoder, arrays.ids, seen.queries, rows, k if len(rows) else 0, depth)
    neighbours = _neighbours(arrays, compared, seen.queries, depth) if k and len(rows) else None
    return _Measured(decoder, dim, compared.errors, seen.variance, seen.distinct, neighbours, estimated)


def _neighbours(arrays: _Arrays, compared: Comparison, queries: Vectors, depth: int | None) -> NeighbourQuality:
    found, truth, words = compared.found, compared.truth, compared.prefix_words
    probing: tuple[ProbeQuality, ...] = ()
    if depth is not None and words is not None:
        budgets = [share * len(arrays.codes) for share in _SHARES]
        groups = arrays.ids.groups(depth)[truth]
        recalls, opened = probe_recall(queries, words, arrays.ids.sizes(depth), groups, budgets, arrays.metric)
        probing = tuple(
            ProbeQuality(*values) for values in zip(_SHARES, opened.tolist(), recalls.tolist(), strict=True)
        )
    return NeighbourQuality(
        k=truth.shape[1],
        queries=len(truth),
        jaccard=jaccard(found, truth),
        rbo=rbo(found, truth),
        recall=recall(found, truth),
        probing=probing,
        probe_depth=depth,
        probe_groups=None if words is None else len(words),
    )


def _probe_depth(ids: SortedIds, levels: int) -> int:
    """The depth with about sqrt(n) to n / 16 prefixes: fewer are too coarse, more cost as much as comparing items."""
    n = len(ids.order)
    low, high = np.log(n) / 2, np.log(n / 16)
    groups = np.log([ids.distinct(depth) for depth in range(1, levels + 1)])
    away = np.maximum(np.maximum(low - groups, groups - high), 0)
    return levels - int(np.argmin(away[::-1]))  # of equals, the deepest


def _measure_held_out(
    held_out: tuple[Any, Any] | None, layout: CodeLayout, decoder: Decoder, metric: Metric, hierarchical: bool
) -> tuple[LevelQuality, ...]:
    if held_out is None:
        return ()
    if not isinstance(held_out, tuple | list) or len(held_out) != 2:
        raise InvalidArgumentError("held_out must be a pair (codes, vectors).")
    _, codes = _checked_codes(held_out[0], layout.codebook_sizes, "held-out codes")
    decoder = Decoder(decoder.codebooks, decoder.decode)
    if decoder.codebooks is None and decoder.decode is None:
        raise InvalidArgumentError("Held-out vectors need something to decode their codes: give codebooks or decode.")
    items = _open(held_out[1], codes, metric, "held-out vectors", None)
    _check_decoder(decoder, len(items), items.source.dim)
    none = np.empty(0, dtype=np.int64)
    seen = survey(items, none)
    ids = sort_ids(codes, layout)
    compared = compare(items, decoder, ids, seen.queries, none, 0, None)
    return _levels(codes, layout, ids if hierarchical else None, compared.errors, seen.variance)


def _levels(
    codes: Codes, layout: CodeLayout, ids: SortedIds | None, errors: Sequence[float | None], variance: float
) -> tuple[LevelQuality, ...]:
    levels = []
    for level, size in enumerate(layout.codebook_sizes):
        counts = np.bincount(codes[:, level], minlength=size)
        error = errors[level] if errors else None
        distinct = None if ids is None else ids.distinct(level + 1)
        levels.append(
            LevelQuality(
                level=level + 1,
                codebook_size=size,
                error=error,
                relative_error=None if error is None else error / (variance or 1.0),
                perplexity=perplexity(counts),
                entropy=entropy(counts),
                normalized_entropy=entropy(counts) / float(np.log(size)),
                gini=gini(counts),
                unused=int((counts == 0).sum()),
                largest=int(counts.max()),
                distinct_prefixes=distinct,
                collision_rate=None if distinct is None else collision_rate(len(codes), distinct),
            )
        )
    return tuple(levels)


def _id_quality(ids: SortedIds, layout: CodeLayout, distinct_vectors: int | None) -> IdQuality:
    sizes = ids.sizes(layout.levels)
    items = len(ids.order)
    observed = collision_rate(items, len(sizes))
    return IdQuality(
        items=items,
        distinct=len(sizes),
        collision_rate=observed,
        shared=float(sizes[sizes > 1].sum() / items),
        largest_bucket=int(sizes.max()),
        excess=observed / chance_collision_rate(items, math.prod(layout.codebook_sizes)) if observed else 0.0,
        exact_duplicates=None if distinct_vectors is None else items - distinct_vectors,
    )


def _label_quality(
    ids: SortedIds, labels: NDArray[np.int64], levels: int, hierarchical: bool, seed: int
) -> tuple[LabelQuality, ...]:
    """At every depth, or at the last only."""
    rows = np.flatnonzero(labels >= 0)
    known = np.unique(labels[rows], return_inverse=True)[1]
    shuffles = [np.random.default_rng((seed, number)).permutation(known) for number in range(_SHUFFLES)]
    depths: list[LabelQuality] = []
    for depth in range(1 if hierarchical else levels, levels + 1):
        if depths and ids.distinct(depth) == ids.distinct(depth - 1):  # the same groups as before
            depths.append(replace(depths[-1], depth=depth))
            continue
        groups = ids.groups(depth)[rows]
        table = contingency(groups, known)
        chance = [contingency(groups, shuffled) for shuffled in shuffles]
        shuffled_purity = math.fsum(map(purity, chance)) / _SHUFFLES
        depths.append(
            LabelQuality(
                depth=depth,
                groups=len(np.unique(table.groups)),
                purity=purity(table),
                nmi=nmi(table),
                shuffled_purity=shuffled_purity,
                shuffled_nmi=math.fsum(map(nmi, chance)) / _SHUFFLES,
                lift=lift(purity(table), shuffled_purity),
                items=len(rows),
                classes=int(known.max()) + 1,
            )
        )
    return tuple(depths)


def _memory(items: int, dim: int, layout: CodeLayout, bytes_per_item: float | None) -> MemoryCost:
    floats = parameters(layout.codebook_sizes, dim)
    return MemoryCost(floats, items * dim, items * dim / floats, sum(layout.bits) / 8, bytes_per_item)


def _churn(codes: Codes, previous: Any) -> ChurnQuality:
    old = _integers(previous, "previous codes")
    if old.max(initial=0) >= MAX_CODEBOOK_SIZE:
        raise InvalidCodesError(f"previous codes go up to {old.max()}; they must be below {MAX_CODEBOOK_SIZE:,}.")
    if len(old) != len(codes):
        raise InvalidCodesError(
            f"There are previous codes for {len(old):,} rows, and codes for {len(codes):,}. Give a row for each item, "
            "in the same order, of -1 for items that had no codes."
        )
    common = np.flatnonzero((old >= 0).all(axis=1))
    if not len(common):
        raise InvalidCodesError("No item has previous codes (all rows hold -1), so nothing can have changed.")
    return ChurnQuality(len(common), *churn(old[common], codes[common]))


# -- what was given ---------------------------------------------------------------------------------------------------


def _integers(codes: Any, what: str) -> NDArray[np.integer]:
    array: NDArray[Any] = np.asarray(codes)
    if array.ndim != 2 or array.dtype.kind not in "iu" or not array.shape[1]:
        raise InvalidCodesError(
            f"{what} must be integers of shape (n, levels), not {array.dtype} of shape {array.shape}."
        )
    return array


def _checked_codes(codes: Any, codebook_sizes: int | Sequence[int], what: str) -> tuple[CodeLayout, Codes]:
    array = _integers(codes, what)
    sizes = np.asarray(codebook_sizes)
    if sizes.ndim > 1 or sizes.dtype.kind not in "iu":
        raise InvalidArgumentError(f"codebook_sizes must be a whole number or one for each level: {codebook_sizes!r}.")
    layout = CodeLayout(tuple(np.broadcast_to(sizes, sizes.shape or array.shape[1:]).tolist()))
    if not len(array):
        raise InvalidCodesError(f"{what}: there are no items, so there is nothing to measure.")
    pack(array, layout)  # refuses codes that do not fit
    return layout, np.ascontiguousarray(array, dtype=np.int32)


def _checked_codebooks(codebooks: Sequence[Any] | None, layout: CodeLayout) -> list[Vectors] | None:
    if codebooks is None:
        return None
    arrays = [as_vectors(codebook, what=f"codebook {level}") for level, codebook in enumerate(codebooks, 1)]
    shapes = [array.shape for array in arrays]
    if [len(array) for array in arrays] != list(layout.codebook_sizes) or len({shape[1] for shape in shapes}) != 1:
        raise InvalidArgumentError(
            f"codebooks have the shapes {shapes}; the codes need {layout.levels} of (K, dim) with K = "
            f"{', '.join(map(str, layout.codebook_sizes))} and one dim."
        )
    return arrays


def _checked_decoded(decoded: Any, vectors: Any) -> VectorSource | None:
    if decoded is None:
        return None
    if vectors is None:
        raise InvalidArgumentError("decoded vectors are compared with the vectors themselves: give vectors as well.")
    return open_vectors(decoded)


def _check_decoder(decoder: Decoder, rows: int, dim: int) -> None:
    if decoder.codebooks is not None and decoder.codebooks[0].shape[1] != dim:
        raise InvalidArgumentError(
            f"The codewords have {decoder.codebooks[0].shape[1]} dimensions, the vectors {dim}. Give those that belong "
            "together."
        )
    decoded = decoder.decoded
    if decoded is not None and (decoded.rows, decoded.dim) != (rows, dim):
        raise InvalidArgumentError(f"decoded has shape ({decoded.rows}, {decoded.dim}), vectors ({rows}, {dim}).")


def _check_arguments(k: int, queries: Any, labels: Any) -> None:
    check_count("k", k)
    if np.ndim(queries) == 0:
        check_count("queries", queries)
    if labels is not None and not isinstance(labels, Mapping):
        raise InvalidArgumentError(f"labels must be a dict of names and columns, not {type(labels).__name__}.")


def _open(vectors: Any, codes: Codes, metric: Metric, what: str, progress: ProgressCallback | None) -> Items:
    source = open_vectors(vectors)
    if source.rows != len(codes):
        raise InvalidArgumentError(f"There are {source.rows:,} {what} for {len(codes):,} rows of codes. Give one each.")
    return Items(source, codes, metric, what, progress)
