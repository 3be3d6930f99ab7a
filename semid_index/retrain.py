"""Learning codebooks again, and giving all items new IDs that are the old ones wherever that is possible.

1. Learn: from the old codebooks (:mod:`semid_index.alignment`), or from scratch with ``keep_ids=False``.
2. Align: give each new codeword the number of the old one whose items it took over.
3. Encode all items again, and publish their codes as a new version, beside the old one, in one transaction.

What the IDs would be without the first two steps is measured on some of the items, from codebooks learned from scratch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from semid_index.alignment import WarmStarting, aligned, changed
from semid_index.build import (
    REPORT_ROWS,
    ItemWriter,
    level_reports,
    training_sample,
    usable_sample,
)
from semid_index.coder import Coder
from semid_index.collisions import own_quantizer, with_extra_levels
from semid_index.errors import InvalidArgumentError, InvalidIdsError, InvalidVectorsError, NotTrainedError, PluginError
from semid_index.incoming import check_source
from semid_index.items import as_ids, id_type
from semid_index.metrics import comparable
from semid_index.quantizer import Codes, ProgressCallback, Quantizer, Vectors
from semid_index.quantizers.kmeans import training_device
from semid_index.records import LevelChurn, RetrainReport, TrainReport
from semid_index.rerank import from_stored, stored_dtype
from semid_index.store import Store
from semid_index.vectors import VectorSource

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger("semid_index")

_BATCH = 50_000


def retrain(
    store: Store,
    old: Coder,
    vectors: Any,
    ids: Any,
    *,
    keep_ids: bool,
    compare: bool,
    progress: ProgressCallback | None,
) -> tuple[RetrainReport, Coder]:
    """Publish a new version of the IDs; see :meth:`SemanticIndex.retrain`."""
    if not store.is_trained:
        raise NotTrainedError("The index is not trained. Call index.train(vectors) and index.add(vectors) first.")
    store.check_writable()
    started = time.perf_counter()
    with store.unchanging():
        if not len(store):
            raise InvalidArgumentError(
                "The index has no items, so there are no IDs to keep. Add some, or create a new index and train that."
            )
        items, learn_from = _sources(store, vectors, ids)
        own = own_quantizer(old.quantizer)
        of_items = items.sample(own)
        rows = of_items if learn_from is None else training_sample(learn_from, own, store.config, None)
        new = _learned(own, rows, store.config.seed, keep_ids=keep_ids, progress=progress)
        levels = level_reports(new, _few(rows))
        seconds, refinement = time.perf_counter() - started, getattr(new, "refinement", None)
        train_report = TrainReport(len(rows), seconds, levels, refinement, training_device())
        coder = replace(old, quantizer=with_extra_levels(new, old.policy.extra_levels))
        sizes = tuple(coder.quantizer.codebook_sizes)
        if sizes != store.layout.codebook_sizes:
            raise PluginError(
                f"The quantizer '{own.name}' came out with codebooks of {sizes} words instead of "
                f"{store.layout.codebook_sizes}. Report this to whoever wrote it."
            )
        scratch = None
        if compare and keep_ids:
            scratch = _from_scratch(own, new, rows, _few(of_items), store.config.seed, progress)
        number = store.version + 1
        with store.new_version(asdict(train_report), coder.arrays()) as appending:
            writer = ItemWriter(store, coder, appending, anew=True)
            sums = _encode_all(items, writer, old.quantizer, coder.quantizer, progress)
            writer.finish()
    report = RetrainReport(
        version=number,
        items=items.count,
        rows=len(rows),
        seconds=time.perf_counter() - started,
        kept_ids=keep_ids,
        error_before=float(sums.errors[0]) / items.count,
        error=float(sums.errors[1]) / items.count,
        levels=levels,
        churn=_churn(sums, items.count, scratch),
        error_ratio=None if scratch is None else scratch.error_ratio,
    )
    log.info("retrained: version %d, %.1f %% of the IDs changed", number, 100 * report.churn[-1].prefix)
    return replace(report, seconds=time.perf_counter() - started), coder


# -- what to learn from, and what to encode ---------------------------------------------------------------------------


class _Items:
    """All items of the index: their ids, old codes and vectors, as they are stored or as they are given."""

    def __init__(self, store: Store, given: tuple[VectorSource, pa.Array] | None) -> None:
        self._store, self._given = store, given
        self.config, self.count = store.config, len(store)

    def sample(self, quantizer: Quantizer) -> Vectors:
        """Some of the vectors, as many as ``train`` takes; at length 1 under cosine."""
        if self._given is not None:
            return training_sample(self._given[0], quantizer, self.config, None)
        rows = np.sort(self._store.rows())
        wanted = min(usable_sample(quantizer), len(rows))
        chosen = np.sort(np.random.default_rng(self.config.seed).choice(rows, wanted, replace=False))
        return comparable(self._decoded(self._store.vectors_of(chosen, *self._columns)), self.config.metric)

    def batches(self) -> Iterator[tuple[NDArray[np.int64], pa.Array, Codes, Vectors]]:
        """Rows, ids, codes and vectors of all items, some at a time."""
        for rows, vectors in self._rows_and_vectors():
            ids, codes = self._store.ids_and_codes_of(rows)
            yield rows, ids, codes, comparable(vectors, self.config.metric)

    def _rows_and_vectors(self) -> Iterator[tuple[NDArray[np.int64], Vectors]]:
        if self._given is None:
            for rows, stored in self._store.vector_batches(*self._columns):
                yield rows, self._decoded(stored)
            return
        source, ids = self._given
        done = 0
        for batch in source.batches(_BATCH):
            yield self._store.rows_of_ids(ids[done : done + len(batch)]), batch
            done += len(batch)

    @property
    def _columns(self) -> tuple[str, ...]:
        return ("v", "scale") if self.config.vectors == "int8" else ("v",)

    def _decoded(self, stored: dict[str, NDArray[Any]]) -> Vectors:
        return from_stored(stored["v"].view(stored_dtype(self.config.vectors)), stored.get("scale"))


def _sources(store: Store, vectors: Any, ids: Any) -> tuple[_Items, VectorSource | None]:
    """The items with their vectors, and what else to learn from, if anything."""
    if vectors is None and ids is not None:
        raise InvalidArgumentError("ids belong to vectors, and there are none. Pass the vectors of all items, too.")
    if ids is None and store.config.vectors == "none":
        raise InvalidVectorsError(
            'The index keeps no vectors (vectors="none"), so its items cannot be encoded again from what it has. Pass '
            "the vectors of all items, and their ids."
        )
    if vectors is None:
        return _Items(store, None), None
    source = check_source(vectors, store.config)
    if ids is None:
        return _Items(store, None), source
    wanted = as_ids(ids, count=source.rows)
    known = store.rows_of_ids(wanted) if id_type(wanted) == store.id_type else np.empty(0)
    if len(wanted) != len(store) or len(np.unique(known)) != len(store) or (known < 0).any():
        raise InvalidIdsError(
            f"The ids must be those of all {len(store):,} items of the index, each of them once. Without ids, vectors "
            "are only what is learned from."
        )
    return _Items(store, (source, wanted)), None


def _few(vectors: Vectors) -> Vectors:
    return vectors[:: max(1, len(vectors) // REPORT_ROWS)][:REPORT_ROWS]


# -- learning ---------------------------------------------------------------------------------------------------------


def _learned(
    old: Quantizer, rows: Vectors, seed: int, *, keep_ids: bool, progress: ProgressCallback | None
) -> Quantizer:
    """A new quantizer of the same kind, aligned with the old one if IDs are to be kept."""
    new = type(old).restore(old.get_config(), old.state()) if keep_ids else type(old)(**old.get_config())
    if keep_ids and new.codebooks is None:
        raise InvalidArgumentError(
            f"The quantizer '{old.name}' has no codewords that could keep their numbers. Retrain with keep_ids=False."
        )
    new.on_progress = progress
    try:
        if keep_ids and isinstance(new, WarmStarting):
            new.refit(rows, seed=seed)
        else:
            new.fit(rows, seed=seed)
    finally:
        new.on_progress = None
    if not keep_ids:
        return new
    result = aligned(old, new, rows)
    if hasattr(new, "refinement"):
        result.refinement = new.refinement  # type: ignore[attr-defined]
    return result


@dataclass(frozen=True)
class _Scratch:
    """What training from scratch would have done to some of the items."""

    error_ratio: float
    by_number: NDArray[np.float64]
    aligned: NDArray[np.float64]


def _from_scratch(
    old: Quantizer, new: Quantizer, rows: Vectors, few: Vectors, seed: int, progress: ProgressCallback | None
) -> _Scratch:
    scratch = _learned(old, rows, seed, keep_ids=False, progress=progress)
    before = old.encode(few)
    as_is, renamed = (
        changed(before, each.encode(few))[1] / len(few) for each in (scratch, aligned(old, scratch, rows))
    )
    return _Scratch(_error(new, few) / max(_error(scratch, few), 1e-30), as_is, renamed)


def _error(quantizer: Quantizer, vectors: Vectors) -> float:
    left = vectors - quantizer.decode(quantizer.encode(vectors))
    return float(np.einsum("ij,ij->", left, left)) / len(vectors)


# -- encoding ---------------------------------------------------------------------------------------------------------


@dataclass
class _Sums:
    """Counts over all items."""

    changed: NDArray[np.int64]
    prefixes: NDArray[np.int64]
    errors: NDArray[np.float64]
    """Squared errors by the old codes, and by the new."""


def _encode_all(
    items: _Items, writer: ItemWriter, old: Quantizer, new: Quantizer, progress: ProgressCallback | None
) -> _Sums:
    levels = new.levels
    sums = _Sums(np.zeros(levels, dtype=np.int64), np.zeros(levels, dtype=np.int64), np.zeros(2))
    done = 0
    for rows, ids, before, vectors in items.batches():
        after = writer.place(writer.propose(vectors), vectors)
        writer.write_codes(rows, ids, vectors, after)
        at_levels, prefixes = changed(before, after)
        sums.changed += at_levels
        sums.prefixes += prefixes
        for place, decoded in enumerate((old.decode(before), new.decode(after))):
            left = vectors - decoded
            sums.errors[place] += np.einsum("ij,ij->", left, left, dtype=np.float64)
        done += len(rows)
        if progress is not None:
            progress(done, items.count, "encode all items again")
    return sums


def _churn(sums: _Sums, items: int, scratch: _Scratch | None) -> tuple[LevelChurn, ...]:
    return tuple(
        LevelChurn(
            level=level + 1,
            changed=float(sums.changed[level]) / items,
            prefix=float(sums.prefixes[level]) / items,
            unaligned=None if scratch is None or level >= len(scratch.by_number) else float(scratch.by_number[level]),
            aligned=None if scratch is None or level >= len(scratch.aligned) else float(scratch.aligned[level]),
        )
        for level in range(len(sums.changed))
    )
