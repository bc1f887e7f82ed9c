"""What programs for an H100 start and hold, read off the compiled programs: nothing is run, no time is measured.

    python -m experiments.benchmarks.compiled [--quick]

Needs the compiler of `pip install -e .[ahead]`, no device.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

import rigl_jax as rx
from experiments.benchmarks import ahead, rewiring, timing
from experiments.benchmarks.device.timings import random_pattern, random_tiles
from rigl_jax import topology
from rigl_jax.execution import kernels
from rigl_jax.execution.kernels import mosaic
from rigl_jax.native import cuda
from rigl_jax.topology import topk

Program = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
BY = {"1 bit a pass": 1, "4 bits a pass": 4, "CUDA kernels": 0}
"""How scores are selected: in plain JAX, with so many bits in a pass over the scores; 0: all by the native kernels."""


def programs(scale: int) -> Iterator[tuple[str, int, Program]]:
    """Name, bits that a pass finds (`BY`), and the program with its arguments and options of `jax.jit`."""
    scores = jax.ShapeDtypeStruct((25_000_000 // scale,), jnp.float32)
    size = f"{scores.size:,} weights"
    for by, digit in BY.items():
        yield f"select 10 % of {size}, {by}", digit, (lambda s: topology.select(s, s.size // 10), (scores,), {})
        mask = jax.ShapeDtypeStruct(scores.shape, bool)
        rewire = lambda m, d, g: topology.rewire(rx.unstructured(), m, d, g, m.size // 30)  # noqa: E731
        yield f"rewire {size}, {by}", digit, (rewire, (mask, scores, scores), {})
    yield from ((name, 4, program) for name, program in steps(4096 // scale))
    yield from ((name, 4, program) for name, program in tiles(scale))
    yield from single_weights(scale)
    params = rewiring.resnet50() if scale == 1 else rewiring.mlp()
    plan = rx.make_plan(params, 0.9)
    masks = rx.trees.map_sparse(lambda _, p: p.update(dtype=bool), plan, params)
    rewire_all = lambda masks, drop, grow: topology.drop_and_grow(plan, masks, drop, grow, 0.3)  # noqa: E731
    name = "ResNet-50" if scale == 1 else "an MLP"
    for by in ("4 bits a pass", "CUDA kernels"):
        yield f"rewire the {len(plan)} leaves of {name}, {by}", BY[by], (rewire_all, (masks, params, params), {})


def _all_three(product: Callable[..., Any]) -> Callable[..., Any]:
    """Y and both gradients."""

    def all_three(x: Any, w: Any, dy: Any, at: Any) -> Any:
        y, pull = jax.vjp(lambda x, w: product(x, w, at), x, w)
        return y, *pull(dy)

    return all_three


def single_weights(scale: int) -> Iterator[tuple[str, int, Program]]:
    """The three products of a layer in float32 with single weights: in plain JAX, and by our kernels."""
    width, batch = 4096 // scale, 1024
    x = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    at = random_pattern(width, width, 1, 0.9)
    values = jax.ShapeDtypeStruct((at.nnz,), jnp.float32)
    for name, digit in (("plain JAX", 4), ("CUDA kernels", 0)):
        run = _all_three(lambda x, w, at: kernels.matmul(x, w, at, level="cuda"))
        layer = f"{width} x {width}, batch {batch}, float32, 10 % of its weights, {name}"
        yield f"y and both gradients, {layer}", digit, (run, (x, values, x, at), {})


def tiles(scale: int) -> Iterator[tuple[str, Program]]:
    """The three products of a layer in bfloat16: dense, with tiles in plain XLA, and by our kernels."""
    width, batch = 4096 // scale, 1024
    x = jax.ShapeDtypeStruct((batch, width), jnp.bfloat16)
    at = mosaic.tile_pattern(random_tiles(width, width, 128, 0.9, 0))
    values = jax.ShapeDtypeStruct((at.tiles.nnz,), jnp.bfloat16)
    variants: dict[str, tuple[Any, Any, Any]] = {
        "dense": (lambda x, w, _: x @ w, jax.ShapeDtypeStruct((width, width), jnp.bfloat16), ()),
        "10 % of its 128 x 128 tiles, plain XLA": (kernels.matmul, values, at.tiles),
        "10 % of its 128 x 128 tiles, our kernels": (mosaic.matmul, values, at),
    }
    for name, (product, weight, pattern) in variants.items():
        layer = f"{width} x {width}, batch {batch}, bfloat16, {name}"
        yield f"y and both gradients, {layer}", (_all_three(product), (x, weight, x, pattern), {})


def steps(width: int) -> Iterator[tuple[str, Program]]:
    """Two layers, Adam, batch 1024: the dense step, the masked one, and the one that decides by itself to rewire."""
    weights = {name: jax.ShapeDtypeStruct((width, width), jnp.float32) for name in ("a", "b")}
    x = jax.ShapeDtypeStruct((1024, width), jnp.float32)
    adam = optax.adam(1e-3)
    sparse = rx.sparsify(adam, rx.rigl(rx.make_plan(weights, 0.9)), key=jax.random.key(0))
    variants: dict[str, tuple[Any, dict[str, Any]]] = {
        "dense": (adam, {}),
        "masked, rewire=False": (sparse, {"rewire": False}),
        "masked, rewire=None": (sparse, {}),
    }
    for name, (optimizer, options) in variants.items():

        def step(params: Any, state: Any, x: Any, optimizer: Any = optimizer, options: Any = options) -> Any:
            loss = lambda params: jnp.mean(jax.nn.relu(x @ params["a"]) @ params["b"])  # noqa: E731
            updates, state = optimizer.update(jax.grad(loss)(params), state, params, **options)
            return optax.apply_updates(params, updates), state

        state = jax.eval_shape(optimizer.init, weights)
        arguments = (weights, state, x)
        yield f"step of two {width} x {width} layers, Adam, {name}", (step, arguments, {"donate_argnums": (0, 1)})


def main() -> None:
    """Compiles, prints and writes the record; rows that it has are not compiled again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, no record")
    arguments = parser.parse_args()
    rows = [] if arguments.quick else timing.rows("compiled")
    done = {row["program"] for row in rows}
    for name, digit, (function, operands, options) in programs(16 if arguments.quick else 1):
        if name in done or (digit == 0 and cuda.library() is None):
            continue
        start = time.perf_counter()
        native = mock.patch.object(cuda, "serves", return_value=digit == 0)
        with mock.patch.object(topk, "digit_bits", lambda digit=digit: digit or 4), native:
            compiled = ahead.compile("h100", function, *operands, **options)
        seconds = time.perf_counter() - start
        found = ahead.launches(compiled)._asdict()
        temporary = round(ahead.temporary(compiled) / 1e6, 1)
        rows.append({"program": name, **found, "temporary_MB": temporary, "compile_s": round(seconds, 1)})
        print(rows[-1], flush=True)
        if not arguments.quick:
            what = "kernels and temporary buffers of programs compiled for an H100 without a device; nothing was run"
            timing.write("compiled", rows, what=what)


if __name__ == "__main__":
    main()
