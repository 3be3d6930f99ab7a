"""Results -> text, JSON, CSV, Arrow or Parquet on standard output, for the command line.

What a program reads is complete and exact. What a person reads is a table that fits the screen.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from datetime import date, datetime, time
from enum import StrEnum
from itertools import accumulate
from typing import TYPE_CHECKING, Any, BinaryIO

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_SHOWN = 100  # in a table for people; the other formats give every row
_SHORT_TEXT = 20  # columns of texts no longer than this keep their width
_CUT_TEXT = 12  # longer ones give way, down to this width
_GAP = 2  # between columns


class Format(StrEnum):
    """How results are written."""

    table = "table"
    json = "json"
    jsonl = "jsonl"
    csv = "csv"
    arrow = "arrow"
    parquet = "parquet"


BINARY = (Format.arrow, Format.parquet)


def chosen(format: Format | None) -> Format:
    """The format asked for; if none was, a table for a terminal and JSON lines for a pipe or a file."""
    return format or (Format.table if sys.stdout.isatty() else Format.jsonl)


def screen(*, stderr: bool = False) -> Console:
    """Where text for people goes. Follows NO_COLOR and the width of the terminal."""
    return Console(stderr=stderr, highlight=False)


def write(table: pa.Table, format: Format | None = None, *, title: str | None = None) -> None:
    """Write the rows of a table."""
    if chosen(format) is not Format.table:
        _WRITERS[chosen(format)](table, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return
    out, console = grid(table.slice(0, ROWS_SHOWN), title=title), screen()
    left_out = leave_out(out, console.width)
    console.print(out)
    if left_out:
        names = ", ".join(left_out)
        screen(stderr=True).print(Text(f"No room for {names}. --format jsonl gives all.", style="dim"), soft_wrap=True)
    if table.num_rows > ROWS_SHOWN:
        screen(stderr=True).print(f"{ROWS_SHOWN} of {table.num_rows:,} rows. --format jsonl gives all.", style="dim")


def write_record(record: Mapping[str, Any], format: Format | None, show: Callable[[], RenderableType]) -> None:
    """Write one nested record: as one JSON object, as one row, or for people as whatever ``show`` makes of it."""
    import pyarrow as pa

    if chosen(format) is Format.table:
        screen().print(show())
    elif chosen(format) in (Format.json, Format.jsonl):
        text = json.dumps(_plain(record), indent=2 if format is Format.json else None, ensure_ascii=False)
        sys.stdout.write(text + "\n")
    else:
        write(pa.Table.from_pylist([flat(record)]), format)


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested records as one level of columns.

    >>> flat({"items": 3, "bytes": {"codes": 4, "ids": 8}})
    {'items': 3, 'bytes_codes': 4, 'bytes_ids': 8}
    """
    columns: dict[str, Any] = {}
    for name, value in record.items():
        columns |= flat(value, f"{prefix}{name}_") if isinstance(value, Mapping) else {prefix + name: value}
    return columns


# -- for people -------------------------------------------------------------------------------------------------------


def grid(table: pa.Table, *, title: str | None = None) -> Table:
    """The rows as a table that fits the width of the screen; numbers to the right, long texts cut."""
    import pyarrow.types as types

    out = new_grid(title)
    columns = [[shown(value) for value in column.to_pylist()] for column in table.columns]
    for field, texts in zip(table.schema, columns, strict=True):
        number = types.is_integer(field.type) or types.is_floating(field.type) or types.is_decimal(field.type)
        # Only columns that may wrap give way where the screen is narrow; their texts are cut instead.
        short = max(map(len, [field.name, *texts])) <= _SHORT_TEXT
        out.add_column(Text(field.name), justify="right" if number else "left", no_wrap=short, overflow="ellipsis")
    for row in zip(*columns, strict=True):
        out.add_row(*(Text(text, no_wrap=True, overflow="ellipsis") for text in row))
    return out


def leave_out(out: Table, width: int) -> list[str]:
    """Take the columns away, from the right, that have no room in this width; gives their names."""
    needs = accumulate(_least_width(column) + _GAP for column in out.columns)
    fitting = max(1, sum(need <= width + _GAP for need in needs))
    names = [str(column.header) for column in out.columns[fitting:]]
    del out.columns[fitting:]
    return names


def _least_width(column: Column) -> int:
    cells, name = max((cell_len(str(cell)) for cell in column.cells), default=0), cell_len(str(column.header))
    if column.no_wrap:
        return max(cells, name)
    return max(cells if cells <= _SHORT_TEXT else _CUT_TEXT, min(name, _CUT_TEXT))


def new_grid(title: str | None = None) -> Table:
    """An empty table in the style of every table we print."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        header_style="bold cyan",
        box=None,
        pad_edge=False,
        padding=(0, _GAP, 0, 0),
    )


def shown(value: Any) -> str:
    """A value as a person wants to read it.

    >>> shown(0.123456), shown(None), shown(["a", "b"])
    ('0.1235', '', 'a, b')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    if isinstance(value, list | tuple):
        return ", ".join(shown(part) for part in value)
    if isinstance(value, bytes):
        return value.hex()
    return " ".join(str(value).split())


# -- for programs -----------------------------------------------------------------------------------------------------


def _write_json(table: pa.Table, out: BinaryIO) -> None:
    rows = (_json(row) for row in table.to_pylist())
    out.write(b"[" + b",\n ".join(rows) + b"]\n")


def _write_jsonl(table: pa.Table, out: BinaryIO) -> None:
    for batch in table.to_batches():
        for row in batch.to_pylist():
            out.write(_json(row) + b"\n")


def _write_csv(table: pa.Table, out: BinaryIO) -> None:
    import pyarrow.csv as csv

    csv.write_csv(_plain_columns(table), out)


def _write_arrow(table: pa.Table, out: BinaryIO) -> None:
    import pyarrow as pa

    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)


def _write_parquet(table: pa.Table, out: BinaryIO) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()  # a pipe has no position, which Parquet needs
    pq.write_table(table, sink)
    out.write(sink.getvalue())


_WRITERS: dict[Format, Callable[[pa.Table, BinaryIO], None]] = {
    Format.json: _write_json,
    Format.jsonl: _write_jsonl,
    Format.csv: _write_csv,
    Format.arrow: _write_arrow,
    Format.parquet: _write_parquet,
}


def _plain_columns(table: pa.Table) -> pa.Table:
    """Lists and structs as JSON text and bytes as hexadecimal digits, since CSV has neither."""
    import pyarrow as pa
    import pyarrow.types as types

    for position, field in enumerate(table.schema):
        values = table.column(position)
        if types.is_nested(field.type):
            texts = [None if value is None else _json(value).decode() for value in values.to_pylist()]
        elif types.is_binary(field.type) or types.is_large_binary(field.type):
            texts = [None if value is None else value.hex() for value in values.to_pylist()]
        else:
            continue
        table = table.set_column(position, field.name, pa.array(texts, pa.string()))
    return table


def _json(value: Any) -> bytes:
    return json.dumps(_plain(value), ensure_ascii=False).encode("utf-8", "surrogatepass")


def _plain(value: Any) -> Any:
    """The value in JSON's own types. JSON has no NaN or infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.hex()
    return value if isinstance(value, str | int | bool | None) else str(value)
