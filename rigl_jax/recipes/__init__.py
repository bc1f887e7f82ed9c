"""Recipes: procedures around the user's own training function, and the schedules that they train with."""

from rigl_jax.recipes import retraining

__all__ = ["retraining"]
