"""One run of the method table: a compiled loop for consecutive steps of one kind, the data set on the device."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import rigl_jax as rx
from experiments.data import idx
from experiments.models import WideResNet
from experiments.studies.method_networks import Apply, Fit, fitting, forward, params_of, variables

BATCH, VALIDATION = 128, 10_000
OPTIMIZER = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
LANGEVIN = {"l1": 1e-5, "noise": 1e-5}
"""DeepR's drift, and the standard deviation of its noise as a multiple of the learning rate, as in its MNIST script."""
Inner = Callable[[optax.Schedule], optax.GradientTransformation]


class Images(NamedTuple):
    """Standardised images `float32[N, 28, 28, 1]` and labels `int32[N]`."""

    x: Array
    y: Array


class Data(NamedTuple):
    """The three parts of the data set."""

    train: Images
    validation: Images
    test: Images


class State(NamedTuple):
    """The state of one run.

    Attributes:
      params: the weights, masked.
      opt_state: `rx.SparseState`, or the bare optax state of a dense run.
      explored: masks of the weights that were ever active; None for a dense run.
      born: masks of the weights that the last rewiring grew; None for a dense run.
      survival: float32[2]: how many grown weights the next rewiring kept, and how many were grown.
    """

    params: Any
    opt_state: Any
    explored: Any
    born: Any
    survival: Array


class Run(NamedTuple):
    """The compiled functions of a run.

    Attributes:
      steps: of the whole training.
      module: the network.
      algorithm: the method; None for a dense run.
      init: `seed -> state`.
      train: `(state, images, order, first, one past the last, rewire=bool) -> state`: steps of one kind.
      accuracy: `(params, images) -> share of right answers`.
      batch: images a step.
    """

    steps: int
    module: nn.Module
    algorithm: rx.Algorithm | None
    init: Callable[[Any], State]
    train: Callable[..., State]
    accuracy: Callable[[Any, Images], Any]
    batch: int = BATCH


def load(source: str | Path) -> Data:
    """Fashion-MNIST, standardised by mean and deviation of the training part.

    Raises:
      ValueError: the folder does not hold the four IDX files.
    """
    parts = idx.read_folder(source)
    (images, labels), test = parts["train"], parts["test"]
    split = len(images) - VALIDATION
    mean, std = images[:split].mean(), images[:split].std()

    def part(x: np.ndarray, y: np.ndarray) -> Images:
        return Images(jnp.asarray((x.astype(np.float32) - mean) / std), jnp.asarray(y, jnp.int32))

    return Data(part(images[:split], labels[:split]), part(images[split:], labels[split:]), part(*test))


def compile_run(
    module: nn.Module, algorithm: rx.Algorithm | None, steps: int, rate: float, *, noisy: bool = False,
    shape: tuple[int, ...] = (28, 28, 1), batch: int = BATCH, inner: Inner | None = None,
) -> Run:  # fmt: skip
    """The programs of a run: one for all seeds, and one each for ordinary and for rewiring steps.

    Args:
      module: the network.
      algorithm: the method; None trains dense.
      steps: of the whole training.
      rate: the peak of the learning rate, from which it falls by a cosine.
      noisy: adds DeepR's drift and noise.
      shape: of an input.
      batch: images a step.
      inner: the optimizer of a schedule; that of all studies by default.
    """
    schedule = optax.cosine_decay_schedule(rate, steps)
    transform = functools.partial(_transform, algorithm, schedule, inner or optimizer, noisy)
    step = functools.partial(_step, fitting(module), transform)
    init = jax.jit(functools.partial(_init, module, transform, shape))
    tests = forward(module)
    if isinstance(module, WideResNet):  # XLA on CPU takes about 20 times as long for a convolution inside of a loop
        one = jax.jit(step, static_argnames="rewire", donate_argnums=0)
        right = jax.jit(functools.partial(_right, tests))
        train, test = functools.partial(_one_by_one, one), functools.partial(_mean_of_parts, right)
        return Run(steps, module, algorithm, init, train, test, batch)
    looped = jax.jit(functools.partial(_looped, step), static_argnames="rewire", donate_argnums=0)
    return Run(steps, module, algorithm, init, looped, jax.jit(functools.partial(accuracy, tests)), batch)


def optimizer(rate: Any) -> optax.GradientTransformation:
    """SGD of all studies; `rate` is a number, which may be traced, or a schedule. Kernels decay, all else does not."""
    decay = optax.add_decayed_weights(OPTIMIZER["weight_decay"], mask=_kernels)
    return optax.chain(decay, optax.sgd(rate, momentum=OPTIMIZER["momentum"], nesterov=OPTIMIZER["nesterov"]))


