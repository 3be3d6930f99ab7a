"""Small frozen values that travel between steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from semid_index.codes import Prefix, format_id

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Metric = Literal["l2", "cosine", "ip"]
Tier = Literal["float32", "float16", "int8", "none"]
IdType = Literal["int", "str"]


@dataclass(frozen=True)
class IndexConfig:
    """What an index is; stored in its file and fixed once it is trained."""

    dim: int
    metric: Metric
    quantizer: str
    quantizer_config: Mapping[str, Any]
    seed: int
    vectors: Tier
    """What is stored of each vector for re-ranking."""
    tail: int | None
    """4-bit codes per item that sharpen distances during the scan; 0 for none, None until training chooses."""
    leaf_size: int | None
    """Leaves hold at most about this many items; None to go by the number of items."""
    collisions: Mapping[str, Any] = field(default_factory=lambda: {"policy": "share"})
    """What happens to items that share an ID: the name of a policy, and its options."""


@dataclass(frozen=True)
class LevelReport:
    """How well the first ``level`` levels describe the vectors they were measured on."""

    level: int
    codebook_size: int
    error: float
    """Mean squared length of what is left after this level."""
    relative_error: float
    """The same, divided by the mean squared distance from the mean vector."""
    perplexity: float
    """exp(entropy) of the code frequencies: how many codewords are in effective use."""
    unused: int
    """Codewords that no measured vector has."""


@dataclass(frozen=True)
class Refinement:
    """What refining the codebooks of a residual quantizer did to its training vectors, encoded as the index will."""

    rounds: int
    error_before: float
    """Mean squared error."""
    error_after: float
    changed: tuple[float, ...]
    """Share of the vectors whose first 1, 2, ... codes are others than before."""


@dataclass(frozen=True)
class TrainReport:
    """What ``train`` did."""

    rows: int
    """Vectors the codebooks were learned from."""
    seconds: float
    levels: tuple[LevelReport, ...]
    """Measured on (at most 20,000 of) the training vectors; empty for quantizers without codebooks."""
    refinement: Refinement | None = None
    """What refining the codebooks did, where they were refined."""


@dataclass(frozen=True)
class Uniqueness:
    """How far IDs tell items apart."""

    ids: int
    """Different IDs in use."""
    alone: int
    """Items that have an ID of their own."""
    largest: int
    """Items that share the ID that most items have."""


@dataclass(frozen=True)
class CollisionCounts:
    """What a collision policy did, summed up over all calls of ``add``; kept in the index."""

    items: int = 0
    moved: int = 0
    prefixes_moved: int = 0
    error: float = 0.0
    extra_error: float = 0.0
    ids: int = 0
    alone: int = 0
    largest: int = 0

    def __add__(self, other: CollisionCounts) -> CollisionCounts:
        sums = {name: value + getattr(other, name) for name, value in vars(self).items()}
        return CollisionCounts(**{**sums, "largest": max(self.largest, other.largest)})


@dataclass(frozen=True)
class CollisionReport:
    """What the collision policy of an index achieved, and its price."""

    policy: str
    items: int
    """Items in the index."""
    moved: int
    """Items that have another code than the quantizer proposed. A level that the policy adds does not count."""
    prefix_kept: float
    """The share of items whose codes are as proposed at all levels but the quantizer's last."""
    error: float | None
    """The sum of squared distances between the vectors and what the quantizer's own codes decode to; None for "share",
    which does not look."""
    extra_error: float
    """What moving items added to it."""
    relative_extra_error: float
    """The same, divided by ``error``."""
    before: Uniqueness
    """As the quantizer alone would have it. After several calls of ``add`` nearly so: each is compared with the index
    as it was before."""
    after: Uniqueness
    """As it is."""
    unique: bool | None
    """Whether every item has an ID of its own; None for a policy that does not promise it."""


@dataclass(frozen=True)
class Probe:
    """One leaf that a search opened."""

    prefix: str
    """Its prefix in text form; ``12-153-*`` for all items below it, with a range such as ``12-(64..127)-*``
    where a leaf holds several neighbouring codewords."""
    score: float
    """Distance from the query to what the leaf's prefix decodes to, in the metric of the index."""
    items: int


