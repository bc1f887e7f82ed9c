"""Files for other tools: exact round trips, errors that teach, and ONNX Runtime's outputs beside JAX's."""

import json
import math
import sys
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rigl_jax import apply_masks
from rigl_jax.execution import kernels
from rigl_jax.execution.compact import compact
from rigl_jax.execution.export import export_onnx, load_safetensors, save_safetensors
from rigl_jax.execution.packed import Packed, Whole, masks_of, pack, unpack
from tests.errors import refused


def weights(dtype=jnp.float32, density=0.1):
    rng = np.random.default_rng(0)
    shapes = {"a": (64, 32), "b": (3, 3, 8, 12), "c": (32, 16), "g": (2, 3, 2, 4, 4), "d": (10, 5), "e": (7,)}
    params = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    masks = {name: jnp.asarray(rng.random(shape) < density) for name, shape in shapes.items()}
    masks["c"] = jnp.asarray(np.repeat(rng.random((32, 2)) < density, 8, axis=1))  # runs of 8
    masks |= {"d": jnp.asarray(rng.random((10, 5)) < 0.7), "e": None}  # stored dense, with a mask and without
    return {"net": params, "scale": jnp.ones((), dtype)}, {"net": masks, "scale": None}


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: x.dtype == y.dtype and np.array_equal(x, y), a, b))


def of_kind(kind):
    rng = np.random.default_rng(0)
    if kind == "block":
        mask = np.kron(rng.random((3, 2)) < 0.5, np.ones((4, 4), bool))
        choose = lambda name, mask: kernels.make_block_pattern(mask, (4, 4))  # noqa: E731
    else:
        mask = np.argsort(np.argsort(rng.random((4, 4, 8)), axis=1), axis=1).reshape(16, 8) < 2
        choose = lambda name, mask: kernels.make_nm_pattern(mask, 2, 4)  # noqa: E731
    return pack({"w": jnp.asarray(rng.normal(size=mask.shape), jnp.float32)}, {"w": mask}, choose=choose)


@pytest.fixture
def safetensors():
    return pytest.importorskip("safetensors.numpy")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_safetensors_round_trip_is_exact(safetensors, tmp_path, dtype):
    packed = pack(*weights(dtype))
    path = tmp_path / "net.safetensors"
    save_safetensors(path, packed)
    for like in (None, packed, unpack(packed)):
        again = load_safetensors(path, like=like)
        assert equal(unpack(again), unpack(packed))
        assert equal(masks_of(again), masks_of(packed))
    again = load_safetensors(path, like=packed)
    assert jax.tree.structure(again) == jax.tree.structure(packed)
    assert equal(again, packed)
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]


@pytest.mark.parametrize("kind", ["block", "n of m"])
def test_every_kernel_writes_the_same_file_and_gets_its_values_back(safetensors, tmp_path, kind):
    packed = of_kind(kind)
    dense = pack(unpack(packed), masks_of(packed), choose=lambda name, mask: None)
    save_safetensors(tmp_path / "one", packed)
    save_safetensors(tmp_path / "two", dense)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert equal(load_safetensors(tmp_path / "two", like=packed), packed)
    loaded = load_safetensors(tmp_path / "one", choose=lambda name, mask: None)
    assert isinstance(loaded.patterns["w"], Whole)
    assert equal(loaded, dense)


def test_the_layout_is_the_documented_one(safetensors, tmp_path):
    w = np.zeros((4, 50), np.float32)
    w[[3, 0, 3], [7, 2, 1]] = [3, 1, 2]
    half = np.array([[1, 0, 2, 0]], np.float32)
    params = {"net": {"w": jnp.asarray(w), "half": jnp.asarray(half)}, "bias": jnp.ones(2)}
    save_safetensors(tmp_path / "f", pack(params, {"net": {"w": w != 0, "half": half != 0}, "bias": None}))
    tensors = {key: value.tolist() for key, value in safetensors.load_file(tmp_path / "f").items()}
    assert tensors == {
        "net/w:values": [1, 2, 3],
        "net/w:positions": [2, 151, 157],
        "net/half:values": [1, 2],
        "net/half:mask": [0b10100000],
        "bias": [1, 1],
    }


def test_the_size_of_a_file_follows_density(safetensors, tmp_path):
    params, rng = {"w": jnp.ones((512, 512))}, np.random.default_rng(0)
    for density in (0.01, 0.1):
        save_safetensors(tmp_path / "f", pack(params, {"w": rng.random((512, 512)) < density}))
        assert (tmp_path / "f").stat().st_size < 4 * 512 * 512 * (
            2 * density if density < 0.03 else density + 0.04
        ) + 2000


