"""``SemanticIndex``: what users import.

>>> import numpy as np, semid_index as semid
>>> vectors = np.random.default_rng(0).standard_normal((1000, 16), dtype=np.float32)
>>> with semid.create(dim=16, levels=3, codebook_size=16) as index:
...     _ = index.train(vectors)
...     ids = index.add(vectors)
...     hits = index.search(vectors[7], k=3)
>>> int(hits.ids[0]), float(hits.distances[0])
(7, 0.0)
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from semid_index import build
from semid_index.codes import check_prefix, format_id, parse_prefix, unpack
from semid_index.collisions import CollisionPolicy, Share, own_quantizer
from semid_index.errors import (
    FilterError,
    InvalidArgumentError,
    InvalidCodesError,
    InvalidIdsError,
    InvalidVectorsError,
    NotTrainedError,
    PrefixNotSupportedError,
    UnknownIdError,
)
from semid_index.export import export
from semid_index.filters import CheckedFilter, check_filter
from semid_index.items import as_ids, check_count, id_type
from semid_index.metrics import check_metric, normalized
from semid_index.plugins import collision_policy_class, quantizer_class
from semid_index.progress import progress_callback
from semid_index.quantizer import Codes, ProgressCallback, Quantizer, Vectors
from semid_index.quantizers.tail import Tail
from semid_index.records import (
    CollisionReport,
    IndexConfig,
    SearchResult,
    SearchTrace,
    Shelf,
    Tier,
    TrainReport,
    Uniqueness,
)
from semid_index.report.id_files import codes_of_array
from semid_index.report.inputs import MOST_VALUES, StoredVectors, choose_labels, earlier_codes, label_columns
from semid_index.report.quality import quality
from semid_index.report.records import QualityReport
from semid_index.rerank import FileVectors
from semid_index.search import SearchRequest, SearchState, search
from semid_index.sql_search import SEARCHES, ByCodes, SqlSearch, searches_in
from semid_index.store import Store, fixed_size_list
from semid_index.vectors import as_queries, as_vectors, open_vectors

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa
    import sqlalchemy

Device = str | int
_LARGEST_DIM = 65_536
_HELD_OUT = 20_000  # vectors to measure the error on, of those held out


def create(
    path: str | os.PathLike[str] | None = None,
    *,
    dim: int,
    metric: str = "l2",
    quantizer: str = "rq",
    levels: int = 4,
    codebook_size: int | Sequence[int] = 256,
    seed: int = 0,
    vectors: str = "float32",
    device: Device = "cpu",
    overwrite: bool = False,
    tail: int | None = None,
    leaf_size: int | None = None,
    collisions: str | Mapping[str, Any] = "share",
    **options: Any,
) -> SemanticIndex:
    """Make a new index, in a DuckDB file or, without a path, in memory.

    ``dim``: dimensions of the vectors. ``metric``: "l2", "cosine" or "ip". ``quantizer``: a name that ``semid
    plugins`` lists. ``levels``, ``codebook_size``: the shape of the semantic IDs; ``codebook_size`` may be a list,
    one size per level. ``vectors``: what is stored for exact distances: "float32", "float16", "int8" or "none".
    ``tail``: 4-bit codes per item for quick scanning (0 for none; by default one for every 2 to 8 dimensions).
    ``leaf_size``: items that are searched together. ``collisions``: what happens to items that share an ID, the name of
    a policy or a mapping with its options, such as ``{"policy": "capacity", "items": 5}``. Further options go to the
    quantizer. Raises :class:`IndexExistsError` if the file exists, unless ``overwrite``.
    """
    _check_device(device)
    if isinstance(dim, bool) or not isinstance(dim, int | np.integer) or not 1 <= dim <= _LARGEST_DIM:
        raise InvalidArgumentError(f"dim must be a whole number from 1 to {_LARGEST_DIM:,}, not {dim!r}.")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**31 - 64:
        raise InvalidArgumentError(f"seed must be a whole number from 0 to {2**31 - 65}, not {seed!r}.")
    if vectors not in get_args(Tier):
        raise InvalidArgumentError(f"vectors must be one of {', '.join(get_args(Tier))}, not {vectors!r}.")
    if leaf_size is not None:
        check_count("leaf_size", leaf_size, least=1)
    if tail is not None:
        check_count("tail", tail, least=0)
        if tail > max(dim, 2):
            raise InvalidArgumentError(f"tail must be at most one code for each of the {dim} dimensions, not {tail}.")
    kind = quantizer_class(quantizer)
    made = _make_quantizer(kind, {"levels": levels, "codebook_size": codebook_size, **options})
    tier: Tier = vectors  # type: ignore[assignment]
    if tail is None and tier == "none":
        tail = 0  # whoever wants no vectors wants a small index
    policy = _make_policy(collisions)
    policy.check(made)
    shape = made.get_config(), int(seed), tier, tail, leaf_size
    config = IndexConfig(int(dim), check_metric(metric), quantizer, *shape, _policy_config(policy))
    return SemanticIndex(Store.create(path, config, overwrite=overwrite), made, None, policy)


def open(
    path: str | os.PathLike[str],
    *,
    read_only: bool = False,
    device: Device = "cpu",
    vectors_in: Literal["memory", "file"] = "memory",
) -> SemanticIndex:
    """Open an index; everything else comes from the file.

    Several processes may open one file with ``read_only=True``; otherwise only one. ``vectors_in="file"`` leaves the
    stored vectors on disk, and fetches those that are re-ranked.
    """
    _check_device(device)
    if vectors_in not in ("memory", "file"):
        raise InvalidArgumentError(f"vectors_in must be 'memory' or 'file', not {vectors_in!r}.")
    store = Store.open(path, read_only=read_only)
    try:
        config = store.config
        hint = f"{path} was built with it: install the package that offers it."
        kind = quantizer_class(config.quantizer, hint=hint)
        policy = _make_policy(config.collisions, hint=hint)
        if not store.is_trained:
            made = _make_quantizer(kind, dict(config.quantizer_config))
            return SemanticIndex(store, made, None, policy, vectors_in=vectors_in)
        quantizer, tail = build.restore(store, kind, policy)
    except BaseException:
        store.close()
        raise
    return SemanticIndex(store, quantizer, tail, policy, vectors_in=vectors_in)


class SemanticIndex:
    """Items with semantic IDs, in one file: to be searched, browsed by prefix, and queried in SQL.

    Make one with :func:`create` or :func:`open`; use it in a ``with`` statement, or call :meth:`close`.
    Reading methods may be called from several threads.
    """

    def __init__(
        self,
        store: Store,
        quantizer: Quantizer,
        tail: Tail | None,
        policy: CollisionPolicy,
        *,
        vectors_in: Literal["memory", "file"] = "memory",
    ) -> None:
        self._store = store
        self._policy = policy
        self._quantizer = quantizer
        self._tail = tail
        self._vectors_in: Literal["memory", "file"] = vectors_in
        self._state: SearchState | None = None
        self._by_codes: ByCodes | None = None
        self._sql_search: SqlSearch | None = None
        self._engine: sqlalchemy.Engine | None = None
        self._lock = RLock()
        self._sql_lock = RLock()  # an own one, so that no query waits until items are added
        self.config = store.config

    # -- learning and adding ------------------------------------------------------------------------------------------

    def train(
        self, vectors: Any, *, sample: int | None = None, progress: bool | ProgressCallback = False
    ) -> TrainReport:
        """Learn the codebooks from vectors (n, dim): an array, an Arrow column or table, or the path of a file.

        At most ``sample`` rows, chosen at random, are used (by default the larger of 65,536 and 256 for each codeword).
        ``progress``: True shows bars on stderr; a function is called with (done, total, what).
        """
        with self._lock, progress_callback(progress) as report:
            result, self._quantizer, self._tail = build.train(
                self._store, self._quantizer, self._policy, vectors, sample=sample, progress=report
            )
            self.config = self._store.config
        return result

    def add(
        self,
        vectors: Any,
        ids: Any = None,
        *,
        metadata: Any = None,
        batch_size: int = 50_000,
        on_bad_vectors: Literal["error", "drop"] = "error",
        progress: bool | ProgressCallback = False,
    ) -> Any:
        """Encode vectors (n, dim) and store them, in one transaction; returns their ids.

        ``ids``: integers or strings, one for each vector, fixed in type by the first add; numbers from 0 if left out.
        An id that is in the index already is an error. ``metadata``: a data frame, Arrow table or dict of columns
        with a row for each vector; its columns are those of the SQL table ``items``. ``on_bad_vectors="drop"`` leaves
        out vectors with NaN or infinite values (and zero vectors, under cosine) instead of refusing all.
        """
        with self._lock, progress_callback(progress) as report:
            added = build.add(
                self._store,
                self._quantizer,
                self._policy,
                self._tail,
                vectors,
                ids,
                metadata=metadata,
                batch_size=batch_size,
                on_bad_vectors=on_bad_vectors,
                progress=report,
            )
            self._state = self._by_codes = None
        return added

    # -- searching ----------------------------------------------------------------------------------------------------

    def search(
        self,
        query: Any,
        k: int = 10,
        *,
        where: str | Mapping[str, Any] | sqlalchemy.ColumnElement[bool] | None = None,
        params: Sequence[Any] | Mapping[str, Any] | None = None,
        probes: int | None = None,
        rerank: int | None = None,
        exact: bool = False,
        threads: int | None = None,
        timeout: float | None = None,
    ) -> SearchResult:
        """The k items nearest to a query (dim,), or to each query of a batch (q, dim).

        ``where``: an SQL expression over the metadata, with ``?`` for ``params``, a mapping of conditions, or a
        condition of SQLAlchemy; then only items that fulfil it are found. ``probes``: leaves to open (by default as
        many as hold about 48 sqrt(n) items). ``rerank``: candidates to compute exact distances for (by default 4 k, at
        least 100; four times that under ip). ``exact=True``: brute force. ``threads``: by default all cores.
        ``timeout``: seconds, after which :class:`SearchTimeoutError` is raised; without one, a filter may take 60
        seconds, and the rest as long as it likes. Fewer than k hits come back only where fewer items exist.
        """
        request = self._request(query, k, probes, rerank, exact, threads, timeout)
        if where is None:
            if params is not None:
                raise InvalidArgumentError("params belong to a where expression, and there is none.")
            return search(self._search_state, request)
        if self._state is None:
            self._check_trained()
        columns = self._store.filter_columns()
        condition = self._condition(where, params, columns)
        return search(
            self._search_state,
            request,
            lambda seconds: self._store.matching_rows(condition, columns, timeout=seconds),
        )

    def _condition(self, where: Any, params: Any, columns: Mapping[str, str]) -> CheckedFilter:
        if isinstance(where, str | Mapping):
            return check_filter(where, params, columns)
        from semid_index.sql.conditions import filter_of  # SQLAlchemy takes a while to import

        if params is not None:
            raise FilterError("A condition of SQLAlchemy brings its own values: leave params out.")
        return check_filter(*filter_of(where, self._store.item_columns()), columns)

    def _request(self, query: Any, *options: Any) -> SearchRequest:
        queries, single = as_queries(query, dim=self.config.dim)
        if not len(queries):
            raise InvalidVectorsError("There are no queries: the array has 0 rows. Give one or more.")
        self._check_usable(queries, "query")
        return SearchRequest(queries, single, *options)

    def _search_codes(self, query: Any, k: int, *, probes: int | None = None) -> SearchResult:
        """The k items nearest to a query, or to each of a batch, by what their codes decode to."""
        return search(self._state_by_codes, self._request(query, k, probes))

    def explain(self, query: Any, k: int = 10, **options: Any) -> SearchTrace:
        """Search for one query and tell how: the leaves opened, candidates, the time of each step."""
        return self.search(query, k, **options).trace

    def similar(self, id: Any, k: int = 10, **options: Any) -> SearchResult:
        """The k items most like an item of the index, itself left out; options as in :meth:`search`."""
        check_count("k", k, least=1)
        found = self.search(self._vector_of(id), k + 1, **options)
        # one by one: NumPy compares strings without the NULs at their end
        others = np.array([i for i, hit in enumerate(found.flat_ids.tolist()) if hit != id][:k], dtype=np.int64)
        return SearchResult(
            found.flat_ids[others],
            found.flat_distances[others],
            lambda: found.read_codes()[others],
            np.array([0, len(others)]),
            True,
            found.trace,
        )

    # -- codes and prefixes -------------------------------------------------------------------------------------------

    def encode(self, vectors: Any) -> Codes:
        """The codes of vectors (n, dim): (n, levels). Stores nothing.

        They are those that the quantizer proposes: the collision policy is not asked, and a level that it adds is 0.
        """
        self._check_trained()
        matrix = as_vectors(vectors, dim=self.config.dim)
        self._check_usable(matrix, "vector")
        return self._quantizer.encode(normalized(matrix) if self.config.metric == "cosine" else matrix)

    def decode(self, codes: Any) -> Vectors:
        """The vectors that codes (n, levels) stand for: (n, dim). Under cosine, of vectors at length 1."""
        self._check_trained()
        layout = self._store.layout
        try:
            matrix = np.asarray(codes)
        except ValueError as error:  # rows of different lengths
            raise InvalidCodesError(f"codes must be integers of shape (n, {layout.levels}). {error}") from error
        if matrix.ndim != 2 or matrix.shape[1] != layout.levels or matrix.dtype.kind not in "iu":
            raise InvalidCodesError(
                f"codes must be integers of shape (n, {layout.levels}), not {matrix.dtype} of shape {matrix.shape}."
            )
        if len(matrix) and ((matrix < 0) | (matrix >= np.array(layout.codebook_sizes))).any():
            raise InvalidCodesError(
                f"Each code must be at least 0 and below its codebook's size, {layout.codebook_sizes}."
            )
        return self._quantizer.decode(matrix.astype(np.int32))

    def prefix(self, prefix: str | Sequence[int]) -> pa.Table:
        """The items below a prefix such as "12-153" or (12, 153): id, semantic_id, metadata; ordered by ID."""
        return self._store.items_under(self._prefix(prefix, "prefix"))

    def tree(self, depth: int = 1, under: str | Sequence[int] | None = None, *, examples: int = 0) -> list[Shelf]:
        """The shelves ``depth`` levels down, below a prefix if one is given: the largest first, each with some ids."""
        start = self._prefix(under if under is not None else (), "tree")
        check_count("depth", depth, least=1)
        check_count("examples", examples, least=0)
        deepest = self._store.layout.levels
        if len(start) + depth > deepest:
            raise InvalidArgumentError(
                f"There are {deepest} levels: depth={depth} below {format_id(start) or 'the root'} is too deep."
            )
        shelves = self._store.shelves(len(start) + depth, start, examples=examples)
        return [Shelf(*shelf, whole=len(start) + depth == deepest) for shelf in shelves]

    # -- looking at items ---------------------------------------------------------------------------------------------

    def get(self, ids: Any, *, vectors: bool = False) -> pa.Table:
        """The items with these ids, in this order: id, semantic_id and metadata; with their stored vectors if asked.

        Ids that the index does not have are left out. So is metadata named ``semantic_id`` (or ``vector``, if vectors
        are asked for), which would be there twice; it is in the SQL table ``items``.
        """
        import pyarrow as pa

        self._check_trained()
        wanted = self._ids(ids)
        if wanted is None:
            wanted = pa.array([], pa.int64() if self._store.id_type != "str" else pa.string())
        table = self._store.items(wanted)
        if vectors:
            table = table.drop_columns([name for name in table.column_names if name == "vector"])
            table = table.append_column("vector", self._stored_vectors(table["id"].combine_chunks()))
        return table

    def sql(
        self, query: str, params: Sequence[Any] | Mapping[str, Any] | None = None, *, pure: bool = False
    ) -> duckdb.DuckDBPyRelation:
        """Run SQL over the view ``semantic_ids``, your ``items`` and the tables of the index; a DuckDB relation.

        ``semid_search``, ``semid_search_exact``, ``semid_search_many`` and ``semid_similar`` run in Python, many
        queries at a time, and find what :meth:`search` and :meth:`similar` find (the first and the third by codes
        alone). With ``pure=True`` they are the macros in the file, as any DuckDB client has them.
        The text is trusted: it can do whatever DuckDB can. Never build it from what strangers type.
        """
        cursor = self._store.cursor()
        if not pure and (searches := searches_in(query)):
            self._make_searchable(cursor, searches)
        return cursor.sql(query, params=params)

    def engine(self) -> sqlalchemy.Engine:
        """An SQLAlchemy engine over the index's own connection, until the index is closed. Always the same one.

        ``semid_index.sql`` has the tables, and what is said about semantic IDs in a query. Your own tables may be
        written; ``semid_*`` tables may not, and of ``items`` only the columns with metadata. ``semid_search`` and the
        like are those of :meth:`sql`.
        """
        from sqlalchemy import event  # SQLAlchemy takes a while to import

        from semid_index.sql import engine_of

        with self._lock:
            if self._engine is None:
                self._engine = engine_of(self._store)
                event.listen(self._engine, "connect", lambda made, _: self._make_searchable(made.settled(), SEARCHES))
            return self._engine

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        metadata: bool | Sequence[str] = False,
        vectors: bool = False,
        overwrite: bool = False,
    ) -> int:
        """Write the IDs of all items, sorted, to a file that any program can read; returns how many.

        The name of the file says how: ``.parquet``, ``.csv``, ``.json`` or ``.jsonl``. Its columns are id, sid,
        semantic_id, c1, c2, ..., dup_rank and version. ``metadata``: also the columns of ``items``, all or those that
        are listed. ``vectors``: also the stored vectors, as float32. Raises :class:`IndexExistsError` if the file
        exists, unless ``overwrite``, and :class:`StorageError` if it cannot be written; then there is no half of it.
        """
        self._check_trained()
        return export(self._store, path, metadata=metadata, vectors=vectors, overwrite=overwrite)

    def stats(self) -> dict[str, Any]:
        """What the index is and what it costs, in plain values."""
        items = len(self)
        config = self.config
        stats: dict[str, Any] = {
            "items": items,
            "dim": config.dim,
            "metric": config.metric,
            "quantizer": config.quantizer,
            "trained": self._store.is_trained,
            "vectors": config.vectors,
            "path": None if self._store.path is None else str(self._store.path),
        }
        if not self._store.is_trained:
            return stats
        layout = self._store.layout
        collisions = self._collisions()
        file_bytes = self._store.file_bytes()
        code_bytes = sum(codebook.nbytes for codebook in own_quantizer(self._quantizer).codebooks or ())
        stats |= {
            "levels": layout.levels,
            "codebook_sizes": list(layout.codebook_sizes),
            "tail": config.tail,
            "items_sharing_an_id": items - collisions.after.alone,
            "collisions": asdict(collisions),
            "train_report": self._store.meta("train_report"),
            "code_bytes_per_item": layout.bytes_per_item,
            "float32_bytes_per_item": 4 * config.dim,
            "codebook_bytes": code_bytes,
            "file_bytes": file_bytes,
            "file_column_bytes": self._store.column_bytes() if file_bytes else {},
            "file_bytes_per_item": file_bytes / items if items else 0.0,
        }
        state = self._state
        if state is not None:
            stats["leaves"] = len(state.leaves)
            stats["memory_bytes"] = state.memory()
        return stats

    def report(
        self,
        vectors: Any = None,
        *,
        labels: Mapping[str, Any] | Sequence[str] | None = None,
        against: SemanticIndex | tuple[Any, Any] | None = None,
        k: int = 10,
        queries: int = 1_000,
        progress: bool | ProgressCallback = False,
    ) -> QualityReport:
        """How good the IDs of the items are: meaning, neighbourhood, collisions, error, balance, memory.

        The items' own vectors are those stored; with ``vectors="none"`` there are none, and all that needs them is
        left out. ``vectors``: further vectors (n, dim), held out from training, on which the error is measured, too;
        an array, an Arrow column or table, or the path of a file. ``labels``: columns of ``items``, or values by name,
        one for each item in the order they were added; by default up to three columns with 2 to 1,000 values.
        ``against``: an earlier version, an index or a pair (ids, codes), to see what changed. ``k``, ``queries``:
        neighbours to look for, and how many items to look for them with.
        """
        self._check_trained()
        if not len(self):
            raise InvalidArgumentError("The index has no items to report on. Add some with index.add(vectors).")
        check_count("k", k)
        check_count("queries", queries)
        with self._lock, progress_callback(progress) as callback:
            layout, config = self._store.layout, self.config
            codes, ids = self._codes_and_ids()
            return quality(
                codes,
                layout.codebook_sizes,
                vectors=None if config.vectors == "none" else StoredVectors(self._store),
                decode=self._quantizer.decode,
                codebooks=self._quantizer.codebooks,
                labels=self._labels(labels),
                held_out=None if vectors is None else self._held_out(vectors),
                previous=None if against is None else earlier_codes(ids, *_version(against), "The earlier version"),
                k=k,
                queries=queries,
                metric=config.metric,
                hierarchical=self._quantizer.hierarchical,
                bytes_per_item=self._store.file_bytes() / len(self) or None,
                progress=callback,
            )

    # -- housekeeping -------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Release the file. Closing twice is allowed."""
        self._state = self._by_codes = None
        if self._engine is not None:
            self._engine.dispose()
        with self._sql_lock:
            if self._sql_search is not None:
                self._sql_search.close()
            self._sql_search = None
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._store)

    def __contains__(self, id: Any) -> bool:
        try:
            wanted = self._ids([id])
        except InvalidIdsError:
            return False
        return wanted is not None and bool((self._store.rows_of_ids(wanted) >= 0).all())

    def __repr__(self) -> str:
        if self._store.closed:
            return "<SemanticIndex, closed>"
        config = self.config
        trained = self._store.is_trained
        shape = " x ".join(str(size) for size in self._store.layout.codebook_sizes[:8]) if trained else "not trained"
        where = self._store.path or "in memory"
        return (
            f"<SemanticIndex {where}: {len(self):,} items, {config.dim}-d {config.metric}, {config.quantizer} {shape}>"
        )

    # -- parts --------------------------------------------------------------------------------------------------------

    def _search_state(self) -> SearchState:
        """All that searching needs, of one moment. Searches go on with the last one while items are added."""
        state = self._state
        if state is not None:
            return state
        with self._lock:  # no items are added while everything is read
            if self._state is None:
                self._check_trained()
                state = SearchState(self._store, self._quantizer, self._tail, vectors_in=self._vectors_in)
                self._state = state.prepare()
            return self._state

    def _state_by_codes(self) -> SearchState:
        """The same items, to be searched by their codes alone."""
        state, by_codes = self._search_state(), self._by_codes
        if by_codes is None or by_codes.of is not state:
            self._by_codes = by_codes = ByCodes(state)
        return by_codes

    def _make_searchable(self, connection: duckdb.DuckDBPyConnection, searches: Iterable[str]) -> None:
        """Let a connection search in Python. Without items there is nothing to find, and no type for the ids."""
        with self._sql_lock:
            id_type = self._store.id_type if self._sql_search is None else None
            if id_type is not None:
                self._sql_search = SqlSearch(self, self._store, id_type)
            if self._sql_search is not None:
                self._sql_search.install(connection, searches)

    def _codes_and_ids(self) -> tuple[Codes, pa.Array]:
        """The codes and ids of all items, in the order they were added."""
        stored = self._store.codes()
        order = np.argsort(stored.rows)
        codes = unpack(stored.sids, self._store.layout, stored.rest)
        return codes[order], self._store.ids().take(order)

    def _held_out(self, vectors: Any) -> tuple[Codes, Vectors]:
        """Codes and vectors of (at most 20,000 of) the rows."""
        source = open_vectors(vectors)
        if not source.rows:
            raise InvalidVectorsError("There are no held-out vectors: the array has 0 rows. Give one or more.")
        sample = source.sample(min(source.rows, _HELD_OUT), seed=self.config.seed)
        matrix = as_vectors(sample, dim=self.config.dim, what="held-out vectors")
        self._check_usable(matrix, "held-out vector")
        matrix = normalized(matrix) if self.config.metric == "cosine" else matrix
        return self._quantizer.encode(matrix), matrix

    def _labels(self, labels: Mapping[str, Any] | Sequence[str] | None) -> Mapping[str, Any]:
        """Labels by name, each in the order the items were added."""
        if isinstance(labels, Mapping):
            return labels
        if isinstance(labels, str):
            raise InvalidArgumentError(f"labels are a list of columns or a mapping. Write labels=['{labels}'].")
        columns = [name for name in self._store.item_columns() if name != "id"]
        if labels is None and columns:
            schema = self._store.all_items(columns, limit=0).schema
            labels = choose_labels(schema, lambda name: self._store.value_counts(name, limit=MOST_VALUES + 1))
        if unknown := [name for name in labels or () if name not in columns]:
            listed = ", ".join(f"'{name}'" for name in columns) or "none"
            raise InvalidArgumentError(f"The items have no column '{unknown[0]}'. They have {listed}.")
        return label_columns(self._store.all_items(labels)) if labels else {}

    def _collisions(self) -> CollisionReport:
        """What the collision policy achieved, and its price."""
        done, after, passive = self._store.collision_counts(), self._store.uniqueness(), isinstance(self._policy, Share)
        return CollisionReport(
            policy=self._policy.name,
            items=len(self),
            moved=done.moved,
            prefix_kept=1 - done.prefixes_moved / max(done.items, 1),
            error=None if passive else done.error,
            extra_error=done.extra_error,
            relative_extra_error=done.extra_error / (done.error or 1.0),
            before=after if passive else Uniqueness(done.ids, max(done.alone, 0), done.largest),
            after=after,
            unique=after.ids == len(self) if self._policy.promises_unique else None,
        )

    def _check_trained(self) -> None:
        if not self._store.is_trained:
            raise NotTrainedError("The index is not trained. Call index.train(vectors) and index.add(vectors) first.")

    def _check_usable(self, vectors: Vectors, what: str) -> None:
        """Refuse vectors that are finite and yet have no distance to others."""
        if len(rows := build.unusable_rows(vectors, self.config.metric)):
            raise InvalidVectorsError(
                f"{what.capitalize()} {rows[0]} cannot be used: {build.allowed(self.config)}", rows=rows.tolist()
            )

    def _prefix(self, prefix: str | Sequence[int], what: str) -> tuple[int, ...]:
        self._check_trained()
        if not self._quantizer.hierarchical:
            raise PrefixNotSupportedError(self.config.quantizer, what)
        layout = self._store.layout
        if isinstance(prefix, str):
            return parse_prefix(prefix, layout)
        is_list = isinstance(prefix, Sequence | np.ndarray) and not isinstance(prefix, bytes)
        if is_list and all(type(code) is int or isinstance(code, np.integer) for code in prefix):
            return check_prefix(prefix, layout)
        raise InvalidCodesError(f"A prefix is a text such as '12-153' or codes such as (12, 153), not {prefix!r}.")

    def _ids(self, ids: Any) -> pa.Array | None:
        """Ids as an Arrow array of the index's type; None where they cannot occur in it."""
        wanted = as_ids(ids)
        return wanted if id_type(wanted) == self._store.id_type else None

    def _vector_of(self, id: Any) -> NDArray[np.float32]:
        self._check_trained()
        wanted = self._ids([id])
        if wanted is None or id not in self:
            raise UnknownIdError(f"There is no item with id {id!r} in the index.")
        column = self._stored_vectors(wanted)
        return np.asarray(column.flatten().to_numpy(), dtype=np.float32)

    def _stored_vectors(self, ids: pa.Array) -> pa.Array:
        """The stored vectors of some items as float32, or the decoded ones where none are stored."""
        rows = self._store.rows_of_ids(ids)
        if self.config.vectors == "none":
            return fixed_size_list(self._quantizer.decode(self._store.codes_of(rows)))
        return fixed_size_list(FileVectors(self._store, rows, self.config.metric).take(slice(None)))


