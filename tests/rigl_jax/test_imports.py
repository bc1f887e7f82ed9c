"""Imports point one way: the library knows no model, data set or config; inside it, modules form no cycle."""

import ast
import functools
import pathlib
import tomllib

import rigl_jax as rx
from rigl_jax import base

ROOT = pathlib.Path(__file__).parents[2]
LIBRARY_MAY_IMPORT = {"jax", "numpy", "optax", "scipy", "rigl_jax"}


@functools.cache
def imported(path):
    """Absolute module names imported anywhere in a file, `from a import b` as a.b."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def modules(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def test_the_library_imports_only_what_it_says():
    standard = __import__("sys").stdlib_module_names
    for name, path in modules("rigl_jax").items():
        for target in imported(path):
            top = target.split(".")[0]
            assert top in standard or top in LIBRARY_MAY_IMPORT, f"{name} imports {target}"


def test_imports_point_one_way():
    for package in ("rigl_jax", "experiments"):
        known = modules(package)
        graph = {}
        for name, path in known.items():
            targets = {t if t in known else t.rpartition(".")[0] for t in imported(path)}
            graph[name] = {t for t in targets if t in known and t != package and t != name}
        order = []
        while graph:
            free = [name for name, targets in graph.items() if not targets & graph.keys()]
            assert free, f"import cycle among {sorted(graph)}"
            order += free
            for name in free:
                del graph[name]
        assert len(order) == len(known)


def test_the_build_of_native_code_is_imported_by_no_module_at_once():
    """`python -m rigl_jax.native.build` would warn that its package has imported it already."""
    for name, path in modules("rigl_jax").items():
        at_once = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
        found = {f"{node.module}.{alias.name}" for node in at_once for alias in node.names}
        assert "rigl_jax.native.build" not in found, name


def test_a_family_imports_no_other_but_criteria():
    known = modules("rigl_jax")
    families = ("algorithms", "channels", "coreset", "criteria", "diagnostics", "execution", "recipes")
    for name, path in known.items():
        if name.split(".")[1:2] and (own := name.split(".")[1]) in families:
            used = {family for family in families for t in imported(path) if f"{t}.".startswith(f"rigl_jax.{family}.")}
            allowed = {"channels"} if name == "rigl_jax.execution.compact" else set()  # both cut channels
            assert used <= {own, "criteria"} | allowed, f"{name} imports {used}"


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert rx.__version__ in (project["version"], "0+unknown")
    assert f"\nversion: {project['version']}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_types_of_signatures_are_exported():
    for name in ("Algorithm", "Leaf", "Masks", "Plan", "Rewired", "Score", "Signals", "Structure"):
        assert getattr(rx, name) is getattr(base, name)
        assert name in rx.__all__
