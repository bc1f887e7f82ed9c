"""Examples in docstrings run and give what they say; every public function has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import configs
import experiments
import rigl_jax as rx

MODULES = sorted(
    module.name
    for package in (rx, experiments, configs)
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not module.name.rpartition(".")[2].startswith("_")  # __main__, and the native library
)
EXAMPLES = {
    name: tests
    for name in MODULES
    if (tests := [test for test in doctest.DocTestFinder().find(importlib.import_module(name)) if test.examples])
}
FAMILIES = (rx, rx.channels, rx.coreset, rx.criteria, rx.diagnostics, rx.execution, rx.plot, rx.recipes, rx.tracing)
# z3 is an extra; jax2onnx has an environment of its own.
NOT_RUN = ["rigl_jax.diagnostics.fairness.individual_fairness", "rigl_jax.execution.export.export_onnx"]


@pytest.mark.parametrize("module", EXAMPLES)
def test_examples(module):
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in EXAMPLES[module]:
        assert runner.run(test).failed == 0, test.name


def test_every_public_function_has_an_example():
    public = [getattr(module, name) for module in FAMILIES for name in module.__all__]
    names = {f"{value.__module__}.{value.__qualname__}" for value in public if inspect.isfunction(value)}
    assert len(names) > 60
    run = {
        test.name
        for tests in EXAMPLES.values()
        for test in tests
        if not any(doctest.SKIP in example.options for example in test.examples)
    }
    assert sorted(names - run) == NOT_RUN
