"""Wrong calls of the library, each with what its error must name; `test_bad_input` makes them.

`test_public_arguments` tries values of a wrong kind (None, words, negative numbers, ...) for every argument. Here are
values of the right kind that are wrong all the same: out of range, of another model, or misspelled.
"""

import math

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import rigl_jax as rx
from rigl_jax import execution, topology
from rigl_jax.execution import compact, kernels, save_safetensors

F, Shape = np.float32, jax.ShapeDtypeStruct
KEY = jax.random.key(0)
PARAMS = {"a": {"bias": np.zeros(4, F), "kernel": np.ones((4, 4), F)}, "b": {"kernel": np.ones((4, 2), F)}}
PLAN = rx.make_plan(PARAMS, 0.5)
U = rx.unstructured()
SGD = optax.sgd(0.1)
TX = rx.sparsify(SGD, rx.static(PLAN), key=KEY)
STATE = jax.eval_shape(TX.init, PARAMS)
W, M, EYE, ONES = {"w": np.ones((4, 4), F)}, {"w": np.eye(4, dtype=bool)}, np.eye(4, dtype=bool), np.ones((4, 4), F)
SMALL, OTHER = {"w": np.ones((2, 2), bool)}, {"v": EYE}
MASKS = {"a": {"bias": None, "kernel": EYE}, "b": {"kernel": np.ones((4, 2), bool)}}
PACKED = rx.pack(W, M)
TRAINED = rx.packed_training(SGD, rx.static(rx.make_plan(W, 0.5)), key=KEY).init(W)[1]
X = Shape((2, 4), "float32")
CONSTANT = optax.constant_schedule(1.0)
AT = kernels.make_pattern(EYE)
TWO = Mesh(np.asarray(jax.devices()[:2]), ("data",))
KERNEL = kernels.make_pattern(np.ones((2, 2, 2, 1), bool))
NEEDED = {
    "gmp": {"stop": 100},
    "ac_dc": {"stop": 100, "period": 10},
    "granet": {"stop": 100},
    "grasp": {"loss": lambda params: params["b"]["kernel"].sum()},
    "synflow": {"loss": lambda params: params["b"]["kernel"].sum(), "rounds": 2},
}
"""What some algorithms cannot do without."""


def made(name, plan=PLAN, **options):
    return rx.ALGORITHMS[name](plan, **{**NEEDED.get(name, {}), **options})


def one(shape, dtype="float32"):
    return {"w": Shape(shape, dtype)}


def planned(structure, shape):
    return rx.make_plan(one(shape), 0.5, rules=((".*", structure),))


def ruled(*rules):
    return rx.make_plan(PARAMS, 0.5, rules=rules)


def distributed(sparsities):
    return rx.make_plan(PARAMS, 0.5, lambda shapes, total: sparsities(shapes))


def fixed(**sparsities):
    return rx.make_plan(PARAMS, 0.5, sparsities={name.replace("_", "/"): s for name, s in sparsities.items()})


def update(grads, **options):
    return jax.eval_shape(lambda state: TX.update(grads, state, PARAMS, **options), STATE)


def sparsified(inner=SGD, algorithm=None, key=KEY):
    return rx.sparsify(inner, algorithm or rx.static(PLAN), key=key)


def shapes_of(transformation):
    return jax.eval_shape(transformation.init, PARAMS)


def product(params, x):
    return x @ params["w"]


def image(shape=(1, 4, 4, 2), **options):
    return kernels.conv(np.ones(shape, F), np.ones(8, F), KERNEL, **options)


