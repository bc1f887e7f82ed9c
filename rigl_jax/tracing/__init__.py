"""What a model or an optimizer does, read off its jaxpr: costs, roles of weights, their products, channels, invariants.

All of these are rules for one interpreter, `walk.Walker`. To teach one of them a primitive, put a function into its
table: `flops.RULES`, `uses.RULES`, `channels.RULES`, `constants.RULES`, `invariants.ZEROS`, `products.READERS`,
`rigl_jax.execution.run.RULES`.
"""

from rigl_jax.tracing.products import Captured, capture, from_matrix, to_matrix
from rigl_jax.tracing.walk import Walker

__all__ = ["Captured", "Walker", "capture", "from_matrix", "to_matrix"]
