"""The ``semid`` program: options in, one call, text or data out.

What a library function does is imported inside the command that needs it, so that ``semid --help`` comes at once.
"""

from __future__ import annotations

import logging
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from semid_index import __version__
from semid_index.arguments import (
    as_id,
    as_numbers,
    bars,
    complete_or_nothing,
    embed,
    parse_options,
    parse_params,
    parse_sizes,
    read_item_ids,
    read_query_vectors,
    read_table,
)
from semid_index.errors import SemidError, is_interrupt
from semid_index.output import BINARY, Format, write, write_record
from semid_index.views import report_view, retrain_view, stats_view, trace_view, verify_view

if TYPE_CHECKING:
    import pyarrow as pa

    from semid_index.index import SemanticIndex


class SemidGroup(TyperGroup):
    """All commands: ours and those of plugins. An error of the library becomes one line and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except SemidError as error:
            fail(str(error))
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")  # which Typer's own check puts before it
            raise
        except RuntimeError as error:
            if is_interrupt(error):  # in the result of a query, which DuckDB gives to the caller
                raise KeyboardInterrupt from error
            raise

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all commands."""
        return [*super().list_commands(ctx), *plugin_commands()]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of this name; None if there is none."""
        return super().get_command(ctx, cmd_name) or plugin_commands().get(cmd_name)


app = typer.Typer(cls=SemidGroup, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)


def main() -> None:
    """Run the program."""
    app(prog_name="semid")


@cache
def plugin_commands() -> dict[str, Any]:
    """Commands that plugins add. Without plugins nothing is imported."""
    from importlib.metadata import entry_points

    if not entry_points(group="semid_index"):
        return {}
    from semid_index.plugins import installed

    taken = {command.name for command in app.registered_commands}
    return {
        name: _as_command(name, target) for name, target in installed().named("command").items() if name not in taken
    }


def _as_command(name: str, target: Any) -> Any:
    if not isinstance(target, typer.Typer):
        function, target = target, typer.Typer()
        target.command(name)(function)
    command = typer.main.get_command(target)
    command.name = name
    return command


def fail(message: str) -> NoReturn:
    """End the program: something was asked for that cannot be done."""
    sys.stderr.write(f"error: {message}\n")
    raise typer.Exit(1)


# -- options that several commands have -------------------------------------------------------------------------------


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"semid-index {__version__}\n")
        raise typer.Exit


def _format(format: Format | None) -> Format | None:
    if format in BINARY and sys.stdout.isatty():
        raise typer.BadParameter(
            f"{format} is not for the screen. Send it to a file: ... --format {format} > out.{format}"
        )
    return format


def _quiet(quiet: bool) -> bool:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    log = logging.getLogger("semid_index")
    log.handlers[:] = [handler]
    log.setLevel(logging.ERROR if quiet else logging.WARNING)
    return quiet


IndexFile = Annotated[Path, typer.Argument(metavar="INDEX", help="The file of an index.", show_default=False)]
VectorsFile = Annotated[
    Path,
    typer.Argument(
        metavar="VECTORS", help=".npy .npz .parquet .arrow .hdf5 .fvecs .bvecs .fbin .u8bin", show_default=False
    ),
]
OutputFormat = Annotated[
    Format | None,
    typer.Option(
        "--format", "-f", callback=_format, help="Default: table on a screen, jsonl into a pipe.", show_default=False
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=_quiet, help="No progress bars, no warnings.")]


def _ids(if_left_out: str) -> Any:
    return typer.Option(
        "--ids", metavar="FILE", help=f"One id a row: .txt .npy .parquet. {if_left_out}", show_default=False
    )


Ids = Annotated[Path | None, _ids("If left out, numbers from 0.")]
NewIds = Annotated[Path | None, _ids("If left out, the numbers after the highest; texts cannot be left out.")]
AllIds = Annotated[Path | None, _ids("If left out, vectors are only learned from.")]
IdColumn = Annotated[
    str | None,
    typer.Option(
        "--id-column",
        metavar="NAME",
        help="The column with the ids: of --ids, --metadata (where it stays) or VECTORS.",
        show_default=False,
    ),
]
Metadata = Annotated[
    Path | None,
    typer.Option(
        "--metadata",
        metavar="FILE",
        help="Columns for SQL and filters: .parquet .csv .jsonl .arrow",
        show_default=False,
    ),
]
Column = Annotated[
    str | None,
    typer.Option("--column", metavar="NAME", help="The column, or data set, with the vectors.", show_default=False),
]
OnBadVectors = Annotated[
    Literal["error", "drop"],
    typer.Option("--on-bad-vectors", help="NaN and infinite values: refuse all, or leave those rows out."),
]
OnDevice = Annotated[
    str | None,
    typer.Option(
        "--device", help="cpu, auto or cuda:0; by default what SEMID_DEVICE says, or cpu.", show_default=False
    ),
]
Params = Annotated[
    list[str] | None,
    typer.Option(
        "--param",
        "-p",
        metavar="VALUE",
        help="A value for the next ? of the SQL; 7 is a number, '\"7\"' text.",
        show_default=False,
    ),
]


@app.callback()
def semid_program(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Semantic IDs for vectors, in one DuckDB file: build, search, browse and query them.

    Start with `semid demo`. Data goes to standard output, progress and errors to standard error.
    Exit code 0: done, 1: failed, 2: wrong usage.
    """