PLANS = [
    *(
        ("sparsity", lambda value=value: rx.make_plan(PARAMS, value))
        for value in (math.nan, 90, True, np.ones(2), 0.99)
    ),
    ("make_plan", lambda: rx.make_plan({"w": [1.0]}, 0.5)),
    ("w int32", lambda: rx.make_plan(one((4, 4), "int32"), 0.5)),
    ("w", lambda: rx.make_plan(one((4, 0)), 0.5, rules=[("w", U)])),
    ("w complex64", lambda: rx.make_plan(one((4, 4), "complex64"), 0.5)),
    ("distribution a/kernel", lambda: distributed(lambda shapes: {})),
    ("distribution", lambda: distributed(lambda shapes: None)),
    ("distribution a/kernel", lambda: distributed(lambda shapes: dict.fromkeys(shapes, 2))),
    ("rule x", lambda: ruled("x")),
    ("rule block", lambda: ruled((".*", "block"))),
    ("rule unstructured", lambda: ruled((".*", rx.unstructured))),
    ("rule 3", lambda: ruled((3, None))),
    ("rules (", lambda: ruled(("(", None))),
    ("a/kernle a/kernel", lambda: ruled(("a/kernle", None), (".*", U))),
    ("a/kernel", lambda: ruled((".*", U), ("a/kernel", None))),
    ("rule a/bias", lambda: ruled(("a/kernel", U))),
    ("make_plan a/bias a/kernel", lambda: ruled((".*", None))),
    ("sparsities a/kernel", lambda: fixed(a_kernel=2)),
    ("a/kernle a/kernel", lambda: fixed(a_kernle=0.5)),
    ("sparsities 3", lambda: rx.make_plan(PARAMS, 0.5, sparsities={3: 0.5})),
    ("sparsity", lambda: rx.erk({"w": (4, 4)}, 1.0)),
    *(("power", lambda value=value: rx.erk({"w": (4, 4)}, 0.5, power=value)) for value in (math.nan, math.inf)),
    *(("w", lambda value=value: rx.erk({"w": value}, 0.5)) for value in (None, (0, 4), ())),
    ("w", lambda: rx.erdos_renyi({"w": (4,)}, 0.5)),
    ("block", lambda: rx.block(0, 1)),
    ("n_of_m", lambda: rx.n_of_m(4, 2)),
    ("n_of_m", lambda: rx.n_of_m(0, 2)),
    ("w block", lambda: planned(rx.block(3, 1), (4, 4))),
    ("w block", lambda: planned(rx.block(2, 4), (6, 6))),
    ("w block", lambda: planned(rx.block(1, 1), (4,))),
    ("block True", lambda: rx.block(True, 2)),
    ("w n_of_m axis", lambda: planned(rx.n_of_m(2, 4, axis=3), (8, 8))),
    ("w axis", lambda: planned(rx.channel(axis=-3), (8, 8))),
    ("sparse 0.9", lambda: rx.make_plan(W, 0.9, rules=((".*", rx.n_of_m(2, 4)),))),
    ("w n_of_m", lambda: planned(rx.n_of_m(2, 4), (6, 4))),
    ("w axis", lambda: planned(rx.channel(5), (6, 4))),
    ("w fan_in", lambda: planned(rx.fan_in(), (6,))),
]

TIMES = [
    *(("period", lambda value=value: rx.schedules.every(value)) for value in (0, 1.5, "5", 2**31)),
    *(("start", lambda value=value: rx.schedules.every(1, start=value)) for value in (-1, "0", None)),
    ("start stop", lambda: rx.schedules.every(1, start=5, stop=2)),
    ("stop", lambda: rx.schedules.every(1, stop=math.nan)),
    *(("step", lambda value=value: rx.schedules.every(1)(value)) for value in ("0", None, {"step": 0})),
    ("stop", lambda: rx.schedules.uncounted(1, stop=7.5)),
    ("fraction", lambda: rx.schedules.cosine("x", 10)),
    ("stop", lambda: rx.schedules.cosine(0.3, -1)),
    ("fraction", lambda: rx.schedules.inverse_power(2.0, 10)),
    ("stop", lambda: rx.schedules.inverse_power(0.3, 0)),
    ("power", lambda: rx.schedules.inverse_power(0.3, 10, "x")),
    ("start stop", lambda: rx.schedules.cubic(0.0, 0.9, 5, 5)),
    ("final", lambda: rx.schedules.cubic(0.0, 2.0, 0, 5)),
    ("start", lambda: rx.schedules.cubic(0.0, 0.5, None, 5)),
    *(("factor", lambda value=value: rx.schedules.stretch(CONSTANT, value)) for value in (0, "x")),
    ("schedule", lambda: rx.schedules.stretch(0.3, 2)),
]

