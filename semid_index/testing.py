"""The conformance suites that plugin authors subclass.

:class:`QuantizerContract` checks everything that :mod:`semid_index.quantizer` promises, with pytest::

    from semid_index.testing import QuantizerContract

    class TestMyQuantizer(QuantizerContract):
        error_ratio = 0.5

        def make(self):
            return MyQuantizer(levels=3, codebook_size=16)

:class:`CollisionPolicyContract` does the same for :mod:`semid_index.collisions`.

Put ``pytest.register_assert_rewrite("semid_index.testing")`` into ``conftest.py``, so that failures show values.
:func:`estimator` makes a scikit-learn transformer of a quantizer, for pipelines and for scikit-learn's own suite,
``sklearn.utils.estimator_checks.check_estimator``.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar, Self
from unittest import SkipTest  # pytest knows it, and need not be installed to import this module

import numpy as np
from numpy.typing import NDArray

from semid_index.codes import MAX_CODEBOOK_SIZE, MIN_CODEBOOK_SIZE
from semid_index.collisions import Arrivals, Below, CollisionPolicy
from semid_index.errors import InvalidArgumentError, InvalidVectorsError, NotTrainedError, SemidError
from semid_index.quantizer import Codes, Quantizer, Vectors
from semid_index.quantizers.rq import ResidualKMeans

_TIE = 1e-4  # two codewords whose squared errors differ by less than this share are nearly tied

# Reads a saved quantizer where nothing but its class is known, and encodes and decodes with it.
_RESTORE_AND_ENCODE = """
import importlib, json, pathlib, sys
import numpy as np
folder = pathlib.Path(sys.argv[1])
saved = json.loads((folder / "quantizer.json").read_text())
quantizer_class = importlib.import_module(saved["module"])
for part in saved["class"].split("."):
    quantizer_class = getattr(quantizer_class, part)
with np.load(folder / "state.npz", allow_pickle=False) as state:
    quantizer = quantizer_class.restore(saved["config"], dict(state))
