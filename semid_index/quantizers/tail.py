"""Tail codes: 4-bit product quantization of the whole vector, for scanning candidates quickly.

They are kept beside the semantic ID and are no part of it. FAISS scans them 32 at a time in registers ("fast scan",
Andre et al., 2015), so that only the best candidates need exact distances.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from semid_index.quantizer import Vectors
from semid_index.quantizers.kmeans import import_faiss, openmp_threads

TAIL_BITS = 4
TAIL_ARRAY = "tail_codebooks"  # the name of its codebooks among all that an index has learned
_TRAINING_ROWS = 16_384  # 1,024 for each of the 16 codewords of a part
_BATCH = 65_536


def default_tail(dim: int) -> int:
    """How many 4-bit codes a vector gets: one for every 2 dimensions up to 128, every 4 up to 512, else every 8."""
    width = 2 if dim <= 128 else 4 if dim <= 512 else 8
    return 2 * -(-dim // (2 * width))  # an even number, so that codes fill whole bytes


@dataclass(frozen=True)
class Tail:
    """A trained 4-bit product quantizer; vectors are padded with zeros to a multiple of its parts."""

    codebooks: Vectors
    """(parts, 16, width)"""

    @property
    def parts(self) -> int:
        """4-bit codes per vector."""
        return len(self.codebooks)

    @property
    def padded_dim(self) -> int:
        """Dimensions of a vector after padding."""
        return int(self.codebooks.shape[0] * self.codebooks.shape[2])

    @classmethod
    def train(cls, vectors: Vectors, parts: int, *, seed: int) -> Self:
        """Learn from vectors (n, dim), n >= 16."""
        faiss = import_faiss()
        width = -(-vectors.shape[1] // parts)
        rows = vectors
        if len(vectors) > _TRAINING_ROWS:
            rows = vectors[np.sort(np.random.default_rng(seed).choice(len(vectors), _TRAINING_ROWS, replace=False))]
        quantizer = faiss.ProductQuantizer(parts * width, parts, TAIL_BITS)
        quantizer.cp.seed = seed
        quantizer.cp.min_points_per_centroid = 1
        with openmp_threads(1):
            quantizer.train(pad(rows, parts * width))
        centroids = faiss.vector_to_array(quantizer.centroids).reshape(parts, 1 << TAIL_BITS, width)
        return cls(np.ascontiguousarray(centroids, dtype=np.float32))

    def quantizer(self) -> Any:
        """The same as a FAISS ``ProductQuantizer``."""
        faiss = import_faiss()
        quantizer = faiss.ProductQuantizer(self.padded_dim, self.parts, TAIL_BITS)
        faiss.copy_array_to_vector(self.codebooks.reshape(-1), quantizer.centroids)
        return quantizer

    def encode(self, vectors: Vectors) -> NDArray[np.uint8]:
        """Two codes per byte: (n, dim) in, (n, parts / 2) out."""
        quantizer = self.quantizer()
        parts = [
            quantizer.compute_codes(pad(vectors[s : s + _BATCH], self.padded_dim))
            for s in range(0, len(vectors), _BATCH)
        ]
        return np.concatenate(parts)

    def decode(self, codes: NDArray[np.uint8]) -> Vectors:
        """What codes stand for: (n, parts / 2) in, (n, padded_dim) out."""
        decoded: Vectors = self.quantizer().decode(np.ascontiguousarray(codes))
        return decoded


def pad(vectors: Vectors, dim: int) -> Vectors:
    """The vectors with zeros appended up to ``dim`` dimensions; the same array if there is nothing to append."""
    missing = dim - vectors.shape[1]
    return vectors if missing == 0 else np.pad(vectors, ((0, 0), (0, missing)))