# -- commands ---------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the index.")] = Path(
        "demo.duckdb"
    ),
) -> None:
    """See it all in a minute, offline: 8,000 Debian packages get semantic IDs.

    Trains, shows the shelves, searches in plain English, filters, asks in SQL, and adds new packages.

    - `semid demo`
    """
    from semid_index.demo import run

    run(output)


@app.command()
def build(
    vectors: VectorsFile,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The index to write.", show_default=False)
    ],
    ids: Ids = None,
    metadata: Metadata = None,
    id_column: IdColumn = None,
    column: Column = None,
    metric: Annotated[Literal["l2", "cosine", "ip"], typer.Option(help="What nearest means.")] = "l2",
    quantizer: Annotated[str, typer.Option(help="How vectors become IDs; semid plugins lists all.")] = "rq",
    levels: Annotated[int, typer.Option(help="Codes in an ID.")] = 4,
    codebook_size: Annotated[str, typer.Option(help="Codewords a level: 256, or 1024,256,256.")] = "256",
    stored: Annotated[
        Literal["float32", "float16", "int8", "none"],
        typer.Option("--vectors", help="What is kept of each vector for exact distances."),
    ] = "float32",
    sample: Annotated[
        int | None, typer.Option(help="Train on this many rows, chosen at random.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same IDs.")] = 0,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="A further option of the quantizer or the index.", show_default=False),
    ] = None,
    collisions: Annotated[
        str, typer.Option(metavar="NAME", help="What happens to items that share an ID; semid plugins lists all.")
    ] = "share",
    collision_option: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="An option of that policy, such as items=5.", show_default=False),
    ] = None,
    on_bad_vectors: OnBadVectors = "error",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an index that is there, once the new one is complete.")
    ] = False,
    device: OnDevice = None,
    format: OutputFormat = None,
    quiet: Quiet = False,
) -> None:
    """Learn codebooks from vectors, give every item its semantic ID, and write an index.

    - `semid build vectors.npy --ids ids.txt -o catalog.duckdb --levels 4`
    - `semid build vectors.npy --metadata items.parquet --id-column sku -o catalog.duckdb`
    - `semid build items.parquet --id-column sku --column embedding -o catalog.duckdb`
    - `semid build vectors.npy -o catalog.duckdb --collisions capacity --collision-option items=5`
    """
    import semid_index as semid
    from semid_index.vectors import open_vectors

    source = open_vectors(vectors, column=column)
    table = read_table(metadata)
    item_ids = read_item_ids(ids, id_column, table, vectors)
    settings = {"levels": levels, "codebook_size": parse_sizes(codebook_size), **parse_options(option)}
    policy = {"policy": collisions, **parse_options(collision_option, flag="--collision-option", example="items=5")}
    with (
        complete_or_nothing(output, overwrite=overwrite) as path,
        semid.create(
            path,
            dim=source.dim,
            metric=metric,
            quantizer=quantizer,
            vectors=stored,
            seed=seed,
            collisions=policy,
            device=device,
            **settings,
        ) as index,
    ):
        index.train(source, sample=sample, on_bad_vectors=on_bad_vectors, progress=bars(quiet))
        index.add(source, item_ids, metadata=table, on_bad_vectors=on_bad_vectors, progress=bars(quiet))
    stats(output, format)