codes = quantizer.encode(np.load(folder / "vectors.npy"))
np.savez(folder / "result.npz", codes=codes, decoded=quantizer.decode(np.load(folder / "codes.npy")))
"""


class QuantizerContract:
    """What every quantizer promises, one test for each promise. Subclass it as ``TestSomething`` and define ``make``.

    The vectors are ``rows`` points of ``dim`` dimensions in 40 clusters, each of 8 smaller clusters, and half as many
    others from the same clusters that training does not see.
    """

    error_ratio: ClassVar[float]
    """The share of the variance of unseen vectors that this backend may lose; stated, not hidden."""

    dim: ClassVar[int] = 16
    rows: ClassVar[int] = 1_200

    seeded: ClassVar[bool] = True
    """Whether another seed gives another quantizer. False for one that draws no random numbers."""

    fewest_rows: ClassVar[int] = 1
    """How many vectors training needs; ``fit`` refuses fewer."""

    _trained: ClassVar[Quantizer]

    def make(self) -> Quantizer:
        """A new quantizer, not trained, always with the same configuration."""
        raise NotImplementedError(f"{type(self).__name__} must define make(), which returns a new quantizer.")

    # -- what the tests work with

    def vectors(self) -> Vectors:
        """Training vectors, (rows, dim); every value can be held by float16 too."""
        return self._points()[: self.rows]

    def unseen(self) -> Vectors:
        """Vectors from the same clusters, (rows / 2, dim)."""
        return self._points()[self.rows :]

    def trained(self) -> Quantizer:
        """A quantizer fitted to ``vectors()``. It is shared by all tests, so do not fit it again."""
        suite = type(self)
        if "_trained" not in vars(suite):
            suite._trained = self.make().fit(self.vectors(), seed=0)
        return suite._trained

    def _points(self) -> Vectors:
        random = np.random.default_rng(7)
        n = self.rows + self.rows // 2
        centres = 10 * random.standard_normal((40, self.dim))
        smaller = centres[:, None] + 3 * random.standard_normal((40, 8, self.dim))
        points = smaller[random.integers(40, size=n), random.integers(8, size=n)]
        points += random.standard_normal((n, self.dim))
        return points.astype(np.float16).astype(np.float32)

    # -- names and sizes

    def test_name_is_text(self) -> None:
        """The name is a class attribute, since it must be known before there is an object."""
        name = type(self.make()).name
        assert isinstance(name, str), f"name must be text, not {name!r}"
        assert name.strip() == name != "", f"name must not be empty, or begin or end with a space: {name!r}"

    def test_sizes(self) -> None:
        """``levels`` and ``codebook_sizes`` agree, and a semantic ID can hold them."""
        quantizer = self.trained()
        sizes = quantizer.codebook_sizes
        assert quantizer.levels == len(sizes) >= 1
        assert all(type(size) is int for size in sizes), f"codebook sizes must be plain ints: {sizes!r}"
        assert all(MIN_CODEBOOK_SIZE <= size <= MAX_CODEBOOK_SIZE for size in sizes), sizes

    def test_config_is_json(self) -> None:
        """The configuration survives JSON, and makes an equal quantizer."""
        for quantizer in (self.make(), self.trained()):
            config = quantizer.get_config()
            assert json.loads(json.dumps(config, allow_nan=False)) == config
            assert type(quantizer)(**config).get_config() == config

    def test_config_has_every_option(self) -> None:
        """What the constructor takes beside the shape of the codes is in the configuration; else saving loses it."""
        quantizer = self.make()
        parameters = inspect.signature(type(quantizer)).parameters.values()
        options = {each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)}
        lost = options - {"levels", "codebook_size"} - set(quantizer.get_config())
        assert not lost, f"get_config does not return what the constructor takes: {', '.join(sorted(lost))}"

    # -- codes

    def test_codes(self) -> None:
        """Codes are (n, levels) int32, each within its codebook."""
        quantizer = self.trained()
        for vectors in (self.vectors(), self.unseen()):
            codes = quantizer.encode(vectors)
            assert codes.shape == (len(vectors), quantizer.levels)
            assert codes.dtype == np.int32
            assert (codes >= 0).all()
            assert (codes < np.array(quantizer.codebook_sizes)).all()
        assert len(np.unique(codes, axis=0)) > 1, "all vectors got the same codes"

    def test_error(self) -> None:
        """Decoded, codes lose no more than ``error_ratio`` of the variance of vectors that training did not see."""
        quantizer, vectors = self.trained(), self.unseen()
        decoded = quantizer.decode(quantizer.encode(vectors))
        assert decoded.shape == vectors.shape
        assert decoded.dtype == np.float32
        lost = np.square(vectors - decoded).sum() / np.square(vectors - vectors.mean(axis=0)).sum()
        assert lost <= self.error_ratio, f"{lost:.3f} of the variance is lost, allowed is {self.error_ratio}"

    def test_every_code_decodes(self) -> None:
        """Codes that no vector got are vectors all the same: a prefix may be opened that holds no training vector."""
        quantizer = self.trained()
        codes = _random_codes(quantizer, 500)
        decoded = quantizer.decode(codes)
        assert decoded.shape == (500, self.dim)
        assert np.isfinite(decoded).all()
        assert np.array_equal(decoded, quantizer.decode(codes))

    def test_no_rows(self) -> None:
        """Nothing in, nothing out, in the right shape."""
        quantizer = self.trained()
        codes = quantizer.encode(np.empty((0, self.dim), dtype=np.float32))
        assert codes.shape == (0, quantizer.levels)
        assert codes.dtype == np.int32
        assert quantizer.decode(codes).shape == (0, self.dim)

    def test_alone_or_in_a_batch(self) -> None:
        """Who else is encoded changes nothing, near-ties aside."""
        quantizer, vectors = self.trained(), self.unseen()[:64]
        alone = np.concatenate([quantizer.encode(vectors[row : row + 1]) for row in range(len(vectors))])
        assert_same_codes(quantizer, vectors, quantizer.encode(vectors), alone)
        assert_same_codes(quantizer, vectors, quantizer.encode(vectors[::-1].copy())[::-1], alone)

    # -- hierarchies and codebooks

    def test_coarsest_first(self) -> None:
        """In a hierarchy whose codewords add up, each level lowers the error, and none alone says more than the first.

        (For the second to be so, let ``make`` give all levels the same size.)
        """
        quantizer, vectors = self.trained(), self.vectors()
        if quantizer.codebooks is None or not quantizer.hierarchical:
            raise SkipTest(f"'{quantizer.name}' is no hierarchy whose codewords add up")
        codes = quantizer.encode(vectors)
        errors = [_errors(quantizer, vectors, codes, depth).mean() for depth in range(quantizer.levels + 1)]
        assert all(np.diff(errors) < 0), f"error after 0, 1, ... levels: {errors}"
        alone = [
            np.square(vectors - codebook[c]).sum() for codebook, c in zip(quantizer.codebooks, codes.T, strict=True)
        ]
        assert np.argmin(alone) == 0, f"error of each level alone: {alone}"

    def test_additive(self) -> None:
        """With ``codebooks``, a decoded vector is the sum of one codeword per level; and ``state`` has them by name."""
        quantizer = self.trained()
        if quantizer.codebooks is None:
            raise SkipTest(f"'{quantizer.name}' has no codebooks, so it is not additive")
        state = quantizer.state()
        assert len(quantizer.codebooks) == quantizer.levels
        for level, (codebook, size) in enumerate(zip(quantizer.codebooks, quantizer.codebook_sizes, strict=True), 1):
            assert codebook.shape == (size, self.dim)
            assert codebook.dtype == np.float32
            assert np.array_equal(state[f"codebook_{level}"], codebook)
        codes = _random_codes(quantizer, 500)
        words = [codebook[c] for codebook, c in zip(quantizer.codebooks, codes.T, strict=True)]
        total = np.sum(words, axis=0, dtype=np.float64)
        np.testing.assert_allclose(quantizer.decode(codes), total, rtol=1e-5, atol=1e-5 * np.abs(total).max())

    # -- seeds

    def test_seed(self) -> None:
        """One seed gives one quantizer, to the bit; another seed another, where there is something to draw."""
        again = _state_of(self.make().fit(self.vectors(), seed=0))
        other = _state_of(self.make().fit(self.vectors(), seed=1))
        assert again == _state_of(self.trained()), "the same seed gave another quantizer"
        assert (other != again) == self.seeded, f"seeded is {self.seeded}"

    def test_encoding_is_reproducible(self) -> None:
        """The same vectors get the same codes each time, and the same error."""
        quantizer, vectors = self.trained(), self.unseen()
        first, second = quantizer.encode(vectors), quantizer.encode(vectors)
        assert np.array_equal(first, second)
        assert np.array_equal(quantizer.decode(first), quantizer.decode(second))

    # -- saving

    def test_restore(self) -> None:
        """Made from its configuration and state, a quantizer is the same in every respect."""
        quantizer, vectors = self.trained(), self.unseen()
        state = {name: array.copy() for name, array in quantizer.state().items()}
        restored = type(quantizer).restore(quantizer.get_config(), state)
        assert restored.codebook_sizes == quantizer.codebook_sizes
        assert restored.get_config() == quantizer.get_config()
        assert _state_of(restored) == _state_of(quantizer)
        assert_same_codes(quantizer, vectors, quantizer.encode(vectors), restored.encode(vectors))
        codes = _random_codes(quantizer, 500)
        assert np.array_equal(quantizer.decode(codes), restored.decode(codes))

    def test_restore_in_another_process(self) -> None:
        """Saved as plain arrays and JSON, without pickle, it encodes and decodes the same elsewhere."""
        quantizer, vectors = self.trained(), self.unseen()
        codes = _random_codes(quantizer, 500)
        result = _in_another_process(quantizer, vectors, codes)
        assert_same_codes(quantizer, vectors, quantizer.encode(vectors), result["codes"])
        assert np.array_equal(quantizer.decode(codes), result["decoded"])

    # -- what goes in

    def test_input_is_not_changed(self) -> None:
        """Arrays belong to the caller."""
        vectors = self.vectors()
        before = vectors.copy()
        quantizer = self.make().fit(vectors)
        codes = quantizer.encode(vectors)
        kept = codes.copy()
        quantizer.decode(codes)
        assert np.array_equal(vectors, before)
        assert np.array_equal(codes, kept)

    def test_any_kind_of_array(self) -> None:
        """Order, strides and type of the array do not matter, only its values."""
        quantizer, vectors = self.trained(), self.unseen()
        expected = quantizer.encode(vectors)
        read_only = vectors.copy()
        read_only.flags.writeable = False
        kinds: dict[str, NDArray[Any]] = {
            "Fortran order": np.asfortranarray(vectors),
            "strided": np.repeat(vectors, 2, axis=0)[::2],
            "reversed twice": vectors[::-1].copy()[::-1],
            "float64": vectors.astype(np.float64),
            "float16": vectors.astype(np.float16),
            "big-endian": vectors.astype(">f4"),
            "read-only": read_only,
        }
        for kind, array in kinds.items():
            codes = quantizer.encode(array)
            assert codes.dtype == np.int32, kind
            assert_same_codes(quantizer, vectors, expected, codes, kind)
        from_read_only = self.make().fit(np.asfortranarray(self.vectors()).astype(np.float64))
        assert _state_of(from_read_only) == _state_of(quantizer), "training on the same values as float64 differs"

    def test_bad_vectors_are_refused(self) -> None:
        """Each fault is an :class:`InvalidVectorsError`, and the quantizer is as it was before."""
        quantizer, vectors = self.make().fit(self.vectors()), self.unseen()
        before = quantizer.encode(vectors), _state_of(quantizer)
        with_nan, with_infinity = vectors.copy(), vectors.copy()
        with_nan[3, 1] = np.nan
        with_infinity[3, 1] = -np.inf
        faults: dict[str, NDArray[Any]] = {
            "NaN": with_nan,
            "infinity": with_infinity,
            "one dimension too few": vectors[:, 1:],
            "one dimension too many": np.pad(vectors, ((0, 0), (0, 1))),
            "a 1-D array": vectors[0],
            "a 3-D array": vectors[None],
            "complex numbers": vectors.astype(complex),
            "text": vectors.astype(str),
        }
        for fault, array in faults.items():
            assert_raises(InvalidVectorsError, partial(quantizer.encode, array), f"encode: {fault}")
            if "dimension too" not in fault:
                assert_raises(InvalidVectorsError, partial(quantizer.fit, array), f"fit: {fault}")
            assert np.array_equal(quantizer.encode(vectors), before[0]), f"after {fault}, codes differ"
            assert _state_of(quantizer) == before[1], f"after {fault}, the state differs"

    def test_too_few_rows(self) -> None:
        """``fit`` says so, with a ``ValueError`` of ours, and takes as many as it says it needs."""
        vectors = self.vectors()
        few, none = vectors[: self.fewest_rows - 1], vectors[:0]
        error = assert_raises(SemidError, lambda: self.make().fit(few), f"fit on {len(few)} rows")
        assert isinstance(error, ValueError)
        assert_raises(SemidError, lambda: self.make().fit(none), "fit on no rows")
        enough = self.make().fit(vectors[: self.fewest_rows])
        assert enough.encode(vectors).shape == (len(vectors), enough.levels)

    def test_not_trained(self) -> None:
        """Before ``fit`` there is nothing to encode with."""
        quantizer = self.make()
        codes = np.zeros((1, max(1, quantizer.levels)), dtype=np.int32)
        assert_raises(NotTrainedError, lambda: quantizer.encode(self.vectors()), "encode before fit")
        assert_raises(NotTrainedError, lambda: quantizer.decode(codes), "decode before fit")
        assert_raises(NotTrainedError, quantizer.state, "state before fit")
        assert quantizer.codebooks is None

    # -- progress

    def test_progress(self) -> None:
        """``fit`` reports from none to all of its steps, never backwards."""
        quantizer = self.make()
        reports: list[tuple[int, int, str]] = []
        quantizer.on_progress = lambda done, total, what: reports.append((done, total, what))
        assert quantizer.fit(self.vectors()) is quantizer
        assert reports, "fit never called report_progress"
        shares = [done / total for done, total, _ in reports]
        assert shares == sorted(shares), reports
        assert shares[0] >= 0, reports
        assert shares[-1] == 1, reports
        assert all(isinstance(what, str) and what for _, _, what in reports), reports


# -- collision policies -----------------------------------------------------------------------------------------------


class CollisionPolicyContract:
    """What every collision policy promises. Subclass it as ``TestSomething`` and define ``make``.

    The items are 400 vectors in clusters, 60 of them exact copies of others, with three codes of 32 values. An index is
    stood in for by a list of codes (:class:`Shelves`).
    """

    most_per_id: ClassVar[int | None] = None
    """How many items the policy lets have one ID as long as there is room below the prefix; None for no limit."""

    def make(self) -> CollisionPolicy:
        """A new policy, always with the same configuration."""
        raise NotImplementedError(f"{type(self).__name__} must define make(), which returns a new policy.")

    def placed(self, *sizes: int, policy: CollisionPolicy | None = None) -> tuple[Codes, Codes]:
        """Codes as proposed and as placed, in batches of these sizes (one batch with everything, if none is given)."""
        quantizer, vectors, codes = _items_that_collide()
        policy, shelves, start = policy or self.make(), Shelves(), 0
        placed = []
        for size in sizes or (len(codes),):
            part = slice(start, start + size)
            given = codes[part].copy(), vectors[part].copy()
            new = policy.place(Arrivals(*given, quantizer, shelves.below))
            assert np.array_equal(given[0], codes[part]), "place changed the codes that it was given"
            assert np.array_equal(given[1], vectors[part]), "place changed the vectors that it was given"
            shelves.add(new)
            placed.append(new)
            start += size
        return codes[:start], np.concatenate(placed)

    def test_name_is_text(self) -> None:
        """The name is a class attribute, since it must be known before there is an object."""
        name = type(self.make()).name
        assert isinstance(name, str), f"name must be text, not {name!r}"
        assert name.strip() == name != "", f"name must not be empty, or begin or end with a space: {name!r}"

    def test_config_is_json(self) -> None:
        """The configuration survives JSON, and makes an equal policy."""
        policy = self.make()
        config = policy.get_config()
        assert json.loads(json.dumps(config, allow_nan=False)) == config
        assert "policy" not in config, "the name is kept as 'policy' beside the options"
        again = type(policy)(**config)
        assert again.get_config() == config
        assert np.array_equal(self.placed(policy=again)[1], self.placed()[1])

    def test_codes(self) -> None:
        """One row of integers for each item, with the extra levels, all within their sizes."""
        policy = self.make()
        quantizer, _, codes = _items_that_collide()
        sizes = np.array([*quantizer.codebook_sizes, *policy.extra_levels])
        assert ((sizes >= MIN_CODEBOOK_SIZE) & (sizes <= MAX_CODEBOOK_SIZE)).all(), sizes
        _, placed = self.placed(100, 300)
        assert placed.shape == (len(codes), len(sizes))
        assert placed.dtype == np.int32
        assert ((placed >= 0) & (placed < sizes)).all()

    def test_prefixes_are_kept(self) -> None:
        """All levels of the quantizer but the last are as proposed."""
        proposed, placed = self.placed(100, 300)
        depth = proposed.shape[1] - 1
        assert np.array_equal(placed[:, :depth], proposed[:, :depth])

    def test_an_id_that_no_one_else_wants_is_kept(self) -> None:
        """Where there is no collision below a prefix, there is nothing to do."""
        proposed, placed = self.placed()
        shelf = np.unique(proposed[:, :-1], axis=0, return_inverse=True)[1].reshape(-1)
        _, own, sizes = np.unique(proposed, axis=0, return_inverse=True, return_counts=True)
        contested = np.isin(shelf, shelf[sizes[own.reshape(-1)] > 1])
        assert 0 < contested.sum() < len(contested)
        assert np.array_equal(placed[~contested, : proposed.shape[1]], proposed[~contested])

    def test_the_same_again(self) -> None:
        """The same items in the same batches get the same codes."""
        assert np.array_equal(self.placed(100, 300)[1], self.placed(100, 300)[1])

    def test_no_items(self) -> None:
        """Nothing in, nothing out, in the right shape; also where items are already."""
        policy = self.make()
        _, placed = self.placed(0, 50, 0, policy=policy)
        assert placed.shape == (50, 3 + len(policy.extra_levels))

    def test_limit(self) -> None:
        """No ID has more items than the policy allows, in however many batches they come."""
        if self.most_per_id is None:
            raise SkipTest("the policy has no limit")
        for sizes in ((400,), (1, 199, 200), (10,) * 40):
            _, counts = np.unique(self.placed(*sizes)[1], axis=0, return_counts=True)
            assert counts.max() <= self.most_per_id, f"in batches of {sizes}"

    def test_unique(self) -> None:
        """A policy that promises unique IDs gives them, exact duplicates included."""
        if not self.make().promises_unique:
            raise SkipTest("the policy does not promise unique IDs")
        proposed, placed = self.placed(100, 300)
        assert len(np.unique(proposed, axis=0)) < len(proposed) - 60
        assert len(np.unique(placed, axis=0)) == len(placed)

    def test_more_items_than_ids(self) -> None:
        """Forty copies of one item, with 32 codes at the last level: what cannot be solved is no error."""
        policy = self.make()
        quantizer, vectors, codes = _items_that_collide()
        shelves = Shelves()
        for _ in range(2):
            copies = np.repeat(codes[:1], 40, axis=0), np.repeat(vectors[:1], 40, axis=0)
            shelves.add(policy.place(Arrivals(*copies, quantizer, shelves.below)))
        sizes = np.array([*quantizer.codebook_sizes, *policy.extra_levels])
        assert ((shelves.codes >= 0) & (shelves.codes < sizes)).all()
        assert np.array_equal(shelves.codes[:, :2], np.repeat(codes[:1, :2], 80, axis=0))

    def test_check(self) -> None:
        """A quantizer that the policy cannot work with is refused by an :class:`InvalidArgumentError`, if at all."""
        policy = self.make()
        quantizer, _, _ = _items_that_collide()
        policy.check(quantizer)
        policy.check(type(quantizer)(**quantizer.get_config()))  # not trained
        with suppress(InvalidArgumentError):
            policy.check(_Unordered())


class Shelves:
    """Stands in for an index: which codes its items have."""

    def __init__(self) -> None:
        self.codes: Codes = np.empty((0, 0), dtype=np.int32)

    def add(self, codes: Codes) -> None:
        """Take items in."""
        self.codes = np.concatenate([self.codes.reshape(-1, codes.shape[1]), codes])

    def below(self, prefixes: NDArray[np.integer]) -> Below:
        """See :class:`semid_index.collisions.Arrivals`."""
        depth = prefixes.shape[1]
        number = {tuple(prefix): i for i, prefix in enumerate(prefixes.tolist())}
        assert len(number) == len(prefixes), "below was asked for one prefix twice"
        counts: Counter[tuple[int, int]] = Counter()
        for codes in self.codes.tolist():
            if (prefix := number.get(tuple(codes[:depth]))) is not None:
                counts[prefix, codes[depth] if depth < len(codes) else 0] += 1
        found = np.array([(*key, items) for key, items in counts.items()], dtype=np.int64).reshape(-1, 3)
        return Below(*found.T)


class _Unordered(Quantizer):
    """A quantizer whose codes are no hierarchy, and do not add up."""

    name = "unordered"
    hierarchical = False
    codebook_sizes = (2, 2)
    learned: Mapping[str, NDArray[Any]] | None = {"nothing": np.zeros(1)}

    def fit(self, vectors: Vectors, *, seed: int = 0) -> Self:
        return self

    def encode(self, vectors: Vectors, *, beam: int | None = None) -> Codes:
        return np.zeros((len(vectors), 2), dtype=np.int32)

    def decode(self, codes: Codes) -> Vectors:
        return np.zeros((len(codes), 1), dtype=np.float32)


@cache
def _items_that_collide() -> tuple[Quantizer, Vectors, Codes]:
    """A trained quantizer, vectors, and their codes; the last 60 vectors are copies of others."""
    random = np.random.default_rng(3)
    centres = 8 * random.standard_normal((60, 8))
    points = (centres[random.integers(60, size=340)] + random.standard_normal((340, 8))).astype(np.float32)
    vectors = np.concatenate([points, points[random.integers(20, size=60)]])
    quantizer = ResidualKMeans(levels=3, codebook_size=32).fit(points, seed=0)
    codes = quantizer.encode(vectors)
    codes[:, 1] //= 8  # so that many items meet at one ID, and there is room below each prefix
    codes[:, 2] //= 4
    return quantizer, vectors, codes


def assert_same_codes(quantizer: Quantizer, vectors: Vectors, expected: Codes, got: Codes, what: str = "") -> None:
    """Codes are equal, near-ties aside.

    Where they differ, the two first differing codewords must be equally good: with the levels up to there (all levels,
    if they are no hierarchy or do not add up), the squared errors are within 1e-4 of each other. AssertionError if not.
    """
    assert expected.shape == got.shape, what
    rows = np.flatnonzero((expected != got).any(axis=1))
    for row in rows:
        additive_hierarchy = quantizer.hierarchical and quantizer.codebooks is not None
        depth = int(np.argmax(expected[row] != got[row])) + 1 if additive_hierarchy else quantizer.levels
        pair = np.stack([expected[row], got[row]])
        one, two = _errors(quantizer, np.stack([vectors[row]] * 2), pair, depth)
        near = np.isclose(one, two, rtol=_TIE, atol=1e-6 * float(np.square(vectors[row]).sum()))
        assert near, f"{what or 'codes differ'}: row {row}, {pair.tolist()} with squared errors {one}, {two}"


def assert_raises(expected: type[Exception], call: Callable[[], object], what: str) -> Exception:
    """The error of the expected type that ``call`` raises; AssertionError if it raises none, or another one."""
    try:
        call()
    except expected as error:
        return error
    except Exception as error:
        raise AssertionError(f"{what}: {expected.__name__} expected, not {type(error).__name__}: {error}") from error
    raise AssertionError(f"{what}: {expected.__name__} expected, and nothing was raised")


def _errors(quantizer: Quantizer, vectors: Vectors, codes: Codes, depth: int) -> NDArray[np.float64]:
    """Squared distance from each vector to what its first ``depth`` codes stand for; (n,)."""
    if quantizer.codebooks is None:
        left = vectors.astype(np.float64) - quantizer.decode(codes)
    else:
        left = vectors.astype(np.float64)
        for level, codebook in enumerate(quantizer.codebooks[:depth]):
            left -= codebook[codes[:, level]]
    errors: NDArray[np.float64] = np.einsum("ij,ij->i", left, left)
    return errors


def _random_codes(quantizer: Quantizer, n: int) -> Codes:
    """Codes drawn evenly from all that there are."""
    return np.random.default_rng(5).integers(quantizer.codebook_sizes, size=(n, quantizer.levels), dtype=np.int32)


def _state_of(quantizer: Quantizer) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Everything that was learned, in a form that ``==`` compares to the bit."""
    return {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in quantizer.state().items()}


