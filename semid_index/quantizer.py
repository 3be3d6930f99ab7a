"""The contract that a quantizer fulfils.

A quantizer turns vectors into short tuples of small integers, and back, approximately. What it promises:

- ``encode`` gives codes of shape (n, levels), int32, the coarsest level first, ``codes[:, l]`` in ``[0,
  codebook_sizes[l])``.
- The same seed on the same machine gives the same quantizer. A row gets the same codes alone or in a batch, near-ties
  aside.
- Saved (``get_config`` and ``state``) and restored (``restore``), it encodes and decodes as before.
- ``name`` is stored in every index built with it. Two classes may share a name only if each can read the other's
  state and then decodes the same vectors; so a name, once used, keeps its meaning.
- ``hierarchical`` says whether a prefix of the codes is a coarser description of the same item. Only then do
  prefixes, shelves and leaves exist.
- A quantizer with ``codebooks`` is *additive*: its decoded vector is the sum of one codeword per level. Search needs
  nothing else to score prefixes by look-up tables. One without is searched through decoded vectors.

The suite ``semid_index.testing.QuantizerContract`` checks all of this; run it over your own.

A plugin needs a class with these methods and a hook that offers it; see ``docs/plugins.md`` for a whole one in 30
lines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]  # (n, dim), C-contiguous
Codes = NDArray[np.int32]  # (n, levels)
ProgressCallback = Callable[[int, int, str], None]  # steps done, steps in all, what is being done


class Quantizer(ABC):
    """Turns vectors into codes and back. Subclass it, or offer any class with the same members."""

    name: ClassVar[str]
    """Stored in the index; never reused for something else."""

    hierarchical: ClassVar[bool] = True
    """Whether a prefix of the codes describes the same item more coarsely."""

    on_progress: ProgressCallback | None = None
    """Set by the caller of ``fit`` who wants to hear how far it is."""

    codebooks: list[Vectors] | None = None
    """For an additive quantizer, once trained: one array of shape (K, dim) per level."""

    @property
    @abstractmethod
    def levels(self) -> int:
        """The number of codes that one vector gets."""

    @property
    @abstractmethod
    def codebook_sizes(self) -> tuple[int, ...]:
        """How many codewords each level has, coarsest first."""

    @abstractmethod
    def fit(self, vectors: Vectors, *, seed: int = 0) -> Self:
        """Learn from vectors of shape (n, dim); returns itself."""

    @abstractmethod
    def encode(self, vectors: Vectors, *, beam: int = 1) -> Codes:
        """The codes of each vector: (n, dim) float32 in, (n, levels) int32 out."""

    @abstractmethod
    def decode(self, codes: Codes) -> Vectors:
        """The vector that each row of codes stands for: (n, levels) in, (n, dim) float32 out."""

    @abstractmethod
    def get_config(self) -> dict[str, Any]:
        """What the constructor needs, as JSON values."""

    @abstractmethod
    def state(self) -> dict[str, NDArray[Any]]:
        """What ``fit`` learned, as named arrays. Codebook l is named ``codebook_l``, l from 1."""

    @classmethod
    @abstractmethod
    def restore(cls, config: Mapping[str, Any], state: Mapping[str, NDArray[Any]]) -> Self:
        """The quantizer that had this configuration and state."""

    def report_progress(self, done: int, total: int, what: str) -> None:
        """Tell the caller of ``fit`` how far it is, if they asked."""
        if self.on_progress is not None:
            self.on_progress(done, total, what)
