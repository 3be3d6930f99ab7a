"""The IDs of an index as one plain file, sorted by sid: Parquet, CSV or JSON.

Any program reads it, without this library and without the index. In Parquet, rows lie in groups whose smallest and
largest values are known; since IDs with a common prefix lie side by side, whoever asks for a prefix reads a few groups.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from semid_index.arrow import fixed_size_list, fixed_size_matrix
from semid_index.contents import VectorColumn
from semid_index.errors import InvalidArgumentError
from semid_index.quantizers.tail import TAIL_ARRAY
from semid_index.records import Tier
from semid_index.rerank import from_stored
from semid_index.store import Store, fingerprints
from semid_index.tables import literal, name_key
from semid_index.whole_files import new_file

_LEAST_GROUP = 16_384  # rows: half a megabyte of IDs, which is read at once
_MOST_GROUPS = 1_000  # what a file says of its groups has to be read first
_GROUP_STEP = 2_048  # DuckDB rounds up to whole vectors of its own


def export(
    store: Store,
    path: str | os.PathLike[str],
    *,
    metadata: bool | Sequence[str] = False,
    vectors: bool = False,
    overwrite: bool = False,
) -> int:
    """Write the IDs of all items to a file that is there as a whole or not at all; returns how many.

    ``metadata``: whether to add the columns of ``items``, or which. One that is named like a column of ours gets
    "item_" before its name. ``vectors``: whether to add the stored vectors, as float32.
    """
    target = Path(path)
    if vectors and store.config.vectors == "none":
        raise InvalidArgumentError('This index has vectors="none", so there are none to write. Leave out vectors=True.')
    vector = _TO_FLOAT32[store.config.vectors] if vectors else None
    columns = _metadata_columns(store, metadata, taken=[*store.id_file_columns(), *(["vector"] if vectors else [])])
    options = _options(target, store, columns)
    with new_file(target, store.path, overwrite=overwrite) as part:
        rows = store.write_ids(part, target, options, metadata=columns, vector=vector)
        part.replace(target)
    return rows


def rows_per_group(rows: int) -> int:
    """How many rows of a Parquet file lie in a group: few, so that a prefix is found in little; but no endless list."""
    share = -(-rows // _MOST_GROUPS)
    return max(_LEAST_GROUP, -(-share // _GROUP_STEP) * _GROUP_STEP)


def _options(target: Path, store: Store, metadata: Mapping[str, str]) -> str:
    """How DuckDB is to write, by the end of the file's name."""
    ending = target.suffix.lower()
    if ending == ".parquet":
        said = {**_shape(store), "metadata": json.dumps(metadata)}
        pairs = ", ".join(f"semid_{name}: {literal(value)}" for name, value in said.items())
        group = rows_per_group(len(store))
        return f"FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {group}, KV_METADATA {{{pairs}}}"
    plain = {".csv": "FORMAT csv, HEADER", ".json": "FORMAT json, ARRAY true", ".jsonl": "FORMAT json"}
    if ending not in plain:
        known = ", ".join((".parquet", *plain))
        raise InvalidArgumentError(f"IDs cannot be written to '{target}'. The name has to end with one of {known}.")
    return plain[ending]


def _shape(store: Store) -> Mapping[str, str]:
    """What a reader of the IDs may want to know of the index."""
    config = store.config
    return {
        "codebook_sizes": json.dumps(store.layout.codebook_sizes),
        "hierarchical": json.dumps(store.hierarchical),
        "quantizer": config.quantizer,
        "metric": config.metric,
        "dim": str(config.dim),
        "codebooks": codebooks_digest(store),
    }


def codebooks_digest(store: Store) -> str:
    """What two indexes have in common whose codes mean the same: a hash of all that training learned of codes."""
    known = store.meta("fingerprints") or fingerprints(store.learned_arrays())  # files of format 1 have none
    of_codes = {name: digest for name, digest in known.items() if name != TAIL_ARRAY}
    return hashlib.sha256(json.dumps(of_codes, sort_keys=True).encode()).hexdigest()


def _metadata_columns(store: Store, metadata: bool | Sequence[str], *, taken: Sequence[str]) -> dict[str, str]:
    """The columns of ``items`` to write, by the name each gets."""
    if isinstance(metadata, str):
        raise InvalidArgumentError(f"metadata is True, False or a list of columns. Write metadata=['{metadata}'].")
    known = [name for name in store.item_columns() if name != "id"]
    wanted = known if metadata is True else list(metadata or ())
    if unknown := [name for name in wanted if name not in known]:
        listed = ", ".join(f"'{name}'" for name in known) or "none"
        raise InvalidArgumentError(f"The items have no column '{unknown[0]}'. They have {listed}.")
    columns: dict[str, str] = {}
    used = {name_key(name) for name in taken}
    for name in dict.fromkeys(wanted):
        given = name
        while name_key(given) in used:
            given = f"item_{given}"
        used.add(name_key(given))
        columns[given] = name
    return columns


# -- stored vectors as float32. DuckDB 1.5 keeps bare pointers to functions, so these are functions of the module. -----


def _halves(v: Any) -> Any:
    return fixed_size_list(from_stored(fixed_size_matrix(v).view(np.float16), None))


def _scaled(v: Any, scale: Any) -> Any:
    return fixed_size_list(from_stored(fixed_size_matrix(v), scale.to_numpy()))


_TO_FLOAT32: dict[Tier, VectorColumn] = {
    "float32": VectorColumn(("v",), None),
    "float16": VectorColumn(("v",), _halves),
    "int8": VectorColumn(("v", "scale"), _scaled),
}
