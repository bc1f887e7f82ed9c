"""What the cells of the pruning study share: networks trained densely once, compiled training, and measures."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

import rigl_jax as rx
from experiments.models import MODELS as NETWORKS
from experiments.studies.method_networks import forward
from experiments.studies.method_training import BATCH, Data, Images, optimizer, order, segments

MODELS: Mapping[str, Mapping[str, Any]] = {
    "lenet_300_100": {"network": "mlp", "features": (300, 100), "epochs": 3, "rate": 0.1, "seeds": 5, "budgets": True},
    "lenet5": {
        "network": "lenet5",
        "features": (6, 16, 120, 84),
        "epochs": 3,
        "rate": 0.05,
        "seeds": 3,
        "budgets": False,
    },
}
"""`rate` is the peak of the learning rate of the dense run, from which it falls by a cosine over its `epochs`.

What makes the study of a slow network shorter: `seeds` is how many are run, and without `budgets`, retraining schedules
are compared only where the one for fine-tuning is chosen."""
EXAMPLES = 1024
"""Training images that criteria and surgeons may see."""
REWIND_TO = 100
"""Step of the dense run to which weights or the learning rate are rewound."""
Fit = Callable[..., rx.recipes.Trained]


class Dense(NamedTuple):
    """The dense network of a seed: its weights at step 0, at step `REWIND_TO` and after training."""

    init: Any
    early: Any
    trained: Any


class Bench(NamedTuple):
    """What the cells of a model share.

    Attributes:
      data: images and labels.
      apply: `(params, x) -> logits`, the plain network, which criteria trace.
      fast: the same in the form in which it is trained.
      loss: `(params, (x, y)) -> float32` scalar, mean cross-entropy of `fast`.
      init: `key -> params`.
      epoch: steps of an epoch.
      steps: of the dense run.
      peak: its largest learning rate.
      original: its schedule, a cosine.
      fit: trains with fixed masks, see `make_fit`.
      logits: `(params, images) -> float32[n, 10]`.
      dense: networks by seed, once they are trained.
      made: criteria by name, so that each is compiled once, and their scores by name and seed.
    """

    data: Data
    apply: Callable[[Any, Array], Array]
    fast: Callable[[Any, Array], Array]
    loss: Callable[[Any, Any], Array]
    init: Callable[[Array], Any]
    epoch: int
    steps: int
    peak: float
    original: optax.Schedule
    fit: Fit
    logits: Callable[[Any, Images], Array]
    dense: dict[int, Dense]
    made: dict[Any, Any]


def make_bench(model: str, data: Data, epochs: int | None = None) -> Bench:
    """All that is compiled once for a model."""
    spec = MODELS[model]
    module = NETWORKS[spec["network"]](10, features=spec["features"])
    fast = forward(module)

    def apply(params: Any, x: Array) -> Array:
        return jnp.asarray(module.apply({"params": params}, x))

    def init(key: Array) -> Any:
        return module.init(key, jnp.zeros((1, 28, 28, 1)))["params"]

    epoch = len(data.train.y) // BATCH
    steps = epoch * (epochs or spec["epochs"])
    plan = plan_of(jax.eval_shape(init, jax.random.key(0)), 0.5)
    return Bench(
        data=data,
        apply=apply,
        fast=fast,
        loss=functools.partial(_loss, fast),
        init=jax.jit(init),
        epoch=epoch,
        steps=steps,
        peak=spec["rate"],
        original=optax.cosine_decay_schedule(spec["rate"], steps),
        fit=make_fit(fast, rx.static(plan), data.train),
        logits=jax.jit(functools.partial(_logits, fast)),
        dense={},
        made={},
    )


def plan_of(params: Any, sparsity: float, *, structure: Any = None, distribution: Any = rx.uniform) -> rx.base.Plan:
    """The counts at a sparsity: kernels are pruned, biases are not."""
    structure = rx.unstructured() if structure is None else structure
    return rx.make_plan(params, sparsity, distribution, rules=[(".*kernel", structure), (".*", None)])


def _loss(apply: Callable[[Any, Array], Array], params: Any, batch: Any) -> Array:
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, x), y).mean()


def make_fit(apply: Callable[[Any, Array], Array], algorithm: rx.Algorithm, images: Images) -> Fit:
    """Training with a method: `(params, masks, rates, batches, start, stop) -> Trained`, one program for all schedules.

    `rates` is float32[steps] and `batches` int32[steps, BATCH], both read from `start` up to `stop`. The optimizer
    starts anew.
    """

    @functools.partial(jax.jit, static_argnames="rewire")
    def advance(
        params: Any, state: Any, rates: Array, batches: Array, data: Images, start: Any, stop: Any, *, rewire: bool
    ) -> Any:
        def step(i: Array, now: Any) -> Any:
            params, state = now
            tx = rx.sparsify(optimizer(rates[i]), algorithm, key=jax.random.key(0))  # the state brings its own key
            grads = jax.grad(functools.partial(_loss, apply))(params, (data.x[batches[i]], data.y[batches[i]]))
            updates, state = tx.update(grads, state, params, rewire=rewire)
            return optax.apply_updates(params, updates), state

        return lax.fori_loop(start, stop, step, (params, state))

    def fit(params: Any, masks: Any, rates: Array, batches: Array, start: int, stop: int) -> rx.recipes.Trained:
        inner = optimizer(0.0)
        state: Any = rx.sparsify(inner, algorithm, key=jax.random.key(0)).init(params)
        params, state = rx.replace_masks(inner, state, params, masks)
        state = state._replace(step=jnp.asarray(start, jnp.int32))
        for rewire, first, last in segments(algorithm, stop):
            if last > start:
                params, state = advance(params, state, rates, batches, images, max(first, start), last, rewire=rewire)
        return rx.recipes.Trained(params, masks=state.masks)

    return fit


def trainer(bench: Bench, schedule: Any, batches: Array, fit: Fit | None = None) -> rx.recipes.Train:
    """A training function for recipes: a schedule over the steps that they give. It draws nothing from their key."""
    rates = jax.vmap(lambda step: jnp.asarray(schedule(step), jnp.float32))(jnp.arange(bench.steps))
    return lambda params, masks, start, stop, key: (fit or bench.fit)(params, masks, rates, batches, start, stop)


def train(
    bench: Bench, schedule: Any, batches: Array, params: Any, masks: Any, stop: int, *, start: int = 0,
    fit: Fit | None = None,
) -> rx.recipes.Trained:  # fmt: skip
    """One training outside of a recipe."""
    return trainer(bench, schedule, batches, fit)(params, masks, start, stop, jax.random.key(0))


def batches_of(bench: Bench, seed: int, *, again: bool = False) -> Array:
    """int32[steps, BATCH]: the order of images in the dense run of a seed, or in all that is trained after it."""
    return jnp.asarray(order(seed + 1000 * again, bench.steps, len(bench.data.train.y)))


def examples(bench: Bench, seed: int) -> tuple[Array, Array]:
    """The training images of a seed that criteria see."""
    rows = batches_of(bench, seed, again=True)[: EXAMPLES // BATCH].ravel()
    return bench.data.train.x[rows], bench.data.train.y[rows]


def full_masks(params: Any) -> Any:
    """Masks of a dense network."""
    return jax.tree.map(lambda p: jnp.ones(p.shape, bool) if p.ndim > 1 else None, params)


def train_dense(bench: Bench, seed: int) -> Dense:
    """The dense network of a seed, trained at its first use; the optimizer starts anew at step `REWIND_TO`."""
    if seed not in bench.dense:
        init = bench.init(jax.random.key(seed))
        masks, how = full_masks(init), (bench, bench.original, batches_of(bench, seed))
        early = train(*how, init, masks, REWIND_TO).params
        trained = train(*how, early, masks, bench.steps, start=REWIND_TO).params
        bench.dense[seed] = Dense(init, early, trained)
    return bench.dense[seed]


def _logits(apply: Callable[[Any, Array], Array], params: Any, images: Images) -> Array:
    parts = images.x.reshape(-1, 200, *images.x.shape[1:])  # larger parts do not fit into the cache
    return lax.map(functools.partial(apply, params), parts).reshape(len(images.y), -1)


@jax.jit
def quality(logits: Array, labels: Array) -> tuple[Array, Array, Array]:
    """Accuracy, mean cross-entropy and ECE. Logs of probabilities are logits, too."""
    right = jnp.mean(jnp.argmax(logits, -1) == labels)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return right, loss, rx.diagnostics.ece(jax.nn.softmax(logits), labels)


def measure(bench: Bench, members: Any) -> dict[str, list[float]]:
    """`[accuracy, cross-entropy, ECE]` on validation and test images, of params or of an ensemble of several."""
    found = {}
    for name in ("validation", "test"):
        images = getattr(bench.data, name)
        logits = [bench.logits(params, images) for params in (members if isinstance(members, list) else [members])]
        joined = logits[0] if len(logits) == 1 else jnp.log(jnp.mean(jax.nn.softmax(jnp.stack(logits)), axis=0))
        found[name] = [float(f"{float(value):.5g}") for value in quality(joined, images.y)]
    return found
