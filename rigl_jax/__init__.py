"""Sparse training for JAX: RigL and its family as pure functions and an optax transformation."""

from importlib import metadata

from rigl_jax import (
    algorithms,
    base,
    execution,
    gates,
    landscape,
    optimizers,
    regrow_init,
    schedules,
    scores,
    structures,
    topology,
    tracing,
    trees,
)
from rigl_jax.algorithms import (
    ALGORITHMS,
    ac_dc,
    deep_r,
    dnw,
    dsr,
    exploration_penalty,
    explored,
    gmp,
    granet,
    grasp,
    itop,
    langevin,
    mest,
    rigl,
    rigl_inverted,
    set_,
    snfs,
    snip,
    srigl,
    static,
    ste,
    synflow,
    top_kast,
)
from rigl_jax.base import Algorithm, Axes, LayerPlan, Leaf, Masks, Plan, Rewired, Score, Signals, Structure
from rigl_jax.costs import micronet_bits, micronet_flops, training_cost
from rigl_jax.description import describe
from rigl_jax.distributions import erdos_renyi, erk, uniform
from rigl_jax.execution import Packed, pack, packed_training, run_packed, unpack
from rigl_jax.growth import accumulate_growth
from rigl_jax.initial import rescale_init
from rigl_jax.masking import apply_masks, check_masked, sparsity, straight_through
from rigl_jax.optimizers import per_weight_adam, replace_masks, sparse_average, with_masters
from rigl_jax.plan import make_plan
from rigl_jax.structures import block, channel, fan_in, n_of_m, unstructured
from rigl_jax.tracing.flops import Flops, Product, flops
from rigl_jax.tracing.roles import roles
from rigl_jax.transform import SparseState, sparsify

values = regrow_init
"""The former name of `rx.regrow_init`."""

try:
    __version__ = metadata.version("rigl_jax")
except metadata.PackageNotFoundError:  # run from its sources, not installed
    __version__ = "0+unknown"

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "Axes",
    "Flops",
    "LayerPlan",
    "Leaf",
    "Masks",
    "Packed",
    "Plan",
    "Product",
    "Rewired",
    "Score",
    "Signals",
    "SparseState",
    "Structure",
    "__version__",
    "ac_dc",
    "accumulate_growth",
    "algorithms",
    "apply_masks",
    "base",
    "block",
    "channel",
    "check_masked",
    "deep_r",
    "describe",
    "dnw",
    "dsr",
    "erdos_renyi",
    "erk",
    "execution",
    "exploration_penalty",
    "explored",
    "fan_in",
    "flops",
    "gates",
    "gmp",
    "granet",
    "grasp",
    "itop",
    "landscape",
    "langevin",
    "make_plan",
    "mest",
    "micronet_bits",
    "micronet_flops",
    "n_of_m",
    "optimizers",
    "pack",
    "packed_training",
    "per_weight_adam",
    "regrow_init",
    "replace_masks",
    "rescale_init",
    "rigl",
    "rigl_inverted",
    "roles",
    "run_packed",
    "schedules",
    "scores",
    "set_",
    "snfs",
    "snip",
    "sparse_average",
    "sparsify",
    "sparsity",
    "srigl",
    "static",
    "ste",
    "straight_through",
    "structures",
    "synflow",
    "top_kast",
    "topology",
    "tracing",
    "training_cost",
    "trees",
    "uniform",
    "unpack",
    "unstructured",
    "values",
    "with_masters",
]
