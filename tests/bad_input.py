"""Wrong calls of the library, each with the one line that it must be answered with; `test_bad_input` makes them."""

import math
import pathlib
import re
import traceback

import jax
import numpy as np
import optax

import rigl_jax as rx
from configs import digits_mlp
from experiments.config import plain

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


ROOT = pathlib.Path(__file__).parents[1]
OURS = tuple(str(ROOT / package) for package in ("rigl_jax", "experiments", "configs"))


def check(error):
    """One line, raised by us on purpose, and never only the text of something that we call."""
    assert str(error).strip()
    assert "\n" not in str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    assert last.filename.startswith(OURS), f"raised in {last.filename}: {error}"
    assert last.line.startswith("raise"), f"not raised on purpose, at {last.line!r}: {error}"


def one_line(capsys, message, start="error: "):
    told = capsys.readouterr().err
    assert re.search(message, told), told
    assert told.startswith(start)
    assert told.count("\n") == 1
    assert "Traceback" not in told


def changed(**values):
    """The plain smoke config, with `section__key` set, or taken out where the value is `...`."""
    config = plain(digits_mlp.get_config("smoke"))
    for path, value in values.items():
        *sections, key = path.split("__")
        at = config
        for section in sections:
            at = at[section]
        if value is ...:
            del at[key]
        else:
            at[key] = value
    return config


def one(shape, dtype="float32"):
    return {"w": Shape(shape, dtype)}


def planned(structure, shape):
    return rx.make_plan(one(shape), 0.5, rules=((".*", structure),))


def ruled(*rules):
    return rx.make_plan(PARAMS, 0.5, rules=rules)


def update(grads, **options):
    return jax.eval_shape(lambda state: TX.update(grads, state, PARAMS, **options), STATE)


