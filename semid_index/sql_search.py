"""Searches in SQL that run in Python: temporary macros named like those in the file, over an open index.

The macros of the file search with nothing but SQL. Where the index is open in Python, macros of the same names can
hand their queries to its own search, many at a time: they call a function that DuckDB gives whole columns to.

The macros are temporary: a connection has them once it was given them, and they end with it. The function belongs to
the database that all connections of the process share, until the index is closed; its name has a number in it, because
several indexes may be open on one file. ``docs/sql.md`` says what users may expect.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary, ref

import numpy as np
from numpy.typing import NDArray

from semid_index.codes import unpack
from semid_index.errors import IndexClosedError, InvalidArgumentError, UnknownIdError
from semid_index.items import check_count
from semid_index.lookup import Probes
from semid_index.quantizer import Vectors
from semid_index.records import IdType, IndexConfig, SearchResult
from semid_index.rerank import (
    Distances,
    Executor,
    NumpyExecutor,
    Positions,
    ScanData,
    VectorsByPosition,
    candidates_of,
    smallest,
)
from semid_index.segments import SearchState, Segment, Snapshot
from semid_index.store import Store

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa

log = logging.getLogger("semid_index")

Column = Any  # of Arrow: DuckDB looks up what annotations name, and PyArrow is imported when it is needed

SEARCHES = ("semid_search", "semid_search_exact", "semid_search_many", "semid_similar")
"""The macros."""
_NAMES = re.compile(rf"\b(?:{'|'.join(SEARCHES)})\b", re.IGNORECASE)
_PASSED_ON = re.compile(r"executing the UDF: \w+Error: (?P<message>.+?)(\n\nAt:|\Z)", re.DOTALL)
_BLOCK = 65_536  # items decoded at once
_TINY = np.float32(1e-30)  # so that nothing is divided by a length of 0
_SQL_TYPES: dict[IdType, str] = {"int": "BIGINT", "str": "VARCHAR"}
# SQL over the hits that a call of the function gives; what it is called with stands where nothing hides a column
_HITS = """SELECT semid_found.hit.id AS id, semid_found.hit.semantic_id AS semantic_id,
         semid_found.hit.distance AS distance
  FROM (SELECT unnest({call}) AS hit) AS semid_found"""
_HITS_OF_MANY = """SELECT semid_found.qid AS qid, semid_found.hit.id AS id,
         semid_found.hit.semantic_id AS semantic_id, semid_found.hit.distance AS distance
  FROM (SELECT semid_t.qid AS qid, unnest({call}) AS hit FROM query_table(table_name) AS semid_t) AS semid_found
  ORDER BY semid_found.qid, semid_found.hit.distance"""


class Searched(Protocol):
    """What the functions need of an index."""

    @property
    def config(self) -> IndexConfig:
        """What the index is."""

    def search(self, query: Any, k: int = 10, *, probes: int | None = None, rerank: int | None = None) -> SearchResult:
        """The nearest items."""

    def _search_codes(self, query: Any, k: int, *, probes: int | None = None) -> SearchResult:
        """The items nearest by what their codes decode to."""

    def get(self, ids: Any, *, vectors: bool = False) -> pa.Table:
        """The items with these ids."""


def searches_in(query: str) -> set[str]:
    """The macros that a text of SQL may call."""
    return {name.lower() for name in _NAMES.findall(query)}


def plain_message(error: duckdb.Error) -> str:
    """What an error of DuckDB says; where it passes on one of ours, what that says."""
    passed_on = _PASSED_ON.search(str(error))
    return passed_on["message"] if passed_on else str(error)


class SqlSearch:
    """Lets connections search an open index. It does not keep the index open: that is for those who use it."""

    def __init__(self, index: Searched, store: Store, id_type: IdType) -> None:
        self.index = ref(index)
        self._owner = store.cursor()
        self._id_type = _SQL_TYPES[id_type]
        self._number = next(_numbers)
        _OPEN[self._number] = self
        for kind, (function, parameters) in _FUNCTIONS.items():
            self._owner.create_function(  # type: ignore[call-overload]  # it takes names as well as enums
                self._name(kind),
                function,
                [self._id_type if parameter == "id" else parameter for parameter in parameters],
                f"STRUCT(id {self._id_type}, semantic_id VARCHAR, distance FLOAT)[]",
                type="arrow",
                null_handling="special",
                side_effects=True,  # else prepared statements would keep what it gives for constants, past an add
            )

    def install(self, connection: duckdb.DuckDBPyConnection, searches: Iterable[str]) -> None:
        """Give a connection some of the macros, each of which takes DuckDB a millisecond."""
        connection.execute("; ".join(self._macros[name] for name in searches))

    def close(self) -> None:
        """Take the functions away again."""
        _OPEN.pop(self._number, None)
        for kind in _FUNCTIONS:
            self._owner.remove_function(self._name(kind))
        self._owner.close()

    def column(self, hits: list[_Hits], rows: int) -> pa.Array:
        """The hits of so many rows as a column that has a list of structs for each."""
        import pyarrow as pa  # heavy, and needed once something is searched for

        of_row = np.concatenate([np.empty(0, dtype=np.int64), *(part.rows for part in hits)])
        order = np.argsort(of_row, kind="stable")
        columns = {
            "id": pa.array([id for part in hits for id in part.ids.tolist()], _arrow_type(self._id_type)),
            "semantic_id": pa.array([text for part in hits for text in part.texts], pa.string()),
            "distance": pa.array([distance for part in hits for distance in part.distances], pa.float32()),
        }
        structs = pa.StructArray.from_arrays([column.take(pa.array(order)) for column in columns.values()], [*columns])
        ends = np.searchsorted(of_row[order], np.arange(rows + 1))
        return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), structs)

    def _name(self, kind: str) -> str:
        return f"semid_{kind}_in_python_{self._number}"

    @cached_property
    def _macros(self) -> dict[str, str]:
        """The statements that make them."""
        options, with_rerank = "k := 10, nprobe := NULL", "k := 10, nprobe := NULL, rerank := NULL"
        vector, counts = "query::FLOAT[]", "k::BIGINT, nprobe::BIGINT"
        search, similar = (f"{self._name(kind)}({self._number}" for kind in ("search", "similar"))
        parts = {
            "semid_search": (f"query, {options}", _HITS, f"{search}, 'semid_search', {vector}, {counts}, NULL)"),
            "semid_search_exact": (
                f"query, {with_rerank}",
                _HITS,
                f"{search}, 'semid_search_exact', {vector}, {counts}, rerank::BIGINT)",
            ),
            "semid_search_many": (
                f"table_name, {options}",
                _HITS_OF_MANY,
                f"{search}, 'semid_search_many', semid_t.v::FLOAT[], {counts}, NULL)",
            ),
            "semid_similar": (
                f"id, {with_rerank}",
                _HITS,
                f"{similar}, id::{self._id_type}, {counts}, rerank::BIGINT)",
            ),
        }
        return {
            name: f"CREATE OR REPLACE TEMP MACRO {name}({parameters}) AS TABLE {hits.format(call=call)}"
            for name, (parameters, hits, call) in parts.items()
        }


# DuckDB 1.5 keeps a bare pointer to a function, and a result that is being read may call it after it was removed. So
# DuckDB is given functions of this module only, which are always there, and they look up for whom they are called.
_OPEN: WeakValueDictionary[int, SqlSearch] = WeakValueDictionary()
_numbers = count(1)


def by_codes(snapshot: Snapshot, earlier: Snapshot | None) -> Snapshot:
    """The same items, to be searched by what their codes decode to; ``earlier``: what this made of an earlier one."""
    made = {state.of(): state for state in (earlier.states if earlier else ()) if isinstance(state, ByCodes)}
    states = [made[state] if state in made else ByCodes(state) for state in snapshot.states]
    segments = [Segment(state, part.live) for state, part in zip(states, snapshot.segments, strict=True)]
    return Snapshot(tuple(segments), snapshot.stamp)


class ByCodes(SearchState):
    """The items of another state, searched as if no vectors were stored: by what their codes decode to."""

    def __init__(self, state: SearchState) -> None:
        read = {name: value for name, value in vars(state).items() if name not in ("vectors", "executor")}
        vars(self).update(read)
        self.of = ref(state)  # a bare one, for it holds all vectors

    @cached_property
    def vectors(self) -> VectorsByPosition:
        """What the codes decode to."""
        return self._decoded

    @cached_property
    def executor(self) -> Executor:
        """Scans the codes."""
        if self._quantizer.codebooks is None:
            return NumpyExecutor(self._scanned)
        return LookUpExecutor(self._scanned, self._quantizer.codebooks)

    @property
    def _scanned(self) -> ScanData:
        return ScanData(
            self.leaves, self.codes, self._quantizer, self.vectors, self.config.metric, None, self._read_tail
        )


class LookUpExecutor:
    """Adds up products of the query and codewords, looked up by code: as the macros of the file do it.

    Several times as quick as FAISS's scan of additive codes, which unpacks them bit by bit.
    """

    name = "look-up"
    exact = False

    def __init__(self, data: ScanData, codebooks: Sequence[Vectors]) -> None:
        self._leaves, self._metric = data.leaves, data.metric
        self._words = np.concatenate(codebooks)
        starts = np.cumsum([0, *(len(codebook) for codebook in codebooks[:-1])])
        layout, count = data.leaves.layout, len(data.codes.rows)
        self._places = np.empty((len(codebooks), count), dtype=np.int32)  # of each item's codewords in ``_words``
        self._norms = np.empty(count, dtype=np.float32)  # squared lengths of the decoded vectors
        for start in range(0, count, _BLOCK):
            part = slice(start, start + _BLOCK)
            codes = unpack(data.codes.sids[part], layout, None if data.codes.rest is None else data.codes.rest[part])
            self._places[:, part] = (codes[:, : len(codebooks)] + starts).T
            decoded = data.vectors.take(part)
            self._norms[part] = np.einsum("ij,ij->i", decoded, decoded)

    @property
    def nbytes(self) -> int:
        """Places and norms."""
        return self._places.nbytes + self._norms.nbytes

    def search(self, queries: Vectors, probes: Probes, k: int) -> tuple[Distances, Positions]:
        """The k best items of the probed leaves, by what orders them as their distances do."""
        positions = np.full((len(queries), k), -1, dtype=np.int64)
        scores = np.full((len(queries), k), np.inf, dtype=np.float32)
        products = queries @ self._words.T
        for row, mine in enumerate(candidates_of(self._leaves, probes)):
            found, score = smallest(mine[None], self._scores(products[row], mine)[None], k)
            positions[row, : found.shape[1]], scores[row, : found.shape[1]] = found[0], score[0]
        return scores, positions

    def _scores(self, products: Distances, items: Positions) -> Distances:
        dots: Distances = products[self._places[0, items]]
        for places in self._places[1:]:
            dots += products[places[items]]
        if self._metric == "ip":
            return -dots
        norms = self._norms[items]
        return -dots / np.sqrt(norms + _TINY) if self._metric == "cosine" else norms - 2 * dots


# -- the functions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Hits:
    """Hits of some of the rows that a function was given; an entry for each hit, a row's own in order."""

    rows: NDArray[np.int64]
    ids: NDArray[Any]
    texts: NDArray[np.object_]
    distances: NDArray[np.float32]

    @classmethod
    def of(cls, rows: NDArray[np.int64], result: SearchResult) -> _Hits:
        """The hits of queries that stand in these rows."""
        of_row = np.repeat(rows, np.diff(result.offsets))
        return cls(of_row, result.flat_ids, result.flat_semantic_ids, result.flat_distances)

    def without(self, own: NDArray[Any], k: int) -> _Hits:
        """At most k hits for each row, and not the item itself; ``own`` has an id for each hit."""
        others = np.flatnonzero(self.ids != own)
        rows = self.rows[others]
        kept = others[np.arange(len(rows)) - np.searchsorted(rows, rows) < k]
        return _Hits(self.rows[kept], self.ids[kept], self.texts[kept], self.distances[kept])


