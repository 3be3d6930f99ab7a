"""Small frozen values that travel between steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from itertools import pairwise
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
    device: str = "cpu"
    """Where k-means found the nearest centroids: "cpu" or "cuda:0"."""


@dataclass(frozen=True)
class UpsertResult:
    """What ``upsert`` did."""

    inserted: int
    """Items whose ids were new."""
    updated: int
    """Items whose ids were known."""
    renamed: int
    """Those of the updated ones that have another semantic ID now; the old ones are in ``semid_history``."""
    dropped: int = 0
    """Vectors that cannot be used, and were left out with ``on_bad_vectors="drop"``."""


@dataclass(frozen=True)
class Drift:
    """How items that were added compare with those that the codebooks were learned from."""

    items: int
    """Items that were looked at: those added since the first ``add`` or since retraining, or if there are none, all."""
    share: float
    """Of all items."""
    error: float | None
    """Mean squared distance between them and what their codes decode to."""
    expected_error: float | None
    """The same for vectors such as those of the training, had it not seen them; for quantizers without codebooks, that
    of the items that were added first."""
    perplexity: float | None
    """Of the first codes of all items; None for codes without shelves."""
    perplexity_at_training: float | None
    repeated: float | None
    """Share of the newest items that repeat the ID of another of them; None without new ones."""
    repeated_first: float | None
    """The same for as many of the items that were encoded first."""
    due: bool
    """Whether retraining is due."""
    reason: str
    """Why, or why not, in a sentence."""

    @property
    def error_ratio(self) -> float | None:
        """The error, divided by what was to be expected."""
        return self.error / self.expected_error if self.error and self.expected_error else None


@dataclass(frozen=True)
class LevelChurn:
    """How many items got another code when an index was retrained."""

    level: int
    changed: float
    """Share of the items whose code at this level is another."""
    prefix: float
    """Share of the items whose first ``level`` codes are not what they were."""
    unaligned: float | None
    """What ``prefix`` would have been with codebooks learned from scratch; None if that was not looked at."""
    aligned: float | None
    """The same with their codewords renumbered to fit the old ones as well as can be."""


@dataclass(frozen=True)
class RetrainReport:
    """What ``retrain`` did."""

    version: int
    """The number of the new version. The one before stays until it is dropped."""
    items: int
    """Items that were encoded again."""
    rows: int
    """Vectors the codebooks were learned from."""
    seconds: float
    kept_ids: bool
    """Whether learning went on from the old codebooks, and the new ones were aligned with them."""
    error_before: float
    """Mean squared distance between the items and what their old codes decode to."""
    error: float
    """The same for the new codes."""
    error_ratio: float | None
    """The error, divided by that of codebooks learned from scratch, on (at most 20,000 of) the items; None if that was
    not looked at."""
    levels: tuple[LevelReport, ...]
    """Measured on (at most 20,000 of) the vectors the codebooks were learned from."""
    churn: tuple[LevelChurn, ...]
    """The items' codes, level by level. What training from scratch would have done is measured on 20,000 of them."""


@dataclass(frozen=True)
class IndexVersion:
    """One version of the IDs in an index."""

    version: int
    items: int
    """Items that have an ID of this version: those that were added later do not."""
    trained_at: str | None
    """When its codebooks were learned, in UTC; None where that was not written down."""
    rows: int
    """Vectors they were learned from."""
    error: float | None
    """Mean squared error of the training vectors; None for quantizers without codebooks."""
    present: bool
    """Whether it is the one that new items get IDs of."""


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
    """What a collision policy did, summed up over all calls of ``add`` and ``upsert``; kept in the index."""

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
class Check:
    """What one check of ``verify`` found."""

    name: str
    status: Literal["ok", "failed", "skipped"]
    found: str
    """One sentence: what is so, what is wrong, or why the check does not apply."""
    examined: int
    """Rows, values or names that were looked at."""


@dataclass(frozen=True)
class VerifyReport:
    """Whether an index is whole."""

    checks: tuple[Check, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the checks that failed."""
        return tuple(check.name for check in self.checks if check.status == "failed")

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {"ok": self.ok, "failed": list(self.failed), **asdict(self)}


@dataclass(frozen=True)
class CompactReport:
    """What ``compact`` did to the file."""

    bytes_before: int
    """With its write-ahead log; 0 in memory."""
    bytes_after: int
    seconds: float


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
    read_probes: Callable[[], tuple[Probe, ...]] = field(default=tuple, repr=False, compare=False)
    """Gives ``probes``: to write them out takes longer than many a search."""
    plan: str = ""
    """One sentence: how the search was carried out and why."""
    device: str = "cpu"
    """Where the leaves were scanned: "cpu" or "cuda:0"; after "cpu" in brackets, why it was not the GPU that was
    chosen."""

    @cached_property
    def probes(self) -> tuple[Probe, ...]:
        """The opened leaves, best first; only for a single query."""
        return self.read_probes()

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "read_probes"}
        return values | {"seconds": dict(self.seconds), "probes": [asdict(probe) for probe in self.probes]}

    def __getstate__(self) -> dict[str, Any]:
        """For a copy or another process: the probes themselves, since what gives them belongs to the index."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return values | {"read_probes": partial(_itself, self.probes)}


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
    read_trace: Callable[[], SearchTrace] = field(repr=False)
    """Gives ``trace``: to put it together takes longer than some of the search."""

    @cached_property
    def trace(self) -> SearchTrace:
        """What the search did, step by step."""
        return self.read_trace()

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
        if self.single:
            return flat
        ends = self.offsets.tolist()
        return [flat[start:end] for start, end in pairwise(ends)]  # which takes a fifth of the time of np.split

    def __iter__(self) -> Iterator[Any]:
        yield self.ids
        yield self.distances

    def __getstate__(self) -> dict[str, Any]:
        """For a copy or another process: codes and trace themselves, since what gives them belongs to the index."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        codes, trace = partial(_itself, self.read_codes()), partial(_itself, self.trace)
        return values | {"read_codes": codes, "read_trace": trace}

    def __len__(self) -> int:
        """Hits of a single query, or the number of queries in a batch."""
        return len(self.flat_ids) if self.single else len(self.offsets) - 1

    def to_arrow(self) -> pa.Table:
        """One row per hit: query, rank, id, distance, semantic_id."""
        import pyarrow as pa

        counts = np.diff(self.offsets)
        are_strings = self.flat_ids.dtype == object  # which no hits would not tell
        return pa.table(
            {
                "query": np.repeat(np.arange(len(counts)), counts),
                "rank": np.arange(len(self.flat_ids)) - np.repeat(self.offsets[:-1], counts) + 1,
                "id": pa.array(self.flat_ids.tolist(), pa.string()) if are_strings else pa.array(self.flat_ids),
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


def _itself(value: Any) -> Any:
    return value
