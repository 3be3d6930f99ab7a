"""The records that a quality report is made of, and requirements on their figures."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from semid_index.errors import InvalidArgumentError
from semid_index.records import Drift, Metric

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
}
_REQUIREMENT = re.compile(r"\s*(?P<name>.+?)\s*(?P<sign><=|>=|==|<|>)\s*(?P<limit>[^<>=\s]+)\s*")


@dataclass(frozen=True)
class Figures:
    """What the records below have in common."""

    def to_dict(self) -> dict[str, Any]:
        """As dicts, lists, numbers and None, ready for JSON."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


@dataclass(frozen=True)
class LevelQuality(Figures):
    """One level: how its codes are used, and what the IDs cut off after it still tell."""

    level: int
    """1 is the coarsest."""
    codebook_size: int
    error: float | None
    """Mean squared length of what is left of a vector after this level; None without vectors to compare with."""
    relative_error: float | None
    """The same, divided by the mean squared distance of the vectors from their mean."""
    perplexity: float
    """exp(entropy): how many codewords are in effective use."""
    entropy: float
    """Of the code frequencies, in nats."""
    normalized_entropy: float
    """Entropy over its maximum, ln K."""
    gini: float
    """0 if all K codewords have the same number of items, towards 1 if few have nearly all."""
    unused: int
    """Dead codes: codewords that no item has."""
    largest: int
    """Items that have the most frequent code."""
    distinct_prefixes: int | None
    """Different prefixes of this depth; None if the codes are not ordered from coarse to fine."""
    collision_rate: float | None
    """(N - distinct prefixes) / N: the collision rate that IDs cut off here would have; None as above."""


@dataclass(frozen=True)
class IdQuality(Figures):
    """Whole IDs: which items share one."""

    items: int
    distinct: int
    """Different IDs."""
    collision_rate: float
    """(N - distinct) / N."""
    shared: float
    """Share of items whose ID another item has too."""
    largest_bucket: int
    """Items that have the most frequent ID."""
    excess: float
    """Collision rate, divided by what N uniform random draws from all possible IDs would have."""
    exact_duplicates: int | None
    """N - distinct vectors: collisions that no encoding can avoid; None without vectors."""


@dataclass(frozen=True)
class LabelQuality(Figures):
    """How far the prefixes of one depth go together with a label."""

    depth: int
    """Codes in the prefix."""
    groups: int
    """Different prefixes among the items that have a label."""
    purity: float
    """Share of items whose label is the most frequent one under their prefix."""
    nmi: float
    """Normalized mutual information of prefix and label, 0 to 1."""
    shuffled_purity: float
    """The purity of the same prefixes with the labels shuffled, mean over several shuffles: small groups are pure by
    chance."""
    shuffled_nmi: float
    """Likewise."""
    lift: float
    """Purity over shuffled purity: 1 says that the prefixes know nothing of the label."""
    items: int = 0
    """Items that have a label."""
    classes: int = 0
    """Different labels, after numbers were put into bins."""


@dataclass(frozen=True)
class ProbeQuality(Figures):
    """What is found by opening the prefixes nearest to a query until they hold a given share of all items."""

    share: float
    """Items to open, as a share of N."""
    candidates: float
    """Items in the opened prefixes, mean over the queries; at least ``share * N``, since prefixes open as a whole."""
    recall: float
    """Share of the true top k among them."""


@dataclass(frozen=True)
class NeighbourQuality(Figures):
    """Whether neighbours stay neighbours: the top k by decoded vectors against the true top k."""

    k: int
    queries: int
    jaccard: float
    """Common items over all items of the two lists, mean over the queries."""
    rbo: float
    """Rank-biased overlap, extrapolated, p = 0.9, mean over the queries."""
    recall: float
    """Share of the true top k among the top k by decoded vectors."""
    probing: tuple[ProbeQuality, ...]
    """What probing finds; empty if the codes are not ordered from coarse to fine."""
    probe_depth: int | None = None
    """Codes in the prefixes that were probed."""
    probe_groups: int | None = None
    """How many such prefixes there are."""


@dataclass(frozen=True)
class MemoryCost(Figures):
    """What the IDs and their codebooks take, against an embedding table with a row for each item."""

    parameters: int
    """Floats of all codebooks."""
    table_parameters: int
    """Items times dimensions."""
    reduction: float
    """``table_parameters / parameters``."""
    code_bytes: float
    """Bits of an ID over 8."""
    bytes_per_item: float | None
    """All that is stored, over the number of items; given by the caller."""


@dataclass(frozen=True)
class ChurnQuality(Figures):
    """How many items have other codes than in an earlier version of the IDs."""

    common: int
    """Items in both versions."""
    per_level: tuple[float, ...]
    """Share of them whose first 1, 2, ... codes changed, once the codes are renamed to fit the earlier ones best."""
    unaligned: tuple[float, ...]
    """The same without renaming: what somebody sees who stored the codes."""


