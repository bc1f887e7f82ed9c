"""Damaged patterns are errors, never reads or writes outside of their arrays; arithmetic on patterns is refused."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rigl_jax as rx
from rigl_jax import native
from rigl_jax.execution import Packed, kernels, masks_of, packed_training
from tests.errors import refused
from tests.execution import damage


@pytest.mark.skipif(native.library() is None, reason=native.reason())
def test_native_kernels_refuse_every_damage():
    """In a process of its own, which a crash would end."""
    command = [sys.executable, "-X", "faulthandler", damage.__file__]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    wrong = {case: what for case, what in found.items() if (what == "no error") != case.endswith("sound")}
    assert len(found) > 400
    assert not wrong


def test_plain_kernels_give_no_number_for_sums():
    """They index with XLA, which never leaves an array: here, not in a process of their own."""
    for name, pattern, x, dy, product in damage.cases("jax"):
        if name in ("matrix", "runs", "conv"):
            values, doubled = jnp.ones(pattern.nnz), jax.tree.map(jnp.add, pattern, pattern)
            for kind, call in damage.products(product, x, dy).items():
                assert damage.outcome(lambda c=call, v=values, p=pattern: c(v, p)) == "no error"
                assert kind == "values gradient" or damage.outcome(lambda c=call, v=values, p=doubled: c(v, p)) == "NaN"


def chosen(name, mask):
    return {
        "matrix": lambda: kernels.make_pattern(mask),
        "runs": lambda: kernels.make_pattern(mask, height=4),
        "tiles": lambda: kernels.make_block_pattern(mask, (4, 4)),
        "padded tiles": lambda: kernels.make_block_pattern(mask, (4, 4), capacity=6),
        "n of m": lambda: kernels.make_nm_pattern(mask, 2, 4),
        "conv": lambda: kernels.make_pattern(mask),
        "folded": lambda: kernels.Folded(kernels.make_pattern(mask.reshape(8, 16)), mask.shape, 1),
    }[name]()


def packed_of(name):
    tiles = np.kron(np.array([[1, 0, 0, 1], [0, 1, 0, 1]], bool), np.ones((4, 4), bool))
    mask = {
        "tiles": tiles,
        "padded tiles": tiles,
        "runs": tiles,
        "n of m": np.tile(np.array([[1], [0], [0], [1]], bool), (2, 16)),
        "conv": np.random.default_rng(0).random((3, 3, 2, 4)) < 0.5,
        "folded": np.random.default_rng(0).random((8, 4, 4)) < 0.5,
    }.get(name, np.random.default_rng(0).random((8, 16)) < 0.5)
    return rx.pack({name: jnp.ones(mask.shape)}, {name: jnp.asarray(mask)}, choose=chosen)


KINDS = ["matrix", "runs", "tiles", "padded tiles", "n of m", "conv", "folded"]


@pytest.mark.parametrize("kind", KINDS)
def test_arithmetic_on_packed_is_refused_and_on_values_is_not(kind):
    packed = packed_of(kind)
    for changed in (
        jax.tree.map(jnp.add, packed, packed),
        jax.tree.map(lambda a: a / 2, packed),
        jax.tree.map(lambda a: a[:-1], packed),
        packed._replace(values=jax.tree.map(lambda v: v[:-1], packed.values)),
    ):
        for function in (rx.unpack, masks_of):
            with refused(kind):
                function(changed)
    doubled = packed._replace(values=jax.tree.map(jnp.add, packed.values, packed.values))
    np.testing.assert_array_equal(rx.unpack(doubled)[kind], 2 * masks_of(packed)[kind])


@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_of_patterns_gives_no_number_under_jit(kind):
    packed = packed_of(kind)
    summed = jax.tree.map(jnp.add, packed, packed)
    assert jnp.isnan(jax.jit(rx.unpack)(summed)[kind]).any()
    assert not jnp.isnan(jax.jit(rx.unpack)(packed)[kind]).any()


@pytest.mark.parametrize("kind", KINDS)
def test_every_array_of_a_pattern_is_looked_at(kind):
    packed = packed_of(kind)
    leaves, structure = jax.tree.flatten(packed.patterns)
    for k, leaf in enumerate(leaves):
        if leaf.size < 2:
            continue
        swapped = np.array(leaf)
        swapped.flat[[0, -1]] = swapped.flat[[-1, 0]]
        if (swapped == leaf).all():
            swapped.flat[0] += 1
        changed = Packed(packed.values, jax.tree.unflatten(structure, [*leaves[:k], swapped, *leaves[k + 1 :]]))
        with refused(kind):
            rx.unpack(changed)


def test_training_refuses_a_sum_of_packed_weights():
    params = {"w": jnp.ones((16, 16))}
    training = packed_training(optax.sgd(0.1), rx.rigl(rx.make_plan(params, 0.8)), key=jax.random.key(0))
    packed, state = training.init(params)
    summed = jax.tree.map(jnp.add, packed, packed)
    for call in (training.update, training.rewire):
        with refused("w"):
            call(packed.values if call is training.update else params, state, summed)
    for changed in (jax.tree.map(lambda a: a / 2, packed), jax.tree.map(lambda a: a[:-1], packed)):
        with refused("w"):
            jax.eval_shape(training.update, changed.values, state, changed)
    with refused("patterns"):
        training.update(packed.values, state, packed._replace(patterns=None))


@pytest.mark.parametrize(
    ("entries", "shape", "options", "named"),
    [
        ([0, 12], (3, 4), {}, "entries"),
        ([-1, 3], (3, 4), {}, "entries"),
        ([3, 1], (3, 4), {}, "entries"),
        ([1, 1], (3, 4), {}, "entries"),
        ([0.5, 1.0], (3, 4), {}, "entries"),
        ([[0, 1]], (3, 4), {}, "entries"),
        ([0, 3], (3, 4), {"height": 4}, "entries"),
        ([0], (3, 4), {"height": 3}, "height"),
        ([0], (3, 3, 2, 4), {"height": 4}, "height"),
        ([0], (3, 6), {"height": 4}, "out"),
        ([0], (3,), {}, "shape"),
        ([0], (3, -4), {}, "shape"),
        ([], (0, 3, 4, 5), {}, "shape"),
        ([], (3, 0, 4, 5), {}, "shape"),
        ([0], (3, 1 << 32), {}, "shape"),
        ([0], (3, 4), {"block": 0}, "block"),
        ([0], (3, 4), {"block": -1}, "block"),
        ([0], (3, 4), {"block": 1 << 17}, "block"),
        ([0], (3, 3, 2, 4), {"block": 10}, "block"),
        ([0], (1 << 20, 1 << 20), {"block": 1}, "segments"),
    ],
)
def test_positions_are_checked(entries, shape, options, named):
    with refused("make_pattern_at", named):
        kernels.make_pattern_at(np.array(entries, None if entries else int), shape, **options)


def test_a_folded_pattern_of_another_matrix_is_refused():
    pattern = packed_of("folded").patterns["folded"]
    with refused("Folded"):
        kernels.scatter(jnp.ones(pattern.nnz), dataclasses.replace(pattern, split=2))
    moved = kernels.Moved(packed_of("conv").patterns["conv"], (4, 2, 3, 3), (2, 3, 1, 0))
    kernels.check("check", moved, content=True)
    for change in ({"axes": (3, 2, 0, 1)}, {"axes": (2, 2, 1, 0)}, {"shape": (2, 4, 3, 3)}):
        with refused("Moved"):
            kernels.scatter(jnp.ones(moved.nnz), dataclasses.replace(moved, **change))


@pytest.mark.parametrize("shape", [(3, 4), (3, 3, 0, 5), (3, 3, 4, 0), (0, 4)])
@pytest.mark.parametrize("entries", [[], np.zeros(0, int)])
def test_no_positions_make_an_empty_pattern(shape, entries):
    assert kernels.make_pattern_at(entries, shape).nnz == 0


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("make_pattern_at: entries", lambda x: kernels.make_pattern_at(x.astype(int)[0], (4, 4))),
        ("make_pattern: mask", kernels.make_pattern),
        ("make_pattern: mask", lambda x: kernels.make_pattern([x[0], x[1]])),
        ("make_block_pattern: mask", lambda x: kernels.make_block_pattern(x, (2, 2))),
        ("make_nm_pattern: mask", lambda x: kernels.make_nm_pattern(x, 1, 2)),
        ("rebuild: mask", lambda x: kernels.rebuild(kernels.make_pattern(np.eye(4, dtype=bool)), x)),
    ],
)
def test_patterns_are_not_made_of_what_jit_traces(name, function):
    with refused(*name.split(": ")):
        jax.eval_shape(function, jnp.eye(4, dtype=bool))
