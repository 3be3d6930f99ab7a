"""SQLAlchemy over DuckDB: first what any dialect must do, then what ``semid_index.sql`` adds for an index.

The first part runs on another dialect, too, which is how ours was chosen (docs/decisions/0008):
``SQL_DIALECT=duckdb_engine python -m pytest -W default tests/test_sqlalchemy.py -k TestDialect``.
"""

from __future__ import annotations

import datetime as dt
import gc
import importlib
import os
import re
import threading
import tomllib
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import sqlalchemy as sa
from numpy.typing import NDArray
from sqlalchemy import MetaData, exc, func, inspect, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, aliased, mapped_column, relationship

import semid_index as semid
from semid_index import codes, tables
from semid_index.errors import IndexClosedError, IndexNotFoundError, InvalidArgumentError, InvalidCodesError
from semid_index.sql import Array, Other, Sid, SizedInteger, common_prefix_len, dbapi, insert_arrow, prefix
from semid_index.sql import tables as tables_of
from semid_index.sql.column_types import parse_type

ROOT = Path(__file__).resolve().parent.parent
DIALECT = os.environ.get("SQL_DIALECT", "semid")


def engine_over(owner: duckdb.DuckDBPyConnection) -> sa.Engine:
    """An engine whose connections are cursors of one DuckDB connection."""
    if DIALECT == "semid":
        return sa.create_engine("semid://", creator=lambda: dbapi.Connection(owner.cursor()))
    wrapper = importlib.import_module(DIALECT).ConnectionWrapper
    return sa.create_engine("duckdb://", creator=lambda: wrapper(owner.cursor()), poolclass=sa.QueuePool)


@pytest.fixture
def owner() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as connection:
        yield connection


@pytest.fixture
def engine(owner: duckdb.DuckDBPyConnection) -> Iterator[sa.Engine]:
    engine = engine_over(owner)
    yield engine
    engine.dispose()


TYPES = [
    *(
        "TINYINT",
        "SMALLINT",
        "INTEGER",
        "BIGINT",
        "HUGEINT",
        "UTINYINT",
        "USMALLINT",
        "UINTEGER",
        "UBIGINT",
        "UHUGEINT",
    ),
    *("BOOLEAN", "FLOAT", "DOUBLE", "DECIMAL(10,2)", "VARCHAR", "BLOB", "UUID", "JSON", "DATE", "TIME", "TIMESTAMP"),
    *("TIMESTAMP_NS", "TIMESTAMP WITH TIME ZONE", "INTERVAL", "BIT", "ENUM('a', 'b[1]')", "MAP(VARCHAR, INTEGER)"),
    *("FLOAT[3]", "UTINYINT[2]", "INTEGER[]", "VARCHAR[][2]", "STRUCT(a INTEGER, b FLOAT[2])[]"),
]

VALUES = {
    "boolean": (sa.Boolean, True),
    "integer": (sa.Integer, -(2**31)),
    "bigint": (sa.BigInteger, 2**63 - 1),
    "float": (sa.Float, 0.1),
    "double": (sa.Double, 1e-300),
    "numeric": (sa.Numeric, Decimal("1.2345678901")),
    "decimal": (sa.Numeric(38, 4), Decimal("1234567890123456789012345678901234.5678")),
    "text": (sa.String(5), "naïve '\"\\%:$1 ?\n" * 3),
    "unicode": (sa.Unicode, "中文\U0001f40d"),
    "blob": (sa.LargeBinary, bytes(range(256))),
    "date": (sa.Date, dt.date(2024, 2, 29)),
    "time": (sa.Time, dt.time(23, 59, 59, 999_999)),
    "datetime": (sa.DateTime, dt.datetime(1969, 7, 20, 20, 17, 40, 123_456)),
    "interval": (sa.Interval, dt.timedelta(days=3, microseconds=5)),
    "uuid": (sa.Uuid, uuid.UUID(int=7)),
    "json": (sa.JSON, {"a": [1, None, "ü"]}),
    "enum": (sa.Enum("red", "green", name="colour"), "green"),
    "list": (sa.ARRAY(sa.Integer), [1, 2, None]),
}


def numbers(metadata: MetaData, **columns: Any) -> sa.Table:
    """A table ``numbers`` with ``id`` and ``name``."""
    id = sa.Column("id", sa.Integer, primary_key=True, autoincrement=False)
    return sa.Table("numbers", metadata, id, sa.Column("name", sa.String), **columns)


@pytest.fixture
def filled(engine: sa.Engine) -> sa.Table:
    """A table with 5,000 rows, (0, "0") and on."""
    table = numbers(MetaData())
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO numbers SELECT range, range::VARCHAR FROM range(5000)"))
    return table


