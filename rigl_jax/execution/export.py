"""Trained networks as files for other tools: packed weights as safetensors, dense models as ONNX.

Both need packages that rigl_jax itself does not need: `pip install 'rigl_jax[export]'`.

The safetensors file contains, in the memory order of the dense weight (row-major, as NumPy's `ravel`):
  * a leaf without a mask unchanged, under its name;
  * a masked leaf as `<name>:values`, the active values in ascending order of their positions, and either
    `<name>:positions`, int32 or int64[active], their indices in the raveled dense weight, or `<name>:mask`,
    uint8[ceil(size / 8)], one bit a weight, most significant bit first (`numpy.packbits`), whichever is smaller.
The metadata have one entry, `rigl_jax.packed`, in JSON: `version` (2); `leaves`, for every name the `shape` of the
dense weight, the `dtype` of its values and `crc32`, that of the bytes of each tensor; and `crc32`, that of the JSON of
the other two with sorted keys. Equal weights give equal files, whichever kernels packed them. Files of version 1, which
have neither dtypes nor a checksum of the metadata, are read too.
"""

from __future__ import annotations

import importlib
import itertools
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax import checks, trees
from rigl_jax.base import PyTree, Shape
from rigl_jax.execution import kernels, stored
from rigl_jax.execution.packed import Choose, Packed, Whole, best_pattern, checked, leaf_patterns
from rigl_jax.tracing import geometry
from rigl_jax.tracing.program import evaluate, trace
from rigl_jax.tracing.walk import Walker

Path = str | os.PathLike[str]


def save_safetensors(path: Path, packed: Packed) -> None:
    """Writes packed weights; the file size shrinks with the number of active weights. The file is replaced atomically.

    Args:
      path: the file.
      packed: from `pack`, or trained. Any dtype that safetensors has, bfloat16 among them.

    Raises:
      ImportError: safetensors is not installed.
      ValueError: two leaves would get one name.

    >>> import jax.numpy as jnp
    >>> import rigl_jax as rx
    >>> packed = rx.pack({"w": jnp.ones((4, 4))}, {"w": jnp.eye(4, dtype=bool)})
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_safetensors(f"{folder}/net.safetensors", packed)
    ...     again = load_safetensors(f"{folder}/net.safetensors")
    >>> float(again.values["w"].sum())
    4.0
    """
    safetensors = _need("safetensors.numpy", "save_safetensors")
    checked("save_safetensors", packed)
    tensors: dict[str, np.ndarray] = {}
    leaves: dict[str, Any] = {}
    names = jax.tree.leaves(trees.names(packed.values))
    for name, values, pattern in zip(names, jax.tree.leaves(packed.values), leaf_patterns(packed), strict=True):
        parts = {key: np.array(part, order="C") for key, part in _parts(name, values, pattern).items()}
        if name in leaves or parts.keys() & tensors.keys():
            raise ValueError(f"save_safetensors: expected leaves of different names, got {name!r} twice")
        tensors |= parts
        leaves[name] = {
            "shape": list(_shape(values, pattern)),
            "dtype": str(next(iter(parts.values())).dtype),  # the values come first
            "crc32": {key: stored.crc(part) for key, part in parts.items()},
        }
    about = {stored.FORMAT: stored.described(leaves)}  # one entry: the library shuffles several
    _replace(path, lambda draft: safetensors.save_file(tensors, draft, metadata=about))


def load_safetensors(path: Path, *, like: PyTree | None = None, choose: Choose | None = None) -> Packed:
    """Reads packed weights, bit-identical. Types of 64 bits need `jax_enable_x64`, as everywhere in JAX.

    Args:
      path: a file that `save_safetensors` wrote.
      like: a `Packed`, or params: the tree to fill, whose names, shapes and dtypes must be those of the file. A
        `Packed` also gives the kernels, but not the devices: all arrays are on the default device. None: nested dicts,
        from the slashes in the names.
      choose: the pattern of each leaf, as in `pack`; default `best_pattern`, or the kernels of `like`.

    Raises:
      ImportError: safetensors is not installed.
      ValueError: the file is no safetensors file, is damaged or was not written by `save_safetensors`; or its leaves,
        shapes or dtypes are not those of `like`.

    >>> import jax.numpy as jnp
    >>> import rigl_jax as rx
    >>> packed = rx.pack({"w": jnp.ones((4, 4))}, {"w": jnp.eye(4, dtype=bool)})
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_safetensors(f"{folder}/net.safetensors", packed)
    ...     again = load_safetensors(f"{folder}/net.safetensors", like=packed)
    >>> float(again.values["w"].sum())
    4.0
    """
    checks.optional_functions("load_safetensors", choose=choose)
    found = stored.read(path, _need("safetensors", "load_safetensors"))
    kernel_of = {} if like is None else _fitting(path, like, found)
    if like is None:
        _check_nesting(path, found)
    values, patterns, file = {}, {}, stored.shown_path(path)
    for name, leaf in found.items():
        if like is None and _large(leaf):
            raise ValueError(
                f"load_safetensors: leaf {name!r} of {file} has the shape {leaf.shape}, more than is laid out on a "
                "file's word: expected like=, with this leaf in it"
            )
        values[name], patterns[name] = _rebuilt(name, leaf, kernel_of.get(name), choose)
    if like is None:
        return Packed(_nested(values), _nested(patterns))
    tree = like.values if isinstance(like, Packed) else like
    names, structure = list(trees.named_leaves(tree)), jax.tree.structure(tree)
    return Packed(*(jax.tree.unflatten(structure, [part[name] for name in names]) for part in (values, patterns)))


