"""Recipes: procedures around the user's own training function `train(params, masks, start, stop, key) -> Trained`.

A recipe is a generator of tickets. Each ticket is all that the rest depends on: save it, give it back as `resume=`, and
what follows has the same bits. A ticket is a pytree of arrays and numbers.

What training must carry from one call to the next, and what a rewinding must bring back, belongs into `params`: batch
statistics are dense leaves beside the weights. `Trained.aux` is handed out with the ticket and to no later training.
The optimizer starts anew in every call of `train`; schedules go by the steps that `train` is given.
"""

from rigl_jax.base import Train, Trained
from rigl_jax.recipes import retraining
from rigl_jax.recipes.colt import class_parts, colt
from rigl_jax.recipes.free_tickets import edst, edst_rates, ensemble, escape, free_tickets
from rigl_jax.recipes.iterative import Round, iterative_pruning
from rigl_jax.recipes.lottery import lottery_ticket, reinitialise, shuffle_masks
from rigl_jax.recipes.scratch import scratch_control, scratch_steps
from rigl_jax.recipes.sup_tickets import sup_tickets, superpose
from rigl_jax.recipes.tickets import Ticket, plan_by_rate, plan_towards

__all__ = [
    "Round",
    "Ticket",
    "Train",
    "Trained",
    "class_parts",
    "colt",
    "edst",
    "edst_rates",
    "ensemble",
    "escape",
    "free_tickets",
    "iterative_pruning",
    "lottery_ticket",
    "plan_by_rate",
    "plan_towards",
    "reinitialise",
    "retraining",
    "scratch_control",
    "scratch_steps",
    "shuffle_masks",
    "sup_tickets",
    "superpose",
]
