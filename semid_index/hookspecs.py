"""The whole plugin API on one screen.

A plugin is a module that implements any of these hooks and is named in the entry-point group ``semid_index``.
Each hook receives ``register``; call it none, one or many times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pluggy

from semid_index.quantizer import Quantizer

if TYPE_CHECKING:
    from semid_index.collisions import CollisionPolicy

hookspec = pluggy.HookspecMarker("semid_index")
hookimpl = pluggy.HookimplMarker("semid_index")


@hookspec
def semid_register_quantizers(register: Callable[[type[Quantizer]], None]) -> None:
    """Offer quantizer classes: ``register(MyQuantizer)``. See :mod:`semid_index.quantizer`."""


@hookspec
def semid_register_executors(register: Callable[[type[Any]], None]) -> None:
    """Offer executors, listed but not used yet: ``register(MyExecutor)``. See :class:`semid_index.rerank.Executor`."""


@hookspec
def semid_register_collision_policies(register: Callable[[type[CollisionPolicy]], None]) -> None:
    """Offer policies for items that share an ID: ``register(MyPolicy)``. See :mod:`semid_index.collisions`."""


@hookspec
def semid_register_embedders(register: Callable[[type[Any]], None]) -> None:
    """Offer embedders, which turn texts into vectors: ``register(MyEmbedder)``."""


@hookspec
def semid_register_subjects(register: Callable[[type[Any]], None]) -> None:
    """Offer benchmark subjects: ``register(MySubject)``. See :mod:`semid_index.bench.subject`."""


@hookspec
def semid_register_commands(register: Callable[[str, Any], None]) -> None:
    """Offer commands of the ``semid`` program: ``register("name", typer_app_or_function)``."""
