"""Sparse compute: packed weights, models that run and train on them, and their kernels."""

from rigl_jax.execution import kernels
from rigl_jax.execution.compact import Compact, compact
from rigl_jax.execution.explain import Explained, Explanation, explain, fastest
from rigl_jax.execution.export import export_onnx, load_safetensors, save_safetensors
from rigl_jax.execution.kernels import Backend, backends
from rigl_jax.execution.packed import Packed, Whole, best_pattern, masks_of, nbytes, pack, unpack
from rigl_jax.execution.run import run_packed
from rigl_jax.execution.streaming import Factors, gradient_factors, random_pattern, rewire_streamed
from rigl_jax.execution.training import PackedTraining, packed_training

__all__ = [
    "Backend",
    "Compact",
    "Explained",
    "Explanation",
    "Factors",
    "Packed",
    "PackedTraining",
    "Whole",
    "backends",
    "best_pattern",
    "compact",
    "explain",
    "export_onnx",
    "fastest",
    "gradient_factors",
    "kernels",
    "load_safetensors",
    "masks_of",
    "nbytes",
    "pack",
    "packed_training",
    "random_pattern",
    "rewire_streamed",
    "run_packed",
    "save_safetensors",
    "unpack",
]
