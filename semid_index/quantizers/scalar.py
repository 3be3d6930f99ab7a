"""``sq8`` and ``sq4``: scalar quantization.

Every dimension is rounded on its own, to one of 256 (or 16) even steps between the smallest and the largest value
seen in training. So there is one level per dimension, and no level is coarser than another: no prefixes, no leaves,
no codebooks to add up. It loses the least per vector and compresses the least: one byte, or half a byte, per dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from semid_index.errors import InvalidArgumentError, InvalidVectorsError
from semid_index.hookspecs import hookimpl
from semid_index.quantizer import Codes, Quantizer, Vectors
from semid_index.vectors import as_vectors

log = logging.getLogger("semid_index")

_ENCODE_BATCH = 16_384  # rows scaled at once: 25 MB at 384 dimensions


class ScalarQuantization(Quantizer):
    """What ``sq8`` and ``sq4`` share: ``steps`` even steps for each dimension. Values outside their range are clipped.

    There is one level per dimension, so ``levels`` and ``codebook_size`` do not apply. They are taken because
    every quantizer is made with them, and a value that does not hold is logged. Before ``fit``, ``levels`` is 0.
    """

    hierarchical: ClassVar[bool] = False
    steps: ClassVar[int]
    """Codes that each dimension has."""

    def __init__(self, levels: int | None = None, codebook_size: int | Sequence[int] | None = None) -> None:
        if levels is not None or codebook_size not in (None, self.steps):
            log.info(
                "'%s' has one level per dimension with %d codes each; levels=%r and codebook_size=%r do not apply.",
                *(self.name, self.steps, levels, codebook_size),
            )

    def fit(self, vectors: Vectors, *, seed: int = 0) -> Self:
        """Learn the range of each dimension. Nothing is random here: ``seed`` changes nothing."""
        vectors = as_vectors(vectors, what="training vectors")
        if not len(vectors):
            raise InvalidVectorsError("Training needs at least one vector, got n_samples = 0.")
        self.report_progress(0, 1, "ranges")
        minimum = vectors.min(axis=0)
        # In float64, steps times their number is the range again to the last bit, which _scaled needs.
        step = (vectors.max(axis=0) - minimum) / np.float64(self.steps - 1)
        self.learned = {"minimum": minimum, "step": step}
        self.codebook_sizes = (self.steps,) * len(minimum)
        self.report_progress(1, 1, "ranges")
        return self

    def encode(self, vectors: Vectors, *, beam: int | None = None) -> Codes:
        """For each dimension, the step in which its value lies."""
        if beam not in (None, 1):
            raise InvalidArgumentError(f"'{self.name}' has nothing to search for: beam must be 1, not {beam!r}.")
        minimum, step = self._trained()
        vectors = as_vectors(vectors, dim=len(minimum))
        codes = np.empty(vectors.shape, dtype=np.int32)
        for start in range(0, len(vectors), _ENCODE_BATCH):
            part = slice(start, start + _ENCODE_BATCH)
            codes[part] = self._scaled(vectors[part], minimum, step)  # the cast to integers rounds down
        return codes

    def _scaled(self, vectors: Vectors, minimum: NDArray[np.float32], step: NDArray[np.float64]) -> NDArray[np.float32]:
        """Each value from 0 to steps - 1, in the float32 operations of FAISS, so that codes are the same as there."""
        top = np.float32(self.steps - 1)
        width = (step * top).astype(np.float32)
        with np.errstate(over="ignore"):  # a value far outside a narrow range is infinite until it is clipped
            scaled: NDArray[np.float32] = np.divide(
                vectors - minimum, width, out=np.zeros_like(vectors), where=width > 0
            )
        scaled = np.clip(scaled, 0, 1, out=scaled)
        scaled *= top
        return scaled

    def decode(self, codes: Codes) -> Vectors:
        """The middle of each step."""
        minimum, step = self._trained()
        return (minimum + (codes + 0.5) * step).astype(np.float32)

    def get_config(self) -> dict[str, Any]:
        """Nothing: the ranges, and so the levels, are learned."""
        return {}

    @classmethod
    def restore(cls, config: Mapping[str, Any], state: Mapping[str, NDArray[Any]]) -> Self:
        """The quantizer that had these ranges."""
        quantizer = super().restore(config, state)
        quantizer.codebook_sizes = (cls.steps,) * len(state["minimum"])
        return quantizer

    def _trained(self) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
        """The value that code 0 begins at and how far codes are apart (0 where training saw one value only)."""
        state = self.state()
        return state["minimum"], state["step"]


class ScalarQuantization8(ScalarQuantization):
    """One byte per dimension; equal to FAISS's ``QT_8bit``."""

    name: ClassVar[str] = "sq8"
    steps: ClassVar[int] = 256


class ScalarQuantization4(ScalarQuantization):
    """Half a byte per dimension; equal to FAISS's ``QT_4bit``."""

    name: ClassVar[str] = "sq4"
    steps: ClassVar[int] = 16


@hookimpl
def semid_register_quantizers(register: Callable[[type[Quantizer]], None]) -> None:
    """Offer ``sq8`` and ``sq4``."""
    register(ScalarQuantization8)
    register(ScalarQuantization4)
