"""A pytest plug-in: tests that want a mesh of more devices than there are are skipped, and not failed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from unittest import mock


def pytest_collection_modifyitems() -> None:
    """After the project's conftest, which says how JAX starts."""
    import jax
    import pytest

    make = jax.make_mesh

    def make_mesh(shape: Sequence[int], *args: Any, **kwargs: Any) -> Any:
        if math.prod(shape) > jax.device_count():
            pytest.skip(f"needs {math.prod(shape)} devices")
        return make(shape, *args, **kwargs)

    mock.patch.object(jax, "make_mesh", make_mesh).start()
