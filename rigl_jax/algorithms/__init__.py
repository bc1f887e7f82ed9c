"""The methods, one small file each; `ALGORITHMS` is the one table of them."""

from rigl_jax.algorithms.rigl import rigl, set_
from rigl_jax.algorithms.static import static

ALGORITHMS = {"static": static, "set": set_, "rigl": rigl}

__all__ = ["ALGORITHMS", "rigl", "set_", "static"]
