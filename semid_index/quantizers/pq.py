"""``pq``: product quantization.

A vector is cut into ``levels`` pieces of equal length, and each piece is replaced by the nearest of the codewords
learned for that place (Jégou, Douze and Schmid, 2011). The codes are places side by side, not steps from coarse to
fine: they compress well and search well, but a prefix of them is only a part of the vector. So there are no shelves
and no leaves.

Written over the whole vector, with zeros outside its own columns, a codeword is an addend like any other: the decoded
vector is the sum of one codeword per level, and the look-up tables of search work unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Self

import numpy as np

from semid_index.errors import InvalidArgumentError, InvalidVectorsError
from semid_index.hookspecs import hookimpl
from semid_index.quantizer import Codes, Quantizer, Vectors
from semid_index.quantizers.kmeans import import_faiss, kmeans, worker_start
from semid_index.quantizers.rq import MAX_LEVELS, sizes_per_level
from semid_index.vectors import as_vectors


class ProductQuantization(Quantizer):
    """Product quantization: ``levels`` sub-vectors, each with a codebook of ``codebook_size`` words.

    ``levels`` must divide the number of dimensions. ``codebook_size`` is a power of two from 2 to 65,536, the same for
    all levels, because FAISS assigns the codes. ``iterations`` is how often k-means moves the codewords.

    Each of ``codebooks`` has shape (codebook_size, dim), so together they take ``levels`` times what FAISS would store:
    25 MB for 64 levels of 256 words at 384 dimensions.
    """

    name: ClassVar[str] = "pq"
    hierarchical: ClassVar[bool] = False

    def __init__(self, levels: int = 8, codebook_size: int | Sequence[int] = 256, *, iterations: int = 25) -> None:
        sizes = sizes_per_level(levels, codebook_size)
        if len(set(sizes)) > 1 or sizes[0].bit_count() != 1:
            raise InvalidArgumentError(
                f"'{self.name}' needs one power of two (2, 4, ... 256, ... 65536) as codebook_size of all levels, "
                f"not {codebook_size!r}. For other sizes use 'rq'."
            )
        if not isinstance(iterations, int) or iterations < 1:
            raise InvalidArgumentError(f"iterations must be at least 1, not {iterations!r}.")
        self.codebook_sizes = sizes
        self.iterations = iterations

    def fit(self, vectors: Vectors, *, seed: int = 0) -> Self:
        """Learn the codebook of each sub-vector by k-means."""
        vectors = as_vectors(vectors, what="training vectors")
        if len(vectors) < self.codebook_sizes[0]:
            raise InvalidVectorsError(
                f"Training needs at least as many vectors as the codebooks have words: {self.codebook_sizes[0]}, "
                f"got n_samples = {len(vectors)}. Give more vectors or a smaller codebook_size."
            )
        dim = vectors.shape[1]
        self._check_divides(dim)
        learned: dict[str, Vectors] = {}
        for level, (columns, words) in enumerate(zip(self._columns(dim), self._train(vectors, seed), strict=True), 1):
            codebook = np.zeros((len(words), dim), dtype=np.float32)
            codebook[:, columns] = words
            learned[f"codebook_{level}"] = codebook
        self.learned = learned
        return self

    def _train(self, vectors: Vectors, seed: int) -> list[Vectors]:
        """The codewords of each sub-vector: (K, dim / levels) each.

        Sub-vectors are trained side by side with one FAISS thread each, because one of them is too little work for
        several: where other programs keep the cores busy, threads that wait for each other at every step of k-means
        take tens of times as long as one alone.
        """
        faiss = import_faiss()

        def train(level: int, columns: slice) -> Vectors:
            part = np.ascontiguousarray(vectors[:, columns])
            return kmeans(part, self.codebook_sizes[level], seed=seed + level, iterations=self.iterations)

        columns = self._columns(vectors.shape[1])
        trained: list[Vectors] = []
        self.report_progress(0, self.levels, "sub-vectors")
        # OpenMP keeps the number of threads per thread: setting it in the workers leaves the caller's as it is.
        workers = min(self.levels, faiss.omp_get_max_threads())
        with ThreadPoolExecutor(workers, initializer=worker_start()) as pool:
            for words in pool.map(train, range(self.levels), columns):
                trained.append(words)
                self.report_progress(len(trained), self.levels, "sub-vectors")
        return trained

    def encode(self, vectors: Vectors, *, beam: int | None = None) -> Codes:
        """For each sub-vector, its nearest codeword."""
        if beam not in (None, 1):
            raise InvalidArgumentError(f"'{self.name}' has nothing to search for: beam must be 1, not {beam!r}.")
        codebooks = self._trained()
        dim = codebooks[0].shape[1]
        vectors = as_vectors(vectors, dim=dim)
        faiss = import_faiss()
        bits = self.codebook_sizes[0].bit_length() - 1
        encoder = faiss.ProductQuantizer(dim, self.levels, bits)
        words = [codebook[:, columns] for codebook, columns in zip(codebooks, self._columns(dim), strict=True)]
        faiss.copy_array_to_vector(np.concatenate(words, axis=None), encoder.centroids)
        codes: Codes = faiss.unpack_bitstrings(encoder.compute_codes(vectors), self.levels, bits).astype(np.int32)
        return codes

    def decode(self, codes: Codes) -> Vectors:
        """The codewords side by side."""
        codebooks = self._trained()
        dim = codebooks[0].shape[1]
        decoded = np.empty((len(codes), dim), dtype=np.float32)
        for level, columns in enumerate(self._columns(dim)):
            decoded[:, columns] = codebooks[level][codes[:, level], columns]
        return decoded

    def get_config(self) -> dict[str, Any]:
        """What the constructor needs, as JSON values."""
        return {**super().get_config(), "iterations": self.iterations}

    def _columns(self, dim: int) -> list[slice]:
        """The columns of each sub-vector."""
        width = dim // self.levels
        return [slice(start, start + width) for start in range(0, dim, width)]

    def _check_divides(self, dim: int) -> None:
        if dim % self.levels:
            divisors = [levels for levels in range(1, min(dim, MAX_LEVELS) + 1) if dim % levels == 0]
            near = sorted(sorted(divisors, key=lambda levels: abs(levels - self.levels))[:3])
            raise InvalidArgumentError(
                f"{dim} dimensions cannot be cut into {self.levels} sub-vectors of equal length. "
                f"Numbers of levels near it that divide {dim}: {', '.join(map(str, near))}."
            )

    def _trained(self) -> list[Vectors]:
        state = self.state()
        return [state[f"codebook_{level}"] for level in range(1, self.levels + 1)]


@hookimpl
def semid_register_quantizers(register: Callable[[type[Quantizer]], None]) -> None:
    """Offer ``pq``."""
    register(ProductQuantization)