def export_onnx(
    path: Path, apply: Callable[..., Any], params: PyTree, *inputs: Any, dynamic_batch: bool = True
) -> None:
    """Writes a model with its weights as ONNX, by jax2onnx; best after `compact`, for ONNX stores weights dense.

    The graph's inputs are called `input_0`, `input_1`, ..., its outputs `output_0`, ..., in pytree order. It is tested
    on ONNX Runtime in float32; other types (such as bfloat16 on a CPU) depend on the runtime.

    Args:
      path: the file; replaced as a whole or not at all.
      apply: `(params, *inputs) -> outputs`, for inference.
      params: the weights, with zeros off the masks: `unpack(packed)`, `apply_masks(params, masks)`, or of `compact`.
      *inputs: arrays or `jax.ShapeDtypeStruct`, for their shapes and dtypes.
      dynamic_batch: leave the first axis of every input open, the same for all. False: fix the given sizes.

    Raises:
      ImportError: jax2onnx is not installed.
      ValueError: the model asks for the size of its batch (`len(x)`; `x.shape[0]` is fine) and it is dynamic.

    >>> import jax.numpy as jnp
    >>> export_onnx("net.onnx", lambda p, x: x @ p["w"], {"w": jnp.eye(4)}, jnp.ones((2, 4)))  # doctest: +SKIP
    """
    jax2onnx = _need("jax2onnx", "export_onnx")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), inputs)
    if dynamic_batch:
        (batch,) = jax.export.symbolic_shape("batch")
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), shapes)
    try:
        program = trace(lambda *xs: apply(params, *xs), *shapes)
    except Exception as error:
        if not dynamic_batch:
            raise
        raise ValueError(
            "export_onnx: expected a model for any batch size, but this one asks for it (x.shape[0] instead of len(x) "
            f"may do, or dynamic_batch=False): {error}"
        ) from error

    def run(*xs: Any) -> Any:
        # Operation by operation, because jax2onnx replaces functions of Flax by versions with other arguments; and
        # pooling in the form that ONNX Runtime accepts.
        return tuple(jax.tree.leaves(evaluate(program, xs, dict.fromkeys(geometry.WINDOWED, _pool))))

    model = jax2onnx.to_onnx(
        run,
        inputs=jax.tree.leaves(shapes),
        model_name="model",
        input_names=[f"input_{i}" for i in range(len(program.inputs))],
        output_names=[f"output_{i}" for i in range(len(program.outputs))],
    )
    content = model.SerializeToString()
    _replace(path, lambda draft: draft.write_bytes(content))


_PER_AXIS = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")


def _pool(walker: Walker, eqn: Any, operands: list[Any]) -> list[Any]:
    """Pooling with all other axes merged into one, because ONNX Runtime pools over at most three axes."""
    del walker
    (x,), touched = operands, geometry.window_axes(eqn)
    others = [k for k in range(x.ndim) if k not in touched]
    order = (*others, *touched)
    moved = x.transpose(order)
    first = math.prod(moved.shape[: len(others)])
    params = {key: (*_ALONE[key], *(eqn.params[key][k] for k in touched)) for key in _PER_AXIS}
    y = eqn.primitive.bind(moved.reshape(first, *moved.shape[len(others) :]), **{**eqn.params, **params})
    return [y.reshape(*moved.shape[: len(others)], *y.shape[1:]).transpose(np.argsort(order).tolist())]


_ALONE: dict[str, tuple[Any, ...]] = {key: ((0, 0),) if key == "padding" else (1,) for key in _PER_AXIS}