@app.command()
def add(
    index: IndexFile,
    vectors: VectorsFile,
    ids: NewIds = None,
    metadata: Metadata = None,
    id_column: IdColumn = None,
    column: Column = None,
    on_bad_vectors: OnBadVectors = "error",
    upsert: Annotated[
        bool, typer.Option("--upsert", help="Items that are there already get the new vectors and metadata.")
    ] = False,
    format: OutputFormat = None,
    quiet: Quiet = False,
) -> None:
    """Give new items semantic IDs and add them. Nothing is trained again; IDs already given stay.

    With `--upsert`, an item whose new vector has other codes gets a new ID; its old one goes to the table
    `semid_history`.

    - `semid add catalog.duckdb new.npy --ids new.txt --metadata new.parquet`
    - `semid add catalog.duckdb changed.npy --ids changed.txt --upsert`
    """
    import semid_index as semid
    from semid_index.vectors import open_vectors

    table = read_table(metadata)
    item_ids = read_item_ids(ids, id_column, table, vectors)
    with semid.open(index) as opened:
        source = open_vectors(vectors, column=column)
        if upsert:
            done = opened.upsert(source, item_ids, metadata=table, on_bad_vectors=on_bad_vectors, progress=bars(quiet))
            record = {"added": done.inserted, "updated": done.updated, "renamed": done.renamed}
        else:
            added = opened.add(source, item_ids, metadata=table, on_bad_vectors=on_bad_vectors, progress=bars(quiet))
            record = {"added": len(added)}
        record["items"] = len(opened)
    updated = f", updated {record['updated']:,}, of which {record['renamed']:,} have new IDs" if upsert else ""
    write_record(record, format, lambda: f"Added {record['added']:,} items{updated}; {index} has {record['items']:,}.")


@app.command()
def delete(
    index: IndexFile,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Items to delete.", show_default=False)
    ] = None,
    ids_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Their ids: .txt (one a line), .npy or .parquet.", show_default=False),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(metavar="SQL", help="Delete the items that fulfil a condition.", show_default=False),
    ] = None,
    param: Params = None,
    format: OutputFormat = None,
) -> None:
    """Delete items, with their vectors and metadata. Ids that are not there do not matter.

    Their semantic IDs go to the table `semid_history`, and are not given again. `semid compact` gives back the space.

    - `semid delete catalog.duckdb sku-123 sku-124`
    - `semid delete catalog.duckdb --ids-file sold-out.txt`
    - `semid delete catalog.duckdb --where "price < ?" --param 20`
    """
    import semid_index as semid
    from semid_index.vectors import read_ids

    if sum(given is not None for given in (ids or None, ids_file, where)) != 1:
        raise typer.BadParameter("Say what to delete by one of these: ids, --ids-file or --where.")
    listed = (ids or None) if ids_file is None else read_ids(ids_file)
    with semid.open(index) as opened:
        deleted = opened.delete(listed, where=where, params=parse_params(param))
        if not deleted and (numbers := as_numbers(listed)):  # an index has ids of one type, and a person types text
            deleted = opened.delete(numbers)
        record = {"deleted": deleted, "items": len(opened)}
    write_record(record, format, lambda: f"Deleted {record['deleted']:,} items; {index} has {record['items']:,}.")