@dataclass(frozen=True)
class QualityReport(Figures):
    """All that :func:`quality` found out; parts that it had no arrays for are None or empty."""

    items: int
    dim: int | None
    codebook_sizes: tuple[int, ...]
    levels: tuple[LevelQuality, ...]
    ids: IdQuality
    labels: Mapping[str, tuple[LabelQuality, ...]]
    """For each label, its figures at every depth (only at full depth if the codes are not ordered)."""
    neighbours: NeighbourQuality | None
    memory: MemoryCost | None
    held_out: tuple[LevelQuality, ...]
    """The levels again, on the vectors given as held-out."""
    churn: ChurnQuality | None
    seconds: float
    hierarchical: bool = True
    """Whether the codes are ordered from coarse to fine."""
    codebooks_estimated: bool = False
    """Whether codewords were estimated from the vectors, because none were given."""
    metric: Metric = "l2"
    drift: Drift | None = None
    """How the items of an index compare with those its codebooks were learned from; None for IDs without an index."""

    def values(self) -> dict[str, float]:
        """Every figure that there is, under the name by which a requirement may ask for it.

        ``collision_rate``, ``shared``, ``excess`` ... of whole IDs; ``perplexity_1``, ``gini_2``, ``collision_rate_3``
        ... of levels; ``error`` and ``relative_error`` after the last; ``held_out_relative_error`` likewise;
        ``recall@10``, ``jaccard@10``, ``rbo@10``, ``probe_recall@0.01``; ``section.purity_2``, ``section.nmi_2``,
        ``section.lift_2`` of labels, and without the label's name if there is one label only; ``churn_1``,
        ``unaligned_churn_1``; ``drift_error_ratio``; ``reduction``, ``code_bytes`` ... of memory.
        """
        found: dict[str, float | None] = {**asdict(self.ids), **_level_values(self.levels, "")}
        found |= _level_values(self.held_out, "held_out_")
        for label, depths in self.labels.items():
            for name, value in _label_values(depths).items():
                found[f"{label}.{name}"] = value
                if len(self.labels) == 1:
                    found[name] = value
        found |= _neighbour_values(self.neighbours) if self.neighbours else {}
        found |= asdict(self.memory) if self.memory else {}
        found |= _churn_values(self.churn) if self.churn else {}
        found |= {"drift_error_ratio": self.drift.error_ratio} if self.drift else {}
        return {name: value for name, value in found.items() if value is not None}

    def value(self, name: str) -> float:
        """One of :meth:`values`. Raises :class:`InvalidArgumentError`, which lists them, for another name."""
        values = self.values()
        if name not in values:
            raise InvalidArgumentError(f"This report has no figure '{name}'. It has: {', '.join(values)}.")
        return values[name]

    def meets(self, requirement: str) -> bool:
        """Whether a figure is as required: ``collision_rate<0.05``; also ``<=``, ``>``, ``>=`` and ``==``.

        Raises :class:`InvalidArgumentError` if that cannot be read, or for a figure that the report does not have.
        """
        name, sign, limit = parse_requirement(requirement)
        return _COMPARISONS[sign](self.value(name), limit)

    def unmet(self, requirements: Iterable[str]) -> tuple[str, ...]:
        """A sentence for each requirement that is not met, with the figure; see :meth:`meets`."""
        failed = [parse_requirement(requirement) for requirement in requirements if not self.meets(requirement)]
        return tuple(f"{name} is {self.value(name):.6g}, required is {sign} {limit:g}." for name, sign, limit in failed)


def parse_requirement(requirement: str) -> tuple[str, str, float]:
    """``"recall@10 >= 0.9"`` as ``("recall@10", ">=", 0.9)``."""
    match = _REQUIREMENT.fullmatch(requirement)
    try:
        if match is None:
            raise ValueError
        return match["name"], match["sign"], float(match["limit"])
    except ValueError:
        raise InvalidArgumentError(
            f"'{requirement}' is no requirement. Write a figure, one of {' '.join(_COMPARISONS)} and a number, such as "
            "'collision_rate<0.05'."
        ) from None


def _level_values(levels: tuple[LevelQuality, ...], prefix: str) -> dict[str, float | None]:
    values = {
        f"{prefix}{name}_{level.level}": value
        for level in levels
        for name, value in asdict(level).items()
        if name not in ("level", "codebook_size")
    }
    if levels:
        values |= {f"{prefix}error": levels[-1].error, f"{prefix}relative_error": levels[-1].relative_error}
    return values


def _label_values(depths: tuple[LabelQuality, ...]) -> dict[str, float | None]:
    names = ("purity", "nmi", "shuffled_purity", "shuffled_nmi", "lift")
    return {f"{name}_{depth.depth}": getattr(depth, name) for depth in depths for name in names}


def _neighbour_values(neighbours: NeighbourQuality) -> dict[str, float | None]:
    values: dict[str, float | None] = {
        f"{name}@{neighbours.k}": getattr(neighbours, name) for name in ("jaccard", "rbo", "recall")
    }
    return values | {f"probe_recall@{probe.share:g}": probe.recall for probe in neighbours.probing}


def _churn_values(churn: ChurnQuality) -> dict[str, float | None]:
    aligned: dict[str, float | None] = {f"churn_{level}": value for level, value in enumerate(churn.per_level, 1)}
    return aligned | {f"unaligned_churn_{level}": value for level, value in enumerate(churn.unaligned, 1)}
