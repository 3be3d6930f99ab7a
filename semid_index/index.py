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
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, replace
from threading import RLock
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Self, get_args

import numpy as np
from numpy.typing import NDArray

from semid_index import build, lifecycle
from semid_index.arrow import fixed_size_list
from semid_index.coder import Coder
from semid_index.codes import check_prefix, format_id, parse_prefix, unpack
from semid_index.collisions import CollisionPolicy, Share, own_quantizer
from semid_index.compact import compact, save_codebooks, save_copy
from semid_index.devices import Device, choose_gpu, gpu_state, may_spread, parse_device
from semid_index.drift import assess
from semid_index.errors import (
    DeviceError,
    FilterError,
    InvalidArgumentError,
    InvalidCodesError,
    InvalidIdsError,
    InvalidVectorsError,
    NotTrainedError,
    PluginError,
    PrefixNotSupportedError,
    UnknownIdError,
)
from semid_index.export import export
from semid_index.filters import CheckedFilter, check_filter
from semid_index.gpu import SearchOnGpu, why_not
from semid_index.importing import import_items
from semid_index.incoming import allowed, unusable_rows
from semid_index.items import as_ids, check_count, id_type
from semid_index.live import Live
from semid_index.metrics import check_metric, comparable
from semid_index.plugins import collision_policy_class, quantizer_class
from semid_index.progress import progress_callback
from semid_index.quantizer import Codes, ProgressCallback, Quantizer, Vectors
from semid_index.quantizers.kmeans import clustering_on
from semid_index.records import (
    CollisionReport,
    CompactReport,
    Drift,
    IndexConfig,
    IndexVersion,
    RetrainReport,
    SearchResult,
    SearchTrace,
    Shelf,
    Tier,
    TrainReport,
    Uniqueness,
    UpsertResult,
    VerifyReport,
)
from semid_index.report.id_files import codes_of_array
from semid_index.report.inputs import MOST_VALUES, StoredVectors, choose_labels, earlier_codes, label_columns
from semid_index.report.quality import quality
from semid_index.report.records import QualityReport
from semid_index.rerank import FileVectors
from semid_index.retrain import retrain
from semid_index.search import Rows, SearchRequest, search, search_one
from semid_index.segments import SearchState, Snapshot
from semid_index.sql_search import SEARCHES, SqlSearch, by_codes, searches_in
from semid_index.store import Store
from semid_index.vector_lists import check_precision
from semid_index.vectors import as_queries, as_vectors, open_vectors
from semid_index.verify import verify

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa
    import sqlalchemy

