"""The IDs of an index as one plain file, sorted by sid: Parquet, CSV or JSON.

Any program reads it, without this library and without the index. In Parquet, rows lie in groups whose smallest and
largest values are known; since IDs with a common prefix lie side by side, whoever asks for a prefix reads a few groups.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from semid_index.arrow import fixed_size_list, fixed_size_matrix
from semid_index.errors import IndexExistsError, IndexFileError, InvalidArgumentError, StorageError
from semid_index.records import Tier
from semid_index.rerank import from_stored
from semid_index.store import Store, VectorColumn

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
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    options = _options(target, store)
    if vectors and store.config.vectors == "none":
        raise InvalidArgumentError('This index has vectors="none", so there are none to write. Leave out vectors=True.')
    vector = _TO_FLOAT32[store.config.vectors] if vectors else None
    columns = _metadata_columns(store, metadata, taken=[*store.id_file_columns(), *(["vector"] if vectors else [])])
    try:
        check_place(target, store.path, overwrite=overwrite)
        rows = store.write_ids(part, target, options, metadata=columns, vector=vector)
        part.replace(target)
    except IndexFileError:
        raise
    except OSError as error:
        raise StorageError(f"{target} cannot be written: {error.strerror}. Use another path.") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
    return rows


def rows_per_group(rows: int) -> int:
    """How many rows of a Parquet file lie in a group: few, so that a prefix is found in little; but no endless list."""
    share = -(-rows // _MOST_GROUPS)
    return max(_LEAST_GROUP, -(-share // _GROUP_STEP) * _GROUP_STEP)


def _options(target: Path, store: Store) -> str:
    """How DuckDB is to write, by the end of the file's name."""
    ending = target.suffix.lower()
    if ending == ".parquet":
        said = {f"semid_{name}": value for name, value in _shape(store).items()}
        pairs = ", ".join(f"{name}: {_literal(value)}" for name, value in said.items())
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
    }


def check_place(target: Path, index: Path | None, *, overwrite: bool) -> None:
    """Refuse to write a file where it cannot be, or must not."""
    if not target.parent.is_dir():
        raise IndexFileError(f"There is no folder {target.parent}. Create it first.")
    if target.is_dir():
        raise IndexExistsError(f"{target} is a folder. Give the path of a file.")
    if target.exists() and index is not None and target.samefile(index):
        raise IndexExistsError(f"{target} is the index itself. Give the path of another file.")
    if target.exists() and not overwrite:
        raise IndexExistsError(f"{target} exists. Replace it with overwrite=True (--overwrite), or use another path.")


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
    used = {name.lower() for name in taken}
    for name in dict.fromkeys(wanted):
        given = name
        while given.lower() in used:
            given = f"item_{given}"
        used.add(given.lower())
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


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