class TestDialect:
    """What is expected of any dialect."""

    # -- results ------------------------------------------------------------------------------------------------------

    def test_two_open_results(self, engine: sa.Engine, filled: sa.Table) -> None:
        with engine.connect() as connection:
            query = select(filled.c.id).order_by(filled.c.id)
            first, second = connection.execute(query), connection.execute(query.limit(3_000))
            taken = [[first.fetchone()[0], second.fetchone()[0]] for _ in range(2_500)]
            assert taken == [[n, n] for n in range(2_500)]
            assert first.scalars().all() == list(range(2_500, 5_000))
            assert second.scalars().all() == list(range(2_500, 3_000))

    def test_writing_for_each_row_of_an_open_result(self, engine: sa.Engine, filled: sa.Table) -> None:
        with engine.begin() as connection:
            for id, name in connection.execute(select(filled).order_by(filled.c.id)):
                if id % 1_000 == 0:
                    connection.execute(filled.update().where(filled.c.id == id).values(name=f"new {name}"))
            changed = connection.scalars(
                select(filled.c.id).where(filled.c.name.startswith("new")).order_by(filled.c.id)
            )
            assert changed.all() == [0, 1_000, 2_000, 3_000, 4_000]

    def test_an_open_result_outlives_commit(self, engine: sa.Engine, filled: sa.Table) -> None:
        with engine.connect() as connection:
            result = connection.execute(select(filled.c.id).order_by(filled.c.id))
            first = result.fetchone()[0]
            connection.commit()
            assert [first, *result.scalars()] == list(range(5_000))

    def test_rows_in_portions(self, engine: sa.Engine, filled: sa.Table) -> None:
        with engine.connect() as connection:
            result = connection.execute(select(filled.c.id).order_by(filled.c.id).execution_options(yield_per=700))
            portions = [list(portion) for portion in result.scalars().partitions()]
        assert [len(portion) for portion in portions] == [700] * 7 + [100]
        assert [id for portion in portions for id in portion] == list(range(5_000))

    # -- values -------------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("name", VALUES)
    def test_a_value_comes_back(self, engine: sa.Engine, name: str) -> None:
        kind, value = VALUES[name]
        table = sa.Table("one", MetaData(), sa.Column("n", sa.Integer), sa.Column("value", kind))
        table.create(engine)
        with engine.begin() as connection:
            connection.execute(table.insert(), [{"n": 0, "value": value}, {"n": 1, "value": None}])
        with engine.connect() as connection:
            got, missing = connection.execute(select(table.c.value).order_by(table.c.n)).scalars()
            assert got == value
            assert type(got) is type(value)
            assert missing is None
            if name not in ("json", "list"):  # which SQLAlchemy compares otherwise
                assert connection.scalar(select(table.c.n).where(table.c.value == value)) == 0

    def test_a_time_with_a_zone_comes_back(self, engine: sa.Engine) -> None:
        pytest.importorskip("pytz", reason="DuckDB gives out times with a zone only with pytz")
        moment = dt.datetime(2024, 1, 1, 12, tzinfo=dt.UTC)
        with engine.connect() as connection:
            got = connection.scalar(select(sa.cast(moment, sa.DateTime(timezone=True))))
        assert got == moment

    def test_the_same_parameter_twice(self, engine: sa.Engine, filled: sa.Table) -> None:
        start = func.substr(filled.c.name, 1, 1)
        with engine.connect() as connection:
            counts = connection.execute(select(start, func.count()).group_by(start).order_by(start)).all()
        assert counts == [(str(digit), 1111 if digit else 1) for digit in range(5)] + [
            (str(digit), 111) for digit in range(5, 10)
        ]

    @pytest.mark.parametrize(
        "name", ["qualify", "pivot", "summarize", "order", "columns", "at", "Mixed Case", 'quo"te']
    )
    def test_any_name_of_a_column(self, engine: sa.Engine, name: str) -> None:
        table = sa.Table(name, MetaData(), sa.Column(name, sa.Integer))
        table.create(engine)
        with engine.begin() as connection:
            connection.execute(table.insert(), {name: 7})
            assert connection.execute(select(table.c[name])).mappings().all() == [{name: 7}]

    # -- writing ------------------------------------------------------------------------------------------------------

    def test_rollback_and_isolation(self, engine: sa.Engine, filled: sa.Table) -> None:
        count = select(func.count()).select_from(filled)
        with engine.connect() as writer, engine.connect() as reader:
            writer.execute(filled.delete())
            assert (writer.scalar(count), reader.scalar(count)) == (0, 5_000)
            writer.rollback()
            assert writer.scalar(count) == 5_000

    def test_many_rows_at_once(self, engine: sa.Engine) -> None:
        table = numbers(MetaData())
        table.create(engine)
        rows = [{"id": n, "name": None if n % 3 else str(n)} for n in range(1_050)]
        with engine.begin() as connection:
            connection.execute(table.insert(), rows)
            found = connection.execute(select(table).order_by(table.c.id)).mappings().all()
        assert found == rows

    def test_counts_of_changed_rows(self, engine: sa.Engine, filled: sa.Table) -> None:
        with engine.begin() as connection:
            assert connection.execute(filled.update().where(filled.c.id < 10).values(name="x")).rowcount == 10
            assert connection.execute(filled.delete().where(filled.c.name == "x")).rowcount == 10
            assert connection.execute(text("INSERT INTO numbers (id) VALUES (1), (2)")).rowcount == 2

    def test_returning(self, engine: sa.Engine, filled: sa.Table) -> None:
        with engine.begin() as connection:
            new = connection.execute(filled.insert().values(id=-1, name="new").returning(filled)).all()
            gone = connection.execute(filled.delete().where(filled.c.id < 2).returning(filled.c.name)).scalars().all()
        assert new == [(-1, "new")]
        assert sorted(gone) == ["0", "1", "new"]

    def test_on_conflict(self, engine: sa.Engine, filled: sa.Table) -> None:
        statement = insert(filled)
        keep = statement.on_conflict_do_nothing(index_elements=["id"])
        replace = statement.on_conflict_do_update(index_elements=["id"], set_={"name": statement.excluded.name})
        with engine.begin() as connection:
            connection.execute(keep, {"id": 1, "name": "ignored"})
            connection.execute(replace, [{"id": 2, "name": "two"}, {"id": -2, "name": "minus two"}])
            found = connection.execute(select(filled).where(filled.c.id.in_([-2, 1, 2])).order_by(filled.c.id)).all()
        assert found == [(-2, "minus two"), (1, "1"), (2, "two")]

    def test_integrity_errors(self, engine: sa.Engine, filled: sa.Table) -> None:
        with engine.connect() as connection:
            for row in ({"id": 1, "name": "again"}, {"id": None, "name": "no id"}):
                with pytest.raises(exc.IntegrityError):
                    connection.execute(text("INSERT INTO numbers VALUES (:id, :name)"), row)
                connection.rollback()
            assert connection.scalar(select(func.count()).select_from(filled)) == 5_000

    def test_errors_of_other_kinds(self, engine: sa.Engine) -> None:
        with engine.connect() as connection:
            for statement, error in {
                "SELEC 1": exc.ProgrammingError,
                "SELECT * FROM nowhere": exc.ProgrammingError,
                "SELECT 'x'::INTEGER": exc.DataError,
            }.items():
                with pytest.raises(error):
                    connection.execute(text(statement)).all()
                connection.rollback()

    def test_an_integer_key_numbers_itself(self, engine: sa.Engine) -> None:
        table = sa.Table("auto", MetaData(), sa.Column("id", sa.Integer, primary_key=True), sa.Column("x", sa.Integer))
        table.create(engine)
        with engine.begin() as connection:
            assert connection.execute(table.insert().values(x=5)).inserted_primary_key == (1,)
            ids = connection.execute(
                table.insert().returning(table.c.id, sort_by_parameter_order=True), [{"x": x} for x in range(900)]
            )
            assert ids.scalars().all() == list(range(2, 902))
            assert connection.scalars(select(table.c.x).order_by(table.c.id)).all() == [5, *range(900)]
        table.drop(engine)
        table.create(engine)
        with engine.begin() as connection:
            assert connection.execute(table.insert().values(x=5)).inserted_primary_key == (1,)

    def test_sequences(self, engine: sa.Engine) -> None:
        numbered = sa.Sequence("ticket", start=10, increment=5)
        column = sa.Column("id", sa.Integer, numbered, server_default=numbered.next_value(), primary_key=True)
        table = sa.Table("tickets", MetaData(), column, sa.Column("name", sa.String))
        table.metadata.create_all(engine)
        with engine.begin() as connection:
            assert connection.scalar(numbered) == 10
            connection.execute(table.insert(), [{"name": "a"}, {"name": "b"}])
            assert connection.execute(select(table).order_by(table.c.id)).all() == [(15, "a"), (20, "b")]

    def test_savepoints_are_refused(self, engine: sa.Engine, filled: sa.Table) -> None:
        """With a reason, and without harm to the transaction."""
        with engine.begin() as connection:
            connection.execute(filled.delete().where(filled.c.id == 0))
            with pytest.raises(exc.InvalidRequestError, match="no savepoints"):
                connection.begin_nested()
            connection.execute(filled.delete().where(filled.c.id == 1))
        with engine.connect() as connection:
            assert connection.scalar(select(func.min(filled.c.id))) == 2

    def test_arrow_in_a_transaction(self, engine: sa.Engine, filled: sa.Table) -> None:
        data = pa.table({"name": ["a", "b"], "id": [-2, -1]})
        with engine.connect() as connection:
            for finish in (connection.rollback, connection.commit):
                connection.execute(filled.insert().values(id=-3, name="before"))
                connection.connection.driver_connection.register("arrow_data", data)
                connection.exec_driver_sql("INSERT INTO numbers BY NAME SELECT * FROM arrow_data")
                connection.connection.driver_connection.unregister("arrow_data")
                finish()
                kept = connection.execute(select(filled).where(filled.c.id < 0).order_by(filled.c.id)).all()
                assert kept == ([] if finish == connection.rollback else [(-3, "before"), (-2, "a"), (-1, "b")])

    def test_readers_and_a_writer_in_threads(self, engine: sa.Engine, filled: sa.Table) -> None:
        """Each reader sees one state in a transaction: the rows that the writer inserts come by hundreds."""
        done = threading.Event()

        def write() -> None:
            for hundred in range(50, 60):
                with engine.begin() as connection:
                    connection.execute(filled.insert(), [{"id": hundred * 100 + n, "name": "w"} for n in range(100)])
            done.set()

        def read() -> list[tuple[int, int]]:
            seen = []
            while True:
                last = done.is_set()
                with engine.connect() as connection:
                    rows = connection.execute(select(filled.c.id)).all()
                    seen.append((len(rows), connection.scalar(select(func.count()).select_from(filled))))
                if last:
                    return seen

        with ThreadPoolExecutor(5) as threads:
            readers = [threads.submit(read) for _ in range(4)]
            threads.submit(write).result()
            for reader in readers:
                seen = reader.result()
                assert all(rows == count and count % 100 == 0 for rows, count in seen)
                assert seen == sorted(seen)
                assert seen[-1] == (6_000, 6_000)

    # -- reflection ---------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("name", TYPES)
    def test_reflected_types_are_duckdbs(self, engine: sa.Engine, name: str) -> None:
        """They are written as DuckDB writes them, so a table made from its reflection is the same."""
        with engine.begin() as connection:
            connection.execute(text(f"CREATE TABLE original (value {name})"))
            [column] = inspect(connection).get_columns("original")
            sa.Table("copied", MetaData(), sa.Column("value", column["type"])).create(connection)
            declared = connection.execute(text("SELECT data_type FROM duckdb_columns() WHERE NOT internal")).scalars()
            assert set(declared) == {name}

    def test_reflected_tables(self, engine: sa.Engine) -> None:
        with engine.begin() as connection:
            for statement in SCHEMA.split(";"):
                connection.execute(text(statement))
        inspector = inspect(engine)
        assert inspector.get_table_names() == ["author", "book"]
        assert inspector.get_view_names() == ["titles"]
        assert inspector.get_table_names(schema="other") == ["author"]
        assert {"main", "other"} <= set(inspector.get_schema_names())
        assert inspector.has_table("titles")
        assert not inspector.has_table("title")
        assert "SELECT" in inspector.get_view_definition("titles")
        columns = {column["name"]: column for column in inspector.get_columns("book")}
        assert list(columns) == ["isbn", "author_id", "title", "price"]
        assert [column["nullable"] for column in columns.values()] == [False, False, True, True]
        assert columns["title"]["default"] == "'untitled'"
        assert not columns["author_id"]["autoincrement"]
        assert columns["price"]["comment"] == "in euros"
        assert inspector.get_table_comment("book") == {"text": "what we sell"}
        assert inspector.get_pk_constraint("book")["constrained_columns"] == ["isbn", "author_id"]
        assert inspector.get_pk_constraint("titles")["constrained_columns"] == []
        [foreign] = inspector.get_foreign_keys("book")
        assert foreign["constrained_columns"] == ["author_id"]
        assert (foreign["referred_table"], foreign["referred_columns"]) == ("author", ["id"])
        assert [unique["column_names"] for unique in inspector.get_unique_constraints("book")] == [["title", "price"]]
        assert [check["sqltext"] for check in inspector.get_check_constraints("book")] == ["(price > 0)"]
        [by_expression, by_title] = sorted(inspector.get_indexes("book"), key=lambda index: index["name"])
        assert (by_title["name"], by_title["column_names"], by_title["unique"]) == ("by_title", ["title"], True)
        assert by_expression["column_names"] == [None, "price"]
        with pytest.raises(exc.NoSuchTableError):
            inspector.get_columns("title")

    def test_a_reflected_schema_can_be_made_again(self, engine: sa.Engine, owner: duckdb.DuckDBPyConnection) -> None:
        with engine.begin() as connection:
            for statement in SCHEMA.split(";"):
                connection.execute(text(statement))
        metadata = MetaData()
        metadata.reflect(engine)
        assert [table.name for table in metadata.sorted_tables] == ["author", "book"]
        with duckdb.connect() as other:
            copy = engine_over(other)
            metadata.create_all(copy)
            again = MetaData()
            again.reflect(copy)
            for declared in (
                "SELECT table_name, column_name, data_type, is_nullable, column_default FROM duckdb_columns() "
                "WHERE schema_name = 'main' AND table_name IN ('author', 'book') ORDER BY ALL",
                "SELECT table_name, constraint_type, constraint_column_names, expression, referenced_table "
                "FROM duckdb_constraints() WHERE schema_name = 'main' ORDER BY ALL",
                "SELECT index_name, is_unique, expressions FROM duckdb_indexes() ORDER BY ALL",
            ):
                assert other.execute(declared).fetchall() == owner.execute(declared).fetchall()
            copy.dispose()

    def test_a_numbered_key_is_reflected(self, engine: sa.Engine) -> None:
        table = sa.Table("auto", MetaData(), sa.Column("id", sa.Integer, primary_key=True), sa.Column("x", sa.Integer))
        table.create(engine)
        table = sa.Table("auto", MetaData(), autoload_with=engine)
        assert table.autoincrement_column is table.c.id
        for _ in range(2):
            with engine.begin() as connection:
                assert connection.execute(table.insert().values(x=5)).inserted_primary_key == (1,)
            table.drop(engine)
            table.create(engine)

    # -- tools --------------------------------------------------------------------------------------------------------

    def test_objects(self, engine: sa.Engine) -> None:
        class Base(DeclarativeBase):
            pass

        class Author(Base):
            __tablename__ = "author"
            id: Mapped[int] = mapped_column(primary_key=True)
            name: Mapped[str]
            books: Mapped[list[Book]] = relationship(back_populates="author", order_by="Book.title")

        class Book(Base):
            __tablename__ = "book"
            id: Mapped[int] = mapped_column(primary_key=True)
            title: Mapped[str | None]
            price: Mapped[Decimal]
            author_id: Mapped[int] = mapped_column(sa.ForeignKey("author.id"))
            author: Mapped[Author] = relationship(back_populates="books")

        Author.__annotations__["books"] = Mapped[list[Book]]
        Base.metadata.create_all(engine)
        with Session(engine) as session, session.begin():
            session.add(
                Author(name="Le Guin", books=[Book(title=t, price=Decimal("7.50")) for t in ("Lavinia", "Gifts")])
            )
            session.add(Author(name="Lem", books=[Book(title="Solaris", price=Decimal("9.99"))]))
        with Session(engine) as session, session.begin():
            author = session.scalars(select(Author).join(Book).where(Book.title == "Gifts")).one()
            assert [book.title for book in author.books] == ["Gifts", "Lavinia"]
            author.books[0].price += 1
            session.delete(author.books[1])
        with Session(engine) as session:
            totals = session.execute(
                select(Author.name, func.sum(Book.price)).join(Author.books).group_by(Author.name).order_by(Author.name)
            ).all()
        assert totals == [("Le Guin", Decimal("8.50")), ("Lem", Decimal("9.99"))]

    def test_pandas(self, engine: sa.Engine) -> None:
        frame = pd.DataFrame(
            {
                "n": [1, 2, 3],
                "x": [0.5, None, 1e-300],
                "name": ["a", None, "c"],
                "day": pd.to_datetime(["2024-01-01", None, "2024-02-29"]),
            }
        )
        assert frame.to_sql("frame", engine, index=False) == 3
        frame.to_sql("frame", engine, index=False, if_exists="append")
        both = pd.concat([frame, frame], ignore_index=True)
        got = pd.read_sql_table("frame", engine)
        pd.testing.assert_frame_equal(got, both, check_dtype=False)
        counted = pd.read_sql("SELECT count(*) AS n FROM frame WHERE n > 1", engine)
        assert counted["n"].tolist() == [4]
        chunks = list(
            pd.read_sql(text("SELECT n FROM frame WHERE n >= :least"), engine, params={"least": 2}, chunksize=3)
        )
        assert [chunk["n"].tolist() for chunk in chunks] == [[2, 3, 2], [3]]

    def test_table_valued_function(self, engine: sa.Engine) -> None:
        with engine.begin() as connection:
            connection.execute(
                text("CREATE MACRO firsts(k, start := 0) AS TABLE SELECT start + range AS n FROM range(k)")
            )
            firsts = func.firsts(3, 7).table_valued("n")
            assert connection.scalars(select(firsts.c.n).order_by(firsts.c.n)).all() == [7, 8, 9]

    def test_server_version(self, engine: sa.Engine) -> None:
        with engine.connect() as connection:
            version = connection.dialect.server_version_info
        assert version == tuple(int(part) for part in duckdb.__version__.split(".")[:3])


