"""Steps that say whether the library is right on a device. Rows have an `equal` or an error; nothing is timed."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax

import rigl_jax as rx
from experiments.benchmarks.device import timings
from experiments.io.environment import environment as environment_of
from rigl_jax import topology
from rigl_jax.execution import kernels
from rigl_jax.execution.kernels import mosaic

Rows = Iterator[dict[str, Any]]
TYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def environment(toy: bool) -> Rows:
    """Versions, the card, and its two ceilings: copied bytes and multiplied numbers a second."""
    yield {key: str(value) for key, value in environment_of().items()}
    for name, found in kernels.backends().items():
        yield {"kernels": name, **found._asdict()}
    n = 1 << (20 if toy else 28)
    x = jax.random.normal(jax.random.key(0), (n,))
    took = timings.time_of(lambda x: x + 1, [(x,)])
    yield {"ceiling": "copy", **took, "TB_per_s": round(8e-6 * n / took["us"], 3)}
    for dtype, precision in (("bfloat16", "default"), ("float32", "default"), ("float32", "highest")):
        side = 256 if toy else 8192
        a, b = (jax.random.normal(jax.random.key(i), (side, side), dtype) for i in range(2))
        took = timings.time_of(lambda a, b, p=precision: jnp.matmul(a, b, precision=p), [(a, b)])
        yield {"ceiling": f"{dtype}, {precision}", **took, "TFLOP_per_s": round(2e-6 * side**3 / took["us"], 1)}


def best(scores: np.ndarray, k: int, among: np.ndarray | None = None) -> np.ndarray:
    """The definition of `topology.select`: a stable sort, NaN last, those that are no candidates after all others."""
    x = -scores.astype(np.float32)
    places = np.argsort(x, kind="stable") if among is None else np.lexsort((x, ~among))
    count = len(x) if among is None else int(among.sum())
    found = np.zeros(len(x), bool)
    found[places[: min(max(k, 0), count)]] = True
    return found


def drawn(rng: np.random.Generator, n: int, dtype: str, *, ties: bool) -> np.ndarray:
    """Scores with infinities, NaN and zeros of both signs; with `ties` of a few values only."""
    x = rng.standard_normal(n, dtype=np.float32)
    if ties:
        x = np.round(2 * x)
    strange = rng.random(n, dtype=np.float32) < 0.01
    x[strange] = rng.choice(np.array([np.nan, np.inf, -np.inf, 0.0, -0.0], np.float32), int(strange.sum()))
    return x.astype(TYPES[dtype])


def selection(toy: bool) -> Rows:
    """`select` of 25 M scores, and the rewiring of many leaves, against stable sorts by NumPy.

    By the kernels of this device, where they are there, and in plain JAX.
    """
    n = 10_000 if toy else 25_000_000
    rng = np.random.default_rng(0)
    for dtype, ties in itertools.product(TYPES, (True, False)):
        scores = drawn(rng, n, dtype, ties=ties)
        order = best(scores, n // 10)
        for way, k in itertools.product(timings.ways(), (n // 10, n)):
            with timings.selecting(way):
                got = np.asarray(jax.jit(lambda s, k: topology.select(s, k))(jnp.asarray(scores), jnp.int32(k)))
            wanted = order if k < n else np.ones(n, bool)
            yield {"select": dtype, "way": way, "ties": ties, "k": k, "equal": bool((got == wanted).all())}
    for way in timings.ways():
        with timings.selecting(way):
            yield from _rewired(toy, way)


def _rewired(toy: bool, way: str) -> Rows:
    """`drop_and_grow` of leaves of many sizes, which are searched together on one accelerator."""
    rng = np.random.default_rng(1)
    sizes = [int(s) for s in rng.integers(100, 1000 if toy else 1_000_000, 6 if toy else 30)]
    params = {f"leaf_{i}": jax.ShapeDtypeStruct((s,), jnp.float32) for i, s in enumerate(sizes)}
    plan = rx.make_plan(params, 0.9, rules=((".*", rx.unstructured()),))
    masks = topology.random_masks(plan, jax.random.key(0), params)
    # Finite scores: a leaf in which one is NaN or +inf would keep its mask.
    drop, grow = (
        {n: np.round(4 * rng.standard_normal(p.shape)).astype(np.float32) for n, p in params.items()} for _ in "ab"
    )
    got, *_ = jax.jit(lambda m, d, g: topology.drop_and_grow(plan, m, d, g, 0.25))(masks, drop, grow)
    equal = 0
    for name, leaf in plan.items():
        mask, n_drop = np.asarray(masks[name]), leaf.n_active // 4
        kept = best(drop[name], leaf.n_active - n_drop, mask)
        equal += int((np.asarray(got[name]) == (kept | best(grow[name], n_drop, ~kept))).all())
    yield {"drop_and_grow": f"{len(plan)} leaves", "way": way, "equal": equal == len(plan), "leaves_equal": equal}


def digests(toy: bool) -> Rows:
    """Masks of a short RigL run, as digests by step.

    The gradients are drawn, and the learning rate is a power of two, so that no step rounds otherwise elsewhere.
    """
    rng = np.random.default_rng(0)
    side = 32 if toy else 1024
    draw = lambda: {name: rng.standard_normal((side, side), dtype=np.float32) for name in "abc"}  # noqa: E731
    params = jax.tree.map(jnp.asarray, draw())
    algorithm = rx.rigl(rx.make_plan(params, 0.9, distribution=rx.uniform), period=3, fraction=0.25)
    tx = rx.sparsify(optax.sgd(2.0**-4), algorithm, key=jax.random.key(0))
    state: Any = tx.init(params)
    params = rx.apply_masks(params, state.masks)
    update = jax.jit(tx.update)
    for step in range(10):
        updates, state = update(jax.tree.map(jnp.asarray, draw()), state, params)
        params = optax.apply_updates(params, updates)
        masks = b"".join(np.packbits(np.asarray(mask)).tobytes() for mask in jax.tree.leaves(state.masks))
        yield {"at": step, "digest": hashlib.sha256(masks).hexdigest()[:16]}


def masks(toy: bool) -> Rows:
    """The digests of this device against those of a process on the CPU."""
    command = [sys.executable, "-m", "experiments.benchmarks.device.steps", "digests", *(["--toy"] if toy else [])]
    there = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"}
    )
    found = re.findall(r'"digest": "(\w+)"', there.stdout)
    own = [row["digest"] for row in digests(toy)]
    yield {"steps": len(own), "different_masks": len(set(own)), "equal": own == found}


def tiles(kind: str, toy: bool) -> Rows:
    """One product with tiles against float64: the largest error, relative to the root mean square of the result."""
    bounds = {"bfloat16": 5e-2, "float16": 1e-2, "float32": 1e-2}
    for (dtype, bound), side in itertools.product(bounds.items(), (16,) if toy else (128, 64)):
        for batch in (3 * side + 5, 1):
            error = _error(kind, dtype, side, batch)
            row = {"product": kind, "dtype": dtype, "tile": side, "batch": batch, "error": error}
            yield {**row, "sound": error < bound}


def _error(kind: str, dtype: str, side: int, batch: int) -> float:
    rng = np.random.default_rng(0)
    mask = np.kron(rng.random((6, 5)) < 0.4, np.ones((side, side), bool))
    mask[:, :side] = False  # a column without a tile
    at = mosaic.tile_pattern(kernels.make_block_pattern(mask, (side, side)))
    sizes = (batch, 6 * side), (at.tiles.nnz,), (batch, 5 * side)
    x, values, dy = (jnp.asarray(rng.standard_normal(size), dtype) for size in sizes)
    return _away(kind, _product(kind, x, values, dy, at, mosaic.matmul), x, values, dy, at.tiles)


def _product(kind: str, x: jax.Array, values: jax.Array, dy: jax.Array, at: Any, matmul: Callable[..., Any]) -> Any:
    y, pull = jax.vjp(lambda x, values: matmul(x, values, at), x, values)
    return y if kind == "forward" else pull(dy)[kind == "dvalues"]


def _away(kind: str, got: jax.Array, x: jax.Array, values: jax.Array, dy: jax.Array, at: Any) -> float:
    """The largest error of a product against float64, relative to the root mean square of the result."""
    weight = np.asarray(kernels.scatter(values, at), np.float64)
    x64, dy64 = np.asarray(x, np.float64), np.asarray(dy, np.float64)
    if kind == "dvalues":
        wanted = np.asarray(kernels.gather(jnp.asarray(x64.T @ dy64, jnp.float32), at), np.float64)
    else:
        wanted = x64 @ weight if kind == "forward" else dy64 @ weight.T
    return round(float(np.abs(np.asarray(got, np.float64) - wanted).max() / np.sqrt((wanted**2).mean())), 8)


def cuda_products(kind: str, toy: bool) -> Rows:
    """One product with single weights or runs of 16 against float64, and what a damaged pattern gives."""
    product = functools.partial(kernels.matmul, level="cuda")
    inputs, outputs = (40, 64) if toy else (1100, 1600)

    def drawn(height: int, dtype: str, batch: int) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
        rng = np.random.default_rng(0)
        runs = rng.random((inputs, outputs // height)) < 0.1
        runs[:, 0] = False  # an output without a weight
        at = kernels.make_pattern(np.repeat(runs, height, axis=1), height=height)
        sizes = (batch, inputs), (at.nnz,), (batch, outputs)
        x, values, dy = (jnp.asarray(rng.standard_normal(size), dtype) for size in sizes)
        return x, values, dy, at

    for height, dtype, batch in itertools.product((1, 16), ("float32", "bfloat16"), (1, 5, 300)):
        x, values, dy, at = drawn(height, dtype, batch)
        error = _away(kind, _product(kind, x, values, dy, at, product), x, values, dy, at)
        row = {"product": kind, "height": height, "dtype": dtype, "batch": batch, "kernels": timings.on_cuda()}
        yield {**row, "error": error, "sound": error < (1e-4 if dtype == "float32" else 5e-2)}
    if jax.default_backend() == "gpu":
        x, values, dy, at = drawn(16, "bfloat16", 300)
        damaged = dataclasses.replace(at, starts=at.starts.at[3].set(1 << 30))
        yield {"product": kind, "damaged": bool(jnp.isnan(_product(kind, x, values, dy, damaged, product)).any())}


ALGORITHMS = "tests/contracts/test_algorithms.py"
FILES = (
    *(
        f"tests/rigl_jax/test_{name}.py"
        for name in ("topology", "together", "sparsify", "rigl", "unsound", "structures")
    ),
    *(f"tests/execution/test_{name}.py" for name in ("kernels_reference", "packed", "run", "pallas", "mosaic")),
    "tests/contracts/test_criteria.py",
)


def _selected() -> list[list[str]]:
    """What the processes of pytest are given. The contracts of all algorithms take long, so each has a process."""
    found = [[file] for file in FILES]
    for name in rx.ALGORITHMS:
        longer = [f" and not {other}" for other in rx.ALGORITHMS if name in other and name != other]
        found.append([ALGORITHMS, "-k", name + "".join(longer)])
    return found


def contracts(toy: bool) -> Rows:
    """Tests of the suite, side by side, each part reported when it ends. Those that need more devices are skipped."""
    settings = {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    plugins = ["-p", "no:cacheprovider", "-p", "experiments.benchmarks.device.one_device", "-n", "0"]

    def tested(chosen: list[str]) -> dict[str, Any]:
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "--tb=line", "-rf", *plugins, *chosen]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **settings})
        sys.stderr.write(done.stdout[-3000:])
        counts = re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout[-300:])
        failures = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
        found = {
            what: next((int(n) for n, kind in counts if kind == what), 0) for what in ("passed", "failed", "skipped")
        }
        return {"tests": " ".join(chosen), "code": done.returncode, **found, "failures": failures[:20]}

    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        for done in concurrent.futures.as_completed(
            [pool.submit(tested, c) for c in _selected()[: 2 if toy else None]]
        ):
            yield done.result()
