"""The promises that every quantizer makes, checked for this one."""

from typing import ClassVar

from semid_sign_hash import SignHash

from semid_index.testing import QuantizerContract


class TestSignHash(QuantizerContract):
    """12 bits for 16 dimensions leave more than half of the variance."""

    error_ratio: ClassVar[float] = 0.6

    def make(self) -> SignHash:
        """Three levels of four bits."""
        return SignHash(levels=3, codebook_size=16)
