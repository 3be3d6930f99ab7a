"""Codes alone, at equal bytes: what each kind of code finds and loses when everything it needs is counted.

Counted for an item are its code, what a scan must know of it beside (the norm of an additive code, RaBitQ's factors),
and its share of what all items share (codebooks, rotations, ranges), which depends on how many items there are. Of the
shapes of a kind that fit the bytes, the one with the most bits of code is taken, or, where codebooks may have 16 words
or 256, the better of two.

Found is by the distances to the decoded vectors, as a scan by look-up tables computes them: the norm of an additive
code is kept in one byte, rounded, and used so.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from semid_index.bench.data import Data
from semid_index.bench.measures import Truth, distances_of, recall
from semid_index.bench.results import FORMAT
from semid_index.errors import InvalidArgumentError, SemidError
from semid_index.plugins import quantizer_class
from semid_index.quantizer import Quantizer, Vectors

KINDS = ("rq", "balanced-rq", "opq", "pq", "lsq", "rabitq", "sq8", "sq4", "binary")
RECALLS = (1, 10, 100)
LARGE_CATALOGUE = 10_000_000
"""Where codebooks cost next to nothing."""

_EQUAL = 1.05  # sizes come in steps: a code that takes a twentieth more than it has still counts as equal
_ADDITIVE = ("rq", "balanced-rq", "lsq", "binary")  # their norms do not follow from look-up tables
_SIZES = ((256, 8), (16, 4))  # codewords, and bits of a code
_MOST_LEVELS = 64
_MOST_LSQ_LEVELS = 8  # beyond, training takes a quarter of an hour
_FACTORS = 8  # bytes of RaBitQ's corrections
_ENTRIES = 1 << 24  # scores held at once


@dataclass(frozen=True)
class CodeShape:
    """A kind of code in one size, and what it costs."""

    kind: str
    options: dict[str, Any]
    code: float
    """Bytes of the code of an item."""
    beside: float
    """Bytes of norms or correction factors of an item."""
    shared: int
    """Bytes of codebooks, rotations and ranges, whatever the number of items."""

    def total(self, items: int) -> float:
        """Bytes of an item, its share of what is shared included."""
        return self.code + self.beside + self.shared / items

    @property
    def key(self) -> str:
        """The shape as a text: ``rq levels=4 codebook_size=256``."""
        return " ".join([self.kind, *(f"{name}={value}" for name, value in self.options.items())])


@dataclass(frozen=True)
class Judged:
    """What a kind of code achieves within so many bytes."""

    bytes: int
    """That it had."""
    items: int
    """That share the codebooks."""
    shape: dict[str, Any]
    total: float
    """Bytes that it takes."""
    error: float
    """Squared error of the decoded vectors, as a share of the variance."""
    recall: dict[str, float]
    """Of the 1, 10 and 100 nearest."""
    train_seconds: float
    rows_per_second: float


# -- what codes cost --------------------------------------------------------------------------------------------------


def shapes(kind: str, dim: int, metric: str) -> list[CodeShape]:
    """Every shape of a kind of code that is considered, for vectors of ``dim`` dimensions."""
    norm = 1.0 if kind in _ADDITIVE and metric != "ip" else 0.0
    if kind in ("rq", "balanced-rq", "lsq"):
        most = _MOST_LSQ_LEVELS if kind == "lsq" else _MOST_LEVELS
        return [
            CodeShape(kind, {"levels": m, "codebook_size": size}, m * bits / 8, norm, 4 * m * size * dim)
            for size, bits in _SIZES
            for m in range(1, most + 1)
        ]
    if kind in ("pq", "opq"):
        rotation = 4 * dim * dim if kind == "opq" else 0
        return [
            CodeShape(kind, {"levels": m, "codebook_size": size}, m * bits / 8, 0.0, 4 * size * dim + rotation)
            for size, bits in _SIZES
            for m in range(1, _MOST_LEVELS + 1)
            if dim % m == 0
        ]
    return _shapes_of_bits(kind, dim, norm)


def _shapes_of_bits(kind: str, dim: int, norm: float) -> list[CodeShape]:
    """The shapes of codes that keep some bits for each direction."""
    if kind == "binary":  # a direction, a threshold and an addend for each bit, and the mean
        shared = {levels: 4 * (8 * levels * (2 * dim + 1) + dim) for levels in range(1, _MOST_LEVELS + 1)}
        return [CodeShape(kind, {"levels": levels}, levels, norm, size) for levels, size in shared.items()]
    if kind == "rabitq":  # directions and the mean
        many = range(8, dim + 1, 8)
        return [CodeShape(kind, {"dims": n}, n / 8, float(_FACTORS), 4 * (n * dim + dim)) for n in many]
    axes = {n: 0 if n == dim else 4 * (n * dim + dim) for n in range(2, dim + 1, 2)}  # directions and the mean
    size = 1.0 if kind == "sq8" else 0.5
    return [CodeShape(kind, {"axes": n}, size * n, 0.0, shared + 8 * n) for n, shared in axes.items()]


def fitting(kind: str, dim: int, metric: str, budget: float, items: int) -> list[CodeShape]:
    """For each size of codebooks, the shape with the most bits of code within a budget of bytes an item.

    A twentieth more than the budget is allowed, because sizes come in steps.
    """
    largest: dict[int, CodeShape] = {}
    for shape in shapes(kind, dim, metric):
        words = shape.options.get("codebook_size", 0)
        if shape.total(items) <= _EQUAL * budget and (words not in largest or shape.code > largest[words].code):
            largest[words] = shape
    return list(largest.values())


# -- what they achieve ------------------------------------------------------------------------------------------------


class ReducedScalar:
    """``sq8`` or ``sq4`` of the first principal axes."""

    def __init__(self, kind: str, axes: int) -> None:
        self._scalar, self._axes = quantizer_class(kind)(), axes

    def fit(self, vectors: Vectors, *, seed: int = 0) -> None:
        """Learn axes and ranges."""
        self._mean = vectors.mean(axis=0)
        _, directions = np.linalg.eigh(np.cov((vectors - self._mean).T))
        self._directions = directions[:, ::-1][:, : self._axes].astype(np.float32)
        self._scalar.fit(self._project(vectors), seed=seed)

    def encode(self, vectors: Vectors) -> NDArray[np.int32]:
        """The codes of the coordinates."""
        return self._scalar.encode(self._project(vectors))

    def decode(self, codes: NDArray[np.int32]) -> Vectors:
        """The coordinates, turned back."""
        decoded: Vectors = self._scalar.decode(codes) @ self._directions.T + self._mean
        return decoded

    def _project(self, vectors: Vectors) -> Vectors:
        return np.ascontiguousarray((vectors - self._mean) @ self._directions)


def make_quantizer(shape: CodeShape) -> Quantizer | ReducedScalar:
    """The quantizer of a shape, as strong as it comes."""
    if shape.kind in ("sq8", "sq4"):
        return ReducedScalar(shape.kind, shape.options["axes"])
    stronger = {"refine": 8, "beam": 5} if shape.kind == "rq" else {}
    return quantizer_class(shape.kind)(**shape.options, **stronger)


@dataclass(frozen=True)
class _Measured:
    error: float
    recall: dict[str, float]
    train_seconds: float
    rows_per_second: float

    def __str__(self) -> str:
        recalls = ", ".join(f"{value:.3f} of the {k}" for k, value in self.recall.items())
        return f"error {self.error:.3f}, found {recalls} nearest, trained in {self.train_seconds:.0f} s"


def judge(
    data: Data,
    truth: Truth,
    budgets: Sequence[int],
    *,
    kinds: Sequence[str] = KINDS,
    catalogues: Sequence[int] | None = None,
    train_rows: int = 30_000,
    done: Sequence[Judged] = (),
    keep: Callable[[list[Judged], dict[str, str]], None] = lambda _judged, _left_out: None,
    say: Callable[[str], None] = lambda _text: None,
) -> tuple[list[Judged], dict[str, str]]:
    """Every kind of code at every budget; and why some are left out. ``keep`` gets both after each kind.

    ``catalogues``: numbers of items that share the codebooks; by default those of the data, and ten million.
    """
    items = catalogues or sorted({len(data.base), LARGE_CATALOGUE})
    results, left_out = list(done), {}
    known = {(row.bytes, row.items, row.shape["kind"]) for row in done}
    measured: dict[str, _Measured] = {}
    for budget in budgets:
        for kind in kinds:
            for count in items:
                if (budget, count, kind) in known:
                    continue
                name = f"{kind} in {budget} bytes of {count:,} items"
                able = fitting(kind, data.shape.dim, data.metric, budget, count)
                if not able:
                    left_out[name] = f"its smallest code takes more than {budget} bytes with its share of the rest"
                    continue
                try:
                    for shape in able:
                        if shape.key not in measured:
                            measured[shape.key] = _measure(shape, data, truth, train_rows)
                            say(f"  {shape.key}: {measured[shape.key]}")
                except SemidError as error:
                    left_out[name] = str(error)
                    continue
                best = max(able, key=lambda shape: measured[shape.key].recall["10"])
                total = round(best.total(count), 3)
                results.append(Judged(budget, count, asdict(best), total, **asdict(measured[best.key])))
                keep(results, left_out)
    return results, left_out


def _measure(shape: CodeShape, data: Data, truth: Truth, train_rows: int) -> _Measured:
    base = data.base
    sample = np.random.default_rng(0).permutation(len(base))[:train_rows]
    quantizer = make_quantizer(shape)
    started = time.perf_counter()
    quantizer.fit(np.ascontiguousarray(base[np.sort(sample)]), seed=0)
    trained = time.perf_counter()
    codes = quantizer.encode(base)
    encoded = time.perf_counter()
    decoded = quantizer.decode(codes)
    error = float(np.square(base - decoded).sum() / np.square(base - base.mean(axis=0)).sum())
    found = nearest_decoded(data.queries, decoded, data.metric, max(RECALLS), round_norms=shape.beside == 1.0)
    distances = distances_of(found, data.queries, base, data.metric)
    recalls = {str(k): recall(distances, truth, k) for k in RECALLS if k <= len(base)}
    return _Measured(error, recalls, trained - started, len(base) / max(1e-9, encoded - trained))


def nearest_decoded(queries: Vectors, decoded: Vectors, metric: str, k: int, *, round_norms: bool) -> NDArray[np.int64]:
    """The rows whose decoded vectors are nearest to each query, nearest first: (q, k).

    Under cosine queries have length 1, and items do as well, so the nearest by l2 are wanted. With ``round_norms``
    squared norms are rounded to 256 even steps, as codes that keep them in a byte would.
    """
    k = min(k, len(decoded))
    norms = np.zeros(len(decoded), dtype=np.float32)
    if metric != "ip":
        norms = np.einsum("ij,ij->i", decoded, decoded)
        norms = rounded_to_a_byte(norms) if round_norms else norms
    rows = np.empty((len(queries), k), dtype=np.int64)
    block = max(1, _ENTRIES // len(decoded))
    for start in range(0, len(queries), block):
        scores = norms - 2 * (queries[start : start + block] @ decoded.T)
        best = np.argpartition(scores, k - 1, axis=1)[:, :k]
        order = np.argsort(np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
        rows[start : start + block] = np.take_along_axis(best, order, axis=1)
    return rows


def rounded_to_a_byte(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each value moved to the nearest of 256 even steps from the least to the largest."""
    least, step = values.min(), (values.max() - values.min()) / 255
    if step == 0:
        return values
    rounded: NDArray[np.float32] = (least + np.rint((values - least) / step) * step).astype(np.float32)
    return rounded


# -- files ------------------------------------------------------------------------------------------------------------


@dataclass
class Rulings:
    """What the referee found on one set of data."""

    data: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, str]
    judged: list[Judged]
    left_out: dict[str, str]

    def save(self, path: Path) -> None:
        """Write a file, one record a line."""
        said = {"format": FORMAT, **asdict(self)}
        judged = ",\n".join(json.dumps(record) for record in said.pop("judged"))
        text = "".join(f"{json.dumps(name)}: {json.dumps(value)},\n" for name, value in said.items())
        part = path.with_suffix(".part")
        part.write_text(f'{{\n{text}"judged": [\n{judged}\n]\n}}\n', encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Rulings:
        """Read a file."""
        said = json.loads(path.read_text(encoding="utf-8"))
        if said.pop("format", None) != FORMAT:
            raise InvalidArgumentError(f"{path} has no rulings of format {FORMAT}. Choose another folder.")
        return cls(**{**said, "judged": [Judged(**record) for record in said["judged"]]})