TRAINING = [
    *(("key", lambda value=value: sparsified(key=value)) for value in (np.ones(2), np.zeros(3, np.uint32))),
    ("key", lambda: sparsified(key=jax.random.split(KEY))),
    ("a/kernel w", lambda: jax.eval_shape(TX.init, W)),
    ("b/kernel a/kernel b/w", lambda: jax.eval_shape(TX.init, PARAMS | {"b": W})),
    ("a/kernel", lambda: TX.init(None)),
    ("params", lambda: TX.update(PARAMS, STATE)),
    ("state", lambda: TX.update(PARAMS, None, PARAMS)),
    ("state", lambda: TX.update(PARAMS, SGD.init(W), PARAMS)),
    ("rewire", lambda: update(PARAMS, rewire="yes")),
    ("params c", lambda: update(PARAMS | {"c": np.ones(3, F)})),
    ("params b/kernel", lambda: update({"a": PARAMS["a"]})),
    ("b/kernel", lambda: update(PARAMS | {"b": {"kernel": np.ones((2, 4), F)}})),
    ("gradients a/bias", lambda: update(None)),
    ("gradients", lambda: update(PARAMS | {"c": None})),
    ("a/bias int32", lambda: update(jax.tree.map(lambda p: p.astype(np.int32), PARAMS))),
    ("sparsify inner", lambda: shapes_of(sparsified(optax.chain(TX)))),
    ("inner", lambda: shapes_of(sparsified(optax.lbfgs()))),
    *(("w float32", lambda f=f: f(W, {"w": ONES})) for f in (rx.apply_masks, rx.straight_through, rx.check_masked)),
    *(("w bool", lambda f=f: f(W, SMALL)) for f in (rx.apply_masks, rx.straight_through, rx.check_masked, rx.pack)),
    *(("v params", lambda f=f: f(W, OTHER)) for f in (rx.apply_masks, rx.check_masked, rx.pack, rx.rescale_init)),
    ("a/kernle a/kernel", lambda: rx.apply_masks(PARAMS, {"a": {"kernle": EYE}})),
    ("w bool", lambda: rx.apply_masks(W, {"w": EYE[:1]})),
    ("w x", lambda: rx.apply_masks(W, {"w": "x"})),
    *(
        ("masks_of", lambda f=f: f(W, TRAINED.masks))
        for f in (rx.apply_masks, rx.straight_through, rx.pack, rx.check_masked, lambda _, masks: rx.sparsity(masks))
    ),
    ("masks_of", lambda: rx.replace_masks(SGD, TRAINED, W, M)),
    ("w 12", lambda: rx.check_masked(W, M)),
    ("w", lambda: jax.eval_shape(lambda w: rx.check_masked(w, M), W)),
    ("x", lambda: rx.sparsity({"w": "x"})),
    ("axis w", lambda: rx.rescale_init(W, M, axis=5)),
    ("b1", lambda: rx.per_weight_adam(0.1, b1=1.0)),
    ("warmup", lambda: rx.per_weight_adam(0.1, warmup=math.nan)),
    ("dtype", lambda: rx.with_masters(SGD, np.int32)),
    ("decay", lambda: rx.sparse_average(W, W, M, 1.0)),
    ("params w", lambda: rx.sparse_average(OTHER, W, M)),
    ("masks w", lambda: rx.replace_masks(SGD, STATE, PARAMS, W)),
    ("b/kernel float32", lambda: rx.replace_masks(SGD, STATE, PARAMS, MASKS | {"b": PARAMS["b"]})),
    ("inner", lambda: rx.replace_masks(optax.adam(0.1), STATE, PARAMS, MASKS)),
    ("n", lambda: rx.accumulate_growth(rx.rigl(PLAN), 0)),
    ("b2", lambda: rx.per_weight_adam(0.1, b2=1.0)),
]

