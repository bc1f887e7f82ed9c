"""Steps that time products, rewirings and training steps on a device. Ratios are dense time / sparse time."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rigl_jax as rx
from experiments.benchmarks import rewiring
from rigl_jax import topology
from rigl_jax.execution import kernels
from rigl_jax.execution.kernels import block, mosaic
from rigl_jax.native import cuda

Array = jax.Array
Rows = Iterator[dict[str, Any]]


def time_of(call: Callable[..., Any], sets: Sequence[tuple[Any, ...]], rounds: int = 7) -> dict[str, float]:
    """Microseconds of one call.

    Args:
      call: is compiled.
      sets: operands. One program calls it on all sets in turn: with several, no operand is left in a cache.
      rounds: the median is taken of.

    Returns:
      `us`: on a GPU the time of its kernels by CUPTI, elsewhere that between calls; `call_us`: between calls that are
      started in a row.
    """
    program = jax.jit(lambda sets: [call(*operands) for operands in sets])
    jax.block_until_ready(program(sets))
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        found = [program(sets) for _ in range(3)]
        jax.block_until_ready(found)
        taken.append((time.perf_counter() - start) / (3 * len(sets)))
    between = 1e6 * float(np.median(taken))
    inside = [1e3 * ms / len(sets) for ms in _of_kernels(program, sets, rounds)]
    return {"us": round(float(np.median(inside)) if inside else between, 2), "call_us": round(between, 2)}


def _of_kernels(program: Callable[..., Any], sets: Any, rounds: int) -> list[float]:
    """Milliseconds of the kernels of each call; empty where CUPTI does not tell."""
    if jax.default_backend() != "gpu":
        return []
    try:
        from jax.experimental.mosaic.gpu import profiler

        _, found = profiler.measure(program, iterations=rounds)(sets)
    except (ImportError, AttributeError, TypeError, RuntimeError):  # of another version; or kernels that vary
        return []
    return list(found or [])


def steps_of(contenders: dict[str, tuple[Callable[..., Any], Any]], chain: int, rounds: int = 5) -> dict[str, float]:
    """Milliseconds of a step by name: `chain` steps in a row, each on the state of the one before, in turns."""
    held = {name: step(state) for name, (step, state) in contenders.items()}
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
        for name, (step, _) in contenders.items():
            jax.block_until_ready(held[name])
            start = time.perf_counter()
            for _ in range(chain):
                held[name] = step(held[name])
            jax.block_until_ready(held[name])
            taken[name].append(1e3 * (time.perf_counter() - start) / chain)
    return {name: float(np.median(ms[1:])) for name, ms in taken.items()}


def ways() -> tuple[str, ...]:
    """How selections can be made here."""
    return ("native", "plain JAX") if on_cuda() else ("plain JAX",)


def on_cuda() -> bool:
    """Whether the library's CUDA kernels are used here."""
    return jax.default_backend() == "gpu" and cuda.serves()


@contextlib.contextmanager
def selecting(way: str) -> Iterator[None]:
    """Programs that are traced meanwhile select in one of the `ways`."""
    with mock.patch.object(cuda, "serves", return_value=way == "native"):
        yield


def _training(optimizer: Any, loss: Callable[..., Array], x: Any, **options: Any) -> Callable[..., Any]:
    def step(carry: Any, x: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, x), state, params, **options)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, donate_argnums=0)
    return lambda carry: compiled(carry, x)


def masked_step(toy: bool) -> Rows:
    """Two layers, Adam: the dense step, the masked step, and the one that decides in the graph whether to rewire."""
    width, batch = (64, 8) if toy else (4096, 1024)
    x = jax.random.normal(jax.random.key(0), (batch, width))
    weights = {
        name: jax.random.normal(jax.random.key(i), (width, width)) / math.sqrt(width) for i, name in enumerate("ab")
    }
    adam = optax.adam(1e-3)
    algorithm = rx.rigl(rx.make_plan(weights, 0.9), period=1 << 20, start=1)
    sparse = rx.sparsify(adam, algorithm, key=jax.random.key(0))
    state: Any = sparse.init(weights)
    for dtype in ("float32", "bfloat16"):

        def loss(params: Any, x: Array, dtype: str = dtype) -> Array:
            y = x.astype(dtype)
            hidden = jax.nn.relu(y @ params["a"].astype(dtype))
            return jnp.mean((hidden @ params["b"].astype(dtype)).astype(jnp.float32) ** 2)

        fresh = lambda tree: jax.tree.map(jnp.copy, tree)  # noqa: E731
        contenders = {
            "dense": (_training(adam, loss, x), fresh((weights, adam.init(weights)))),
            "masked, rewire=False": (_training(sparse, loss, x, rewire=False), fresh((weights, state))),
            "masked, rewire=None": (_training(sparse, loss, x), fresh((weights, state))),
        }
        ms = steps_of(contenders, chain=2 if toy else 20)
        for name, taken in ms.items():
            over = round(taken / ms["dense"], 3)
            yield {"products": dtype, "program": name, "ms": round(taken, 3), "over_dense": over}


