"""Plugins as they come: real packages and real entry points, sound ones and broken ones."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import semid_index as semid
from semid_index.errors import PluginError, UnknownNameError
from semid_index.hookspecs import hookimpl
from semid_index.plugins import GROUP, Offer, Plugins, installed, load_plugins, quantizer_class
from semid_index.quantizers.rq import ResidualKMeans

EXAMPLE = Path(__file__).resolve().parent.parent / "plugins" / "semid-sign-hash"
BUILT_IN = {"rq", "balanced-rq", "vq", "pq", "sq8", "sq4", "opq", "lsq", "prq", "binary", "rabitq"}

# ------------------------------------------------------------- a package of somebody else, installed for real


@pytest.fixture(scope="module")
def installed_example(tmp_path_factory) -> Path:
    """A folder into which pip has installed the example plugin."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), str(EXAMPLE)]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


BUILD_WITH_EXAMPLE = """
import json, sys
import numpy as np
import semid_index as semid
from semid_index.plugins import installed

points = np.load(sys.argv[2])
vectors, queries = points[:6000], points[6000:]
with semid.create(sys.argv[1], dim=24, quantizer="sign-hash", levels=2, codebook_size=64) as index:
    index.train(vectors)
    index.add(vectors)
    found, exact = index.search(queries, k=10, probes=20), index.search(queries, k=10, exact=True)
    print(json.dumps({
        "offer": [[o.kind, o.source] for o in installed().offers.values() if o.name == "sign-hash"],
        "failed": installed().failed,
        "found": [ids.tolist() for ids in found.ids],
        "exact": [ids.tolist() for ids in exact.ids],
        "distances": [distances.tolist() for distances in exact.distances],
        "candidates": found.trace.candidates,
        "codes": index.encode(vectors).tolist(),
        "decoded": index.decode(index.encode(vectors)).tolist(),
        "tree": [[shelf.text, shelf.items] for shelf in index.tree()],
        "below": index.prefix(index.encode(vectors[:1])[0, :1])["id"].to_pylist(),
    }))
"""
READ_WITH_EXAMPLE = """
import json, sys
import numpy as np
import semid_index as semid
points = np.load(sys.argv[2])
with semid.open(sys.argv[1]) as index:
    print(json.dumps([
        [ids.tolist() for ids in index.search(points[6000:], k=10, probes=20).ids], index.encode(points[:6000]).tolist()
    ]))
"""


@pytest.fixture(scope="module")
def example_index(installed_example, tmp_path_factory, clustered, run_python) -> tuple[Path, Path, dict]:
    """An index that another process built with the plugin, the file of its vectors, and what that process saw."""
    folder = tmp_path_factory.mktemp("example")
    np.save(folder / "points.npy", clustered(6_020, 24))
    seen = run_python(BUILD_WITH_EXAMPLE, folder / "x.duckdb", folder / "points.npy", path=installed_example)
    return folder / "x.duckdb", folder / "points.npy", json.loads(seen)


def test_an_installed_plugin_is_found_and_named(example_index):
    _, _, seen = example_index
    assert seen["offer"] == [["quantizer", "semid-sign-hash 0.1.0"]]
    assert seen["failed"] == {}


def test_the_command_lists_it(installed_example):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed_example), *filter(None, sys.path)])}
    command = [sys.executable, "-c", "from semid_index.cli import main; main()", "plugins", "--format", "json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    listed = {row["name"]: row for row in json.loads(done.stdout) if row["kind"] == "quantizer"}
    assert set(listed) == {*BUILT_IN, "sign-hash"}
    assert "semid-sign-hash 0.1.0" in json.dumps(listed["sign-hash"])


def test_it_builds_an_index_that_finds_what_is_near(example_index):
    _, points_file, seen = example_index
    points = np.load(points_file).astype(np.float64)
    vectors, queries = points[:6_000], points[6_000:]
    distances = np.linalg.norm(queries[:, None] - vectors[None], axis=2)
    order = np.argsort(distances, axis=1)[:, :10]
    assert seen["exact"] == order.tolist()
    np.testing.assert_allclose(seen["distances"], np.take_along_axis(distances, order, axis=1), rtol=1e-5)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(seen["found"], seen["exact"], strict=True)])
    assert seen["candidates"] < 3_000, "only some leaves were to be opened"
    assert recall > 0.8