PLANS = {
    "sparsity nan": (lambda: rx.make_plan(PARAMS, math.nan), r"make_plan: sparsity .* \[0, 1\), got nan"),
    "sparsity a word": (lambda: rx.make_plan(PARAMS, "0.9"), r"make_plan: sparsity .* \[0, 1\), got '0.9'"),
    "sparsity in percent": (lambda: rx.make_plan(PARAMS, 90), r"make_plan: sparsity .* \[0, 1\), got 90"),
    "sparsity None": (lambda: rx.make_plan(PARAMS, None), r"make_plan: sparsity .* \[0, 1\), got None"),
    "sparsity True": (lambda: rx.make_plan(PARAMS, True), r"make_plan: sparsity .* \[0, 1\), got True"),
    "sparsity array": (
        lambda: rx.make_plan(PARAMS, np.ones(2)),
        r"make_plan: sparsity .* \[0, 1\), got float64\[2\]",
    ),
    "too sparse": (lambda: rx.make_plan(PARAMS, 0.99), r"make_plan: .*largest reachable sparsity is 0.91\d+, got 0.99"),
    "no params": (lambda: rx.make_plan(None, 0.5), r"make_plan: no leaf is sparse; leaves are none"),
    "params a number": (lambda: rx.make_plan(3, 0.5), r"make_plan: no leaf is sparse"),
    "params a list": (lambda: rx.make_plan({"w": [1.0]}, 0.5), r"make_plan: no leaf is sparse"),
    "whole weights": (lambda: rx.make_plan(one((4, 4), "int32"), 0.5), r"make_plan: leaf 'w' .*float32.*got int32"),
    "complex": (lambda: rx.make_plan(one((4, 4), "complex64"), 0.5), r"make_plan: leaf 'w' .*got complex64"),
    "distribution name": (
        lambda: rx.make_plan(PARAMS, 0.5, "erk"),
        r"make_plan: distribution .*such as rx.erk, got 'e",
    ),
    "distribution {}": (lambda: rx.make_plan(PARAMS, 0.5, lambda s, x: {}), r"make_plan: .*no sparsity for a/kernel"),
    "distribution None": (lambda: rx.make_plan(PARAMS, 0.5, lambda s, x: None), r"make_plan: .*must give.*got None"),
    "distribution 2": (lambda: rx.make_plan(PARAMS, 0.5, lambda s, x: dict.fromkeys(s, 2)), r"'a/kernel'.*got 2"),
    "rules a word": (lambda: ruled("x"), r"make_plan: each rule must be a pair .*got 'x'"),
    "rules a number": (lambda: rx.make_plan(PARAMS, 0.5, rules=3), r"make_plan: rules must be .*pairs, got 3"),
    "rule by name": (lambda: ruled((".*", "block")), r"make_plan: each rule .*got \('.\*', 'block'\)"),
    "rule a function": (lambda: ruled((".*", rx.unstructured)), r"make_plan: each rule .*function unstructured"),
    "rule a number": (lambda: ruled((3, None)), r"make_plan: each rule .*got \(3, None\)"),
    "rule no regex": (lambda: ruled(("(", None)), r"make_plan: rules: '\(' is not a regular expression"),
    "rule typo": (lambda: ruled(("a/kernle", None), (".*", U)), r"'a/kernle' .*did you mean 'a/kernel'\?"),
    "rule missing": (lambda: ruled(("a/kernel", U)), r"make_plan: no rule matches leaf 'a/bias' of shape \(4,\)"),
    "all dense": (lambda: ruled((".*", None)), r"make_plan: no leaf is sparse; leaves are a/bias, a/kernel"),
    "layer at 2": (lambda: rx.make_plan(PARAMS, 0.5, sparsities={"a/kernel": 2}), r"sparsities\['a/kernel'\].*got 2"),
    "layer typo": (lambda: rx.make_plan(PARAMS, 0.5, sparsities={"a/kernle": 0.5}), r"did you mean 'a/kernel'\?"),
    "layers a list": (lambda: rx.make_plan(PARAMS, 0.5, sparsities=[0.5]), r"make_plan: sparsities must be .*\[0.5\]"),
    "layers a number": (lambda: rx.make_plan(PARAMS, 0.5, sparsities=0.5), r"make_plan: sparsities must be .*got 0.5"),
    "layer number": (lambda: rx.make_plan(PARAMS, 0.5, sparsities={3: 0.5}), r"make_plan: sparsities: 3 is not a reg"),
    "rounding name": (lambda: rx.make_plan(PARAMS, 0.5, rounding="floor"), r"make_plan: rounding must be a function"),
    "erk sparsity": (lambda: rx.erk({"w": (4, 4)}, 1.0), r"erk: sparsity .* got 1.0"),
    "erk power word": (lambda: rx.erk({"w": (4, 4)}, 0.5, power="x"), r"erk: power .* got 'x'"),
    "erk power nan": (lambda: rx.erk({"w": (4, 4)}, 0.5, power=math.nan), r"erk: power .* got nan"),
    "erk power inf": (lambda: rx.erk({"w": (4, 4)}, 0.5, power=math.inf), r"erk: power .* got inf"),
    "erk shapes list": (lambda: rx.erk([(4, 4)], 0.5), r"erk: shapes must be \{name: shape\}, got list"),
    "erk shape None": (lambda: rx.erk({"w": None}, 0.5), r"erk: leaf 'w' must have a shape .*got None"),
    "erk shape 0": (lambda: rx.erk({"w": (0, 4)}, 0.5), r"erk: leaf 'w' must have a shape .*got \(0, 4\)"),
    "erk scalar": (lambda: rx.erk({"w": ()}, 0.5), r"erk: leaf 'w' must have a shape .*got \(\)"),
    "erdos_renyi bias": (lambda: rx.erdos_renyi({"w": (4,)}, 0.5), r"erdos_renyi: leaf 'w' must have 2 axes .*\(4,\)"),
    "erdos_renyi sparsity": (lambda: rx.erdos_renyi({"w": (4, 4)}, -1), r"erdos_renyi: sparsity .*got -1"),
    "uniform sparsity": (lambda: rx.uniform({"w": (4, 4)}, "x"), r"uniform: sparsity .*got 'x'"),
    "uniform shapes": (lambda: rx.uniform(None, 0.5), r"uniform: shapes must be .*got None"),
    "describe params": (lambda: rx.describe(PARAMS), r"describe: plan must be what make_plan gives, got dict"),
    "describe None": (lambda: rx.describe(None), r"describe: plan must be .*got None"),
    "block 0": (lambda: rx.block(0, 1), r"block\(0, 1\): sizes must be integers of at least 1, got 0, 1"),
    "block 1.5": (lambda: rx.block(1.5, 1), r"block\(1.5, 1\): sizes must be integers .*got 1.5"),
    "block word": (lambda: rx.block("4", 1), r"block\('4', 1\): sizes must be integers .*got '4'"),
    "block 3 of 4": (lambda: planned(rx.block(3, 1), (4, 4)), r"leaf 'w': block\(3, 1\) .*multiple of 3.*\(4, 4\)"),
    "block of bias": (lambda: planned(rx.block(1, 1), (4,)), r"leaf 'w': block\(1, 1\) needs .*2 axes"),
    "4 of 2": (lambda: rx.n_of_m(4, 2), r"n_of_m\(4, 2\): n must be at most m, got 4 of 2"),
    "0 of 2": (lambda: rx.n_of_m(0, 2), r"n_of_m\(0, 2\): sizes must be .*got 0, 2"),
    "n_of_m axis": (lambda: rx.n_of_m(2, 4, axis=1.0), r"n_of_m.*axis must be an integer such as -2, got 1.0"),
    "2 of 4 at 90 %": (
        lambda: rx.make_plan(W, 0.9, rules=((".*", rx.n_of_m(2, 4)),)),
        r"every sparse layer is fixed by its structure .*, and the total comes out as 0\.5; pass that, got 0\.9",
    ),
    "2 of 4 of 6": (lambda: planned(rx.n_of_m(2, 4), (6, 4)), r"leaf 'w': n_of_m\(2, 4\) .*multiple of 4"),
    "channel word": (lambda: rx.channel("out"), r"channel.*axis must be an integer .*got 'out'"),
    "channel axis": (lambda: planned(rx.channel(5), (6, 4)), r"leaf 'w': channel\(axis=5\) needs .*axis 5"),
    "fan_in of bias": (lambda: planned(rx.fan_in(), (6,)), r"leaf 'w': fan_in needs .*2 axes"),
}

