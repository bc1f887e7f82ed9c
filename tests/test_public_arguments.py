"""Every argument of every public function: nonsense gets one line that names the function, and says what is wrong.

A row is a call that works. Each of its arguments is replaced in turn by values of other kinds. What is then not refused
must be listed in `MAY`, with the reason; so a new function or argument is checked as soon as it is public.
"""

import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rigl_jax as rx
from rigl_jax import execution, landscape, topology
from rigl_jax.execution import kernels

flops = importlib.import_module("rigl_jax.flops")  # rx.flops is its function
MODULES = {
    "": rx,
    "topology.": topology,
    "execution.": execution,
    "kernels.": kernels,
    "landscape.": landscape,
    "flops.": flops,
}
F = np.float32
KEY = jax.random.key(0)
PARAMS = {"w": np.ones((4, 4), F)}
MASKS = {"w": np.eye(4, dtype=bool)}
SHAPES = {"w": (4, 4)}
PLAN = rx.make_plan(PARAMS, 0.5)
LEAF = PLAN["w"]
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


def loss(params):
    return jnp.sum(params["w"] ** 2)


MESH = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
CALLS = {
    # structures, distributions, plans
    "block": {"height": 2, "width": 2},
    "channel": {"axis": -1},
    "n_of_m": {"n": 2, "m": 4, "axis": -2},
    "make_plan": {
        "params": PARAMS,
        "sparsity": 0.5,
        "distribution": rx.erk,
        "rules": [("w", U)],
        "sparsities": {"w": 0.5},
        "count_fixed": True,
        "rounding": int,
    },
    "describe": {"plan": PLAN},
    "uniform": {"shapes": SHAPES, "sparsity": 0.5},
    "erk": {"shapes": SHAPES, "sparsity": 0.5, "power": 1.0},
    "erdos_renyi": {"shapes": SHAPES, "sparsity": 0.5},
    # masks
    "apply_masks": {"params": PARAMS, "masks": MASKS},
    "check_masked": {"params": rx.apply_masks(PARAMS, MASKS), "masks": MASKS},
    "straight_through": {"params": PARAMS, "masks": MASKS},
    "sparsity": {"tree": MASKS},
    "rescale_init": {"params": PARAMS, "masks": MASKS, "axis": -1},
    "replace_masks": {
        "inner": SGD,
        "state": rx.sparsify(SGD, STATIC, key=KEY).init(PARAMS),
        "params": PARAMS,
        "masks": MASKS,
    },
    # training
    "sparsify": {"inner": SGD, "algorithm": STATIC, "key": KEY},
    "accumulate_growth": {"algorithm": rx.rigl(PLAN), "n": 2},
    "with_masters": {"inner": SGD, "dtype": jnp.float32},
    "per_weight_adam": {
        "learning_rate": 0.1,
        "b1": 0.9,
        "b2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "warmup": 2,
    },
    "langevin": {"learning_rate": 0.1, "l1": 0.1, "temperature": 0.1, "key": KEY},
    "sparse_average": {"average": PARAMS, "params": PARAMS, "masks": MASKS, "decay": 0.9},
    # selection
    "topology.select": {"scores": ONES, "k": 2, "axes": (0,), "among": MASKS["w"]},
    "topology.select_jointly": {"scores": [ONES], "k": 2, "among": [MASKS["w"]]},
    "topology.redistribute": {"amount": 3, "weights": np.ones(2, F), "room": np.array([2, 2], np.int32)},
    "topology.prune": {"structure": U, "scores": ONES, "n_active": 2, "among": MASKS["w"]},
    "topology.rewire": {
        "structure": U,
        "mask": MASKS["w"],
        "drop": ONES,
        "grow": ONES,
        "n_drop": 2,
        "n_active": 4,
        "regrow_dropped": True,
    },
    "topology.n_units": {"leaf": LEAF},
    "topology.unit_size": {"leaf": LEAF},
    "topology.count": {"fraction": 0.5, "n": 4},
    "topology.random_masks": {"plan": PLAN, "key": KEY, "params": PARAMS},
    "topology.prune_tree": {"plan": PLAN, "scores": PARAMS},
    "topology.prune_jointly": {"plan": PLAN, "scores": PARAMS, "n_active": 3, "min_active": 1},
    "topology.drop_and_grow": {
        "plan": PLAN,
        "masks": MASKS,
        "drop": PARAMS,
        "grow": PARAMS,
        "fraction": 0.5,
        "regrow_dropped": True,
    },
    "topology.rewire_tree": {
        "plan": PLAN,
        "masks": MASKS,
        "drop": PARAMS,
        "grow": PARAMS,
        "n_drop": {"w": 1},
        "n_active": {"w": 4},
        "regrow_dropped": True,
    },
    "topology.check_fit": {"plan": PLAN, "params": PARAMS},
    # packed weights
    "pack": {"params": PARAMS, "masks": MASKS, "choose": lambda name, mask: None},
    "unpack": {"packed": PACKED},
    "run_packed": {"apply": product, "batch": NamedSharding(MESH, PartitionSpec("data"))},
    "packed_training": {
        "inner": SGD,
        "algorithm": STATIC,
        "key": KEY,
        "choose": lambda name, mask: None,
        "sharding": NamedSharding(MESH, PartitionSpec()),
    },
    "execution.best_pattern": {"name": "w", "mask": MASKS["w"]},
    "execution.masks_of": {"packed": PACKED},
    "execution.nbytes": {"tree": PARAMS},
    "execution.compact": {"apply": product, "params": PARAMS, "masks": MASKS, "inputs": X},
    "execution.explain": {"packed": rx.pack({}, {}), "batch": 1, "image": 1, "repeats": 1},
    "execution.fastest": {"batch": 1, "image": 1, "repeats": 1},
    "execution.gradient_factors": {"loss": product},
    "execution.random_pattern": {"key": KEY, "shape": (4, 4), "n_active": 3},
    "execution.rewire_streamed": {
        "inner": SGD,
        "gradients": FACTORS,
        "state": TRAINED,
        "packed": PACKED,
        "share": 0.0,
        "block": 8,
    },
    # kernels
    "kernels.make_pattern": {"mask": MASKS["w"], "height": 1, "block": 2},
    "kernels.make_pattern_at": {"entries": np.array([0, 5]), "shape": (4, 4), "height": 1, "block": 2},
    "kernels.make_block_pattern": {"mask": np.ones((4, 4), bool), "tile": (2, 2)},
    "kernels.make_nm_pattern": {"mask": np.ones((4, 4), bool), "n": 2, "m": 2, "width": 1},
    "kernels.as_matrix": {"shape": (2, 2, 2), "split": 1},
    "kernels.squarest_split": {"shape": (2, 2, 2)},
    "kernels.coordinates": {"pattern": AT},
    "kernels.gather": {"dense": ONES, "at": AT},
    "kernels.scatter": {"values": np.ones(4, F), "at": AT},
    "kernels.rebuild": {"at": AT, "mask": MASKS["w"]},
    "kernels.matmul": {"x": X, "values": np.ones(4, F), "at": AT, "transpose": False, "level": "auto"},
    "kernels.conv": {
        "x": np.ones((1, 4, 4, 2), F),
        "values": np.ones(8, F),
        "pattern": KERNEL,
        "strides": (1, 1),
        "padding": "SAME",
        "level": "auto",
    },
    # costs and paths
    "flops": {"apply": product, "params": PARAMS, "inputs": X, "masks": MASKS, "while_trips": 1},
    "training_cost": {"algorithm": STATIC, "sparse": 0.5, "dense": 1.0, "steps": 3},
    "micronet_flops": {"counted": COST},
    "micronet_bits": {"shapes": SHAPES, "density": {"w": 0.5}},
    "landscape.bezier": {"points": [PARAMS, PARAMS], "t": 0.5},
    "landscape.path_losses": {"loss": loss, "points": [PARAMS, PARAMS], "ts": [0.5]},
    "landscape.interpolate": {"loss": loss, "a": PARAMS, "b": PARAMS, "ts": [0.5]},
    "landscape.barrier": {"losses": np.ones(3, F)},
    "landscape.bezier_path": {
        "loss": loss,
        "a": PARAMS,
        "b": PARAMS,
        "masks": MASKS,
        "steps": 1,
        "key": KEY,
        "degree": 2,
        "optimizer": SGD,
    },
}


def public():
    """`{name: function}` of the modules, each under the first name that it is found by."""
    found = {}
    for prefix, module in MODULES.items():
        names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
        for name in names:
            value = getattr(module, name)
            own = hasattr(module, "__all__") or getattr(value, "__module__", "").startswith("rigl_jax.")
            if inspect.isfunction(value) and own and value not in found.values():
                found[prefix + name] = value
    return found


PUBLIC = public()
WITHOUT_ARGUMENTS = {"fan_in", "unstructured", "execution.backends"}
ELSEWHERE = {
    **dict.fromkeys(rx.ALGORITHMS, "its options are tried in test_bad_input"),
    "rigl_inverted": "its options are rigl's",
}
