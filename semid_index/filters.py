"""User's WHERE text -> a checked expression.

Nothing that a user wrote is ever run. DuckDB's own parser turns the text into a tree, on a private in-memory
database that holds nothing; the tree is walked against an allow-list; and a new text is *built* from the parts that
are on the list. So what is not known here cannot come out, whatever a later DuckDB learns to parse, and both
DuckDB 1.5 and 2 give the same meaning although their trees differ.

The text is not taken from ``json_deserialize_sql``: that writes a parameter's name as it is, so
``x = $"1 OR (SELECT ...)"`` would come back as code; it cuts a string at a NUL; and DuckDB 1.5 turns ``1e400``
into an error and ``0.1e1`` into a decimal.

Some things are limited although they are only slow, because one row is enough and no time limit stops DuckDB inside
a row: ILIKE with five ``%`` took 234 s on one text of 400 characters (1.5.6), and a ``strftime`` format can be
longer than the table.
"""

from __future__ import annotations

import datetime
import difflib
import functools
import json
import math
import os
import re
import threading
import uuid
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import duckdb
import numpy as np

from semid_index.errors import FilterError
from semid_index.tables import literal, name_key, quoted

MAX_LENGTH = 100_000
"""Characters that a filter may have."""
MAX_DEPTH = 200
"""How deep brackets or expressions may be nested."""
MAX_PATTERN_LENGTH = 1_000
"""Characters of a LIKE or regular expression."""
MAX_PATTERN_SIZE = 300
"""Characters of a regular expression after its repetitions are written out: ``(ab?){10}`` has 30."""
MAX_FORMAT_LENGTH = 100
"""Characters of a date format."""
_REMEMBERED_LENGTH = 500  # characters of the filters whose trees are kept: what a program asks again and again
MAX_WILDCARDS = 2
"""``%`` in a LIKE pattern, not counting those at its end."""

ALLOWED = (
    "Allowed are columns, constants, parameters (? or $name), comparisons, AND, OR, NOT, IS NULL, IN, BETWEEN, LIKE, "
    "ILIKE, CASE, CAST, + - * / // % and plain functions such as lower or year."
)

# None of these returns more than it was given, reads anything but its arguments, or changes anything.
_FUNCTION_NAMES = """
    abs ceil ceiling floor round sign trunc sqrt isfinite isinf isnan greatest least nullif if
    lower upper length len strlen trim ltrim rtrim left right substring substr
    starts_with prefix ends_with suffix contains instr strpos position regexp_matches regexp_full_match
    list_contains array_contains list_has array_has list_has_any array_has_any list_has_all array_has_all
    year quarter month week day dayofmonth dayofweek isodow dayofyear hour minute second epoch dayname monthname
    date_part datepart date_trunc datetrunc date_diff datediff make_date last_day strftime today now
    to_years to_months to_weeks to_days to_hours to_minutes to_seconds
"""
FUNCTIONS = frozenset(_FUNCTION_NAMES.split())
"""The functions that a filter may call."""
_MEMBERSHIP = frozenset({"contains", "list_contains", "array_contains", "list_has", "array_has"})
# Which argument is a pattern, and how long it may be.
_PATTERN_ARGUMENTS = {
    "regexp_matches": (1, MAX_PATTERN_LENGTH),
    "regexp_full_match": (1, MAX_PATTERN_LENGTH),
    "strftime": (1, MAX_FORMAT_LENGTH),
}
_REGULAR = frozenset({"regexp_matches", "regexp_full_match"})
# Escapes, classes such as [^]a[:alpha:]], and repetitions are parts. (\Q..\E, where they are not, is refused.)
_REGULAR_PART = re.compile(
    r"\\. | \[\^?\]?(?:\\.|\[:\^?\w+:\]|[^\]\\])*\] | \{(?P<least>\d+)(?:,(?P<most>\d*))?\} | .", re.VERBOSE | re.DOTALL
)
_ARITHMETIC = frozenset({"+", "-", "*", "/", "//", "%"})
_LIKES = {
    "~~": "LIKE",
    "!~~": "NOT LIKE",
    "~~*": "ILIKE",
    "!~~*": "NOT ILIKE",
    "like_escape": "LIKE",
    "not_like_escape": "NOT LIKE",
    "ilike_escape": "ILIKE",
    "not_ilike_escape": "NOT ILIKE",
}
# What DuckDB 1.5 itself puts into the schema main when it parses LIKE .. ESCAPE, EXTRACT, TRIM and the like.
_MADE_BY_PARSER = frozenset({"date_part", "substring", "position", "trim", "ltrim", "rtrim", *_LIKES})
_COMPARISONS = {
    "COMPARE_EQUAL": "=",
    "COMPARE_NOTEQUAL": "!=",
    "COMPARE_LESSTHAN": "<",
    "COMPARE_LESSTHANOREQUALTO": "<=",
    "COMPARE_GREATERTHAN": ">",
    "COMPARE_GREATERTHANOREQUALTO": ">=",
    "COMPARE_DISTINCT_FROM": "IS DISTINCT FROM",
    "COMPARE_NOT_DISTINCT_FROM": "IS NOT DISTINCT FROM",
}
_CONJUNCTIONS = {"CONJUNCTION_AND": " AND ", "CONJUNCTION_OR": " OR "}
_MAPPING_OPERATORS = ("=", "!=", "<", "<=", ">", ">=", "in", "like", "between")