TIMES = {
    "period 0": (lambda: rx.schedules.every(0), r"every: period must be .*at least 1, got 0"),
    "period 1.5": (lambda: rx.schedules.every(1.5), r"every: period must be .*got 1.5"),
    "period word": (lambda: rx.schedules.every("5"), r"every: period must be .*got '5'"),
    "period giant": (lambda: rx.schedules.every(2**31), r"every: period must be .*got 2147483648"),
    "start -1": (lambda: rx.schedules.every(1, start=-1), r"every: start must be a step, 0 or later, got -1"),
    "start word": (lambda: rx.schedules.every(1, start="0"), r"every: start must be .*got '0'"),
    "start None": (lambda: rx.schedules.every(1, start=None), r"every: start must be .*got None"),
    "stop early": (lambda: rx.schedules.every(1, start=5, stop=2), r"every: stop must not be before start=5, got 2"),
    "stop nan": (lambda: rx.schedules.every(1, stop=math.nan), r"every: stop .*got nan"),
    "uncounted": (lambda: rx.schedules.uncounted(1, stop=7.5), r"uncounted: stop must be a whole step, got 7.5"),
    "cosine fraction": (lambda: rx.schedules.cosine("x", 10), r"cosine: fraction must be in \[0, 1\], got 'x'"),
    "cosine stop": (lambda: rx.schedules.cosine(0.3, -1), r"cosine: stop must be .*got -1"),
    "power fraction": (lambda: rx.schedules.inverse_power(2.0, 10), r"inverse_power: fraction .*got 2.0"),
    "power stop": (lambda: rx.schedules.inverse_power(0.3, 0), r"inverse_power: stop must be .*got 0"),
    "power power": (lambda: rx.schedules.inverse_power(0.3, 10, "x"), r"inverse_power: power must be above 0, got 'x'"),
    "cubic stop": (lambda: rx.schedules.cubic(0.0, 0.9, 5, 5), r"cubic: stop must be after start=5, got 5"),
    "cubic final": (lambda: rx.schedules.cubic(0.0, 2.0, 0, 5), r"cubic: final is a sparsity, .*got 2.0"),
    "cubic start": (lambda: rx.schedules.cubic(0.0, 0.5, None, 5), r"cubic: start must be a step, got None"),
    "stretch 0": (lambda: rx.schedules.stretch(CONSTANT, 0), r"stretch: factor must be above 0, got 0"),
    "stretch word": (lambda: rx.schedules.stretch(CONSTANT, "x"), r"stretch: factor must be above 0, got 'x'"),
    "stretch number": (lambda: rx.schedules.stretch(0.3, 2), r"stretch: schedule must be a function, got 0.3"),
}