log = logging.getLogger("semid_index")

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
    device: Device | None = None,
    device_vectors: str = "float16",
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
    quantizer. ``device``, ``device_vectors``: as in :func:`open`; codebooks are learned there, too. Raises
    :class:`IndexExistsError` if the file exists, unless ``overwrite``.
    """
    place = _Place(device, device_vectors)
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
    _check_config(made, options)
    tier: Tier = vectors  # type: ignore[assignment]
    if tail is None and tier == "none":
        tail = 0  # whoever wants no vectors wants a small index
    policy = _make_policy(collisions)
    policy.check(made)
    shape = made.get_config(), int(seed), tier, tail, leaf_size
    config = IndexConfig(int(dim), check_metric(metric), quantizer, *shape, _policy_config(policy))
    return SemanticIndex(Store.create(path, config, overwrite=overwrite), Coder(made, policy, None), place=place)


def open(
    path: str | os.PathLike[str],
    *,
    read_only: bool = False,
    device: Device | None = None,
    device_vectors: str = "float16",
    vectors_in: Literal["memory", "file"] = "memory",
    version: int | None = None,
) -> SemanticIndex:
    """Open an index; everything else comes from the file.

    Several processes may open one file with ``read_only=True``; otherwise only one. ``vectors_in="file"`` leaves the
    stored vectors on disk, and fetches those that are re-ranked. ``version``: an older version of the IDs, which
    :meth:`SemanticIndex.retrain` left; it can be searched and browsed, and not be written.

    ``device``: "cpu", "auto", "cuda", or a GPU, as 0 or "cuda:0"; by default what the environment variable
    ``SEMID_DEVICE`` says, or "cpu". A GPU scans the leaves for batches of 8 queries and more. "auto" takes the first
    GPU if it works; "cuda" and one that was named are used, or :class:`DeviceError` says what is missing. Unless one
    was named, leaves that do not fit there are dealt out over other GPUs, too. ``device_vectors``: how a GPU keeps the
    vectors, "float32", "float16" or "int8"; distances of hits are computed from the stored ones in any case.
    """
    place = _Place(device, device_vectors)
    if vectors_in not in ("memory", "file"):
        raise InvalidArgumentError(f"vectors_in must be 'memory' or 'file', not {vectors_in!r}.")
    if version is not None:
        check_count("version", version)
    store = Store.open(path, read_only=read_only, version=version)
    try:
        with store.reading():  # another index on the file may be training or retraining
            config = store.config
            hint = f"{path} was built with it: install the package that offers it."
            kind = quantizer_class(config.quantizer, hint=hint)
            policy = _make_policy(config.collisions, hint=hint)
            if store.is_trained:
                coder = build.restore(store, kind, policy)
            else:
                coder = Coder(_make_quantizer(kind, dict(config.quantizer_config)), policy, None)
            return SemanticIndex(store, coder, vectors_in=vectors_in, place=place)
    except BaseException:
        store.close()
        raise


class SemanticIndex:
    """Items with semantic IDs, in one file: to be searched, browsed by prefix, and queried in SQL.

    Make one with :func:`create` or :func:`open`; use it in a ``with`` statement, or call :meth:`close`.
    Reading methods may be called from several threads, also while another one writes. A search sees one moment: all
    that was written before it was called, and of what is written meanwhile each call whole or not at all. It waits for
    no write.
    """

    def __init__(
        self,
        store: Store,
        coder: Coder,
        *,
        vectors_in: Literal["memory", "file"] = "memory",
        place: _Place | None = None,
    ) -> None:
        self._store = store
        self._place = place or _Place("cpu", "float16")
        self._on_gpus: dict[tuple[int, bool], SearchOnGpu] = {}
        self._not_on_gpu = ""  # why "auto" has taken the CPU for good
        self._coders, self._policy = {_trained_version(store): coder}, coder.policy
        self._vectors_in: Literal["memory", "file"] = vectors_in
        self._live = Live(store, self._read_items)
        self._by_codes: Snapshot | None = None
        self._sql_search: SqlSearch | None = None
        self._engine: sqlalchemy.Engine | None = None
        self._lock = RLock()
        self._sql_lock = RLock()  # an own one, so that no query waits until items are added
        self._config, self._settled = store.config, store.is_trained

    @property
    def config(self) -> IndexConfig:
        """What the index is; settled once it is trained, here or by another index on the same file."""
        if not self._settled and not self._store.closed:
            self._settled, self._config = self._store.is_trained, self._store.config
        return self._config

    # -- learning and adding ------------------------------------------------------------------------------------------

    def train(
        self,
        vectors: Any,
        *,
        sample: int | None = None,
        on_bad_vectors: Literal["error", "drop"] = "error",
        progress: bool | ProgressCallback = False,
    ) -> TrainReport:
        """Learn the codebooks from vectors (n, dim): an array, an Arrow column or table, or the path of a file.

        At most ``sample`` rows, chosen at random, are used (by default the larger of 65,536 and 256 for each codeword).
        ``on_bad_vectors``: as in :meth:`add`, for those that were chosen.
        ``progress``: True shows bars on stderr; a function is called with (done, total, what).
        """
        with self._lock, self._place.training(), progress_callback(progress) as report:
            result, coder = build.train(
                self._store, self._coder, vectors, sample=sample, on_bad_vectors=on_bad_vectors, progress=report
            )
            self._coders = {_trained_version(self._store): coder}
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

        ``ids``: integers or strings, one for each vector, fixed in type by the first add; if left out, numbers from 0,
        or after the largest. An id that is in the index already is an error. ``metadata``: a data frame, Arrow table or
        dict of columns with a row for each vector; its columns are those of the SQL table ``items``.
        ``on_bad_vectors="drop"`` leaves out vectors with NaN or infinite values (and zero vectors, under cosine)
        instead of refusing all.
        """
        with self._lock, self._store.unchanging(), progress_callback(progress) as report:
            return build.add(
                self._store,
                self._coder,
                vectors,
                ids,
                metadata=metadata,
                batch_size=batch_size,
                on_bad_vectors=on_bad_vectors,
                progress=report,
            )

    def upsert(
        self,
        vectors: Any,
        ids: Any,
        *,
        metadata: Any = None,
        batch_size: int = 50_000,
        on_bad_vectors: Literal["error", "drop"] = "error",
        progress: bool | ProgressCallback = False,
    ) -> UpsertResult:
        """Give items new vectors (n, dim), and add those whose ids are new, in one transaction.

        An item whose codes stay the same keeps its ID; one whose codes change gets another, and the old one goes to the
        SQL table ``semid_history``. No other item's ID changes. ``metadata``: as in :meth:`add`; of known items it
        replaces the columns that are given, and only those. An id may be there only once. The rest as in :meth:`add`.
        """
        with self._lock, self._store.unchanging(), progress_callback(progress) as report:
            return lifecycle.upsert(
                self._store,
                self._coder,
                vectors,
                ids,
                metadata=metadata,
                batch_size=batch_size,
                on_bad_vectors=on_bad_vectors,
                progress=report,
            )

    def delete(
        self,
        ids: Any = None,
        *,
        where: str | Mapping[str, Any] | sqlalchemy.ColumnElement[bool] | None = None,
        params: Sequence[Any] | Mapping[str, Any] | None = None,
    ) -> int:
        """Delete items, with their vectors and metadata, in one transaction; returns how many were deleted.

        Either those with some ``ids``, of which unknown ones do not matter, or those that fulfil ``where``, which is
        as in :meth:`search`. Their IDs stay in the SQL table ``semid_history``, and are not given again (nor are whole
        numbers that ``add`` gave as ids).
        """
        if (ids is None) == (where is None):
            raise InvalidArgumentError("Say what to delete, by ids or by where= (and not by both).")
        if where is None and params is not None:
            raise InvalidArgumentError("params belong to a where expression, and there is none.")
        self._check_trained()
        with self._lock:
            if where is None:
                return lifecycle.delete(self._store, ids)
            columns = self._store.filter_columns()
            return lifecycle.delete_where(self._store, self._condition(where, params, columns), columns)

    # -- versions of the IDs ------------------------------------------------------------------------------------------

    def retrain(
        self,
        vectors: Any = None,
        *,
        ids: Any = None,
        keep_ids: bool = True,
        compare: bool = True,
        progress: bool | ProgressCallback = False,
    ) -> RetrainReport:
        """Learn the codebooks again, and give every item a new ID, which is the old one wherever possible.

        Learning goes on from the old codebooks, and codewords keep their numbers; with ``keep_ids=False`` it starts
        from scratch. The new IDs are a new version, published in one transaction. The old version stays beside it until
        :meth:`drop_version`: the SQL view ``semid_map`` leads from its IDs to the new ones, and ``open(path,
        version=1)`` searches it.

        ``vectors``: what to learn from, by default (a sample of) the stored vectors. ``ids``: with them, vectors are
        those of all items, one for each, and are also what is encoded; an index with ``vectors="none"`` needs both.
        ``compare``: also train from scratch, to report what that would have done to the IDs and to the error.
        """
        with self._lock, self._store.unchanging(), self._place.training(), progress_callback(progress) as callback:
            report, coder = retrain(
                self._store,
                self._coder,
                vectors,
                ids,
                keep_ids=keep_ids,
                compare=compare,
                progress=callback,
            )
            self._live.forget()
            self._by_codes = None
            self._coders = {report.version: coder}
        return report

    def versions(self) -> list[IndexVersion]:
        """The versions of the IDs that the file has, the oldest first."""
        self._check_trained()
        found = self._store.versions()
        return [_version_record(number, facts, present=number == max(found)) for number, facts in found.items()]

    def drop_version(self, version: int) -> None:
        """Remove an older version of the IDs, and with it what the view ``semid_map`` says of it.

        Raises :class:`InvalidArgumentError` if there is no such version, or it is the present one.
        """
        check_count("version", version)
        with self._lock:
            self._store.check_writable()
            known = [each.version for each in self.versions()]
            if version not in known[:-1]:
                dropped = ", ".join(map(str, known[:-1])) or "none"
                raise InvalidArgumentError(
                    f"Version {version} cannot be dropped. Older versions that can: {dropped}. The present one is "
                    f"{known[-1]}."
                )
            self._store.drop_version(int(version))

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
        device: Device | None = None,
    ) -> SearchResult:
        """The k items nearest to a query (dim,), or to each query of a batch (q, dim).

        ``where``: an SQL expression over the metadata, with ``?`` for ``params``, a mapping of conditions, or a
        condition of SQLAlchemy; then only items that fulfil it are found. ``probes``: leaves to open (by default as
        many as hold about 48 sqrt(n) items). ``rerank``: candidates to compute exact distances for (by default 4 k, at
        least 100; four times that under ip). ``exact=True``: brute force. ``threads``: by default all cores.
        ``timeout``: seconds, after which :class:`SearchTimeoutError` is raised; without one, a filter may take 60
        seconds, and the rest as long as it likes. ``device``: as in :func:`open`; by default that of the index. Fewer
        than k hits come back only where fewer items exist.
        """
        asked = self._place.device if device is None else parse_device(device)
        queries, single = as_queries(query, dim=self._config.dim, finite=False)
        if where is None and params is None and exact is False and timeout is None and len(queries) == 1:
            found = self._search_one(queries, single, (k, probes, rerank), threads, asked)
            if found is not None:
                return found
        self._check_queries(queries, query)
        request = SearchRequest(queries, single, k, probes, rerank, exact, threads, timeout)
        if where is None:
            if params is not None:
                raise InvalidArgumentError("params belong to a where expression, and there is none.")
            return self._search(request, device=asked)
        if self._live.latest is None:
            self._check_trained()
        columns = self._store.filter_columns()
        condition = self._condition(where, params, columns)

        def matching(seconds: float) -> Rows:
            return self._store.matching_rows(condition, columns, timeout=seconds)

        return self._search(request, matching, device=asked)

    def _condition(self, where: Any, params: Any, columns: Mapping[str, str]) -> CheckedFilter:
        if isinstance(where, str | Mapping):
            return check_filter(where, params, columns)
        from semid_index.sql.conditions import filter_of  # SQLAlchemy takes a while to import

        if params is not None:
            raise FilterError("A condition of SQLAlchemy brings its own values: leave params out.")
        return check_filter(*filter_of(where, self._store.item_columns()), columns)

    def _search_one(
        self,
        queries: Vectors,
        single: bool,
        options: tuple[int, int | None, int | None],
        threads: int | None,
        device: Device,
    ) -> SearchResult | None:
        """What is found for one query, where nothing stands in the way of the shortest way to search; else None."""
        if threads is not None and (type(threads) is not int or threads < 1):
            return None
        if self._vectors_in != "memory" or self._live.latest is None or choose_gpu(device) is not None:
            return None
        return search_one(self._live.now, queries, single, options)

    def _check_queries(self, queries: Vectors, given: Any) -> None:
        """Refuse queries that cannot be searched for, and none at all."""
        if not len(queries):
            raise InvalidVectorsError("There are no queries: the array has 0 rows. Give one or more.")
        if len(unusable_rows(queries, self.config.metric)):  # which NaN and infinite values are, too
            as_queries(given, dim=self.config.dim)  # these are refused in words of their own
            self._check_usable(queries, "query")

    def _search_codes(self, query: Any, k: int, *, probes: int | None = None) -> SearchResult:
        """The k items nearest to a query, or to each of a batch, by what their codes decode to."""
        queries, single = as_queries(query, dim=self.config.dim, finite=False)
        self._check_queries(queries, query)
        request = SearchRequest(queries, single, k, probes)
        if self._live.latest is None:
            self._check_trained()
        if self._vectors_in == "memory":
            return search(lambda read: (self._by_codes_of(self._live.now()), read()), request)
        with self._live.moment() as snapshot:  # at which ids are fetched from the file
            return search(lambda read: (self._by_codes_of(snapshot), read()), request)

    def explain(self, query: Any, k: int = 10, **options: Any) -> SearchTrace:
        """Search for one query and tell how: the leaves opened, candidates, the time of each step."""
        return self.search(query, k, **options).trace

    def similar(self, id: Any, k: int = 10, **options: Any) -> SearchResult:
        """The k items most like an item of the index, itself left out; options as in :meth:`search`."""
        vector = self._vector_of(id)
        asked = SearchRequest(vector[np.newaxis], True, k, rerank=options.get("rerank"))  # for k hits, and not one more
        if asked.rerank is not None:
            options["rerank"] = max(int(asked.rerank), k + 1)
        found = self.search(vector, k + 1, **options)
        # one by one: NumPy compares strings without the NULs at their end
        others = np.array([i for i, hit in enumerate(found.flat_ids.tolist()) if hit != id][:k], dtype=np.int64)
        return SearchResult(
            found.flat_ids[others],
            found.flat_distances[others],
            lambda: found.read_codes()[others],
            np.array([0, len(others)]),
            True,
            found.read_trace,
        )

    # -- codes and prefixes -------------------------------------------------------------------------------------------

    def encode(self, vectors: Any) -> Codes:
        """The codes of vectors (n, dim): (n, levels). Stores nothing.

        They are those that the quantizer proposes: the collision policy is not asked, and a level that it adds is 0.
        """
        self._check_trained()
        matrix = as_vectors(vectors, dim=self.config.dim)
        self._check_usable(matrix, "vector")
        return self._quantizer.encode(comparable(matrix, self.config.metric))

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
        with self._store.reading():
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
        with self._store.reading():
            table = self._store.items(wanted)
            if vectors:
                rows = self._store.rows_of_ids(table["id"].combine_chunks())
                table = table.drop_columns([name for name in table.column_names if name == "vector"])
                table = table.append_column("vector", self._stored_vectors(rows))
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

    def import_items(
        self,
        path: str | os.PathLike[str],
        *,
        batch_size: int = 50_000,
        progress: bool | ProgressCallback = False,
    ) -> int:
        """Add the items of a file that ``export(path, vectors=True)`` wrote, in one transaction; returns how many.

        Items come with the IDs that they have in the file, and with its metadata. The file is Parquet, of an index with
        the same codebooks; another program may have left out some of its rows. Raises :class:`InvalidCodesError` for
        IDs of other codebooks, :class:`DuplicateIdError` for items that are in the index already, and for semantic IDs
        that, with the same ``dup_rank``, are or were those of other items here.
        """
        with self._lock, self._store.unchanging(), progress_callback(progress) as report:
            return import_items(
                self._store,
                self._coder,
                path,
                batch_size=batch_size,
                progress=report,
            )

    def stats(self) -> dict[str, Any]:
        """What the index is and what it costs, in plain values."""
        with self._store.reading():
            return self._stats()

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
            raise InvalidArgumentError(
                "The index has no items to report on. Add some with index.add(vectors) or semid add."
            )
        check_count("k", k)
        check_count("queries", queries)
        with self._lock, self._store.reading(), progress_callback(progress) as callback:
            layout, config = self._store.layout, self.config
            codes, ids = self._codes_and_ids()
            found = quality(
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
            return replace(found, drift=self._drift())

    # -- housekeeping -------------------------------------------------------------------------------------------------

    def verify(self, *, sample: int = 1_000, progress: bool | ProgressCallback = False) -> VerifyReport:
        """Check whether the file is whole: that its tables fit together, and fit the vectors.

        Reads everything, so that DuckDB looks at the checksum of each block. ``sample``: how many stored vectors are
        encoded again and compared with their codes. Raises nothing for what is wrong: ``report.ok`` tells, and each of
        ``report.checks`` says what was found.
        """
        with self._lock, progress_callback(progress) as callback:
            return verify(self._store, self._coder, sample=sample, progress=callback)

    def save_copy(self, path: str | os.PathLike[str], *, items: bool = True, overwrite: bool = False) -> None:
        """Write a copy of the index to a file, as it is at this moment: an index of its own, as small as can be.

        Also of an index in memory, which is how to keep one, and of one that is open for reading only. Your own tables
        come along. ``items=False`` copies only the codebooks: an index that gives the same IDs, to add or import other
        items to. Raises :class:`IndexExistsError` if the file exists, unless ``overwrite``, and :class:`StorageError`
        if it cannot be written; then there is no half of it.
        """
        (save_copy if items else save_codebooks)(self._store, path, overwrite=overwrite)

    def compact(self) -> CompactReport:
        """Give back the space of what was deleted, and sort the items by their IDs again; no ID changes.

        The file is written anew beside the old one, which it replaces when it is complete: until then the disk holds
        both. Searches go on meanwhile; writes wait. Raises :class:`IndexLockedError` if anything else in this process
        has the file open: another index, a connection taken from :meth:`engine`, a relation of :meth:`sql`.
        An index in memory is only sorted.
        """
        with self._lock:
            return compact(self._store, self._release_idle_connections)

    def close(self) -> None:
        """Release the file. Closing twice is allowed.

        What other threads are reading is waited for, up to 5 seconds; what they ask for then raises
        :class:`IndexClosedError`.
        """
        self._live.forget()
        self._by_codes = None
        self._release_connections()
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            "An index cannot be pickled or copied: it holds its file open. Open it in each process, with "
            "semid_index.open(path, read_only=True)."
        )

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

    def _release_idle_connections(self) -> None:
        """Let go of all connections but the store's own and those in use; they are made again when needed."""
        from sqlalchemy.pool import QueuePool

        pool = None if self._engine is None else self._engine.pool
        if not isinstance(pool, QueuePool) or not pool.checkedout():
            self._release_connections()

    @property
    def _coder(self) -> Coder:
        """That of this moment; another index on the same file may have trained it, or retrained it."""
        coder = self._coders.get(_trained_version(self._store))
        if coder is None:
            with self._store.reading():  # so that the version and what it learned belong together
                kind = quantizer_class(self.config.quantizer)
                coder = build.restore(self._store, kind, self._policy)
                self._coders[_trained_version(self._store)] = coder
        return coder

    @property
    def _quantizer(self) -> Quantizer:
        return self._coder.quantizer

    def _release_connections(self) -> None:
        """Let go of all connections but the store's own."""
        if self._engine is not None:
            self._engine.dispose()
        with self._sql_lock:
            if self._sql_search is not None:
                self._sql_search.close()
            self._sql_search = None

    def _stats(self) -> dict[str, Any]:
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
            "version": self._store.version,
            "drift": asdict(self._drift()),
            "code_bytes_per_item": layout.bytes_per_item,
            "float32_bytes_per_item": 4 * config.dim,
            "codebook_bytes": code_bytes,
            "file_bytes": file_bytes,
            "file_column_bytes": self._store.column_bytes() if file_bytes else {},
            "file_bytes_per_item": file_bytes / items if items else 0.0,
        }
        snapshot = self._live.latest
        stats["device"] = self._device_stats()
        if snapshot is not None:
            stats["leaves"] = sum(len(state.leaves) for state in snapshot.states)
            stats["memory_bytes"] = {
                **snapshot.memory(),
                "codebooks": self._learned_bytes(),
                "database": self._store.memory_bytes(),
            }
        return stats

    def _learned_bytes(self) -> int:
        """Bytes of what training learned, which encodes and decodes."""
        return sum(array.nbytes for array in self._coder.arrays().values())

    def _device_stats(self) -> dict[str, Any]:
        """Where it is searched, and what would fit on a GPU."""
        gpu = choose_gpu(self._place.device)
        state = None if gpu is None else gpu_state(gpu)
        made = None if gpu is None else self._on_gpus.get((gpu, may_spread(self._place.device)))
        on_gpu = made or SearchOnGpu(gpu, self._place.precision)
        return {"asked": self._place.device, **on_gpu.stats(len(self), self.config.dim, state)}

    def _search(
        self, request: SearchRequest, match: Callable[[float], Rows] | None = None, *, device: Device = "cpu"
    ) -> SearchResult:
        """Search among the items of one moment, at which the matches and, from the file, the vectors are read, too."""
        if self._live.latest is None:
            self._check_trained()
        gpu = choose_gpu(device)
        reason = "" if gpu is None else why_not(request, self._place.precision, self.config.dim)
        if gpu is not None and device == "auto":
            reason = reason or self._not_on_gpu

        def load(read: Callable[[], Rows | None]) -> tuple[Snapshot, Rows | None]:
            nonlocal reason
            if moment is None:
                snapshot, rows = self._live.now_and(read)
            else:
                snapshot, rows = moment.enter_context(self._live.moment()), read()
            if gpu is not None and not reason:
                snapshot, reason = self._on_gpu(snapshot, gpu, device)
            return snapshot, rows

        moment: ExitStack | None = None
        if self._vectors_in == "memory":
            found = search(load, request, match)
        else:
            with ExitStack() as moment:
                found = search(load, request, match)
        return _with_reason(found, reason) if reason else found

    def _on_gpu(self, snapshot: Snapshot, gpu: int, device: Device) -> tuple[Snapshot, str]:
        """A snapshot to be searched on a GPU; if it does not fit, for "auto" the same one, and the reason."""
        spread = may_spread(device)
        try:
            on_gpu = self._on_gpus.setdefault((gpu, spread), SearchOnGpu(gpu, self._place.precision, spread=spread))
            return on_gpu.snapshot(snapshot), ""
        except DeviceError as error:
            if device != "auto":
                raise
            log.warning("device='auto' takes the CPU: %s", error)
            self._not_on_gpu = str(error)
            return snapshot, self._not_on_gpu

    def _read_items(self, rows: range, *, few: bool) -> SearchState:
        return SearchState(self._store, self._coder, vectors_in=self._vectors_in, rows=rows, few=few)

    def _by_codes_of(self, snapshot: Snapshot) -> Snapshot:
        """The same items, to be searched by their codes alone."""
        self._by_codes = made = by_codes(snapshot, self._by_codes)
        return made

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
        with self._store.reading():
            stored = self._store.codes()
            order = np.argsort(stored.rows)
            codes = unpack(stored.sids, self._store.layout, stored.rest)
            return codes[order], self._store.ids(of=stored).take(order)

    def _held_out(self, vectors: Any) -> tuple[Codes, Vectors]:
        """Codes and vectors of (at most 20,000 of) the rows."""
        source = open_vectors(vectors)
        if not source.rows:
            raise InvalidVectorsError("There are no held-out vectors: the array has 0 rows. Give one or more.")
        sample = source.sample(min(source.rows, _HELD_OUT), seed=self.config.seed)
        matrix = as_vectors(sample, dim=self.config.dim, what="held-out vectors")
        self._check_usable(matrix, "held-out vector")
        matrix = comparable(matrix, self.config.metric)
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

    def _drift(self) -> Drift:
        """How the items compare with those that the codebooks were learned from."""
        sums, end = self._store.meta("drift"), self._store.next_row
        shelves = self._store.first_level_counts() if self._quantizer.hierarchical else None
        repeated = None
        if sums and (size := min(sums["since"], end - sums["since"])):
            spans = (range(sums["since"] - size, sums["since"]), range(end - size, end))
            first, new = (self._store.repeated_share(rows) for rows in spans)
            repeated = first, new
        report = self._store.meta("train_report")
        return assess(sums, report, items=len(self), shelves=shelves, repeated=repeated)

    def _check_trained(self) -> None:
        if not self._store.is_trained:
            raise NotTrainedError("The index is not trained. Call index.train(vectors) and index.add(vectors) first.")

    def _check_usable(self, vectors: Vectors, what: str) -> None:
        """Refuse vectors that are finite and yet have no distance to others."""
        if len(rows := unusable_rows(vectors, self.config.metric)):
            raise InvalidVectorsError(
                f"{what.capitalize()} {rows[0]} cannot be used: {allowed(self.config)}", rows=rows.tolist()
            )

    def _prefix(self, prefix: str | Sequence[int], what: str) -> tuple[int, ...]:
        self._check_trained()
        if not self._quantizer.hierarchical:
            raise PrefixNotSupportedError(self.config.quantizer, what)
        layout = self._store.layout
        if isinstance(prefix, str):
            return parse_prefix(prefix, layout)
        if isinstance(prefix, np.ndarray):
            prefix = list(prefix) if prefix.ndim else prefix.item()
        is_list = isinstance(prefix, Sequence) and not isinstance(prefix, bytes)
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
        with self._store.reading():
            row = np.array([-1]) if wanted is None else self._store.rows_of_ids(wanted)
            if row[0] < 0:
                raise UnknownIdError(f"There is no item with id {id!r} in the index.")
            column = self._stored_vectors(row)
        return np.asarray(column.flatten().to_numpy(), dtype=np.float32)

    def _stored_vectors(self, rows: NDArray[np.int64]) -> pa.Array:
        """The stored vectors of some items as float32, or the decoded ones where none are stored."""
        if self.config.vectors == "none":
            return fixed_size_list(self._quantizer.decode(self._store.codes_of(rows)))
        return fixed_size_list(FileVectors(self._store, rows, self.config.metric).take(slice(None)))