def test_its_codes_have_prefixes(example_index):
    _, _, seen = example_index
    codes = np.array(seen["codes"])
    assert codes.shape == (6_000, 2)
    first, counts = np.unique(codes[:, 0], return_counts=True)
    assert dict(seen["tree"]) == {f"{code}-*": count for code, count in zip(first, counts, strict=True)}
    assert sorted(seen["below"]) == np.flatnonzero(codes[:, 0] == codes[0, 0]).tolist()


def test_its_index_is_the_same_in_another_process(example_index, installed_example, run_python):
    path, points_file, seen = example_index
    found, codes = json.loads(run_python(READ_WITH_EXAMPLE, path, points_file, path=installed_example))
    assert found == seen["found"]
    assert codes == seen["codes"]


def test_without_the_plugin_opening_says_what_is_missing(example_index):
    """This process cannot see the folder that the plugin was installed into."""
    path, _, _ = example_index
    before = path.read_bytes()
    with pytest.raises(UnknownNameError) as raised:
        semid.open(path)
    message = str(raised.value)
    assert f"No quantizer named 'sign-hash'. Installed: {', '.join(sorted(BUILT_IN))}." in message
    assert f"{path} was built with it: install the package that offers it." in message
    assert (raised.value.name, set(raised.value.available)) == ("sign-hash", BUILT_IN)
    assert path.read_bytes() == before
    assert not path.with_name("x.duckdb.wal").exists()


def test_it_keeps_the_promises_of_a_quantizer(installed_example):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(installed_example), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"1[5-9] passed|[2-9]\d passed", done.stdout)


# -------------------------------------------------------------------------------------- packages in all states

SOUND = """
from semid_index.hookspecs import hookimpl
from semid_index.quantizers.rq import ResidualKMeans

class Mine(ResidualKMeans):
    name = "{quantizer}"

@hookimpl
def semid_register_quantizers(register):
    register(Mine)
"""


@pytest.fixture
def package(tmp_path, monkeypatch) -> Callable[[str, str], None]:
    """Makes a distribution with one module and the entry point for it, where this process imports from."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def make(name: str, source: str) -> None:
        module = name.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{module} = {module}\n")
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, module, raising=False)

    return make


def names(plugins: Plugins) -> set[str]:
    return set(plugins.named("quantizer"))


def test_built_in_quantizers_come_in_as_plugins_do():
    plugins = load_plugins(entry_points=False)
    assert names(plugins) == BUILT_IN
    assert {offer.source for offer in plugins.offers.values()} == {"semid-index"}
    assert plugins.failed == {}


def test_a_sound_package(package):
    package("semid-sound", SOUND.format(quantizer="sound"))
    plugins = load_plugins()
    assert names(plugins) == {*BUILT_IN, "sound"}
    assert plugins.offers["quantizer", "sound"].source == "semid-sound 1.0"
    assert plugins.failed == {}
    assert names(load_plugins(entry_points=False)) == BUILT_IN


@pytest.mark.parametrize("taken", ["shared", "rq"])
def test_two_packages_with_one_name(package, taken):
    """The second is refused, and the message names both. A built-in one cannot be replaced either."""
    package("semid-first", SOUND.format(quantizer="shared"))
    package("semid-second", SOUND.format(quantizer=taken))
    plugins = load_plugins()
    assert names(plugins) == {*BUILT_IN, "shared"}
    (refused,) = plugins.failed
    kept = plugins.offers["quantizer", taken].source
    assert {kept, refused} == (
        {"semid-first 1.0", "semid-second 1.0"} if taken == "shared" else {"semid-index", "semid-second 1.0"}
    )
    for word in (kept, refused, f"'{taken}'", "Two plugins", "Uninstall one"):
        assert word in plugins.failed[refused]
    assert plugins.named("quantizer")["rq"] is ResidualKMeans


BROKEN = {
    "import": ("import no_such_module_anywhere", ["ModuleNotFoundError", "no_such_module_anywhere"]),
    "syntax": ("def broken(:", ["SyntaxError"]),
    "error": ("raise RuntimeError('CUDA is not there')", ["RuntimeError", "CUDA is not there"]),
    "exit": ("raise SystemExit(3)", ["SystemExit", "3"]),
    "hook that fails": (SOUND.format(quantizer="x").replace("register(Mine)", "1 / 0"), ["ZeroDivisionError"]),
    "misspelt hook": (
        SOUND.format(quantizer="x").replace("def semid_register_q", "def semid_regsiter_q"),
        ["semid_regsiter_quantizers", "unknown hook"],
    ),
    "wrong argument": (SOUND.format(quantizer="x").replace("(register)", "(registry)", 1), ["registry"]),
    "no name": (SOUND.format(quantizer=""), ["quantizer", "without a name", "Mine"]),
    "a name that is no text": (SOUND.replace('"{quantizer}"', "7"), ["without a name"]),
    "one sound, one without a name": (
        SOUND.format(quantizer="x").replace("register(Mine)", "register(Mine); register(object)"),
        ["without a name", "object"],
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_package_is_reported_and_breaks_nothing(package, fault):
    source, words = BROKEN[fault]
    package("semid-broken", source)
    package("semid-sound", SOUND.format(quantizer="sound"))
    plugins = load_plugins()
    assert names(plugins) == {*BUILT_IN, "sound"}, "nothing of the broken one, and all of the others"
    assert list(plugins.failed) == ["semid-broken 1.0"]
    for word in words:
        assert word in plugins.failed["semid-broken 1.0"]


def test_every_hook_is_heard(package):
    package(
        "semid-everything",
        """