def _version(against: SemanticIndex | tuple[Any, Any]) -> tuple[pa.Array, Codes]:
    """The ids and codes of an earlier version."""
    if isinstance(against, SemanticIndex):
        codes, ids = against._codes_and_ids()
        return ids, codes
    ids, codes = against
    matrix = np.asarray(codes)
    return as_ids(ids, count=len(matrix)), codes_of_array(matrix, "The earlier version")


def _make_quantizer(kind: type[Quantizer], options: dict[str, Any]) -> Quantizer:
    _check_options(kind, options)
    return kind(**options)


def _make_policy(collisions: str | Mapping[str, Any], *, hint: str = "semid plugins lists them.") -> CollisionPolicy:
    """The collision policy of this name, or of a mapping ``{"policy": name, option: value, ...}``."""
    options = dict(collisions) if isinstance(collisions, Mapping) else {"policy": collisions}
    if "policy" not in options:
        raise InvalidArgumentError("collisions needs the name of a policy, such as {'policy': 'capacity', 'items': 5}.")
    kind = collision_policy_class(options.pop("policy"), hint=hint)
    _check_options(kind, options)
    return kind(**options)


def _policy_config(policy: CollisionPolicy) -> dict[str, Any]:
    return {"policy": policy.name, **policy.get_config()}


def _check_options(kind: type[Quantizer] | type[CollisionPolicy], options: Mapping[str, Any]) -> None:
    """Refuse options that a class does not take."""
    known = inspect.signature(kind).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    unknown = [] if takes_any else sorted(set(options) - set(known))
    if unknown:
        options_of_it = f"Its options: {', '.join(known)}" if known else "It has none"
        raise InvalidArgumentError(f"'{kind.name}' has no option '{unknown[0]}'. {options_of_it}.")


def _check_device(device: Device) -> None:
    if device not in ("cpu", "auto"):
        raise InvalidArgumentError(
            f"device={device!r}: this version searches on the CPU only. Use device='cpu' or 'auto'."
        )
