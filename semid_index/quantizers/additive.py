"""``lsq`` and ``prq``: additive quantization by FAISS, to compare with.

Both describe a vector by a sum of one codeword per level, as ``rq`` does, and give up the order from coarse to fine:

- ``lsq``, local search quantization, chooses all codewords of a vector together, and learns all codebooks together
  (Martinez et al., 2016 and 2018). At the same number of bytes it loses the least of text embeddings, and it takes
  the longest: minutes to train, and a millisecond or so to encode a vector.
- ``prq`` cuts the vector into a few pieces and describes each by residual quantization (Babenko and Lempitsky, 2015).

So there are no shelves and no leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from semid_index.errors import InvalidArgumentError, InvalidVectorsError
from semid_index.hookspecs import hookimpl
from semid_index.quantizer import Codes, Quantizer, Vectors
from semid_index.quantizers.beam import check_beam, choose_codes
from semid_index.quantizers.kmeans import import_faiss
from semid_index.quantizers.rotation import batches
from semid_index.quantizers.rq import sizes_per_level
from semid_index.vectors import as_vectors

_LARGEST_WORDS = 8_192  # of all codebooks of lsq: it inverts a matrix of that many rows, 0.5 GB
_LOOKUPS = 2**24  # distances from vectors to codewords held at once by lsq: 64 MB, and twice that while they are made
_PRQ_BATCH = 4_096  # rows encoded at once by prq: 65 MB with a beam of 5 and 256 codewords
_PRQ_MEMORY = 2**28  # bytes that FAISS may take for distances while it trains prq


def sum_of_codewords(codebooks: Sequence[Vectors], codes: Codes) -> Vectors:
    """One codeword per level, added up: codebooks (K, dim) and codes (n, levels) in, (n, dim) out."""
    total = codebooks[0][codes[:, 0]]
    for codebook, column in zip(codebooks[1:], codes.T[1:], strict=True):
        total += codebook[column]
    return total


def training_vectors(vectors: Vectors, least: int) -> Vectors:
    """The vectors to learn from; InvalidVectorsError if there are fewer than a codebook has words."""
    vectors = as_vectors(vectors, what="training vectors")
    if len(vectors) < least:
        raise InvalidVectorsError(
            f"Training needs at least as many vectors as the codebooks have words: {least}, "
            f"got n_samples = {len(vectors)}. Give more vectors or a smaller codebook_size."
        )
    return vectors


def check_positive(**counts: int) -> None:
    """InvalidArgumentError unless each of these is a whole number above 0."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise InvalidArgumentError(f"{name} must be a whole number, at least 1, not {value!r}.")


class _Additive(Quantizer):
    """What ``lsq`` and ``prq`` share: codebooks of one size, and sums of codewords."""

    hierarchical: ClassVar[bool] = False

    def __init__(self, levels: int, codebook_size: int | Sequence[int]) -> None:
        sizes = sizes_per_level(levels, codebook_size)
        if len(set(sizes)) > 1 or sizes[0].bit_count() != 1:
            raise InvalidArgumentError(
                f"'{self.name}' needs one power of two (2, 4, ... 256, ... 65536) as codebook_size of all levels, "
                f"not {codebook_size!r}. For other sizes use 'rq'."
            )
        self.codebook_sizes = sizes

    @property
    def _bits(self) -> int:
        """Bits of one code."""
        return self.codebook_sizes[0].bit_length() - 1

    def _trained(self) -> list[Vectors]:
        state = self.state()
        return [state[f"codebook_{level}"] for level in range(1, self.levels + 1)]

    def decode(self, codes: Codes) -> Vectors:
        """The sum of the codewords."""
        return sum_of_codewords(self._trained(), codes)