def rewirings(toy: bool) -> Rows:
    """25 M weights in one leaf, and ResNet-50's leaves; beside them what XLA's sorts take."""
    n = 10_000 if toy else 25_000_000
    keys = jax.random.split(jax.random.key(0), 3)
    drop, grow = (jax.random.normal(key, (n,)) for key in keys[:2])
    mask = jax.random.uniform(keys[2], (n,)) < 0.1
    rewire = lambda m, d, g: topology.rewire(rx.unstructured(), m, d, g, n // 30)  # noqa: E731
    for way in ways():
        with selecting(way):
            select = time_of(lambda s: topology.select(s, n // 10), [(drop,)])
            yield {"program": f"select 10 % of {n:,}", "way": way, **select}
            yield {"program": f"rewire {n:,}", "way": way, **time_of(lambda *x: rewire(*x), [(mask, drop, grow)])}
    yield {"program": f"jax.lax.top_k, 10 % of {n:,}", **time_of(lambda s: jax.lax.top_k(s, n // 10), [(drop,)], 3)}
    yield {"program": f"jax.lax.sort of {n:,}", **time_of(jax.lax.sort, [(drop,)], 3)}
    shapes = rewiring.mlp() if toy else rewiring.resnet50()
    if toy:
        shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct((32, 32), p.dtype), shapes)
    plan = rx.make_plan(shapes, 0.9)
    names = iter(range(1 << 20))
    draw = lambda p: jax.random.normal(jax.random.key(next(names)), p.shape)  # noqa: E731
    weights, grads = jax.tree.map(draw, shapes), jax.tree.map(draw, shapes)
    masks = topology.random_masks(plan, jax.random.key(0), weights)
    magnitudes = lambda tree: jax.tree.map(jnp.abs, tree)  # noqa: E731
    rewire_all = lambda m, w, g: topology.drop_and_grow(plan, m, magnitudes(w), magnitudes(g), 0.3)  # noqa: E731
    leaves = f"{len(plan)} leaves of {sum(leaf.size for leaf in plan.values()):,} weights"
    for way in ways():
        with selecting(way):
            taken = time_of(lambda *x: rewire_all(*x), [(masks, weights, grads)])
        yield {"program": f"rewire {leaves}", "way": way, **taken}


def random_tiles(inputs: int, outputs: int, side: int, sparsity: float, seed: int) -> Any:
    """A pattern of tiles drawn at random, as many as asked for."""
    rng = np.random.default_rng(seed)
    grid = (inputs // side, outputs // side)
    count = math.prod(grid)
    active = rng.permutation(np.arange(count) < max(1, round((1 - sparsity) * count))).reshape(grid)
    return block.make_block_pattern(np.kron(active, np.ones((side, side), bool)), (side, side))


SHAPES = {"A": (1024, 4096, 4096), "B": (1024, 4096, 16384), "C": (8192, 2048, 2048)}
SPARSITIES = (0.9, 0.95, 0.8, 0.98)


def _draw(dtype: str, seed: int, *shape: int) -> Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def _dx(dy: Array, values: Array, at: Any) -> Array:
    return mosaic.matmul(dy, values, at, transpose=True)


def _dvalues(x: Array, dy: Array, values: Array, at: Any) -> Array:
    return jax.vjp(lambda values: mosaic.matmul(x, values, at), values)[1](dy)[0]


def tiles(toy: bool) -> Rows:
    """y, dx and dvalues of tiles, each against the dense product of the same shapes and dtype."""
    shapes = {"A": (64, 64, 64)} if toy else SHAPES
    dense: dict[Any, dict[str, float]] = {}
    for dtype, side in itertools.product(("bfloat16", "float32"), (16,) if toy else (128, 64)):
        for sparsity, (name, (batch, inputs, outputs)) in itertools.product(SPARSITIES, shapes.items()):
            draw = functools.partial(_draw, dtype)
            sets = [(draw(i, batch, inputs), draw(10 + i, batch, outputs)) for i in range(2)]
            if (dtype, name) not in dense:
                weights = [draw(20 + i, inputs, outputs) for i in range(2)]
                dense[dtype, name] = {
                    "y": time_of(jnp.matmul, [(x, w) for (x, _), w in zip(sets, weights, strict=True)])["us"],
                    "dx": time_of(lambda dy, w: dy @ w.T, [(dy, w) for (_, dy), w in zip(sets, weights, strict=True)])[
                        "us"
                    ],
                    "dvalues": time_of(lambda x, dy: x.T @ dy, sets)["us"],
                }
            at = mosaic.tile_pattern(random_tiles(inputs, outputs, side, sparsity, 0))
            values = [draw(30 + i, at.tiles.nnz) for i in range(2)]
            pairs = list(zip(sets, values, strict=True))
            taken = {
                "y": time_of(mosaic.matmul, [(x, v, at) for (x, _), v in pairs])["us"],
                "dx": time_of(_dx, [(dy, v, at) for (_, dy), v in pairs])["us"],
                "dvalues": time_of(_dvalues, [(x, dy, v, at) for (x, dy), v in pairs])["us"],
            }
            row = {"dtype": dtype, "tile": side, "shape": name, "sparsity": sparsity}
            both = {f"{what}_us": f"{us} (dense {dense[dtype, name][what]})" for what, us in taken.items()}
            yield {**row, **both, "ratio": round(sum(dense[dtype, name].values()) / sum(taken.values()), 2)}


def _forward_and_gradients(product: Callable[[Array, Array], Array]) -> Callable[[Array, Array, Array], Any]:
    def run(x: Array, weight: Array, dy: Array) -> Any:
        y, pull = jax.vjp(product, x, weight)
        return y, *pull(dy)

    return run


def random_pattern(inputs: int, outputs: int, height: int, sparsity: float, block: int | None = None) -> Any:
    """A pattern of single weights, or of runs of outputs, drawn at random."""
    runs = np.random.default_rng(0).random((inputs, outputs // height)) >= sparsity
    return kernels.make_pattern(np.repeat(runs, height, axis=1), height=height, block=block)


def unstructured(toy: bool) -> Rows:
    """Y and both gradients, against the dense product: by our kernels, and in plain JAX."""
    batch, inputs, outputs = (64, 64, 64) if toy else SHAPES["A"]
    half = np.tile([[1], [0], [1], [0]], (inputs // 4, outputs)).astype(bool)
    plain = {"2:4": kernels.make_nm_pattern(half, 2, 4)}
    plain["tiles, plain XLA, 90%"] = random_tiles(inputs, outputs, 16 if toy else 128, 0.9, 0)
    ours = {(h, s): random_pattern(inputs, outputs, h, s) for h in (16, 1) for s in (0.9, 0.98)}
    for dtype, precision in (("float32", "highest"), ("bfloat16", "default"), ("float32", "default")):
        draw = functools.partial(_draw, dtype)
        x, weight, dy = draw(0, batch, inputs), draw(1, inputs, outputs), draw(2, batch, outputs)
        with jax.default_matmul_precision(precision):
            dense = time_of(_forward_and_gradients(jnp.matmul), [(x, weight, dy)])
            row = {"dtype": dtype, "precision": precision}
            yield {**row, "pattern": "dense", **dense, "ratio": 1.0}
            cases: list[tuple[str, Any, dict[str, Any]]] = [
                (f"{'single weights' if h == 1 else 'runs of 16'}, {s:.0%}, {level}", at, {"level": level})
                for (h, s), at in ours.items()
                for level in ("cuda", "jax")
                if level == "cuda" or (h, s) == (1, 0.9)  # a dense product takes as long at every sparsity
            ]
            if precision == "default":
                cases += [(name, at, {}) for name, at in plain.items()]
            for name, at, options in cases:
                run = _forward_and_gradients(lambda x, v, at=at, o=options: kernels.matmul(x, v, at, **o))
                took = time_of(run, [(x, kernels.gather(weight, at), dy)])
                yield {**row, "pattern": name, **took, "ratio": round(dense["us"] / took["us"], 3)}


def batch_1(toy: bool) -> Rows:
    """One example, y alone; four weights in turn, so that none stays in the cache."""
    inputs, outputs = (64, 64) if toy else (4096, 16384)
    # In as few blocks of inputs as there may be: short segments are slow here.
    patterns = {
        (h, s): random_pattern(inputs, outputs, h, s, block=inputs if h == 1 else None)
        for h, s in itertools.product((1, 16), (0.9, 0.98))
    }
    for dtype in ("float32", "bfloat16"):
        draw = functools.partial(_draw, dtype)
        sets = [(draw(i, 1, inputs), draw(10 + i, inputs, outputs)) for i in range(4)]
        dense = time_of(jnp.matmul, sets)
        yield {"dtype": dtype, "weights": "dense", **dense, "ratio": 1.0}
        for (height, sparsity), pattern in patterns.items():
            copies = [jax.tree.map(jnp.copy, pattern) for _ in sets]
            packed = [(x, kernels.gather(w, p), p) for (x, w), p in zip(sets, copies, strict=True)]
            took = time_of(functools.partial(kernels.matmul, level="cuda"), packed)
            name = "single weights" if height == 1 else "runs of 16"
            row = {"dtype": dtype, "weights": f"{name}, {sparsity:.0%} sparse"}
            yield {**row, **took, "ratio": round(dense["us"] / took["us"], 2)}
        for side, sparsity in itertools.product((16,) if toy else (128, 64), SPARSITIES):
            at = [mosaic.tile_pattern(random_tiles(inputs, outputs, side, sparsity, i)) for i in range(4)]
            tiled = [(x, kernels.gather(w, p.tiles), p) for (x, w), p in zip(sets, at, strict=True)]
            took = time_of(mosaic.matmul, tiled)
            row = {"dtype": dtype, "weights": f"tiles of {side}, {sparsity:.0%} sparse"}
            yield {**row, **took, "ratio": round(dense["us"] / took["us"], 2)}


def _mlp(width: int, hidden: int, sparsity: float, side: int, dtype: str) -> tuple[Any, Any, Any]:
    """Dense weights of an MLP block, values of tiles, and their patterns."""
    shapes = {"up": (width, hidden), "down": (hidden, width)}
    dense = {n: (jax.random.normal(jax.random.key(0), s) / math.sqrt(s[0])).astype(dtype) for n, s in shapes.items()}
    at = {n: mosaic.tile_pattern(random_tiles(*s, side, sparsity, 0)) for n, s in shapes.items()}
    return dense, {n: kernels.gather(w, at[n].tiles) for n, w in dense.items()}, at


def _block_loss(product: Callable[..., Array]) -> Callable[..., Array]:
    def loss(weights: Any, x: Array) -> Array:
        hidden = jax.nn.gelu(product(x, weights["up"], "up"))
        return jnp.mean((x + product(hidden, weights["down"], "down")).astype(jnp.float32) ** 2)

    return loss


def mlp_block(toy: bool) -> Rows:
    """A training step with Adam of a transformer's MLP block: dense against tiles, in bfloat16."""
    width, hidden, batch, side = (64, 128, 32, 16) if toy else (4096, 16384, 8192, 128)
    x = jax.random.normal(jax.random.key(1), (batch, width), "bfloat16")
    adam = optax.adam(1e-3)
    for sparsity in SPARSITIES:
        dense, values, at = _mlp(width, hidden, sparsity, side, "bfloat16")
        contenders = {
            "dense": (_training(adam, _block_loss(lambda x, w, _: x @ w), x), (dense, adam.init(dense))),
            "tiles": (
                _training(adam, _block_loss(lambda x, v, n, at=at: mosaic.matmul(x, v, at[n])), x),
                (values, adam.init(values)),
            ),
        }
        ms = steps_of(contenders, chain=2 if toy else 10)
        row = {"block": f"{width} x {hidden}, batch {batch}", "tile": side, "sparsity": sparsity}
        yield {**row, **{f"{n}_ms": round(t, 3) for n, t in ms.items()}, "ratio": round(ms["dense"] / ms["tiles"], 2)}


def memory(toy: bool) -> Rows:
    """Bytes in use after Adam steps of an MLP block with tiles, then of the dense one: the peak never falls."""
    width, hidden, batch, side = (64, 128, 32, 16) if toy else (4096, 16384, 1024, 128)
    adam = optax.adam(1e-3)
    x = jax.random.normal(jax.random.key(1), (batch, width))
    dense, values, at = _mlp(width, hidden, 0.9, side, "float32")
    held = {n: np.asarray(w) for n, w in dense.items()}
    del dense
    for name in ("tiles, 90 % sparse", "dense"):
        weights: Any = values if name != "dense" else {n: jnp.asarray(w) for n, w in held.items()}
        product = (lambda x, w, n: mosaic.matmul(x, w, at[n])) if name != "dense" else (lambda x, w, _: x @ w)
        step, state = _training(adam, _block_loss(product), x), adam.init(weights)
        state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((weights, state)))
        jax.block_until_ready(step((weights, state)))
        found = jax.devices()[0].memory_stats() or {}
        gigabytes = {key: round(found[key] / 1e9, 3) for key in ("peak_bytes_in_use", "bytes_in_use") if key in found}
        yield {"training": name, "weights_and_adam_GB": round(state_bytes / 1e9, 3), **gigabytes}
