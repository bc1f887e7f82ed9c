"""Set-up data of tests, in NumPy: nothing is compiled."""

import numpy as np


def normal(shapes, seed):
    """`{name: float32}` of standard normal numbers."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