@app.command()
def search(
    index: IndexFile,
    query_vector: Annotated[
        str | None,
        typer.Option(
            metavar="FILE[:ROW]", help="Vectors to search for: all rows, or one (counted from 0).", show_default=False
        ),
    ] = None,
    like: Annotated[
        str | None, typer.Option(metavar="ID", help="Items like this one of the index.", show_default=False)
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="A text; needs a plugin that embeds texts.", show_default=False)
    ] = None,
    demo_query: Annotated[
        str | None,
        typer.Option(
            metavar="WORDS", help="One of the queries bundled with semid demo, for its index.", show_default=False
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Hits for each query.")] = 10,
    where: Annotated[
        str | None,
        typer.Option(metavar="SQL", help='Only items that fulfil this, such as "price < ?".', show_default=False),
    ] = None,
    param: Params = None,
    exact: Annotated[bool, typer.Option("--exact", help="Compare with every item.")] = False,
    probes: Annotated[int | None, typer.Option(help="Leaves to open.", show_default=False)] = None,
    rerank: Annotated[
        int | None, typer.Option(help="Candidates to compute exact distances for.", show_default=False)
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="Show how the search went instead of its hits.")] = False,
    device: OnDevice = None,
    format: OutputFormat = None,
) -> None:
    """Find the nearest items. Smaller distances are nearer.

    - `semid search catalog.duckdb --like sku-123 -k 5 --where "price < ?" --param 20`
    - `semid search catalog.duckdb --query-vector queries.npy:0`
    - `semid search demo.duckdb --demo-query "play chess"`
    """
    import semid_index as semid

    given = {"--query-vector": query_vector, "--like": like, "--text": text, "--demo-query": demo_query}
    if sum(value is not None for value in given.values()) != 1:
        raise typer.BadParameter(f"Give one of {', '.join(given)}.")
    options: dict[str, Any] = {
        "where": where,
        "params": parse_params(param),
        "exact": exact,
        "probes": probes,
        "rerank": rerank,
    }
    with semid.open(index, read_only=True, device=device) as opened:
        if like is not None:
            result = opened.similar(as_id(opened, like), k, **options)
        else:
            result = opened.search(read_query(query_vector, text, demo_query), k, **options)
        if explain:
            trace = result.trace.to_dict()
            write_record(trace, format, lambda: trace_view(trace))
        else:
            write(hits_table(opened, result), format)


@app.command()
def tree(
    index: IndexFile,
    prefix: Annotated[
        str | None,
        typer.Argument(metavar="PREFIX", help="Such as 12 or 12-153; all items if left out.", show_default=False),
    ] = None,
    depth: Annotated[int, typer.Option(help="Levels to go down.")] = 1,
    examples: Annotated[int, typer.Option(help="Ids to show of each shelf.")] = 4,
    format: OutputFormat = None,
) -> None:
    """Show the shelves: items that share a prefix of their IDs, the largest first.

    - `semid tree catalog.duckdb`
    - `semid tree catalog.duckdb 12 --depth 1 --examples 6`
    """
    import pyarrow as pa

    import semid_index as semid

    with semid.open(index, read_only=True) as opened:
        shelves = opened.tree(depth, under=prefix, examples=examples)
    rows = [{"prefix": shelf.text, "items": shelf.items, "examples": list(shelf.examples)} for shelf in shelves]
    write(pa.Table.from_pylist(rows), format)


@app.command()
def sql(
    index: IndexFile,
    query: Annotated[
        str, typer.Argument(metavar="SQL", help="The query; - reads it from standard input.", show_default=False)
    ],
    param: Params = None,
    pure: Annotated[
        bool, typer.Option("--pure", help="semid_search and the like as in any DuckDB client, without Python.")
    ] = False,
    format: OutputFormat = None,
) -> None:
    """Run SQL on the index, which is opened for reading only.

    The view `semantic_ids` has id, semantic_id, c1, c2 ... (codes) and p1, p2 ... (prefixes); the table
    `items` has your metadata. DuckDB runs what it is given, also what reads other files: never give it
    the text of a stranger.

    Searches run in Python, which reads the index first, and pays for many queries; for a few, `--pure` is quicker.

    - `semid sql catalog.duckdb "SELECT c1, count(*) AS n FROM semantic_ids GROUP BY ALL ORDER BY n DESC"`
    """
    import duckdb

    import semid_index as semid
    from semid_index.sql_search import plain_message

    with semid.open(index, read_only=True, vectors_in="file") as opened:  # no need to read them all for one answer
        try:
            relation = opened.sql(sys.stdin.read() if query == "-" else query, parse_params(param), pure=pure)
            if relation is not None:  # statements such as SET have no result
                write(relation.to_arrow_table(), format)
        except duckdb.Error as error:
            fail(plain_message(error))


