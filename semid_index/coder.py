"""What gives the items of an index their codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from semid_index.collisions import CollisionPolicy
from semid_index.quantizer import Quantizer
from semid_index.quantizers.tail import TAIL_ARRAY, Tail


@dataclass(frozen=True)
class Coder:
    """The quantizer of a version of the IDs, what happens to items that share one, and the quantizer of tail codes."""

    quantizer: Quantizer
    """Once it is trained, with the levels that the policy adds."""
    policy: CollisionPolicy
    tail: Tail | None
    """None before training, and for an index without tail codes."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All that was learned, by name, as it is stored."""
        return {**self.quantizer.state(), **({TAIL_ARRAY: self.tail.codebooks} if self.tail else {})}
