"""MIMO and a deep ensemble on Fashion-MNIST, trained as the networks of the pruning study are.

Single networks, RigL and EDST are cells of that study, `experiments.studies.pruning`, whose records the page reads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import rigl_jax as rx
from experiments.models import MODELS as NETWORKS
from experiments.models.mimo import mimo, mimo_batch, mimo_loss, mimo_predict
from experiments.studies import pruning_cells as kinds
from experiments.studies import pruning_training as pruning
from experiments.studies.data_training import SEEDS
from experiments.studies.diagnostics_members import MEMBERS
from experiments.studies.method_training import Images, optimizer
from experiments.studies.pruning_training import MODELS, Bench

MODEL = "lenet_300_100"
SPARSITIES = (0.9, 0.95)
"""Of RigL and EDST in the pruning study."""


def deep(bench: Bench) -> dict[str, Any]:
    """Dense networks of `MEMBERS` seeds, their probabilities averaged; the first member has the seed of the cell."""
    found = []
    for seed in SEEDS:
        members = []
        for member in range(MEMBERS):
            own = seed + 100 * member
            start, batches = bench.init(jax.random.key(own)), pruning.batches_of(bench, own)
            masks = pruning.full_masks(start)
            members.append(pruning.train(bench, bench.original, batches, start, masks, bench.steps).params)
        found.append(pruning.measure(bench, members)["test"])
    return {"test": found}


def network(members: int) -> tuple[Callable[[Any, Array], Array], Callable[[Array], Any]]:
    """`(apply, init)` of a MIMO network: `apply(params, x [batch, members, 28, 28, 1])` gives the members' logits."""
    spec = MODELS[MODEL]
    module = NETWORKS[spec["network"]](10 * members, features=spec["features"])
    apply = mimo(lambda params, x: jnp.asarray(module.apply({"params": params}, x)), members)
    return apply, lambda key: module.init(key, jnp.zeros((1, 28, 28, members)))["params"]


def mimo_networks(bench: Bench, rho: float) -> dict[str, Any]:
    """MIMO networks of all seeds, each trained for as many steps, of as many images, as a single network."""
    apply, init = network(MEMBERS)
    train = jax.jit(functools.partial(_train, bench, apply, rho))
    measure = jax.jit(functools.partial(_measure, apply))
    found = []
    for seed in SEEDS:
        params = train(init(jax.random.key(seed)), pruning.batches_of(bench, seed), jax.random.key(seed))
        found.append([float(f"{float(value):.5g}") for value in measure(params, bench.data.test)])
    return {"test": found}


def _train(bench: Bench, apply: Any, rho: float, params: Any, batches: Array, key: Array) -> Any:
    images = bench.data.train

    def step(i: Array, now: Any) -> Any:
        params, state = now
        rows = batches[i]
        x, y = mimo_batch(jax.random.fold_in(key, i), images.x[rows], images.y[rows], MEMBERS, rho)
        grads = jax.grad(lambda params: mimo_loss(apply(params, x), y) / MEMBERS)(params)
        updates, state = optimizer(bench.original(i)).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return lax.fori_loop(0, bench.steps, step, (params, optimizer(0.0).init(params)))[0]


def _measure(apply: Any, params: Any, images: Images) -> tuple[Array, Array, Array]:
    parts = images.x.reshape(-1, 200, *images.x.shape[1:])
    logs = lax.map(lambda x: mimo_predict(apply, params, x, MEMBERS), parts)
    return pruning.quality(logs.reshape(len(images.y), -1), images.y)


def costs(bench: Bench) -> dict[str, dict[str, float]]:
    """Of each way: multiplications of the weights for an answer and for all of the training, single dense = 1."""
    one = jax.eval_shape(bench.init, jax.random.key(0))
    image = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
    single = rx.flops(bench.apply, one, image).total
    found = {"dense": (1.0, 1.0), "deep": (float(MEMBERS), float(MEMBERS))}
    apply, init = network(MEMBERS)
    inputs = jax.ShapeDtypeStruct((1, MEMBERS, *image.shape[1:]), jnp.float32)
    share = rx.flops(apply, jax.eval_shape(init, jax.random.key(0)), inputs).total / single
    found["mimo"] = (share, share)
    for sparsity in SPARSITIES:
        rigl = kinds.make_dynamic(bench, sparsity)
        params = bench.init(jax.random.key(0))
        masks = rx.topology.random_masks(rigl.plan, jax.random.key(0), params)
        share = rx.flops(bench.apply, params, image, masks=masks).total / single
        lasting = rx.rigl(rigl.plan, period=kinds.PERIOD, fraction=0.3)
        for name, algorithm, members in (("rigl", rigl.algorithm, 1), ("edst", lasting, kinds.MEMBERS)):
            trained = rx.training_cost(algorithm, share, 1.0, bench.steps) / 3
            found[f"{name}_{sparsity:g}"] = (members * share, trained)
    return {name: dict(zip(("answer", "training"), map(_short, pair), strict=True)) for name, pair in found.items()}


def _short(value: float) -> float:
    return float(np.round(value, 4))