from semid_index.hookspecs import hookimpl

class Thing:
    name = "thing"

@hookimpl
def semid_register_quantizers(register): register(Thing)
@hookimpl
def semid_register_executors(register): register(Thing)
@hookimpl
def semid_register_collision_policies(register): register(Thing)
@hookimpl
def semid_register_embedders(register): register(Thing)
@hookimpl
def semid_register_subjects(register): register(Thing)
@hookimpl
def semid_register_commands(register): register("thing", print); register("other", print)
""",
    )
    offers = {key: offer.source for key, offer in load_plugins().offers.items() if offer.source != "semid-index"}
    kinds = ("quantizer", "executor", "collision policy", "embedder", "subject", "command")
    assert offers == dict.fromkeys([*((kind, "thing") for kind in kinds), ("command", "other")], "semid-everything 1.0")


def test_a_module_that_offers_nothing_is_no_fault(package):
    package("semid-nothing", "from semid_index.hookspecs import hookimpl\n")
    assert load_plugins().failed == {}


def test_offers_with_one_name():
    plugins = Plugins()
    plugins.add(Offer("quantizer", "x", ResidualKMeans, "one 1.0"))
    plugins.add(Offer("quantizer", "x", ResidualKMeans, "one 1.0"))  # the same thing again is no conflict
    plugins.add(Offer("embedder", "x", object, "two 1.0"))  # nor is the name of another kind of thing
    with pytest.raises(PluginError, match=r"Two plugins offer a quantizer named 'x': one 1\.0 and two 1\.0"):
        plugins.add(Offer("quantizer", "x", object, "two 1.0"))
    assert plugins.offers["quantizer", "x"].source == "one 1.0"


class Lossy(ResidualKMeans):
    name = "lossy"

    def get_config(self):
        return {"levels": self.levels, "codebook_size": self.codebook_sizes[0]}


def test_an_option_that_would_be_lost_is_refused(monkeypatch):
    monkeypatch.setitem(installed().offers, ("quantizer", "lossy"), Offer("quantizer", "lossy", Lossy, "lossy 1.0"))
    with semid.create(dim=4, quantizer="lossy", levels=2, codebook_size=8) as index:
        assert index.config.quantizer_config == {"levels": 2, "codebook_size": 8}
    with pytest.raises(PluginError, match=r"takes the option 'iterations', but its get_config\(\) does not return it"):
        semid.create(dim=4, quantizer="lossy", levels=2, codebook_size=8, iterations=3)


def test_names_lead_to_classes():
    assert quantizer_class("rq") is ResidualKMeans
    assert installed() is installed(), "plugins are looked for once"
    assert hookimpl is semid.hookimpl
