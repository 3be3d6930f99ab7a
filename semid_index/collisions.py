"""Policies for items that share an ID.

Items that are much alike get the same codes. A *collision policy* says what happens then, when they are added: they
share the ID, they are told apart by one more level, or some of them get another code at the last level. It promises:

- An ID once given is never changed: a policy decides about the items that are being added, and about no others.
- Only the last level of the quantizer, and levels that the policy adds, differ from what the quantizer says. So the
  prefixes that search, shelves and SQL go by stay as they are.
- The same items in the same order get the same IDs.
- ``name`` is stored in every index built with it, and keeps its meaning; options are JSON (``get_config``).

The suite ``semid_index.testing.CollisionPolicyContract`` checks all of this; run it over your own.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from semid_index.codes import MAX_CODEBOOK_SIZE, MIN_CODEBOOK_SIZE
from semid_index.errors import InvalidArgumentError
from semid_index.hookspecs import hookimpl
from semid_index.items import check_count
from semid_index.quantizer import Codes, Quantizer, Vectors

log = logging.getLogger("semid_index")

_BLOCK_BYTES = 32 << 20  # distances to all codewords of the last level that are held at once
_TINY = 1e-300


class Below(NamedTuple):
    """Who is below some prefixes: one entry for each code of the next level that items of the index have there."""

    prefix: NDArray[np.int64]
    """(r,) the number of the prefix, as it was asked for."""
    code: NDArray[np.int64]
    """(r,) the code of the level after the prefix; 0 below whole IDs, which have no such level."""
    items: NDArray[np.int64]
    """(r,) how many items have it, at least 1."""


@dataclass(frozen=True)
class Arrivals:
    """Items that are being added, and a way to ask who is there already."""

    codes: Codes
    """(n, L) what the quantizer proposes, in order of arrival."""
    vectors: Vectors
    """(n, dim) as they were encoded: at length 1 under cosine."""
    quantizer: Quantizer
    """Trained; L levels."""
    below: Callable[[NDArray[np.integer]], Below]
    """Who is below each of some prefixes (m, depth), all of them different: items of the index, those placed earlier in
    the same ``add`` included. Ask for many at once: each call reads all codes of the index."""


class CollisionPolicy(ABC):
    """Decides which IDs new items get where several want the same."""

    name: ClassVar[str]
    """Stored in the index; never reused for something else."""

    promises_unique: ClassVar[bool] = False
    """Whether every item gets an ID of its own as long as there are any that the policy may give."""

    extra_levels: tuple[int, ...] = ()
    """How many values each level has that the policy adds after the quantizer's. They say nothing about the vector."""

    def check(self, quantizer: Quantizer) -> None:  # noqa: B027, not abstract: most policies take any quantizer
        """Raise :class:`InvalidArgumentError` if codes of this quantizer cannot be placed.

        Asked when an index is created, and again when its quantizer is trained and has codebooks, or has none.
        """

    @abstractmethod
    def place(self, arrivals: Arrivals) -> Codes:
        """The codes to store: (n, L + extra levels) int32. Called for one batch after the other."""

    def get_config(self) -> dict[str, Any]:
        """What the constructor needs, as JSON values."""
        return {}


class Share(CollisionPolicy):
    """Items may share an ID; ``dup_rank`` tells them apart. The default, and free: nothing is looked up."""

    name: ClassVar[str] = "share"

    def place(self, arrivals: Arrivals) -> Codes:
        """The codes as they are."""
        return arrivals.codes


class Digit(CollisionPolicy):
    """One more level that counts: 0 for the first item with an ID, then 1, 2 ... in order of arrival.

    ``size`` is how many digits there are, 2 to 65,536. When they are used up, further items share the last one.
    (As in TIGER: Rajput et al., 2023.)
    """

    name: ClassVar[str] = "digit"
    promises_unique: ClassVar[bool] = True

    def __init__(self, size: int = 256) -> None:
        check_count("size", size, least=MIN_CODEBOOK_SIZE)
        if size > MAX_CODEBOOK_SIZE:
            raise InvalidArgumentError(f"size must be at most {MAX_CODEBOOK_SIZE:,}, not {size:,}.")
        self.size = int(size)
        self.extra_levels = (self.size,)

    def place(self, arrivals: Arrivals) -> Codes:
        """The codes, and the lowest digit above all that items with these codes have."""
        group, first = _groups(arrivals.codes)
        below = arrivals.below(arrivals.codes[first])
        digits = np.zeros(len(first), dtype=np.int64)
        np.maximum.at(digits, below.prefix, below.code + 1)
        wanted = digits[group] + _ranks(group)
        if (too_many := int((wanted >= self.size).sum())) > 0:
            log.warning("%d items share the last digit, %d, of their IDs: there are no more", too_many, self.size - 1)
        return np.column_stack([arrivals.codes, np.minimum(wanted, self.size - 1)]).astype(np.int32)

    def get_config(self) -> dict[str, Any]:
        """What the constructor needs, as JSON values."""
        return {"size": self.size}