@app.command()
def export(
    index: IndexFile,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="What to write: .parquet .csv .json .jsonl", show_default=False
        ),
    ],
    metadata: Annotated[bool, typer.Option("--metadata", help="Also write the columns of items.")] = False,
    vectors: Annotated[bool, typer.Option("--vectors", help="Also write the stored vectors, as float32.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    format: OutputFormat = None,
) -> None:
    """Write the IDs of all items to one file that any program can read, sorted so that shelves lie together.

    Its columns are id, sid, semantic_id, c1, c2 ... (codes), dup_rank and version. In any DuckDB,
    `SELECT * FROM 'ids.parquet' WHERE sid BETWEEN ... AND ...` (or `WHERE c1 = 12 AND c2 = 153`) reads
    a small part of a Parquet file.

    - `semid export catalog.duckdb -o ids.parquet`
    - `semid export catalog.duckdb -o everything.parquet --metadata --vectors`
    """
    import semid_index as semid

    with semid.open(index, read_only=True) as opened:
        items = opened.export(output, metadata=metadata, vectors=vectors, overwrite=overwrite)
    record = {"file": str(output), "items": items, "bytes": output.stat().st_size}
    write_record(record, format, lambda: f"Wrote the IDs of {items:,} items to {output}: {record['bytes']:,} bytes.")


@app.command("import")
def import_(
    index: IndexFile,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="What semid export --vectors wrote.", show_default=False)
    ],
    format: OutputFormat = None,
    quiet: Quiet = False,
) -> None:
    """Add the items of a file that `semid export --vectors` wrote; they keep the IDs they have there.

    The index has to have the codebooks of the one that the file comes from. The file is .parquet; another program may
    have left out some of its rows.

    - `semid export catalog.duckdb -o everything.parquet --metadata --vectors`
    - `semid copy catalog.duckdb part.duckdb --no-items`
    - `semid import part.duckdb everything.parquet`
    """
    import semid_index as semid

    with semid.open(index) as opened:
        record = {
            "index": str(index),
            "imported": opened.import_items(file, progress=bars(quiet)),
            "items": len(opened),
        }
    write_record(
        record,
        format,
        lambda: f"Imported {record['imported']:,} items into {index}, which has {record['items']:,} now.",
    )