def _search(numbers: Column, macros: Column, queries: Column, k: Column, probes: Column, rerank: Column) -> Column:
    """The hits for each query of a column; none for NULL."""
    sql_search, index = _opened(numbers)
    hits = []
    for (macro, wanted, opened, exact), rows in _groups(queries, macros, k, probes, rerank).items():
        some = queries.take(rows)
        if macro == "semid_search_exact":
            _check_vectors(index)
            result = index.search(some, wanted, probes=opened, rerank=_at_least(wanted, exact))
        else:
            result = index._search_codes(some, wanted, probes=opened)
        _log(macro, result)
        hits.append(_Hits.of(rows, result))
    return sql_search.column(hits, len(queries))


def _similar(numbers: Column, ids: Column, k: Column, probes: Column, rerank: Column) -> Column:
    """The hits for each id of a column, without the item itself; none for NULL."""
    sql_search, index = _opened(numbers)
    hits = []
    for (wanted, opened, exact), rows in _groups(ids, k, probes, rerank).items():
        check_count("k", wanted)
        some = ids.take(rows)
        items = index.get(some, vectors=True)
        if items.num_rows < len(rows):
            known = set(items["id"].to_pylist())
            unknown = next(id for id in some.to_pylist() if id not in known)
            raise UnknownIdError(f"There is no item with the id {unknown}.")
        result = index.search(items["vector"], wanted + 1, probes=opened, rerank=_at_least(wanted + 1, exact))
        _log("semid_similar", result)
        own = np.repeat(some.to_numpy(), np.diff(result.offsets))
        hits.append(_Hits.of(rows, result).without(own, wanted))
    return sql_search.column(hits, len(ids))


