"""Checkpoints come back as they were, on any number of devices; a damaged one is noticed and passed over."""

import re
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments import resuming
from experiments.io import checkpoint, digests
from tests.errors import refused
from tests.experiments.runs import assert_equal


def whole(count):
    return NamedSharding(Mesh(np.asarray(jax.devices()[:count]), ("data",)), PartitionSpec())


def state(step, count=1):
    tree = {
        "w": jnp.arange(3000.0).reshape(60, 50) + step,
        "half": jnp.full((3,), step, jnp.bfloat16),
        "mask": {"kernel": jnp.arange(8) % (step + 2) == 0, "bias": None},
        "key": jax.random.key(step),
        "step": jnp.int32(step),
    }
    return jax.device_put(tree, whole(count))


def abstract(count=1):
    sharding = whole(count)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state(0))


def opened(path, said=None, keep=2):
    return checkpoint.open_checkpoints(path, keep=keep, warn=(said if said is not None else []).append)


def filled(path, accuracies, keep=2):
    store = opened(path, keep=keep)
    for step, accuracy in enumerate(accuracies, start=1):
        store.save(step, state(step), {"seconds": float(step)}, accuracy)
    store.close()


@pytest.mark.parametrize("count", [1, 8])
def test_comes_back_bit_for_bit_where_it_is_wanted(count, tmp_path):
    filled(tmp_path / "c", [0.5])
    store = opened(tmp_path / "c")
    found, facts = store.restore(abstract(count))
    store.close()
    assert_equal(found, state(1))
    assert facts == {"seconds": 1.0}
    assert all(leaf.sharding == whole(count) for leaf in jax.tree.leaves(found))


def test_a_typed_key_is_read_where_a_state_now_holds_its_data(tmp_path):
    old = state(1) | {"key": jax.device_put(jax.random.key(7), whole(1))}
    store = opened(tmp_path / "c")
    store.save(1, old, {}, None)
    store.close()
    now = old | {"key": jax.random.key_data(old["key"])}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole(1)), now)
    store = opened(tmp_path / "c")
    found, _ = store.restore(shapes)
    store.close()
    assert_equal(found, now)


def test_nothing_there_is_none(tmp_path):
    store = opened(tmp_path / "c")
    assert store.restore(abstract()) is None
    store.close()


def test_the_latest_and_the_best_are_kept_also_over_a_restart(tmp_path):
    filled(tmp_path / "c", [0.9, 0.1, None, 0.2])
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"1", "3", "4"}
    store = opened(tmp_path / "c")
    store.save(5, state(5), {}, 0.3)
    store.close()
    assert {p.name for p in (tmp_path / "c").iterdir()} == {"1", "4", "5"}


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    store = opened(tmp_path / "c")
    overwrite = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)
    now = {"w": jnp.arange(2.0**16)}
    for step in range(1, 4):
        expected = np.asarray(now["w"]).copy()
        store.save(step, now, {}, None)
        now = overwrite(now)
    store.close()
    store = opened(tmp_path / "c")
    shape = {"w": jax.ShapeDtypeStruct((2**16,), jnp.float32, sharding=whole(1))}
    found, _ = store.restore(shape)
    store.close()
    np.testing.assert_array_equal(np.asarray(found["w"]), expected)


def largest(path):
    return max((p for p in path.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [cut, flip, lambda file: file.unlink()], ids=["cut", "flipped bit", "missing"])
def test_a_damaged_checkpoint_is_set_aside_and_the_previous_one_used(damage, tmp_path):
    filled(tmp_path / "c", [0.1, 0.2, 0.3])
    damage(largest(tmp_path / "c" / "3"))
    said = []
    store = opened(tmp_path / "c", said)
    found, facts = store.restore(abstract())
    assert_equal(found, state(2))
    assert facts == {"seconds": 2.0}
    assert len(said) == 1
    assert "checkpoint 3 is damaged" in said[0]
    assert (tmp_path / "c" / "damaged-3").is_dir()
    store.save(3, state(3), {}, 0.3)  # its place is free again
    store.close()
    store = opened(tmp_path / "c", said)
    assert_equal(store.restore(abstract())[0], state(3))
    store.close()
    assert len(said) == 1


def test_any_one_file_cut_short_never_gives_another_state(tmp_path):
    filled(tmp_path / "whole", [0.1, 0.2])
    newest = tmp_path / "whole" / "2"
    files = [p.relative_to(newest) for p in newest.rglob("*") if p.is_file() and p.stat().st_size]
    assert len(files) > 5
    for i, file in enumerate(files):
        run = shutil.copytree(tmp_path / "whole", tmp_path / str(i))
        cut(run / "2" / file)
        said = []
        store = opened(run, said)
        found, _ = store.restore(abstract())
        store.close()
        assert_equal(found, state(1 if said else 2))  # what does not matter for the content may be lost


def test_a_full_disk_is_told_and_earlier_checkpoints_stay(tmp_path):
    filled(tmp_path / "c", [0.1])
    # In a process of its own: threads of orbax may go on writing after the error is told, and the disk stays full.
    # Python ignores the signal of the limit, so writes fail as on a full disk.
    program = f"""
        import pathlib, resource
        from tests.experiments.test_checkpoint import opened, state
        store = opened(pathlib.Path({str(tmp_path / "c")!r}))
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        store.save(2, state(2), {{}}, 0.2)
        store.close()
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 1
    assert re.search(r"OSError: checkpoint: cannot write to .*those of steps 1 are intact", ended.stderr)
    store = opened(tmp_path / "c")
    assert_equal(store.restore(abstract())[0], state(1))
    store.save(2, state(2), {}, 0.2)  # with room again, as if nothing had been
    store.close()
    store = opened(tmp_path / "c")
    assert_equal(store.restore(abstract())[0], state(2))
    store.close()


def test_the_digest_sees_one_bit_and_two_places():
    base = {"a": jnp.arange(6.0), "b": jnp.array([True, False])}
    others = [
        {**base, "a": base["a"].at[3].set(3.0000002)},
        {**base, "a": base["a"][::-1]},
        {**base, "b": jnp.array([False, True])},
    ]
    assert len({int(digests.digest(tree)) for tree in (base, *others)}) == 4
    assert int(digests.digest(jax.tree.map(jnp.copy, base))) == int(digests.digest(base))


def test_harmless_keys_may_change():
    before = {"seed": 0, "keep": 1, "dataset": {"name": "a", "workers": 0}, "method": {"name": "rigl"}}
    resuming.check_config(before, {**before, "keep": 5, "dataset": {"name": "a", "workers": 8}})
    with refused("method.name", "method.period"):
        resuming.check_config(before, {**before, "method": {"name": "set", "period": 5}})
