"""``rq``: residual k-means, the default quantizer.

Level 1 clusters the vectors; level 2 clusters what is left of each vector after its level-1 codeword is
subtracted; and so on. A vector is described by the codeword it is nearest to at each level, and decodes to their sum.
(Residual, or multi-stage, vector quantization: Juang and Gray, 1982.)

Within a level the codewords are numbered so that neighbours in number are neighbours in space: the first bit of a code
says in which half of the codewords it lies, the second in which quarter, and so on (:func:`bisection_order`). The
numbering is free, since any order of codewords encodes equally well; with this one, a range of codes that shares its
first bits is a compact region, which is what search leaves are made of.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from semid_index.codes import CodeLayout
from semid_index.errors import InvalidArgumentError, InvalidVectorsError
from semid_index.hookspecs import hookimpl
from semid_index.quantizer import Codes, Quantizer, Vectors
from semid_index.quantizers.beam import check_beam, choose_codes
from semid_index.quantizers.kmeans import kmeans, lloyd, nearest
from semid_index.quantizers.refine import left_over, mean_error, refine_codebooks
from semid_index.records import Refinement
from semid_index.vectors import as_vectors

log = logging.getLogger("semid_index")

_ENCODE_BATCH = 16_384  # rows whose residuals are held at once: 25 MB at 384 dimensions
_REFINE_BEAM = 5  # with which rows are encoded again while codebooks are refined
_LEAST_SCALE = np.float32(1e-6)
REFIT_ITERATIONS = 5  # of k-means when learning on (docs/decisions/0013)
MAX_LEVELS = 64


def sizes_per_level(levels: int, codebook_size: int | Sequence[int]) -> tuple[int, ...]:
    """One codebook size per level, from one size for all or a list with one for each."""
    if isinstance(levels, bool) or not isinstance(levels, int) or not 1 <= levels <= MAX_LEVELS:
        raise InvalidArgumentError(f"levels must be a whole number from 1 to {MAX_LEVELS}, not {levels!r}.")
    sizes = list(codebook_size) if isinstance(codebook_size, Sequence | np.ndarray) else [codebook_size] * levels
    if len(sizes) != levels:
        raise InvalidArgumentError(
            f"codebook_size lists {len(sizes)} sizes for levels={levels}. Give one for each level."
        )
    if not all(isinstance(size, int | np.integer) and not isinstance(size, bool) for size in sizes):
        raise InvalidArgumentError(f"codebook_size must be a whole number, or a list of them, not {codebook_size!r}.")
    return CodeLayout(tuple(int(size) for size in sizes)).codebook_sizes


class ResidualKMeans(Quantizer):
    """Residual k-means: ``levels`` codebooks of ``codebook_size`` words each.

    ``codebook_size`` may be a list, one size for each level, such as ``[1024, 256, 256]``; any size from 2 to 65,536.
    ``iterations`` is the work of k-means for a level, in passes over the vectors.

    ``beam``: partial codes that encoding keeps after each level; 1 is greedy. ``prefix_levels``: so many first levels
    are encoded by themselves, with a beam of ``prefix_beam``, and the others after them. So with ``beam=5``,
    ``prefix_levels=2`` the first two codes stay those of the nearest codewords, whatever the beam finds below them; and
    with ``prefix_levels=2, prefix_beam=32`` they are (nearly always) the best pair. All three are stored with an index,
    so that items and queries are encoded alike.

    ``refine``: rounds in which all codebooks but those of the first ``prefix_levels`` are improved together after
    training (see :mod:`semid_index.quantizers.refine`); how far that moved prefixes is then in ``refinement``.

    ``normalize_residuals``: bring what is left over to length 1 before each level, as GRID does (Ju et al., 2025). Each
    codebook is then stored at the scale that suits all vectors best, so that codes still decode to a sum of codewords.
    """

    name: ClassVar[str] = "rq"

    refinement: Refinement | None = None
    """What refining did, after ``fit``."""

    def __init__(
        self,
        levels: int = 4,
        codebook_size: int | Sequence[int] = 256,
        *,
        iterations: int = 20,
        beam: int = 1,
        prefix_levels: int = 0,
        prefix_beam: int = 1,
        refine: int = 0,
        normalize_residuals: bool = False,
    ) -> None:
        self.codebook_sizes = sizes_per_level(levels, codebook_size)
        self.iterations = _whole("iterations", iterations, 1, 10_000)
        self.beam = check_beam(beam)
        self.prefix_levels = _whole("prefix_levels", prefix_levels, 0, self.levels)
        self.prefix_beam = check_beam(prefix_beam, "prefix_beam")
        self.refine = _whole("refine", refine, 0, 1_000)
        if not isinstance(normalize_residuals, bool):
            raise InvalidArgumentError(f"normalize_residuals must be True or False, not {normalize_residuals!r}.")
        self.normalize_residuals = normalize_residuals
        if normalize_residuals and (self.beam > 1 or self.prefix_beam > 1 or self.refine):
            raise InvalidArgumentError(
                "normalize_residuals rescales what is left over at each level, so codewords do not simply add up while "
                "encoding: leave beam and prefix_beam at 1 and refine at 0, or normalize_residuals at False."
            )

    def fit(self, vectors: Vectors, *, seed: int = 0) -> Self:
        """Learn one codebook after the other, each on what the ones before it leave over; then refine them."""
        rows = self._checked_rows(vectors)
        codebooks, learned = self._learn(rows, seed)
        return self._keep([codebook[bisection_order(codebook)] for codebook in codebooks], learned)

    def refit(self, vectors: Vectors, *, seed: int = 0) -> Self:
        """Learn on from the codebooks that it has, which keep their order, so that most vectors keep their codes.

        A few iterations of k-means (docs/decisions/0013): more would lower the error a little, and move more vectors.
        """
        rows = self._checked_rows(vectors)
        start = self._trained()
        if self.normalize_residuals:
            start = [codebook / scale for codebook, scale in zip(start, self.state()["scales"], strict=True)]
        return self._keep(*self._learn(rows, seed, start))

    def _checked_rows(self, vectors: Vectors) -> Vectors:
        rows = as_vectors(vectors, what="training vectors")
        if len(rows) < max(self.codebook_sizes):
            raise InvalidVectorsError(
                "Training needs at least as many vectors as the largest codebook has words: "
                f"{max(self.codebook_sizes)}, got n_samples = {len(rows)}. "
                "Give more vectors or a smaller codebook_size."
            )
        return rows

    def _learn(
        self, rows: Vectors, seed: int, start: Sequence[Vectors] | None = None
    ) -> tuple[list[Vectors], dict[str, NDArray[Any]]]:
        """One codebook for each level, all refined if that is wanted, and what else there is to keep."""
        codebooks, codes = self._train_levels(rows, seed, start)
        self.refinement = None
        if self.refine:
            codebooks = self._refined(codebooks, rows)
        if not self.normalize_residuals:
            return codebooks, {}
        scales = _best_scales(rows, codebooks, codes)
        return [codebook * scale for codebook, scale in zip(codebooks, scales, strict=True)], {"scales": scales}

    def _keep(self, codebooks: Sequence[Vectors], learned: dict[str, NDArray[Any]]) -> Self:
        self.learned = learned | {f"codebook_{level}": codebook for level, codebook in enumerate(codebooks, 1)}
        return self

    def _train_levels(self, rows: Vectors, seed: int, start: Sequence[Vectors] | None) -> tuple[list[Vectors], Codes]:
        """One codebook after the other, from given ones if there are any, and the greedy codes of the rows."""
        residuals = rows.copy()
        codebooks: list[Vectors] = []
        codes = np.empty((len(rows), self.levels), dtype=np.int32)
        for level, size in enumerate(self.codebook_sizes):
            what = f"level {level + 1} of {self.levels}, {size} codewords"

            def report(done: int, total: int, level: int = level, what: str = what) -> None:
                self.report_progress(level * total + done, (self.levels + self.refine) * total, what)

            if self.normalize_residuals:
                residuals = _unit(residuals)
            if start is None:
                codebook = self._train_level(residuals, size, seed + level, report)
            else:
                codebook = self._continue_level(residuals, start[level], seed + level, report)
            codebooks.append(codebook)
            codes[:, level] = nearest(residuals, codebook)
            residuals -= codebook[codes[:, level]]
        return codebooks, codes

    def _train_level(self, residuals: Vectors, size: int, seed: int, report: Callable[[int, int], None]) -> Vectors:
        """The codebook of one level: (size, dim)."""
        return kmeans(residuals, size, seed=seed, iterations=self.iterations, report=report)

    def _continue_level(
        self, residuals: Vectors, start: Vectors, seed: int, report: Callable[[int, int], None]
    ) -> Vectors:
        """The codebook of one level, near to an earlier one: (size, dim)."""
        report(0, 1)
        codebook = lloyd(residuals, start, seed=seed, iterations=REFIT_ITERATIONS)
        report(1, 1)
        return codebook

    def _refined(self, codebooks: list[Vectors], rows: Vectors) -> list[Vectors]:
        """The codebooks after refining all but those of the first ``prefix_levels``."""

        def report(done: int) -> None:
            self.report_progress(self.levels + done, self.levels + self.refine, "refine the levels together")

        first, beam = self.prefix_levels, max(self.beam, _REFINE_BEAM)
        left = left_over(rows, codebooks[:first], choose_codes(rows, codebooks[:first], self.prefix_beam))
        moved, after = refine_codebooks(
            codebooks[first:],
            left,
            encode=lambda words: choose_codes(left, words, self.beam),
            search=lambda words: choose_codes(left, words, beam),
            rounds=self.refine,
            report=report,
        )
        before = choose_codes(left, codebooks[first:], self.beam)
        changed = np.logical_or.accumulate(before != after, axis=1).mean(axis=0)
        errors = mean_error(left, codebooks[first:], before), mean_error(left, moved, after)
        self.refinement = Refinement(self.refine, *errors, (0.0,) * first + tuple(changed.tolist()))
        log.info("refined: %s", self.refinement)
        return codebooks[:first] + moved

    def encode(self, vectors: Vectors, *, beam: int | None = None) -> Codes:
        """Codes (n, levels) of vectors (n, dim): the nearest codewords, or with a beam a better choice of them.

        ``beam``: of the levels after the first ``prefix_levels``; by default the quantizer's own.
        """
        beam = self.beam if beam is None else check_beam(beam)
        codebooks = self._trained()
        vectors = as_vectors(vectors, dim=codebooks[0].shape[1])
        return self._encode_rows(vectors, codebooks, beam)

    def _encode_rows(self, vectors: Vectors, codebooks: Sequence[Vectors], beam: int) -> Codes:
        codes = np.empty((len(vectors), self.levels), dtype=np.int32)
        for start in range(0, len(vectors), _ENCODE_BATCH):
            batch = slice(start, start + _ENCODE_BATCH)
            codes[batch] = self._encode_batch(vectors[batch], codebooks, beam)
        return codes

    def _encode_batch(self, vectors: Vectors, codebooks: Sequence[Vectors], beam: int) -> Codes:
        if self.normalize_residuals:
            if beam != 1:
                raise InvalidArgumentError(f"With normalize_residuals encoding is greedy: beam must be 1, not {beam}.")
            return self._encode_normalized(vectors, codebooks)
        first = self.prefix_levels
        if first == 0 or first == self.levels or beam == self.prefix_beam == 1:
            return choose_codes(vectors, codebooks, self.prefix_beam if first == self.levels else beam)
        prefixes = choose_codes(vectors, codebooks[:first], self.prefix_beam)
        left = left_over(vectors, codebooks[:first], prefixes)
        return np.hstack([prefixes, choose_codes(left, codebooks[first:], beam)])

    def _encode_normalized(self, vectors: Vectors, codebooks: Sequence[Vectors]) -> Codes:
        codes = np.empty((len(vectors), self.levels), dtype=np.int32)
        residuals = vectors
        for level, (codebook, scale) in enumerate(zip(codebooks, self.state()["scales"], strict=True)):
            residuals, words = _unit(residuals), codebook / scale
            codes[:, level] = nearest(residuals, words)
            residuals = residuals - words[codes[:, level]]
        return codes

    def decode(self, codes: Codes) -> Vectors:
        """The sum of the codewords."""
        codebooks = self._trained()
        decoded = codebooks[0][codes[:, 0]]
        for level, codebook in enumerate(codebooks[1:], 1):
            decoded += codebook[codes[:, level]]
        return decoded

    def get_config(self) -> dict[str, Any]:
        """What the constructor needs, as JSON values."""
        return super().get_config() | {
            "iterations": self.iterations,
            "beam": self.beam,
            "prefix_levels": self.prefix_levels,
            "prefix_beam": self.prefix_beam,
            "refine": self.refine,
            "normalize_residuals": self.normalize_residuals,
        }

    def _trained(self) -> list[Vectors]:
        state = self.state()
        return [state[f"codebook_{level}"] for level in range(1, self.levels + 1)]


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
        raise InvalidArgumentError(f"{name} must be a whole number from {least} to {most:,}, not {value!r}.")
    return int(value)


def _unit(vectors: Vectors) -> Vectors:
    """The vectors at length 1; zero vectors stay as they are."""
    lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))[:, None]
    unit: Vectors = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    return unit


def _best_scales(vectors: Vectors, codebooks: Sequence[Vectors], codes: Codes) -> NDArray[np.float32]:
    """One factor for each codebook, such that the scaled codewords sum up to the vectors as closely as can be."""
    words = [codebook[chosen] for codebook, chosen in zip(codebooks, codes.T, strict=True)]
    products = np.array([[np.vdot(one, other) for other in words] for one in words], dtype=np.float64)
    targets = np.array([np.vdot(one, vectors) for one in words], dtype=np.float64)
    scales = np.linalg.lstsq(products, targets, rcond=None)[0].astype(np.float32)
    scales[np.abs(scales) < _LEAST_SCALE] = _LEAST_SCALE  # encoding divides by it
    return scales


def bisection_order(codebook: Vectors) -> NDArray[np.int64]:
    """An order of the codewords in which every aligned half, quarter, eighth ... is a compact group.

    The codewords (K, dim) are split in two along their main axis, the split is mended by balanced 2-means, and each
    half is ordered the same way. The first part of a split gets the largest power of two that leaves the rest no
    larger than it, so that the groups are those of the codes' leading bits for any K.
    """
    if len(codebook) < 2:
        return np.arange(len(codebook))
    first = 1 << ((len(codebook) - 1).bit_length() - 1)
    order = _bisect(codebook, first)
    head, tail = order[:first], order[first:]
    return np.concatenate([head[bisection_order(codebook[head])], tail[bisection_order(codebook[tail])]])


def _bisect(points: Vectors, first: int, rounds: int = 10) -> NDArray[np.int64]:
    """All points ordered so that the first ``first`` of them form one compact group and the others another."""
    order = np.argsort(points @ _main_axis(points), kind="stable")
    for _ in range(rounds):
        axis = points[order[first:]].mean(axis=0) - points[order[:first]].mean(axis=0)
        better = np.argsort(points @ axis, kind="stable")
        if np.array_equal(np.sort(better[:first]), np.sort(order[:first])):
            break
        order = better
    return order


def _main_axis(points: Vectors, rounds: int = 8) -> Vectors:
    """Roughly the direction in which the points vary most, by power iteration from the point farthest out."""
    centred = points - points.mean(axis=0)
    axis: Vectors = centred[np.argmax(np.einsum("ij,ij->i", centred, centred))]
    for _ in range(rounds):
        axis = centred.T @ (centred @ axis)
        axis /= max(float(np.sqrt(axis @ axis)), 1e-30)
    return axis


@hookimpl
def semid_register_quantizers(register: Callable[[type[Quantizer]], None]) -> None:
    """Offer ``rq``."""
    register(ResidualKMeans)
