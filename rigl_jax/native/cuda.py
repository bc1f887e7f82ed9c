"""The library for NVIDIA's GPUs: found, loaded and registered with XLA once, or the reason why not.

It is optional, and nothing warns where it is missing: plain JAX serves. `reason()` says why. Set RIGL_JAX_CUDA=0 to do
without it. A program calls it only where it is lowered for CUDA.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TARGETS = ("rigl_cuda_select", "rigl_cuda_gather", "rigl_cuda_scatter", "rigl_cuda_dots")
MOST_LEAVES = 64  # that one search takes; kLeaves in kernels.h
PER_LEAF, BLOCKS = 2053, 1024  # words of a search's memory: kPerLeaf, kBlocks


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    from rigl_jax.native import build  # here, because `python -m` warns of a module that its package has imported

    if os.environ.get("RIGL_JAX_CUDA") == "0":
        return None, "switched off by RIGL_JAX_CUDA=0"
    if why := build.fault(build.CUDA_LIBRARY, cuda=True):
        return None, f"{why}; `python -m rigl_jax.native.build` builds it where nvcc is found"
    try:
        loaded = ctypes.CDLL(str(build.CUDA_LIBRARY))
        register(loaded, "CUDA")
    except (OSError, AttributeError, RuntimeError) as error:
        return None, f"built, but it does not load ({error})"
    return loaded, ""


def register(loaded: ctypes.CDLL, platform: str) -> None:
    """Makes the handlers of a library known to XLA."""
    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(loaded, target)), platform=platform)


def library() -> ctypes.CDLL | None:
    """The loaded library, or None."""
    return _load()[0]


@functools.cache
def reason() -> str:
    """Why programs for CUDA do not call the library, or the empty string."""
    loaded, why = _load()
    if loaded is None:
        return why
    try:
        jax.devices("cuda")
    except RuntimeError:  # none is here: a program is compiled for another machine
        return ""
    loaded.rigl_cuda_fault.restype = ctypes.c_char_p
    fault = loaded.rigl_cuda_fault()
    return "" if fault is None else f"built, but it does not run on this GPU ({fault.decode()})"


def serves() -> bool:
    """Whether programs for CUDA are to call the library: it is loaded, and runs on the GPU of this process, if any."""
    return not reason()


def select_each(scores: Sequence[jax.Array], k: jax.Array, among: Sequence[jax.Array | None]) -> list[jax.Array]:
    """`topology.select` over all of each array of f32, bf16 or f16, all of one dtype and none empty.

    Args:
      scores: at most `MOST_LEAVES` arrays.
      k: int32[arrays].
      among: the candidates of each; None: all.
    """
    operands: list[jax.Array] = []
    for array, candidates in zip(scores, among, strict=True):
        operands.append(jax.lax.stop_gradient(array).reshape(-1))
        operands.append(jnp.zeros(0, bool) if candidates is None else candidates.reshape(-1))
    memory = jax.ShapeDtypeStruct((len(scores) * PER_LEAF + BLOCKS,), np.uint32)
    results = [memory, *(jax.ShapeDtypeStruct((array.size,), np.bool_) for array in scores)]
    taken = jax.ffi.ffi_call("rigl_cuda_select", results, vmap_method="broadcast_all")(k, *operands)[1:]
    return [chosen.reshape(array.shape) for chosen, array in zip(taken, scores, strict=True)]


def product(
    target: str, shape: tuple[int, ...], dtype: Any, *operands: jax.Array, height: int, block: int
) -> jax.Array:
    """The result of one handler of a product. The second result is memory of the kernels."""
    results = [jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((1,), np.uint32)]
    return jax.ffi.ffi_call(target, results)(*operands, height=np.int64(height), block=np.int64(block))[0]
