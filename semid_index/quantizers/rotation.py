"""Rotations and projections, for quantizers that look at a vector along other axes than its own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from semid_index.quantizer import Vectors

_BATCH = 8_192  # rows in float64 at once: 25 MB at 384 dimensions


def random_rotation(rows: int, columns: int, *, seed: int) -> NDArray[np.float64]:
    """A random matrix of shape (rows, columns) whose columns are orthonormal; or its rows, if they are the fewer."""
    gaussian = np.random.default_rng(seed).standard_normal((max(rows, columns), min(rows, columns)))
    orthonormal = np.linalg.qr(gaussian)[0]
    return orthonormal if rows >= columns else orthonormal.T


def random_projection(vectors: Vectors, outputs: int, *, seed: int) -> Vectors:
    """A matrix of shape (outputs, dim) that rotates vectors at random.

    With fewer outputs than dimensions, it first takes the main axes, so that it is the directions of least variance
    that are lost, and rotates within them.
    """
    dim = vectors.shape[1]
    if outputs >= dim:
        return random_rotation(outputs, dim, seed=seed).astype(np.float32)
    return (random_rotation(outputs, outputs, seed=seed) @ _main_axes(vectors, outputs)).astype(np.float32)


def projected(vectors: Vectors, matrix: Vectors) -> Vectors:
    """Vectors (n, dim) seen along the rows of a matrix (outputs, dim): (n, outputs).

    Computed in float64 and rounded, because a float32 product depends in its last bit on how many rows there are, and
    codes must not.
    """
    result = np.empty((len(vectors), len(matrix)), dtype=np.float32)
    turned = matrix.T.astype(np.float64)
    for part in batches(len(vectors), _BATCH):
        result[part] = vectors[part] @ turned
    return result


def batches(rows: int, size: int) -> Iterator[slice]:
    """The slices that cut so many rows into pieces of at most ``size``."""
    return (slice(start, start + size) for start in range(0, rows, size))


def _main_axes(vectors: Vectors, count: int) -> NDArray[np.float64]:
    """The orthonormal directions in which vectors (n, dim) vary most, by principal components: (count, dim)."""
    mean = vectors.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((len(mean), len(mean)))
    for part in batches(len(vectors), _BATCH):
        centred = vectors[part] - mean
        covariance += centred.T @ centred
    return np.linalg.eigh(covariance)[1].T[::-1][:count]