def _kernels(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def _transform(
    algorithm: rx.Algorithm | None, rate: optax.Schedule, make: Inner, noisy: bool, key: Array
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a member of the ensemble of seeds; its key may be traced."""
    inner = make(rate)
    if noisy:
        heat = LANGEVIN["noise"] ** 2 / 2  # the noise has variance 2 rate temperature
        noise = rx.langevin(rate, l1=LANGEVIN["l1"], temperature=lambda count: heat * rate(count), key=key)
        inner = optax.chain(inner, optax.masked(noise, _kernels))
    return optax.with_extra_args_support(inner) if algorithm is None else rx.sparsify(inner, algorithm, key=key)


def _init(module: nn.Module, transform: Callable[..., Any], shape: tuple[int, ...], seed: Array) -> State:
    first, masks = jax.random.split(jax.random.key(seed))
    params = params_of(module.init(first, jnp.zeros((1, *shape))))
    opt_state = transform(masks).init(params)
    if not isinstance(opt_state, rx.SparseState):
        return State(params, opt_state, None, None, jnp.zeros(2))
    born = jax.tree.map(jnp.zeros_like, opt_state.masks)
    explored = jax.tree.map(jnp.copy, opt_state.masks)
    return State(rx.apply_masks(params, opt_state.masks), opt_state, explored, born, jnp.zeros(2))


def _step(
    fit: Fit, transform: Callable[..., Any], state: State, data: Images, order: Array, i: Any, *, rewire: bool
) -> State:
    """Step `i`; `order` is int32[steps, batch]."""
    tx, rows = transform(jax.random.key(0)), order[i]  # the key is in the state

    def loss(params: Any) -> tuple[Array, Any]:
        logits, moved = fit(params, data.x[rows])
        return optax.softmax_cross_entropy_with_integer_labels(logits, data.y[rows]).mean(), moved

    grads, moved = jax.grad(loss, has_aux=True)(state.params)
    extra = {} if state.explored is None else {"rewire": rewire}
    updates, opt_state = tx.update(grads, state.opt_state, state.params, **extra)
    params: Any = optax.apply_updates(state.params, updates)
    new = state._replace(params=params if moved is None else params | {"batch_stats": moved}, opt_state=opt_state)
    return _followed(state, new) if rewire else new


def _looped(step: Any, state: State, data: Images, order: Array, start: Any, stop: Any, *, rewire: bool) -> State:
    """The steps from `start` up to `stop`, all of one kind, in one compiled loop."""
    return lax.fori_loop(start, stop, lambda i, now: step(now, data, order, i, rewire=rewire), state)


def _one_by_one(step: Any, state: State, data: Images, order: Array, start: int, stop: int, *, rewire: bool) -> State:
    """The same without a loop in the program."""
    for i in range(start, stop):
        state = step(state, data, order, i, rewire=rewire)
    return state


def _followed(old: State, new: State) -> State:
    """Records the weights that a rewiring grew, and how many of those that the one before grew it kept."""
    before, after = old.opt_state.masks, new.opt_state.masks
    kept, born = (_total(tree) for tree in (jax.tree.map(jnp.logical_and, old.born, after), old.born))
    return new._replace(
        explored=jax.tree.map(jnp.logical_or, old.explored, after),
        born=jax.tree.map(lambda a, b: b & ~a, before, after),
        survival=old.survival + jnp.stack([kept, born]),
    )


def _total(masks: Any) -> Array:
    return sum((jnp.sum(mask, dtype=jnp.float32) for mask in jax.tree.leaves(masks)), jnp.float32(0))


PART = 1000
"""Images that are looked at together."""


def _right(apply: Apply, params: Any, part: Images) -> Array:
    return jnp.sum(jnp.argmax(apply(params, part.x), -1) == part.y)


def accuracy(apply: Apply, params: Any, images: Images) -> Array:
    """Share of right answers, float32 scalar."""
    parts = jax.tree.map(lambda x: x.reshape(-1, PART, *x.shape[1:]), images)
    return jnp.sum(lax.map(functools.partial(_right, apply, params), parts)) / images.y.size


def _mean_of_parts(right: Callable[..., Array], params: Any, images: Images) -> float:
    """The same without a loop in the program."""
    starts = range(0, len(images.y), PART)
    return sum(int(right(params, Images(images.x[i : i + PART], images.y[i : i + PART]))) for i in starts) / len(
        images.y
    )


def segments(algorithm: rx.Algorithm | None, steps: int) -> list[tuple[bool, int, int]]:
    """`(rewires, first, one past the last)` of the longest runs of steps of one kind."""
    due = [algorithm is not None and bool(algorithm.due(step)) for step in range(steps)]
    lengths = [(kind, len(list(group))) for kind, group in itertools.groupby(due)]
    ends = list(itertools.accumulate(length for _, length in lengths))
    return [(kind, end - length, end) for (kind, length), end in zip(lengths, ends, strict=True)]


def order(seed: int, steps: int, n_train: int, batch: int = BATCH) -> np.ndarray:
    """int32[steps, batch], which images make each batch: a new permutation each epoch, as `experiments.data` has it."""
    per_epoch = n_train // batch
    epochs = [np.random.default_rng([seed, epoch]).permutation(n_train) for epoch in range(-(-steps // per_epoch))]
    return np.concatenate([p[: per_epoch * batch].reshape(-1, batch) for p in epochs])[:steps].astype(np.int32)


def trained(run: Run, data: Data, seed: int) -> Any:
    """The params of a run at its end."""
    state, batches = run.init(seed), order(seed, run.steps, len(data.train.y), run.batch)
    for rewire, first, last in segments(run.algorithm, run.steps):
        state = run.train(state, data.train, batches, first, last, rewire=rewire)
    return state.params


def tune(
    settings: Sequence[dict[str, Any]], make: Callable[[dict[str, Any]], Run], data: Data, seeds: Sequence[int]
) -> tuple[Run, dict[str, Any], list[dict[str, Any]]]:
    """The run of the setting that is best on the validation part, that setting, and all with their mean accuracy."""
    runs, tried = [], []
    for setting in settings:
        run = make(setting)
        found = [run.accuracy(trained(run, data, seed), data.validation) for seed in seeds]
        runs.append(run)
        tried.append({**setting, "validation": round(float(np.mean(found)), 4)})
    best = int(np.argmax([entry["validation"] for entry in tried]))
    return runs[best], dict(settings[best]), tried


def measure(run: Run, data: Data, seed: int, begin: Callable[[State], State] = lambda state: state) -> dict[str, Any]:
    """Trains one seed to its end and returns the fields of its record; `begin` changes the first state."""
    return solve(run, data, seed, begin)[1]


def solve(
    run: Run, data: Data, seed: int, begin: Callable[[State], State] = lambda state: state
) -> tuple[State, dict[str, Any]]:
    """The state of one seed after its training, and the fields of its record; `begin` changes the first state."""
    state, batches = begin(run.init(seed)), order(seed, run.steps, len(data.train.y), run.batch)
    image = jax.ShapeDtypeStruct((1, *data.train.x.shape[1:]), jnp.float32)
    counted = rx.flops(lambda params, x: run.module.apply(variables(params), x), state.params, image)
    sizes = {name: p.size for name, p in rx.trees.named_leaves(state.params).items()}
    forward, costs = counted.total, []
    for rewire, first, last in segments(run.algorithm, run.steps):
        state = run.train(state, data.train, batches, first, last, rewire=rewire)
        if state.explored is not None:
            active = rx.trees.named_leaves(_counts(state.opt_state.masks))
            density = {name: int(n) / sizes[name] for name, n in active.items()}
            forward = counted._replace(density={**counted.density, **density}).total
        costs += [forward] * (last - first)
    found = {
        "seed": seed,
        "validation": round(float(run.accuracy(state.params, data.validation)), 4),
        "test": round(float(run.accuracy(state.params, data.test)), 4),
        "forward": forward,
        "training": 3 * forward
        if run.algorithm is None
        else rx.training_cost(run.algorithm, costs, counted.total, run.steps),
        "weights": sum(int(jnp.count_nonzero(p)) for p in jax.tree.leaves(state.params) if p.ndim > 1),
    }
    return state, found if state.explored is None else found | _topology(state)


_counts = jax.jit(functools.partial(jax.tree.map, jnp.count_nonzero))


def _topology(state: State) -> dict[str, Any]:
    """Facts about the masks: explored share, survival of grown weights, units that are cut off."""
    masks = {name: np.asarray(mask) for name, mask in rx.trees.named_leaves(state.opt_state.masks).items()}
    kept, grown = (float(value) for value in state.survival)
    size = sum(mask.size for mask in masks.values())
    return {
        "active": {name: int(mask.sum()) for name, mask in masks.items()},
        "explored": float(_total(state.explored)) / size,
        "survival": kept / grown if grown else None,
        "without_input": {
            name: int((~mask.any(axis=tuple(range(mask.ndim - 1)))).sum()) for name, mask in masks.items()
        },
        "unused_inputs": {name: int((~mask.any(axis=-1)).sum()) for name, mask in masks.items()},
    }
