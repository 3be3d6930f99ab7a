"""``opq``: optimized product quantization, by FAISS, to compare with.

Product quantization of the vector after a rotation, learned so that the pieces suit their codebooks (Ge, He, Ke and
Sun, 2013). The codes are places side by side, not steps from coarse to fine, so there are no shelves and no leaves.
With 16 to 64 levels they are the long unordered IDs that generative recommenders of the RPG kind predict all at once.

Rotated back, a codeword is an addend like any other: the decoded vector is the sum of one codeword per level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import numpy as np

from semid_index.errors import InvalidArgumentError
from semid_index.hookspecs import hookimpl
from semid_index.quantizer import Codes, Quantizer, Vectors
from semid_index.quantizers.additive import check_positive, sum_of_codewords, training_vectors
from semid_index.quantizers.kmeans import import_faiss, openmp_threads
from semid_index.quantizers.pq import ProductQuantization
from semid_index.quantizers.rotation import batches, random_rotation
from semid_index.vectors import as_vectors

_ENCODE_BATCH = 16_384  # rows rotated at once: 25 MB at 384 dimensions


class OptimizedProductQuantization(ProductQuantization):
    """Product quantization after a learned rotation: ``levels`` pieces, each with ``codebook_size`` words.

    Any number of ``levels`` up to 64 will do: where it does not divide the number of dimensions, the rotation leads
    into the next higher one that it divides. ``codebook_size`` is a power of two from 2 to 65,536, the same for all
    levels. ``rotations`` is how often training adapts the rotation to the codewords, and ``iterations`` how often
    k-means moves the codewords in the end.

    Learned are ``rotation``, (rotated dim, dim), ``codewords`` of the rotated pieces, (levels, codebook_size, rotated
    dim / levels), and the same rotated back, which are the codebooks: (codebook_size, dim) each.
    """

    name: ClassVar[str] = "opq"

    def __init__(
        self,
        levels: int = 8,
        codebook_size: int | Sequence[int] = 256,
        *,
        iterations: int = 25,
        rotations: int = 50,
    ) -> None:
        super().__init__(levels, codebook_size, iterations=iterations)
        check_positive(rotations=rotations)
        self.rotations = int(rotations)

    def fit(self, vectors: Vectors, *, seed: int = 0) -> Self:
        """Learn the rotation, and then the codebook of each piece by k-means."""
        vectors = training_vectors(vectors, self.codebook_sizes[0])
        self.report_progress(0, self.levels, "rotation")
        rotation = self._learn_rotation(vectors, seed)
        words = np.stack(self._train(vectors @ rotation.T, seed))
        codebooks = {
            f"codebook_{level}": own @ rotation[columns]
            for level, (own, columns) in enumerate(zip(words, self._columns(len(rotation)), strict=True), 1)
        }
        self.learned = {"rotation": rotation, "codewords": words, **codebooks}
        return self

    def _learn_rotation(self, vectors: Vectors, seed: int) -> Vectors:
        """The rotation, (rotated dim, dim), whose columns are orthonormal."""
        faiss = import_faiss()
        dim = vectors.shape[1]
        rotated_dim = -(-dim // self.levels) * self.levels
        codewords = self._faiss(rotated_dim)
        codewords.cp.seed = seed
        codewords.cp.min_points_per_centroid = 1  # no warning on stderr about few points
        transform = faiss.OPQMatrix(dim, self.levels, rotated_dim)
        transform.niter = self.rotations
        transform.pq = codewords
        start = random_rotation(rotated_dim, rotated_dim, seed=seed).astype(np.float32)
        faiss.copy_array_to_vector(start.reshape(-1), transform.A)
        # FAISS writes past the end of a buffer if there are fewer rows than dimensions: np.resize repeats them.
        rows = vectors if len(vectors) >= rotated_dim else np.resize(vectors, (rotated_dim, dim))
        with openmp_threads(1):  # its decompositions give the same result each time only so
            transform.train(rows)
        rotation: Vectors = faiss.vector_to_array(transform.A).reshape(rotated_dim, dim)
        return rotation

    def encode(self, vectors: Vectors, *, beam: int | None = None) -> Codes:
        """For each piece of the rotated vector, its nearest codeword."""
        if beam not in (None, 1):
            raise InvalidArgumentError(f"'{self.name}' has nothing to search for: beam must be 1, not {beam!r}.")
        state = self.state()
        rotation = state["rotation"]
        vectors = as_vectors(vectors, dim=rotation.shape[1])
        faiss = import_faiss()
        encoder = self._faiss(len(rotation))
        faiss.copy_array_to_vector(state["codewords"].reshape(-1), encoder.centroids)
        codes = np.empty((len(vectors), self.levels), dtype=np.int32)
        for part in batches(len(vectors), _ENCODE_BATCH):
            packed = encoder.compute_codes(vectors[part] @ rotation.T)
            codes[part] = faiss.unpack_bitstrings(packed, self.levels, encoder.nbits)
        return codes

    def _faiss(self, rotated_dim: int) -> Any:
        """FAISS's product quantizer of rotated vectors, without codewords."""
        return import_faiss().ProductQuantizer(rotated_dim, self.levels, self.codebook_sizes[0].bit_length() - 1)

    def decode(self, codes: Codes) -> Vectors:
        """The codewords side by side, rotated back: the sum of ``codebooks``."""
        return sum_of_codewords(self._trained(), codes)

    def get_config(self) -> dict[str, Any]:
        """What the constructor needs, as JSON values."""
        return {**super().get_config(), "rotations": self.rotations}


@hookimpl
def semid_register_quantizers(register: Callable[[type[Quantizer]], None]) -> None:
    """Offer ``opq``."""
    register(OptimizedProductQuantization)
