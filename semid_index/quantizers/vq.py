"""``vq``: plain vector quantization, one codebook, where residual quantization began.

Trained by splitting (Linde, Buzo and Gray, 1980): start with the mean of all vectors; split every codeword in two that
lie close together; let k-means move them; and so on until there are enough. The codes have one level, so there is
nothing below a prefix; it is here to compare with, and for those who need one token per item.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from semid_index.errors import InvalidArgumentError
from semid_index.hookspecs import hookimpl
from semid_index.quantizer import Quantizer, Vectors
from semid_index.quantizers.kmeans import lloyd, nearest
from semid_index.quantizers.rq import ResidualKMeans

_SPLIT = 0.01  # how far apart the two halves of a codeword start, in root mean squared errors


class VectorQuantization(ResidualKMeans):
    """One codebook of ``codebook_size`` words, 2 to 65,536; ``iterations`` of k-means after each split."""

    name: ClassVar[str] = "vq"

    def __init__(self, levels: int = 1, codebook_size: int = 256, *, iterations: int = 10) -> None:
        if levels != 1:
            raise InvalidArgumentError(f"'vq' has one level: levels must be 1, not {levels!r}. For more, use 'rq'.")
        super().__init__(levels, codebook_size, iterations=iterations)

    def _train_level(self, residuals: Vectors, size: int, seed: int, report: Callable[[int, int], None]) -> Vectors:
        return split_codewords(residuals, size, seed=seed, iterations=self.iterations, report=report)

    def get_config(self) -> dict[str, Any]:
        """What the constructor needs, as JSON values."""
        return {"levels": 1, "codebook_size": self.codebook_sizes[0], "iterations": self.iterations}


def split_codewords(
    points: Vectors, size: int, *, seed: int, iterations: int, report: Callable[[int, int], None]
) -> Vectors:
    """``size`` centroids of (n, dim) points by splitting: (size, dim).

    Where fewer splits are needed than there are codewords, those with the largest squared errors in all are split.
    """
    random = np.random.default_rng(seed)
    codebook: Vectors = points.mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32)
    while len(codebook) < size:
        report(len(codebook), size)
        errors = _errors(points, codebook)
        split = np.argsort(-errors, kind="stable")[: size - len(codebook)]
        apart = random.standard_normal((len(split), points.shape[1])).astype(np.float32)
        apart *= _SPLIT * np.sqrt(errors.sum() / points.size, dtype=np.float32)
        halves = codebook[split]
        codebook = codebook.copy()
        codebook[split] = halves - apart
        codebook = lloyd(points, np.concatenate([codebook, halves + apart]), seed=seed, iterations=iterations)
    report(size, size)
    return codebook


def _errors(points: Vectors, codebook: Vectors) -> NDArray[np.float64]:
    """The sum of squared distances of the points nearest to each codeword: (K,)."""
    chosen = nearest(points, codebook)
    apart = points - codebook[chosen]
    squares = np.einsum("ij,ij->i", apart, apart)
    return np.bincount(chosen, weights=squares, minlength=len(codebook)).astype(np.float64)


@hookimpl
def semid_register_quantizers(register: Callable[[type[Quantizer]], None]) -> None:
    """Offer ``vq``."""
    register(VectorQuantization)