def _with_reason(found: SearchResult, reason: str) -> SearchResult:
    """A result whose trace says why it was not searched on a GPU."""
    return replace(found, read_trace=lambda: replace(found.trace, device=f"cpu ({reason})"))


def _trained_version(store: Store) -> int:
    """The version of the IDs at this moment; 0 before training."""
    return store.version if store.is_trained else 0


def _version(against: SemanticIndex | tuple[Any, Any]) -> tuple[pa.Array, Codes]:
    """The ids and codes of an earlier version."""
    if isinstance(against, SemanticIndex):
        codes, ids = against._codes_and_ids()
        return ids, codes
    ids, codes = against
    matrix = np.asarray(codes)
    return as_ids(ids, count=len(matrix)), codes_of_array(matrix, "The earlier version")


def _version_record(number: int, facts: Mapping[str, Any], *, present: bool) -> IndexVersion:
    report = facts["train_report"]
    error = report["levels"][-1]["error"] if report["levels"] else None
    return IndexVersion(number, facts["items"], facts.get("trained_at"), report["rows"], error, present)


def _make_quantizer(kind: type[Quantizer], options: dict[str, Any]) -> Quantizer:
    _check_options(kind, options)
    return kind(**options)


def _check_config(quantizer: Quantizer, options: Mapping[str, Any]) -> None:
    """Refuse options that would be lost: the index keeps nothing else of a quantizer than its configuration."""
    if lost := sorted(set(options) - set(quantizer.get_config())):
        raise PluginError(
            f"The quantizer '{quantizer.name}' takes the option '{lost[0]}', but its get_config() does not return it, "
            "so it would be lost once the index is opened again. Report this to whoever wrote it."
        )


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


class _Place:
    """The device that an index was opened with."""

    def __init__(self, device: Device | None, precision: str) -> None:
        self.precision = check_precision(precision)
        self.device = parse_device(device)
        if self.device != "auto":
            choose_gpu(self.device)  # a GPU that was named has to work; for "auto", looking for one can wait

    def training(self) -> AbstractContextManager[None]:
        """k-means there."""
        return clustering_on(choose_gpu(self.device))