SCHEMA = """
CREATE TABLE author (id INTEGER PRIMARY KEY, name VARCHAR NOT NULL);
CREATE TABLE book (isbn VARCHAR, author_id INTEGER REFERENCES author (id), title VARCHAR DEFAULT 'untitled',
    price DECIMAL(8, 2) CHECK (price > 0), PRIMARY KEY (isbn, author_id), UNIQUE (title, price));
CREATE UNIQUE INDEX by_title ON book (title);
CREATE INDEX by_expression ON book (upper(title), price);
CREATE VIEW titles AS SELECT title FROM book;
COMMENT ON TABLE book IS 'what we sell';
COMMENT ON COLUMN book.price IS 'in euros';
CREATE SCHEMA other;
CREATE TABLE other.author (id INTEGER)
"""


# -- the driver -------------------------------------------------------------------------------------------------------


class TestDriver:
    """What only our driver promises."""

    @pytest.fixture(autouse=True)
    def _ours(self) -> None:
        if DIALECT != "semid":
            pytest.skip("another dialect was asked for")

    def test_rows_are_streamed(self, engine: sa.Engine) -> None:
        """Nobody could keep ten billion rows."""
        with engine.connect() as connection:
            result = connection.execute(text("SELECT range FROM range(10_000_000_000)"))
            assert result.scalars().fetchmany(3) == [0, 1, 2]

    def test_an_abandoned_result_says_so(self, engine: sa.Engine, filled: sa.Table) -> None:
        with engine.connect() as connection:
            result = connection.execute(select(filled))
            result.fetchone()
            connection.rollback()
            with pytest.raises(exc.OperationalError, match="Read it earlier"):
                result.all()
            whole = connection.execute(select(filled))
            whole.all()
            connection.rollback()

    def test_an_error_between_rows_is_raised_where_they_are_read(self, engine: sa.Engine) -> None:
        """Not by the statement that made the rest be read."""
        late = "SELECT CASE WHEN range = 5000000 THEN error('here') ELSE range END AS n FROM range(6000000)"
        with engine.connect() as connection:
            connection.exec_driver_sql("SET threads = 1")
            result = connection.execute(text(f"SELECT n FROM ({late})"))
            assert result.fetchone() == (0,)
            with pytest.raises(exc.DBAPIError, match="aborted"):
                connection.execute(text("SELECT 1"))
            with pytest.raises(exc.DBAPIError, match="here"):
                result.all()

    def test_a_column_called_count_is_a_column(self, engine: sa.Engine) -> None:
        with engine.begin() as connection:
            assert connection.execute(text('SELECT 7 AS "Count"')).all() == [(7,)]
            assert not connection.execute(text("SET threads = 1")).returns_rows
            assert connection.execute(text("CREATE TABLE made AS SELECT 1 AS x")).rowcount == 1

    def test_numpy_values(self, engine: sa.Engine) -> None:
        with engine.connect() as connection:
            row = connection.execute(
                select(sa.literal(np.int64(5), sa.Integer), sa.literal(np.float32(0.5), sa.Double))
            )
            assert row.all() == [(5, 0.5)]

    def test_autocommit(self, engine: sa.Engine, filled: sa.Table) -> None:
        automatic = engine.execution_options(isolation_level="AUTOCOMMIT")
        with automatic.connect() as connection:
            assert connection.get_isolation_level() == "AUTOCOMMIT"
            connection.execute(text("CHECKPOINT"))
            connection.execute(filled.delete())
        with engine.connect() as connection:
            assert connection.get_isolation_level() == "SNAPSHOT"
            assert connection.scalar(select(func.count()).select_from(filled)) == 0

    def test_patterns_match_anywhere(self, engine: sa.Engine) -> None:
        """DuckDB 1.5 and 2 differ in what ``~`` means."""
        with engine.connect() as connection:
            word = sa.literal("residual")
            checks = [word.regexp_match("SID", flags="i"), word.regexp_match("SID"), ~word.regexp_match("sid")]
            assert connection.execute(select(*checks)).one() == (True, False, False)

    def test_for_update_is_refused(self, engine: sa.Engine, filled: sa.Table) -> None:
        with engine.connect() as connection, pytest.raises(exc.CompileError, match="no FOR UPDATE"):
            connection.execute(select(filled).with_for_update())

    @pytest.mark.parametrize(
        ("text_", "type_"),
        [
            ("FLOAT[384]", Array(sa.REAL(), 384)),
            ("UTINYINT[]", Array(SizedInteger("UTINYINT"))),
            ("DECIMAL(10,2)[3][]", Array(Array(sa.DECIMAL(10, 2), 3))),
            ("STRUCT(a INTEGER[3])", Other("STRUCT(a INTEGER[3])")),
        ],
    )
    def test_types_that_sqlalchemy_lacks(self, text_: str, type_: sa.types.TypeEngine[Any]) -> None:
        assert repr(parse_type(text_)) == repr(type_)

    def test_arrays_in_expressions(self, engine: sa.Engine) -> None:
        table = sa.Table("vectors", MetaData(), sa.Column("id", sa.Integer), sa.Column("v", Array(sa.REAL(), 3)))
        table.create(engine)
        with engine.begin() as connection:
            connection.execute(table.insert(), [{"id": 1, "v": [0, 3, 4]}, {"id": 2, "v": np.ones(3, np.float32)}])
            query = sa.literal(np.zeros(3), table.c.v.type)
            near = select(table.c.v, table.c.v[2], func.array_distance(table.c.v, query)).order_by(table.c.id)
            assert connection.execute(near).all() == [
                ((0.0, 3.0, 4.0), 3.0, 5.0),
                ((1.0, 1.0, 1.0), 1.0, pytest.approx(3**0.5, rel=1e-6)),
            ]


