"""The SQL macros of an index, so that its file alone can search, in any DuckDB client.

They are written for the one index that they are stored in: its levels, codebook sizes, metric, and what it keeps of the
vectors. All functions here are pure: a shape in, SQL out. ``docs/sql.md`` explains the macros to users.

Three rules keep them usable everywhere:

- Parameters have no types and are cast inside: DuckDB gives no ``?`` to typed ones.
- A parameter replaces every unqualified name like its own, and an argument may name columns of the caller's. So
  columns are qualified where a parameter has their name, and in macros that may be called for each row of a query
  arguments stand where no table of ours hides the caller's columns.
- A check of arguments is a CASE whose conditions depend on nothing else. DuckDB works those out beforehand, sees a
  constant range of sids, and skips the row groups outside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from semid_index.codes import CodeLayout
from semid_index.metrics import SQL_FUNCTIONS
from semid_index.records import Metric, Tier
from semid_index.tables import bucket_expressions, code_expressions, rest_type, text_expression

NAMES = (
    "semid_text",
    "semid_parse",
    "semid_prefix",
    "semid_common_prefix_len",
    "semid_decode",
    "semid_encode",
    "semid_scan",
    "semid_search",
    "semid_search_exact",
    "semid_search_many",
    "semid_similar",
    "semid_under",
    "semid_children",
    "semid_siblings",
    "semid_tree",
)
"""All macros. Every index has them; those that make no sense in one say why when they are called."""

PROBES = 256
"""Buckets that a search opens by default."""
RERANKED = 200
"""Candidates that get exact distances by default."""

_GREEDY = ("rq", "balanced-rq", "vq", "pq")  # quantizers that are known to choose codes level by level
_GREEDY_OPTIONS = {"beam": 1, "prefix_beam": 1, "normalize_residuals": False}  # unless these options have other values
_HIT = ("id", "semantic_id", "distance")
_TABLE_COLUMNS = {
    **dict.fromkeys(("semid_scan", "semid_search", "semid_search_exact", "semid_similar"), _HIT),
    "semid_search_many": ("qid", *_HIT),
    **dict.fromkeys(("semid_under", "semid_siblings"), ("id", "semantic_id")),
    **dict.fromkeys(("semid_children", "semid_tree"), ("prefix", "items")),
}
"""The columns of the macros that give a table."""

_RERANKABLE: tuple[Tier, ...] = ("float32", "int8")  # DuckDB has no half type
_PREFIX_PATTERN = r"(\d{1,9}(-\d{1,9})*(-\*?)?|\*)?"  # what codes.parse_prefix takes
_MOST_BUCKETS = 1 << 16  # a bucket has at most 16 bits; arg_min refuses a million and more
_SHOWN_SIZES = 8
_TINY = "1e-30"  # so that nothing is divided by a length of 0


@dataclass(frozen=True)
class IndexShape:
    """All that the macros of an index depend on."""

    layout: CodeLayout
    dim: int
    metric: Metric
    tier: Tier
    codeword_levels: int
    """How many of the first levels have codewords in ``semid_codebook``. The others add nothing to a vector."""
    hierarchical: bool
    greedy: bool
    """Whether encoding takes, level by level, the codeword nearest to what is left over."""

    @property
    def vector(self) -> str:
        """The SQL type of a vector."""
        return f"FLOAT[{self.dim}]"

    @property
    def id_columns(self) -> list[str]:
        """The columns, and parameters, that hold an ID."""
        return ["sid", "sid_rest"] if self.layout.rest_levels else ["sid"]

    @property
    def codes(self) -> list[str]:
        """SQL for the code at each level that has codewords, over the columns that hold an ID."""
        return [sql.removesuffix("::INTEGER") for sql in code_expressions(self.layout).values()][: self.codeword_levels]


def encodes_greedily(quantizer: str, config: Mapping[str, Any]) -> bool:
    """Whether a quantizer of this name and configuration is known to choose codes level by level, the nearest one."""
    return quantizer in _GREEDY and all(config.get(name, usual) == usual for name, usual in _GREEDY_OPTIONS.items())


def create_macros(shape: IndexShape) -> list[str]:
    """The statements that write the macros of an index, or write them anew."""
    definitions = {**_text_macros(shape), **_prefix_macros(shape), **_vector_macros(shape), **_search_macros(shape)}
    return [f"CREATE OR REPLACE MACRO {name}{definitions[name]}" for name in NAMES]


def _refusals(reason: str, **parameters: str) -> dict[str, str]:
    """Macros that take their parameters and say why there is no answer."""
    refusals = {}
    for name, listed in parameters.items():
        taken = ", ".join(f"{parameter} := NULL" for parameter in listed.split(", "))
        body = f"error('{reason}')"
        if columns := _TABLE_COLUMNS.get(name):
            body = f"TABLE SELECT {_select(dict.fromkeys(columns, 'NULL'))} WHERE {body}::BOOLEAN"
        refusals[name] = f"({taken}) AS {body}"
    return refusals


def _select(columns: Mapping[str, str]) -> str:
    """The columns of a SELECT: name -> expression."""
    return ", ".join(f"{sql} AS {name}" for name, sql in columns.items())


def _with(ctes: Iterable[str]) -> str:
    return "WITH " + ",\n  ".join(ctes)


# -- IDs and texts ----------------------------------------------------------------------------------------------------


def _text_macros(shape: IndexShape) -> dict[str, str]:
    layout = shape.layout
    parsed = _lowest_sid("text", layout)
    if layout.rest_levels:
        deeper = f"{_codes_in('text', layout)}[{layout.packed_levels + 1}:]"
        rest = f"list_resize({deeper}, {layout.rest_levels}, 0)::{rest_type(layout)}"
        parsed = f"{{'sid': {parsed}, 'sid_rest': {rest}}}"
    return {
        "semid_text": f"({', '.join(shape.id_columns)}) AS {text_expression(layout)}",
        "semid_parse": f"(text) AS {_checked('text', layout, layout.levels, parsed)}",
    }


def _checked(text: str, layout: CodeLayout, most: int, result: str) -> str:
    """A result, unless the text is no prefix of at most so many codes."""
    sizes = layout.codebook_sizes
    shown = ", ".join(map(str, sizes[:_SHOWN_SIZES])) + (", ..." if len(sizes) > _SHOWN_SIZES else "")
    paired = f"list_zip({_codes_in(text, layout)}, {_numbers(sizes)})"
    return f"""CASE
    WHEN {text} IS NULL THEN NULL
    WHEN NOT regexp_full_match(trim({text}), '{_PREFIX_PATTERN}')
      THEN error(concat('''', {text}, ''' is no prefix. Write codes with dashes between them, such as ''12-153''.'))
    WHEN len(regexp_extract_all({text}, '\\d+')) > {most}
      THEN error(concat('''', {text}, ''' has too many codes. Give at most {most}.'))
    WHEN list_bool_or(list_transform({paired}, lambda z: z[1] >= z[2]))
      THEN error(concat('''', {text}, ''' has a code that is not in its codebook. They have {shown} words.'))
    ELSE {result} END"""


def _codes_in(text: str, layout: CodeLayout) -> str:
    """The codes that a text lists, at most one for each level."""
    return f"(list_transform(regexp_extract_all({text}, '\\d+'), lambda n: n::INTEGER)[:{layout.levels}])"


def _lowest_sid(text: str, layout: CodeLayout) -> str:
    """The smallest sid below the prefix that a text lists."""
    # list_zip fills the shorter list up with NULLs, and their products add nothing
    paired = f"list_zip({_codes_in(text, layout)}, {_steps(layout)})"
    return f"coalesce(list_sum(list_transform({paired}, lambda z: z[1] * z[2])), 0)::BIGINT"


def _steps(layout: CodeLayout) -> str:
    """How far apart sids are whose codes at a level differ by one, as a list over the levels in the sid."""
    return _numbers(1 << shift for shift in layout.shifts)


def _spans(layout: CodeLayout) -> str:
    """How far the largest sid below a prefix is from the smallest, as a list over prefixes of 0, 1, 2, ... codes."""
    return _numbers((1 << shift) - 1 for shift in (layout.sid_bits, *layout.shifts))


def _numbers(values: Iterable[int]) -> str:
    """A list of whole numbers; where all are the same, which may be thousands, the number is written once."""
    numbers = list(values)
    if len(set(numbers)) == 1:
        return f"list_resize([]::BIGINT[], {len(numbers)}, {numbers[0]})"
    return f"[{', '.join(map(str, numbers))}]::BIGINT[]"


# -- prefixes ---------------------------------------------------------------------------------------------------------


def _prefix_macros(shape: IndexShape) -> dict[str, str]:
    if not shape.hierarchical:
        return _refusals(
            "The codes of this index are no hierarchy, so a prefix of them means nothing. Those of rq are one.",
            semid_prefix="sid, depth",
            semid_common_prefix_len="a, b",
            semid_under="prefix",
            semid_children="prefix",
            semid_siblings="id, depth",
            semid_tree="depth",
        )
    layout = shape.layout
    # A quotient and no shift: DuckDB 2 knows what it means for a range of sids, and skips row groups.
    step = _at_depth(1, layout.packed_levels, f"({_steps(layout)})[depth::INTEGER]")
    under = _is_under(layout, layout.levels)
    return {
        "semid_prefix": f"(sid, depth) AS sid // {step}",
        "semid_common_prefix_len": _common_prefix_len(layout),
        "semid_under": f"(prefix) AS TABLE SELECT id, {text_expression(layout)} AS semantic_id "
        f"FROM semid_codes WHERE {under}",
        "semid_children": _children(layout),
        "semid_siblings": _siblings(shape),
        "semid_tree": _tree(shape),
    }


def _at_depth(least: int, most: int, result: str) -> str:
    """A result, unless the parameter ``depth`` is out of its range."""
    said = f"concat('depth must be a whole number from {least} to {most}, not ', coalesce(depth::VARCHAR, 'NULL'), '.')"
    wrong = f"error({said})::BIGINT"  # DuckDB 1.5 takes an untyped error for NULL
    return f"CASE WHEN depth::INTEGER BETWEEN {least} AND {most} THEN {result} ELSE {wrong} END"


def _common_prefix_len(layout: CodeLayout) -> str:
    parameters = "a, b"
    cases = ["WHEN a IS NULL OR b IS NULL THEN NULL"]
    cases += [
        f"WHEN xor(a::BIGINT, b::BIGINT) >= {1 << shift} THEN {depth}" for depth, shift in enumerate(layout.shifts)
    ]
    if layout.rest_levels:
        parameters = "a, a_rest, b, b_rest"
        for place in range(1, layout.rest_levels + 1):
            cases.append(f"WHEN a_rest[{place}] <> b_rest[{place}] THEN {layout.packed_levels + place - 1}")
    return f"({parameters}) AS CASE {' '.join(cases)} ELSE {layout.levels} END"


def _is_under(layout: CodeLayout, most: int) -> str:
    """Whether a row of ``semid_codes`` is below the parameter ``prefix``, of at most so many codes."""
    codes, packed = _codes_in("prefix", layout), layout.packed_levels
    lowest = _lowest_sid("prefix", layout)
    highest = f"{lowest} + ({_spans(layout)})[least(len({codes}), {packed}) + 1]"
    condition = f"sid BETWEEN {_checked('prefix', layout, most, lowest)} AND {highest}"
    if layout.rest_levels:
        condition += f" AND sid_rest[:greatest(len({codes}) - {packed}, 0)] = {codes}[{packed + 1}:]"
    return condition


def _children(layout: CodeLayout) -> str:
    codes, packed = _codes_in("prefix", layout), layout.packed_levels
    depth = f"len({codes})"
    masks = _numbers((1 << bits) - 1 for bits in layout.bits[:packed])
    code = f"(sid // ({_steps(layout)})[{depth} + 1]) & ({masks})[{depth} + 1]"
    if layout.rest_levels:
        code = f"CASE WHEN {depth} < {packed} THEN {code} ELSE sid_rest[{depth} - {packed} + 1] END"
    return f"""(prefix) AS TABLE
  SELECT array_to_string(list_append({codes}, child.code), '-') AS prefix, child.items
  FROM (SELECT {code} AS code, count(*) AS items FROM semid_codes WHERE {_is_under(layout, layout.levels - 1)}
        GROUP BY 1) AS child
  ORDER BY child.items DESC, child.code"""


def _tree(shape: IndexShape) -> str:
    layout, packed = shape.layout, shape.layout.packed_levels
    step = f"({_steps(layout)})[least(depth::INTEGER, {packed})]"
    keys = {"prefix_sid": f"sid // {_at_depth(1, layout.levels, step)}"}
    codes = f"[{', '.join(list(code_expressions(layout).values())[:packed])}]"
    if layout.rest_levels:
        keys["prefix_rest"] = f"sid_rest[:greatest(depth::INTEGER - {packed}, 0)]"
        codes = f"list_concat({codes}, sid_rest::INTEGER[])"
    # one item below each prefix, for its first codes
    example = {name: f"any_value({name})" for name in shape.id_columns}
    return f"""(depth := 1) AS TABLE
  SELECT array_to_string({codes}[:depth::INTEGER], '-') AS prefix, items
  FROM (SELECT {_select({**keys, **example})}, count(*) AS items FROM semid_codes GROUP BY {", ".join(keys)})
  ORDER BY items DESC, {", ".join(keys)}"""


def _siblings(shape: IndexShape) -> str:
    layout, packed = shape.layout, shape.layout.packed_levels
    usual = (shape.codeword_levels or layout.levels) - 1
    span = _at_depth(0, layout.levels, f"({_spans(layout)})[least(depth::INTEGER, {packed}) + 1]")
    same = "c.sid BETWEEN (SELECT item.sid - (item.sid & span) FROM item) AND (SELECT item.sid | span FROM item)"
    if layout.rest_levels:
        deeper = f"sid_rest[:greatest(depth::INTEGER - {packed}, 0)]"
        same += f" AND c.{deeper} = (SELECT item.{deeper} FROM item)"
    return f"""(id, depth := {usual}) AS TABLE {_with(_item(shape, span=span))}
  SELECT c.id AS id, {text_expression(layout)} AS semantic_id FROM semid_codes AS c
  WHERE {same} AND c.row <> (SELECT item.row FROM item)"""


def _item(shape: IndexShape, **more: str) -> list[str]:
    """CTEs that end with ``item``: the row of ``semid_codes`` whose id is the parameter ``id``."""
    columns = {name: f"c.{name}" for name in ("row", *shape.id_columns)}
    unknown = "error(concat('There is no item with the id ', id, '.'))"
    return [
        f"known AS MATERIALIZED (SELECT {_select({**columns, **more})} FROM semid_codes AS c WHERE c.id = id)",
        f"item AS MATERIALIZED (FROM known UNION ALL BY NAME SELECT {unknown} AS row WHERE NOT EXISTS (FROM known))",
    ]


# -- codewords: decoding and encoding ---------------------------------------------------------------------------------


def _vector_macros(shape: IndexShape) -> dict[str, str]:
    id_parameters = ", ".join(shape.id_columns)
    if not shape.codeword_levels:
        reason = (
            "The quantizer of this index has no codebooks, and SQL can neither encode nor decode with it. Use Python."
        )
        return _refusals(reason, semid_decode=id_parameters, semid_encode="vector")
    macros = {"semid_decode": f"({id_parameters}) AS {_decoded(shape)}"}
    if shape.greedy:
        return {**macros, "semid_encode": _encode(shape)}
    reason = (
        "The quantizer of this index does not choose codes level by level, so SQL cannot encode with it. Use Python."
    )
    return {**macros, **_refusals(reason, semid_encode="vector")}


def _decoded(shape: IndexShape) -> str:
    """The sum of the codewords. The codebook's columns are renamed, so that they hide none of the caller's."""
    levels = range(1, shape.codeword_levels + 1)
    # + would join two arrays end to end, so they are added element by element, in the order in which Python adds.
    words = ", ".join(f"semid_found.words[{level}]" for level in levels)
    terms = " + ".join(f"z[{level}]" for level in levels)
    return f"""(SELECT list_transform(list_zip({words}), lambda z: {terms})::{shape.vector}
   FROM (SELECT list(semid_word ORDER BY semid_level) AS words
         FROM (SELECT unnest([{", ".join(shape.codes)}]) AS semid_code, unnest({list(levels)}) AS semid_level)
         JOIN semid_codebook AS semid_b (semid_level, semid_code, semid_word) USING (semid_level, semid_code)
         WHERE sid IS NOT NULL) AS semid_found
   WHERE semid_found.words IS NOT NULL)"""


def _encode(shape: IndexShape) -> str:
    """Two CTEs for each level: ``l1``, what is left over, and ``n1``, the codeword nearest to it."""
    layout, levels = shape.layout, range(1, shape.codeword_levels + 1)
    ctes = [_asked(shape, "SELECT vector AS q")]
    left_over = "asked.q"
    if shape.metric == "cosine":
        left_over = f"list_transform(asked.q, lambda x: x / sqrt(asked.square))::{shape.vector}"
    left = f"SELECT {left_over} AS left_over FROM asked"
    for level in levels:
        near = "array_distance(b.codeword, s.left_over)"
        found = {f"c{done}": f"any_value(s.c{done})" for done in range(1, level)}
        found |= {"left_over": "any_value(s.left_over)", "word": f"arg_min(b.codeword, {near})"}
        found[f"c{level}"] = f"arg_min(b.code, {near})"
        nearest = f"SELECT {_select(found)} FROM semid_codebook AS b, l{level} AS s WHERE b.level = {level}"
        ctes += [f"l{level} AS MATERIALIZED ({left})", f"n{level} AS MATERIALIZED ({nearest})"]
        left_over = f"list_transform(list_zip(s.left_over, s.word), lambda z: z[1] - z[2])::{shape.vector}"
        left = f"SELECT s.* REPLACE ({left_over} AS left_over) FROM n{level} AS s WHERE s.word IS NOT NULL"
    codes = [*(f"c{level}" for level in levels), *["0"] * (layout.levels - len(levels))]
    sid = " | ".join(f"({code}::BIGINT << {shift})" for code, shift in zip(codes, layout.shifts, strict=False))
    if layout.rest_levels:
        sid = f"{{'sid': {sid}, 'sid_rest': [{', '.join(codes[layout.packed_levels :])}]::{rest_type(layout)}}}"
    return f"(vector) AS ({_with(ctes)}\n  SELECT {sid} FROM n{len(levels)} WHERE c1 IS NOT NULL)"


def _asked(shape: IndexShape, given: str, *keys: str) -> str:
    """The CTE ``asked``: the query ``q`` that a SELECT gives, and its squared length. NULL gives no row."""
    usable, wrong = "isfinite(given.square)", "A query must have finite values, and a length below 1e19."
    if shape.metric == "cosine":
        usable, wrong = f"{usable} AND given.square > 0", f"{wrong} Under cosine it must not be all zeros."
    named = "".join(f"{key}, " for key in keys)
    return f"""asked AS MATERIALIZED (
    SELECT {named}given.q, given.square
    FROM (SELECT {named}typed.q, array_inner_product(typed.q, typed.q) AS square
          FROM (SELECT * REPLACE (plain.q::{shape.vector} AS q) FROM ({given}) AS plain) AS typed) AS given
    WHERE CASE WHEN given.q IS NULL THEN false WHEN {usable} THEN true ELSE error('{wrong}') END)"""


# -- search -----------------------------------------------------------------------------------------------------------


def _search_macros(shape: IndexShape) -> dict[str, str]:
    searches = {
        "semid_scan": "query, k",
        "semid_search": "query, k, nprobe",
        "semid_search_exact": "query, k, nprobe, rerank",
        "semid_search_many": "table_name, k, nprobe",
        "semid_similar": "id, k, nprobe, rerank",
    }
    if not shape.codeword_levels:
        reason = "The quantizer of this index has no codebooks, and SQL cannot search with it. Use Python."
        return _refusals(reason, **searches)
    asked = _asked(shape, "SELECT query AS q")
    options = f"query, k := 10, nprobe := {PROBES}"
    macros = {
        "semid_scan": f"(query, k := 10) AS TABLE {_scanned(shape, [asked], routed=False)}",
        "semid_search": f"({options}) AS TABLE {_scanned(shape, [asked])}",
        "semid_search_many": _search_many(shape),
        "semid_similar": _similar(shape),
    }
    if shape.tier in _RERANKABLE:
        exact = f"({options}, rerank := {RERANKED}) AS TABLE {_reranked(shape, [asked])}"
        return {**macros, "semid_search_exact": exact}
    reason = f'This index has vectors="{shape.tier}", and SQL has no distances to such. Use semid_search, or Python.'
    return {**macros, **_refusals(reason, semid_search_exact=searches["semid_search_exact"])}


def _scanned(shape: IndexShape, ctes: list[str], *, routed: bool = True, among: str = "true") -> str:
    """The hits by decoded distances, for CTEs that end with ``asked``."""
    return f"""{_with([*ctes, *_nearest(shape, "k", routed=routed, among=among)])}
  SELECT hit.id AS id, {text_expression(shape.layout)} AS semantic_id, {_distance(shape)} AS distance
  FROM nearest AS hit ORDER BY hit.score, hit.row"""


def _reranked(shape: IndexShape, ctes: list[str], *, among: str = "true") -> str:
    """The hits by exact distances, of those that are best by decoded distances."""
    return f"""{_with([*ctes, *_nearest(shape, "greatest(k, rerank)", among=among)])}
  SELECT hit.id AS id, {text_expression(shape.layout)} AS semantic_id, hit.exact AS distance
  FROM (SELECT n.*, {_exact_distance(shape)} AS exact
        FROM nearest AS n JOIN semid_vectors AS x ON x.row = n.row, asked) AS hit
  ORDER BY hit.exact, hit.row LIMIT k"""


def _nearest(shape: IndexShape, limit: str, *, routed: bool = True, among: str = "true") -> list[str]:
    """CTEs, after ``asked``, that end with ``nearest``: the best items by the distance to their decoded vectors."""
    ctes = [
        f"""products AS MATERIALIZED (
    SELECT list(word.product ORDER BY word.level, word.code) AS lut, any_value(word.square) AS square
    FROM (SELECT b.level, b.code, {_product(shape)} AS product, asked.square
          FROM semid_codebook AS b, asked) AS word)"""
    ]
    if routed and shape.hierarchical:
        score = _bucket_score(shape)
        ctes.append(f"""probed AS MATERIALIZED (
    SELECT b.bucket FROM semid_buckets AS b, products AS p WHERE p.lut IS NOT NULL
    ORDER BY {score}, b.bucket LIMIT nprobe)""")
        among += " AND c.bucket IN (SELECT probed.bucket FROM probed)"
    columns = {name: f"c.{name}" for name in ("row", "id", *shape.id_columns)}
    columns |= {"square": "p.square", "score": _score(shape)}
    ctes.append(f"""nearest AS MATERIALIZED (
    SELECT {_select(columns)} FROM semid_codes AS c, products AS p WHERE p.lut IS NOT NULL AND {among}
    ORDER BY score, c.row LIMIT {limit})""")
    return ctes


def _product(shape: IndexShape) -> str:
    """The inner product of a codeword ``b`` and the query; under cosine, of the query at length 1."""
    product = "array_inner_product(b.codeword, asked.q)"
    return f"({product} / sqrt(asked.square))::FLOAT" if shape.metric == "cosine" else product


def _looked_up(codes: list[str], shape: IndexShape, number: str = "0") -> str:
    """The inner product of a query and the sum of the codewords with these codes, from the list ``p.lut``.

    ``number`` counts queries from 0; the list has all codewords of the first one, then all of the second, and so on.
    """
    *starts, words = accumulate(shape.layout.codebook_sizes[: shape.codeword_levels], initial=0)
    before = "" if number == "0" else f"{number} * {words} + "
    with_words = zip(codes[: shape.codeword_levels], starts, strict=False)
    # BIGINT because a small number plus a UTINYINT of sid_rest would have to be a UTINYINT
    return " + ".join(f"p.lut[{before}{start + 1}::BIGINT + {code}]" for code, start in with_words)


def _bucket_score(shape: IndexShape) -> str:
    """What orders the buckets ``b`` by the distance from the query to the sum of their codewords, as in Python."""
    product = _looked_up(bucket_expressions(shape.layout), shape)
    return f"-({product})" if shape.metric == "ip" else f"b.norm2 - 2 * ({product})"


def _score(shape: IndexShape, number: str = "0") -> str:
    """What orders the items ``c`` by the distance from the query to their decoded vectors, in float32 throughout."""
    product = _looked_up(shape.codes, shape, number)
    if shape.metric == "ip":
        return f"-({product})"
    if shape.metric == "cosine":
        return f"-({product}) / sqrt(c.norm2 + {_TINY}::FLOAT)::FLOAT"
    return f"c.norm2 - 2 * ({product})"


def _distance(shape: IndexShape) -> str:
    """The distance of the metric, from the score of a ``hit``; clipped, because rounding can give -1e-7."""
    if shape.metric == "ip":
        return "hit.score"
    if shape.metric == "cosine":
        return "least(greatest(1 + hit.score, 0), 2)::FLOAT"
    return "sqrt(greatest(hit.square + hit.score, 0))::FLOAT"


def _exact_distance(shape: IndexShape) -> str:
    """The distance between ``asked.q`` and the stored vector ``x``."""
    function = SQL_FUNCTIONS[shape.metric]
    if shape.tier == "float32":
        return f"{function}(x.v, asked.q)"
    if shape.metric == "cosine":
        return f"{function}(x.v::{shape.vector}, asked.q)"  # the scale changes no angle
    if shape.metric == "ip":
        return f"(x.scale * {function}(x.v::{shape.vector}, asked.q))::FLOAT"
    # |q - s v|^2 = |q|^2 - 2 s q.v + s^2 |v|^2, in float64 because little may be left of it
    q, v = f"asked.q::DOUBLE[{shape.dim}]", f"x.v::DOUBLE[{shape.dim}]"
    qq, qv, vv = (f"array_inner_product({a}, {b})" for a, b in ((q, q), (q, v), (v, v)))
    return f"sqrt(greatest({qq} - 2 * x.scale * {qv} + pow(x.scale::DOUBLE, 2) * {vv}, 0))::FLOAT"


def _similar(shape: IndexShape) -> str:
    """Items like an item: by its stored vector where SQL can read that, else by what its codes decode to."""
    stored = "FROM semid_vectors AS x WHERE x.row = (SELECT item.row FROM item)"
    query = {
        "float32": f"SELECT x.v {stored}",
        "int8": f"SELECT list_transform(x.v, lambda e: e * x.scale) {stored}",
    }.get(shape.tier, f"SELECT {_decoded(shape)} FROM item")
    ctes = [*_item(shape), _asked(shape, f"SELECT ({query}) AS q")]
    others = "c.row <> (SELECT item.row FROM item)"
    hits = _reranked if shape.tier in _RERANKABLE else _scanned
    return f"(id, k := 10, nprobe := {PROBES}, rerank := {RERANKED}) AS TABLE {hits(shape, ctes, among=others)}"


def _search_many(shape: IndexShape) -> str:
    """As for one query, with a list of products for each.

    A list must never come out of a join: it would be copied to every row. So buckets are scored in a cross product with
    the lists, and candidates in one with a single row that has all the lists, one after the other.
    """
    id_columns = {name: f"c.{name}" for name in ("row", "id", *shape.id_columns)}
    ctes = [
        _asked(shape, "SELECT t.qid, t.v AS q FROM query_table(table_name) AS t", "qid"),
        "numbered AS MATERIALIZED (SELECT asked.*, row_number() OVER () - 1 AS number FROM asked)",
        f"""products AS MATERIALIZED (
    SELECT word.number, any_value(word.qid) AS qid, any_value(word.square) AS square,
           list(word.product ORDER BY word.level, word.code) AS lut
    FROM (SELECT asked.*, b.level, b.code, {_product(shape)} AS product
          FROM semid_codebook AS b, numbered AS asked) AS word GROUP BY word.number)""",
    ]
    if shape.hierarchical:
        score = _bucket_score(shape)
        found = {"qid": "a.qid", "number": "a.number", "square": "a.square", "norm2": "c.norm2", **id_columns}
        ctes += [
            f"""probed AS MATERIALIZED (
    SELECT best.number, unnest(best.buckets) AS bucket
    FROM (SELECT p.number, arg_min(b.bucket, {score}, least(nprobe, {_MOST_BUCKETS})) AS buckets
          FROM semid_buckets AS b, products AS p GROUP BY p.number) AS best)""",
            f"""candidates AS MATERIALIZED (
    SELECT {_select(found)} FROM semid_codes AS c JOIN probed ON probed.bucket = c.bucket
    JOIN numbered AS a ON a.number = probed.number)""",
            "every AS MATERIALIZED (SELECT flatten(list(p.lut ORDER BY p.number)) AS lut FROM products AS p)",
        ]
        query, number, source = "c", "c.number", "candidates AS c, every AS p"
    else:
        query, number, source = "p", "0", "semid_codes AS c, products AS p"
    columns = {name: f"{query}.{name}" for name in ("qid", "number", "square")}
    columns |= {**id_columns, "score": _score(shape, number)}
    return f"""(table_name, k := 10, nprobe := {PROBES}) AS TABLE {_with(ctes)}
  SELECT hit.qid, hit.id, {text_expression(shape.layout)} AS semantic_id, {_distance(shape)} AS distance
  FROM (SELECT * FROM (SELECT {_select(columns)} FROM {source}) AS scored
        QUALIFY row_number() OVER (PARTITION BY scored.number ORDER BY scored.score, scored.row) <= k) AS hit
  ORDER BY hit.qid, hit.score, hit.row"""