# -- policies that give some items another code at the last level -----------------------------------------------------


@dataclass
class _Block:
    """Items below some prefixes (all levels but the last), which compete for codes of the last level."""

    own: NDArray[np.int64]
    """(n,) the code that the quantizer proposes, in order of prefix and arrival."""
    shelf: NDArray[np.int64]
    """(n,) which of the prefixes."""
    costs: NDArray[np.float32]
    """(n, K) squared distance of what the levels before leave over to each codeword."""
    room: NDArray[np.int64]
    """(shelves, K) how many more items each ID may have."""


class LastLevelPolicy(CollisionPolicy):
    """The parent of policies that give an item another code of the last level where its ID has no room.

    ``limit`` is how many items an ID has room for. Only items below prefixes with an ID that would have more are looked
    at: :meth:`settle` gets them block by block.
    """

    limit: int = 1

    def check(self, quantizer: Quantizer) -> None:
        """Refuse codes without an order from coarse to fine, or without codewords that add up."""
        untrained = quantizer.learned is None
        if quantizer.hierarchical and (untrained or quantizer.codebooks is not None):
            return
        why = "its codewords do not add up" if quantizer.hierarchical else "its codes are not a hierarchy"
        raise InvalidArgumentError(
            f"The collision policy '{self.name}' chooses another codeword at the last level, which '{quantizer.name}' "
            f"does not allow: {why}. Use collisions='share' or 'digit', or quantizer='rq'."
        )

    @abstractmethod
    def settle(self, block: _Block) -> NDArray[np.int64]:
        """The code of the last level for each item of a block: (n,)."""

    def place(self, arrivals: Arrivals) -> Codes:
        """The codes, with another one at the last level for some items."""
        codes = arrivals.codes.copy()
        shelf, contested = self._contested(arrivals)
        if not len(contested):
            return codes
        for rows, block in self._blocks(arrivals, shelf, contested, codes):
            codes[rows, -1] = self.settle(block)
        return codes

    def _contested(self, arrivals: Arrivals) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The prefix of each item by number, and one item for each prefix that has an ID without room for all."""
        ids, first = _groups(arrivals.codes)
        items = np.bincount(ids, minlength=len(first))
        held = arrivals.below(arrivals.codes[first])
        items[held.prefix] += held.items
        shelf, first_of_shelf = _groups(arrivals.codes[:, :-1])
        full = np.unique(shelf[first[items > self.limit]])
        return shelf, first_of_shelf[full]

    def _blocks(
        self, arrivals: Arrivals, shelf: NDArray[np.int64], contested: NDArray[np.int64], codes: Codes
    ) -> Iterator[tuple[NDArray[np.int64], _Block]]:
        """Blocks of items below contested prefixes, ordered by prefix and arrival, and the rows they come from.

        ``codes`` are read again where a block begins inside a prefix: the items before it are in their places then.
        """
        codebooks = arrivals.quantizer.codebooks or []  # check made sure that there are some
        size = len(codebooks[-1])
        squares = np.einsum("kd,kd->k", codebooks[-1], codebooks[-1])
        held = arrivals.below(arrivals.codes[contested, :-1])
        number = np.full(len(shelf), -1)  # of the prefix among the contested ones
        number[shelf[contested]] = np.arange(len(contested))
        number = number[shelf]
        rows = np.argsort(number, kind="stable")[np.count_nonzero(number < 0) :]
        most = max(1, _BLOCK_BYTES // (4 * size))
        for start in range(0, len(rows), most):
            part = rows[start : start + most]
            low, high = number[part[0]], number[part[-1]] + 1
            room = np.full((high - low, size), self.limit)
            inside = (held.prefix >= low) & (held.prefix < high)
            room[held.prefix[inside] - low, held.code[inside]] -= held.items[inside]
            before = rows[:start][number[rows[:start]] == low]
            np.subtract.at(room[0], codes[before, -1], 1)
            left = arrivals.vectors[part]
            for level, codebook in enumerate(codebooks[:-1]):
                left -= codebook[arrivals.codes[part, level]]
            costs = squares - 2 * (left @ codebooks[-1].T) + np.einsum("nd,nd->n", left, left)[:, None]
            yield part, _Block(arrivals.codes[part, -1].astype(np.int64), number[part] - low, costs, room)


class NextBest(LastLevelPolicy):
    """An item whose ID is taken gets the nearest codeword of the last level whose ID is free, first come first served.

    So it does not matter in how many batches items come. Where all IDs below a prefix are taken, an item keeps the one
    that the quantizer proposes, and shares it.
    """

    name: ClassVar[str] = "next-best"
    promises_unique: ClassVar[bool] = True

    def settle(self, block: _Block) -> NDArray[np.int64]:
        """See :class:`LastLevelPolicy`."""
        return _matched(block, nearest_first=False)


class Capacity(LastLevelPolicy):
    """At most ``items`` items for each ID; those that are too many go to the nearest last-level codeword with room.

    Of the items that come together, each ID keeps the nearest. What finds no room anywhere keeps the ID that the
    quantizer proposes.
    """

    name: ClassVar[str] = "capacity"

    def __init__(self, items: int = 5) -> None:
        check_count("items", items, least=1)
        self.limit = int(items)

    def settle(self, block: _Block) -> NDArray[np.int64]:
        """See :class:`LastLevelPolicy`."""
        return _matched(block, nearest_first=True)

    def get_config(self) -> dict[str, Any]:
        """What the constructor needs, as JSON values."""
        return {"items": self.limit}


def _matched(block: _Block, *, nearest_first: bool) -> NDArray[np.int64]:
    """Each item to the ID that it likes best among those that would have it.

    In rounds: every item without a place asks for one, first at its own ID, then at the nearest that has not refused
    it; an ID keeps as many as it has room for, of those it had and those that ask, and refuses the others. It prefers
    those that came first, or with ``nearest_first`` those that are nearest. (Deferred acceptance: Gale and Shapley,
    1962. The order of asking does not matter; if all IDs prefer those that came first, it is as if they were served one
    after the other.)
    """
    n, size = block.costs.shape
    costs, room = block.costs, block.room.reshape(-1)
    wish = block.own.copy()
    place = block.shelf * size + wish
    cost = costs[np.arange(n), wish] if nearest_first else np.zeros(n, dtype=np.float32)
    costs[(block.room <= 0)[block.shelf]] = np.inf
    placed = np.zeros(n, dtype=bool)
    asked = np.zeros(len(room), dtype=bool)
    asking = np.arange(n)
    while len(asking):
        # 1. each place that is asked for ranks all who want it; equal claims in order of arrival
        placed[asking] = True
        asked[place[asking]] = True
        rivals = np.flatnonzero(placed & asked[place])
        asked[place[asking]] = False
        rivals = rivals[np.lexsort((cost[rivals], place[rivals]))]
        refused = np.sort(rivals[_ranks(place[rivals]) >= room[place[rivals]]])
        # 2. who is refused asks at the nearest that is left, or goes home
        placed[refused] = False
        costs[refused, wish[refused]] = np.inf
        wish[refused] = costs[refused].argmin(axis=1)
        found = costs[refused, wish[refused]]
        hopeless = refused[np.isinf(found)]
        wish[hopeless] = block.own[hopeless]
        asking = refused[~np.isinf(found)]
        place[asking] = block.shelf[asking] * size + wish[asking]
        if nearest_first:
            cost[asking] = costs[asking, wish[asking]]
    return wish


class Sinkhorn(LastLevelPolicy):
    """Items that share an ID are spread over the free last-level codewords by a balanced assignment.

    The items of a group are assigned to the free codewords together, each codeword taking at most one item, with
    entropy ``epsilon`` (for distances scaled to -1 .. 1) and ``iterations`` of Sinkhorn; each item goes where its
    largest share is, if it has the ID alone then. Up to ``rounds`` such rounds; duplicates that remain are accepted.

    (After LC-Rec: Zheng et al., 2024. There every codeword takes the same amount, however few the items are: then most
    shares are nearly equal, and the largest may lie anywhere. See docs/decisions/0007.)
    """

    name: ClassVar[str] = "sinkhorn"

    def __init__(self, epsilon: float = 0.003, iterations: int = 200, rounds: int = 20) -> None:
        if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < float("inf"):
            raise InvalidArgumentError(f"epsilon must be a number above 0, not {epsilon!r}.")
        check_count("iterations", iterations)
        check_count("rounds", rounds)
        self.epsilon, self.iterations, self.rounds = float(epsilon), int(iterations), int(rounds)

    def settle(self, block: _Block) -> NDArray[np.int64]:
        """See :class:`LastLevelPolicy`."""
        size = block.costs.shape[1]
        held = self.limit - block.room.reshape(-1)
        codes = block.own.copy()
        for _ in range(self.rounds):
            items = held + np.bincount(block.shelf * size + codes, minlength=len(held))
            wanted = self._spread(block, codes, items)
            movers = np.flatnonzero(wanted != codes)
            movers = movers[_ranks(block.shelf[movers] * size + wanted[movers]) == 0]  # one for each free code
            if not len(movers):
                break
            codes[movers] = wanted[movers]
        return codes

    def _spread(self, block: _Block, codes: NDArray[np.int64], items: NDArray[np.int64]) -> NDArray[np.int64]:
        """New codes for the items that share an ID: all groups of one size together."""
        size = block.costs.shape[1]
        place = block.shelf * size + codes
        sharing = np.flatnonzero(items[place] > 1)
        sharing = sharing[np.argsort(place[sharing], kind="stable")]
        _, starts, sizes = np.unique(place[sharing], return_index=True, return_counts=True)
        moved = codes.copy()
        for count in np.unique(sizes).tolist():
            groups = sharing[starts[sizes == count][:, None] + np.arange(count)]
            most = max(1, _BLOCK_BYTES // (8 * size * (count + 1)))
            for part in (groups[start : start + most] for start in range(0, len(groups), most)):
                shelf, code = block.shelf[part[:, 0]], codes[part[:, 0]]
                free = (items.reshape(-1, size)[shelf] == 0).astype(np.float64)
                free[np.arange(len(part)), code] = items[shelf * size + code] == count  # nobody else is there
                costs = _scaled(block.costs[part], free)
                near = _near(costs, count)
                columns = np.broadcast_to(near[:, None], (*part.shape, near.shape[1]))
                costs, open_ones = np.take_along_axis(costs, columns, 2), np.take_along_axis(free, near, 1)
                shares = balanced(costs, open_ones, self.epsilon, self.iterations)
                best = np.take_along_axis(near, shares.argmax(axis=2), 1)
                moved[part] = np.where(shares.max(axis=2) > 0, best, codes[part])
        return moved

    def get_config(self) -> dict[str, Any]:
        """What the constructor needs, as JSON values."""
        return {"epsilon": self.epsilon, "iterations": self.iterations, "rounds": self.rounds}


def _scaled(costs: NDArray[np.float32], free: NDArray[np.float64]) -> NDArray[np.float64]:
    """Costs (groups, g, K) of each group from -1 to 1; infinite where a codeword is not ``free`` (groups, K)."""
    is_free = np.broadcast_to(free[:, None] > 0, costs.shape)
    low = costs.min(axis=(1, 2), keepdims=True, where=is_free, initial=np.inf)
    high = costs.max(axis=(1, 2), keepdims=True, where=is_free, initial=-np.inf)
    scaled = np.full(costs.shape, np.inf)
    np.divide(2 * (costs.astype(np.float64) - low), np.maximum(high - low, 1e-30), out=scaled, where=is_free)
    return scaled - 1


def _near(costs: NDArray[np.float64], g: int) -> NDArray[np.int64]:
    """For each group, codewords among which are the g nearest of each of its items: its best plan needs no others."""
    ranks: NDArray[np.int64] = costs.argsort(axis=2, kind="stable").argsort(axis=2).min(axis=1)
    nearest_first = ranks.argsort(axis=1, kind="stable")
    return nearest_first[:, : g * g]


def balanced(
    costs: NDArray[np.float64], free: NDArray[np.float64], epsilon: float, iterations: int
) -> NDArray[np.float64]:
    """How much of each item goes to each codeword, for groups of equal size: (groups, g, K) in and out.

    Every item is shared out wholly, and every codeword with ``free`` (groups, K) = 1 takes one item's worth at most (or
    g / F, if there are only F < g), at the least cost minus ``epsilon`` times the entropy, by Sinkhorn's algorithm. A
    row for nobody takes what is left of the codewords.
    """
    groups, g, size = costs.shape
    room = free.sum(axis=1)
    # 1. what the costs say: at most 1 in each row, so that nothing overflows
    plan = np.zeros((groups, g + 1, size))
    is_free = np.broadcast_to(free[:, None] > 0, costs.shape)
    least = costs.min(axis=2, keepdims=True, where=is_free, initial=np.inf)
    gaps = np.subtract(costs, least, out=np.full(costs.shape, np.inf), where=is_free)
    plan[:, :g] = np.exp(-gaps / epsilon)
    plan[:, g] = free
    # 2. how much there is to share out, by item and by codeword
    by_item = np.ones((groups, g + 1))
    by_item[:, g] = np.maximum(room - g, 0)
    by_codeword = free * np.maximum(1, g / np.maximum(room, 1))[:, None]
    # 3. scale columns and rows in turn
    for _ in range(iterations):
        plan *= (by_codeword / np.maximum(plan.sum(axis=1), _TINY))[:, None]
        plan *= (by_item / np.maximum(plan.sum(axis=2), _TINY))[:, :, None]
    return plan[:, :g]


# -- what an index needs ----------------------------------------------------------------------------------------------


def _groups(codes: Codes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each row the number of its group, rows that are equal being one group; and the first row of each group."""
    group = np.zeros(len(codes), dtype=np.int64)
    first = np.zeros(min(len(codes), 1), dtype=np.int64)
    for column in codes.T:  # a group's number is below n, so that the products stay small
        _, first, group = np.unique(group * MAX_CODEBOOK_SIZE + column, return_index=True, return_inverse=True)
    return group, first


