"""The contract that a quantizer fulfils.

A quantizer turns vectors into short tuples of small integers, and back, approximately. What it promises:

- ``encode`` gives codes of shape (n, levels), int32, the coarsest level first, ``codes[:, l]`` in ``[0,
  codebook_sizes[l])``.
- The same seed on the same machine gives the same quantizer. A row gets the same codes alone or in a batch, near-ties
  aside.
- Saved (``get_config`` and ``state``) and restored (``restore``), it encodes and decodes as before.
- ``get_config`` has every option that the constructor was given: an index keeps nothing else of it.
- ``fit`` calls ``report_progress`` once or more; the last time, all steps are done.
- ``name`` is stored in every index built with it. Two classes may share a name only if each can read the other's
  state and then decodes the same vectors; so a name, once used, keeps its meaning.
- ``hierarchical`` says whether a prefix of the codes is a coarser description of the same item. Only then do
  prefixes, shelves and leaves exist.
- A quantizer that learns arrays named ``codebook_1`` to ``codebook_L``, of shape (K, dim), is *additive*: its decoded
  vector is the sum of one codeword per level. Search needs nothing else to score prefixes by look-up tables. One
  without is searched through decoded vectors.

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

from semid_index.errors import NotTrainedError

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

    codebook_sizes: tuple[int, ...] = ()
    """How many codewords each level has, coarsest first; set by the constructor, or by ``fit`` if it takes training."""

    learned: Mapping[str, NDArray[Any]] | None = None
    """What ``fit`` learned, as named arrays; None before. This is what an index stores."""

    @abstractmethod
    def fit(self, vectors: Vectors, *, seed: int = 0) -> Self:
        """Learn from vectors of shape (n, dim), keep it in ``learned``, and return itself."""

    @abstractmethod
    def encode(self, vectors: Vectors, *, beam: int | None = None) -> Codes:
        """The codes of each vector: (n, dim) float32 in, (n, levels) int32 out.

        ``beam`` is how many partial codes to keep while searching for good ones, where there is something to search
        for; None for what the quantizer was made with.
        """

    @abstractmethod
    def decode(self, codes: Codes) -> Vectors:
        """The vector that each row of codes stands for: (n, levels) in, (n, dim) float32 out."""

    @property
    def levels(self) -> int:
        """The number of codes that one vector gets."""
        return len(self.codebook_sizes)

    @property
    def codebooks(self) -> list[Vectors] | None:
        """The learned arrays named ``codebook_1`` and on, (K, dim) each; None if there are none: not additive."""
        if self.learned is None or "codebook_1" not in self.learned:
            return None
        return [self.learned[f"codebook_{level}"] for level in range(1, self.levels + 1)]

    def get_config(self) -> dict[str, Any]:
        """What the constructor needs, as JSON values; override it if that is more than the shape of the codes."""
        sizes = list(self.codebook_sizes)
        return {"levels": self.levels, "codebook_size": sizes[0] if len(set(sizes)) == 1 else sizes}

    def state(self) -> dict[str, NDArray[Any]]:
        """What ``fit`` learned. Raises :class:`NotTrainedError` before."""
        if self.learned is None:
            raise NotTrainedError(
                f"The quantizer '{self.name}' is not trained. Call fit (or index.train) with vectors first."
            )
        return dict(self.learned)

    @classmethod
    def restore(cls, config: Mapping[str, Any], state: Mapping[str, NDArray[Any]]) -> Self:
        """The quantizer that had this configuration and state."""
        quantizer = cls(**config)
        quantizer.learned = dict(state)
        return quantizer

    def report_progress(self, done: int, total: int, what: str) -> None:
        """Tell the caller of ``fit`` how far it is, if they asked."""
        if self.on_progress is not None:
            self.on_progress(done, total, what)
