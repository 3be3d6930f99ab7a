"""``sign-hash``: one bit per random direction, which tells on which side of the mean a vector lies."""

import numpy as np

from semid_index.errors import InvalidVectorsError
from semid_index.hookspecs import hookimpl
from semid_index.quantizer import Quantizer
from semid_index.vectors import as_vectors


class SignHash(Quantizer):
    name = "sign-hash"

    def __init__(self, levels=2, codebook_size=16):
        self.codebook_sizes = (codebook_size,) * levels  # a power of two
        self.bits = 1 << np.arange(codebook_size.bit_length() - 1)

    def fit(self, vectors, *, seed=0):
        vectors, random = as_vectors(vectors), np.random.default_rng(seed)
        if not len(vectors):
            raise InvalidVectorsError("Training needs at least one vector, got n_samples = 0.")
        mean = vectors.mean(axis=0)
        directions = np.linalg.qr(random.standard_normal((len(mean), self.levels * len(self.bits))))[0].astype("f")
        lengths = np.abs((vectors - mean) @ directions).mean(axis=0)
        self.learned = {"mean": mean, "directions": directions, "lengths": lengths}
        self.report_progress(1, 1, "directions")
        return self

    def encode(self, vectors, *, beam=None):
        mean, directions, _ = (self.state()[name] for name in ("mean", "directions", "lengths"))
        sides = (as_vectors(vectors, dim=len(mean)) - mean) @ directions > 0
        return (sides.reshape(len(sides), self.levels, len(self.bits)) @ self.bits).astype(np.int32)

    def decode(self, codes):
        mean, directions, lengths = (self.state()[name] for name in ("mean", "directions", "lengths"))
        sides = (np.asarray(codes)[:, :, None] & self.bits > 0).reshape(len(codes), len(lengths))
        return (mean + np.where(sides, lengths, -lengths) @ directions.T).astype(np.float32)


@hookimpl
def semid_register_quantizers(register):
    register(SignHash)
