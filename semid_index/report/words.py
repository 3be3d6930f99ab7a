"""A quality report in words: the sentences and the few figures that a reader should see first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line imports this module, and must not wait for NumPy
    from semid_index.report.records import LabelQuality, QualityReport

ESTIMATED = (
    "No codebooks were given: each codeword is taken to be the mean of what is left of the items that have the code, "
    "which flatters."
)
BALANCE = (
    "Balance is not quality: a comparison of 2026 (SID-Repro, arXiv 2609.24430) found no correlation between the "
    "entropy of the first level and ranking quality (Pearson -0.02)."
)
_LABELS_NAMED = 3
_GOOD_RECALL = 0.9
_PURE_BY_CHANCE = 0.95  # nearly all items have one label, or nearly all groups one item
_LEAST_LIFT = 1.05  # below, a label is not spoken of as something that the IDs know


def percent(share: float | None) -> str:
    """A share as a person reads it.

    >>> percent(0.12345), percent(0.00012), percent(1.0), percent(None)
    ('12.3 %', '0.012 %', '100 %', '-')
    """
    if share is None:
        return "-"
    value = 100 * share
    return f"{value:.0f} %" if value in (0, 100) else f"{value:.1f} %" if value >= 1 else f"{value:.2g} %"


def times(factor: float) -> str:
    """A factor as a person reads it.

    >>> times(1.2345), times(976.56), times(12034.5), times(5.06e70)
    ('1.2 times', '977 times', '12,034 times', '5.1e+70 times')
    """
    if factor >= 1e6:
        return f"{factor:.1e} times"
    return f"{factor:,.1f} times" if factor < 10 else f"{factor:,.0f} times"


def shape(report: QualityReport) -> str:
    """What was measured, in a line."""
    sizes = report.codebook_sizes
    if len(set(sizes)) == 1:
        levels = f"{len(sizes)} levels of {sizes[0]} codewords"
    else:
        levels = f"levels of {', '.join(map(str, sizes))} codewords"
    dim = f", {report.dim} dimensions ({report.metric})" if report.dim is not None else ""
    order = "" if report.hierarchical else ", without an order from coarse to fine"
    return f"{report.items:,} items{dim}; {levels}{order}."


def headlines(report: QualityReport) -> Iterator[tuple[str, str]]:
    """The figures to look at first: a value, and what it is."""
    for name, depths in list(report.labels.items())[:1]:
        best = most_telling(depths)
        yield times(best.lift), f"purer in {name} than by chance, by the {codes_text(best.depth)}"
    if (near := report.neighbours) is not None:
        if near.probing:
            probe = min(near.probing, key=lambda probe: abs(probe.share - 0.01))
            opened = percent(probe.candidates / report.items)
            yield percent(probe.recall), f"of the true top {near.k} are among the nearest {opened} of items"
        else:
            yield percent(near.recall), f"of the true top {near.k} are found by IDs alone"
    yield percent(report.ids.shared), "of items share their ID with another"
    if report.levels and (left := report.levels[-1].relative_error) is not None:
        yield percent(left), "of the variance is left unexplained"
    if report.memory is not None:
        yield times(report.memory.reduction), "fewer parameters than an embedding table"


def summary(report: QualityReport) -> list[str]:
    """The report in a few sentences, the most important first."""
    sentences = [*_meaning(report), *_neighbourhood(report), *_collisions(report), *_error(report)]
    if report.churn is not None:
        changed = report.churn.per_level[-1]
        sentences.append(
            f"Of {report.churn.common:,} items that the earlier version has too, {percent(changed)} changed their ID, "
            "even if codes are renamed to fit best."
        )
    if report.drift is not None and report.drift.due:
        sentences.append(report.drift.reason)
    return sentences


def most_telling(depths: Sequence[LabelQuality]) -> LabelQuality:
    """The depth at which prefixes say most about a label, beyond chance."""
    return max(depths, key=lambda depth: depth.purity - depth.shuffled_purity)


def _meaning(report: QualityReport) -> Iterator[str]:
    start = "Items that begin alike are alike: "
    for name, depths in list(report.labels.items())[:_LABELS_NAMED]:
        best = most_telling(depths)
        if best.shuffled_purity > _PURE_BY_CHANCE:
            yield f"{name} tells nothing: by chance alone, groups would be {percent(best.shuffled_purity)} pure in it."
        elif best.lift < _LEAST_LIFT:
            yield f"The IDs say next to nothing about {name}: prefixes are hardly purer than they would be by chance."
        else:
            yield (
                f"{start}{percent(best.purity)} have the {name} that is most frequent among those with the same "
                f"{codes_text(best.depth)}; by chance it would be {percent(best.shuffled_purity)}."
            )
            start = ""


def _neighbourhood(report: QualityReport) -> Iterator[str]:
    near = report.neighbours
    if near is None:
        return
    yield f"By their IDs alone, items find {percent(near.recall)} of their true {near.k} nearest neighbours."
    if near.probing:
        probe = next((probe for probe in near.probing if probe.recall >= _GOOD_RECALL), near.probing[-1])
        yield (
            f"A search that opens the nearest {percent(probe.candidates / report.items)} of all items and compares "
            f"those exactly finds {percent(probe.recall)}."
        )


def _collisions(report: QualityReport) -> Iterator[str]:
    ids = report.ids
    if ids.distinct == ids.items:
        yield f"Every one of the {ids.items:,} items has an ID of its own."
        return
    yield (
        f"{percent(ids.shared)} of {ids.items:,} items share their ID with another item; "
        f"at most {ids.largest_bucket:,} share one."
    )
    if ids.exact_duplicates:
        yield f"{ids.exact_duplicates:,} items only repeat the vector of another, which no encoding can tell apart."


def _error(report: QualityReport) -> Iterator[str]:
    if not report.levels or report.levels[-1].relative_error is None:
        return
    unseen = report.held_out[-1].relative_error if report.held_out else None
    also = f" ({percent(unseen)} of vectors held out)" if unseen is not None else ""
    yield f"The IDs leave {percent(report.levels[-1].relative_error)} of the vectors' variance unexplained{also}."


def codes_text(depth: int) -> str:
    """``first code``, ``first 2 codes``."""
    return "first code" if depth == 1 else f"first {depth} codes"