def _ranks(group: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many rows of the same group come before each row."""
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    ranks = np.empty(len(group), dtype=np.int64)
    ranks[order] = np.arange(len(group)) - np.repeat(starts, np.diff(starts, append=len(group)))
    return ranks


class WithExtraLevels(Quantizer):
    """A trained quantizer with levels after its own that say nothing about a vector.

    If its codewords add up, the codewords of these levels are zero; so whatever works with codewords works on.
    """

    def __init__(self, quantizer: Quantizer, sizes: tuple[int, ...]) -> None:
        self.own = quantizer
        self.name = quantizer.name  # type: ignore[misc]
        self.hierarchical = quantizer.hierarchical  # type: ignore[misc]
        self.codebook_sizes = (*quantizer.codebook_sizes, *sizes)
        self.learned = quantizer.state()
        if (codebooks := quantizer.codebooks) is not None:
            nothing = np.zeros(codebooks[0].shape[1], dtype=np.float32)
            self.learned |= {
                f"codebook_{level}": np.broadcast_to(nothing, (size, len(nothing)))
                for level, size in enumerate(sizes, quantizer.levels + 1)
            }

    def fit(self, vectors: Vectors, *, seed: int = 0) -> Self:
        """Not possible: the quantizer is trained."""
        raise InvalidArgumentError("A quantizer with extra levels is trained already. Fit the one it is made from.")

    def encode(self, vectors: Vectors, *, beam: int | None = None) -> Codes:
        """The codes, and 0 at each further level."""
        codes = self.own.encode(vectors, beam=beam)
        return np.pad(codes, ((0, 0), (0, self.levels - codes.shape[1])))

    def decode(self, codes: Codes) -> Vectors:
        """What the codes of the quantizer's own levels stand for."""
        return self.own.decode(codes[:, : self.own.levels])


def with_extra_levels(quantizer: Quantizer, sizes: tuple[int, ...]) -> Quantizer:
    """The trained quantizer with further levels; itself, if there are none."""
    return WithExtraLevels(quantizer, sizes) if sizes else quantizer


def own_quantizer(quantizer: Quantizer) -> Quantizer:
    """The quantizer without the levels that a policy added."""
    return quantizer.own if isinstance(quantizer, WithExtraLevels) else quantizer


@hookimpl
def semid_register_collision_policies(register: Callable[[type[CollisionPolicy]], None]) -> None:
    """Offer the five policies."""
    for policy in (Share, Digit, NextBest, Capacity, Sinkhorn):
        register(policy)