_COUNTS = ("BIGINT", "BIGINT", "BIGINT")
# What each takes; "id" stands for the type of the ids of an index.
_FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "search": (_search, ("BIGINT", "VARCHAR", "FLOAT[]", *_COUNTS)),
    "similar": (_similar, ("BIGINT", "id", *_COUNTS)),
}


def _opened(numbers: Column) -> tuple[SqlSearch, Searched]:
    sql_search = _OPEN.get(numbers[0].as_py())
    index = None if sql_search is None else sql_search.index()
    if sql_search is None or index is None:
        raise IndexClosedError("The index is closed. Open it again with semid_index.open(path).")
    return sql_search, index


def _groups(values: Column, *options: Column) -> dict[tuple[Any, ...], NDArray[np.int64]]:
    """The rows that have a value, by the options beside it: those with the same ones are searched together."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    chosen = zip(*(option.to_pylist() for option in options), strict=True)
    for row, (has_value, key) in enumerate(zip(values.is_valid().to_pylist(), chosen, strict=True)):
        if has_value:
            groups.setdefault(key, []).append(row)
    return {key: np.array(rows, dtype=np.int64) for key, rows in groups.items()}


def _at_least(k: int, rerank: int | None) -> int | None:
    """As in the macros of the file: k hits need k candidates, whatever ``rerank`` says."""
    return None if rerank is None else max(k, rerank)


def _check_vectors(index: Searched) -> None:
    if index.config.vectors == "none":
        raise InvalidArgumentError('This index has vectors="none", and so no exact distances. Use semid_search.')


def _arrow_type(sql_type: str) -> pa.DataType:
    import pyarrow as pa

    return pa.int64() if sql_type == "BIGINT" else pa.string()


def _log(macro: str, result: SearchResult) -> None:
    trace = result.trace
    log.debug("%s ran in Python: %d queries, k=%d, by %s", macro, trace.queries, trace.k, trace.executor)
