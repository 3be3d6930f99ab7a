"""Items from a file that ``export`` wrote: they come with the IDs that they have there.

Nothing is encoded. So an item keeps its ID also where its vector was stored with less precision than it was encoded
with, where a collision policy had moved it, or where other items of its shelf are missing.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from semid_index.build import writing_items
from semid_index.coder import Coder
from semid_index.codes import format_id
from semid_index.errors import (
    DuplicateIdError,
    InvalidArgumentError,
    InvalidCodesError,
    NotTrainedError,
    SourceNotFoundError,
)
from semid_index.export import codebooks_digest
from semid_index.incoming import Incoming, check_incoming, refuse_known
from semid_index.metrics import comparable
from semid_index.quantizer import Codes, ProgressCallback, Quantizer
from semid_index.report.id_files import codes_of_array
from semid_index.store import Store
from semid_index.vectors import open_vectors, reading_file

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger("semid_index")

_VECTOR = "vector"
_LARGEST_RANK = 2**31 - 1
_PROBED_ROWS = 1_000
_MOST_ERROR = 1.5  # of IDs, of that of encoding anew; a collision policy that moves items makes it larger than 1
_ROUNDING = 1e-4  # of the squared lengths of vectors: what storing them as float16 or int8 may change
_HOW = "semid export INDEX -o FILE.parquet --vectors (index.export(path, vectors=True))"
_OTHER_CODEBOOKS = (
    "Import it into the index that it comes from, or into a copy of that without items: "
    "index.save_copy(path, items=False), semid copy --no-items."
)


@dataclass(frozen=True)
class ImportedItems:
    """What a file says of its items; the vectors are left where they are."""

    ids: pa.ChunkedArray
    codes: Codes
    """(n, levels)"""
    ranks: NDArray[np.int32]
    """(n,) ``dup_rank``"""
    metadata: pa.Table | None
    codebooks: str | None
    """A hash of those that the codes are numbers of; None if another program has written the file anew."""


def import_items(
    store: Store,
    coder: Coder,
    path: str | os.PathLike[str],
    *,
    batch_size: int,
    progress: ProgressCallback | None,
) -> int:
    """Add the items of a file, in one transaction, with the IDs that they have there; returns how many."""
    file = Path(path)
    _check_index(store)
    with store.unchanging():
        items = _read(file, store.layout.codebook_sizes)
        incoming = check_incoming(
            store,
            open_vectors(file, column=_VECTOR),
            items.ids,
            metadata=items.metadata,
            batch_size=batch_size,
            on_bad_vectors="error",
        )
        _check_codebooks(file, items, incoming, store, coder.quantizer)
        refuse_known(store, incoming)

        def write() -> None:
            done = 0
            with writing_items(store, coder, incoming) as writer:
                for some in incoming.batches(batch_size, progress):
                    part = slice(done, done + len(some.ids))
                    writer.take_up(items.codes[part])
                    writer.write(some, writer.comparable(some.vectors), items.codes[part], items.ranks[part])
                    done = part.stop
                if claimed := writer.appending.claim_ranks():
                    raise DuplicateIdError(
                        f"{file}: the semantic IDs of some items ({', '.join(map(repr, claimed))}) are, or were, those "
                        "of other items, with the same dup_rank. Leave these items out of the file, or import it into "
                        "an index without items.",
                        ids=claimed,
                    )

        store.retried(write)
    log.info("imported %d items", len(items.ids))
    return len(items.ids)


def _check_index(store: Store) -> None:
    """Refuse an index that cannot take items from a file."""
    if not store.is_trained:
        raise NotTrainedError(
            "The index is not trained, so IDs mean nothing in it. Call index.train(vectors) before adding items, or to "
            "import some, begin with a copy of their index: index.save_copy(path, items=False), semid copy --no-items."
        )
    store.check_writable()
    if store.config.vectors == "none":
        raise InvalidArgumentError(
            'This index has vectors="none", of which export writes none, and so no such file can be imported. '
            "To move the index, use index.save_copy (semid copy)."
        )


def _read(file: Path, codebook_sizes: tuple[int, ...]) -> ImportedItems:
    """The IDs and metadata in a file, checked."""
    import pyarrow as pa
    import pyarrow.parquet as pq  # heavy

    if not file.is_file():
        raise SourceNotFoundError(f"There is no file '{file}'. Give the path of a file that semid export wrote.")
    if file.suffix.lower() != ".parquet":
        raise InvalidArgumentError(f"'{file}' cannot be imported, only .parquet can. Write it with {_HOW}.")
    levels = [f"c{level}" for level in range(1, len(codebook_sizes) + 1)]
    needed = ["id", *levels, "dup_rank", _VECTOR]
    with reading_file(file, InvalidArgumentError), pq.ParquetFile(file) as parquet:
        names = parquet.schema_arrow.names
        if missing := [name for name in needed if names.count(name) != 1]:
            raise InvalidArgumentError(
                f"{file}: a column '{missing[0]}' is needed, once; there are {', '.join(names)}. Write it with {_HOW}."
            )
        told = _told(parquet.schema_arrow)
        table = parquet.read(columns=[name for name in names if name != _VECTOR])
        called = dict(json.loads(told.get("metadata", "{}")))
    ours = {*needed, "sid", "semantic_id", "version"}
    metadata = {called.get(name, name): table[name] for name in table.column_names if name not in ours}
    codes = codes_of_array(np.column_stack([_integers(table, name, file) for name in levels]), str(file))
    beyond = np.flatnonzero((codes >= np.array(codebook_sizes)).any(axis=1))
    if len(beyond):
        raise InvalidCodesError(
            f"{file}: row {beyond[0]} is {format_id(codes[beyond[0]].tolist())}, but the codebooks of this index have "
            f"{', '.join(map(str, codebook_sizes))} codewords. {_OTHER_CODEBOOKS}"
        )
    ranks = _integers(table, "dup_rank", file)
    if ((ranks < 0) | (ranks > _LARGEST_RANK)).any():
        raise InvalidArgumentError(f"{file}: a dup_rank is below 0 or above {_LARGEST_RANK:,}. Write it with {_HOW}.")
    return ImportedItems(
        table["id"], codes, ranks.astype(np.int32), pa.table(metadata) if metadata else None, told.get("codebooks")
    )


def _told(schema: pa.Schema) -> dict[str, str]:
    """What an export tells of its index, by names without what they all begin with."""
    pairs = {
        key.decode(): value.decode() for key, value in (schema.metadata or {}).items() if key.startswith(b"semid_")
    }
    return {key.removeprefix("semid_"): value for key, value in pairs.items()}


def _integers(table: pa.Table, name: str, file: Path) -> NDArray[np.int64]:
    """A column of whole numbers, none of which is missing."""
    import pyarrow as pa

    column = table[name]
    if not pa.types.is_integer(column.type) or column.null_count:
        raise InvalidArgumentError(
            f"{file}: column '{name}' has to hold a whole number in every row; it is of type {column.type} and "
            f"{column.null_count} are missing. Write the file with {_HOW}."
        )
    values: NDArray[np.int64] = column.cast(pa.int64(), safe=False).to_numpy()
    return values


def _check_codebooks(file: Path, items: ImportedItems, incoming: Incoming, store: Store, quantizer: Quantizer) -> None:
    """Refuse IDs that mean something else in this index.

    A file that another program has written anew does not tell. Then IDs have to fit the vectors about as well as those
    that encoding would give.
    """
    if items.codebooks is not None and items.codebooks != codebooks_digest(store):
        raise InvalidCodesError(
            f"{file} has IDs of other codebooks, which mean something else here. {_OTHER_CODEBOOKS}"
        )
    vectors = next(incoming.source.batches(_PROBED_ROWS))
    encoded = comparable(vectors, store.config.metric)
    codes = items.codes[: len(vectors)]
    error, least = (
        float(np.square(encoded - quantizer.decode(some), dtype=np.float64).sum())
        for some in (codes, quantizer.encode(encoded))
    )
    if error > _MOST_ERROR * least + _ROUNDING * float(np.square(encoded, dtype=np.float64).sum()):
        raise InvalidCodesError(
            f"{file}: the IDs do not fit the vectors: what they decode to is {error / max(least, 1e-30):.1f} times as "
            f"far from them as with IDs of this index. {_OTHER_CODEBOOKS}"
        )
