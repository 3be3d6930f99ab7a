"""What ``semid report`` does: read what is to be measured, measure it, write the page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import typer

import semid_index as semid
from semid_index.arguments import read_table
from semid_index.errors import InvalidArgumentError, InvalidIdsError
from semid_index.items import check_count
from semid_index.metrics import check_metric
from semid_index.progress import progress_callback
from semid_index.quantizer import Codes
from semid_index.report.id_files import IdTable, codes_of_array, find_codes, read_npy_codes
from semid_index.report.inputs import (
    choose_labels,
    earlier_codes,
    joined,
    label_columns,
    one_column,
    value_counts,
)
from semid_index.report.page import page
from semid_index.report.plots import plots, require_matplotlib, save_plots
from semid_index.report.quality import quality
from semid_index.report.records import QualityReport, parse_requirement
from semid_index.vectors import open_vectors

if TYPE_CHECKING:
    import pyarrow as pa

    from semid_index.index import SemanticIndex

_TABLES = (".parquet", ".csv", ".jsonl", ".arrow", ".feather", ".npy")


@dataclass(frozen=True)
class Measured:
    """A report, with what its page needs beside it."""

    report: QualityReport
    codes: Codes
    title: str

    def write(self, output: Path | None, folder: Path | None) -> None:
        """Write the page to a file, and the plots as PNG files into a folder, as far as they are wanted."""
        try:
            if output is not None:
                output.write_text(page(self.report, self.codes, title=self.title), encoding="utf-8")
            if folder is not None:
                save_plots(plots(self.report, self.codes), folder)
        except OSError as error:
            raise InvalidArgumentError(f"{error.filename} cannot be written: {error.strerror}.") from error


@dataclass(frozen=True)
class Source:
    """Files with IDs that others made, and how to read them."""

    ids: Path
    ids_column: str | None = None
    id_column: str | None = None
    """The column that names the items, in every table: by it, labels and versions are joined."""
    codes_used: int | None = None
    """Only the first codes of each ID are measured."""


# -- what is asked for ------------------------------------------------------------------------------------------------


def check_requests(
    index: Path | None, ids: Path | None, only_ids: Mapping[str, Any], requirements: list[str] | None, *, draws: bool
) -> None:
    """Find what is wrong with the arguments before anything is measured."""
    if (index is None) == (ids is None):
        raise typer.BadParameter("Give the file of an index, or --ids with a file of IDs; one of the two.")
    if ids is None and (wrong := [name for name, value in only_ids.items() if value is not None]):
        raise typer.BadParameter(f"{wrong[0]} is for --ids: an index knows that of itself.")
    try:
        for requirement in requirements or ():
            parse_requirement(requirement)
    except InvalidArgumentError as error:
        raise typer.BadParameter(str(error)) from error
    if draws:
        require_matplotlib()


def unmet(report: QualityReport, requirements: list[str] | None) -> tuple[str, ...]:
    """A sentence for each requirement that does not hold. A figure that the report lacks is wrong usage."""
    try:
        return report.unmet(requirements or ())
    except InvalidArgumentError as error:
        raise typer.BadParameter(str(error)) from error


# -- an index ---------------------------------------------------------------------------------------------------------


def measure_index(
    path: Path,
    *,
    vectors: Path | None,
    column: str | None,
    labels: list[str] | None,
    against: Source | None,
    k: int,
    queries: int,
    progress: bool,
) -> Measured:
    """The report of an index; ``vectors`` are held out."""
    held_out = None if vectors is None else open_vectors(vectors, column=column)
    with semid.open(path, read_only=True) as index:
        report = index.report(
            held_out,
            labels=labels,
            against=None if against is None else _earlier_version(against),
            k=k,
            queries=queries,
            progress=progress,
        )
        codes, _ = _codes_and_ids(index)
    return Measured(report, codes, f"Semantic IDs in {path.name}")


def _codes_and_ids(index: SemanticIndex) -> tuple[Codes, pa.Array]:
    """The codes and ids of all items, in one order."""
    levels = index.stats()["levels"]
    names = ", ".join(f"c{level}" for level in range(1, levels + 1))
    table = index.sql(f"SELECT id, {names} FROM semantic_ids").to_arrow_table()
    codes = np.column_stack([table[f"c{level}"].to_numpy() for level in range(1, levels + 1)])
    return codes.astype(np.int32), table["id"].combine_chunks()


# -- IDs that others made ---------------------------------------------------------------------------------------------


def measure_ids(
    source: Source,
    *,
    vectors: Path | None,
    column: str | None,
    metric: str,
    codebook_sizes: int | list[int] | None,
    hierarchical: bool,
    labels: list[str] | None,
    labels_from: Path | None,
    against: Source | None,
    k: int,
    queries: int,
    progress: bool,
) -> Measured:
    """The report of IDs in a file; row i of ``vectors`` belongs to row i of the IDs."""
    check_count("k", k)
    check_count("queries", queries)
    found = read_codes(source)
    if not len(found.codes):
        raise InvalidArgumentError(f"There are no IDs in {source.ids}: it has 0 rows.")
    with progress_callback(progress) as callback:
        report = quality(
            found.codes,
            sizes_of(found.codes, codebook_sizes),
            vectors=None if vectors is None else open_vectors(vectors, column=column),
            labels=_labels(source, found, labels, labels_from),
            previous=None if against is None else _previous(source, found, against),
            k=k,
            queries=queries,
            metric=check_metric(metric),
            hierarchical=hierarchical,
            progress=callback,
        )
    where = f"{source.ids.name}, {found.name}" if found.name else source.ids.name
    return Measured(report, found.codes, f"Semantic IDs in {where}")


def read_codes(source: Source) -> IdTable:
    """The IDs in a file, as many codes of them as are wanted."""
    import pyarrow as pa

    if source.ids.suffix.lower() == ".npy":
        if source.ids_column is not None:
            raise InvalidArgumentError(f"{source.ids} is one array: there is no column '{source.ids_column}'.")
        found = IdTable(read_npy_codes(source.ids), pa.table({}), "")
    else:
        table = read_table(source.ids)
        found = find_codes(table, str(source.ids), column=source.ids_column)
    if source.codes_used is None:
        return found
    check_count("levels", source.codes_used)
    if source.codes_used > found.codes.shape[1]:
        raise InvalidArgumentError(
            f"levels={source.codes_used} is more than the IDs in {source.ids} have: {found.codes.shape[1]}."
        )
    return replace(found, codes=np.ascontiguousarray(found.codes[:, : source.codes_used]))


def sizes_of(codes: Codes, given: int | list[int] | None) -> list[int]:
    """How many codewords each level has: as said, or as many as the largest code needs."""
    levels = codes.shape[1]
    if given is None:
        return [max(2, int(largest) + 1) for largest in codes.max(axis=0)]
    sizes = [given] * levels if isinstance(given, int) else given
    if len(sizes) != levels:
        raise InvalidArgumentError(f"There are {len(sizes)} codebook sizes for IDs of {levels} levels. Give one each.")
    return sizes


def _labels(
    source: Source, found: IdTable, names: list[str] | None, labels_from: Path | None
) -> Mapping[str, pa.ChunkedArray]:
    """Labels by name, a value for each ID."""
    given = read_table(labels_from)
    if given is None:
        table, where = found.table, str(source.ids)
    else:
        table, where = _beside(found, given, source, str(labels_from)), str(labels_from)
    if names is None:
        own = {found.name, source.id_column, *(f"c{level}" for level in range(1, found.codes.shape[1] + 1))}
        others = table.select([name for name in table.column_names if name not in own])
        names = choose_labels(others.schema, lambda name: value_counts(others[name]))
    for name in names:
        one_column(table, name, where)
    return label_columns(table.select(names))


def _beside(found: IdTable, table: pa.Table, source: Source, where: str) -> pa.Table:
    """The rows of another table that belong to the IDs: by id if a column names the items, else row by row."""
    if source.id_column is not None:
        ids = one_column(found.table, source.id_column, str(source.ids))
        return joined(table, ids, source.id_column, where)
    if table.num_rows != len(found.codes):
        raise InvalidArgumentError(
            f"{where} has {table.num_rows:,} rows for {len(found.codes):,} IDs. Give a row for each, in order; or say "
            "with --id-column which column names the items in both files."
        )
    return table


# -- two versions -----------------------------------------------------------------------------------------------------


def _previous(source: Source, found: IdTable, against: Source) -> Codes:
    """The earlier codes of the same items: joined by id, or row by row."""
    where = str(against.ids)
    if source.id_column is not None:
        ids = one_column(found.table, source.id_column, str(source.ids)).combine_chunks()
        return earlier_codes(ids, *_earlier_version(against), where)
    if _is_index(against.ids):
        raise InvalidArgumentError(
            f"To compare with {where}, say with --id-column which column of {source.ids} has the ids."
        )
    old = read_codes(against).codes
    if len(old) != len(found.codes):
        raise InvalidArgumentError(
            f"{where} has {len(old):,} IDs, {source.ids} has {len(found.codes):,}. Give the same items in the same "
            "order; or say with --id-column which column names the items in both files."
        )
    return old


def _earlier_version(against: Source) -> tuple[Any, Codes]:
    """The ids and codes of an earlier version: an index, or a file with IDs."""
    if _is_index(against.ids):
        with semid.open(against.ids, read_only=True) as index:
            codes, ids = _codes_and_ids(index)
            return ids, codes
    found = read_codes(against)
    if against.id_column is None:
        raise InvalidIdsError(f"Say with --id-column which column of {against.ids} has the ids of the items.")
    ids = one_column(found.table, against.id_column, str(against.ids))
    return ids.combine_chunks(), codes_of_array(found.codes, str(against.ids))


def _is_index(path: Path) -> bool:
    return path.suffix.lower() not in _TABLES
