"""``sign-hash``: one bit per random direction, which says on which side of the mean a vector lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from semid_index.errors import InvalidArgumentError, InvalidVectorsError, NotTrainedError
from semid_index.hookspecs import hookimpl
from semid_index.quantizer import Codes, Quantizer, Vectors
from semid_index.vectors import as_vectors


class SignHash(Quantizer):
    """``levels`` codes of log2(``codebook_size``) bits each: in all at most as many bits as there are dimensions."""

    name = "sign-hash"
    levels: int = 0
    codebook_sizes: tuple[int, ...] = ()

    def __init__(self, levels: int = 2, codebook_size: int = 16) -> None:
        if codebook_size not in (2, 4, 8, 16, 32, 64, 128, 256):
            raise InvalidArgumentError(f"codebook_size must be a power of two up to 256, not {codebook_size!r}.")
        self.levels, self.codebook_sizes = levels, (codebook_size,) * levels
        self.worth = codebook_size >> np.arange(1, codebook_size.bit_length())  # of each bit of a code: 8, 4, 2, 1
        self.learned: dict[str, NDArray[Any]] | None = None

    def fit(self, vectors: Vectors, *, seed: int = 0) -> Self:
        """Draw directions, put those first that tell most, and measure how far vectors lie from the mean."""
        vectors, bits = as_vectors(vectors), self.levels * len(self.worth)
        if not len(vectors) or vectors.shape[1] < bits:
            raise InvalidVectorsError(f"{bits} bits need vectors of {bits} dimensions or more, n_samples >= 1.")
        self.report_progress(0, 1, "directions")
        mean, random = vectors.mean(axis=0), np.random.default_rng(seed)
        directions = np.linalg.qr(random.standard_normal((vectors.shape[1], bits)))[0].astype(np.float32)
        distances = np.abs((vectors - mean) @ directions).mean(axis=0)
        order = np.argsort(-distances)
        self.learned = {"mean": mean, "directions": directions[:, order], "distances": distances[order]}
        self.report_progress(1, 1, "directions")
        return self

    def encode(self, vectors: Vectors, *, beam: int = 1) -> Codes:
        """The bits, as one number for each level."""
        mean, directions, _ = self.state().values()
        sides = (as_vectors(vectors, dim=len(mean)) - mean) @ directions > 0
        return np.asarray(sides.reshape(-1, self.levels, len(self.worth)) @ self.worth, dtype=np.int32)

    def decode(self, codes: Codes) -> Vectors:
        """From the mean, along each direction, as far as vectors on that side lie on average."""
        mean, directions, distances = self.state().values()
        sides = (np.asarray(codes)[:, :, None] & self.worth > 0).reshape(len(codes), len(distances))
        return np.asarray(mean + np.where(sides, distances, -distances) @ directions.T, dtype=np.float32)

    def get_config(self) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {"levels": self.levels, "codebook_size": self.codebook_sizes[0]}

    def state(self) -> dict[str, NDArray[Any]]:
        """``mean`` (dim,), ``directions`` (dim, bits) and ``distances`` (bits,)."""
        if self.learned is None:
            raise NotTrainedError("'sign-hash' is not trained. Call fit (or index.train) with vectors first.")
        return self.learned

    @classmethod
    def restore(cls, config: Mapping[str, Any], state: Mapping[str, NDArray[Any]]) -> Self:
        """The quantizer that learned this."""
        quantizer = cls(**config)
        quantizer.learned = {name: state[name] for name in ("mean", "directions", "distances")}
        return quantizer


@hookimpl
def semid_register_quantizers(register: Callable[[type[Quantizer]], None]) -> None:
    """Offer ``sign-hash``."""
    register(SignHash)