def test_a_file_that_cannot_be_read_says_why(safetensors, tmp_path):
    path = tmp_path / "f"
    packed = pack(*weights())
    save_safetensors(path, packed)
    whole = path.read_bytes()
    shape = b'\\"shape\\": '
    for content in (
        whole[:-5],
        b"not a file of tensors at all",
        whole[:-1] + bytes([whole[-1] ^ 1]),
        whole.replace(shape + b"[64, 32]", shape + b"[4, 3]  "),
    ):
        assert content != whole
        path.write_bytes(content)
        with refused(str(path)):
            load_safetensors(path)
    safetensors.save_file({"w": np.ones(3)}, path)
    with refused("save_safetensors"):
        load_safetensors(path)
    for about, named in [
        ({"version": 1, "leaves": {"w": 3}}, "f"),
        ({"version": 1, "leaves": {"w": {"shape": ["\x1b[2J"], "crc32": {}}}}, r"['\x1b[2J']"),
        ({"version": 2, "leaves": {}}, "crc32"),
        *(({"version": version}, f"version {version}") for version in (3, 0, True, 1.0)),
        ({"version": "2\x1b[31m\n\x07"}, r"'2\x1b[31m\n\x07'"),
    ]:
        safetensors.save_file({"w": np.ones(3)}, path, {"rigl_jax.packed": json.dumps(about)})
        with refused(named):
            load_safetensors(path)
    with pytest.raises(FileNotFoundError):
        load_safetensors(tmp_path / "absent")


REWRITTEN = {  # one tensor of each kind: dense with positions, dense with a mask, without a mask
    "dtype of all": [('"dtype":"F32"', '"dtype":"I32"')],
    "dtype without a mask": [('"bias":{"dtype":"F32"', '"bias":{"dtype":"U32"')],
    "dtype of positions": [('"I32"', '"F32"')],
    "dtype, said too": [('"dtype":"F32"', '"dtype":"I32"'), (r"\"float32\"", r"\"int32\"  ")],
    "shape of a sparse leaf": [("[30, 40]", "[40, 30]")],
    "shape of a masked leaf": [("[6, 4]", "[4, 6]")],
    "shape of a leaf without a mask": [("[2, 5]", "[5, 2]"), ("[2,5]", "[5,2]")],
    "flat": [("[30, 40]", "[1200]  ")],
    "name": [("bias", "base")],
}


@pytest.mark.parametrize("what", REWRITTEN)
def test_what_a_file_says_of_its_bytes_is_checked_too(safetensors, tmp_path, what):
    """The bytes of the tensors are as they were written."""
    path, rng = tmp_path / "f", np.random.default_rng(0)
    params = {"a": jnp.ones((30, 40)), "b": jnp.ones((6, 4)), "bias": jnp.ones((2, 5))}
    masks = {"a": rng.random((30, 40)) < 0.01, "b": np.tri(6, 4, dtype=bool), "bias": None}
    save_safetensors(path, pack(params, masks))
    content = path.read_bytes()
    for old, new in REWRITTEN[what]:
        assert len(old) == len(new)
        assert old.encode() in content
        content = content.replace(old.encode(), new.encode())
    path.write_bytes(content)
    for like in (None, params):
        with refused("f"):
            load_safetensors(path, like=like)


def test_files_of_version_1_are_read_and_compared_with_like(safetensors, tmp_path):
    tensors = {**_sparse([3, 5]), "v": np.arange(6, dtype=np.float32).reshape(2, 3)}
    path = _written(safetensors, tmp_path / "f", tensors, {"w": [4, 4], "v": [2, 3]})
    w = np.zeros((4, 4), np.float32)
    w.flat[[3, 5]] = 1
    like = {"w": jnp.asarray(w), "v": jnp.asarray(tensors["v"])}
    for again in (load_safetensors(path), load_safetensors(path, like=like)):
        assert equal(unpack(again), like)
        assert unpack(again)["w"].dtype == np.float32
    for name in like:
        with refused(name, "like"):
            load_safetensors(path, like={**like, name: like[name].astype(jnp.bfloat16)})
    path.write_bytes(path.read_bytes().replace(b'"v":{"dtype":"F32"', b'"v":{"dtype":"I32"'))
    with refused("v", "like"):
        load_safetensors(path, like=like)


