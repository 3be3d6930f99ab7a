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
from semid_index.quantizers.kmeans import kmeans, nearest
from semid_index.vectors import as_vectors

log = logging.getLogger("semid_index")

_ENCODE_BATCH = 16_384  # rows whose residuals are held at once: 25 MB at 384 dimensions
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
    ``iterations`` is how often k-means moves the codewords of a level.
    """

    name: ClassVar[str] = "rq"

    def __init__(self, levels: int = 4, codebook_size: int | Sequence[int] = 256, *, iterations: int = 20) -> None:
        self.codebook_sizes = sizes_per_level(levels, codebook_size)
        if not isinstance(iterations, int) or iterations < 1:
            raise InvalidArgumentError(f"iterations must be at least 1, not {iterations!r}.")
        self.iterations = iterations

    def fit(self, vectors: Vectors, *, seed: int = 0) -> Self:
        """Learn one codebook after the other, each on what the ones before it leave over."""
        residuals = as_vectors(vectors, what="training vectors").copy()
        if len(residuals) < max(self.codebook_sizes):
            raise InvalidVectorsError(
                "Training needs at least as many vectors as the largest codebook has words: "
                f"{max(self.codebook_sizes)}, got n_samples = {len(residuals)}. "
                "Give more vectors or a smaller codebook_size."
            )
        learned: dict[str, Vectors] = {}
        for level, size in enumerate(self.codebook_sizes):
            what = f"level {level + 1} of {self.levels}, {size} codewords"

            def report(done: int, total: int, level: int = level, what: str = what) -> None:
                self.report_progress(level * total + done, self.levels * total, what)

            codebook = self._train_level(residuals, size, seed + level, report)
            codebook = codebook[bisection_order(codebook)]
            learned[f"codebook_{level + 1}"] = codebook
            residuals -= codebook[nearest(residuals, codebook)]
        self.learned = learned
        return self

    def _train_level(self, residuals: Vectors, size: int, seed: int, report: Callable[[int, int], None]) -> Vectors:
        """The codebook of one level: (size, dim)."""
        return kmeans(residuals, size, seed=seed, iterations=self.iterations, report=report)

    def encode(self, vectors: Vectors, *, beam: int = 1) -> Codes:
        """At each level, the codeword nearest to what the levels before leave over."""
        if beam != 1:
            raise InvalidArgumentError(f"'{self.name}' encodes greedily: beam must be 1, not {beam!r}.")
        codebooks = self._trained()
        vectors = as_vectors(vectors, dim=codebooks[0].shape[1])
        codes = np.empty((len(vectors), self.levels), dtype=np.int32)
        for start in range(0, len(vectors), _ENCODE_BATCH):
            residuals = vectors[start : start + _ENCODE_BATCH].copy()
            for level, codebook in enumerate(codebooks):
                chosen = nearest(residuals, codebook)
                codes[start : start + _ENCODE_BATCH, level] = chosen
                if level + 1 < self.levels:
                    residuals -= codebook[chosen]
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
        return {**super().get_config(), "iterations": self.iterations}

    def _trained(self) -> list[Vectors]:
        state = self.state()
        return [state[f"codebook_{level}"] for level in range(1, self.levels + 1)]


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