@app.command()
def verify(
    index: IndexFile,
    sample: Annotated[int, typer.Option(metavar="N", help="Stored vectors to encode again.")] = 1_000,
    format: OutputFormat = None,
    quiet: Quiet = False,
) -> None:
    """Check whether an index is whole. Exit code 1 if it is not.

    Reads all of the file, and checks that its tables fit together, and fit the vectors.

    - `semid verify catalog.duckdb`
    - `semid verify catalog.duckdb --sample 100000 --format json`
    """
    import semid_index as semid

    with semid.open(index, read_only=True) as opened:
        report = opened.verify(sample=sample, progress=bars(quiet))
    write_record(report.to_dict(), format, lambda: verify_view(report))
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def copy(
    index: IndexFile,
    new: Annotated[Path, typer.Argument(metavar="NEW", help="The file to write.", show_default=False)],
    no_items: Annotated[bool, typer.Option("--no-items", help="Only the codebooks.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    format: OutputFormat = None,
) -> None:
    """Write a copy of an index, sorted, and without the space of what was deleted.

    With `--no-items`, an index that gives the same IDs, to add or import other items to.

    - `semid copy catalog.duckdb backup.duckdb`
    - `semid copy catalog.duckdb empty.duckdb --no-items`
    """
    import semid_index as semid

    with semid.open(index, read_only=True) as opened:
        opened.save_copy(new, items=not no_items, overwrite=overwrite)
        items = 0 if no_items else len(opened)
    record = {"file": str(new), "items": items, "bytes": new.stat().st_size}
    write_record(record, format, lambda: f"Copied {record['items']:,} items to {new}: {record['bytes']:,} bytes.")


@app.command()
def compact(index: IndexFile, format: OutputFormat = None) -> None:
    """Give back the space of what was deleted, and sort the items by their IDs again. No ID changes.

    The file is written anew beside the old one, which it replaces when it is complete.

    - `semid compact catalog.duckdb`
    """
    from dataclasses import asdict

    import semid_index as semid

    with semid.open(index) as opened:
        report = opened.compact()
    write_record(
        asdict(report), format, lambda: f"{index}: {report.bytes_before:,} bytes before, {report.bytes_after:,} after."
    )


@app.command()
def retrain(
    index: IndexFile,
    vectors: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Vectors to learn from, instead of the stored ones.", show_default=False),
    ] = None,
    ids: AllIds = None,
    id_column: IdColumn = None,
    column: Column = None,
    keep_ids: Annotated[
        bool, typer.Option("--keep-ids/--no-keep-ids", help="Go on from the old codebooks, or start from scratch.")
    ] = True,
    compare: Annotated[
        bool,
        typer.Option("--compare/--no-compare", help="Train from scratch, too, to report what that would have done."),
    ] = True,
    drop_old: Annotated[bool, typer.Option("--drop-old", help="Remove the version before.")] = False,
    format: OutputFormat = None,
    quiet: Quiet = False,
) -> None:
    """Learn the codebooks again; items keep their IDs wherever possible.

    The new IDs are a new version, beside the old one. With --ids (or --id-column) the vectors are those of all items,
    and are encoded, too: an index that keeps no vectors needs that.

    - `semid retrain catalog.duckdb`
    - `semid retrain catalog.duckdb --vectors new.npy --drop-old`
    - `semid retrain codes-only.duckdb --vectors all.npy --ids all.txt`
    """
    from dataclasses import asdict

    import semid_index as semid
    from semid_index.vectors import open_vectors

    source = None if vectors is None else open_vectors(vectors, column=column)
    given = None
    if ids is not None or id_column is not None:
        if vectors is None:
            raise typer.BadParameter("--ids and --id-column belong to --vectors.")
        given = read_item_ids(ids, id_column, None, vectors)
    with semid.open(index) as opened:
        report = opened.retrain(source, ids=given, keep_ids=keep_ids, compare=compare, progress=bars(quiet))
        if drop_old:
            opened.drop_version(report.version - 1)
    write_record(asdict(report), format, lambda: retrain_view(report, dropped=drop_old))


@app.command()
def versions(
    index: IndexFile,
    drop: Annotated[
        int | None, typer.Option(metavar="N", help="Remove this older version of the IDs.", show_default=False)
    ] = None,
    format: OutputFormat = None,
) -> None:
    """List the versions of the IDs that retraining left, or drop one.

    - `semid versions catalog.duckdb`
    - `semid versions catalog.duckdb --drop 1`
    """
    from dataclasses import asdict

    import pyarrow as pa

    import semid_index as semid

    with semid.open(index, read_only=drop is None) as opened:
        if drop is not None:
            opened.drop_version(drop)
        rows = [asdict(version) for version in opened.versions()]
    write(pa.Table.from_pylist(rows), format)


@app.command()
def stats(index: IndexFile, format: OutputFormat = None) -> None:
    """Show what an index holds and what it costs: items, bytes per item, error and perplexity per level.

    - `semid stats catalog.duckdb`
    """
    import semid_index as semid

    with semid.open(index, read_only=True) as opened:
        record = opened.stats()
    write_record(record, format, lambda: stats_view(record))


@app.command()
def report(
    index: Annotated[
        Path | None, typer.Argument(metavar="INDEX", help="The file of an index.", show_default=False)
    ] = None,
    ids: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Instead of an index: IDs that others made, in a table or .npy.", show_default=False
        ),
    ] = None,
    vectors: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="With --ids: the vectors of the items. With an index: vectors held out from training.",
            show_default=False,
        ),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN",
            help="Metadata to compare with; may be repeated. If left out, up to 3 columns are chosen.",
            show_default=False,
        ),
    ] = None,
    labels_from: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --ids: the table with the labels.", show_default=False),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="An earlier version, index or IDs, to see what changed.", show_default=False),
    ] = None,
    id_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Joins tables by the items they name; else row by row.", show_default=False),
    ] = None,
    ids_column: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The column with the IDs, in --ids and --against.", show_default=False),
    ] = None,
    column: Column = None,
    k: Annotated[int, typer.Option("-k", "--k", help="Neighbours to look for.")] = 10,
    queries: Annotated[int, typer.Option(help="Items to look for neighbours of.")] = 1_000,
    metric: Annotated[
        Literal["l2", "cosine", "ip"] | None, typer.Option(help="With --ids: what nearest means.", show_default="l2")
    ] = None,
    levels: Annotated[
        int | None, typer.Option(help="With --ids: measure only the first codes.", show_default=False)
    ] = None,
    codebook_size: Annotated[
        str | None,
        typer.Option(help="With --ids: codewords a level. If left out, as the largest codes say.", show_default=False),
    ] = None,
    unordered: Annotated[
        bool, typer.Option("--unordered", help="With --ids: the codes have no order from coarse to fine, as OPQ's.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write a page with plots, .html.", show_default=False),
    ] = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write the plots as .png files.", show_default=False)
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FIGURE<LIMIT", help="Exit code 1 unless this holds; may be repeated.", show_default=False
        ),
    ] = None,
    format: OutputFormat = None,
    quiet: Quiet = False,
) -> None:
    """Tell how good semantic IDs are: meaning, neighbours, collisions, error, balance, memory.

    `--require` takes a figure, one of `< <= > >= ==` and a number. Figures: `recall@10`, `probe_recall@0.01`,
    `section.purity_1`, `section.lift_2`, `shared`, `collision_rate`, `relative_error`, `gini_1` and more; a wrong name
    lists them all.

    - `semid report catalog.duckdb --labels section -o report.html`
    - `semid report catalog.duckdb --require 'collision_rate<0.05' --require 'recall@10>0.3'`
    - `semid report --ids ids.parquet --vectors vectors.npy --labels-from items.parquet --labels category`
    """
    from semid_index.report.command import Source, check_requests, measure_ids, measure_index, unmet

    only_ids = {
        "--labels-from": labels_from,
        "--metric": metric,
        "--levels": levels,
        "--codebook-size": codebook_size,
        "--unordered": unordered or None,
    }
    check_requests(index, ids, only_ids, require, draws=bool(output or plots))
    earlier = None if against is None else Source(against, ids_column, id_column, levels)
    shared: dict[str, Any] = {"vectors": vectors, "column": column, "labels": labels, "against": earlier}
    shared |= {"k": k, "queries": queries, "progress": bars(quiet)}
    if index is not None:
        measured = measure_index(index, **shared)
    elif ids is not None:
        measured = measure_ids(
            Source(ids, ids_column, id_column, levels),
            metric=metric or "l2",
            codebook_sizes=None if codebook_size is None else parse_sizes(codebook_size),
            hierarchical=not unordered,
            labels_from=labels_from,
            **shared,
        )
    measured.write(output, plots)
    write_record(measured.report.to_dict(), format, lambda: report_view(measured.report))
    if sentences := unmet(measured.report, require):
        sys.stderr.write("".join(f"not met: {sentence}\n" for sentence in sentences))
        raise typer.Exit(1)


