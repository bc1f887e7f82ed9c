"""One training step of the same network dense, masked and packed: time, and bytes of the train state.

    python -m experiments.real_sparsity            # the end of `make demo`

Masks set pruned weights to 0 and multiply them all the same, so a masked step costs what a dense one costs, and its
masks come on top. Packed execution (`rx.packed_training`) stores and multiplies the active weights alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table

import rigl_jax as rx
from experiments.benchmarks import timing, training_step
from experiments.models import MLP
from rigl_jax.execution import nbytes

FEATURES, BATCH, SPARSITY, INPUTS = (2048, 2048), 128, 0.98, 784


class Cost(NamedTuple):
    """What one way to train costs.

    Attributes:
      milliseconds: a step, median.
      nbytes: of weights, optimizer state, and masks or indices.
    """

    milliseconds: float
    nbytes: int


def measure(features: Sequence[int] = FEATURES, rounds: int = 15) -> dict[str, Cost]:
    """The costs by name, "dense", "masked" and "packed"; the steps are taken in turns.

    The network is fully connected, its batch random, the optimizer Adam, the algorithm RigL; the step is an ordinary
    one, which rewires nothing.

    Args:
      features: widths of the hidden layers.
      rounds: timed steps of each.
    """
    model, inner = MLP(10, features=tuple(features)), optax.adam(1e-3)
    x, y = jax.random.normal(jax.random.key(0), (BATCH, INPUTS)), jnp.arange(BATCH) % 10
    params = jax.jit(model.init)(jax.random.key(1), x[:1])["params"]
    algorithm = rx.rigl(rx.make_plan(params, SPARSITY))
    masked = rx.sparsify(inner, algorithm, key=jax.random.key(2))
    packed = rx.packed_training(inner, algorithm, key=jax.random.key(2))

    def loss(apply: Callable[..., Any], params: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(apply({"params": params}, x), y).mean()

    still = optax.GradientTransformationExtraArgs(masked.init, functools.partial(masked.update, rewire=False))
    dense_step, packed_step, _ = training_step.programs(model.apply, inner, packed, loss)
    masked_step, *_ = training_step.programs(model.apply, still, packed, loss)
    state: Any = masked.init(params)
    ways: dict[str, tuple[Any, Any]] = {
        "dense": (dense_step, (params, inner.init(params))),
        "masked": (masked_step, (rx.apply_masks(params, state.masks), state)),
        "packed": (packed_step, packed.init(params)),
    }
    sizes = {name: nbytes(carry) for name, (_, carry) in ways.items()}
    calls = {name: timing.contender(way, jax.tree.map(jnp.copy, carry)) for name, (way, carry) in ways.items()}
    seconds = timing.interleave(calls, rounds=rounds)
    return {name: Cost(1e3 * float(np.median(seconds[name])), sizes[name]) for name in ways}


def table(costs: Mapping[str, Cost]) -> Table:
    """The costs, beside those of the dense step."""
    made, dense = Table(box=box.SIMPLE_HEAD), costs["dense"]
    made.add_column("Training step")
    for head in ("Time, ms", "Dense = 1", "Weights and state, MB", "Dense = 1"):
        made.add_column(head, justify="right")
    for name, cost in costs.items():
        times, sizes = cost.milliseconds / dense.milliseconds, cost.nbytes / dense.nbytes
        made.add_row(
            name.capitalize(), f"{cost.milliseconds:.1f}", f"{times:.2f}", f"{cost.nbytes / 1e6:.1f}", f"{sizes:.3f}"
        )
    return made


def show(console: Console, features: Sequence[int] = FEATURES) -> None:
    """Measures and prints: a few seconds."""
    layers = " x ".join(map(str, (INPUTS, *features, 10)))
    console.print(
        f"One step of a larger network ({layers}, batch {BATCH}, Adam), {100 * SPARSITY:g} % sparse, three ways:"
    )
    console.print(table(measure(features)))
    console.print(
        "Masked: pruned weights are 0 and are multiplied all the same. Packed: only the active weights are stored and "
        "multiplied, in training too (rx.packed_training).",
        highlight=False,
    )


if __name__ == "__main__":
    show(Console())
