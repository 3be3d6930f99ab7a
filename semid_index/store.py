"""One index: a DuckDB file, or a database in memory. This module writes it.

:class:`Session` has its connections and transactions, :class:`Contents` reads it, and :class:`Store` is both.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import duckdb
import numpy as np
from numpy.typing import NDArray

from semid_index import tables, versions
from semid_index.appending import Appending, write_history, write_meta
from semid_index.arrow import fixed_size_list
from semid_index.codes import CodeLayout
from semid_index.contents import Contents
from semid_index.copying import copy_database
from semid_index.database import (
    CONNECT_CONFIG,
    check_is_database,
    checkpoint_soon,
    connect,
    connect_soon,
    copy_errors_translated,
    errors_translated,
    log_of,
    make_room,
    remove_database,
    run_over,
    sync_folder,
    unique_name,
    wait_until_alone,
)
from semid_index.errors import (
    RESTORE,
    CorruptIndexError,
    IndexClosedError,
    InvalidArgumentError,
    NotAnIndexError,
)
from semid_index.macros import IndexShape, create_macros, encodes_greedily
from semid_index.records import IdType, IndexConfig
from semid_index.versions import kept_versions

_CODEBOOK_NAME = re.compile(r"codebook_(\d+)")


class Store(Contents):
    """One open index file."""

    # -- opening ------------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | os.PathLike[str] | None, config: IndexConfig, *, overwrite: bool = False) -> Self:
        """A new, untrained index; in memory if ``path`` is None."""
        file = None if path is None else Path(path)
        if file is not None:
            make_room(file, overwrite=overwrite)
        store = cls(connect(file, read_only=False), file, read_only=False)
        try:
            with store.writing() as cursor:
                tables.migrate(cursor.execute, found=0)
                settings = {"config": asdict(config), "next_row": 0, "collisions": None, "version": 1}
                write_meta(cursor, format_version=tables.FORMAT_VERSION, **settings)
        except BaseException:
            store.close()
            if file is not None:
                remove_database(file)
            raise
        return store

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, read_only: bool = False, version: int | None = None) -> Self:
        """The index in an existing file, brought to today's format if it is older.

        With an older ``version`` of the IDs, that is what is read, and nothing can be written.
        """
        file = Path(path)
        check_is_database(file)
        store = cls(connect(file, read_only=read_only), file, read_only=read_only)
        try:
            found = store._format_version()
            tables.check_format(found)
            if found < tables.FORMAT_VERSION and not read_only:
                with store.writing() as cursor:
                    tables.migrate(cursor.execute, found)
                    write_meta(cursor, format_version=tables.FORMAT_VERSION)
                    if store.is_trained:
                        _create_macros(cursor, store.config, store.layout, hierarchical=store.hierarchical)
            if version is not None and version != store.version:
                store._use_version(version)
        except BaseException:
            store.close()
            raise
        return store

    def _format_version(self) -> int:
        if not self._has_table("semid_meta"):
            raise NotAnIndexError(
                f"{self.path} is a DuckDB database, but not one of semid-index: it has no table semid_meta. "
                "Make an index, in a file of its own, with semid_index.create or semid build."
            )
        version = self.meta("format_version")
        if type(version) is not int or version < 1:
            raise CorruptIndexError(f"{self.path} is damaged: it does not say which format it has. {RESTORE}")
        return version

    def _use_version(self, version: int) -> None:
        """Read an older version of the IDs from now on."""
        with closing(self.cursor()) as cursor:
            kept = kept_versions(cursor.execute)
        if version not in kept:
            known = "".join(f"{number}, " for number in kept)
            raise InvalidArgumentError(
                f"{self.path} has no version {version}. It has {known}and {self.version}, which is the present one."
            )
        self.read_only, self._old_version, self._known_settings = True, version, None

    # -- writing ------------------------------------------------------------------------------------------------------

    def save_training(
        self,
        config: IndexConfig,
        report: Mapping[str, Any],
        layout: CodeLayout,
        arrays: Mapping[str, NDArray[Any]],
        *,
        hierarchical: bool,
    ) -> None:
        """What training learned, and empty tables for the items."""
        with self.writing() as cursor:
            _write_training(cursor, config, report, layout, arrays, hierarchical=hierarchical)
            _create_item_tables(cursor, config, layout, "int", hierarchical=hierarchical)
            _create_macros(cursor, config, layout, hierarchical=hierarchical)

    @contextmanager
    def new_version(self, report: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Iterator[Appending]:
        """Keep the present version of the IDs as an older one, and take the codes of a new one, in one transaction.

        All items are to be given to :meth:`Appending.add_codes`.
        """
        config, layout, hierarchical, version = self.config, self.layout, self.hierarchical, self.version
        with self._settings(), self.writing() as cursor:
            versions.keep_version(cursor.execute, version, layout, hierarchical=hierarchical)
            tables.clear_training(cursor.execute)
            _write_training(cursor, config, report, layout, arrays, hierarchical=hierarchical)
            tables.create_code_table(cursor.execute, layout, self.id_type or "int")
            query = tables.semantic_ids_query(layout, hierarchical=hierarchical, version=version + 1)
            cursor.execute(f"CREATE OR REPLACE VIEW semantic_ids AS {query}")
            tables.create_map_view(cursor.execute, kept_versions(cursor.execute))
            write_meta(cursor, version=version + 1, collisions=None)
            appending = Appending(
                cursor, layout, next_row=self.next_row, version=version + 1, has_table=self._has_table
            )
            yield appending
            appending.finish()
            _create_macros(cursor, config, layout, hierarchical=hierarchical, known=self.meta("macros"))

    def drop_version(self, version: int) -> None:
        """Remove an older version of the IDs."""
        with self.writing() as cursor:
            versions.drop_version(cursor.execute, version)

    @contextmanager
    def appending(self, id_type: IdType, *, replacing: bool = False, compress: bool = True) -> Iterator[Appending]:
        """Append items, in batches, in one transaction; they are sorted by sid when it ends.

        ``replacing``: items may take the place of others, which :meth:`Appending.replace` takes out.
        ``compress=False`` stores values as they are: DuckDB's compression makes float32 vectors that use all bits of
        their mantissas 40 % larger, and slower to write (docs/decisions/0005).
        """
        with self._settings(force_compression="auto" if compress else "uncompressed"), self.writing() as cursor:
            if self.id_type is None:
                if id_type != "int":  # training made the tables for integers
                    _create_item_tables(cursor, self.config, self.layout, id_type, hierarchical=self.hierarchical)
                write_meta(cursor, id_type=id_type)
            appending = Appending(
                cursor,
                self.layout,
                next_row=self.next_row,
                version=self.version,
                has_table=self._has_table,
                replacing=replacing,
            )
            yield appending
            appending.finish()
            write_meta(cursor, next_row=appending.next_row)

    def delete(self, rows: NDArray[np.int64]) -> int:
        """Delete the items with these rows, and keep their IDs in the history; returns how many there were."""
        import pyarrow as pa

        with self.writing() as cursor:
            wanted = pa.table({"row": rows})
            run_over(
                cursor,
                wanted,
                "CREATE OR REPLACE TEMP TABLE semid_deleted AS FROM semid_codes SEMI JOIN batch USING (row)",
            )
            write_history(cursor, self._id_order, "semid_deleted", self.version)
            for table, key in (("semid_vectors", "row"), ("items", "id"), ("semid_codes", "row")):
                if table != "semid_vectors" or self._has_table(table):
                    cursor.execute(f"DELETE FROM {table} WHERE {key} IN (SELECT {key} FROM semid_deleted)")
            versions.delete_rows(cursor.execute, "SELECT row FROM semid_deleted")
            deleted = cursor.execute("SELECT count(*) FROM semid_deleted").fetchall()[0][0]
            cursor.execute("DROP TABLE semid_deleted")
        return int(deleted)

    # -- copies -------------------------------------------------------------------------------------------------------

    def write_copy(self, part: Path, target: Path, *, compress: bool) -> None:
        """Write all that is in the database, of one moment, into the new file ``part``, which is to become ``target``.

        Items are sorted by sid, and nothing is left of what was deleted. ``compress``: see :meth:`appending`; here it
        is about vectors alone.
        """
        name = unique_name("semid_copy")
        place = tables.literal(str(part.absolute()))
        version = CONNECT_CONFIG["storage_compatibility_version"]
        with (
            errors_translated(self.path),
            copy_errors_translated(target),
            self._settings(force_compression="auto"),
            closing(self.cursor()) as cursor,
        ):
            source = str(cursor.execute("SELECT current_database()").fetchall()[0][0])
            cursor.execute(f"ATTACH {place} AS {name} (READ_WRITE, STORAGE_VERSION '{version}')")
            try:
                cursor.execute("BEGIN")
                copy_database(cursor.execute, source, name, plain=() if compress else ("semid_vectors",))
                cursor.execute("SET force_compression = 'auto'")  # for what is left to be written
                cursor.execute("COMMIT")
                cursor.execute(f"CHECKPOINT {name}")
            finally:
                with suppress(duckdb.Error):  # COMMIT may have ended the transaction
                    cursor.execute("ROLLBACK")
                cursor.execute(f"USE {tables.quoted(source)}")
                cursor.execute(f"DETACH {name}")

    def checkpoint(self) -> tuple[int, ...]:
        """Bring all that was written into the file itself; returns what would tell that something was written since."""
        with errors_translated(self.path), closing(self.cursor()) as cursor:
            checkpoint_soon(cursor, self.path)
            return self._file_state()

    def replace_file(self, part: Path, state: tuple[int, ...], release: Callable[[], None]) -> bool:
        """Let another file take the place of this one, and open it; False if this one is not in the given state.

        ``release`` lets go of all other connections. Reads that begin meanwhile wait; those that go on longer than some
        seconds, and connections that are held elsewhere, are the reason of an :class:`IndexLockedError`, and then all
        is as before.
        """
        path = self.path
        if path is None:
            raise InvalidArgumentError("An index in memory has no file.")
        with self._write_lock, self._file_lock:
            if self._connection is None:
                raise IndexClosedError("The index was closed meanwhile.")
            wait_until_alone(self._connection, path, release)
            if self._file_state() != state:
                return False
            connection, self._connection = self._connection, None
            connection.close()
            reader = connect_soon(path)  # so that no other process opens a file that is about to go
            try:
                if self._file_state() != state:
                    return False
                part.replace(path)
                sync_folder(path)
            finally:
                reader.close()
                self._connection = connect(path, read_only=False)
                self._writers.writes += 1
                self._writers.begun = self._writers.writes
            return True

    def sort_codes(self) -> None:
        """Bring the items into the order of their sids again."""
        if not self.is_trained:
            return
        with self.writing() as cursor:
            order = f"{self._id_order}, row"
            cursor.execute(f"CREATE OR REPLACE TEMP TABLE semid_sorted AS FROM semid_codes ORDER BY {order}")
            cursor.execute("DELETE FROM semid_codes")
            cursor.execute("INSERT INTO semid_codes FROM semid_sorted")
            cursor.execute("DROP TABLE semid_sorted")

    def refresh_macros(self) -> None:
        """Write the macros anew, unless they are those of this version already."""
        if self.is_trained and self.meta("macros") != self.macros_fingerprint():
            with self.writing() as cursor:
                _create_macros(cursor, self.config, self.layout, hierarchical=self.hierarchical)

    def macros_fingerprint(self) -> str:
        """The SHA-256 of the statements with which this version writes the macros of this index."""
        with closing(self.cursor()) as cursor:
            return _macros_fingerprint(_macros(cursor, self.config, self.layout, hierarchical=self.hierarchical))

    def _file_state(self) -> tuple[int, ...]:
        parts = [] if self.path is None else [self.path, log_of(self.path)]
        found = [part.stat() for part in parts if part.exists()]
        return tuple(value for stat in found if stat.st_size for value in (stat.st_mtime_ns, stat.st_size))


def _write_training(
    cursor: duckdb.DuckDBPyConnection,
    config: IndexConfig,
    report: Mapping[str, Any],
    layout: CodeLayout,
    arrays: Mapping[str, NDArray[Any]],
    *,
    hierarchical: bool,
) -> None:
    """What training learned, in tables of its own."""
    codebooks = {name: array for name, array in arrays.items() if _CODEBOOK_NAME.fullmatch(name)}
    write_meta(
        cursor,
        config=asdict(config),
        codebook_sizes=list(layout.codebook_sizes),
        hierarchical=hierarchical,
        train_report=report,
        trained_at=datetime.now(UTC).isoformat(timespec="seconds"),
        fingerprints=fingerprints(arrays),
        drift=None,
    )
    if codebooks:
        tables.create_codebook_table(cursor.execute, config.dim)
    for name, codebook in codebooks.items():
        _insert_codebook(cursor, int(name.removeprefix("codebook_")), codebook)
    for name, array in arrays.items():
        if name not in codebooks:
            plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            values = [name, plain.dtype.str, list(array.shape), plain.tobytes()]
            cursor.execute("INSERT INTO semid_array VALUES (?, ?, ?, ?)", values)
    if codebooks and hierarchical:
        tables.create_bucket_table(cursor.execute)


def _create_item_tables(
    cursor: duckdb.DuckDBPyConnection, config: IndexConfig, layout: CodeLayout, id_type: IdType, *, hierarchical: bool
) -> None:
    tables.create_item_tables(
        cursor.execute,
        layout,
        dim=config.dim,
        id_type=id_type,
        tier=config.vectors,
        tail_bytes=-(-(config.tail or 0) // 2),
        hierarchical=hierarchical,
    )


def fingerprints(arrays: Mapping[str, NDArray[Any]]) -> dict[str, str]:
    """The SHA-256 of the type, shape and values of each array, whatever the machine's byte order."""
    found = {}
    for name, array in arrays.items():
        plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        digest = hashlib.sha256(f"{plain.dtype.str} {list(plain.shape)} ".encode())
        digest.update(plain.data)
        found[name] = digest.hexdigest()
    return found


