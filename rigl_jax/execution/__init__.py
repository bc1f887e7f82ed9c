"""Really sparse compute: packed weights, any model on them, training on them, and the kernels below."""

from rigl_jax.execution import kernels
from rigl_jax.execution.kernels import Backend, backends
from rigl_jax.execution.packed import Packed, Whole, best_pattern, masks_of, nbytes, pack, unpack
from rigl_jax.execution.run import run_packed
from rigl_jax.execution.streaming import Factors, gradient_factors, rewire_streamed
from rigl_jax.execution.training import PackedTraining, pack_state, packed_training, unpack_state

__all__ = [
    "Backend",
    "Factors",
    "Packed",
    "PackedTraining",
    "Whole",
    "backends",
    "best_pattern",
    "gradient_factors",
    "kernels",
    "masks_of",
    "nbytes",
    "pack",
    "pack_state",
    "packed_training",
    "rewire_streamed",
    "run_packed",
    "unpack",
    "unpack_state",
]
