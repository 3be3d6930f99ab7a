"""Conditions of SQLAlchemy as filters: each selects what the same condition in a query of SQLAlchemy selects."""

from __future__ import annotations

import datetime
import enum
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
from sqlalchemy import (
    Boolean,
    Column,
    Enum,
    Integer,
    MetaData,
    Table,
    and_,
    bindparam,
    case,
    cast,
    column,
    exists,
    extract,
    false,
    func,
    literal_column,
    or_,
    select,
    text,
    true,
    tuple_,
    type_coerce,
    types,
)
from sqlalchemy.orm import DeclarativeBase, aliased

import semid_index as semid
from semid_index.errors import FilterError
from semid_index.index import SemanticIndex
from semid_index.sql import prefix, tables

N = 500
SECTIONS = ["games", "mail", "50%", "a_b", "o'clock", None]
DATE = datetime.date


class Size(enum.Enum):
    SMALL = 1
    LARGE = 2


class Doubled(types.TypeDecorator[int]):
    """Stores twice the number that Python sees."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Any) -> int | None:
        return None if value is None else 2 * value


@pytest.fixture(scope="module")
def index(clustered: Any) -> Iterator[SemanticIndex]:
    points, numbers = clustered(N, 8), np.arange(N)
    with semid.create(dim=8, levels=3, codebook_size=8) as index:
        index.train(points)
        index.add(
            points,
            metadata={
                "section": [SECTIONS[number % 6] for number in numbers],
                "number": numbers,
                "x": numbers / 7,
                "ok": [None if number % 5 == 0 else bool(number % 2) for number in numbers],
                "day": [DATE(2024, 1, 1) + datetime.timedelta(days=int(number)) for number in numbers],
                "size": ["SMALL" if number % 3 else "LARGE" for number in numbers],
                "Two Words": numbers % 4,
                "p1": numbers,  # like a column of semantic_ids
            },
        )
        yield index


@pytest.fixture(scope="module")
def found(index: SemanticIndex) -> Mapping[str, Table]:
    return tables(index.engine())


def ids_of(index: SemanticIndex, points: Any, where: Any) -> list[int]:
    return sorted(index.search(points, k=N, where=where).ids.tolist())


CONDITIONS: dict[str, Any] = {
    "the example": lambda i, s: (i.section == "games") & (i.number < 300),
    "or": lambda i, s: or_(i.section == "games", i.number < 30, false()),
    "not": lambda i, s: ~(i.number < 30),
    "in": lambda i, s: i.section.in_(["games", "o'clock", "nope"]),
    "not in": lambda i, s: i.section.not_in(["games", "o'clock"]),
    "many": lambda i, s: i.number.in_(list(range(100, 100_000))),
    "null": lambda i, s: i.section.is_(None),
    "equals none": lambda i, s: i.section != None,  # noqa: E711
    "distinct": lambda i, s: i.section.is_distinct_from("games"),
    "boolean": lambda i, s: i.ok,
    "not boolean": lambda i, s: ~i.ok,
    "is true": lambda i, s: i.ok.is_not(True),
    "between": lambda i, s: i.number.between(10, 20),
    "quoted name": lambda i, s: i["Two Words"] == 3,
    "like": lambda i, s: i.section.like("g%"),
    "not ilike": lambda i, s: i.section.not_ilike("%A%"),
    "startswith": lambda i, s: i.section.startswith("ga"),
    "endswith": lambda i, s: i.section.endswith("ck"),
    "contains": lambda i, s: i.section.contains("a"),
    "contains, escaped": lambda i, s: i.section.contains("%", autoescape=True),
    "escaped": lambda i, s: i.section.like("a!_b", escape="!"),
    "icontains": lambda i, s: i.section.icontains("M"),
    "regular expression": lambda i, s: i.section.regexp_match("^[a-m]+$"),
    "function": lambda i, s: func.lower(i.section) == "mail",
    "function alone": lambda i, s: func.starts_with(i.section, "ma"),
    "arithmetic": lambda i, s: (-i.number * 2 + 7) % 3 == 1,
    "division": lambda i, s: i.number / 2 == 3.5,
    "floor division": lambda i, s: i.number // 100 == 3,
    "cast": lambda i, s: cast(i.x, Integer) == 7,
    "case": lambda i, s: case((i.ok, i.number), else_=0) > 250,
    "coalesce": lambda i, s: func.coalesce(i.section, "none") == "none",
    "date": lambda i, s: i.day >= DATE(2025, 1, 1),
    "extract": lambda i, s: extract("month", i.day) == 2,
    "interval": lambda i, s: i.day + datetime.timedelta(days=10) > datetime.datetime(2025, 1, 1),
    "codes": lambda i, s: s.c1 == 3,
    "prefix": lambda i, s: prefix(s.sid, "3"),
    "both tables": lambda i, s: and_(s.c1 < 4, i.section == "mail"),
    "id": lambda i, s: s.id.in_([1, 2, 3]),
    "name alone": lambda i, s: column("section") == "mail",
    "bound": lambda i, s: i.number > bindparam("least", 250),
    "enum": lambda i, s: cast(i.size, Enum(Size, native_enum=False)) == Size.LARGE,
    "own type": lambda i, s: type_coerce(i.number, Doubled) == 21,
    "list of own type": lambda i, s: type_coerce(i.number, Doubled).in_([21, 3]),
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_selects_what_sqlalchemy_selects(index, found, clustered, name):
    items, ids = found["items"], found["semantic_ids"]
    condition = CONDITIONS[name](items.c, ids.c)
    query = select(items.c.id).join_from(ids, items).where(condition).order_by(items.c.id)
    with index.engine().connect() as connection:
        expected = list(connection.scalars(query))
    assert 0 < len(expected) < N
    assert ids_of(index, clustered(1, 8)[0], condition) == expected


def test_true_and_an_empty_list(index, found, clustered):
    items = found["items"].c
    assert len(ids_of(index, clustered(1, 8)[0], true())) == N
    assert ids_of(index, clustered(1, 8)[0], items.section.in_([])) == []
    assert len(ids_of(index, clustered(1, 8)[0], items.section.not_in([]))) == N


def test_attributes_of_mapped_classes(index, clustered):
    class Base(DeclarativeBase):
        pass

    class Item(Base):
        __table__ = tables(index.engine(), Base.metadata)["items"]

    query = clustered(1, 8)[0]
    assert ids_of(index, query, Item.number < 3) == [0, 1, 2]
    assert ids_of(index, query, Item.ok) == [number for number in range(N) if number % 5 and number % 2]
    with pytest.raises(FilterError, match=r"is not allowed in a filter\. Use columns of the tables"):
        index.search(query, where=aliased(Item).number < 3)


VOTES = Table("vote", MetaData(), Column("n", Integer), Column("items", Integer))
ELSEWHERE = Table("items", MetaData(), Column("number", Integer), schema="other")
REFUSED: dict[str, tuple[Any, str]] = {
    "another table": (lambda i, s: VOTES.c.n == 1, "'vote.n' is not allowed in a filter. Use columns of the tables"),
    "another schema": (lambda i, s: ELSEWHERE.c.number == 1, "'other.items.number' is not allowed"),
    "an alias": (lambda i, s: i.id.table.alias("a").c.id == 1, "'a.id' is not allowed"),
    "a hidden column": (lambda i, s: s.p1 == 1, "'semantic_ids.p1' is not allowed in a filter, because the metadata"),
    "a column that is not there": (lambda i, s: column("sectoin") == 1, "Did you mean 'section'?"),
    "a column for SQL only": (lambda i, s: s.semantic_id == "1-2-3", "No column 'semantic_id'"),
    "no condition": (lambda i, s: i.number, "'items.number' is no condition: compare it with something"),
    "a text": (lambda i, s: i.section + "x", "is no condition"),
    "a query": (lambda i, s: select(i.id), "got Select"),
    "a table": (lambda i, s: VOTES, "got Table"),
    "text()": (lambda i, s: text("1 = 1"), "got TextClause"),
    "a number": (lambda i, s: 3, "A filter is SQL text or a mapping, or a condition of SQLAlchemy"),
    "a list": (lambda i, s: [i.number == 3], "got list"),
    "a sub-query": (lambda i, s: i.id.in_(select(i.id)), "A sub-query is not allowed"),
    "exists": (lambda i, s: exists(select(i.id)), "A sub-query is not allowed"),
    "a sub-query of another table": (lambda i, s: i.id == select(VOTES.c.n).scalar_subquery(), "'vote.n'"),
    "code": (lambda i, s: literal_column("1; DROP TABLE items") == 1, "without ';'"),
    "a function": (lambda i, s: func.read_csv("x") == 1, "No function 'read_csv'"),
    "an operator": (lambda i, s: i.number.op("<<")(60) == 1, "The operator <<"),
    "concatenation": (lambda i, s: i.section + "x" == "gamesx", "The operator ||"),
    "a pattern of a column": (lambda i, s: i.section.startswith(i.size), "given as a constant or a parameter"),
    "many wildcards": (lambda i, s: i.section.like("%a%b%c%"), "at most 2 '%'"),
    "a row": (lambda i, s: tuple_(i.id, i.number).in_([(1, 2)]), "cannot be bound"),
    "a collation": (lambda i, s: i.section.collate("nocase") == "a", "COLLATE is not allowed"),
    "an aggregate": (lambda i, s: func.count(i.id) == 1, "No function 'count'"),
    "a window": (lambda i, s: func.row_number().over(order_by=i.id) == 1, "A window function is not allowed"),
    "no value": (lambda i, s: i.number == bindparam("n"), "The parameter 'n' has no value"),
    "a condition without value": (lambda i, s: bindparam("n", type_=Boolean), "The parameter 'n' has no value"),
    "None in a list": (lambda i, s: i.number.in_([1, None]), "has a None"),
    "what cannot be bound": (lambda i, s: i.number == bindparam("n", object(), type_=Integer), "cannot be bound"),
    "what cannot be compiled": (lambda i, s: i.section.match("x") & (i.x.op("?", is_comparison=True)(1)), "filter"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_is_no_condition_over_the_index(index, found, clustered, name):
    make, message = REFUSED[name]
    condition = make(found["items"].c, found["semantic_ids"].c)
    with pytest.raises(FilterError) as caught:
        index.search(clustered(1, 8)[0], where=condition)
    assert message in str(caught.value)


def test_a_condition_takes_no_params(index, found, clustered):
    with pytest.raises(FilterError, match="leave params out"):
        index.search(clustered(1, 8)[0], where=found["items"].c.number < 3, params=[3])


def test_filters_in_text_need_no_sqlalchemy(run_python, tmp_path, clustered):
    """It takes a while to import."""
    path = tmp_path / "plain.duckdb"
    with semid.create(path, dim=8, levels=2, codebook_size=8) as index:
        index.train(clustered(N, 8))
        index.add(clustered(N, 8))
    code = (
        "import sys, numpy, semid_index as semid\n"
        "with semid.open(sys.argv[1], read_only=True) as index:\n"
        "    hits = index.search(numpy.ones(8), where='id < 3')\n"
        "print(len(hits), 'sqlalchemy' in sys.modules)"
    )
    assert run_python(code, path).split() == ["3", "False"]
