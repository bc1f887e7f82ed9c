"""The native library: found, loaded and registered with XLA once, or the reason why not.

`library()` returns it or None; `reason()` says why there is none, and the logger "rigl_jax" warns of it once. A level
is the instruction set that a product runs on: "auto" takes the best that this processor has (selection always does).
Set RIGL_JAX_NATIVE=0 to do without the library, or RIGL_JAX_NATIVE_LIBRARY to the path of another build of it; the note
of that build, `NAME.json` for `NAME.so`, must lie beside it.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rigl_jax.messages import shown
from rigl_jax.scores import Draws, Magnitudes, Scores

LIBRARY = pathlib.Path(os.environ.get("RIGL_JAX_NATIVE_LIBRARY") or pathlib.Path(__file__).parent / "_native.so")
TARGETS = (
    "rigl_tile",
    "rigl_gather",
    "rigl_gather_ordered",
    "rigl_scatter",
    "rigl_dots",
    "rigl_half_tile",
    "rigl_half_gather",
    "rigl_half_gather_ordered",
    "rigl_half_scatter",
    "rigl_half_dots",
    "rigl_planes",
    "rigl_conv_forward",
    "rigl_conv_input_gradient",
    "rigl_conv_values_gradient",
    "rigl_half_planes",
    "rigl_half_conv_forward",
    "rigl_half_conv_input_gradient",
    "rigl_half_conv_values_gradient",
    "rigl_fill",
    "rigl_take",
    "rigl_select",
    "rigl_rewire",
)
REBUILD = "python -m rigl_jax.native.build"


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    if os.environ.get("RIGL_JAX_NATIVE") == "0":
        return None, "switched off by RIGL_JAX_NATIVE=0"
    loaded, why = _opened()
    if loaded is None:
        why = f"{why}; `{REBUILD}` builds it where there is a C++ compiler"
        if jax.default_backend() == "cpu":
            logging.getLogger("rigl_jax").warning(
                "rigl_jax uses plain JAX, slower than its native CPU kernels: %s", why
            )
    return loaded, why


def _opened() -> tuple[ctypes.CDLL | None, str]:
    from rigl_jax.native import build  # here, because `python -m` warns of a module that its package has imported

    if why := build.fault(LIBRARY):
        return None, why
    try:
        loaded = ctypes.CDLL(str(LIBRARY))
        for target in TARGETS:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(loaded, target)), platform="cpu")
    except (OSError, AttributeError, RuntimeError) as error:
        return None, f"built, but it does not load ({error})"
    loaded.rigl_level.restype = ctypes.c_char_p
    return loaded, ""


def library() -> ctypes.CDLL | None:
    """The loaded library, or None."""
    return _load()[0]


def reason() -> str:
    """Why there is no library, or the empty string."""
    return _load()[1]


@functools.cache
def levels() -> dict[str, int]:
    """The levels that this build and this processor have: name -> the number the kernels know it by."""
    found, loaded, number = {}, library(), 0
    available = ctypes.c_int32()
    while loaded is not None and (name := loaded.rigl_level(ctypes.c_int64(number), ctypes.byref(available))):
        if available.value:
            found[name.decode()] = number
        number += 1
    return found


def level_number(level: str) -> np.int64:
    """The number of a level; "auto" is -1. ValueError names the levels there are."""
    if level == "auto":
        return np.int64(-1)
    if level not in levels():
        raise ValueError(f"kernels: level must be one of {['auto', *levels()]} on this machine, got {shown(level)}")
    return np.int64(levels()[level])


def multiplies_halves(level: str) -> bool:
    """Whether products of bfloat16 are taken in bfloat16 at this level, with sums in float32."""
    return level in ("avx512_bf16", "avx2_wide") or (level == "auto" and "avx512_bf16" in levels())


def call(
    target: str,
    shape: tuple[int, ...],
    *operands: jax.Array,
    dtype: Any = np.float32,
    vmap_method: str | None = None,
    **attributes: Any,
) -> jax.Array:
    """The result of one native handler. Attributes are integers or sequences of integers."""
    result = jax.ShapeDtypeStruct(shape, dtype)
    numbers = {name: np.int64(n) if np.ndim(n) == 0 else np.asarray(n, np.int64) for name, n in attributes.items()}
    return jax.ffi.ffi_call(target, result, vmap_method=vmap_method)(*operands, **numbers)


def _floats(scores: jax.Array) -> jax.Array:
    """f32 of scores of f32, bf16 or f16, in their order and with their ties.

    Rounded explicitly: XLA may leave out the rounding of a short float that the same program has computed.
    """
    wide = jax.lax.stop_gradient(scores).astype(np.float32)
    if scores.dtype == np.float32:
        return wide
    kind = jnp.finfo(scores.dtype)
    return jax.lax.reduce_precision(wide, exponent_bits=kind.nexp, mantissa_bits=kind.nmant)


def select(scores: jax.Array, k: jax.Array, among: jax.Array | None) -> jax.Array:
    """`topology.select` over all of an array of f32, bf16 or f16; `k` is an int32 scalar. Only where `library()` is."""
    flat = _floats(scores).reshape(-1)
    candidates = np.zeros(0, bool) if among is None else among.reshape(-1)
    result = jax.ShapeDtypeStruct(flat.shape, np.bool_)
    taken = jax.ffi.ffi_call("rigl_select", result, vmap_method="broadcast_all")(flat, candidates, k)
    return taken.reshape(scores.shape)


def draws(key: jax.Array) -> bool:
    """Whether `rewire` draws the numbers of `jax.random.uniform`: those of JAX's default generator."""
    config: Any = jax.config
    return str(jax.random.key_impl(key)) == "threefry2x32" and config.jax_threefry_partitionable


def rewire(
    mask: jax.Array, drop: Scores, grow: Scores, n_drop: jax.Array, *, regrow_dropped: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`topology.drop_and_grow` of one weight of one group of single weights. Only where `library()` is.

    In a compiled program the new mask takes the memory of the old one, if that is not read afterwards.

    Args:
      mask: bool[*shape].
      drop: float[*shape], f32, bf16 or f16, or its `Magnitudes`.
      grow: the same, or `Draws` with a key that `draws`.
      n_drop: int32 scalar.
      regrow_dropped: see `topology.rewire`.

    Returns:
      The new mask, the part of it that was not dropped, and the part of it that was not in the old one. Where a score
      that is read is NaN or +inf, the new mask is the old one.
    """

    def of(given: Any) -> jax.Array:
        return _floats(given.arrays if isinstance(given, Magnitudes) else given)

    drawn = isinstance(grow, Draws)
    late = grow.late if drawn and grow.late is not None else np.zeros(0, bool)
    results = [jax.ShapeDtypeStruct(mask.shape, dtype) for dtype in (np.bool_, np.uint8)]
    new, part = jax.ffi.ffi_call("rigl_rewire", results, vmap_method="broadcast_all", input_output_aliases={0: 0})(
        mask,  # in its own shape: a mask that is reshaped for the call would be copied
        of(drop),
        jax.random.key_data(grow.key) if drawn else of(grow),
        late,
        n_drop,
        drop_magnitudes=np.int64(isinstance(drop, Magnitudes)),
        grow_magnitudes=np.int64(isinstance(grow, Magnitudes)),
        regrow_dropped=np.int64(regrow_dropped),
    )
    return new, part == 1, part == 2
