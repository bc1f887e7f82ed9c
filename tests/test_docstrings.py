"""The examples in docstrings give what they say."""

import doctest
import importlib
import pkgutil

import pytest

import configs
import experiments
import rigl_jax

MODULES = sorted(
    module.name
    for package in (rigl_jax, experiments, configs)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.rpartition(".")[2].startswith("_")  # __main__, and the native library
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