# -- an index ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def index(index_file: Path) -> Iterator[semid.SemanticIndex]:
    with semid.open(index_file) as index:
        yield index


SHAPES: dict[str, dict[str, Any]] = {
    "usual": {"levels": 4, "codebook_size": 8},
    "mixed": {"levels": 3, "codebook_size": [20, 3, 7]},
    "long": {"levels": 12, "codebook_size": [40, *[64] * 10, 5]},
    "half": {"levels": 2, "codebook_size": 16, "vectors": "float16", "metric": "cosine"},
    "bytes": {"levels": 2, "codebook_size": 16, "vectors": "int8"},
    "codes only": {"levels": 2, "codebook_size": 16, "vectors": "none"},
}


@pytest.fixture(params=SHAPES, scope="module")
def shaped(
    request: pytest.FixtureRequest, clustered: Callable[..., NDArray[np.float32]]
) -> Iterator[semid.SemanticIndex]:
    """Indexes of 500 items, of many shapes."""
    vectors = clustered(500, 6)
    with semid.create(dim=6, **SHAPES[request.param]) as index:
        index.train(vectors)
        index.add(vectors, ids=[f"item {n}" for n in range(500)], metadata={"n": range(500)})
        yield index


def codes_of(index: semid.SemanticIndex) -> dict[str, tuple[int, ...]]:
    """The codes of each item, from its text ID."""
    found = index.sql("SELECT id, semantic_id FROM semantic_ids").fetchall()
    return {id: tuple(int(code) for code in text.split("-")) for id, text in found}


