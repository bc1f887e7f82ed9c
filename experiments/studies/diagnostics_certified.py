"""Certified accuracy of dense, pruned and sparsely trained networks, and of networks trained for stable ReLUs (NRS)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

import rigl_jax as rx
from experiments.studies import data_training as training
from experiments.studies import diagnostics_training as fitting
from experiments.studies.data_training import SEEDS, Params, Problem, rounded
from experiments.studies.diagnostics_training import Trained

RADII = (0.005, 0.01, 0.02, 0.05)
"""As shares of the range of pixels."""
EPS = 0.02
"""The radius of NRS and of certified training."""
RAMP = 0.5
"""The share of a training over which that radius grows from 0."""
TUNED = 0.5
"""Steps of fine-tuning, as a share of those of the dense training."""
STEPS = 10
"""Of the attack by projected gradients."""
EXAMPLES = 1000
"""Test images that are certified and attacked: the first ones, if there are more."""


class Method(NamedTuple):
    """How a network comes to be.

    Attributes:
      label: in tables; `{}` is the level.
      levels: sparsities, or weights of NRS in the loss.
      base: the networks that it is made of; None: new ones.
      nrs: weight of NRS in the loss, "level" for the cell's.
      certified: whether the loss is that of the worst case by IBP.
      prune: "weights" of the smallest magnitude, "units" of the smallest norm, "stability": the least stable units.
      rigl: whether RigL trains it at the level.
    """

    label: str
    levels: tuple[float, ...] = (0.0,)
    base: str | None = None
    nrs: Any = 0.0
    certified: bool = False
    prune: str | None = None
    rigl: bool = False


SPARSE, HALF = (0.8, 0.9, 0.95), (0.5,)
NRS = 0.1
"""The weight of NRS where it is combined with pruning."""
METHODS: Mapping[str, Method] = {
    "dense": Method("dense"),
    "longer": Method("dense, trained on as if it were pruned", base="dense"),
    "magnitude": Method("magnitude, {} % of the weights removed", SPARSE, "dense", prune="weights"),
    "rigl": Method("RigL at {} %", SPARSE, rigl=True),
    "units": Method("{} % of the units removed by norm", HALF, "dense", prune="units"),
    "stability": Method("{} % of the units removed by NRS", HALF, "dense", prune="stability"),
    "nrs": Method("dense, NRS with the weight {}", (0.01, 0.1, 1.0), nrs="level"),
    "nrs_magnitude": Method(f"NRS {NRS:g}, then magnitude, {{}} %", SPARSE, "nrs", nrs=NRS, prune="weights"),
    "nrs_rigl": Method(f"NRS {NRS:g}, RigL at {{}} %", (0.9,), nrs=NRS, rigl=True),
    "certified": Method("dense, certified training by IBP", certified=True),
    "certified_rigl": Method("certified training by IBP, RigL at {} %", (0.9,), certified=True, rigl=True),
}


class Bench:
    """Networks of a problem by method and level, trained at their first use."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.scale = float(problem.raw.max() / problem.raw.std())
        """The range of pixels in the unit of the standardised inputs."""
        self.made: dict[tuple[str, float], Trained] = {}
        self.facts = jax.jit(functools.partial(facts, scale=self.scale))
        losses = {
            "plain": fitting.cross_entropy,
            "nrs": functools.partial(_with_nrs, EPS * self.scale),
            "certified": functools.partial(_worst_case, EPS * self.scale),
        }
        self.fit = functools.cache(lambda name, algorithm: fitting.make_fit(problem, losses[name], algorithm))

    def network(self, name: str, level: float) -> Trained:
        """The networks of all seeds."""
        if (name, level) not in self.made:
            self.made[name, level] = self._train(METHODS[name], level)
        return self.made[name, level]

    def _train(self, method: Method, level: float) -> Trained:
        problem, algorithm = self.problem, None
        if method.rigl:
            algorithm = fitting.rigl(fitting.plan_of(problem, level), problem.steps)
        weight = level if method.nrs == "level" else method.nrs
        fit = self.fit("certified" if method.certified else "nrs" if weight else "plain", algorithm)
        if method.base is None:
            return fitting.train(fit, option=weight)
        start = self.network(method.base, NRS if method.base == "nrs" else 0.0)
        if method.prune == "weights":
            start = fitting.pruned(start, fitting.plan_of(problem, level))
        elif method.prune is not None:
            score = {"units": _norms, "stability": functools.partial(_stability, problem, EPS * self.scale)}
            remove = functools.partial(_without_units, score[method.prune], level)
            start = jax.jit(jax.vmap(remove))(start.params)
        return fitting.train(fit, start, steps=int(TUNED * problem.steps), option=weight, order=2)


