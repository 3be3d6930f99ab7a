"""What the arguments of the command line mean: values, sizes, ids, tables, queries, and where to write."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from semid_index.errors import IndexExistsError, InvalidArgumentError, MissingDependencyError

if TYPE_CHECKING:
    import pyarrow as pa

    from semid_index.index import SemanticIndex
    from semid_index.quantizer import Vectors
    from semid_index.vectors import VectorSource

_ROWS_AT_ONCE = 4_096  # when a file is read for one of its rows


def bars(quiet: bool) -> bool:
    """Whether progress bars are wanted, and there is a screen for them."""
    return not quiet and sys.stderr.isatty()


def parse_value(text: str) -> Any:
    """A value from the command line: JSON if it is, else text.

    >>> parse_value("7"), parse_value("true"), parse_value("games"), parse_value('"7"')
    (7, True, 'games', '7')
    """
    try:
        return json.loads(text, parse_constant=str)  # NaN and Infinity are words, too
    except ValueError:
        return text


def parse_params(values: list[str] | None) -> list[Any] | None:
    """Values for the ``?`` of an SQL text; None for none."""
    return [parse_value(value) for value in values] if values else None


def parse_sizes(text: str) -> int | list[int]:
    """One codebook size for all levels, or one for each.

    >>> parse_sizes("256"), parse_sizes("1024,256,256")
    (256, [1024, 256, 256])
    """
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(
            f"--codebook-size is a number or numbers with commas, such as 1024,256,256, not '{text}'."
        ) from error
    return sizes[0] if len(sizes) == 1 else sizes


def parse_options(
    options: list[str] | None, *, flag: str = "--option", example: str = "iterations=30"
) -> dict[str, Any]:
    """Further options, ``NAME=VALUE`` each."""
    pairs = [option.partition("=") for option in options or ()]
    for name, equals, _ in pairs:
        if not equals:
            raise typer.BadParameter(f"{flag} is NAME=VALUE, such as {example}, not '{name}'.")
    return {name.replace("-", "_"): parse_value(value) for name, _, value in pairs}


def as_id(index: SemanticIndex, text: str) -> Any:
    """The id that a person means: the text, or the number it spells where ids are numbers."""
    is_number = text.removeprefix("-").isdecimal()
    return int(text) if is_number and text not in index else text


def as_numbers(ids: Any) -> list[int] | None:
    """The numbers that texts spell; None unless all of them do.

    >>> as_numbers(["7", "-8"]), as_numbers(["7", "sku-8"])
    ([7, -8], None)
    """
    texts = isinstance(ids, list) and all(text.removeprefix("-").isdecimal() for text in ids)
    return [int(text) for text in ids] if texts else None


@contextmanager
def complete_or_nothing(output: Path, *, overwrite: bool) -> Iterator[Path]:
    """Where to write a new index: a file beside ``output`` that takes its place if all goes well, else goes away."""
    from semid_index.database import check_not_in_use
    from semid_index.whole_files import check_place, part_of, put_in_place, storage_errors

    with storage_errors(output):  # not of what follows: that writes to other places, too
        if output.is_file() and not overwrite:
            raise IndexExistsError(f"{output} exists. Add to it with semid add, or replace it with --overwrite.")
        check_place(output, None, overwrite=overwrite)
        if output.exists():
            check_not_in_use(output)
    with part_of(output) as part:
        yield part
        put_in_place(part, output)


# -- files ------------------------------------------------------------------------------------------------------------


def read_table(path: Path | None) -> pa.Table | None:
    """A table from a .parquet, .csv, .jsonl or .arrow file; None for none."""
    if path is None:
        return None
    import pyarrow as pa
    import pyarrow.feather
    import pyarrow.json
    import pyarrow.parquet

    readers = {
        ".parquet": pyarrow.parquet.read_table,
        ".csv": _read_csv,
        ".jsonl": pyarrow.json.read_json,
        ".arrow": pyarrow.feather.read_table,
        ".feather": pyarrow.feather.read_table,
    }
    if path.suffix.lower() not in readers:
        raise InvalidArgumentError(f"A table cannot be read from '{path}'. Known are {', '.join(readers)}.")
    try:
        return readers[path.suffix.lower()](path)
    except (pa.ArrowException, OSError) as error:
        raise InvalidArgumentError(f"'{path}' cannot be read: {error}") from error


def _read_csv(path: Path) -> pa.Table:
    """A table from a .csv file. Whole numbers stay text where a number would be written otherwise: 00123, +49."""
    import pyarrow.csv

    table = pyarrow.csv.read_csv(path)
    names = [field.name for field in table.schema if _may_be_text(table, field)]
    if not names:
        return table
    as_text = pyarrow.csv.ConvertOptions(
        include_columns=names, column_types=dict.fromkeys(names, "string"), strings_can_be_null=True
    )
    texts = pyarrow.csv.read_csv(path, convert_options=as_text)
    for name in filter(lambda name: _is_text(texts[name], table.field(name)), names):
        table = table.set_column(table.column_names.index(name), name, texts[name])
    return table


def _may_be_text(table: pa.Table, field: pa.Field) -> bool:
    """Whether all of a column are whole numbers. Those with a plus, or beyond 64 bits, Arrow takes for floats."""
    import pyarrow.compute as pc
    import pyarrow.types as types

    if table.column_names.count(field.name) > 1:  # which the index refuses
        return False
    if not types.is_floating(field.type):
        return bool(types.is_integer(field.type))
    return bool(pc.all(pc.equal(pc.floor(table[field.name]), table[field.name])).as_py())


def _is_text(texts: pa.ChunkedArray, field: pa.Field) -> bool:
    """Whether whole numbers, as they stand in the file, would not be the same once they are numbers."""
    import pyarrow.compute as pc
    import pyarrow.types as types

    if types.is_floating(field.type):  # 1.0 and 1e3 are floats indeed
        return bool(pc.all(pc.match_substring_regex(texts, r"^\s*[+-]?[0-9]+\s*$")).as_py())
    return bool(pc.any(pc.match_substring_regex(texts, r"^\s*-?0[0-9]")).as_py())


def read_item_ids(ids: Path | None, column: str | None, metadata: pa.Table | None, vectors: Path) -> Any:
    """The ids of the items, from the first of these that can have them; None to number the items."""
    from semid_index.vectors import read_ids

    if ids is not None:
        return read_ids(ids, column=column)
    names = [] if metadata is None else metadata.column_names
    if metadata is not None and (column in names or (column is None and "id" in names)):
        return metadata[column or "id"]
    if column is None:
        return None
    if metadata is not None:
        raise InvalidArgumentError(f"The metadata has no column '{column}'. It has {', '.join(names)}.")
    return read_ids(vectors, column=column)


def read_query_vectors(spec: str) -> Any:
    """``FILE`` for all its rows, ``FILE:ROW`` for one. A .npy file may hold a single vector, too."""
    import numpy as np

    from semid_index.vectors import open_vectors

    name, _, row = spec.rpartition(":")
    if Path(spec).exists() or not row.isdecimal():
        name, row = spec, ""
    if not row and (vector := _single_vector(name)) is not None:
        return vector
    source = open_vectors(name)
    if row and int(row) >= source.rows:
        raise InvalidArgumentError(f"'{name}' has no row {row}: it has rows 0 to {source.rows - 1}.")
    return _row_of(source, int(row)) if row else np.concatenate(list(source.batches(65_536)))


def _row_of(source: VectorSource, row: int) -> Vectors:
    """One row, (dim,); what comes after it is not read, and what comes before it not kept."""
    before, position = divmod(row, _ROWS_AT_ONCE)
    batch = next(islice(source.batches(_ROWS_AT_ONCE), before, None))
    vector: Vectors = batch[position].copy()
    return vector


def _single_vector(name: str) -> Any:
    """The vector in a .npy file that holds a single one, (dim,); None for all other files."""
    import numpy as np

    try:
        array = np.load(name, allow_pickle=False, mmap_mode="r") if name.endswith(".npy") else None
    except (OSError, ValueError):
        return None  # whoever reads the file next says what is wrong with it
    return array if array is not None and array.ndim == 1 else None


def embed(text: str) -> Any:
    """The vector of a text, by the embedder that is installed."""
    from semid_index.plugins import installed

    embedders = installed().named("embedder")
    if not embedders:
        raise MissingDependencyError(
            "No plugin that embeds texts is installed, so a text cannot be searched for. Give --query-vector or --like "
            "(or --demo-query, for the index of semid demo)."
        )
    if len(embedders) > 1:
        raise InvalidArgumentError(f"Several plugins embed texts: {', '.join(embedders)}. Uninstall all but one.")
    return next(iter(embedders.values()))().embed([text])[0]
