"""Rules of the house: sizes, names, no special cases. Imports have rules too, see `tests/rigl_jax/test_imports.py`."""

import ast
import functools
import importlib

import pytest

import rigl_jax as rx
from tests.rigl_jax.test_imports import modules

MOST_LINES = 350  # of a module
MOST_CODE = 60  # lines of a function, its docstring not counted
MODULES = {name: path for package in ("rigl_jax", "experiments", "configs") for name, path in modules(package).items()}


@functools.cache
def tree(name):
    return ast.parse(MODULES[name].read_text(encoding="utf-8"))


def functions(name):
    """`(line, name, lines of code)` of all functions of a module."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            documented = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
            yield node.lineno, node.name, node.end_lineno - node.lineno + 1 - documented


def test_modules_are_short():
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: n for name, n in lines.items() if n > MOST_LINES} == {}


def test_functions_are_short():
    long = {f"{module}:{line} {name}": n for module in MODULES for line, name, n in functions(module) if n > MOST_CODE}
    assert long == {}


def test_no_module_is_hidden_by_a_name_of_its_package():
    """Below the top a function may have the name of its module, as `execution.compact`: `from` finds both."""
    for name in modules("rigl_jax"):
        package, _, last = name.rpartition(".")
        if package:
            module, found = importlib.import_module(name), getattr(importlib.import_module(package), last)
            assert found is module or (package != "rigl_jax" and found.__module__ == name), name


def names_of_methods(node):
    return {x.value for x in ast.walk(node) if isinstance(x, ast.Constant) and isinstance(x.value, str)} & {
        *rx.ALGORITHMS
    }


@pytest.mark.parametrize("name", [n for n in MODULES if not n.startswith("experiments.studies")])
def test_no_case_by_the_name_of_a_method(name):
    """What is special about a method is in its row of the registry. A study may choose options by method."""
    cases = [node for node in ast.walk(tree(name)) if isinstance(node, ast.Compare | ast.match_case)]
    assert [f"line {node.lineno}: {found}" for node in cases if (found := names_of_methods(node))] == []