def _written(safetensors, path, tensors, shapes, owner=None):
    """A file of these tensors whose checksums are right; `owner` says whose a tensor is where its name does not."""
    owner = owner or {}
    leaves = {name: {"shape": shape, "crc32": {}} for name, shape in shapes.items()}
    for key, tensor in tensors.items():
        leaves[owner.get(key, key.split(":")[0])]["crc32"][key] = zlib.crc32(np.ascontiguousarray(tensor).tobytes())
    about = {"rigl_jax.packed": json.dumps({"version": 1, "leaves": leaves})}
    safetensors.save_file(tensors, path, about)
    return path


def _sparse(positions, n=None, dtype=np.int32):
    return {
        "w:values": np.ones(len(positions) if n is None else n, np.float32),
        "w:positions": np.array(positions, dtype),
    }


def _masked(bits, n):
    return {"w:values": np.ones(n, np.float32), "w:mask": np.array(bits, np.uint8)}


@pytest.mark.parametrize(
    ("tensors", "shapes"),
    [
        (_sparse([5, 3]), {"w": [4, 4]}),
        (_sparse([3, 3]), {"w": [4, 4]}),
        (_sparse([3, 16]), {"w": [4, 4]}),
        (_sparse([-1, 3]), {"w": [4, 4]}),
        (_sparse([3, 5], n=1), {"w": [4, 4]}),
        (_sparse([3.0, 5.0], dtype=np.float32), {"w": [4, 4]}),
        (_sparse([[3, 5]]), {"w": [4, 4]}),
        (_sparse([1]), {"w": [-4, -4]}),
        (_sparse([1]), {"w": [4.0, 4]}),
        (_sparse([1]), {"w": "44"}),
        (_masked([0b10100000], 2), {"w": [4, 4]}),
        (_masked([0b10100000, 0, 0], 2), {"w": [4, 4]}),
        (_masked([0b10100000, 0], 3), {"w": [4, 4]}),
        (_masked([0b10100010], 3), {"w": [2, 3]}),
        ({"w": np.ones((4, 4), np.float32)}, {"w": [2, 8]}),
        ({"w": np.ones((4, 4), np.float32)} | _sparse([3]), {"w": [4, 4]}),
        ({"w:values": np.ones(2, np.float32)}, {"w": [4, 4]}),
        ({}, {"w": [4, 4]}),
        (_masked([0b10100000], 2), {"w": [100_000, 100_000]}),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(safetensors, tmp_path, tensors, shapes):
    """Their checksums are right: files that something else wrote, or that were changed on purpose."""
    path = _written(safetensors, tmp_path / "f", tensors, shapes)
    for like in (None, {"w": jnp.ones((4, 4))}):
        with refused("f", "w"):
            load_safetensors(path, like=like)


def test_every_tensor_has_a_checksum(safetensors, tmp_path):
    tensors = {"w": np.ones(3, np.float32), "v": np.ones(3, np.float32)}
    about = {"version": 1, "leaves": {"w": {"shape": [3], "crc32": {}}}}
    safetensors.save_file(tensors, tmp_path / "f", {"rigl_jax.packed": json.dumps(about)})
    with refused("w"):
        load_safetensors(tmp_path / "f")
    about["leaves"]["w"]["crc32"]["w"] = zlib.crc32(tensors["w"].tobytes())
    safetensors.save_file(tensors, tmp_path / "f", {"rigl_jax.packed": json.dumps(about)})
    with refused("f"):
        load_safetensors(tmp_path / "f")


def test_leaves_that_no_nested_dicts_hold_need_a_tree(safetensors, tmp_path):
    tree = {"a": jnp.ones(2), "a/b": jnp.zeros(3)}
    save_safetensors(tmp_path / "f", Packed(tree, dict.fromkeys(tree)))
    with refused("a", "a/b", "like"):
        load_safetensors(tmp_path / "f")
    assert equal(load_safetensors(tmp_path / "f", like=tree).values, tree)


@pytest.mark.parametrize("shape", [(2**16, 2**16), (5, 5, 2**12, 2**12)])
def test_a_weight_that_does_not_fit_dense_is_read_beside_its_like(safetensors, tmp_path, shape):
    """Gigabytes, of which a file of a few hundred bytes may not ask for one."""
    rng = np.random.default_rng(0)
    entries = np.sort(rng.choice(math.prod(shape), 9, replace=False))
    packed = Packed({"w": jnp.arange(1.0, 10)}, {"w": kernels.make_pattern_at(entries, shape)})
    save_safetensors(tmp_path / "f", packed)
    assert (tmp_path / "f").stat().st_size < 500
    with refused("w", "like"):
        load_safetensors(tmp_path / "f")
    again = load_safetensors(tmp_path / "f", like=packed)
    assert jax.tree.structure(again) == jax.tree.structure(packed)
    assert equal(again, packed)


def test_a_tree_that_is_not_the_files_is_refused(safetensors, tmp_path):
    params, masks = weights()
    save_safetensors(tmp_path / "f", pack(params, masks))
    wrong = {**params, "net": {**params["net"], "a": jnp.ones((2, 2))}}
    with refused("net/a", "like"):
        load_safetensors(tmp_path / "f", like=wrong)
    with refused("more", "like"):
        load_safetensors(tmp_path / "f", like={**params, "more": jnp.ones(())})
    with refused("scale", "like"):
        load_safetensors(tmp_path / "f", like={"net": params["net"]})


def test_a_failed_write_leaves_the_old_file(safetensors, tmp_path, monkeypatch):
    path = tmp_path / "f"
    packed = pack(*weights())
    save_safetensors(path, packed)
    before = path.read_bytes()

    def fail(tensors, draft, metadata):
        draft.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_safetensors(path, packed)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("missing", ["safetensors", "jax2onnx"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, missing):
    for module in (missing, f"{missing}.numpy"):
        monkeypatch.setitem(sys.modules, module, None)
    write = {
        "safetensors": lambda: save_safetensors(tmp_path / "f", Packed({}, {})),
        "jax2onnx": lambda: export_onnx(tmp_path / "f", lambda p, x: x, {}, jnp.ones(2)),
    }
    with refused(missing, "rigl_jax[export]", error=ImportError):
        write[missing]()


class Net(nn.Module):
    """Convolutions, both kinds of pooling, padded and not, batch statistics, dense layers."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), padding="VALID")(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.gelu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3))(x)))
        x = nn.avg_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        x = nn.tanh(nn.Dense(20)(x.reshape(x.shape[0], -1)))
        return nn.log_softmax(nn.Dense(3)(x))


def sparse_net():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 12, 12, 2)), jnp.float32)
    shapes = jax.eval_shape(Net().init, jax.random.key(0), x)
    params = jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.2, 1, s.shape), s.dtype), shapes)
    masks = jax.tree.map(lambda p: None if p.ndim < 2 else jnp.asarray(rng.random(p.shape) < 0.05), params)
    return params, masks, x


def test_onnx_runtime_computes_the_same_for_any_batch(tmp_path):
    pytest.importorskip("jax2onnx")
    runtime = pytest.importorskip("onnxruntime")
    params, masks, x = sparse_net()
    small = compact(Net().apply, params, masks, x)
    assert small.kept
    export_onnx(tmp_path / "net.onnx", small.apply, small.params, x)
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    assert [node.name for node in (*session.get_inputs(), *session.get_outputs())] == ["input_0", "output_0"]
    apply = jax.jit(Net().apply)
    for batch in (1, 5):
        images = np.random.default_rng(batch).normal(size=(batch, 12, 12, 2)).astype(np.float32)
        (y,) = session.run(None, {"input_0": images})
        np.testing.assert_allclose(y, apply(apply_masks(params, masks), images), rtol=1e-4, atol=1e-4)
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


def test_a_model_that_asks_for_its_batch_is_exported_with_a_fixed_one(tmp_path):
    pytest.importorskip("jax2onnx")
    runtime = pytest.importorskip("onnxruntime")
    params, x = {"w": jnp.ones((6, 3))}, jnp.arange(12.0).reshape(2, 2, 3)

    def apply(p, x):
        return {"y": x.reshape(len(x), -1) @ p["w"], "x": x[..., 0]}

    with refused("dynamic_batch"):
        export_onnx(tmp_path / "f", apply, params, x)
    assert not list(tmp_path.iterdir())
    export_onnx(tmp_path / "f", apply, params, x, dynamic_batch=False)
    first, second = runtime.InferenceSession(tmp_path / "f").run(None, {"input_0": np.asarray(x)})
    np.testing.assert_allclose(first, x[..., 0])
    np.testing.assert_allclose(second, apply(params, x)["y"], rtol=1e-6)