@dataclass(frozen=True)
class SearchTrace:
    """What one search did, step by step. For a batch, counts are means per query."""

    queries: int
    k: int
    leaves: int
    """Non-empty leaves in the index."""
    probed: float
    """Leaves opened."""
    candidates: float
    """Items in the opened leaves."""
    reranked: float
    """Candidates whose distance was computed exactly."""
    matches: int | None
    """Rows that fulfil ``where``; None without a filter."""
    distances: Literal["exact", "decoded"]
    """Whether distances are to the stored vectors or to the decoded codes (``vectors="none"``)."""
    executor: str
    seconds: Mapping[str, float]
    """Wall time of each step."""
    probes: tuple[Probe, ...] = ()
    """The opened leaves, best first; only for a single query."""
    plan: str = ""
    """One sentence: how the search was carried out and why."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class SearchResult:
    """Hits, nearest first. Unpacks to ``(ids, distances)``.

    For one query the attributes are 1-D arrays. For a batch they are lists with one array for each query;
    rows may differ in length, because fewer than k come back only where fewer exist.
    """

    flat_ids: NDArray[Any]
    flat_distances: NDArray[np.float32]
    read_codes: Callable[[], NDArray[np.int32]] = field(repr=False)
    """Gives the codes of all hits, (hits, levels), when called."""
    offsets: NDArray[np.int64]
    """Hits of query i are ``flat_ids[offsets[i]:offsets[i + 1]]``."""
    single: bool
    trace: SearchTrace

    @cached_property
    def ids(self) -> Any:
        """Ids of the hits."""
        return self._rows(self.flat_ids)

    @cached_property
    def distances(self) -> Any:
        """Distances of the hits: smaller is nearer, equal to DuckDB's function for the metric."""
        return self._rows(self.flat_distances)

    @cached_property
    def semantic_ids(self) -> Any:
        """Semantic IDs of the hits, in text form."""
        return self._rows(self.flat_semantic_ids)

    @cached_property
    def flat_semantic_ids(self) -> NDArray[np.object_]:
        """Semantic IDs of all hits, one query after the other."""
        return np.array([format_id(codes) for codes in self.read_codes().tolist()], dtype=object)

    @cached_property
    def scores(self) -> Any:
        """The same order as a similarity: larger is nearer (``-distance``)."""
        return self._rows(-self.flat_distances)

    def _rows(self, flat: NDArray[Any]) -> Any:
        return flat if self.single else np.split(flat, self.offsets[1:-1])

    def __iter__(self) -> Iterator[Any]:
        yield self.ids
        yield self.distances

    def __len__(self) -> int:
        """Hits of a single query, or the number of queries in a batch."""
        return len(self.flat_ids) if self.single else len(self.offsets) - 1

    def to_arrow(self) -> pa.Table:
        """One row per hit: query, rank, id, distance, semantic_id."""
        import pyarrow as pa

        counts = np.diff(self.offsets)
        return pa.table(
            {
                "query": np.repeat(np.arange(len(counts)), counts),
                "rank": np.arange(len(self.flat_ids)) - np.repeat(self.offsets[:-1], counts) + 1,
                "id": pa.array(self.flat_ids.tolist()) if self.flat_ids.dtype == object else pa.array(self.flat_ids),
                "distance": self.flat_distances,
                "semantic_id": pa.array(self.flat_semantic_ids, type=pa.string()),
            }
        )

    def to_pandas(self) -> pd.DataFrame:
        """The same as :meth:`to_arrow`, for pandas."""
        return self.to_arrow().to_pandas()


@dataclass(frozen=True)
class Shelf:
    """Items that share a prefix."""

    prefix: Prefix
    items: int
    examples: Sequence[Any] = field(default=())
    whole: bool = False
    """Whether the prefix is a whole ID, with all levels."""

    @property
    def text(self) -> str:
        """``12-153-*``, or ``12-153-87-21`` for a whole ID."""
        return format_id(self.prefix) + ("" if self.whole else "-*")