def _in_another_process(quantizer: Quantizer, vectors: Vectors, codes: Codes) -> Mapping[str, NDArray[Any]]:
    """What a fresh interpreter, given the saved quantizer, encodes the vectors and decodes the codes to."""
    quantizer_class = type(quantizer)
    names = {"module": quantizer_class.__module__, "class": quantizer_class.__qualname__}
    saved = {**names, "config": quantizer.get_config()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "quantizer.json").write_text(json.dumps(saved))
        np.savez(folder / "state.npz", allow_pickle=False, **quantizer.state())
        np.save(folder / "vectors.npy", vectors, allow_pickle=False)
        np.save(folder / "codes.npy", codes, allow_pickle=False)
        run = subprocess.run(  # noqa: S603, our own program
            [sys.executable, "-c", _RESTORE_AND_ENCODE, name],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, f"restoring {saved} in another process failed:\n{run.stderr}"
        with np.load(folder / "result.npz", allow_pickle=False) as result:
            return dict(result)


# -- scikit-learn -----------------------------------------------------------------------------------------------------


def estimator(quantizer_class: type[Quantizer], **params: Any) -> Any:
    """A scikit-learn transformer around a quantizer: ``transform`` gives the codes, ``inverse_transform`` decodes them.

    Its parameters are those of the quantizer, and ``seed``. It can be cloned, pickled, searched over and put into a
    ``Pipeline``::

        codes = estimator(ResidualKMeans, levels=2, codebook_size=64)
        model = make_pipeline(codes, OneHotEncoder(handle_unknown="ignore"), LogisticRegression())

    Too few vectors, NaN and infinity are refused by the quantizer itself. Needs scikit-learn.
    """
    return _estimator_class(quantizer_class)(**params)


def _new_estimator(quantizer_class: type[Quantizer]) -> Any:
    """For unpickling: an estimator whose attributes come later."""
    estimator_class = _estimator_class(quantizer_class)
    return estimator_class.__new__(estimator_class)


@cache
def _estimator_class(quantizer_class: type[Quantizer]) -> Any:
    """The estimator class for a quantizer class, made when first needed because scikit-learn is optional, and heavy."""
    from sklearn.base import BaseEstimator, TransformerMixin
    from sklearn.utils.validation import check_is_fitted, validate_data

    own = [p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(quantizer_class).parameters.values()]
    seed = inspect.Parameter("seed", inspect.Parameter.KEYWORD_ONLY, default=0)
    signature = inspect.Signature([*own, seed])
    # What an array is, scikit-learn wants to be said in its own words; which values and how many, the quantizer knows.
    left_to_quantizer = {"ensure_all_finite": False, "ensure_min_samples": 0}

    class QuantizerEstimator(TransformerMixin, BaseEstimator):  # type: ignore[misc]
        def __init__(self, **params: Any) -> None:
            bound = signature.bind(**params)
            bound.apply_defaults()
            self.__dict__.update(bound.arguments)

        def __reduce__(self) -> tuple[Any, ...]:
            return _new_estimator, (quantizer_class,), self.__getstate__()

        def __sklearn_tags__(self) -> Any:
            tags = super().__sklearn_tags__()
            tags.transformer_tags.preserves_dtype = []  # codes are int32, whatever the vectors are
            return tags

        def fit(self, X: Any, y: Any = None) -> Any:  # noqa: N803
            X = validate_data(self, X, **left_to_quantizer)
            params = {parameter.name: getattr(self, parameter.name) for parameter in own}
            self.quantizer_ = quantizer_class(**params).fit(X, seed=self.seed)
            return self

        def transform(self, X: Any) -> Codes:  # noqa: N803
            check_is_fitted(self, "quantizer_")
            codes: Codes = self.quantizer_.encode(validate_data(self, X, reset=False, **left_to_quantizer))
            return codes

        def inverse_transform(self, X: Any) -> Vectors:  # noqa: N803
            check_is_fitted(self, "quantizer_")
            vectors: Vectors = self.quantizer_.decode(np.asarray(X))
            return vectors

    # scikit-learn reads the names of parameters from here.
    QuantizerEstimator.__init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), *signature.parameters.values()]
    )
    return QuantizerEstimator
