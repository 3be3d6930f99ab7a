"""``binary`` and ``rabitq``: a bit for each direction, to compare with.

Both rotate the vector and keep on which side of a threshold each coordinate lies:

- ``binary`` keeps nothing else, as FAISS's ``IndexLSH`` does, and decodes by the linear map that fits best.
- ``rabitq``, by FAISS, adds two numbers per vector, its distance from the mean and how well the bits point at it
  (RaBitQ: Gao and Long, 2024), and on request more bits per dimension (Gao et al., 2025).

No bit is coarser than another, so there are no shelves and no leaves. A level is a byte of the code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from semid_index.errors import InvalidArgumentError, InvalidVectorsError, MissingDependencyError
from semid_index.hookspecs import hookimpl
from semid_index.quantizer import Codes, Quantizer, Vectors
from semid_index.quantizers.additive import sum_of_codewords
from semid_index.quantizers.kmeans import import_faiss
from semid_index.quantizers.rotation import batches, projected, random_projection
from semid_index.quantizers.rq import sizes_per_level
from semid_index.vectors import as_vectors

log = logging.getLogger("semid_index")

_BYTE = 256
_BATCH = 8_192  # rows encoded or decoded at once: 25 MB at 384 dimensions in float64
_LARGEST_FACTOR = 1e18  # codes that no vector got may spell any number, and must decode to a finite vector


def _training_vectors(vectors: Vectors) -> Vectors:
    vectors = as_vectors(vectors, what="training vectors")
    if not len(vectors):
        raise InvalidVectorsError("Training needs at least one vector, got n_samples = 0.")
    return vectors


def _refuse_beam(quantizer: Quantizer, beam: int | None) -> None:
    if beam not in (None, 1):
        raise InvalidArgumentError(f"'{quantizer.name}' has nothing to search for: beam must be 1, not {beam!r}.")


class BinaryQuantization(Quantizer):
    """``levels`` bytes of 8 bits, each telling on which side of the median a vector lies in one direction.

    The directions are a random rotation of the vectors; where there are fewer bits than dimensions, of their main axes.
    Decoding is the linear map from bits to vectors with the least squared error in training, so that the decoded vector
    is a sum of one codeword per level. The codes equal those of FAISS's ``IndexLSH`` with this rotation and trained
    thresholds.
    """

    name: ClassVar[str] = "binary"
    hierarchical: ClassVar[bool] = False

    def __init__(self, levels: int = 16, codebook_size: int | Sequence[int] = _BYTE) -> None:
        self.codebook_sizes = sizes_per_level(levels, codebook_size)
        if set(self.codebook_sizes) != {_BYTE}:
            raise InvalidArgumentError(
                f"A level of '{self.name}' is a byte, so codebook_size must be {_BYTE}, not {codebook_size!r}."
            )

    def fit(self, vectors: Vectors, *, seed: int = 0) -> Self:
        """Draw the rotation, and learn the medians and the codewords."""
        vectors = _training_vectors(vectors)
        self.report_progress(0, 1, "medians")
        rotation = random_projection(vectors, 8 * self.levels, seed=seed)
        along = projected(vectors, rotation)
        thresholds = np.median(along, axis=0)
        weights, offset = _linear_map(along >= thresholds, vectors)
        all_bits = np.unpackbits(np.arange(_BYTE, dtype=np.uint8)[:, None], axis=1, bitorder="little")
        codebooks = [(all_bits @ weights[8 * level : 8 * level + 8]) for level in range(self.levels)]
        codebooks[0] += offset
        named = {f"codebook_{level}": words.astype(np.float32) for level, words in enumerate(codebooks, 1)}
        self.learned = {"rotation": rotation, "thresholds": thresholds, **named}
        self.report_progress(1, 1, "medians")
        return self

    def encode(self, vectors: Vectors, *, beam: int | None = None) -> Codes:
        """The bits, 8 to a byte, the first in its lowest place."""
        _refuse_beam(self, beam)
        state = self.state()
        rotation, thresholds = state["rotation"], state["thresholds"]
        vectors = as_vectors(vectors, dim=rotation.shape[1])
        codes = np.empty((len(vectors), self.levels), dtype=np.int32)
        for part in batches(len(vectors), _BATCH):
            sides = projected(vectors[part], rotation) >= thresholds
            codes[part] = np.packbits(sides, axis=1, bitorder="little")
        return codes

    def decode(self, codes: Codes) -> Vectors:
        """The sum of the codewords."""
        state = self.state()
        return sum_of_codewords([state[f"codebook_{level}"] for level in range(1, self.levels + 1)], codes)


def _linear_map(sides: NDArray[np.bool_], vectors: Vectors) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weights (bits, dim) and offset (dim,), so that sides @ weights + offset is nearest to the vectors."""
    outputs = sides.shape[1] + 1
    products, moments = np.zeros((outputs, outputs)), np.zeros((outputs, vectors.shape[1]))
    for part in batches(len(vectors), _BATCH):
        inputs = np.ones((len(vectors[part]), outputs))
        inputs[:, :-1] = sides[part]
        products += inputs.T @ inputs
        moments += inputs.T @ vectors[part]
    solution = np.linalg.lstsq(products, moments)[0]  # the smallest one, where bits are always alike
    return solution[:-1], solution[-1]


