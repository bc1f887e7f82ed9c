"""Analyses of models and optimizers by their jaxprs: costs, roles of weights, products, channels, invariants.

Each analysis is a table of rules for one interpreter, `walk.Walker`. To support a new primitive, add a function to the
table: `flops.RULES`, `uses.RULES`, `channels.RULES`, `constants.RULES`, `intervals.RULES`, `invariants.ZEROS`,
`products.READERS`, `rigl_jax.execution.run.RULES`.
"""

from rigl_jax.tracing.products import Captured, capture, from_matrix, to_matrix
from rigl_jax.tracing.walk import Walker

__all__ = ["Captured", "Walker", "capture", "from_matrix", "to_matrix"]
