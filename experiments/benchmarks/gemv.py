"""Linear layers on one example, forward only: sparse kernels against XLA's dense matrix-vector product.

    python -m experiments.benchmarks.gemv [--fresh] [--repeats 20]      (about 1 minute on 2 cores)

`ratio` is of one product inside a compiled program, a loop of 64 that feed each other, as layers do in a model;
`call_ratio` is of one jitted call, whose dispatch (`dispatch_us`, that of a jitted x + 1) both contenders pay.
`bare_us` is one round of that loop with a native product that has almost nothing to do. The dense contender is the
faster of x @ w and x @ w.T of the stored transpose.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import paired
from experiments.benchmarks.linear import SPARSITIES
from rigl_jax.execution import kernels

SHAPES = ((768, 3072), (1024, 1024), (2048, 2048))
KINDS = {"1x1": 1, "16x1": 16}
LENGTH = 64
Array = jax.Array


def chain(product: Callable[[Array, Array], Array], x: Array, weight: Array) -> Array:
    """LENGTH products, each of which waits for the one before."""

    def step(_: int, x: Array) -> Array:
        return jax.lax.dynamic_update_slice(x, 1e-3 * product(x, weight)[:, :1], (0, 0))

    return jax.lax.fori_loop(0, LENGTH, step, x)


def _pair(calls: list[Any], weights: list[Array], dense: int, x: Array, repeats: int, *, cold: bool = False) -> Any:
    return paired.paired(lambda: calls[dense](x, weights[dense]), lambda: calls[2](x, weights[2]), repeats, cold=cold)


def _each(times: paired.Paired) -> paired.Paired:
    return times._replace(dense=times.dense / LENGTH, sparse=times.sparse / LENGTH)


def bare_us(repeats: int) -> float:
    """Microseconds of one round of the loop for a matrix of 16 x 16 with eight weights."""
    pattern = kernels.make_pattern(np.arange(256).reshape(16, 16) % 32 == 0)
    x, values = jnp.ones((1, 16)), jnp.ones(pattern.nnz)
    loop = jax.jit(functools.partial(chain, lambda x, v: kernels.matmul(x, v, pattern)))
    return round(_each(paired.paired(lambda: loop(x, values), lambda: loop(x, values), repeats)).sparse * 1e6, 2)


def measure(shape: tuple[int, int], kind: str, sparsity: float, repeats: int) -> dict[str, Any]:
    """One row."""
    rng = np.random.default_rng(0)
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    x, weight, height = jnp.asarray(draw((1, shape[0]))), jnp.asarray(draw(shape)), KINDS[kind]
    grid = (shape[0], shape[1] // height)
    runs = rng.permutation(np.arange(math.prod(grid)) < round((1 - sparsity) * math.prod(grid))).reshape(grid)
    # One block: at batch 1 all of x stays in the nearest cache, and long segments are what counts.
    block = min(shape[0], 1024) if height > 1 else shape[0]
    pattern = kernels.make_pattern(np.repeat(runs, height, axis=1), height=height, block=block)
    values, transposed = kernels.gather(weight, pattern), weight.T.copy()
    contenders = [jnp.matmul, lambda x, w: x @ w.T, lambda x, v: kernels.matmul(x, v, pattern)]
    weights = [weight, transposed, values]
    chains = [jax.jit(functools.partial(chain, f)) for f in contenders]
    calls = [jax.jit(f) for f in contenders]
    times = [_pair(chains, weights, i, x, repeats) for i in (0, 1)]
    best = min((0, 1), key=lambda i: times[i].dense)
    cold = _pair(chains, weights, best, x, repeats, cold=True)
    alone = _pair(calls, weights, best, x, 10 * repeats)
    copy = jax.jit(lambda x: x + 1)
    idle = paired.paired(lambda: copy(x), lambda: copy(x), 10 * repeats)
    indices = pattern.indices.nbytes + pattern.starts.nbytes
    return {
        **paired.row(_each(times[best]), cold, 2.0 * pattern.nnz, 4.0 * (sum(shape) + pattern.nnz) + indices),
        "call_ratio": round(alone.ratio, 2),
        "dispatch_us": round(idle.dense * 1e6, 1),
        "bare_us": bare_us(repeats),
    }


def cases(repeats: int) -> paired.Cases:
    """Every shape x kind x sparsity."""
    for shape in SHAPES:
        for kind in KINDS:
            for sparsity in SPARSITIES:
                identity = {"batch": 1, "in": shape[0], "out": shape[1], "kind": kind, "sparsity": sparsity}
                yield identity, functools.partial(measure, shape, kind, sparsity, repeats)


if __name__ == "__main__":
    paired.main("gemv", "Sparse matrix-vector products against XLA's dense one.", cases, repeats=20)
