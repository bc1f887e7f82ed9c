"""Every argument of every public function: a wrong kind of value gets one line that names the argument.

A row is a call that works. Each of its arguments is replaced in turn by values of other kinds. What is then not refused
must be listed in `MAY`, with the reason; so a new function or argument is checked as soon as it is public.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rigl_jax as rx
from rigl_jax import arguments, channels, coreset, costs, diagnostics, execution, landscape, recipes, topology, tracing
from rigl_jax.algorithms.itop import ItopState
from rigl_jax.algorithms.top_kast import TopKastState
from rigl_jax.base import Axes
from rigl_jax.execution import kernels
from rigl_jax.tracing import flops
from tests.errors import check, names, refused

MODULES = {
    "": rx,
    "topology.": topology,
    "channels.": channels,
    "execution.": execution,
    "kernels.": kernels,
    "landscape.": landscape,
    "flops.": flops,
    "costs.": costs,
    "tracing.": tracing,
    "coreset.": coreset,
    "diagnostics.": diagnostics,
    "recipes.": recipes,
    "retraining.": recipes.retraining,
}
F = np.float32
KEY = jax.random.key(0)
PARAMS = {"w": np.ones((4, 4), F)}
MASKS = {"w": np.eye(4, dtype=bool)}
SHAPES = {"w": (4, 4)}
PLAN = rx.make_plan(PARAMS, 0.5)
AXES = Axes((0,), (1,))
U = rx.unstructured()
SGD = optax.sgd(0.1)
STATIC = rx.static(PLAN)
X = np.ones((2, 4), F)
PACKED = rx.pack(PARAMS, MASKS)
AT = kernels.make_pattern(MASKS["w"])
KERNEL = kernels.make_pattern(np.ones((2, 2, 2, 1), bool))
ONES = np.ones((4, 4), F)
STATE = jax.eval_shape(rx.sparsify(SGD, STATIC, key=KEY).init, PARAMS)
TRAINED = rx.packed_training(SGD, STATIC, key=KEY).init(PARAMS)[1]
FACTORS = {"w": execution.Factors(ONES, ONES)}
COST = flops.flops(lambda p, x: x @ p["w"], PARAMS, X)


def product(params, x):
    return x @ params["w"]


GROUPS = channels.groups(product, PARAMS, X)


def loss(params):
    return jnp.sum(params["w"] ** 2)


def squares(params, batch):
    return jnp.sum(product(params, batch) ** 2)


def trained(params, masks, start, stop, key):
    return recipes.Trained(rx.apply_masks(params, masks))


def weights(key):
    return PARAMS


def fit(inputs, labels, key):
    return lambda new: np.ones((len(new), 2), F) / 2


def call(**given):
    return given


RATE = optax.constant_schedule(0.1)
ROW = np.ones(4, F)
RELUS = diagnostics.interval_bounds(lambda p, x: jax.nn.relu(product(p, x)), PARAMS, X, X).relus
PROBS, LABELS = np.full((3, 2), 0.5, F), np.array([0, 1, 1])
IMAGE = np.ones((1, 2, 2, 2), F)
HALF = {"w": np.arange(16).reshape(4, 4) < 8}
PLAN_AT = recipes.plan_by_rate(PLAN)
MESH = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
CALLS = {
    # structures, distributions, plans
    "unstructured": {"axes": AXES},
    "fan_in": {"axes": AXES},
    "block": {"height": 2, "width": 2, "axes": AXES, "fan_in": True},
    "channel": {"axis": -1, "axes": AXES},
    "n_of_m": {"n": 2, "m": 4, "axis": -2, "axes": AXES},
    "proportional": {"numbers": {"w": 1.0}},
    "make_plan": call(
        params=PARAMS,
        sparsity=0.5,
        distribution=rx.erk,
        rules=[("w", U)],
        sparsities={"w": 0.5},
        count_fixed=True,
        rounding=int,
        axes=None,
        apply=product,
        inputs=(X,),
    ),
    "describe": {"plan": PLAN, "params": PARAMS, "apply": product, "inputs": (X,)},
    "uniform": {"shapes": SHAPES, "sparsity": 0.5},
    "erk": {"shapes": SHAPES, "sparsity": 0.5, "power": 1.0},
    "erdos_renyi": {"shapes": SHAPES, "sparsity": 0.5},
    # masks
    "apply_masks": {"params": PARAMS, "masks": MASKS},
    "check_masked": {"params": rx.apply_masks(PARAMS, MASKS), "masks": MASKS, "plan": rx.make_plan(PARAMS, 0.75)},
    "straight_through": {"params": PARAMS, "masks": MASKS},
    "sparsity": {"tree": MASKS},
    "rescale_init": {"params": PARAMS, "masks": MASKS, "axis": -1, "plan": None},
    "replace_masks": call(inner=SGD, state=rx.sparsify(SGD, STATIC, key=KEY).init(PARAMS), params=PARAMS, masks=MASKS),
    "metrics": {"state": MASKS, "previous": MASKS, "plan": PLAN, "explored": MASKS},
    "roles": {"params": PARAMS, "apply": product, "inputs": (X,)},
    # training
    "exploration_penalty": {"params": PARAMS, "state": TopKastState(MASKS, MASKS), "scale": 0.1},
    "explored": {"state": ItopState(MASKS, MASKS)},
    "sparsify": {"inner": SGD, "algorithm": STATIC, "key": KEY},
    "accumulate_growth": {"algorithm": rx.rigl(PLAN), "n": 2},
    "with_masters": {"inner": SGD, "dtype": jnp.float32},
    "m_fac_optimizer": {"learning_rate": 0.1, "m": 4, "damping": 1e-3, "b1": 0.9, "weight_decay": 0.1, "masks": MASKS},
    "per_weight_adam": call(learning_rate=0.1, b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1, warmup=2),
    "langevin": {"learning_rate": 0.1, "l1": 0.1, "temperature": 0.1, "key": KEY},
    "sparse_average": {"average": PARAMS, "params": PARAMS, "masks": MASKS, "decay": 0.9},
    # selection
    "topology.select": {"scores": ONES, "k": 2, "axes": (0,), "among": MASKS["w"]},
    "topology.select_jointly": {"scores": [ONES], "k": 2, "among": [MASKS["w"]]},
    "topology.redistribute": {"amount": 3, "weights": np.ones(2, F), "room": np.array([2, 2], np.int32)},
    "topology.prune": {"structure": U, "scores": ONES, "n_active": 2, "among": MASKS["w"]},
    "topology.rewire": call(
        structure=U, mask=MASKS["w"], drop=ONES, grow=ONES, n_drop=2, n_active=4, regrow_dropped=True
    ),
    "topology.count": {"fraction": 0.5, "n": 4},
    "topology.random_masks": {"plan": PLAN, "key": KEY, "params": PARAMS},
    "topology.prune_tree": {"plan": PLAN, "scores": PARAMS},
    "topology.prune_jointly": {"plan": PLAN, "scores": PARAMS, "n_active": 3, "min_active": 1, "among": MASKS},
    "topology.drop_and_grow": call(plan=PLAN, masks=MASKS, drop=PARAMS, grow=PARAMS, fraction=0.5, regrow_dropped=True),
    "topology.rewire_tree": call(
        plan=PLAN,
        masks=MASKS,
        drop=PARAMS,
        grow=PARAMS,
        n_drop={"w": 1},
        n_active={"w": 4},
        regrow_dropped=True,
        before=MASKS,
        together=False,
    ),
    "topology.check_fit": {"plan": PLAN, "params": PARAMS},
    # pruning
    "prune": call(
        plan=PLAN,
        params=PARAMS,
        criterion=rx.criteria.magnitude,
        batch=X,
        scope="layer",
        masks={"w": np.ones((4, 4), bool)},
        rounds=2,
        min_active=1,
    ),
    # packed weights
    "pack": {"params": PARAMS, "masks": MASKS, "choose": None, "plan": PLAN},  # one of the two, or none
    "unpack": {"packed": PACKED},
    "run_packed": {"apply": product, "batch": NamedSharding(MESH, PartitionSpec("data"))},
    "packed_training": call(
        inner=SGD,
        algorithm=STATIC,
        key=KEY,
        choose=lambda name, mask: None,
        sharding=NamedSharding(MESH, PartitionSpec()),
    ),
    "execution.best_pattern": {"name": "w", "mask": MASKS["w"]},
    "execution.masks_of": {"packed": PACKED},
    "execution.nbytes": {"tree": PARAMS},
    "execution.compact": {"apply": product, "params": PARAMS, "masks": MASKS, "inputs": X},
    "execution.explain": {"packed": rx.pack({}, {}), "batch": 1, "image": 1, "repeats": 1},
    "execution.fastest": {"plan": PLAN, "batch": 1, "image": 1, "repeats": 1},
    "execution.gradient_factors": {"loss": product},
    "execution.random_pattern": {"key": KEY, "shape": (4, 4), "n_active": 3},
    "execution.rewire_streamed": call(inner=SGD, gradients=FACTORS, state=TRAINED, packed=PACKED, share=0.0, block=8),
    # kernels
    "kernels.check": {"who": "me", "at": AT, "content": False},
    "kernels.make_pattern": {"mask": MASKS["w"], "height": 1, "block": 2, "block_t": 2, "capacity": 9},
    "kernels.make_pattern_at": call(entries=np.array([0, 5]), shape=(4, 4), height=1, block=2, block_t=2, capacity=9),
    "kernels.make_stacked": {"mask": MASKS["w"][None], "like": AT, "capacity": 9},
    "kernels.make_slabs": call(mask=MASKS["w"], like=AT, slabs=2, over="model", capacity=9),
    "kernels.make_block_pattern": {"mask": np.ones((4, 4), bool), "tile": (2, 2), "capacity": 5},
    "kernels.make_nm_pattern": {"mask": np.ones((4, 4), bool), "n": 2, "m": 2, "width": 1},
    "kernels.as_matrix": {"shape": (2, 2, 2), "split": 1},
    "kernels.squarest_split": {"shape": (2, 2, 2)},
    "kernels.coordinates": {"pattern": AT},
    "kernels.gather": {"dense": ONES, "at": AT},
    "kernels.scatter": {"values": np.ones(4, F), "at": AT},
    "kernels.rebuild": {"at": AT, "mask": MASKS["w"], "capacity": 9},
    "kernels.count": {"at": AT},
    "kernels.capacity": {"at": AT},
    "kernels.clear_padding": {"values": np.ones(4, F), "at": AT},
    "kernels.matmul": {"x": X, "values": np.ones(4, F), "at": AT, "transpose": False, "level": "auto"},
    "kernels.conv": call(
        x=np.ones((1, 4, 4, 2), F),
        values=np.ones(8, F),
        pattern=KERNEL,
        strides=(1, 1),
        padding="SAME",
        dilation=(1, 1),
        groups=1,
        level="auto",
    ),
    # costs and paths
    "channels.groups": {"apply": product, "params": PARAMS, "inputs": X, "ignore": "w"},
    "channels.scores": call(groups=GROUPS, params=PARAMS, criterion=rx.criteria.magnitude, batch=None, reduce="sum"),
    "channels.select": call(
        groups=GROUPS,
        scores=[ONES[0]] * len(GROUPS),
        remove=0.5,
        macs=None,
        parameters=None,
        latency=None,
        measure=None,
        scope="layer",
        normalize="max",
        round_to=2,
    ),
    "channels.slimming": {"strength": 0.1, "leaves": "w"},
    "channels.soft_threshold": {"params": PARAMS, "amount": 0.1, "leaves": "w"},
    "channels.only": {"leaves": "w"},
    "channels.taylor_2016": {"loss": loss, "square": True, "normalize": True},
    "channels.taylor_2019": {"loss": loss, "second": "rows", "size": 2},
    "channels.singe": {"loss": loss, "steps": 2, "mu": 0.5, "signed": True, "each": True},
    "channels.ema": {"before": [ONES[0]], "scores": [ONES[0]], "decay": 0.5},
    "channels.sosp_h": {"loss": loss},
    "channels.sosp_i": {"apply": product, "loss": loss, "pairwise_abs": True},
    "channels.nisp": {"apply": product, "final": ONES[0]},
    "channels.inf_fs": {"responses": ONES, "alpha": 0.5, "r": 0.5},
    "channels.mass_targets": {"responses": ONES, "mass": 0.5},
    "channels.ftwt": {"layer": product, "mass": 0.5, "softmax": True},
    "channels.nrs": {"apply": product, "eps": 0.01, "p": 2.0, "scales": "scale$"},
    "channels.i_spasp": {"apply": product, "keep": 0.5, "steps": 2},
    "channels.effective_rank": {"loss": loss, "energy": 0.5},
    "channels.mutual_information": {"apply": product, "key": KEY, "samples": 8, "bins": 4},
    "channels.random": {"key": KEY},
    "channels.shrink": {"apply": product, "params": PARAMS, "keep": {}, "inputs": X, "fold": True, "repeats": 1},
    "channels.iterative_shrinking": call(
        make_train=lambda apply: trained,
        apply=product,
        params=PARAMS,
        prune=lambda apply, params, level: {},
        inputs=X,
        levels=1,
        steps=1,
        key=KEY,
        resume=None,
    ),
    "channels.latency": {"apply": product, "params": PARAMS, "inputs": X, "repeats": 1},
    "tracing.capture": call(apply=product, params=PARAMS, inputs=X, leaves=["w"], add={"w": [np.zeros((2, 4), F)]}),
    "tracing.to_matrix": {"weight": ONES, "axes": AXES},
    "tracing.from_matrix": {"matrix": ONES, "axes": AXES, "shape": (4, 4)},
    "flops": {"apply": product, "params": PARAMS, "inputs": X, "masks": MASKS, "while_trips": 1},
    "training_cost": {"algorithm": STATIC, "sparse": 0.5, "dense": 1.0, "steps": 3},
    "micronet_flops": {"counted": COST},
    "micronet_bits": {"shapes": SHAPES, "density": {"w": 0.5}},
    "landscape.bezier": {"points": [PARAMS, PARAMS], "t": 0.5},
    "landscape.path_losses": {"loss": loss, "points": [PARAMS, PARAMS], "ts": [0.5]},
    "landscape.interpolate": {"loss": loss, "a": PARAMS, "b": PARAMS, "ts": [0.5]},
    "landscape.barrier": {"losses": np.ones(3, F)},
    "landscape.bezier_path": call(
        loss=loss, a=PARAMS, b=PARAMS, masks=MASKS, steps=1, key=KEY, degree=2, optimizer=SGD
    ),
    "diagnostics.accuracy_information": {"accuracy": 0.9, "share": 0.5},
    "diagnostics.agn": {"key": KEY, "y": ONES, "sigma": 0.5},
    "diagnostics.biased_edges": {"kernel": ONES, "bias": ROW, "accuracy": ROW},
    "diagnostics.dead_rate": {"activations": ONES},
    "diagnostics.error_std": {"error_map": ONES, "p_x": ROW / 4, "p_w": ROW / 4, "fan_in": 3},
    "diagnostics.gradient_ranks": {"loss": squares, "params": PARAMS, "batch": X, "energy": 0.9, "leaves": ["w"]},
    "diagnostics.noise_tolerance": call(
        loss=squares,
        params=PARAMS,
        batch=X,
        key=KEY,
        weight=0.3,
        largest=1.0,
        start=0.1,
        learning_rate=0.01,
        steps=1,
        leaves=["w"],
    ),
    "diagnostics.brier": {"probs": PROBS, "labels": LABELS},
    "diagnostics.certified_accuracy": call(apply=product, params=PARAMS, inputs=X, labels=LABELS[:2], eps=0.1),
    "diagnostics.copula_normalise": {"x": ONES},
    "diagnostics.dead_units": {"relus": RELUS},
    "diagnostics.effective_rank": {"matrix": ONES, "energy": 0.9},
    "diagnostics.interval_bounds": {"apply": product, "params": PARAMS, "low": X, "high": X},
    "diagnostics.m_flow": {"information": {(0,): 1.0}, "n": 1},
    "diagnostics.mutual_information": {"x": ROW, "y": ROW, "bins": 3},
    "diagnostics.nrs": {"relus": RELUS, "gammas": [1.0], "p": 2.0},
    "diagnostics.nrs_scores": {"relus": RELUS, "gammas": [1.0], "p": 2.0},
    "diagnostics.o_information": {"cov": np.eye(4), "n_samples": 9},
    "diagnostics.compression": {"params": PARAMS, "masks": MASKS},
    "diagnostics.corrupt": {"key": KEY, "images": IMAGE, "name": "contrast", "severity": 3},
    "diagnostics.corrupted_accuracy": call(
        apply=lambda x: jnp.sum(x, (1, 2)),
        images=IMAGE,
        labels=np.zeros(1, int),
        key=KEY,
        names=["contrast"],
        severities=[1],
    ),
    "diagnostics.curve": {"run": lambda p, s: {"a": 1.0}, "at": (1, 2, 3, 4, 5), "seeds": (0, 1, 2)},
    "diagnostics.density_for": {"compression": 1.5, "prunable": 3, "total": 4},
    "diagnostics.disagreement": {"a": PROBS, "b": PROBS},
    "diagnostics.ece": {"probs": PROBS, "labels": LABELS, "bins": 3},
    "diagnostics.mask_overlap": {"a": MASKS, "b": MASKS},
    "diagnostics.nll": {"probs": PROBS, "labels": LABELS},
    "diagnostics.speedup": {"cost": COST},
    # recipes; their training is not called
    "recipes.class_parts": {"labels": LABELS, "n": 2},
    "recipes.colt": call(
        trains=[trained],
        params=PARAMS,
        plan=PLAN,
        rounds=2,
        steps=3,
        key=KEY,
        rate=0.2,
        criterion=rx.criteria.magnitude,
        batch=None,
        scope="layer",
        resume=None,
    ),
    "recipes.edst": call(
        train=trained,
        params=PARAMS,
        masks=HALF,
        plan=PLAN,
        members=2,
        explore=3,
        refine=3,
        key=KEY,
        fraction=0.5,
        grow=rx.criteria.magnitude,
        batch=None,
        resume=None,
    ),
    "recipes.edst_rates": {"explore": RATE, "steps": 3, "refine": 4, "high": 0.1, "low": 0.1},
    "recipes.ensemble": {"apply": product, "tickets": [recipes.Trained(PARAMS)]},
    "recipes.escape": call(
        plan=PLAN, params=PARAMS, masks=HALF, key=KEY, fraction=0.5, grow=rx.criteria.magnitude, batch=None
    ),
    "recipes.free_tickets": call(train=trained, init=weights, plan=PLAN, members=2, steps=3, key=KEY, resume=None),
    "recipes.iterative_pruning": call(
        train=trained,
        params=PARAMS,
        plan_at=PLAN_AT,
        rounds=2,
        steps=3,
        retrain_steps=3,
        key=KEY,
        retrain=RATE,
        criterion=rx.criteria.magnitude,
        batch=None,
        scope="layer",
        min_active=1,
        reestimate=RATE,
        resume=None,
    ),
    "recipes.lottery_ticket": call(
        train=trained,
        params=PARAMS,
        plan_at=PLAN_AT,
        levels=2,
        steps=3,
        key=KEY,
        rewind_to=1,
        rewind="weights",
        criterion=rx.criteria.magnitude,
        batch=None,
        scope="layer",
        min_active=1,
        resume=None,
    ),
    "coreset.adaptive_bins": {"key": KEY, "predicted": ROW, "k": 3, "bins": 2, "alpha": 1.0, "floor": 0.1},
    "coreset.badge": {"key": KEY, "probs": PROBS, "embeddings": PROBS, "k": 2},
    "coreset.balanced": {"distance": PROBS, "k": 2},
    "coreset.bald": {"probs": PROBS[None]},
    "coreset.boundary_distance": {"embeddings": ONES, "kernel": ONES, "bias": ROW},
    "coreset.complexity_gap": {"x": ONES, "y": np.array([1, -1, 1, 1]), "jitter": 0.1},
    "coreset.complexity_gap_per_class": call(x=ONES, labels=np.array([0, 1, 0, 1]), key=KEY, repeats=1, jitter=0.1),
    "coreset.confident": {"scores": ONES, "threshold": 0.5},
    "coreset.dynamic_pruning": call(n=4, keep=2, rule="ucb", epsilon=0.5, c=1.0, rate=0.1),
    "coreset.el2n": {"logits": PROBS, "labels": LABELS},
    "coreset.entropy": {"probs": PROBS},
    "coreset.forgetting": {"n": 4},
    "coreset.grand": {"loss": lambda params, x: jnp.sum(x @ params["w"]), "params": PARAMS, "batch": X, "chunk": 2},
    "coreset.horvitz_thompson": {"values": ROW, "inclusion": ROW, "n": 4},
    "coreset.k_center": {"embeddings": ONES, "k": 2, "labelled": np.array([True, False, False, False])},
    "coreset.k_means": {"key": KEY, "embeddings": ONES, "k": 2, "iterations": 1},
    "coreset.kmeans_pp": {"key": KEY, "embeddings": ONES, "k": 2},
    "coreset.least_confidence": {"probs": PROBS},
    "coreset.margin": {"probs": PROBS},
    "coreset.mean_std": {"probs": PROBS[None]},
    "coreset.pseudo_labels": {"probs": PROBS[None], "threshold": 0.5},
    "coreset.self_training": call(
        fit=fit, inputs=ONES, labels=np.array([0, 1, 0, 1]), unlabelled=X, key=KEY, teachers=1, threshold=0.5
    ),
    "coreset.top": {"scores": ROW, "k": 2, "offset": 1},
    "coreset.variation_ratio": {"probs": PROBS[None]},
    "recipes.plan_by_rate": {"plan": PLAN, "rate": 0.5},
    "recipes.plan_towards": {"plan": PLAN, "rounds": 2},
    "recipes.reinitialise": {"init": weights, "masks": MASKS, "key": KEY},
    "recipes.scratch_control": call(
        train_for=lambda steps: trained,
        init=lambda key: PARAMS,
        masks=MASKS,
        steps=3,
        key=KEY,
        costs=(2.0, 1.0),
        cap=2,
        rescale=False,
    ),
    "recipes.scratch_steps": {"steps": 3, "dense": 1.2, "pruned": 1.0, "cap": 2},
    "recipes.shuffle_masks": {"plan": PLAN, "masks": MASKS, "key": KEY, "scope": "layer"},
    "recipes.sup_tickets": call(
        train=trained,
        params=PARAMS,
        masks=HALF,
        plan=PLAN,
        tickets=2,
        start=3,
        cycle=3,
        key=KEY,
        fraction=0.5,
        rule="caa",
        beta=0.5,
        scope="layer",
        grow=rx.criteria.magnitude,
        batch=None,
        reestimate=RATE,
        resume=None,
    ),
    "recipes.superpose": {"average": PARAMS, "new": PARAMS, "n": 1, "rule": "caa", "beta": 0.5},
    "retraining.allr": {"original": RATE, "steps": 9, "retrain_steps": 3, "norm_drop": 0.5, "fraction": 0.5},
    "retraining.bimp": call(original=RATE, steps=9, budget=4, rounds=2, level=1, norm_drop=0.5, fraction=0.5),
    "retraining.clr": {"original": RATE, "steps": 9, "retrain_steps": 3, "warmup": 0},
    "retraining.finetune": {"original": RATE, "steps": 9, "retrain_steps": 3, "warmup": 0},
    "retraining.llr": {"original": RATE, "steps": 9, "retrain_steps": 3},
    "retraining.norm_drop": {"before": PARAMS, "after": PARAMS},
    "retraining.rewind": {"original": RATE, "steps": 9, "retrain_steps": 3},
    "retraining.silo": call(level=2, eps=0.1, alpha=0.1, warmup=3, drops=(4,), rate=0.2, beta=5.0),
    "retraining.silo_max_lr": {"pruned": 0.5, "eps": 0.1, "alpha": 0.1, "beta": 5.0},
    "retraining.slr": {"original": RATE, "steps": 9, "retrain_steps": 3, "warmup": 0},
    "retraining.split": {"budget": 4, "rounds": 2},
    "retraining.triangular": {"low": 0.1, "high": 0.2, "period": 4},
}


def public():
    """`{name: function}` of the modules, each under the first name that it is found by."""
    found = {}
    for prefix, module in MODULES.items():
        own = [n for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__ and n[0] != "_"]
        for name in getattr(module, "__all__", own):
            value = getattr(module, name)
            if inspect.isfunction(value) and value not in found.values():
                found[prefix + name] = value
    return found


PUBLIC = public()
ELSEWHERE = {
    "execution.backends": "takes no arguments",
    **dict.fromkeys(
        (
            "topology.sound",
            "topology.rewire_in_turn",
            "topology.hold",
            "topology.full_masks",
            "topology.ranking",
            "topology.count_groups",
            "topology.prune_together",
            "topology.rewire_ablating",
        ),
        "what methods share; they check their own arguments",
    ),
    **{make.__name__: "test_bad_input tries every option" for make in rx.ALGORITHMS.values()},
    "rigl_inverted": "its options are those of rigl",
    **dict.fromkeys(("execution.save_safetensors", "execution.load_safetensors"), "test_export: of files"),
    "execution.export_onnx": "needs jax2onnx",
    "diagnostics.individual_fairness": "test_sensitivity: needs z3",
    "flops.charge": "for rules of primitives; its arguments are those of the interpreter",
}
WRONG = {
    "None": None,
    "a word": "word",
    "an object": object(),
    "negative": -1,
    "rank 6": np.ones((1,) * 6, F),
    "a dict": {},
    "a fraction": 1.5,
}
ANY, FRACTION, SIGNED = tuple(WRONG), ("a fraction",), ("negative", "a fraction")
TREES = ("None", "rank 6", "a dict")
ALLOWED = {
    # what a model makes of its inputs or params is the model's own affair, and what a criterion makes of its batch
    ANY: """diagnostics.gradient_ranks batch, diagnostics.noise_tolerance batch,
        diagnostics.certified_accuracy params, diagnostics.interval_bounds params, channels.scores batch,
        recipes.colt batch, recipes.edst batch, recipes.escape batch, recipes.iterative_pruning batch,
        recipes.lottery_ticket batch, recipes.sup_tickets batch, execution.compact inputs, channels.groups inputs,
        channels.iterative_shrinking inputs, channels.latency inputs, channels.shrink inputs, flops inputs,
        tracing.capture inputs, prune batch, execution.best_pattern name""",  # the last is for every `choose` to read
    # numbers above 1 are fine
    FRACTION: """diagnostics.noise_tolerance weight, diagnostics.noise_tolerance largest,
        diagnostics.noise_tolerance start, diagnostics.noise_tolerance learning_rate,
        diagnostics.certified_accuracy eps, channels.nrs p, channels.nrs eps,
        coreset.adaptive_bins alpha, coreset.complexity_gap jitter,
        coreset.dynamic_pruning c, coreset.complexity_gap_per_class jitter, channels.slimming strength,
        channels.soft_threshold amount, retraining.silo eps, retraining.silo alpha, retraining.silo beta,
        retraining.silo_max_lr eps, retraining.silo_max_lr alpha, retraining.silo_max_lr beta,
        retraining.triangular low, retraining.triangular high, diagnostics.density_for compression,
        recipes.edst_rates high, recipes.edst_rates low, recipes.scratch_steps dense, recipes.scratch_steps cap,
        recipes.scratch_control cap, m_fac_optimizer damping, m_fac_optimizer weight_decay, per_weight_adam eps,
        langevin l1, langevin temperature, training_cost sparse, training_cost dense""",
    # any number is one
    SIGNED: """diagnostics.agn sigma,
        diagnostics.nrs p, diagnostics.nrs_scores p, coreset.confident threshold, erk power, landscape.bezier t,
        per_weight_adam learning_rate, langevin learning_rate, m_fac_optimizer learning_rate,
        per_weight_adam weight_decay, exploration_penalty scale""",
    # clipped, as the docstrings say, or counted from the end
    ("negative",): """channel axis, n_of_m axis, rescale_init axis, topology.select k, topology.select_jointly k,
        topology.prune n_active, topology.redistribute amount, topology.count n, topology.rewire n_drop,
        topology.rewire n_active, topology.prune_jointly n_active, topology.prune_jointly min_active""",
    (*SIGNED, "rank 6"): "topology.count fraction, topology.drop_and_grow fraction",
    # empty trees and tables have nothing that could be wrong
    ("a dict",): """uniform shapes, erk shapes, erdos_renyi shapes, micronet_bits shapes, micronet_bits density,
        make_plan sparsities, make_plan axes, topology.rewire_tree n_active, channels.shrink keep,
        channels.groups ignore, channels.select groups, tracing.capture leaves, tracing.capture add,
        diagnostics.gradient_ranks leaves, diagnostics.noise_tolerance leaves""",
    TREES: "sparsity tree, execution.nbytes tree",
    # one leaf; a loss's own affair; dense; axes of 1 go anywhere
    ("rank 6",): """channels.groups params, channels.shrink params, channels.latency params,
        channels.iterative_shrinking params, coreset.grand params, coreset.grand batch, execution.best_pattern mask,
        tracing.to_matrix weight, diagnostics.agn y, diagnostics.dead_rate activations""",
    ("None",): "channels.singe mu, channels.ema before",
    ("a word",): """channels.slimming leaves, channels.only leaves, channels.nrs scales, kernels.check who,
        kernels.make_slabs over""",
}
MAY = {name: kinds for kinds, names in ALLOWED.items() for name in " ".join(names.split()).split(", ")}
"""What is not refused, beside None where it is the default."""


NAMED_INSTEAD = {
    "tracing.capture params": "leaves",
    **dict.fromkeys(("diagnostics.gradient_ranks params", "diagnostics.noise_tolerance params"), "leaves"),
    "coreset.complexity_gap x": "y",
    "diagnostics.interval_bounds low": "high",
    "diagnostics.certified_accuracy inputs": "labels",
    **dict.fromkeys(("coreset.complexity_gap_per_class x", "coreset.self_training inputs"), "labels"),
    **dict.fromkeys(("block height", "block width"), "block"),
    **dict.fromkeys(("n_of_m n", "n_of_m m"), "n_of_m"),
    "make_plan rules": "rule",
    "check_masked masks": "mask",
    "execution.rewire_streamed gradients": "gradient",
    "micronet_flops counted": "rx.flops",
    # an array of another shape does not fit the argument beside it
    **dict.fromkeys(("topology.select scores", "topology.prune scores"), "among"),
    "topology.rewire mask": "drop",
}
"""What an error names where it does not name the argument itself."""


def called(function, given):
    """The call with these arguments, positional where they may be."""
    given, placed = dict(given), []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in given and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.VAR_POSITIONAL):
            placed.append(given.pop(name))
    return function(*placed, **given)


def check_that_it_works(function, given):
    """By its trace, which compiles nothing, where it can be traced."""

    def traced():
        called(function, given)

    try:
        jax.eval_shape(traced)
    except Exception:
        called(function, given)


def test_every_public_function_is_here():
    assert PUBLIC.keys() == CALLS.keys() | ELSEWHERE.keys()
    for name, given in CALLS.items():
        assert list(given) == [n for n in inspect.signature(PUBLIC[name]).parameters if n in given], name
    missing = {name: set(inspect.signature(PUBLIC[name]).parameters) - set(given) for name, given in CALLS.items()}
    assert {name: names for name, names in missing.items() if names} == {}


def error_of(function, given):
    try:
        called(function, given)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_kind_of_value_is_refused_by_name(name):
    function, given = PUBLIC[name], CALLS[name]
    check_that_it_works(function, given)
    for argument in given:
        default = inspect.signature(function).parameters[argument].default
        for kind in WRONG.keys() - MAY.get(f"{name} {argument}", ()) - {"None" if default is None else ""}:
            error = error_of(function, given | {argument: WRONG[kind]})
            assert isinstance(error, ValueError), f"{argument} is {kind}: {error!r}"
            check(error)
            instead = NAMED_INSTEAD.get(f"{name} {argument}", argument)
            assert names(str(error), argument) or names(str(error), instead), f"{argument} is {kind}: {error!r}"


def test_a_wrong_call_is_pythons_own_error():
    with pytest.raises(TypeError, match="'k'"):
        topology.select(ONES)
    with pytest.raises(TypeError, match="'kk'"):
        topology.select(ONES, 2, kk=3)


def test_checked_functions_look_as_they_are_written():
    assert list(inspect.signature(topology.select).parameters) == ["scores", "k", "axes", "among"]
    assert topology.select.__doc__.startswith("The k highest scores")
    assert (topology.select.__name__, topology.select.__module__) == ("select", "rigl_jax.topology.topk")


def test_rules_of_unknown_arguments_are_refused():
    with refused("y"):
        arguments.arguments(y=arguments.flag)(nothing)


def nothing(x):
    return x


CONV = CALLS["kernels.conv"]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("padding", [(1, 1)]),
        ("padding", ((1,), (0, 0))),
        ("padding", ((1.5, 1), (0, 0))),
        ("padding", (("a", "b"), (0, 0))),
        ("padding", ((0, 0), (0, -1))),
        ("padding", np.zeros((2, 2))),
        ("padding", "CIRCULAR"),
        ("padding", ((True, True), (0, 0))),
        ("padding", (0, 0)),
        ("padding", ((0, 0), (0, 2**31))),
        ("strides", (1, 1.5)),
        ("strides", 2),
        ("strides", (0, 1)),
        ("strides", (1, 1, 1)),
        ("strides", "22"),
    ],
)
def test_odd_paddings_and_strides(argument, value):
    with refused("conv", argument):
        kernels.conv(**CONV | {argument: value})


@pytest.mark.parametrize("value", [(-1,), (2,), (0.0,), [0], 0, (0, 0), ("a",), (True,)])
def test_odd_axes_of_a_selection(value):
    with refused("axes"):
        topology.select(ONES, 1, axes=value)


@pytest.mark.parametrize("value", [True, np.ones(2), np.array([True]), [1, 2], 1j])
def test_odd_counts_of_a_selection(value):
    with refused("k"):
        topology.select(ONES, value)


@pytest.mark.parametrize("k", [2**40, 2**70, np.array(2**40), np.int64(2**40), np.int8(100)])
def test_more_than_there_is_is_all_there_is(k):
    assert topology.select(ONES, k).all()
    assert not topology.select(ONES, -k).any()
