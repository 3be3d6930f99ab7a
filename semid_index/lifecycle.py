"""Items that change: new vectors for known ids, and deleting.

An ID is a promise. Nothing here gives another item's ID a new meaning: an item keeps its ID, or gets a new one while
the old one goes to the table ``semid_history``; and a pair of ID and ``dup_rank`` that an item had is not given again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from semid_index.appending import Replaced
from semid_index.build import ItemWriter, writing_items
from semid_index.coder import Coder
from semid_index.errors import InvalidIdsError
from semid_index.filters import CheckedFilter
from semid_index.incoming import Incoming, Items, check_incoming
from semid_index.items import as_ids, id_type
from semid_index.quantizer import Codes, ProgressCallback, Vectors
from semid_index.records import UpsertResult
from semid_index.store import Store

log = logging.getLogger("semid_index")


# -- deleting ---------------------------------------------------------------------------------------------------------


def delete(store: Store, ids: Any) -> int:
    """Delete the items with these ids, in one transaction; how many there were."""
    store.check_writable()
    wanted = as_ids(ids)
    with store.unchanging():
        if id_type(wanted) != store.id_type:  # so no item has them
            return 0
        return store.retried(lambda: _delete_rows(store, store.rows_of_ids(wanted.unique())))


def delete_where(store: Store, condition: CheckedFilter, columns: Mapping[str, str]) -> int:
    """Delete the items that fulfil a checked filter, in one transaction; how many there were."""
    store.check_writable()
    with store.unchanging():
        return store.retried(lambda: _delete_rows(store, store.matching_rows(condition, columns)))


def _delete_rows(store: Store, rows: NDArray[np.int64]) -> int:
    rows = rows[rows >= 0]
    deleted = store.delete(rows) if len(rows) else 0
    log.info("deleted %d items", deleted)
    return deleted


# -- new vectors for known ids ----------------------------------------------------------------------------------------


def upsert(
    store: Store,
    coder: Coder,
    vectors: Any,
    ids: Any,
    *,
    metadata: Any,
    batch_size: int,
    on_bad_vectors: Literal["error", "drop"],
    progress: ProgressCallback | None,
) -> UpsertResult:
    """Write items that are known or new, in one transaction.

    An item keeps its ID if its codes stay as they are. What its codes are can depend on other items: with a collision
    policy, or with codebooks whose words take a limited number of items. Then an item keeps its ID, too, if its stored
    vector stays as it is, so that writing the same again changes nothing.
    """
    if ids is None:
        raise InvalidIdsError("upsert needs the ids of the items, known ones and new ones. Pass ids=[...] (--ids).")
    with store.unchanging():
        incoming = check_incoming(
            store, vectors, ids, metadata=metadata, batch_size=batch_size, on_bad_vectors=on_bad_vectors
        )

        def write() -> UpsertResult:
            updated = renamed = 0
            with writing_items(store, coder, incoming, replacing=True) as writer:
                for items in incoming.batches(batch_size, progress):
                    known, moved = _replace(store, writer, items)
                    updated, renamed = updated + known, renamed + moved
            return _result(incoming, updated, renamed)

        result = store.retried(write)
    log.info("inserted %d items, updated %d", result.inserted, result.updated)
    return result


def _result(incoming: Incoming, updated: int, renamed: int) -> UpsertResult:
    written = len(incoming.ids)
    return UpsertResult(written - updated, updated, renamed, len(incoming.all_ids) - written)


def _replace(store: Store, writer: ItemWriter, items: Items) -> tuple[int, int]:
    """Write some items in place of those with the same ids; how many of these there were, and how many got new IDs."""
    old = writer.appending.replace(items.ids)
    comparable = writer.comparable(items.vectors)
    codes = np.zeros((len(items.ids), old.codes.shape[1]), dtype=np.int32)
    codes[old.positions] = old.codes
    ranks = np.full(len(codes), -1, dtype=np.int32)
    ranks[old.positions] = old.ranks
    if writer.independent:
        places = np.arange(len(codes))
        proposed = writer.propose(comparable)
    else:
        places, proposed = _write_settled(store, writer, items, comparable, codes, ranks, old)
    if len(places):
        placed = writer.place(proposed, comparable[places])
        ranks[places[(placed != codes[places]).any(axis=1)]] = -1
        part = items if len(places) == len(codes) else items.take(places)
        writer.write(part, comparable[places], placed, ranks[places])
    return len(old.positions), int(np.count_nonzero(ranks[old.positions] < 0))


def _write_settled(
    store: Store,
    writer: ItemWriter,
    items: Items,
    comparable: Vectors,
    codes: Codes,
    ranks: NDArray[np.int32],
    old: Replaced,
) -> tuple[NDArray[np.int64], Codes]:
    """Write the items that keep their IDs whatever the others do, so that those are placed around them.

    Gives the positions of the others, and what the quantizer proposes for them.
    """
    # 1. the same vector again
    same = np.zeros(len(codes), dtype=bool)
    same[old.positions] = _stored_alike(store, writer, items, old)
    # 2. the quantizer still proposes the codes that the item has, whether a level was added to them or not
    writer.take_up(old.codes[~same[old.positions]], -1)
    others = np.flatnonzero(~same)
    proposed = writer.propose(comparable[others]) if len(others) else np.empty((0, codes.shape[1]), dtype=np.int32)
    kept = (ranks[others] >= 0) & (proposed == codes[others, : proposed.shape[1]]).all(axis=1)
    writer.take_up(codes[others[kept]])
    settled = np.union1d(np.flatnonzero(same), others[kept])
    if len(settled):
        writer.write(items.take(settled), comparable[settled], codes[settled], ranks[settled])
    return others[~kept], proposed[~kept]


def _stored_alike(store: Store, writer: ItemWriter, items: Items, old: Replaced) -> NDArray[np.bool_]:
    """For each item that was there, whether its vector is stored as it was; False where none are stored."""
    new = writer.stored(items.vectors[old.positions])
    if not new or not len(old.rows):
        return np.zeros(len(old.rows), dtype=bool)
    was = store.vectors_of(old.rows, *new)
    alike = np.ones(len(old.rows), dtype=bool)
    for name, values in new.items():
        alike &= (was[name] == values).reshape(len(values), -1).all(axis=1)
    return alike