COMPUTE = [
    ("scores int64", lambda: topology.select(np.arange(4), 2)),
    ("axes", lambda: topology.select(ONES, 1, axes=(2,))),
    ("among", lambda: topology.select(ONES, 1, among=EYE[0])),
    ("scores float16", lambda: topology.select_jointly([ONES, ONES.astype(np.float16)], 2)),
    ("scores", lambda: topology.select_jointly([], 2)),
    ("select_jointly 0", lambda: topology.select_jointly([ONES], 2, among=[])),
    ("among", lambda: topology.prune(U, ONES, 2, among=EYE[:2])),
    ("drop", lambda: topology.rewire(U, EYE, ONES[:2], ONES, 1)),
    ("w fan_in", lambda: topology.prune_jointly(planned(rx.fan_in(), (4, 4)), W)),
    ("redistribute", lambda: topology.redistribute(3, np.ones(1), np.ones(2))),
    ("masks v params", lambda: rx.flops(product, W, X, masks=OTHER)),
    ("w bool", lambda: rx.flops(product, W, X, masks=SMALL)),
    *(("steps", lambda value=value: rx.training_cost(rx.static(PLAN), 0.1, 1.0, value)) for value in (0, 10**12)),
    ("sparse", lambda: rx.training_cost(rx.static(PLAN), [0.1], 1.0, 3)),
    ("density w", lambda: rx.micronet_bits({"w": (4, 4)}, {"w": 2.0})),
    ("key", lambda: rx.gates.hard_concrete(0, ONES)),
    ("log_alpha", lambda: rx.gates.hard_concrete(KEY, 1.0)),
    ("log_sigma2", lambda: rx.gates.log_alpha(ONES, ONES[:2])),
    ("x", lambda: rx.gates.variational_matmul(KEY, ONES[:, :3], ONES, ONES)),
    ("masks_of", lambda: rx.sparsity(rx.pack(W, M))),
    ("w float32", lambda: rx.pack(W, W)),
    ("w", lambda: jax.eval_shape(lambda masks: rx.pack(W, masks), M)),
    ("choose w 3", lambda: rx.pack(W, M, choose=lambda name, mask: 3)),
    ("run_packed", lambda: rx.run_packed(product)(W, X)),
    ("batch", lambda: rx.run_packed(product, batch=NamedSharding(TWO, PartitionSpec(None, "data")))),
    (
        "sharding",
        lambda: rx.packed_training(
            SGD, rx.rigl(PLAN), key=KEY, sharding=NamedSharding(TWO, PartitionSpec(None, None, "data"))
        ),
    ),
    *(("packed_training", lambda f=f: rx.packed_training(SGD, f(PLAN), key=KEY)) for f in (rx.ste, rx.snfs)),
    ("share", lambda: execution.rewire_streamed(SGD, {}, TRAINED, PACKED, 2.0)),
    ("w", lambda: execution.rewire_streamed(SGD, {}, TRAINED, PACKED, 0.3)),
    ("n_active", lambda: execution.random_pattern(KEY, (4, 4), 0)),
    ("shape", lambda: execution.random_pattern(KEY, (4,), 3)),
    ("mask", lambda: kernels.make_pattern(EYE[0])),
    ("height", lambda: kernels.make_pattern(EYE, height=3)),
    ("height", lambda: kernels.make_pattern(np.ones((4, 6), bool), height=4)),
    ("mask", lambda: kernels.make_pattern(EYE, height=4)),
    ("block", lambda: kernels.make_pattern(np.ones((3, 3, 2, 2), bool), block=8)),
    ("x", lambda: kernels.matmul(ONES[:, :3], ONES[0], AT)),
    ("values", lambda: kernels.matmul(ONES, np.ones(5, F), AT)),
    ("level", lambda: kernels.matmul(ONES, ONES[0], AT, level="axv")),
    ("pattern", lambda: kernels.conv(np.ones((1, 4, 4, 4), F), ONES[0], AT)),
    ("padding", lambda: image(padding="SAMEE")),
    ("padding", lambda: image(padding=((-1, 0), (0, 0)))),
    ("x", lambda: image((1, 4, 4, 1))),
    ("groups", lambda: image(groups=2)),
    ("values", lambda: kernels.conv(np.ones((1, 4, 4, 2), F), np.ones(7, F), KERNEL)),
    ("mask", lambda: kernels.make_nm_pattern(ONES > 0, 2, 4)),
    ("mask", lambda: kernels.make_nm_pattern(np.ones((6, 4), bool), 2, 4)),
    ("mask", lambda: kernels.make_block_pattern(EYE, (2, 2))),
    ("make_block_pattern", lambda: kernels.make_block_pattern(EYE, (3, 3))),
    ("dense", lambda: kernels.gather(ONES[:3], AT)),
    ("values", lambda: kernels.scatter(np.ones(3, F), AT)),
    ("masks v params", lambda: compact(product, W, OTHER, X)),
    ("packed", lambda: save_safetensors("net.safetensors", W)),
]

