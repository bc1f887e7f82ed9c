"""Sparse training for JAX: RigL and its family as pure functions and an optax transformation."""

from rigl_jax import algorithms, base, schedules, scores, structures, topology, trees, values
from rigl_jax.algorithms import ALGORITHMS, rigl, set_, static
from rigl_jax.base import Algorithm, Leaf, Rewired, Signals, Structure
from rigl_jax.distributions import describe, erdos_renyi, erk, make_plan, uniform
from rigl_jax.flops import Flops, Product, flops, micronet_bits, micronet_flops, training_cost
from rigl_jax.sparsify import (
    SparseState,
    apply_masks,
    check_masked,
    sparsify,
    sparsity,
    straight_through,
)
from rigl_jax.structures import unstructured

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Flops",
    "Leaf",
    "Product",
    "Rewired",
    "Signals",
    "SparseState",
    "Structure",
    "algorithms",
    "apply_masks",
    "base",
    "check_masked",
    "describe",
    "erdos_renyi",
    "erk",
    "flops",
    "make_plan",
    "micronet_bits",
    "micronet_flops",
    "rigl",
    "schedules",
    "scores",
    "set_",
    "sparsify",
    "sparsity",
    "static",
    "straight_through",
    "structures",
    "topology",
    "training_cost",
    "trees",
    "uniform",
    "unstructured",
    "values",
]