# DuckDB 2 gives a type as it was written, 1.5 by its own name.
_TYPES = {
    alias: name
    for name, aliases in {
        "BOOLEAN": "boolean bool logical",
        "TINYINT": "tinyint int1",
        "SMALLINT": "smallint int2 short int16",
        "INTEGER": "integer int int4 int32 signed",
        "BIGINT": "bigint int8 int64 long",
        "HUGEINT": "hugeint int128",
        "UTINYINT": "utinyint uint8",
        "USMALLINT": "usmallint uint16",
        "UINTEGER": "uinteger uint32",
        "UBIGINT": "ubigint uint64",
        "FLOAT": "float real float4",
        "DOUBLE": "double float8",
        "DECIMAL": "decimal numeric dec",
        "VARCHAR": "varchar text string char bpchar",
        "DATE": "date",
        "TIME": "time",
        "TIMESTAMP": "timestamp datetime",
        "INTERVAL": "interval",
        "UUID": "uuid guid",
    }.items()
    for alias in aliases.split()
} | {"timestamptz": "TIMESTAMPTZ", "timestamp with time zone": "TIMESTAMPTZ"}

_INTEGER_TYPES = frozenset({"INTEGER", "BIGINT", "HUGEINT", "UHUGEINT"})  # of constants, in DuckDB 1.5
_NUMBER = re.compile(r"-?[\d_]*\.?[\d_]*(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
_PARAMETER_NAME = re.compile(r"[a-z_][a-z0-9_]*|[1-9][0-9]*")
_SCALARS = (bool, int, float, Decimal, str, bytes, datetime.date, datetime.time, datetime.timedelta, uuid.UUID)
_LISTS = (list, tuple, set, frozenset, np.ndarray)

Node = dict[str, Any]


@dataclass(frozen=True)
class CheckedFilter:
    """A filter that was checked, and can be run."""

    sql: str
    """An expression to place into ``SELECT ... FROM items WHERE (<sql>)``; parameters are ``$1`` .. or ``$name``."""
    params: list[Any] | dict[str, Any]
    """The values to bind: a list for numbered parameters, a dict for named ones."""
    columns: frozenset[str]
    """The columns it reads, as the table spells them."""


def check_filter(
    where: str | Mapping[str, Any],
    params: Sequence[Any] | Mapping[str, Any] | None,
    columns: Collection[str],
    *,
    table: str | None = None,
) -> CheckedFilter:
    """The expression that ``where`` means, safe to run, with its parameters.

    ``where`` is a SQL expression over ``columns``, or a mapping of conditions that must all hold, such as
    ``{"section": "games", "installed_kb": {">=": 3, "<": 50_000}, "name": ["a", "b"], "note": None}``. A list bound
    to a parameter is tested with ``name IN ?``, however long it is. Columns are matched as DuckDB does, whatever the
    case of A to Z; with ``table``, each is written ``"table"."column"``.

    Raises :class:`FilterError` for everything that is not on the list of allowed parts.

    >>> check_filter("Section = ? AND kb < 10", ["games"], ["section", "kb"]).sql
    '(("section" = $1) AND ("kb" < 10))'
    """
    if isinstance(where, Mapping):
        if params is not None:
            raise FilterError("A mapping brings its own values: leave params out, or write where as SQL text.")
        where, params = _text_of_mapping(where)
    values = _bound_values(params)
    writer = _Writer({name_key(name): name for name in columns}, table, values)
    try:
        sql = writer.expression(_parse(where))
    except RecursionError:
        raise _too_deep() from None
    _check_parameters(writer.parameters, values, named=isinstance(params, Mapping))
    bound = values if isinstance(params, Mapping) else list(values.values())
    return CheckedFilter(sql, bound, frozenset(writer.columns))


# --- text -> tree ----------------------------------------------------------------------------------------------------

_BEFORE, _AFTER = "SELECT 1 FROM t WHERE (", "\n)"

# Seen before the parser sees the text: it is for speed (the parsers of both versions have inputs of 100 kB that take
# them a minute) and for clear messages. Safety does not depend on it.
_TOKEN = re.compile(
    r"""  (?P<quoted> '[^']*(?:''[^']*)*' | "[^"]*(?:""[^"]*)*" )
        | (?P<comment> -- | /\* )
        | (?P<prefix> (?<![\w$]) (?: [ebxn] | u& ) (?=') )
        | (?P<dollar> \$ (?: \w*\$ | 0 ) )
        | (?P<semicolon> ; )
        | (?P<open> [(\[{] )
        | (?P<close> [)\]}] )
        | (?P<strange> [^\x20-\x7e\t\r\n\w] | ` )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_REFUSED_TOKENS = {
    "comment": "Comments are not allowed in a filter.",
    "prefix": "Strings such as E'..' or x'..' are not allowed in a filter: bind the value as a parameter.",
    "dollar": "'{}' is not allowed in a filter: write strings as '..' and parameters as ?, $1 or $name.",
    "semicolon": "A filter is one expression, without ';'.",
    "strange": "The character {!a} is not allowed in a filter outside quotes.",
}


def _parse(where: str) -> Node:
    """The expression tree of a filter, as DuckDB's parser gives it."""
    if not isinstance(where, str):
        raise FilterError(f"A filter is SQL text or a mapping, got {type(where).__name__}.")
    if not where.strip():
        raise FilterError("The filter is empty: leave where out to search everything.")
    if len(where) > MAX_LENGTH:
        raise FilterError(
            f"The filter has {len(where):,} characters; at most {MAX_LENGTH:,} are allowed. "
            "Bind long lists as one parameter: name IN ?"
        )
    return _remembered_tree(where) if len(where) <= _REMEMBERED_LENGTH else _tree(where)


def _tree(where: str) -> Node:
    _scan(where)
    parser = _parser(os.getpid())
    statement = parser.select(where)
    node: Node | None = statement.pop("where_clause", None)
    if node is None or statement != parser.plain:
        raise FilterError(f"A filter is one expression, without further clauses. {ALLOWED}")
    return node


# A text has the same tree whatever its parameters, and no one writes into a tree.
_remembered_tree = functools.lru_cache(maxsize=64)(_tree)


def _scan(where: str) -> None:
    if "\0" in where or not _is_unicode(where):
        raise FilterError("The filter has a NUL or half a surrogate pair in it: bind such values as parameters.")
    depth = 0
    for token in _TOKEN.finditer(where):
        kind = token.lastgroup or ""
        if kind in _REFUSED_TOKENS:
            raise FilterError(_REFUSED_TOKENS[kind].format(token.group()))
        depth += (kind == "open") - (kind == "close")
        if depth > MAX_DEPTH:
            raise _too_deep()
        if depth < 0:
            raise FilterError(f"The filter has a '{token.group()}' too many at character {token.start() + 1}.")


class _Parser:
    """DuckDB's parser, on a database of its own that holds nothing and opens nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection = duckdb.connect(
            ":memory:",
            config={
                "threads": 1,
                "enable_external_access": False,
                "autoload_known_extensions": False,
                "autoinstall_known_extensions": False,
                "allow_community_extensions": False,
                "lock_configuration": True,
            },
        )
        self.plain = self.select("1")
        del self.plain["where_clause"]

    def select(self, where: str) -> Node:
        """The statement ``SELECT 1 FROM t WHERE (<where>)`` as a tree. It is parsed, not run."""
        text = f"{_BEFORE}{where}{_AFTER}"
        with self._lock:
            [(said,)] = self._connection.execute("SELECT json_serialize_sql($1)", [text]).fetchall()
        answer = json.loads(said)
        if answer["error"]:
            raise _parser_error(answer)
        if len(answer["statements"]) != 1:
            raise FilterError("A filter is one expression, not several statements.")
        node: Node = answer["statements"][0]["node"]
        return node


@functools.cache
def _parser(process: int) -> _Parser:
    """The parser of this process: a forked child must neither use nor close its parent's connection."""
    return _Parser()


def _parser_error(answer: Node) -> FilterError:
    message = " ".join(str(answer["error_message"]).split())[:300]  # 1.5 may quote all the text
    if message.startswith("Max expression depth"):
        return _too_deep()
    position = int(answer.get("position", -1)) - len(_BEFORE)
    where = f" (character {position + 1})" if position >= 0 else ""
    return FilterError(f"The filter cannot be parsed: {message}{where}. {ALLOWED}")


def _too_deep() -> FilterError:
    return FilterError(
        f"The filter is nested too deeply; at most {MAX_DEPTH} levels are allowed. "
        "Bind long lists as one parameter: name IN ?"
    )


# --- tree -> text ----------------------------------------------------------------------------------------------------


class _Writer:
    """Writes an expression anew from the parts of a tree that are allowed, and notes what it uses."""

    def __init__(self, known: Mapping[str, str], table: str | None, values: Mapping[str, Any]) -> None:
        self._known = known
        self._table = table
        self._values = values
        self._depth = 0
        self.columns: set[str] = set()
        self.parameters: set[str] = set()
        self._writers: dict[str, Callable[[Node], str]] = {
            "COMPARISON": self._comparison,
            "CONJUNCTION": self._conjunction,
            "OPERATOR": self._operator,
            "BETWEEN": self._between,
            "CASE": self._case,
            "CAST": self._cast,
            "FUNCTION": self._function,
            "COLUMN_REF": self._column,
            "PARAMETER": self._parameter,
            "CONSTANT": self._constant,
        }

    def expression(self, node: Node) -> str:
        """The text of a node; in brackets wherever it could be read differently."""
        if node["class"] not in self._writers:
            raise _refused_node(node)
        if node["alias"]:
            raise _refused(f"The name '{_shown(node['alias'])}' for a part of the expression")
        if self._depth == MAX_DEPTH:
            raise _too_deep()
        self._depth += 1
        text = self._writers[node["class"]](node)
        self._depth -= 1
        return text

    def _list(self, nodes: Iterable[Node]) -> str:
        return ", ".join(self.expression(node) for node in nodes)

    def _comparison(self, node: Node) -> str:
        operator = _COMPARISONS[node["type"]]
        return f"({self.expression(node['left'])} {operator} {self.expression(node['right'])})"

    def _conjunction(self, node: Node) -> str:
        operator = _CONJUNCTIONS[node["type"]]
        return f"({operator.join(self.expression(child) for child in node['children'])})"

    def _operator(self, node: Node) -> str:
        first, *others = node["children"]
        match node["type"]:
            case "OPERATOR_NOT":
                return f"(NOT {self.expression(first)})"
            case "OPERATOR_IS_NULL":
                return f"({self.expression(first)} IS NULL)"
            case "OPERATOR_IS_NOT_NULL":
                return f"({self.expression(first)} IS NOT NULL)"
            case "COMPARE_IN":
                return f"({self.expression(first)} IN ({self._list(others)}))"
            case "COMPARE_NOT_IN":
                return f"({self.expression(first)} NOT IN ({self._list(others)}))"
            case "OPERATOR_COALESCE":
                return f"COALESCE({self._list(node['children'])})"
            case _:
                raise _refused_node(node)

    def _between(self, node: Node) -> str:
        tested, lower, upper = (self.expression(node[part]) for part in ("input", "lower", "upper"))
        return f"({tested} BETWEEN {lower} AND {upper})"

    def _case(self, node: Node) -> str:
        checks = (
            f"WHEN {self.expression(check['when_expr'])} THEN {self.expression(check['then_expr'])}"
            for check in node["case_checks"]
        )
        return f"(CASE {' '.join(checks)} ELSE {self.expression(node['else_expr'])} END)"

    def _cast(self, node: Node) -> str:
        to, child = _type(node), node["child"]
        if to == "BOOLEAN" and child["class"] == "CONSTANT" and (text := _literal(child)[1]) in ("t", "f"):
            return "true" if text == "t" else "false"  # which DuckDB 1.5 parses as CAST('t' AS BOOLEAN)
        return f"{'TRY_CAST' if node['try_cast'] else 'CAST'}({self.expression(child)} AS {to})"

    def _column(self, node: Node) -> str:
        names: list[str] = node["column_names"]
        if len(names) != 1:
            raise FilterError(f"'{_shown('.'.join(names))}' is not allowed in a filter: write a column's name alone.")
        name = self._known.get(name_key(names[0]))
        if name is None:
            raise _unknown("column", names[0], self._known.values())
        self.columns.add(name)
        return f"{quoted(self._table)}.{quoted(name)}" if self._table else quoted(name)

    def _parameter(self, node: Node) -> str:
        name = _parameter_name(node["identifier"])
        self.parameters.add(name)
        return f"${name}"

    def _constant(self, node: Node) -> str:
        kind, text = _literal(node)
        match kind:
            case "STRING":
                return literal(text)
            case "NULL_LITERAL":
                return "NULL"
            case "BOOLEAN" if text in ("true", "false"):
                return text
            case "INTEGER" | "NUMERIC" if _NUMBER.fullmatch(text) and math.isfinite(float(text)):
                return f"({text})" if text.startswith("-") else text
            case _:
                raise _refused(f"The constant {_shown(text)} ({kind.lower()})")

    def _function(self, node: Node) -> str:
        name: str = node["function_name"]
        if name in _PLAIN_WORDS:
            raise _refused(_PLAIN_WORDS[name])
        if not (name in FUNCTIONS or name in _LIKES or node["is_operator"]):
            raise _unknown("function", name, FUNCTIONS)
        if _qualifiers(node) - ({"main"} if name in _MADE_BY_PARSER else set()):
            raise FilterError(f"'{name}' is not allowed with a schema in a filter: write the function's name alone.")
        if node["distinct"] or node["filter"] or node["order_bys"]["orders"] or node["export_state"]:
            raise _refused(f"DISTINCT, FILTER or ORDER BY in {name}(..)")
        arguments = _arguments(node)
        if name in _LIKES:
            return self._like(_LIKES[name], arguments)
        if node["is_operator"]:
            return self._arithmetic(name, arguments)
        if name in _PATTERN_ARGUMENTS:
            self._check_pattern(name, arguments, *_PATTERN_ARGUMENTS[name])
        if name in _MEMBERSHIP and len(arguments) == 2 and arguments[0]["class"] == "PARAMETER":
            return self._membership(name, *arguments)
        return f'"{name}"({self._list(arguments)})'

    def _arithmetic(self, operator: str, arguments: list[Node]) -> str:
        texts = [self.expression(argument) for argument in arguments]
        if operator not in _ARITHMETIC or len(texts) > 2 or (len(texts) == 1 and operator not in "+-"):
            raise _refused(f"The operator {operator}")
        return f"({operator}{texts[0]})" if len(texts) == 1 else f"({texts[0]} {operator} {texts[1]})"

    def _like(self, operator: str, arguments: list[Node]) -> str:
        if len(arguments) not in (2, 3):
            raise _refused(f"{operator} with {len(arguments)} arguments")
        pattern = self._check_pattern(operator, arguments, 1, MAX_PATTERN_LENGTH)
        if pattern.rstrip("%").count("%") > MAX_WILDCARDS:
            raise FilterError(
                f"{operator} '{_shown(pattern)}': at most {MAX_WILDCARDS} '%' are allowed besides those at the end, "
                "because more can take minutes for a single row. Use regexp_matches(text, pattern)."
            )
        tested, like, *escape = arguments
        others = [self._concatenation(like), *(self.expression(argument) for argument in escape)]
        return f"({self.expression(tested)} {operator} {' ESCAPE '.join(others)})"

    def _concatenation(self, node: Node) -> str:
        """A pattern, which may be put together with ``||``: ``'%' || $1 || '%'``. What is checked is the whole."""
        if not _is_concatenation(node):
            return self.expression(node)
        return f"({' || '.join(self._concatenation(argument) for argument in _arguments(node))})"

    def _check_pattern(self, name: str, arguments: list[Node], place: int, longest: int) -> str:
        """The pattern, which must be known before the filter runs; empty if it is NULL or not given."""
        if place >= len(arguments):
            raise FilterError(f"{name} needs {place + 1} arguments, got {len(arguments)}.")
        pattern = self._known_value(arguments[place])
        if pattern is None:
            return ""
        if not isinstance(pattern, str):
            raise FilterError(f"The pattern or format of {name} must be a text, given as a constant or a parameter.")
        if len(pattern) > longest:
            raise FilterError(
                f"The pattern or format of {name} has {len(pattern):,} characters; at most {longest:,} are allowed."
            )
        if name in _REGULAR and "\\Q" in pattern:
            raise FilterError(
                f"The pattern of {name} has \\Q in it, which is not allowed: write \\ before each character."
            )
        if name in _REGULAR and (size := _expanded_size(pattern)) > MAX_PATTERN_SIZE:
            raise FilterError(
                f"The pattern of {name} has {size:,} parts with its repetitions written out; at most "
                f"{MAX_PATTERN_SIZE:,} are allowed, because more can take minutes. Repeat less, or use length(..)."
            )
        return pattern

    def _known_value(self, node: Node) -> Any:
        """The value of a constant or a parameter; anything else gives ``NotImplemented``, which is no text."""
        if node["class"] == "PARAMETER":
            return self._values.get(_parameter_name(node["identifier"]))
        if node["class"] == "CONSTANT":
            kind, text = _literal(node)
            return {"STRING": text, "NULL_LITERAL": None}.get(kind, NotImplemented)
        if _is_concatenation(node):
            parts = [self._known_value(argument) for argument in _arguments(node)]
            if None in parts:
                return None
            return "".join(parts) if all(isinstance(part, str) for part in parts) else NotImplemented
        return NotImplemented

    def _membership(self, name: str, values: Node, tested: Node) -> str:
        """``tested IN ?``, which DuckDB parses as ``contains(?, tested)``."""
        bound = self._known_value(values)
        if bound is not None and not isinstance(bound, list):
            raise FilterError(
                f"Parameter {self.expression(values)} is tested with IN or {name}, which needs a list, "
                f"got {type(bound).__name__}. Bind a list, or write = instead of IN."
            )
        parameter, text = self.expression(values), self.expression(tested)
        # For 1M rows and 100,000 values DuckDB 1.5.6 needs 28 s with contains() and 0.14 s with the join; 2.0.0 needs
        # 13 s for NOT contains(). They differ only where the list is empty or has a NULL; a NULL in it is refused.
        return f"({text} IN (SELECT unnest({parameter})))" if bound else f"contains({parameter}, {text})"


_PLAIN_WORDS = {
    "SUBQUERY": "A sub-query",
    "STAR": "A star (*)",
    "WINDOW": "A window function",
    "LAMBDA": "A lambda or ->",
    "POSITIONAL_REFERENCE": "A position (#1)",
    "COLLATE": "COLLATE",
    "DEFAULT": "DEFAULT",
    "ARRAY_EXTRACT": "An index [..]",
    "ARRAY_SLICE": "A slice [..:..]",
    "STRUCT_EXTRACT": "A field (..).name",
    "OPERATOR_TRY": "TRY",
    "GROUPING_FUNCTION": "GROUPING",
    "list_value": "A list [..]",
    "row": "A row (.., ..)",
    "struct_pack": "A struct",
    "map": "A map",
}


def _refused(what: str) -> FilterError:
    return FilterError(f"{what} is not allowed in a filter. {ALLOWED}")


def _refused_node(node: Node) -> FilterError:
    kind: str = node["type"] if node["class"] == "OPERATOR" else node["class"]
    return _refused(_PLAIN_WORDS.get(kind, kind))


def _unknown(kind: str, name: str, known: Collection[str]) -> FilterError:
    folded = {name_key(each): each for each in known}
    close = difflib.get_close_matches(name_key(name), folded, n=1)
    meant = f" Did you mean '{folded[close[0]]}'?" if close else ""
    listed = ", ".join(sorted(known)[:100]) or "none"
    return FilterError(f"No {kind} '{_shown(name)}' is allowed in a filter.{meant} There are: {listed}.")


def _shown(text: str) -> str:
    """A part of the text as a message can show it: short, and without newlines or other control characters."""
    short = text if len(text) <= 60 else f"{text[:60]}..."
    return short if short.isprintable() else ascii(short)[1:-1]


# --- the shapes of DuckDB 1.5 and 2, made alike ----------------------------------------------------------------------


def _arguments(node: Node) -> list[Node]:
    """The arguments of a function. A named one has its name as alias, too, which ``expression`` refuses."""
    return [argument["expression"] for argument in node["arguments"]] if "arguments" in node else node["children"]


def _expanded_size(pattern: str) -> int:
    """How long a regular expression is once its repetitions are written out, which is what RE2 does with it."""
    outer: list[int] = []  # sizes of the groups around, as far as they were read
    size = last = 0  # of the group that is read, and of its last part
    for part in _REGULAR_PART.finditer(pattern):
        text = part.group()
        if text == "(":
            outer.append(size)
            size = last = 0
        elif text == ")" and outer:
            last = size
            size += outer.pop()
        elif part["least"]:
            times = max(int(part["least"]), int(part["most"] or 1), 1)
            size += last * (times - 1)
            last *= times
        else:
            last = 1
            size += 1
    return size + sum(outer)


def _is_concatenation(node: Node) -> bool:
    return node["class"] == "FUNCTION" and node["function_name"] == "||" and bool(node["is_operator"])


def _qualifiers(node: Node) -> set[str]:
    """Catalog and schema of a function or a type, if any was written."""
    path = node.get("qualified_name", {}).get("path", [])
    return {node.get("catalog", ""), node.get("schema", ""), *path[:-1]} - {""}


def _literal(node: Node) -> tuple[str, str]:
    """Kind and text of a constant, as 2.0 gives them: ("STRING", "x"), ("INTEGER", "-3"), ("NUMERIC", "1.50")."""
    if "literal" in node:
        return node["literal"]["kind"], node["literal"]["text"]
    value, kind = node["value"], node["value"]["type"]["id"]
    if value["is_null"]:
        return "NULL_LITERAL", ""
    content = value["value"]
    if isinstance(content, dict) and content.keys() == {"upper", "lower"}:  # 128 bits in two halves
        content = (content["upper"] << 64) + content["lower"]
    if kind == "VARCHAR":
        return "STRING", content
    if kind == "BOOLEAN":
        return "BOOLEAN", str(content).lower()
    if kind in _INTEGER_TYPES:
        return "INTEGER", str(content)
    if kind == "DECIMAL":
        return "NUMERIC", _decimal(content, value["type"]["type_info"]["scale"])
    if kind == "DOUBLE" and math.isfinite(content):
        text = repr(content)  # with an exponent, or it would be read as a decimal
        return "NUMERIC", text if "e" in text else f"{text}e0"
    return kind, str(content)


def _decimal(unscaled: int, scale: int) -> str:
    digits = str(abs(unscaled)).rjust(scale + 1, "0")
    sign = "-" if unscaled < 0 else ""
    return f"{sign}{digits[: len(digits) - scale]}.{digits[len(digits) - scale :]}"


def _type(cast: Node) -> str:
    """The type that a cast casts to, by DuckDB's own name."""
    if "type_expr" in cast:
        name, modifiers = _type_of_2(cast["type_expr"])
    else:
        name, modifiers = _type_of_1(cast["cast_type"])
    known = _TYPES.get(name_key(name))
    if known is None:
        raise _unknown("type", name, frozenset(_TYPES.values()))
    if known != "DECIMAL":
        return known  # VARCHAR(10) is VARCHAR for DuckDB
    width, scale = {0: (18, 3), 1: (*modifiers, 0), 2: modifiers}.get(len(modifiers), (0, 0))
    if not 0 <= scale <= width <= 38 or width == 0:
        raise _refused(f"The type DECIMAL({', '.join(map(str, modifiers))})")
    return f"DECIMAL({width}, {scale})"


def _type_of_2(node: Node) -> tuple[str, tuple[int, ...]]:
    if node["class"] != "TYPE" or _qualifiers(node):
        raise _refused("A type of a schema")
    return node["type_name"], tuple(_type_modifier(child) for child in node["children"])


def _type_modifier(node: Node) -> int:
    kind, text = _literal(node) if node["class"] == "CONSTANT" else ("", "")
    if kind != "INTEGER" or not text.isdecimal():
        raise _refused("A type with parts that are not whole numbers")
    return int(text)


def _type_of_1(node: Node) -> tuple[str, tuple[int, ...]]:
    info = node["type_info"] or {}
    if node["id"] == "DECIMAL":
        return "DECIMAL", (info["width"], info["scale"])
    if node["id"] == "UNBOUND":  # no type of DuckDB's own, or one with modifiers that it cannot have
        if _qualifiers(info):
            raise _refused("A type of a schema")
        modifiers = info["user_type_modifiers"]
        return info["name"], tuple(_type_modifier({"class": "CONSTANT", "value": value}) for value in modifiers)
    return node["id"], ()


# --- parameters ------------------------------------------------------------------------------------------------------


def _bound_values(params: Sequence[Any] | Mapping[str, Any] | None) -> dict[str, Any]:
    """The values by name; numbered ones are "1", "2" and so on."""
    if params is None:
        return {}
    if isinstance(params, Mapping):
        named = {_parameter_name(name): _bound(f"${name}", value) for name, value in params.items()}
        if len(named) < len(params) or any(name.isdecimal() for name in named):
            raise FilterError(
                f"Parameters need names that differ in more than case and are no numbers; got {', '.join(params)}."
            )
        return named
    if not (_is_list(params) or isinstance(params, Sequence)) or isinstance(params, str | bytes | set | frozenset):
        raise FilterError(f"params is a list of values or a mapping of names to values, got {type(params).__name__}.")
    return {str(place): _bound(f"${place}", value) for place, value in enumerate(params, 1)}


def _bound(name: str, value: Any) -> Any:
    """A value that DuckDB can bind: a scalar or a flat list of one kind."""
    if not _is_list(value):
        return _bound_scalar(name, value)
    scalars = [_bound_scalar(name, each) for each in value]
    if None in scalars:
        raise FilterError(
            f"The list of parameter {name} has a None, which equals nothing: leave it out, and add OR .. IS NULL."
        )
    if any(isinstance(each, float) and math.isnan(each) for each in scalars):  # NULL for DuckDB 1.5, in a list
        raise FilterError(f"The list of parameter {name} has a NaN: leave it out, and add OR isnan(..).")
    kinds = {_kind(each) for each in scalars}
    if len(kinds) > 1:
        raise FilterError(
            f"The list of parameter {name} mixes {', '.join(sorted(kinds))}: all its values must be of one kind."
        )
    return scalars


def _bound_scalar(name: str, value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        if value.dtype.kind in "mM":
            value = value.astype(f"{value.dtype.kind}8[us]")  # finer ones would become a plain number
        value = value.item() if value.ndim == 0 else value
    if value is None or (isinstance(value, _SCALARS) and _fits(value)):
        return value
    raise FilterError(
        f"The value of parameter {name} ({type(value).__name__}) cannot be bound. Allowed are None, bool, int of 128 "
        "bits, float, Decimal, str, bytes, date, time, datetime, timedelta, UUID, and flat lists of them."
    )


def _fits(value: Any) -> bool:
    if isinstance(value, int):
        return -(1 << 127) <= value < (1 << 128)
    if isinstance(value, Decimal):
        return value.is_finite()
    return _is_unicode(value) if isinstance(value, str) else True


def _is_list(value: Any) -> bool:
    return isinstance(value, _LISTS) and getattr(value, "ndim", 1) > 0


def _kind(value: Any) -> str:
    return "numbers" if isinstance(value, int | float | Decimal) else type(value).__name__


def _parameter_name(name: Any) -> str:
    """A parameter's name in small letters, as DuckDB matches it. It goes into the text: only plain names do."""
    folded = name_key(name) if isinstance(name, str) else ""
    if not _PARAMETER_NAME.fullmatch(folded):
        raise FilterError(f"'{_shown(str(name))}' is no name for a parameter: use the letters a to z, digits and _.")
    return folded


def _check_parameters(used: set[str], values: Mapping[str, Any], *, named: bool) -> None:
    if all(name.isdecimal() for name in used) and not (named and (used or values)):
        expected = max(map(int, used), default=0)
        if len(used) < expected:
            numbers = ", ".join(f"${number}" for number in sorted(map(int, used)))
            raise FilterError(f"The filter uses {numbers} but not all numbers below: count from $1 without gaps.")
        if expected != len(values):
            raise FilterError(f"Parameters expected: {expected} (? or $1 ..); given: {len(values)}.")
    elif used != values.keys():
        expected_names = ", ".join(f"${name}" for name in sorted(used)) or "none"
        given = ", ".join(f"${name}" for name in values) or "none"
        raise FilterError(f"Parameters expected: {len(used)} ({expected_names}); given: {len(values)} ({given}).")


# --- mappings --------------------------------------------------------------------------------------------------------


def _text_of_mapping(where: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """A mapping of conditions as SQL text and its parameters. The text is checked like any other."""
    values: list[Any] = []
    parts = []
    for name, wanted in where.items():
        if not isinstance(name, str):
            raise FilterError(f"The keys of a filter are names of columns, got {name!r}.")
        tests = wanted if isinstance(wanted, Mapping) else {"in" if _is_list(wanted) else "=": wanted}
        if not tests:
            raise FilterError(f"'{name}' has no condition: write a value, a list, None or {{'<': 3}}.")
        parts += [_condition(name, operator, value, values) for operator, value in tests.items()]
    return " AND ".join(parts) or "true", values


def _condition(name: str, operator: str, value: Any, values: list[Any]) -> str:
    """One condition as text; its values are added to ``values``."""
    column = quoted(name)
    if operator not in _MAPPING_OPERATORS:
        raise FilterError(f"'{name}': no operator {operator!r}. There are: {', '.join(_MAPPING_OPERATORS)}.")
    if operator == "in":
        return _in_condition(name, value, values)
    if operator == "between":
        if not _is_list(value) or isinstance(value, set | frozenset) or len(value) != 2:
            raise FilterError(f"'{name}': between needs two values, such as [3, 7].")
        values.extend(value)
        return f"{column} BETWEEN ? AND ?"
    if value is None:
        if operator not in ("=", "!="):
            raise FilterError(f"'{name}': None can be compared only with = and !=.")
        return f"{column} IS NULL" if operator == "=" else f"{column} IS NOT NULL"
    values.append(value)
    return f"{column} {operator} ?"


def _in_condition(name: str, wanted: Any, values: list[Any]) -> str:
    if not _is_list(wanted):
        raise FilterError(f"'{name}': in needs a list, got {type(wanted).__name__}.")
    present = [value for value in wanted if value is not None]
    values.append(present)
    or_null = f" OR {quoted(name)} IS NULL" if len(present) < len(wanted) else ""
    return f"({quoted(name)} IN ?{or_null})"


# --- names -----------------------------------------------------------------------------------------------------------


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