def _need(module: str, who: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(f"{who} needs the package {package}: pip install 'rigl_jax[export]' ({error})") from error


def _replace(path: Path, write: Callable[[pathlib.Path], Any]) -> None:
    """Writes a draft beside the file and renames it, so that a reader never sees an incomplete file."""
    path = pathlib.Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    draft = pathlib.Path(name)
    try:
        write(draft)
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.chmod(0o666 & ~_umask())  # a temporary file is private
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _parts(name: str, values: Any, pattern: Any) -> dict[str, np.ndarray]:
    """The tensors of a leaf."""
    kept = np.asarray(values)
    if pattern is None:
        return {name: kept}
    if isinstance(pattern, Whole):
        size, places = kept.size, np.flatnonzero(np.asarray(pattern.mask))
        kept = kept.ravel()[places]
    else:
        size, places = math.prod(pattern.shape), _places(pattern)
        order = np.argsort(places)[np.sum(places < 0) :]
        kept, places = kept[order], places[order]
    index = np.int32 if size <= np.iinfo(np.int32).max else np.int64
    if places.size * index().itemsize <= size / 8:
        return {f"{name}:values": kept, f"{name}:positions": places.astype(index)}
    mask = np.zeros(size, bool)
    mask[places] = True
    return {f"{name}:values": kept, f"{name}:mask": np.packbits(mask)}


def _places(pattern: Any) -> np.ndarray:
    """int64[nnz]: where in the raveled dense weight each packed value belongs; -1 for padding."""
    if isinstance(pattern, kernels.Pattern):
        first = kernels.pattern.dense_index(pattern, kernels.pattern.places(pattern)) * pattern.height
        active = (first[:, None] + np.arange(pattern.height)).ravel()
        return np.pad(active, (0, pattern.nnz - active.size), constant_values=-1)
    numbers = np.asarray(kernels.scatter(jnp.arange(1, pattern.nnz + 1, dtype=jnp.int32), pattern)).ravel()
    places = np.full(pattern.nnz, -1)
    active = np.flatnonzero(numbers)
    places[numbers[active] - 1] = active
    return places


LAID_OUT = 1 << 28
"""The largest weight that a file alone may have made dense: a few hundred bytes can name any shape."""


def _large(leaf: stored.Stored) -> bool:
    """Whether a leaf takes far more memory than its file."""
    return leaf.places is not None and math.prod(leaf.shape) > max(LAID_OUT, 8 * leaf.values.size)


def _check_nesting(path: Path, names: Iterable[str]) -> None:
    known, file = set(names), stored.shown_path(path)
    for name in known:
        parents = name.split("/")[:-1]
        for above in itertools.accumulate(parents, "{}/{}".format):
            if above in known:
                raise ValueError(
                    f"load_safetensors: {file} has a leaf {above!r} and a leaf {name!r}, which no nested dicts hold: "
                    "expected like=, the tree to fill"
                )


def _rebuilt(name: str, leaf: stored.Stored, old: Any, choose: Choose | None) -> tuple[Any, Any]:
    """The values and the pattern of a leaf."""
    if leaf.places is None:
        return jnp.asarray(leaf.values), None
    if choose is None and isinstance(old, kernels.Pattern) and old.height == 1:  # no mask: it might not fit memory
        pattern = kernels.make_pattern_at(
            np.sort(kernels.pattern.place_of(old, leaf.places)), leaf.shape, block=old.block
        )
        return jnp.asarray(leaf.values[np.searchsorted(leaf.places, _places(pattern))]), pattern
    mask = np.zeros(leaf.shape, bool)
    mask.reshape(-1)[leaf.places] = True
    if choose is None and old is not None:
        pattern = None if isinstance(old, Whole) else kernels.rebuild(old, mask)
    else:
        pattern = (choose or best_pattern)(name, mask)
    if pattern is None:
        whole = np.zeros(leaf.shape, leaf.values.dtype)
        whole.reshape(-1)[leaf.places] = leaf.values
        return jnp.asarray(whole), Whole(jnp.asarray(mask))
    values, places = np.zeros(pattern.nnz, leaf.values.dtype), _places(pattern)
    values[np.argsort(places)[np.sum(places < 0) :]] = leaf.values
    return jnp.asarray(values), pattern


def _fitting(path: Path, like: PyTree, found: dict[str, stored.Stored]) -> dict[str, Any]:
    """The kernels that `like` has, by name, once its names, shapes and dtypes are known to be the file's."""
    packed = like if isinstance(like, Packed) else Packed(like, jax.tree.map(lambda _: None, like))
    names = trees.named_leaves(packed.values)
    old = dict(zip(names, leaf_patterns(packed), strict=True))
    expected = {name: _kind(values, _shape(values, old[name])) for name, values in names.items()}
    given = {name: _kind(leaf.values, leaf.shape) for name, leaf in found.items()}
    for name in (*expected, *given):
        here, there = (kinds.get(name, "nothing") for kinds in (expected, given))
        if here != there:
            raise ValueError(
                f"load_safetensors: leaf {name!r} is {here} in like, and {there} in {stored.shown_path(path)}"
            )
    return old


def _kind(values: Any, shape: Shape) -> str:
    """Dtype and shape, of 64 bits as JAX has them: "float32[2, 3]"."""
    return f"{jnp.result_type(values)}{list(shape)}"


def _shape(values: Any, pattern: Any) -> Shape:
    if pattern is None:
        return np.shape(values)
    return tuple(pattern.mask.shape if isinstance(pattern, Whole) else pattern.shape)


def _nested(flat: dict[str, Any]) -> PyTree:
    """Nested dicts of names with slashes."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        at = tree
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = leaf
    return tree
