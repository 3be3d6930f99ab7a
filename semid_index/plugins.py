"""Finds plugins; name -> class.

Built-in quantizers are registered by the same hook as anyone's. A plugin that fails to import is remembered and
reported (``semid plugins``), and breaks nothing else.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pluggy

from semid_index import hookspecs
from semid_index.collisions import CollisionPolicy
from semid_index.errors import InvalidArgumentError, PluginError, UnknownNameError
from semid_index.quantizer import Quantizer

GROUP = "semid_index"
DEFAULT_PLUGINS = (
    "semid_index.quantizers.rq",
    "semid_index.quantizers.balanced_rq",
    "semid_index.quantizers.vq",
    "semid_index.quantizers.pq",
    "semid_index.quantizers.scalar",
    "semid_index.quantizers.opq",
    "semid_index.quantizers.additive",
    "semid_index.quantizers.bits",
    "semid_index.collisions",
    "semid_index.bench.subjects.ours",
    "semid_index.bench.subjects.faiss_indexes",
    "semid_index.bench.subjects.graphs",
    "semid_index.bench.subjects.scann_tree",
    "semid_index.bench.subjects.brute_force",
)
_KINDS = {
    "quantizer": "semid_register_quantizers",
    "executor": "semid_register_executors",
    "collision policy": "semid_register_collision_policies",
    "embedder": "semid_register_embedders",
    "subject": "semid_register_subjects",
}
PACKAGES = {"rq-vae": "semid-rq-vae"}
"""Quantizers that come in a package of their own: name -> what to install."""


@dataclass(frozen=True)
class Offer:
    """Something that a plugin offers."""

    kind: str
    name: str
    target: Any
    """The class, or for commands the function or Typer app."""
    source: str
    """The distribution or module it comes from."""


@dataclass
class Plugins:
    """Everything that the installed plugins offer."""

    offers: dict[tuple[str, str], Offer] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    """Plugins that could not be loaded, and why."""

    def named(self, kind: str) -> dict[str, Any]:
        """All offers of one kind: name -> target."""
        return {name: offer.target for (of_kind, name), offer in self.offers.items() if of_kind == kind}

    def add(self, offer: Offer) -> None:
        """Take up an offer; two with one name are refused."""
        known = self.offers.get((offer.kind, offer.name))
        if known is not None and known.target is not offer.target:
            raise PluginError(
                f"Two plugins offer a {offer.kind} named '{offer.name}': {known.source} and {offer.source}. "
                "Uninstall one of them."
            )
        self.offers[offer.kind, offer.name] = offer


def load_plugins(*, entry_points: bool = True) -> Plugins:
    """Load built-in plugins and, unless told otherwise, the installed ones."""
    plugins = Plugins()
    for module in DEFAULT_PLUGINS:
        _collect(plugins, importlib.import_module(module), "semid-index")
    if entry_points:
        for point in importlib.metadata.entry_points(group=GROUP):
            source = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
            try:
                _collect(plugins, point.load(), source)
            except PluginError as error:
                plugins.failed[source] = str(error)
            except (Exception, SystemExit) as error:  # whatever a stranger's import raises must not break us
                plugins.failed[source] = f"{type(error).__name__}: {error}"
    return plugins


@cache
def installed() -> Plugins:
    """The plugins of this environment, loaded once."""
    return load_plugins()


def quantizer_class(name: str, *, hint: str = "semid plugins lists them.") -> type[Quantizer]:
    """The quantizer of this name; if there is none, the error ends with ``hint``."""
    hint = f"Run: pip install {PACKAGES[name]}" if isinstance(name, str) and name in PACKAGES else hint
    kind: type[Quantizer] = _offered("quantizer", name, "quantizer", hint)
    return kind


def collision_policy_class(name: str, *, hint: str = "semid plugins lists them.") -> type[CollisionPolicy]:
    """The collision policy of this name; if there is none, the error ends with ``hint``."""
    kind: type[CollisionPolicy] = _offered("collision policy", name, "collisions", hint)
    return kind


def _offered(kind: str, name: str, argument: str, hint: str) -> Any:
    available = installed().named(kind)
    if not isinstance(name, str):
        raise InvalidArgumentError(f"{argument} must be a name, one of {', '.join(sorted(available))}, not {name!r}.")
    if name not in available:
        raise UnknownNameError(kind, name, available, hint=hint)
    return available[name]


def _collect(plugins: Plugins, module: Any, source: str) -> None:
    """Ask one plugin what it offers. Nothing of it is kept unless all of it is sound."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    manager.register(module)
    manager.check_pending()  # a misspelt hook becomes an error, not silence
    found: list[Offer] = []
    for kind, hook in _KINDS.items():
        getattr(manager.hook, hook)(register=_collector(found, kind, source))
    manager.hook.semid_register_commands(
        register=lambda name, target: found.append(Offer("command", name, target, source))
    )
    trial = Plugins(dict(plugins.offers))
    for offer in found:
        trial.add(offer)
    plugins.offers.update(trial.offers)


def _collector(found: list[Offer], kind: str, source: str) -> Callable[[Any], None]:
    def register(target: Any) -> None:
        name = getattr(target, "name", None)
        if not isinstance(name, str) or not name:
            raise PluginError(f"{source} offers a {kind}, {target!r}, without a name.")
        found.append(Offer(kind, name, target, source))

    return register