METHODS = [
    *(("plan", lambda name=name, plan=plan: made(name, plan)) for name in rx.ALGORITHMS for plan in (PARAMS, None)),
    *(
        (f"{words} {' '.join(options)}", lambda name=name, options=options: made(name, **options))
        for name, words, options in (
            ("rigl", "", {"period": 0}),
            ("rigl", "", {"stop": "x"}),
            ("rigl", "", {"start": 1.5}),
            ("rigl", "", {"fraction": 1.5}),
            ("rigl", "", {"drop": "magnitude"}),
            ("rigl", "", {"grow": None}),
            ("rigl", "", {"grow_values": 0.0}),
            ("rigl", "", {"count_skipped": False, "skip_step": False}),
            ("set", "", {"fraction": math.nan}),
            ("itop", "", {"start": 9, "stop": 2}),
            ("mest", "", {"gradient_weight": -1}),
            ("snfs", "", {"momentum": 1}),
            ("snfs", "", {"drop": 3}),
            ("dsr", "", {"threshold": math.inf}),
            ("dsr", "", {"target": "1%"}),
            ("dsr", "", {"target": 1.5}),
            ("dsr", "", {"threshold": 0.0}),
            ("dsr", "", {"tolerance": 1}),
            ("deep_r", "", {"start": None}),
            ("granet", "", {"period": 0}),
            ("granet", "stop", {"prune_stop": 200}),
            ("granet", "start", {"start": 30, "prune_stop": 20}),
            ("granet", "", {"stop": None}),
            ("srigl", "", {"min_salient": -0.1}),
            ("srigl", "a/kernle a/kernel", {"never_ablate": ("a/kernle",)}),
            ("srigl", "", {"never_ablate": 3}),
            ("srigl", "", {"min_salient": 3}),
            ("snip", "", {"start": -1}),
            ("snip", "", {"start": 1.5}),
            ("snip", "", {"start": 3, "loss": lambda params: 0.0}),
            ("snip", "", {"loss": "mean"}),
            ("grasp", "", {"loss": None}),
            ("synflow", "", {"rounds": 0}),
            ("synflow", "", {"rounds": 1.5}),
            ("gmp", "start", {"stop": 0}),
            ("gmp", "", {"initial": 1}),
            ("ste", "", {"period": 0}),
            ("ste", "", {"score": "x"}),
            *(("top_kast", "", {"extra": value}) for value in (-1, math.nan, math.inf, "1")),
            ("ac_dc", "", {"score": None}),
        )
    ),
    ("sparsity", lambda: made("granet", initial_sparsity=2)),
    ("min_active", lambda: made("snip", jointly=True, min_active=99)),
]
