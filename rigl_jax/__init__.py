"""Sparse training for JAX: RigL and its family as pure functions and an optax transformation."""

# ruff: noqa: I001, RUF022  (by family, not by the alphabet)

from importlib import metadata

# Modules. Each is a page of its own.
from rigl_jax import (
    algorithms,
    base,
    channels,
    coreset,
    criteria,
    diagnostics,
    execution,
    gates,
    landscape,
    optimizers,
    plot,
    recipes,
    regrow_init,
    schedules,
    scores,
    structures,
    topology,
    tracing,
    trees,
)

# Plans: which weights are sparse, how, and how many stay.
from rigl_jax.plan import make_plan
from rigl_jax.description import Description, describe
from rigl_jax.distributions import erdos_renyi, erk, proportional, uniform
from rigl_jax.tracing.roles import roles
from rigl_jax.structures import block, channel, fan_in, n_of_m, unstructured

# Training: any optax optimizer, made sparse.
from rigl_jax.transform import SparseState, sparsify
from rigl_jax.growth import accumulate_growth
from rigl_jax.initial import rescale_init
from rigl_jax.m_fac import m_fac_optimizer
from rigl_jax.optimizers import per_weight_adam, replace_masks, sparse_average, with_masters

# Methods: what `sparsify` takes. Masks fixed before training; dynamic; pruning while training; latent weights.
from rigl_jax.algorithms import (
    ALGORITHMS,
    static,
    snip,
    grasp,
    synflow,
    rigl,
    rigl_inverted,
    set_,
    itop,
    explored,
    mest,
    snfs,
    dsr,
    deep_r,
    langevin,
    srigl,
    granet,
    gmp,
    ac_dc,
    ste,
    dnw,
    top_kast,
    exploration_penalty,
)

# Pruning a network that is trained: `prune` by one of `criteria`.
from rigl_jax.pruning import prune

# Masks on weights.
from rigl_jax.masking import apply_masks, check_masked, sparsity, straight_through

# Masks as numbers, for a log. `plot` draws them.
from rigl_jax.mask_metrics import metrics

# Packed weights: active values only.
from rigl_jax.execution import Packed, pack, packed_training, run_packed, unpack

# Costs.
from rigl_jax.tracing.flops import Flops, Product, flops
from rigl_jax.costs import micronet_bits, micronet_flops, training_cost

# Types.
from rigl_jax.base import (
    Algorithm,
    Axes,
    Criterion,
    LayerPlan,
    Leaf,
    Masks,
    Plan,
    Pruned,
    Rewired,
    Score,
    Signals,
    Structure,
    Surgeon,
)

values = regrow_init
"""The former name of `rx.regrow_init`."""

try:
    __version__ = metadata.version("rigl_jax")
except metadata.PackageNotFoundError:  # run from its sources, not installed
    __version__ = "0+unknown"

__all__ = [
    "__version__",
    # plans
    "make_plan",
    "Description",
    "describe",
    "erdos_renyi",
    "erk",
    "proportional",
    "uniform",
    "roles",
    "block",
    "channel",
    "fan_in",
    "n_of_m",
    "unstructured",
    # training
    "SparseState",
    "sparsify",
    "accumulate_growth",
    "rescale_init",
    "m_fac_optimizer",
    "per_weight_adam",
    "replace_masks",
    "sparse_average",
    "with_masters",
    # methods
    "ALGORITHMS",
    "static",
    "snip",
    "grasp",
    "synflow",
    "rigl",
    "rigl_inverted",
    "set_",
    "itop",
    "explored",
    "mest",
    "snfs",
    "dsr",
    "deep_r",
    "langevin",
    "srigl",
    "granet",
    "gmp",
    "ac_dc",
    "ste",
    "dnw",
    "top_kast",
    "exploration_penalty",
    # pruning a network that is trained
    "prune",
    # masks on weights
    "apply_masks",
    "check_masked",
    "sparsity",
    "straight_through",
    # numbers for a log
    "metrics",
    # packed weights
    "Packed",
    "pack",
    "packed_training",
    "run_packed",
    "unpack",
    # costs
    "Flops",
    "Product",
    "flops",
    "micronet_bits",
    "micronet_flops",
    "training_cost",
    # types
    "Algorithm",
    "Axes",
    "Criterion",
    "LayerPlan",
    "Leaf",
    "Masks",
    "Plan",
    "Pruned",
    "Rewired",
    "Score",
    "Signals",
    "Structure",
    "Surgeon",
    # modules
    "algorithms",
    "base",
    "channels",
    "coreset",
    "criteria",
    "diagnostics",
    "execution",
    "gates",
    "landscape",
    "optimizers",
    "plot",
    "recipes",
    "regrow_init",
    "schedules",
    "scores",
    "structures",
    "topology",
    "tracing",
    "trees",
    "values",
]
