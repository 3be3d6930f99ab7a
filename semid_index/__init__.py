"""Semantic IDs for vectors: short meaningful names, SQL columns, a search index and compression, in one DuckDB file."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from semid_index.errors import SemidError
    from semid_index.hookspecs import hookimpl
    from semid_index.index import SemanticIndex, create, open
    from semid_index.quantizer import Quantizer
    from semid_index.records import SearchResult, SearchTrace, TrainReport
    from semid_index.report.records import QualityReport

__version__ = "0.1.0"
__all__ = [
    "QualityReport",
    "Quantizer",
    "SearchResult",
    "SearchTrace",
    "SemanticIndex",
    "SemidError",
    "TrainReport",
    "create",
    "hookimpl",
    "open",
]

_HOMES = {
    "SemanticIndex": "index",
    "create": "index",
    "open": "index",
    "SemidError": "errors",
    "Quantizer": "quantizer",
    "hookimpl": "hookspecs",
    "SearchResult": "records",
    "SearchTrace": "records",
    "TrainReport": "records",
    "QualityReport": "report.records",
}

logging.getLogger("semid_index").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import semid_index`` alone stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'semid_index' has no attribute '{name}'")
    from importlib import import_module

    value = getattr(import_module(f"semid_index.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