@app.command()
def bench(
    data: Annotated[
        str,
        typer.Argument(
            metavar="[DATA]", help="A file of vectors, sample, or generated-ROWSxDIM such as generated-100000x128."
        ),
    ] = "sample",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where results, plots and a page go.")
    ] = Path("bench"),
    subjects: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Such as semid-int8,faiss,hnswlib; all if left out.", show_default=False),
    ] = None,
    k: Annotated[int, typer.Option("-k", "--k", help="Neighbours to look for.")] = 10,
    threads: Annotated[str, typer.Option(metavar="COUNTS", help="Threads, in turn: 1,all.")] = "1",
    effort: Annotated[
        Literal["tiny", "quick", "full"], typer.Option(help="How many ways to build and search each subject.")
    ] = "quick",
    rounds: Annotated[int | None, typer.Option(help="Rounds of a race.", show_default="by effort")] = None,
    byte_counts: Annotated[
        str | None,
        typer.Option(
            "--bytes",
            metavar="COUNTS",
            help="Instead, compare codes alone at so many bytes an item, such as 4,8,16.",
            show_default=False,
        ),
    ] = None,
    kinds: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="With --bytes: kinds of code, such as rq,opq.", show_default=False),
    ] = None,
    metric: Annotated[
        Literal["l2", "cosine", "ip"] | None,
        typer.Option(help="What nearest means.", show_default="as the file says, or l2"),
    ] = None,
    column: Column = None,
    rows: Annotated[int | None, typer.Option(help="Only the first rows.", show_default=False)] = None,
    queries: Annotated[int, typer.Option(help="Queries; held out, where the file has none.")] = 2_000,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin anew; else what is done is not done again.")] = False,
    builds: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Keep built indexes here, and take those that are.", show_default=False),
    ] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw plots; needs matplotlib.")] = True,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 1 if a subject failed.")] = False,
    format: OutputFormat = None,
    quiet: Quiet = False,
) -> None:
    """Compare this index with others on your own data: recall, speed, memory, time to build.

    Every subject is searched in many ways; the best of them race, in turn, round after round. Distances are computed
    here, not believed. Subjects that are not installed are left out, and it is said why.

    `--bytes` compares kinds of code instead, without vectors to re-rank from, everything counted that they need.

    - `semid bench sample -o bench`
    - `semid bench vectors.npy --metric cosine --subjects semid,faiss-ivf-pq,hnswlib --threads 1,all -o bench`
    - `semid bench vectors.npy --metric cosine --bytes 4,8,16,32,64 -o bench`
    """
    import pyarrow as pa

    from semid_index.bench.command import parse_budgets, ruling_rows, run_referee, run_subjects, write_pages
    from semid_index.bench.data import load_data
    from semid_index.bench.page import summary_rows

    def say(text: str) -> None:
        if not quiet:
            sys.stderr.write(f"{text}\n")

    output.mkdir(parents=True, exist_ok=True)
    loaded = load_data(data, metric=metric, queries=queries, column=column)
    loaded = loaded if rows is None else loaded.first(rows, queries)
    failed = False
    if byte_counts is not None:
        rulings = run_referee(loaded, output, parse_budgets(byte_counts), kinds=kinds, fresh=fresh, say=say)
        records = list(ruling_rows(rulings))
    else:
        options: dict[str, Any] = {"subjects": subjects, "k": k, "threads": threads, "effort": effort, "rounds": rounds}
        results = run_subjects(loaded, output, **options, fresh=fresh, builds=builds, say=say)
        records, failed = list(summary_rows(results)), bool(results.failed)
    if plots:
        for path in write_pages(output):
            say(f"wrote {path}")
    write(pa.Table.from_pylist(records), format)
    if failed and strict:
        fail("a subject failed; see above.")


