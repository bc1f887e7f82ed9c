"""What it costs that native kernels check indices before they use them: against a build of the library that does not.

Each product by itself, call by call in turns; `ratio` is the median of checked / unchecked over neighbouring calls, the
mean of two such medians, one for each order of the two.
Writes the record checks.json. Needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import timing
from experiments.benchmarks.paired import paired
from rigl_jax import native
from rigl_jax.execution import kernels
from rigl_jax.native import build

PREFIX = "unchecked_"
CASES = itertools.product((1, 256), ((1024, 0.1), (1024, 0.02)), (1, 16))


def register(folder: pathlib.Path) -> None:
    """Builds and registers the same kernels without their checks, under names of their own."""
    library = ctypes.CDLL(str(build.build(folder / "unchecked.so", ["-DRIGL_UNCHECKED"])))
    for target in native.TARGETS:
        jax.ffi.register_ffi_target(PREFIX + target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")


def compiled(product: Callable[..., Any], *operands: Any, prefix: str) -> Callable[[], Any]:
    """A call of the product, on the kernels with this prefix."""
    call = native.call

    def renamed(target: str, shape: tuple[int, ...], *operands: jax.Array, **attributes: Any) -> jax.Array:
        return call(prefix + target, shape, *operands, **attributes)

    native.call = renamed
    try:
        jax.clear_caches()
        program = jax.jit(product).lower(*operands).compile()
    finally:
        native.call = call
    return lambda: program(*operands)


def products(x: jax.Array, dy: jax.Array) -> dict[str, Callable[..., Any]]:
    """The three products of a layer, of (values, pattern)."""

    def loss(x: Any, values: Any, pattern: Any) -> Any:
        return jnp.vdot(kernels.matmul(x, values, pattern), dy)

    return {
        "forward": lambda values, pattern: kernels.matmul(x, values, pattern),
        "input gradient": lambda values, pattern: jax.grad(loss)(x, values, pattern),
        "values gradient": lambda values, pattern: jax.grad(loss, 1)(x, values, pattern),
    }


def measure(batch: int, size: int, density: float, height: int, rounds: int) -> list[dict[str, Any]]:
    """One row a product."""
    rng = np.random.default_rng(0)
    mask = np.repeat(rng.random((size, size // height)) < density, height, axis=1)
    pattern = kernels.make_pattern(mask, height=height)
    values = jnp.asarray(rng.normal(size=pattern.nnz), jnp.float32)
    x, dy = (jnp.asarray(rng.normal(size=(batch, size)), jnp.float32) for _ in range(2))
    rows = []
    for name, product in products(x, dy).items():
        checked, unchecked = (compiled(product, values, pattern, prefix=prefix) for prefix in ("", PREFIX))
        repeats = rounds if batch > 1 else 10 * rounds
        first, second = paired(unchecked, checked, repeats), paired(checked, unchecked, repeats)
        case = {"product": name, "batch": batch, "size": size, "density": density, "height": height}
        ratio = round((1 / first.ratio + second.ratio) / 2, 3)
        rows.append({**case, "ratio": ratio, "checked_ms": round(1e3 * first.sparse, 4)})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rounds", type=int, default=100, help="timed calls of each order, ten times as many at batch 1"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        register(pathlib.Path(folder))
        rows = [
            row
            for batch, (size, density), height in CASES
            for row in measure(batch, size, density, height, arguments.rounds)
        ]
    median = round(float(np.median([row["ratio"] for row in rows])), 3)
    timing.write("checks", rows, kernels=kernels.backends()["native"].detail, median_ratio=median)


if __name__ == "__main__":
    main()
