"""Compiled functions that must be traced once. The size of JAX's own cache tells less: it forgets in a long process."""

import functools

import jax


def jit_once(function, **options):
    """`jax.jit` of a function that fails where it is traced again."""
    traces = []

    @functools.wraps(function)
    def traced(*args, **kwargs):
        traces.append(None)
        assert len(traces) == 1, "traced a second time"
        return function(*args, **kwargs)

    return jax.jit(traced, **options)
