"""Trainings of the same config share what they compile."""

import pytest

from experiments import recipes, train
from tests.experiments import runs


@pytest.fixture(scope="session", autouse=True)
def compiled_once():
    with pytest.MonkeyPatch.context() as patched:
        for module in (train, recipes):
            patched.setattr(module, "prepare", runs.prepare)
        yield
