"""Vectors -> codebooks -> codes -> store."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from semid_index.appending import Appending, ItemBatch, uses_all_bits
from semid_index.coder import Coder
from semid_index.codes import CodeLayout, pack, pack_rest, unpack
from semid_index.collisions import Arrivals, CollisionPolicy, Share, own_quantizer, with_extra_levels
from semid_index.drift import counted
from semid_index.errors import (
    RESTORE,
    AlreadyTrainedError,
    CorruptIndexError,
    PluginError,
    SemidError,
)
from semid_index.incoming import (
    Incoming,
    Items,
    check_incoming,
    drops,
    open_source,
    refuse_all_dropped,
    refuse_known,
    refuse_unusable,
    unusable_rows,
)
from semid_index.items import check_count, id_type
from semid_index.metrics import comparable
from semid_index.quantizer import Codes, ProgressCallback, Quantizer, Vectors
from semid_index.quantizers.kmeans import training_device
from semid_index.quantizers.tail import TAIL_ARRAY, Tail, default_tail
from semid_index.records import CollisionCounts, IndexConfig, LevelReport, TrainReport
from semid_index.rerank import to_stored
from semid_index.store import Store, fingerprints
from semid_index.vectors import VectorSource

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger("semid_index")

_SAMPLE_PER_CODEWORD = 256
_SMALLEST_SAMPLE = 65_536
REPORT_ROWS = 20_000
_TAIL_LEAST_ROWS = 256  # with fewer training rows a tail would learn next to nothing
_PROBED_ROWS = 256  # rows looked at to choose how vectors are written


# -- training ---------------------------------------------------------------------------------------------------------


def train(
    store: Store,
    untrained: Coder,
    vectors: Any,
    *,
    sample: int | None,
    on_bad_vectors: Literal["error", "drop"],
    progress: ProgressCallback | None,
) -> tuple[TrainReport, Coder]:
    """Learn codebooks, and tail codebooks, from (a sample of) vectors, and save them."""
    if store.is_trained:
        raise AlreadyTrainedError(
            "The index is trained already, and training again would change the meaning of its IDs. Create a new index."
        )
    config, quantizer, policy = store.config, untrained.quantizer, untrained.policy
    source = open_source(vectors, config.dim)
    started = time.perf_counter()
    rows = training_sample(source, quantizer, config, sample, on_bad_vectors=on_bad_vectors)
    quantizer.on_progress = progress
    try:
        quantizer.fit(rows, seed=config.seed)
    finally:
        quantizer.on_progress = None
    policy.check(quantizer)
    parts = config.tail if config.tail is not None else default_tail(config.dim) * (len(rows) >= _TAIL_LEAST_ROWS)
    tail = Tail.train(rows, parts, seed=config.seed) if parts else None
    report = TrainReport(
        len(rows),
        0.0,
        level_reports(quantizer, rows[:: max(1, len(rows) // REPORT_ROWS)][:REPORT_ROWS]),
        getattr(quantizer, "refinement", None),
        training_device(),
    )
    report = replace(report, seconds=time.perf_counter() - started)
    config = replace(config, tail=parts, quantizer_config=quantizer.get_config())
    coder = Coder(with_extra_levels(quantizer, policy.extra_levels), policy, tail)
    layout = CodeLayout(tuple(coder.quantizer.codebook_sizes))
    store.save_training(config, asdict(report), layout, coder.arrays(), hierarchical=quantizer.hierarchical)
    return report, coder


def restore(store: Store, quantizer_class: type[Quantizer], policy: CollisionPolicy) -> Coder:
    """What an index learned, as it is in the file."""
    arrays = store.learned_arrays()
    recorded = store.meta("fingerprints")  # not in files of format 1
    if recorded is not None and recorded != fingerprints(arrays):
        raise CorruptIndexError(f"{store.path} is damaged: its codebooks are not as training left them. {RESTORE}")
    tail = arrays.pop(TAIL_ARRAY, None)
    for level in range(store.layout.levels, store.layout.levels - len(policy.extra_levels), -1):
        arrays.pop(f"codebook_{level}", None)
    config, damaged = store.config, f"{store.path} is damaged. {RESTORE}"
    try:
        quantizer = quantizer_class.restore(dict(config.quantizer_config), arrays)
        quantizer.decode(np.empty((0, quantizer.levels), dtype=np.int32))  # looks at all that decoding needs
        quantizer = with_extra_levels(quantizer, policy.extra_levels)
        codewords = [codebook.shape for codebook in quantizer.codebooks or ()]
    except SemidError:
        raise
    except Exception as error:  # whatever a quantizer makes of arrays that are not its own
        raise CorruptIndexError(
            f"{damaged} (Its quantizer '{config.quantizer}' cannot be restored: {type(error).__name__}: {error})"
        ) from error
    if codewords not in ([], [(size, config.dim) for size in store.layout.codebook_sizes]):
        raise CorruptIndexError(f"{damaged} (Codewords are missing.)")
    return Coder(quantizer, policy, None if tail is None else Tail(tail))


def level_reports(quantizer: Quantizer, vectors: Vectors) -> tuple[LevelReport, ...]:
    """How the error falls level by level, for quantizers whose codewords add up."""
    if quantizer.codebooks is None or not len(vectors):
        return ()
    codes = quantizer.encode(vectors)
    variance = float(np.square(vectors - vectors.mean(axis=0)).sum(axis=1).mean()) or 1.0
    residuals = vectors.copy()
    reports = []
    for level, codebook in enumerate(quantizer.codebooks):
        residuals -= codebook[codes[:, level]]
        error = float(np.einsum("ij,ij->i", residuals, residuals).mean())
        counts = np.bincount(codes[:, level], minlength=len(codebook))
        shares = counts[counts > 0] / len(codes)
        perplexity = float(np.exp(-(shares * np.log(shares)).sum()))
        reports.append(
            LevelReport(level + 1, len(codebook), error, error / variance, perplexity, int((counts == 0).sum()))
        )
    return tuple(reports)


def usable_sample(quantizer: Quantizer) -> int:
    """How many vectors are enough to train a quantizer."""
    return max(_SMALLEST_SAMPLE, _SAMPLE_PER_CODEWORD * max(quantizer.codebook_sizes, default=0))


def training_sample(
    source: VectorSource,
    quantizer: Quantizer,
    config: IndexConfig,
    sample: int | None,
    *,
    on_bad_vectors: Literal["error", "drop"] = "error",
) -> Vectors:
    """Vectors to learn from, chosen at random, at length 1 under cosine; refuses, or drops, those that are no use."""
    if sample is not None:
        check_count("sample", sample)
    drop = drops(on_bad_vectors)
    wanted = sample or usable_sample(quantizer)
    rows = source.sample(min(int(wanted), source.rows), seed=config.seed)
    bad = unusable_rows(rows, config.metric)
    if drop and len(bad):
        rows = np.delete(rows, bad, axis=0)
        refuse_all_dropped(len(rows), bad, config)
    else:
        refuse_unusable(bad, config, "of the training sample ")
    return comparable(rows, config.metric)


# -- adding -----------------------------------------------------------------------------------------------------------


def add(
    store: Store,
    coder: Coder,
    vectors: Any,
    ids: Any,
    *,
    metadata: Any,
    batch_size: int,
    on_bad_vectors: Literal["error", "drop"],
    progress: ProgressCallback | None,
) -> Any:
    """Encode vectors and store them in one transaction; the ids that were added, as a list or an integer array.

    Everything is checked before anything is written, at the price of reading a file twice.
    """
    with store.unchanging():
        incoming = check_incoming(
            store, vectors, ids, metadata=metadata, batch_size=batch_size, on_bad_vectors=on_bad_vectors
        )
        refuse_known(store, incoming)

        def write() -> None:
            with writing_items(store, coder, incoming) as writer:
                for items in incoming.batches(batch_size, progress):
                    comparable = writer.comparable(items.vectors)
                    writer.write(items, comparable, writer.place(writer.propose(comparable), comparable))

        store.retried(write)
    log.info("added %d items", len(incoming.ids))
    return incoming.ids.to_numpy() if id_type(incoming.ids) == "int" else incoming.ids.to_pylist()


@contextmanager
def writing_items(store: Store, coder: Coder, incoming: Incoming, *, replacing: bool = False) -> Iterator[ItemWriter]:
    """Encode and write items, in batches, in one transaction. ``replacing``: see :meth:`Store.appending`."""
    compress = store.config.vectors != "float32" or not uses_all_bits(next(incoming.source.batches(_PROBED_ROWS)))
    kind = id_type(incoming.ids)
    with store.appending(kind, replacing=replacing, compress=compress) as appending:
        writer = ItemWriter(store, coder, appending)
        yield writer
        writer.finish()


class ItemWriter:
    """Encodes items, lets the collision policy place them, and writes them."""

    def __init__(self, store: Store, coder: Coder, appending: Appending, *, anew: bool = False) -> None:
        """``anew``: all items are encoded again, so the codes that they have do not count."""
        quantizer = coder.quantizer
        self._store, self._quantizer, self._tail = store, quantizer, coder.tail
        self._own = own_quantizer(quantizer)
        self._config, self._layout = store.config, CodeLayout(tuple(quantizer.codebook_sizes))
        self._anew = anew
        self._first_row = appending.next_row
        self._items, self._error = 0, 0.0
        self._counts = _code_counts(store, quantizer, anew=anew)
        self._placing = _Placing(coder, appending)
        self.appending = appending
        self.independent = self._counts is None and isinstance(coder.policy, Share)
        """Whether the codes of an item depend on nothing but its vector."""

    def comparable(self, vectors: Vectors) -> Vectors:
        """Vectors as they are encoded: at length 1 under cosine."""
        return comparable(vectors, self._config.metric)

    def propose(self, comparable: Vectors) -> Codes:
        """The codes that the quantizer proposes, (n, L); a collision policy may place the items elsewhere."""
        if self._counts is None:
            return self._own.encode(comparable)
        return self._own.encode_within(comparable, self._counts)  # type: ignore[attr-defined, no-any-return]

    def place(self, proposed: Codes, comparable: Vectors) -> Codes:
        """The codes (n, levels) of new items."""
        codes = self._placing.place(proposed, comparable)
        self.take_up(codes)
        self._placing.count_error(comparable, codes)
        return codes

    def take_up(self, codes: Codes, sign: int = 1) -> None:
        """Count items with these codes, for a quantizer that limits them; ``sign=-1``: they are no more."""
        if self._counts is not None:
            _count(codes, self._counts, sign)

    def stored(self, vectors: Vectors) -> dict[str, NDArray[Any]]:
        """What is stored of vectors, without the tail."""
        return to_stored(vectors, self._config.vectors)

    def write(self, items: Items, comparable: Vectors, codes: Codes, ranks: NDArray[np.int32] | None = None) -> None:
        """Write items with these codes, and these ranks among those that share them, -1 for new ones."""
        decoded = self._decoded(codes, comparable)
        stored = self.stored(items.vectors)
        if self._tail is not None:
            stored["tail"] = self._tail.encode(comparable)
        first = self.appending.next_row
        self.appending.add(
            ItemBatch(
                np.arange(first, first + len(codes)),
                items.ids,
                pack(codes, self._layout),
                pack_rest(codes, self._layout) if self._layout.rest_levels else None,
                np.einsum("ij,ij->i", decoded, decoded),
                stored,
                items.metadata,
                ranks,
            )
        )

    def write_codes(self, rows: NDArray[np.int64], ids: pa.Array, comparable: Vectors, codes: Codes) -> None:
        """Write the codes of items that have these rows and are in the index already."""
        decoded = self._decoded(codes, comparable)
        rest = pack_rest(codes, self._layout) if self._layout.rest_levels else None
        norms = np.einsum("ij,ij->i", decoded, decoded)
        self.appending.add_codes(ItemBatch(rows, ids, pack(codes, self._layout), rest, norms, {}, None, None))

    def _decoded(self, codes: Codes, comparable: Vectors) -> Vectors:
        """What codes decode to; takes note of how far that is from the vectors."""
        decoded = self._quantizer.decode(codes)
        self._items += len(codes)
        self._error += float(_squared_errors(comparable, decoded).sum())
        return decoded

    def finish(self) -> None:
        """Save what the collision policy did, and how far the items are from their codes."""
        first, end = (0 if self._anew else self._first_row), self.appending.next_row
        before = None if self._anew else self._store.meta("drift")
        sums = counted(before, items=self._items, error=self._error, first_row=first, next_row=end)
        self.appending.save_drift(sums)
        self._placing.finish(CollisionCounts() if self._anew else self._store.collision_counts())


class _Placing:
    """Lets the collision policy place the items of one call of ``add``, and sums up what it costs."""

    def __init__(self, coder: Coder, appending: Appending) -> None:
        self._policy, self._own, self._appending = coder.policy, own_quantizer(coder.quantizer), appending
        self._passive = isinstance(coder.policy, Share)
        self._counts = CollisionCounts()
        self._shape = (self._own.levels, coder.quantizer.levels)

    def place(self, proposed: Codes, vectors: Vectors) -> Codes:
        """The codes to store, (n, levels), for those that the quantizer proposes."""
        if self._passive:
            return proposed
        own_levels, levels = self._shape
        codes = self._policy.place(Arrivals(proposed.copy(), vectors, self._own, self._appending.below))
        if codes.shape != (len(proposed), levels) or codes.dtype.kind not in "iu":
            raise PluginError(
                f"The collision policy '{self._policy.name}' gave {codes.dtype} codes of shape {codes.shape}; integers "
                f"of shape {(len(proposed), levels)} were expected. Report this to whoever wrote it."
            )
        self._appending.propose(proposed)
        differs = codes[:, :own_levels] != proposed
        moved = np.flatnonzero(differs.any(axis=1))
        before, after = (
            _squared_errors(vectors[moved], self._own.decode(some[moved, :own_levels])) for some in (proposed, codes)
        )
        self._counts += CollisionCounts(
            items=len(codes),
            moved=len(moved),
            prefixes_moved=int(differs[:, :-1].any(axis=1).sum()),
            error=float(before.sum() - after.sum()),  # count_error adds that of all items as placed
            extra_error=float(after.sum() - before.sum()),
        )
        return codes

    def count_error(self, vectors: Vectors, codes: Codes) -> None:
        """Take note of how far items are from what their codes, as placed, decode to."""
        if not self._passive:
            decoded = self._own.decode(codes[:, : self._own.levels])
            self._counts += CollisionCounts(error=float(_squared_errors(vectors, decoded).sum()))

    def finish(self, so_far: CollisionCounts) -> None:
        """Save the sums, those of earlier calls included."""
        if not self._passive:
            gain = self._appending.proposed_uniqueness()
            self._appending.save_collisions(so_far + self._counts + CollisionCounts(**asdict(gain)))


def _squared_errors(vectors: Vectors, decoded: Vectors) -> NDArray[np.float64]:
    """Squared distance from each vector to the decoded one: (n,)."""
    left = vectors - decoded
    errors: NDArray[np.float64] = np.einsum("ij,ij->i", left, left).astype(np.float64)
    return errors


def _code_counts(store: Store, quantizer: Quantizer, *, anew: bool) -> list[NDArray[np.int64]] | None:
    """How many items have each code, level by level, for a quantizer that limits them; None for all others."""
    quantizer = own_quantizer(quantizer)
    if getattr(quantizer, "capacity", None) is None:
        return None
    counts = [np.zeros(size, dtype=np.int64) for size in quantizer.codebook_sizes]
    if not anew:
        stored = store.codes()
        _count(unpack(stored.sids, store.layout, stored.rest), counts)
    return counts


def _count(codes: Codes, counts: list[NDArray[np.int64]], sign: int = 1) -> None:
    for level, count in enumerate(counts):
        count += sign * np.bincount(codes[:, level], minlength=len(count))