TRAINING = {
    "inner a name": (lambda: rx.sparsify("adam", rx.static(PLAN), key=KEY), r"sparsify: .*optax.adam.*, got 'adam'"),
    "inner not called": (lambda: rx.sparsify(optax.sgd, rx.static(PLAN), key=KEY), r"sparsify: the inner .*function"),
    "algorithm a plan": (lambda: rx.sparsify(SGD, PLAN, key=KEY), r"sparsify: algorithm must be one such .*got dict"),
    "algorithm a name": (lambda: rx.sparsify(SGD, "rigl", key=KEY), r"sparsify: algorithm must be .*got 'rigl'"),
    "algorithm function": (lambda: rx.sparsify(SGD, rx.rigl, key=KEY), r"sparsify: algorithm must be .*got function"),
    "key a seed": (lambda: rx.sparsify(SGD, rx.static(PLAN), key=0), r"sparsify: key must be a PRNG key .*got 0"),
    "key floats": (lambda: rx.sparsify(SGD, rx.static(PLAN), key=np.ones(2)), r"sparsify: key .*got float64\[2\]"),
    "key of 3": (lambda: rx.sparsify(SGD, rx.static(PLAN), key=np.zeros(3, np.uint32)), r"sparsify: key .*uint32\[3\]"),
    "two keys": (lambda: rx.sparsify(SGD, rx.static(PLAN), key=jax.random.split(KEY)), r"sparsify: .*single.*\[2\]"),
    "other params": (lambda: jax.eval_shape(TX.init, W), r"plan: params have no leaf 'a/kernel'; they have w"),
    "other shape": (
        lambda: jax.eval_shape(TX.init, PARAMS | {"b": W}),
        r"plan: params have no leaf 'b/kernel'; they have a/bias, a/kernel, b/w",
    ),
    "params None": (lambda: TX.init(None), r"plan: params have no leaf 'a/kernel'"),
    "no params in update": (lambda: TX.update(PARAMS, STATE), r"sparsify: update needs the params: tx.update\(grads"),
    "no state": (lambda: TX.update(PARAMS, None, PARAMS), r"sparsify: the state must be what tx.init gives, got None"),
    "state of sgd": (lambda: TX.update(PARAMS, SGD.init(W), PARAMS), r"sparsify: the state must be .*got tuple"),
    "rewire a word": (lambda: update(PARAMS, rewire="yes"), r"sparsify: rewire must be True, False or None.*'yes'"),
    "grads with more": (lambda: update(PARAMS | {"c": np.ones(3, F)}), r"sparsify: .*parallel.*leaf 'c' too many"),
    "grads with less": (lambda: update({"a": PARAMS["a"]}), r"sparsify: .*parallel to params; leaf 'b/kernel' is miss"),
    "grads transposed": (
        lambda: update(PARAMS | {"b": {"kernel": np.ones((2, 4), F)}}),
        r"sparsify: the gradient of leaf 'b/kernel' must have shape \(4, 2\), got \(2, 4\)",
    ),
    "grads None": (lambda: update(None), r"sparsify: gradients must be parallel to params; leaf 'a/bias' is missing"),
    "grads with None": (lambda: update(PARAMS | {"c": None}), r"sparsify: gradients must be parallel to params"),
    "grads whole": (
        lambda: update(jax.tree.map(lambda p: p.astype(np.int32), PARAMS)),
        r"sparsify: the gradient of leaf 'a/bias' must be real floating-point, got int32",
    ),
    "nested": (
        lambda: jax.eval_shape(rx.sparsify(TX, rx.static(PLAN), key=KEY).init, PARAMS),
        r"sparsify: the inner optimizer must not contain another sparsify",
    ),
    "lbfgs": (
        lambda: jax.eval_shape(rx.sparsify(optax.lbfgs(), rx.static(PLAN), key=KEY).init, PARAMS),
        r"sparsify: .*inner optimizer keeps",
    ),
    "apply_masks shape": (
        lambda: rx.apply_masks(W, SMALL),
        r"apply_masks: .*leaf 'w' must be bool\[4, 4\], got bool\[2",
    ),
    "apply_masks row": (lambda: rx.apply_masks(W, {"w": EYE[:1]}), r"apply_masks: .*bool\[4, 4\], got bool\[1, 4\]"),
    "apply_masks floats": (lambda: rx.apply_masks(W, {"w": ONES}), r"apply_masks: .*bool\[4, 4\], got float32\[4, 4\]"),
    "apply_masks other": (lambda: rx.apply_masks(W, OTHER), r"apply_masks: masks hold a leaf 'v' that params do not"),
    "apply_masks typo": (lambda: rx.apply_masks(PARAMS, {"a": {"kernle": EYE}}), r"did you mean 'a/kernel'\?"),
    "apply_masks None": (lambda: rx.apply_masks(W, None), r"apply_masks: masks must be a tree parallel .*got None"),
    "apply_masks word": (
        lambda: rx.apply_masks(W, {"w": "x"}),
        r"apply_masks: .*leaf 'w' must be bool\[4, 4\], got 'x'",
    ),
    **{
        f"{who} in patterns": (call, rf"^{who}: the state of a packed run holds no masks; .*masks_of\(packed\)")
        for who, call in {
            "apply_masks": lambda: rx.apply_masks(W, TRAINED.masks),
            "straight_through": lambda: rx.straight_through(W, TRAINED.masks),
            "pack": lambda: rx.pack(W, TRAINED.masks),
            "sparsity": lambda: rx.sparsity(TRAINED.masks),
            "check_masked": lambda: rx.check_masked(W, TRAINED.masks),
            "replace_masks": lambda: rx.replace_masks(SGD, TRAINED, W, M),
        }.items()
    },
    "straight_through": (lambda: rx.straight_through(W, SMALL), r"straight_through: .*leaf 'w' .*got bool\[2, 2\]"),
    "check_masked None": (lambda: rx.check_masked(W, None), r"check_masked: there is no mask .*got a tree without"),
    "check_masked shape": (lambda: rx.check_masked(W, SMALL), r"check_masked: .*leaf 'w' must be bool\[4, 4\], got"),
    "check_masked other": (lambda: rx.check_masked(W, OTHER), r"check_masked: params have no leaf 'v'"),
    "check_masked stray": (lambda: rx.check_masked(W, M), r"check_masked: leaf 'w' must be 0 off its mask, got 12"),
    "check_masked jit": (
        lambda: jax.eval_shape(lambda w: rx.check_masked(w, M), W),
        r"check_masked: leaf 'w' is traced",
    ),
    "sparsity word": (lambda: rx.sparsity({"w": "x"}), r"sparsity: expected a tree of arrays, got a leaf 'x'"),
    "rescale axis": (lambda: rx.rescale_init(W, M, axis=5), r"rescale_init: axis must be one of leaf 'w'.*got 5"),
    "rescale other": (lambda: rx.rescale_init(W, OTHER), r"rescale_init: masks hold a leaf 'v'"),
    "b1 of 1": (lambda: rx.per_weight_adam(0.1, b1=1.0), r"per_weight_adam: b1 is a decay rate, in \[0, 1\), got 1.0"),
    "b2 word": (lambda: rx.per_weight_adam(0.1, b2="x"), r"per_weight_adam: b2 is a decay rate.*got 'x'"),
    "warmup -1": (lambda: rx.per_weight_adam(0.1, warmup=-1), r"per_weight_adam: warmup must be .*got -1"),
    "warmup nan": (lambda: rx.per_weight_adam(0.1, warmup=math.nan), r"per_weight_adam: warmup must be .*got nan"),
    "eps -1": (lambda: rx.per_weight_adam(0.1, eps=-1), r"per_weight_adam: eps must be at least 0, got -1"),
    "rate None": (lambda: rx.per_weight_adam(None), r"per_weight_adam: learning_rate must be .*got None"),
    "masters int": (lambda: rx.with_masters(SGD, np.int32), r"with_masters: dtype must be a floating-point type"),
    "masters float33": (lambda: rx.with_masters(SGD, "float33"), r"with_masters: dtype must be .*got 'float33'"),
    "masters inner": (lambda: rx.with_masters("sgd"), r"with_masters: the inner optimizer must be .*got 'sgd'"),
    "average decay": (lambda: rx.sparse_average(W, W, M, 1.0), r"sparse_average: decay must be in \[0, 1\), got 1.0"),
    "average other": (lambda: rx.sparse_average(OTHER, W, M), r"sparse_average: .*parallel to params.*leaf 'w'"),
    "surgery leaf": (lambda: rx.replace_masks(SGD, STATE, PARAMS, W), r"replace_masks: masks must be of a/k.*of w"),
    "surgery floats": (
        lambda: rx.replace_masks(SGD, STATE, PARAMS, MASKS | {"b": PARAMS["b"]}),
        r"replace_masks: the mask of leaf 'b/kernel' must be bool\[4, 2\], got float32\[4, 2\]",
    ),
    "surgery optimizer": (
        lambda: rx.replace_masks(optax.adam(0.1), STATE, PARAMS, MASKS),
        r"replace_masks: inner must be the optimizer that sparsify was given.*state of another",
    ),
    "surgery state": (
        lambda: rx.replace_masks(SGD, None, PARAMS, MASKS),
        r"replace_masks: the state must be .*got None",
    ),
    "growth 0": (lambda: rx.accumulate_growth(rx.rigl(PLAN), 0), r"accumulate_growth: n must be .*at least 1, got 0"),
    "growth plan": (lambda: rx.accumulate_growth(PLAN, 3), r"accumulate_growth: algorithm must be .*got dict"),
    "langevin l1": (lambda: rx.langevin(0.1, l1=-1, key=KEY), r"langevin: l1 must be at least 0, got -1"),
    "langevin heat": (lambda: rx.langevin(0.1, temperature="x", key=KEY), r"langevin: temperature must be .*got 'x'"),
    "langevin key": (lambda: rx.langevin(0.1, key=0), r"langevin: key must be a PRNG key .*got 0"),
    "langevin rate": (lambda: rx.langevin("x", key=KEY), r"langevin: learning_rate must be .*got 'x'"),
}