class LocalSearchQuantization(_Additive):
    """Local search quantization: ``levels`` codebooks of ``codebook_size`` words, a power of two, at most 8,192 in all.

    ``iterations`` is how often training updates all codebooks and encodes anew. ``rounds`` is how often encoding
    changes some codes of a vector at random and improves them all, one level after the other, until they settle; the
    best of what it sees is kept.

    Training and encoding take time with the square of ``levels``. With 16 levels of 256 words, encoding takes 1 to 2 ms
    per vector and core, and training on 30,000 vectors of 384 dimensions a quarter of an hour.
    """

    name: ClassVar[str] = "lsq"

    def __init__(
        self, levels: int = 8, codebook_size: int | Sequence[int] = 256, *, iterations: int = 25, rounds: int = 16
    ) -> None:
        super().__init__(levels, codebook_size)
        check_positive(iterations=iterations, rounds=rounds)
        if sum(self.codebook_sizes) > _LARGEST_WORDS:
            raise InvalidArgumentError(
                f"'{self.name}' learns all codebooks at once, at most {_LARGEST_WORDS:,} codewords; {levels} levels of "
                f"{self.codebook_sizes[0]:,} are {sum(self.codebook_sizes):,}. Use fewer levels or smaller codebooks."
            )
        self.iterations = int(iterations)
        self.rounds = int(rounds)

    def fit(self, vectors: Vectors, *, seed: int = 0) -> Self:
        """Learn all codebooks together, and draw the random changes that encoding tries."""
        vectors = training_vectors(vectors, self.codebook_sizes[0])
        self.report_progress(0, 1, "codebooks")
        quantizer = self._faiss(vectors.shape[1])
        quantizer.random_seed = seed
        quantizer.train_iters = self.iterations
        quantizer.train(vectors)
        words = import_faiss().vector_to_array(quantizer.codebooks).reshape(self.levels, -1, vectors.shape[1])
        learned: dict[str, NDArray[Any]] = {
            f"codebook_{level}": codebook.copy() for level, codebook in enumerate(words, 1)
        }
        self.learned = {**learned, "changes": self._draw_changes(seed)}
        self.report_progress(1, 1, "codebooks")
        return self

    def _draw_changes(self, seed: int) -> NDArray[np.int32]:
        """What each round of encoding sets the codes to before it improves them, -1 for no change: (rounds, levels).

        The first sets all of them, the others at most 4. They are the same for all vectors. FAISS draws others for
        each place in a batch; then the codes of a vector would depend on the place at which it happens to be.
        """
        random = np.random.default_rng(seed)
        codes = random.integers(self.codebook_sizes, size=(self.rounds, self.levels), dtype=np.int32)
        changed = random.integers(self.levels, size=(self.rounds, 4))
        changes = np.full_like(codes, -1)
        np.put_along_axis(changes, changed, np.take_along_axis(codes, changed, axis=1), axis=1)
        changes[0] = codes[0]
        return changes

    def encode(self, vectors: Vectors, *, beam: int | None = None) -> Codes:
        """The best codes that a local search finds for each vector. Nothing is drawn at random here."""
        if beam not in (None, 1):
            raise InvalidArgumentError(f"'{self.name}' has no beam: beam must be 1, not {beam!r}. See 'rounds'.")
        codebooks = np.stack(self._trained())
        vectors = as_vectors(vectors, dim=codebooks.shape[2])
        quantizer = self._faiss(vectors.shape[1])
        import_faiss().copy_array_to_vector(codebooks.reshape(-1), quantizer.codebooks)
        pairs = _pair_terms(codebooks)
        codes = np.empty((len(vectors), self.levels), dtype=np.int32)
        for part in batches(len(vectors), max(1, _LOOKUPS // sum(self.codebook_sizes))):
            codes[part] = self._search(quantizer, codebooks, pairs, vectors[part])
        return codes

    def _search(self, quantizer: Any, codebooks: Vectors, pairs: Vectors, vectors: Vectors) -> Codes:
        """The best codes of a few vectors: change some, improve all, keep what is better, and so on."""
        pointer = import_faiss().swig_ptr
        single = _single_terms(codebooks, vectors)
        best = np.zeros((len(vectors), self.levels), dtype=np.int32)
        lowest = np.full(len(vectors), np.inf, dtype=np.float32)
        errors = np.empty_like(lowest)
        for change in self.state()["changes"]:
            codes = np.where(change >= 0, change, best)
            quantizer.icm_encode_step(
                pointer(codes), pointer(single), pointer(pairs), len(vectors), quantizer.icm_iters
            )
            quantizer.evaluate(pointer(codes), pointer(vectors), len(vectors), pointer(errors))
            better = errors < lowest
            best[better], lowest[better] = codes[better], errors[better]
        return best

    def _faiss(self, dim: int) -> Any:
        return import_faiss().LocalSearchQuantizer(dim, self.levels, self._bits)

    def get_config(self) -> dict[str, Any]:
        """What the constructor needs, as JSON values."""
        return {**super().get_config(), "iterations": self.iterations, "rounds": self.rounds}


def _pair_terms(codebooks: Vectors) -> Vectors:
    """Twice the product of every codeword with every other: (levels, levels, K, K) of codebooks (levels, K, dim)."""
    levels, size, dim = codebooks.shape
    words = codebooks.reshape(-1, dim)
    products = (2 * words @ words.T).reshape(levels, size, levels, size)
    return np.ascontiguousarray(products.transpose(0, 2, 1, 3))


def _single_terms(codebooks: Vectors, vectors: Vectors) -> Vectors:
    """What each codeword alone adds to the squared error of each vector, |c|^2 - 2 x.c: (levels, n, K).

    In float64, and then rounded: a float32 product depends in its last bit on how many vectors there are, and one
    choice made otherwise changes all that follow.
    """
    words = codebooks.astype(np.float64)
    terms = np.empty((len(codebooks), len(vectors), codebooks.shape[1]), dtype=np.float32)
    x = vectors.astype(np.float64)
    for level, codebook in enumerate(words):
        terms[level] = np.einsum("ij,ij->i", codebook, codebook) - 2 * x @ codebook.T
    return terms


class ProductResidualQuantization(_Additive):
    """Product residual quantization: ``splits`` pieces of the vector, each with ``levels / splits`` levels of its own.

    ``codebook_size`` is a power of two, the same for all levels. ``splits`` must divide ``levels`` and the number of
    dimensions. The levels of the first piece come first. ``beam`` is how many alternatives are kept from level to
    level of a piece, in training and in encoding.
    """

    name: ClassVar[str] = "prq"

    def __init__(
        self, levels: int = 8, codebook_size: int | Sequence[int] = 256, *, splits: int = 2, beam: int = 5
    ) -> None:
        super().__init__(levels, codebook_size)
        check_positive(splits=splits)
        if levels % splits:
            raise InvalidArgumentError(
                f"{levels} levels cannot be shared evenly among {splits} pieces: splits must divide levels."
            )
        self.splits = int(splits)
        self.beam = check_beam(beam)

    def fit(self, vectors: Vectors, *, seed: int = 0) -> Self:
        """Learn the codebooks of each piece, one level after the other."""
        vectors = training_vectors(vectors, self.codebook_sizes[0])
        dim = vectors.shape[1]
        if dim % self.splits:
            raise InvalidArgumentError(
                f"{dim} dimensions cannot be cut into {self.splits} pieces of equal length: splits must divide dim."
            )
        learned: dict[str, Vectors] = {}
        for piece, columns in enumerate(self._columns(dim)):
            self.report_progress(piece, self.splits, "pieces")
            for codebook in self._train_piece(np.ascontiguousarray(vectors[:, columns]), seed + piece):
                wide = np.zeros((len(codebook), dim), dtype=np.float32)
                wide[:, columns] = codebook
                learned[f"codebook_{len(learned) + 1}"] = wide
        self.report_progress(self.splits, self.splits, "pieces")
        self.learned = learned
        return self

    def _train_piece(self, vectors: Vectors, seed: int) -> Vectors:
        """The codebooks of one piece: (levels / splits, K, dim / splits)."""
        faiss = import_faiss()
        dim = vectors.shape[1]
        quantizer = faiss.ResidualQuantizer(dim, self.levels // self.splits, self._bits)
        quantizer.max_beam_size = self.beam
        quantizer.max_mem_distances = _PRQ_MEMORY
        quantizer.cp.seed = seed
        quantizer.cp.min_points_per_centroid = 1  # no warning on stderr about few points
        quantizer.train(vectors)
        return np.asarray(faiss.vector_to_array(quantizer.codebooks)).reshape(-1, self.codebook_sizes[0], dim)

    def encode(self, vectors: Vectors, *, beam: int | None = None) -> Codes:
        """For each piece, the best codewords that a beam search finds; with the quantizer's own beam if None."""
        beam = self.beam if beam is None else check_beam(beam)
        each = self.levels // self.splits
        beam = min(beam, self.codebook_sizes[0] ** each)  # with a beam wider than all codes, FAISS mixes them up
        codebooks = self._trained()
        vectors = as_vectors(vectors, dim=codebooks[0].shape[1])
        codes = np.empty((len(vectors), self.levels), dtype=np.int32)
        for piece, columns in enumerate(self._columns(vectors.shape[1])):
            own = slice(piece * each, (piece + 1) * each)
            words = [np.ascontiguousarray(codebook[:, columns]) for codebook in codebooks[own]]
            for part in batches(len(vectors), _PRQ_BATCH):
                codes[part, own] = choose_codes(np.ascontiguousarray(vectors[part, columns]), words, beam)
        return codes

    def _columns(self, dim: int) -> list[slice]:
        """The columns of each piece."""
        return list(batches(dim, dim // self.splits))

    def get_config(self) -> dict[str, Any]:
        """What the constructor needs, as JSON values."""
        return {**super().get_config(), "splits": self.splits, "beam": self.beam}


@hookimpl
def semid_register_quantizers(register: Callable[[type[Quantizer]], None]) -> None:
    """Offer ``lsq`` and ``prq``."""
    register(LocalSearchQuantization)
    register(ProductResidualQuantization)
