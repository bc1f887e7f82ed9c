"""More wrong calls, of selection, counting, packed weights, kernels and methods; see `bad_input`."""

import math

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import rigl_jax as rx
from rigl_jax import execution, topology
from rigl_jax.execution import kernels
from rigl_jax.execution.compact import compact
from rigl_jax.execution.export import save_safetensors
from tests.bad_input import EYE, KEY, ONES, OTHER, PACKED, PARAMS, PLAN, SGD, SMALL, TRAINED, F, M, U, W, X, planned

AT = kernels.make_pattern(EYE)
TWO = Mesh(np.asarray(jax.devices()[:2]), ("data",))
KERNEL = kernels.make_pattern(np.ones((2, 2, 2, 1), bool))


def product(params, x):
    return x @ params["w"]


def image(shape=(1, 4, 4, 2), **options):
    return kernels.conv(np.ones(shape, F), np.ones(8, F), KERNEL, **options)


COMPUTE = {
    "select ints": (lambda: topology.select(np.arange(4), 2), r"select: scores must be .*float32.*got int64"),
    "select axis": (lambda: topology.select(ONES, 1, axes=(2,)), r"select: axes must be a tuple .*got \(2,\)"),
    "select among": (
        lambda: topology.select(ONES, 1, among=EYE[0]),
        r"select: among must be .*\(4, 4\), got bool\[4\]",
    ),
    "jointly mixed": (
        lambda: topology.select_jointly([ONES, ONES.astype(np.float16)], 2),
        r"select_jointly: scores must be arrays of one dtype.*got float16, float32",
    ),
    "jointly nothing": (lambda: topology.select_jointly([], 2), r"select_jointly: .*one dtype.*got none"),
    "jointly among": (
        lambda: topology.select_jointly([ONES], 2, among=[]),
        r"select_jointly: .*got float32 and 0 for 1",
    ),
    "prune name": (
        lambda: topology.prune("block", ONES, 2),
        r"prune: structure must be .*rx.unstructured\(\), got 'bl",
    ),
    "prune function": (lambda: topology.prune(rx.unstructured, ONES, 2), r"prune: structure must be .*got <function"),
    "prune among": (
        lambda: topology.prune(U, ONES, 2, among=EYE[:2]),
        r"prune: among must be .*\(4, 4\), got bool\[2, 4\]",
    ),
    "rewire mask": (
        lambda: topology.rewire(U, EYE, ONES[:2], ONES, 1),
        r"rewire: drop must be .*\(4, 4\), got float32\[2, 4\]",
    ),
    "rewire grow": (lambda: topology.rewire(U, EYE, ONES, 3, 1), r"rewire: grow must be .*got 3"),
    "masks of params": (lambda: topology.random_masks(PARAMS, KEY, PARAMS), r"plan must be what make_plan gives"),
    "jointly fan_in": (
        lambda: topology.prune_jointly(planned(rx.fan_in(), (4, 4)), W),
        r"prune_jointly: leaf 'w' must be unstructured to compete with others, got structure 'fan_in'",
    ),
    "shares": (
        lambda: topology.redistribute(3, np.ones(1), np.ones(2)),
        r"redistribute: .*one shape .*\(1,\) and \(2,\)",
    ),
    "flops masks": (
        lambda: rx.flops(product, W, X, masks=OTHER),
        r"flops: masks hold a leaf 'v' that params do not have",
    ),
    "flops shape": (
        lambda: rx.flops(product, W, X, masks=SMALL),
        r"flops: the mask of leaf 'w' must be bool\[4, 4\], got bool\[2, 2\]",
    ),
    "flops apply": (lambda: rx.flops("f", W, X), r"flops: apply must be a function, got 'f'"),
    "flops trips": (lambda: rx.flops(product, W, X, while_trips="x"), r"flops: while_trips must be .*got 'x'"),
    "cost steps": (lambda: rx.training_cost(rx.static(PLAN), 0.1, 1.0, 0), r"training_cost: steps must be .*got 0"),
    "cost longest": (
        lambda: rx.training_cost(rx.static(PLAN), 0.1, 1.0, 10**12),
        r"training_cost: steps must be .*below 2\*\*31, got 1000000000000",
    ),
    "cost sparse": (lambda: rx.training_cost(rx.static(PLAN), "x", 1.0, 3), r"training_cost: sparse must be .*got 'x'"),
    "cost lengths": (
        lambda: rx.training_cost(rx.static(PLAN), [0.1], 1.0, 3),
        r"sparse must be .*\[3\] of them, got \[0.1\]",
    ),
    "cost dense": (lambda: rx.training_cost(rx.static(PLAN), 0.1, None, 3), r"training_cost: dense must be .*got None"),
    "cost algorithm": (lambda: rx.training_cost("rigl", 0.1, 1.0, 3), r"training_cost: algorithm must be .*got 'rigl'"),
    "micronet flops": (lambda: rx.micronet_flops(3), r"micronet_flops: expected what rx.flops gives, got 3"),
    "micronet bits": (lambda: rx.micronet_bits({"w": (4, 4)}, {"w": 2.0}), r"micronet_bits: density of 'w' .*got 2.0"),
    "gate key": (lambda: rx.gates.hard_concrete(0, ONES), r"hard_concrete: key must be a PRNG key .*got 0"),
    "gate number": (lambda: rx.gates.hard_concrete(KEY, 1.0), r"hard_concrete: log_alpha must be .*got 1.0"),
    "dropout shapes": (
        lambda: rx.gates.log_alpha(ONES, ONES[:2]),
        r"log_alpha: log_sigma2 must be .*\(4, 4\), got float32\[2",
    ),
    "dropout product": (
        lambda: rx.gates.variational_matmul(KEY, ONES[:, :3], ONES, ONES),
        r"variational_matmul: x must be \[batch, in\] .*got \(4, 3\) and \(4, 4\)",
    ),
    "sparsity of packed": (
        lambda: rx.sparsity(rx.pack(W, M)),
        r"sparsity: expected weights or masks, got packed weights; ask .*masks_of\(packed\)",
    ),
    "pack other": (lambda: rx.pack(W, OTHER), r"pack: masks hold a leaf 'v' that params do not have"),
    "pack None": (lambda: rx.pack(W, None), r"pack: masks must be a tree parallel to params"),
    "pack shape": (lambda: rx.pack(W, SMALL), r"pack: the mask of leaf 'w' must be bool\[4, 4\], got bool\[2, 2\]"),
    "pack floats": (lambda: rx.pack(W, W), r"pack: the mask of leaf 'w' must be bool\[4, 4\], got float32"),
    "pack in jit": (lambda: jax.eval_shape(lambda m: rx.pack(W, m), M), r"pack: the mask of leaf 'w' is traced"),
    "pack kernel name": (lambda: rx.pack(W, M, choose="best"), r"pack: choose must be a function, got 'best'"),
    "pack kernel 3": (
        lambda: rx.pack(W, M, choose=lambda name, mask: 3),
        r"pack: choose must give a pattern .*'w'.*got 3",
    ),
    "unpack params": (lambda: rx.unpack(W), r"unpack: expected packed weights, from rx.pack, got dict"),
    "masks_of None": (lambda: execution.masks_of(None), r"masks_of: expected packed weights.*got None"),
    "run a name": (lambda: rx.run_packed("f"), r"run_packed: apply must be a function, got 'f'"),
    "run over weights": (
        lambda: rx.run_packed(product, batch=NamedSharding(TWO, PartitionSpec(None, "data"))),
        r"run_packed: batch must be .*first axis is split over one mesh axis.*got NamedSharding",
    ),
    "run over a name": (lambda: rx.run_packed(product, batch="data"), r"run_packed: batch must be .*got 'data'"),
    "packed split": (
        lambda: rx.packed_training(SGD, rx.rigl(PLAN), key=KEY, sharding=NamedSharding(TWO, PartitionSpec("data"))),
        r"packed_training: sharding must lay arrays whole on each device, got NamedSharding",
    ),
    "packed ste": (lambda: rx.packed_training(SGD, rx.ste(PLAN), key=KEY), r"packed_training: .*train it masked"),
    "packed snfs": (lambda: rx.packed_training(SGD, rx.snfs(PLAN), key=KEY), r"packed_training: .*train it masked"),
    "packed name": (lambda: rx.packed_training(SGD, "rigl", key=KEY), r"packed_training: algorithm must .*got 'rigl'"),
    "packed inner": (lambda: rx.packed_training("sgd", rx.rigl(PLAN), key=KEY), r"packed_training: the inner .*'sgd'"),
    "packed key": (lambda: rx.packed_training(SGD, rx.rigl(PLAN), key=3), r"sparsify: key must be .*got 3"),
    "stream share": (
        lambda: execution.rewire_streamed(SGD, {}, TRAINED, PACKED, 2.0),
        r"rewire_streamed: share must be in \[0, 1\], got 2.0",
    ),
    "stream factors": (
        lambda: execution.rewire_streamed(SGD, {}, TRAINED, PACKED, 0.3),
        r"rewire_streamed: leaf 'w' has no gradient factors",
    ),
    "stream dense": (lambda: execution.rewire_streamed(SGD, {}, TRAINED, W, 0.3), r"rewire_streamed: expected packed"),
    "pattern of 0": (lambda: execution.random_pattern(KEY, (4, 4), 0), r"random_pattern: n_active .*1 to 16, got 0"),
    "pattern word": (lambda: execution.random_pattern(KEY, (4, 4), "3"), r"random_pattern: n_active .*got '3'"),
    "pattern shape": (lambda: execution.random_pattern(KEY, (4,), 3), r"random_pattern: shape must be .*got \(4,\)"),
    "pattern key": (lambda: execution.random_pattern(0, (4, 4), 3), r"random_pattern: key must be .*got 0"),
    "explain params": (lambda: execution.explain(W), r"explain: expected packed weights.*got dict"),
    "explain batch": (lambda: execution.explain(PACKED, batch=0), r"explain: batch must be .*at least 1, got 0"),
    "fastest repeats": (lambda: execution.fastest(repeats=-1), r"fastest: repeats must be .*got -1"),
    "kernel of bias": (lambda: kernels.make_pattern(EYE[0]), r"make_pattern: mask must have shape .*got shape \(4,\)"),
    "kernel height": (lambda: kernels.make_pattern(EYE, height=3), r"make_pattern: height must be one of .*got 3"),
    "kernel rows": (lambda: kernels.matmul(ONES[:, :3], ONES[0], AT), r"matmul: x must have shape .*4\), got \(4, 3\)"),
    "kernel values": (lambda: kernels.matmul(ONES, np.ones(5, F), AT), r"matmul: values must have shape \(4,\), got"),
    "kernel level": (lambda: kernels.matmul(ONES, ONES[0], AT, level="axv"), r"level must be one of .*got 'axv'"),
    "conv of matrix": (
        lambda: kernels.conv(np.ones((1, 4, 4, 4), F), ONES[0], AT),
        r"conv: pattern must be of a kernel .*got one of shape",
    ),
    "conv padding": (lambda: image(padding="SAMEE"), r"conv: padding must be 'SAME', 'VALID' .*got 'SAMEE'"),
    "conv stride": (lambda: image(strides=2), r"conv: strides must be a pair .*got 2"),
    "2:4 of dense": (lambda: kernels.make_nm_pattern(ONES > 0, 2, 4), r"make_nm_pattern: mask must have 2 of every 4"),
    "tiles of 3": (
        lambda: kernels.make_block_pattern(EYE, (3, 3)),
        r"make_block_pattern: .*whole tiles \(3, 3\), got \(4",
    ),
    "gather": (lambda: kernels.gather(ONES[:3], AT), r"gather: dense must have .*\(4, 4\), got \(3, 4\)"),
    "scatter": (lambda: kernels.scatter(np.ones(3, F), AT), r"scatter: values must have shape \(4,\), got \(3,\)"),
    "compact": (lambda: compact(product, W, OTHER, X), r"compact: masks hold a leaf 'v' that params do not have"),
    "save params": (lambda: save_safetensors("net.safetensors", W), r"save_safetensors: expected packed weights"),
}

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