class TestTables:
    def test_they_are_what_is_in_the_file(self, shaped: semid.SemanticIndex) -> None:
        found = tables_of(shaped.engine())
        assert set(found) == {
            name for name in tables.COLUMNS if shaped.config.vectors != "none" or name != "semid_vectors"
        }
        for name, table in found.items():
            described = {column: type_ for column, type_, *_ in shaped.sql(f"DESCRIBE {name}").fetchall()}
            assert {c.name: c.type.compile(shaped.engine().dialect) for c in table.columns} == described

    def test_values_are_what_is_in_the_file(self, shaped: semid.SemanticIndex) -> None:
        with shaped.engine().connect() as connection:
            for name, table in tables_of(connection).items():
                rows = connection.execute(select(table).order_by(*table.columns)).all()
                assert rows == shaped.sql(f"FROM {name} ORDER BY ALL").fetchall()

    def test_before_training(self) -> None:
        with semid.create(dim=3) as index:
            assert set(tables_of(index.engine())) == {"semid_meta", "semid_array"}

    def test_joins_need_no_condition(self, index: semid.SemanticIndex) -> None:
        found = tables_of(index.engine())
        ids, items = found["semantic_ids"], found["items"]
        with index.engine().connect() as connection:
            query = select(ids.c.semantic_id, items.c.word).join_from(ids, items).where(items.c.number == 7)
            assert connection.execute(query).all() == [(index.get([7])["semantic_id"][0].as_py(), "word 7")]

    def test_a_bi_tool_sees_everything(self, index: semid.SemanticIndex) -> None:
        """As such tools do: schemas, then tables and views, then all about each of them, and its first rows."""
        inspector = inspect(index.engine())
        assert inspector.default_schema_name == "main"
        assert inspector.get_schema_names() == ["main"]
        seen = {}
        with index.engine().connect() as connection:
            for name in inspector.get_table_names("main") + inspector.get_view_names("main"):
                columns = inspector.get_columns(name, schema="main")
                seen[name] = [column["name"] for column in columns]
                assert inspector.get_pk_constraint(name, schema="main").keys() >= {"name", "constrained_columns"}
                assert inspector.get_foreign_keys(name, schema="main") == []
                assert inspector.get_indexes(name, schema="main") == []
                assert inspector.get_unique_constraints(name, schema="main") == []
                for column in columns:
                    str(column["type"])
                table = sa.Table(name, MetaData(), schema="main", autoload_with=connection)
                rows = connection.execute(select(table).limit(5)).mappings().all()
                no_rows = name in ("semid_history", "semid_map")  # no item was deleted or got another ID
                assert [list(row) for row in rows[:1]] == ([] if no_rows else [seen[name]])
        assert seen.keys() == tables.COLUMNS.keys()
        assert seen["items"] == ["id", "number", "word"]
        assert inspector.get_pk_constraint("semid_codes")["constrained_columns"] == ["id"]
        frame = pd.read_sql_table("semantic_ids", index.engine(), index_col="id")
        assert frame.loc[7, "semantic_id"] == index.get([7])["semantic_id"][0].as_py()
        assert len(frame) == len(index)