def _bounds(eps: float, params: Params, x: Array, progress: Array) -> rx.diagnostics.Bounds:
    radius = eps * jnp.minimum(progress / RAMP, 1.0)
    return rx.diagnostics.interval_bounds(_logits, params, x - radius, x + radius)


def _with_nrs(eps: float, params: Params, x: Array, y: Array, progress: Array, weight: Array) -> Array:
    """Cross-entropy and weighted NRS on boxes that grow to eps."""
    return jnp.mean(training.losses(params, x, y)) + weight * rx.diagnostics.nrs(
        _bounds(eps, params, x, progress).relus
    )


def _worst_case(eps: float, params: Params, x: Array, y: Array, progress: Array, weight: Array) -> Array:
    """Half the cross-entropy, and half that of the worst logits on the box."""
    del weight
    low, high = _bounds(eps, params, x, progress).outputs
    worst = jnp.where(jax.nn.one_hot(y, low.shape[1], dtype=bool), low, high)
    worst = optax.softmax_cross_entropy_with_integer_labels(worst, y)
    return jnp.mean(training.losses(params, x, y) + worst) / 2


def _logits(params: Params, x: Array) -> Array:
    return training.apply(params, x)[0]


# --- units that are removed ------------------------------------------------------------------------------------------


def _hidden(params: Params) -> list[str]:
    return sorted(params)[:-1]


def _norms(params: Params) -> list[Array]:
    return [jnp.linalg.norm(params[name]["kernel"], axis=0) for name in _hidden(params)]


def _stability(problem: Problem, eps: float, params: Params) -> list[Array]:
    x = problem.train.x[:EXAMPLES]
    return [*rx.diagnostics.nrs_scores(rx.diagnostics.interval_bounds(_logits, params, x - eps, x + eps).relus)]


def _without_units(score: Any, share: float, params: Params) -> Trained:
    """The units with the lowest scores of each hidden layer are removed, with their weights in and out."""
    masks: Any = {name: {"kernel": jnp.ones(p["kernel"].shape, bool), "bias": None} for name, p in params.items()}
    names = sorted(params)
    for i, scores in enumerate(score(params)):
        removed = jnp.argsort(scores)[: int(share * len(scores))]
        masks[names[i]]["kernel"] = masks[names[i]]["kernel"].at[:, removed].set(False)
        masks[names[i + 1]]["kernel"] = masks[names[i + 1]]["kernel"].at[removed].set(False)
    return Trained(rx.apply_masks(params, masks), masks)


# --- what is measured ------------------------------------------------------------------------------------------------


def facts(params: Params, images: training.Images, scale: float) -> dict[str, Any]:
    """Accuracy of one network, and for each radius: certified, attacked, the shares of unstable and dead ReLUs."""
    x, y = images.x[:EXAMPLES], images.y[:EXAMPLES]

    def at(radius: float) -> dict[str, Array]:
        eps = radius * scale
        relus = rx.diagnostics.interval_bounds(_logits, params, x - eps, x + eps).relus
        low, high = (jnp.concatenate([part.ravel() for part in parts]) for parts in zip(*relus, strict=True))
        return {
            "certified": rx.diagnostics.certified_accuracy(_logits, params, x, y, eps),
            "attacked": attacked(params, x, y, eps),
            "unstable": jnp.mean((low < 0) & (high > 0)),
            "dead": jnp.mean(high <= 0),
        }

    return {"test": training.accuracy(params, images), "radii": {f"{radius:g}": at(radius) for radius in RADII}}


def attacked(params: Params, x: Array, y: Array, eps: float) -> Array:
    """Accuracy on inputs that projected gradient ascent has moved by up to eps in each pixel, from where they are."""
    slope = jax.grad(lambda moved: jnp.sum(training.losses(params, moved, y)))
    climb = lambda i, moved: jnp.clip(moved + eps / 4 * jnp.sign(slope(moved)), x - eps, x + eps)  # noqa: E731
    return training.accuracy(params, training.Images(lax.fori_loop(0, STEPS, climb, x), y))


def run(bench: Bench, name: str, level: float) -> dict[str, Any]:
    """The facts of a cell, a number a seed."""
    params = bench.network(name, level).params
    found = [bench.facts(training.take(params, i), bench.problem.test) for i in range(len(SEEDS))]
    return jax.tree.map(lambda *values: rounded(values), *found)
