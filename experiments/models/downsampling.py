"""Training at a lower resolution now and then, in the style of Poulos, Nouri & Moshovos (2019).

Only the abstract of the paper was at hand: some batches train with pooled images and pooled filters, and gradients flow
through the pooling. How filters are pooled, which layers, how often and when are not known; what is here is ours. The
network must take images of several sizes: global pooling before its dense layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from rigl_jax import arguments as rules
from rigl_jax.arguments import arguments


@arguments(x=rules.array(4), k=rules.whole(1))
def pool_input(x: Array, k: int) -> Array:
    """The means of windows of k x k pixels; rows and columns that fill none are left out.

    Args:
      x: [batch, height, width, channels].
      k: size of a window, and the stride.

    >>> pool_input(jnp.arange(4.0).reshape(1, 2, 2, 1), 2).ravel().tolist()
    [1.5]
    """
    return lax.reduce_window(x, 0.0, lax.add, (1, k, k, 1), (1, k, k, 1), "VALID") / k**2


@arguments(k=rules.whole(1))
def pool_filters(params: Any, k: int) -> Any:
    """Every kernel of a convolution with the sums of windows of k x k taps as its taps; other weights as they are.

    Sums and not means, so that a filter answers to a constant image as before. On an image of constant k x k blocks, a
    convolution with stride k gives what the pooled filter gives on the pooled image with stride 1, if k divides the
    filter's size.

    Args:
      params: weights; kernels of convolutions have 4 axes, (height, width, in, out). Zeros fill up the last windows.
      k: size of a window.

    Returns:
      Kernels of (ceil(height / k), ceil(width / k), in, out); derivatives go to all taps of a window alike.

    >>> pool_filters({"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.ones(1)}, 2)["kernel"][:, :, 0, 0].tolist()
    [[4.0, 2.0], [2.0, 1.0]]
    """

    def pooled(kernel: Array) -> Array:
        if jnp.ndim(kernel) != 4:
            return kernel
        fill = [(0, -size % k) for size in kernel.shape[:2]]
        kernel = jnp.pad(kernel, [*fill, (0, 0), (0, 0)])
        height, width, *channels = kernel.shape
        return kernel.reshape(height // k, k, width // k, k, *channels).sum((1, 3))

    return jax.tree.map(pooled, params)


def downsampled(apply: Any, small: Array | bool, k: int = 2) -> Any:
    """`(params, x) -> outputs` of a network on pooled images with pooled filters where `small`, else as it is.

    Args:
      apply: `(params, x) -> outputs`, the same shape for every size of images.
      small: scalar, may be traced: for each batch, such as `jax.random.bernoulli(key, p)`. Only one branch is run.
      k: of the pooling.

    >>> apply = lambda p, x: jnp.mean(x, axis=(1, 2)) @ p
    >>> downsampled(apply, True)(jnp.eye(1), jnp.ones((1, 4, 4, 1))).tolist()
    [[1.0]]
    """

    def switched(params: Any, x: Array) -> Any:
        little = lambda params, x: apply(pool_filters(params, k), pool_input(x, k))  # noqa: E731
        return lax.cond(small, little, apply, params, x)

    return switched
