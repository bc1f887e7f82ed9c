"""Learned sparsity: hard-concrete L0 gates, variational dropout, step gates (SCL), masks sampled by Gibbs pruning.

They change the model and not the optimizer, so these are functions to call in a loss and not algorithms for `sparsify`.
All but Gibbs pruning add a parameter for each weight (or unit) that is trained beside it, and a term to the loss;
sparsity is what comes out of training, not what is put in. To end with exact counts prune by them:
`topology.prune_tree(plan, score)` with `log_alpha` of the gates, with minus `log_alpha(...)` of variational dropout, or
with `tau` of the step gates. Training FLOPs: those of dense training, 3 f_D.
"""

from rigl_jax.gates.gibbs import gibbs, gibbs_kernels, gibbs_units
from rigl_jax.gates.steps import count_open, normalise_units, step_gate
from rigl_jax.gates.stochastic import (
    BETA,
    GAMMA,
    ZETA,
    expected_l0,
    hard_concrete,
    hard_concrete_mean,
    l0_penalty,
    log_alpha,
    probability_open,
    variational_kl,
    variational_matmul,
)

__all__ = [
    "BETA",
    "GAMMA",
    "ZETA",
    "count_open",
    "expected_l0",
    "gibbs",
    "gibbs_kernels",
    "gibbs_units",
    "hard_concrete",
    "hard_concrete_mean",
    "l0_penalty",
    "log_alpha",
    "normalise_units",
    "probability_open",
    "step_gate",
    "variational_kl",
    "variational_matmul",
]