def _refused(name, message, **options):
    return f"{name} {options}", (lambda: made(name, **options), message)


METHODS = dict(
    [
        *(
            (f"{name} of params", (lambda name=name: made(name, PARAMS), r"plan must be .*got dict"))
            for name in rx.ALGORITHMS
        ),
        *(
            (f"{name} of None", (lambda name=name: made(name, None), r"plan must be .*got None"))
            for name in rx.ALGORITHMS
        ),
        _refused("rigl", r"every: period must be .*got 0", period=0),
        _refused("rigl", r"every: stop must be a step .*got 'x'", stop="x"),
        _refused("rigl", r"every: start must be .*got 1.5", start=1.5),
        _refused("rigl", r"rigl: fraction is the share .*got 1.5", fraction=1.5),
        _refused("rigl", r"rigl: drop must be a function, got 'magnitude'", drop="magnitude"),
        _refused("rigl", r"rigl: grow must be a function, got None", grow=None),
        _refused("rigl", r"rigl: grow_values must be a function, got 0.0", grow_values=0.0),
        _refused("rigl", r"rigl: count_skipped=False needs skip_step=True", count_skipped=False, skip_step=False),
        _refused("set", r"rigl: fraction is the share .*got nan", fraction=math.nan),
        _refused("itop", r"itop: stop must not be before start=9.*got 2", start=9, stop=2),
        _refused("mest", r"mest: gradient_weight must be at least 0, got -1", gradient_weight=-1),
        _refused("snfs", r"snfs: momentum must be in \[0, 1\), got 1", momentum=1),
        _refused("snfs", r"snfs: drop must be a function, got 3", drop=3),
        _refused("dsr", r"dsr: threshold must be above 0 and finite.*got inf, 0.01", threshold=math.inf),
        _refused("dsr", r"dsr: .*target in \(0, 1\).*got 0.001, '1%' and 0.1", target="1%"),
        _refused("dsr", r"dsr: .*tolerance in \[0, 1\), got .* and 1", tolerance=1),
        _refused("deep_r", r"every: start must be .*got None", start=None),
        _refused("granet", r"granet: period must be .*got 0", period=0),
        _refused("granet", r"granet: prune_stop must be .*stop=100, got 200", prune_stop=200),
        _refused("granet", r"uniform|erk: sparsity .*got 2", initial_sparsity=2),
        _refused("srigl", r"srigl: min_salient is a share .*got -0.1", min_salient=-0.1),
        _refused("srigl", r"srigl: never_ablate.*did you mean 'a/kernel'", never_ablate=("a/kernle",)),
        _refused("srigl", r"srigl: never_ablate must be regular expressions, got 3", never_ablate=3),
        _refused("snip", r"snip: start must be a step.*got -1", start=-1),
        _refused("snip", r"snip: min_active .*plan's total of 13 .*got 99", jointly=True, min_active=99),
        _refused("snip", r"snip: loss must be a function of the params, got 'mean'", loss="mean"),
        _refused("grasp", r"grasp: loss must be a function of the params, got None", loss=None),
        _refused("synflow", r"synflow: rounds must be .*got 0", rounds=0),
        _refused("gmp", r"gmp: stop must be after start=0, got 0", stop=0),
        _refused("gmp", r"gmp: initial is a sparsity, .*got 1", initial=1),
        _refused("ste", r"every: period must be .*got 0", period=0),
        _refused("ste", r"ste: score must be a function, got 'x'", score="x"),
        _refused("top_kast", r"top_kast: extra is a share .*got -1", extra=-1),
        _refused("ac_dc", r"ac_dc: score must be a function, got None", score=None),
    ]
)