def _macros(
    cursor: duckdb.DuckDBPyConnection, config: IndexConfig, layout: CodeLayout, *, hierarchical: bool
) -> list[str]:
    """The statements that write the macros of an index."""
    shape = IndexShape(
        layout,
        config.dim,
        config.metric,
        config.vectors,
        codeword_levels=tables.codeword_levels(cursor.execute),
        hierarchical=hierarchical,
        greedy=encodes_greedily(config.quantizer, config.quantizer_config),
    )
    return create_macros(shape)


def _macros_fingerprint(statements: Iterable[str]) -> str:
    return hashlib.sha256(";\n".join(statements).encode()).hexdigest()


def _create_macros(
    cursor: duckdb.DuckDBPyConnection,
    config: IndexConfig,
    layout: CodeLayout,
    *,
    hierarchical: bool,
    known: str | None = None,
) -> None:
    """Write the macros, unless those that are there, which have the fingerprint ``known``, are the same."""
    statements = _macros(cursor, config, layout, hierarchical=hierarchical)
    if (fingerprint := _macros_fingerprint(statements)) == known:
        return
    for statement in statements:
        cursor.execute(statement)
    write_meta(cursor, macros=fingerprint)


def _insert_codebook(cursor: duckdb.DuckDBPyConnection, level: int, codebook: NDArray[np.float32]) -> None:
    import pyarrow as pa

    words = pa.table(
        {
            "level": np.full(len(codebook), level, dtype=np.uint8),
            "code": np.arange(len(codebook), dtype=np.uint16),
            "codeword": fixed_size_list(codebook),
        }
    )
    run_over(cursor, words, "INSERT INTO semid_codebook SELECT * FROM batch")