class RaBitQuantization(Quantizer):
    """RaBitQ: ``bits`` bits (1 to 9) for each direction of a random rotation, and correction factors, as FAISS writes.

    With ``dims``, vectors are first reduced to so many main axes. The code has ``dims * bits / 8`` bytes, and then 8
    bytes of factors, or 20 if ``bits`` is above 1; so ``dims=64`` gives 16 bytes. ``levels`` and ``codebook_size`` do
    not apply: a level is a byte. They are taken because every quantizer is made with them, and a value that does not
    hold is logged. Before ``fit``, ``levels`` is 0.

    The decoded vector is the one nearest to the original among those that the bits point at. (FAISS's own decoding
    makes it longer: unbiased for inner products, but farther away, and worse to search.)
    """

    name: ClassVar[str] = "rabitq"
    hierarchical: ClassVar[bool] = False

    def __init__(
        self,
        levels: int | None = None,
        codebook_size: int | Sequence[int] | None = None,
        *,
        bits: int = 1,
        dims: int | None = None,
    ) -> None:
        if isinstance(bits, bool) or not isinstance(bits, int | np.integer) or not 1 <= bits <= 9:
            raise InvalidArgumentError(f"bits must be a whole number from 1 to 9, not {bits!r}.")
        if dims is not None and (isinstance(dims, bool) or not isinstance(dims, int | np.integer) or dims < 1):
            raise InvalidArgumentError(f"dims must be a whole number, at least 1, or None for all, not {dims!r}.")
        if levels is not None or codebook_size not in (None, _BYTE):
            log.info(
                "'%s' has one level for each byte of its codes; levels=%r and codebook_size=%r do not apply.",
                *(self.name, levels, codebook_size),
            )
        self.bits = int(bits)
        self.dims = None if dims is None else int(dims)

    def fit(self, vectors: Vectors, *, seed: int = 0) -> Self:
        """Draw the rotation, and learn the mean and the main axes."""
        vectors = _training_vectors(vectors)
        dim = vectors.shape[1]
        if self.dims is not None and self.dims > dim:
            raise InvalidArgumentError(f"Vectors of {dim} dimensions cannot be reduced to dims={self.dims}.")
        self.report_progress(0, 1, "rotation")
        spread = np.sqrt(vectors.var(axis=0, dtype=np.float64).sum())
        rotation = random_projection(vectors, self.dims or dim, seed=seed)
        # FAISS takes a squared length below 1e-7 for zero. In units of the spread, that is next to nothing.
        unit = np.array([spread or 1.0])
        self.learned = {"mean": vectors.mean(axis=0, dtype=np.float64), "rotation": rotation, "unit": unit}
        self.codebook_sizes = (_BYTE,) * _code_bytes(len(rotation), self.bits)
        self.report_progress(1, 1, "rotation")
        return self

    def encode(self, vectors: Vectors, *, beam: int | None = None) -> Codes:
        """The bytes of FAISS's code for each vector."""
        _refuse_beam(self, beam)
        state = self.state()
        mean, rotation, unit = state["mean"], state["rotation"], state["unit"]
        vectors = as_vectors(vectors, dim=len(mean))
        quantizer = self._faiss(len(rotation))
        codes = np.empty((len(vectors), self.levels), dtype=np.int32)
        for part in batches(len(vectors), _BATCH):
            codes[part] = quantizer.compute_codes(projected((vectors[part] - mean) / unit, rotation))
        return codes

    def decode(self, codes: Codes) -> Vectors:
        """The nearest of the vectors that the bits point at."""
        state = self.state()
        mean, rotation, unit = state["mean"], state["rotation"], state["unit"]
        decoded = np.empty((len(codes), len(mean)), dtype=np.float32)
        for part in batches(len(codes), _BATCH):
            packed = np.asarray(codes[part]).astype(np.uint8)
            directions = self._directions(packed, len(rotation))
            lengths = self._lengths(packed, directions) * unit
            decoded[part] = mean + (directions * lengths[:, None]) @ rotation
        return decoded

    def _directions(self, packed: NDArray[np.uint8], dims: int) -> NDArray[np.float64]:
        """Where the bits point: (n, dims), half-integers. The sign bits come first, all others after three factors."""
        lower_bits, sign_bytes = self.bits - 1, -(-dims // 8)
        steps = np.unpackbits(packed[:, :sign_bytes], axis=1, count=dims, bitorder="little").astype(np.int64)
        if lower_bits:
            lower = np.unpackbits(packed[:, sign_bytes + 12 : -8], axis=1, count=dims * lower_bits, bitorder="little")
            steps = (steps << lower_bits) + lower.reshape(len(packed), dims, lower_bits) @ (1 << np.arange(lower_bits))
        return np.subtract(steps, (1 << lower_bits) - 0.5, dtype=np.float64)

    def _lengths(self, packed: NDArray[np.uint8], directions: NDArray[np.float64]) -> NDArray[np.float64]:
        """How many times its direction each vector goes: (n,).

        The last 8 bytes hold |x|^2 and, times a constant, |x|^2 / (x.v) for the direction v, the factor that makes
        inner products unbiased. The multiple of v nearest to x is (x.v) / |v|^2 of it.
        """
        with np.errstate(all="ignore"):
            squared, factor = np.ascontiguousarray(packed[:, -8:]).view("<f4").astype(np.float64).T
            unbiased = factor * (2 / np.sqrt(directions.shape[1]) if self.bits == 1 else -0.5)
            lengths: NDArray[np.float64] = squared / (unbiased * np.einsum("ij,ij->i", directions, directions))
        return np.nan_to_num(lengths).clip(-_LARGEST_FACTOR, _LARGEST_FACTOR)

    def _faiss(self, dims: int) -> Any:
        """FAISS's quantizer of rotated vectors."""
        faiss = import_faiss()
        if self.bits > 1 and not hasattr(faiss.RaBitQuantizer, "nb_bits"):
            raise MissingDependencyError(
                f"FAISS {faiss.__version__} has no RaBitQ with several bits per dimension. Use bits=1, or update FAISS."
            )
        several = (self.bits,) if self.bits > 1 else ()
        return faiss.RaBitQuantizer(dims, faiss.METRIC_L2, *several)

    def get_config(self) -> dict[str, Any]:
        """The number of bits and dimensions; the levels follow from them."""
        return {"bits": self.bits, "dims": self.dims}

    @classmethod
    def restore(cls, config: Mapping[str, Any], state: Mapping[str, NDArray[Any]]) -> Self:
        """The quantizer that had this configuration and state."""
        quantizer = super().restore(config, state)
        quantizer.codebook_sizes = (_BYTE,) * _code_bytes(len(state["rotation"]), quantizer.bits)
        return quantizer


def _code_bytes(dims: int, bits: int) -> int:
    """Bytes of a code: one bit per dimension and 8 bytes of factors; with more bits, these and 12 bytes of others."""
    signs = -(-dims // 8)
    return signs + 8 if bits == 1 else signs + 12 + -(-dims * (bits - 1) // 8) + 8


@hookimpl
def semid_register_quantizers(register: Callable[[type[Quantizer]], None]) -> None:
    """Offer ``binary`` and ``rabitq``."""
    register(BinaryQuantization)
    register(RaBitQuantization)