class TestPrefix:
    def test_over_sids_and_texts(self, shaped: semid.SemanticIndex) -> None:
        """At every depth, the items that the codes say: from tables, aliases and subqueries, and from text."""
        ids = tables_of(shaped.engine())["semantic_ids"]
        alias, subquery = ids.alias(), select(ids).subquery()
        every = codes_of(shaped)
        chosen = list(every.values())[::199]
        with shaped.engine().connect() as connection:
            for codes_ in chosen:
                for depth in range(len(codes_) + 1)[:: -(-len(codes_) // 4)]:
                    start = codes_[:depth]
                    wanted = sorted(id for id, item in every.items() if item[:depth] == start)
                    for source in (ids, alias, subquery):
                        assert (
                            connection.scalars(
                                select(source.c.id).where(prefix(source.c.sid, start)).order_by("id")
                            ).all()
                            == wanted
                        )
                    text_form = "-".join(map(str, start))
                    for form in (text_form, f"{text_form}-*" if start else "*"):
                        found = select(ids.c.id).where(prefix(ids.c.semantic_id, form)).order_by(ids.c.id)
                        assert connection.scalars(found).all() == wanted
                        assert (
                            connection.scalars(select(ids.c.id).where(prefix(ids.c.sid, form)).order_by("id")).all()
                            == wanted
                        )

    def test_over_a_text_of_ones_own(self, engine: sa.Engine) -> None:
        table = sa.Table("mine", MetaData(), sa.Column("code", sa.String))
        table.create(engine)
        with engine.begin() as connection:
            connection.execute(
                table.insert(), [{"code": code} for code in ("12", "12-3", "12-3-4", "12-34", "112-3", None)]
            )
            found = connection.scalars(select(table.c.code).where(prefix(table.c.code, "12-3")).order_by(table.c.code))
            assert found.all() == ["12-3", "12-3-4"]

    def test_row_groups_are_skipped(self, engine: sa.Engine) -> None:
        """DuckDB opens the row group that the range lies in, not the others."""
        table = sa.Table("big", MetaData(), sa.Column("sid", Sid(codes.CodeLayout((256, 256, 256)))))
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE big AS SELECT range AS sid FROM range(1_000_000)"))
            query = select(func.count()).where(prefix(table.c.sid, "4-87"))
            assert connection.scalar(query) == 256
            compiled = query.compile(connection)
            values = tuple(compiled.params[name] for name in compiled.positiontup)
            [(_, plan)] = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT json) {compiled}", values).all()
        scanned = [int(rows) for rows in re.findall(r'"(?:operator_)?rows_scanned": (\d+)', plan)]
        assert 256 <= max(scanned) <= 122_880

    def test_what_is_refused(self, index: semid.SemanticIndex) -> None:
        ids = tables_of(index.engine())["semantic_ids"]
        with pytest.raises(InvalidCodesError, match="outside 0 to 15"):
            prefix(ids.c.sid, "16")
        with pytest.raises(InvalidCodesError, match="is no prefix"):
            prefix(ids.c.semantic_id, "1-x")
        with pytest.raises(InvalidCodesError, match="3 levels"):
            prefix(ids.c.sid, (1, 2, 3, 4))
        with pytest.raises(InvalidArgumentError, match="holds no semantic IDs"):
            prefix(ids.c.c1, "1")

    def test_deep_levels_need_their_columns(self) -> None:
        layout = codes.CodeLayout((65_536,) * 4)
        bare = sa.table("bare", sa.column("sid", Sid(layout)))
        prefix(bare.c.sid, (1, 2, 3))
        with pytest.raises(InvalidCodesError, match="ends before level 4"):
            prefix(bare.c.sid, (1, 2, 3, 4))

    def test_an_index_without_prefixes_has_none(self, vectors: NDArray[np.float32]) -> None:
        with semid.create(dim=24, quantizer="pq", levels=4, codebook_size=16) as index:
            index.train(vectors)
            index.add(vectors)
            with pytest.raises(InvalidArgumentError, match="holds no semantic IDs"):
                prefix(tables_of(index.engine())["semantic_ids"].c.sid, "1")


class TestCommonPrefixLen:
    def test_of_columns_and_ids(self, shaped: semid.SemanticIndex) -> None:
        ids = tables_of(shaped.engine())["semantic_ids"]
        other = ids.alias()
        every = codes_of(shaped)
        chosen = list(every.items())[::125]
        with shaped.engine().connect() as connection:
            for id, item in chosen:
                wanted = dict(
                    zip(every, codes.common_prefix_length(list(every.values()), [item]).tolist(), strict=True)
                )
                column = connection.execute(
                    select(ids.c.id, common_prefix_len(ids.c.sid, other.c.sid)).join(other, other.c.id == id)
                )
                assert dict(column.all()) == wanted
                for form in (item, "-".join(map(str, item))):
                    literal = connection.execute(select(ids.c.id, common_prefix_len(form, ids.c.sid)))
                    assert dict(literal.all()) == wanted
                first = connection.execute(select(ids.c.id, common_prefix_len(ids.c.sid, item[:1])))
                assert dict(first.all()) == {id: min(length, 1) for id, length in wanted.items()}

    def test_what_is_refused(self, index: semid.SemanticIndex) -> None:
        ids = tables_of(index.engine())["semantic_ids"]
        for a, b in [("1-2", "1-3"), (ids.c.sid, ids.c.semantic_id), (ids.c.c1, "1")]:
            with pytest.raises(InvalidArgumentError, match="takes the column sid"):
                common_prefix_len(a, b)
        with pytest.raises(InvalidArgumentError, match="different shapes"):
            common_prefix_len(ids.c.sid, sa.column("sid", Sid(codes.CodeLayout((4, 4)))))


class TestEngine:
    def test_search_from_sql(self, index: semid.SemanticIndex, queries: NDArray[np.float32]) -> None:
        """The macro gives what the index finds, joined with the metadata."""
        items = tables_of(index.engine())["items"]
        vector_type = Array(sa.REAL(), 24)
        with index.engine().connect() as connection:
            for query in queries[:5]:
                hits = func.semid_search_exact(sa.literal(query, vector_type), 5).table_valued(
                    "id", "semantic_id", "distance"
                )
                found = connection.execute(
                    select(hits.c.id, hits.c.distance, items.c.word)
                    .join(items, items.c.id == hits.c.id)
                    .order_by("distance")
                ).all()
                wanted = index.search(query, k=5, exact=True)
                assert [id for id, *_ in found] == wanted.ids.tolist()
                assert [distance for _, distance, _ in found] == pytest.approx(wanted.distances.tolist(), rel=1e-4)
                assert [word for *_, word in found] == [f"word {id}" for id in wanted.ids]

    def test_mapped_classes(self, index: semid.SemanticIndex) -> None:
        class Base(DeclarativeBase):
            metadata = MetaData()

        found = tables_of(index.engine(), Base.metadata)

        class Item(Base):
            __table__ = found["items"]

        class Name(Base):
            __table__ = found["semantic_ids"]
            item: Mapped[Item] = relationship(Item)

        class Vote(Base):
            __tablename__ = "vote"
            id: Mapped[int] = mapped_column(primary_key=True)
            item_id: Mapped[int]
            stars: Mapped[int]

        Base.metadata.create_all(index.engine())
        shelf = index.tree()[0].text.removesuffix("-*")
        wanted = index.prefix(shelf)["id"].to_pylist()
        with Session(index.engine()) as session:
            session.add_all([Vote(item_id=id, stars=id % 5) for id in range(100)])
            session.commit()
            names = session.scalars(select(Name).where(prefix(Name.sid, shelf)).order_by(Name.id)).all()
            assert [name.id for name in names] == sorted(wanted)
            assert names[0].item.word == f"word {names[0].id}"
            stars = select(func.sum(Vote.stars)).join(Name, Name.id == Vote.item_id).where(prefix(Name.sid, shelf))
            assert session.scalar(stars) == sum(id % 5 for id in wanted if id < 100)
            other = aliased(Name)
            near = select(func.count()).where(Name.id == 7, other.id != 7, common_prefix_len(Name.sid, other.sid) >= 2)
            every = codes_of(index)
            assert session.scalar(near) == sum(every[id][:2] == every[7][:2] for id in every) - 1
            session.get(Item, 7).word = "changed"
            session.commit()
        assert index.get([7])["word"].to_pylist() == ["changed"]

    def test_insert_arrow(self, engine: sa.Engine, filled: sa.Table) -> None:
        count = select(func.count()).select_from(filled)
        data = pa.table({"name": ["a", None], "id": pa.array([-1, -2], pa.int8())})
        with engine.connect() as connection:
            assert insert_arrow(connection, filled, data) == 2
            connection.rollback()
            assert connection.scalar(count) == 5_000
            connection.rollback()
            open_result = connection.execute(select(filled.c.id).order_by(filled.c.id))
            assert open_result.fetchone() == (0,)
            assert insert_arrow(connection, filled, data.to_reader()) == 2
            assert insert_arrow(connection, filled, pd.DataFrame({"id": [-3]})) == 1
            connection.commit()
            assert len(open_result.all()) == 4_999
            with pytest.raises(exc.IntegrityError):
                insert_arrow(connection, filled, data)
            connection.rollback()
            with pytest.raises(exc.ProgrammingError, match="nowhere"):
                insert_arrow(connection, filled, pa.table({"nowhere": [1]}))
            connection.rollback()
            found = connection.execute(select(filled).where(filled.c.id < 0).order_by(filled.c.id)).all()
        assert found == [(-3, None), (-2, None), (-1, "a")]

    def test_inserted_data_is_let_go(self, engine: sa.Engine, filled: sa.Table) -> None:
        """Also after an error: nothing keeps the memory, and no name stays behind."""
        before = pa.total_allocated_bytes()
        with engine.connect() as connection:
            for _ in range(2):
                with pytest.raises(exc.IntegrityError):
                    insert_arrow(
                        connection,
                        filled,
                        pa.table({"id": np.zeros(1_000_000, np.int64)}).cast(pa.schema({"id": pa.int32()})),
                    )
                connection.rollback()
                gc.collect()  # the error knows the frames, and they the data
                assert pa.total_allocated_bytes() - before < 1_000_000
            with pytest.raises(exc.ProgrammingError, match="semid_batch"):
                connection.execute(text("FROM semid_batch"))

    def test_filters_see_what_was_written(self, index: semid.SemanticIndex, queries: NDArray[np.float32]) -> None:
        items = tables_of(index.engine())["items"]
        assert len(index.search(queries[0], k=5, where={"word": "chosen"}).ids) == 0
        with index.engine().begin() as connection:
            connection.execute(items.update().where(items.c.id.in_([3, 5])).values(word="chosen"))
        assert sorted(index.search(queries[0], k=5, where={"word": "chosen"}).ids.tolist()) == [3, 5]

    def test_the_dialect_is_registered(self) -> None:
        """By the package's metadata, for tools that never import it."""
        settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
        module, _, name = settings["project"]["entry-points"]["sqlalchemy.dialects"]["semid"].partition(":")
        assert getattr(importlib.import_module(module), name) is sa.create_engine("semid://").dialect.__class__

    def test_there_is_one_engine(self, index: semid.SemanticIndex) -> None:
        assert index.engine() is index.engine()

    def test_in_memory(self, vectors: NDArray[np.float32]) -> None:
        """Other threads see the same database."""
        with semid.create(dim=24, levels=2, codebook_size=8) as index:
            index.train(vectors)
            index.add(vectors)

            def count() -> int:
                with index.engine().connect() as connection:
                    return connection.scalar(text("SELECT count(*) FROM semantic_ids"))

            with ThreadPoolExecutor(4) as threads:
                assert [future.result() for future in [threads.submit(count) for _ in range(8)]] == [2_000] * 8

    def test_many_connections_at_once(self, index: semid.SemanticIndex) -> None:
        connections = [index.engine().connect() for _ in range(40)]
        assert [connection.scalar(text("SELECT 1")) for connection in connections] == [1] * 40
        for connection in connections:
            connection.close()

    def test_adding_items_while_others_read(self, index: semid.SemanticIndex, vectors: NDArray[np.float32]) -> None:
        """A transaction sees each addition whole or not at all, in all tables alike."""
        done = threading.Event()
        query = text("SELECT (SELECT count(*) FROM semantic_ids), (SELECT count(*) FROM items)")

        def read() -> list[tuple[int, int]]:
            seen = []
            while not done.is_set():
                with index.engine().connect() as connection:
                    seen.append(connection.execute(query).one())
            return seen

        with ThreadPoolExecutor(2) as threads:
            readers = [threads.submit(read) for _ in range(2)]
            try:
                for _ in range(3):
                    index.add(vectors[:500])
            finally:
                done.set()
            for reader in readers:
                assert set(reader.result()) <= {(n, n) for n in range(2_000, 4_000, 500)}
        with index.engine().connect() as connection:
            assert connection.execute(query).one() == (3_500, 3_500)

    def test_read_only(self, index_file: Path) -> None:
        with semid.open(index_file, read_only=True) as index, index.engine().connect() as connection:
            assert connection.scalar(text("SELECT count(*) FROM items")) == 2_000
            for statement in ("DELETE FROM items", "CREATE TABLE mine (x INTEGER)"):
                with pytest.raises(exc.ProgrammingError, match="read-only mode"):
                    connection.execute(text(statement))
                connection.rollback()

    def test_after_the_index_was_closed(self, index_file: Path) -> None:
        index = semid.open(index_file)
        engine = index.engine()
        with engine.connect() as connection:
            result = connection.execute(text("SELECT * FROM items"))
            result.fetchone()
            index.close()
            with pytest.raises(IndexClosedError, match="Open it again"):
                connection.execute(text("SELECT 1"))
            with pytest.raises(exc.DBAPIError):
                result.all()
        with pytest.raises(IndexClosedError, match="Open it again"), engine.connect():
            pass
        with pytest.raises(IndexClosedError), index.engine().connect():
            pass
        index_file.unlink()

    def test_closing_gives_the_file_back(self, index_file: Path, run_python: Callable[..., str]) -> None:
        with semid.open(index_file) as index, index.engine().connect() as connection:
            connection.execute(text("SELECT 1"))
        count = "import duckdb, sys; print(duckdb.connect(sys.argv[1]).sql('FROM items').shape[0])"
        assert run_python(count, index_file) == "2000\n"

    def test_by_url(self, index_file: Path) -> None:
        engine = sa.create_engine(f"semid:///{index_file}")
        with semid.open(index_file) as index, engine.connect() as connection:  # one file, the same settings
            assert prefix_counts(connection) == prefix_counts(index.engine().connect())
        engine.dispose()
        reading = sa.create_engine(f"semid:///{index_file}?read_only=true")
        with reading.connect() as connection, pytest.raises(exc.ProgrammingError, match="read-only mode"):
            connection.execute(text("DELETE FROM items"))
        reading.dispose()

    def test_urls_that_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidArgumentError, match="needs the path"):
            sa.create_engine("semid://").connect()
        with pytest.raises(InvalidArgumentError, match="only option is read_only"):
            sa.create_engine(f"semid:///{tmp_path}/x?mode=rw").connect()
        with pytest.raises(IndexNotFoundError):
            sa.create_engine(f"semid:///{tmp_path}/x").connect()


def prefix_counts(connection: sa.Connection) -> list[tuple[int, int]]:
    """How many items there are below each first code."""
    return connection.execute(text("SELECT c1, count(*) FROM semantic_ids GROUP BY ALL ORDER BY ALL")).all()
