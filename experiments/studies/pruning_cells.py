"""The cells of the pruning study: one-shot criteria, lottery tickets, retraining schedules, ensembles."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import rigl_jax as rx
from experiments.studies import pruning_training as training
from experiments.studies.pruning_training import Bench, measure
from rigl_jax import recipes
from rigl_jax.recipes import retraining


class Criterion(NamedTuple):
    """A criterion of the study.

    Attributes:
      label: what tables call it.
      make: `bench -> criterion or surgeon`, once for all seeds and sparsities.
      scope: of the ranking.
      inputs: whether its batch is the images alone.
      structure: of the plan; None: single weights.
      rounds: of `rx.prune`.
      surgeon: whether it also moves the weights that stay.
    """

    label: str
    make: Callable[[Bench], Any]
    scope: str = "global"
    inputs: bool = False
    structure: Any = None
    rounds: int = 1
    surgeon: bool = False


_C = rx.criteria
CRITERIA: Mapping[str, Criterion] = {
    "magnitude_global": Criterion("Magnitude", lambda bench: _C.magnitude),
    "magnitude_layer": Criterion("Magnitude", lambda bench: _C.magnitude, "layer"),
    "random": Criterion("Random", lambda bench: _C.random(jax.random.key(0)), "layer"),
    "taylor": Criterion("Taylor FO", lambda bench: jax.jit(_C.taylor(bench.loss))),
    "taylor_2": Criterion("Taylor SO", lambda bench: jax.jit(_C.taylor(bench.loss, order=2))),
    "snip": Criterion("SNIP", lambda bench: jax.jit(_C.snip(bench.loss))),
    "grasp": Criterion("GraSP", lambda bench: jax.jit(_C.grasp(bench.loss))),
    "synflow": Criterion("SynFlow", lambda bench: _C.synflow(bench.apply), inputs=True, rounds=100),
    "singe": Criterion("SInGE", lambda bench: jax.jit(_C.singe(bench.loss))),
    "obd": Criterion("OBD, estimated", lambda bench: jax.jit(_C.obd(bench.loss, 64, jax.random.key(0)))),
    "fisher": Criterion("Fisher", lambda bench: jax.jit(_C.fisher(bench.loss))),
    "wanda": Criterion("Wanda", lambda bench: jax.jit(_C.wanda(bench.apply)), "layer", True, rx.fan_in()),
    "nnrelief": Criterion("NNrelief", lambda bench: jax.jit(_C.nnrelief(bench.apply)), "layer", True, rx.fan_in()),
    "sparsegpt": Criterion("SparseGPT", lambda bench: _C.sparsegpt(bench.apply), "layer", True, surgeon=True),
    "m_fac": Criterion("M-FAC", lambda bench: _C.m_fac(bench.loss, steps=4), "layer", surgeon=True),
}
ROUNDS = 5
"""Of iterative pruning, and levels of the lottery ticket."""
BIMP_ROUNDS = 3
DEEPEST = 0.98
"""The sparsity that the lottery ticket ends at."""
SCHEDULES = ("finetune", "rewind", "slr", "clr", "llr", "allr")


def prune(bench: Bench, name: str, sparsity: float, seed: int) -> rx.base.Pruned:
    """The dense network of a seed, pruned by a criterion of the table."""
    entry, params = CRITERIA[name], training.train_dense(bench, seed).trained
    plan = training.plan_of(params, sparsity, structure=entry.structure)
    images = training.examples(bench, seed)
    batch = images[0] if entry.inputs else images
    if name not in bench.made:
        bench.made[name] = entry.make(bench)
    how = bench.made[name]
    if entry.rounds == 1 and not entry.surgeon:  # the same scores at every sparsity
        if (name, seed) not in bench.made:
            bench.made[name, seed] = how(params, batch)
        scores = bench.made[name, seed]
        how = lambda params, batch: scores  # noqa: E731
    return rx.prune(plan, params, how, batch, scope=entry.scope, rounds=entry.rounds)


def schedule_of(bench: Bench, name: str, facts: recipes.Round) -> optax.Schedule:
    """The learning rate of a retraining by its name in `rx.recipes.retraining`."""
    options = {"norm_drop": facts.norm_drop, "fraction": facts.fraction} if name == "allr" else {}
    return getattr(retraining, name)(bench.original, bench.steps, facts.steps, **options)


def one_shot(bench: Bench, method: str, sparsity: float, steps: int, seed: int, schedule: str) -> dict[str, Any]:
    """Pruned at once by a criterion, then fine-tuned for so many steps."""
    start = training.train_dense(bench, seed).trained
    pruned = prune(bench, method, sparsity, seed)
    moved = 1 - sum(int(jnp.sum(mask)) for mask in jax.tree.leaves(pruned.masks)) / _n_kernels(start)
    facts = recipes.Round(1, steps, moved, moved, min(1.0, retraining.norm_drop(start, pruned.params)))
    how = bench, schedule_of(bench, schedule, facts), _again(bench, seed)
    after = training.train(*how, *pruned, steps).params
    return {"before": measure(bench, pruned.params), "after": measure(bench, after), **_kept(pruned.masks)}


def in_rounds(bench: Bench, lengths: list[int], sparsity: float, seed: int, schedule: str) -> dict[str, Any]:
    """Magnitude over all layers in rounds of equal shares, each retrained for so many steps."""
    rounds = len(lengths)
    start, batches = training.train_dense(bench, seed).trained, _again(bench, seed)
    plan_at = recipes.plan_towards(training.plan_of(start, sparsity), rounds)
    tickets = list(
        recipes.iterative_pruning(
            bench.fit, start, plan_at, rounds=rounds, steps=0, retrain_steps=lengths,
            key=jax.random.key(seed),
            retrain=lambda facts: training.trainer(bench, schedule_of(bench, schedule, facts), batches),
        )
    )  # fmt: skip
    return {"after": measure(bench, tickets[-1].params), **_kept(tickets[-1].masks)}


def lottery(bench: Bench, method: str, seed: int) -> dict[str, Any]:
    """Tickets of all levels; those that are rewound to step 0 with their three controls."""
    dense, batches = training.train_dense(bench, seed), training.batches_of(bench, seed)
    plan = training.plan_of(dense.init, DEEPEST)
    train = training.trainer(bench, bench.original, batches)
    start, early = {"rewind_0": (dense.init, 0)}.get(method, (dense.early, training.REWIND_TO))
    rewind = "learning_rate" if method == "learning_rate" else "weights"
    level_0 = recipes.Ticket(
        dense.trained, training.full_masks(dense.init), 0, 0.0, start if rewind == "weights" else None
    )
    levels = []
    for ticket in recipes.lottery_ticket(
        train, dense.init, recipes.plan_towards(plan, ROUNDS), levels=ROUNDS, steps=bench.steps,
        key=jax.random.key(seed), rewind_to=early, rewind=rewind, resume=level_0,
    ):  # fmt: skip
        level = {"sparsity": round(ticket.sparsity, 4), "ticket": measure(bench, ticket.params)}
        if method == "rewind_0":
            level |= _controls(bench, plan, train, dense.init, ticket, seed)
        levels.append(level)
    return {"levels": levels}


def _controls(bench: Bench, plan: Any, train: Any, init: Any, ticket: recipes.Ticket, seed: int) -> dict[str, Any]:
    key = jax.random.fold_in(jax.random.key(10_000 + seed), ticket.level)
    again, layer, everywhere = jax.random.split(key, 3)
    starts = {
        "reinit": (recipes.reinitialise(bench.init, ticket.masks, again), ticket.masks),
        "shuffled": (init, recipes.shuffle_masks(plan, ticket.masks, layer)),
        "random": (init, recipes.shuffle_masks(plan, ticket.masks, everywhere, scope="global")),
    }
    found = {}
    for name, (params, masks) in starts.items():
        trained = train(rx.apply_masks(params, masks), masks, 0, bench.steps, key)
        found[name] = measure(bench, trained.params)
    return found


class Dynamic(NamedTuple):
    """RigL at a sparsity, compiled: for a single run, whose exchanges fade out, and for EDST, where they go on."""

    plan: rx.base.Plan
    algorithm: rx.Algorithm
    single: training.Fit
    lasting: training.Fit
    grow: rx.base.Criterion


MEMBERS, CYCLES = 3, 3
PERIOD = 100


def make_dynamic(bench: Bench, sparsity: float) -> Dynamic:
    """Compiled programs of RigL with the Erdos-Renyi distribution."""
    plan = training.plan_of(jax.eval_shape(bench.init, jax.random.key(0)), sparsity, distribution=rx.erk)
    single = rx.rigl(plan, period=PERIOD, stop=int(0.75 * bench.steps), fraction=0.3)
    lasting = rx.rigl(plan, period=PERIOD, fraction=0.3)
    grow = jax.jit(lambda params, batch: jax.tree.map(jnp.abs, jax.grad(bench.loss)(params, batch)))
    first, second = (training.make_fit(bench.fast, algorithm, bench.data.train) for algorithm in (single, lasting))
    return Dynamic(plan, single, first, second, grow)


def dynamic(bench: Bench, rigl: Dynamic, method: str, seed: int) -> dict[str, Any]:
    """One run of RigL, an ensemble of one run, or a superposition of tickets: all of as many steps as the dense run."""
    init, batches = bench.init(jax.random.key(seed)), training.batches_of(bench, seed)
    masks = rx.topology.random_masks(rigl.plan, jax.random.key(seed), init)
    params, key, steps = rx.apply_masks(init, masks), jax.random.key(seed), bench.steps
    batch = training.examples(bench, seed)
    single = functools.partial(training.train, bench, bench.original, batches, params, masks, fit=rigl.single)
    if method == "rigl":
        return {"after": measure(bench, single(steps).params)}
    if method == "edst":
        refine = 2 * steps // 3 // MEMBERS
        explore = steps - MEMBERS * refine
        rates = recipes.edst_rates(optax.constant_schedule(bench.peak), explore, refine)
        train = training.trainer(bench, rates, batches, rigl.lasting)
        options = {"members": MEMBERS, "explore": explore, "refine": refine, "grow": rigl.grow, "batch": batch}
        tickets = list(recipes.edst(train, params, masks, rigl.plan, key=key, **options))
        overlap = rx.diagnostics.mask_overlap(tickets[0].masks, tickets[1].masks)
        members = [ticket.params for ticket in tickets]
        alone = [measure(bench, p) for p in members]
        return {"after": measure(bench, members), "members": alone, "overlap": round(float(overlap), 4)}
    start, cycle = steps - CYCLES * (steps // 10 // CYCLES), steps // 10 // CYCLES
    before = single(start)
    rates = retraining.triangular(0.001, 0.005, cycle)
    train = training.trainer(bench, lambda step: rates(step - start), batches)
    options = {"tickets": CYCLES, "start": start, "cycle": cycle, "key": key, "grow": rigl.grow, "batch": batch}
    found = {}
    for rule in ("caa", "cima"):
        *_, last = recipes.sup_tickets(train, before.params, before.masks, rigl.plan, rule=rule, **options)
        found[rule] = measure(bench, last.params)
    return {"after": found["caa"], "cima": found["cima"], "last_cycle": measure(bench, last.carry.params)}


def dense(bench: Bench, seed: int) -> dict[str, Any]:
    """The dense network that all others of the seed begin with."""
    return {"after": measure(bench, training.train_dense(bench, seed).trained)}


def dense_of_equal_flops(bench: Bench, rigl: Dynamic, method: str, seed: int) -> dict[str, Any]:
    """A dense network trained for as long as the FLOPs of the run of RigL last."""
    del method
    init, batches = bench.init(jax.random.key(seed)), training.batches_of(bench, seed)
    steps = round(bench.steps * cost_of(bench, rigl))
    schedule = optax.cosine_decay_schedule(bench.peak, steps)
    after = training.train(bench, schedule, batches, init, training.full_masks(init), steps).params
    return {"after": measure(bench, after), "steps": steps}


def cost_of(bench: Bench, rigl: Dynamic) -> float:
    """Training FLOPs of a step of RigL, dense = 1."""
    init = bench.init(jax.random.key(0))
    masks = rx.topology.random_masks(rigl.plan, jax.random.key(0), init)
    flops = rx.flops(bench.apply, init, jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32), masks=masks)
    return rx.training_cost(rigl.algorithm, flops.total, flops.dense_total, bench.steps) / (3 * flops.dense_total)


def _again(bench: Bench, seed: int) -> Any:
    return training.batches_of(bench, seed, again=True)


def _kept(masks: Any) -> dict[str, Any]:
    return {"weights": [int(np.sum(mask)) for mask in jax.tree.leaves(masks)]}


def _n_kernels(params: Any) -> int:
    return sum(p.size for p in jax.tree.leaves(params) if p.ndim > 1)
