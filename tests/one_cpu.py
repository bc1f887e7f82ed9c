"""Selection in tests: natively, as on a machine with one CPU, which compiles in a third of the time.

Tests have eight devices, on which the library selects by a search in XLA. Tests that are about this search, or that
spread arrays over the devices, are marked `eight_devices`. `rigl_jax/test_native_select.py` shows that both ways select
the same.
"""

import pytest

from rigl_jax.topology import topk


@pytest.fixture(autouse=True)
def one_cpu(request, monkeypatch):
    """For the conftest of a folder. Where the native kernels are not built, the search in XLA goes on."""
    if request.node.get_closest_marker("eight_devices") is None:
        monkeypatch.setattr(topk, "one_cpu", lambda: True)