@app.command()
def plugins(format: OutputFormat = None) -> None:
    """List what is installed: quantizers and all else that plugins offer, and plugins that fail to load.

    - `semid plugins`
    """
    import pyarrow as pa

    from semid_index.plugins import installed

    found = installed()
    offers = found.offers.values()
    rows = [
        {"kind": offer.kind, "name": offer.name, "class": _qualified(offer.target), "from": offer.source, "error": None}
        for offer in offers
    ]
    rows += [
        {"kind": "failed", "name": None, "class": None, "from": source, "error": reason}
        for source, reason in found.failed.items()
    ]
    names = ("kind", "name", "class", "from", "error")
    write(pa.Table.from_pylist(rows, schema=pa.schema([(name, pa.string()) for name in names])), format)


@app.command()
def doctor(format: OutputFormat = None) -> None:
    """Look for what is wrong with this installation. Exit code 1 if something is.

    - `semid doctor`
    """
    from dataclasses import asdict

    import pyarrow as pa

    from semid_index.doctor import examine

    findings = examine()
    write(pa.Table.from_pylist([asdict(finding) for finding in findings]), format)
    if any(finding.status == "wrong" for finding in findings):
        raise typer.Exit(1)


# -- parts ------------------------------------------------------------------------------------------------------------


def read_query(vector: str | None, text: str | None, demo_query: str | None) -> Any:
    """The vector, or vectors, to search for, from the one of these that is given."""
    if vector is not None:
        return read_query_vectors(vector)
    if text is not None:
        return embed(text)
    from semid_index.demo import load_sample

    return load_sample().query(demo_query or "")


def hits_table(index: SemanticIndex, result: Any) -> pa.Table:
    """The hits with their metadata; which query they belong to is said for a batch."""
    hits = result.to_arrow()
    if result.single:
        hits = hits.drop_columns(["query"])
    items = index.get(hits["id"])
    for name in items.column_names:
        if name not in ("id", "semantic_id"):
            hits = hits.append_column(f"item_{name}" if name in hits.column_names else name, items[name])
    return hits


def _qualified(target: Any) -> str:
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', type(target).__name__)}"


if __name__ == "__main__":
    main()
