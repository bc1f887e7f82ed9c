"""How much variables tell about each other: rank, mutual information, flow of information, redundancy and synergy."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from rigl_jax import arguments as rules
from rigl_jax import checks, contents
from rigl_jax.arguments import arguments
from rigl_jax.base import Array
from rigl_jax.linear_algebra import energy_rank
from rigl_jax.messages import shown


@arguments(matrix=rules.array(2, host=True), energy=rules.scalar)
def effective_rank(matrix: Any, energy: float = 0.99) -> Array:
    """The least number of singular values that hold a share of the sum of their squares; 0 for a matrix of zeros.

    Of per-example gradients, examples x channels, it says how many channels are not redundant (in the style of Zhou et
    al. 2022, whose text was not at hand); not the exponential of the entropy of the singular values (Roy & Vetterli
    2007). `rx.channels.effective_rank` has scores of channels from it.

    Args:
      matrix: float[rows, columns], of any scale: only ratios of singular values count. Computed in float32.
      energy: the share, above 0 and up to 1; within 1e-6 of it counts.

    Returns:
      int32 scalar, from 0 to min(rows, columns). Under jit 0 for a matrix with NaN or infinity, too.

    Raises:
      ValueError: energy out of range; the matrix is empty, or not finite (seen outside of jit only).

    >>> int(effective_rank(np.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 3.0]])))  # a column twice
    2
    """
    if not isinstance(energy, jax.core.Tracer):
        checks.number("effective_rank", "energy", energy, "must be above 0 and at most 1", lambda x: 0 < x <= 1)
    contents.finite("effective_rank", "matrix", matrix, np.float64)
    if (host := contents.known(matrix)) is not None and host.dtype == np.float64:  # float32 may not hold it
        largest = np.abs(host).max()
        matrix = host / largest if largest else host
    return _rank(jnp.asarray(matrix, jnp.float32), energy)


_rank = jax.jit(energy_rank)


@arguments(x=rules.finite_host_array(1), y=rules.finite_host_array(1), bins=rules.whole(2))
def mutual_information(x: Any, y: Any, *, bins: int = 16) -> float:
    """Mutual information of two variables in nats, by a histogram of equal widths between least and largest values.

    Too large by about `(bins - 1)**2 / (2 n)` for independent variables. Given inputs of maximum entropy, uniform and
    independent, it is the score of Ferianc et al. (2021): see `rx.channels.mutual_information`.

    Args:
      x: [n] numbers.
      y: [n] numbers.
      bins: of each variable.

    Returns:
      At least 0; 0 where one of them is constant.

    Raises:
      ValueError: different lengths, or none; a number that is not finite.

    >>> round(mutual_information(np.arange(64), -np.arange(64), bins=8), 4)  # log 8
    2.0794
    """
    if x.shape != y.shape or not x.size:
        raise ValueError(f"mutual_information: y must be as long as x, {x.shape}, and not empty, got {shown(y)}")
    joint = np.histogram2d(np.asarray(x, np.float64), np.asarray(y, np.float64), bins)[0] / x.size
    apart = joint.sum(0, keepdims=True) * joint.sum(1, keepdims=True)
    some = joint > 0
    return max(float(np.sum(joint[some] * np.log(joint[some] / apart[some]))), 0.0)


def m_flow(information: Mapping[tuple[int, ...], float], n: int) -> np.ndarray:
    """M-information flow through n nodes (Venkatesh et al. 2020, 2021): `max over S of I(M; X_i | X_S)`.

    A node carries information on a message if, given some others, it tells something of it, even if alone it tells
    nothing (XOR). `I(M; X_i | X_S) = I(M; X_S, X_i) - I(M; X_S)`; differences below 0, which estimates have, count as
    0. There are 2**n subsets: for small layers.

    Args:
      information: `{subset: I(M; X_subset)}` for every subset of 0..n-1, as an ascending tuple; that of () is 0 if it
        is left out.
      n: nodes, up to 20.

    Returns:
      float64[n], in the unit of `information`.

    Raises:
      ValueError: n out of range, a subset without a number.

    >>> m_flow({(0,): 0.0, (1,): 0.0, (0, 1): 1.0}, 2).tolist()  # M = X_0 xor X_1
    [1.0, 1.0]
    """
    if not checks.is_whole(n, 1) or n > 20:
        raise ValueError(f"m_flow: n must be a whole number from 1 to 20, got {shown(n)}")
    if not isinstance(information, Mapping):
        raise ValueError(f"m_flow: information must be {{subset: number}}, got {shown(information)}")
    known: dict[tuple[int, ...], float] = {(): 0.0}
    for size in range(1, n + 1):
        for subset in itertools.combinations(range(n), size):
            known[subset] = checks.number(
                "m_flow", f"information at {subset}", information.get(subset), "must be a number", lambda value: True
            )
    flow = np.zeros(n)
    for subset, value in known.items():
        for i in subset:
            flow[i] = max(flow[i], value - known[tuple(j for j in subset if j != i)])
    return flow


_FRACTION = rules.rule("a number from 0 to 1", lambda value: 0 <= checks.real(value) <= 1, checks.plain)


@arguments(accuracy=_FRACTION, share=_FRACTION)
def accuracy_information(accuracy: float, share: float = 0.5) -> float:
    """Bits that a classifier of some accuracy proves on a binary message: `max(H(share) - H(accuracy), 0)` (Fano).

    The estimator of Venkatesh et al. (2021) for `m_flow`: how accurately, on held-out data, the message is predicted
    from a subset of nodes. They use a support vector machine with a kernel. No better than a coin, or than always the
    more frequent value, is 0.

    Args:
      accuracy: on held-out data.
      share: of the examples whose message is 1.

    Returns:
      From 0 to `H(share)`.

    >>> accuracy_information(1.0), accuracy_information(0.5), round(accuracy_information(0.9), 3)
    (1.0, 0.0, 0.531)
    """

    def entropy(p: float) -> float:
        return float(scipy.special.entr([p, 1 - p]).sum() / np.log(2))

    return max(entropy(share) - entropy(accuracy), 0.0) if accuracy > max(share, 1 - share) else 0.0


@arguments(kernel=rules.finite_host_array(2), bias=rules.host_array(1), accuracy=rules.host_array(1))
def biased_edges(kernel: Any, bias: Any, accuracy: Any) -> np.ndarray:
    """How much more bias than accuracy each weight passes on (Venkatesh et al. 2021): `|w bias / accuracy|`.

    Scaling the highest weights by a factor from 0 to 1 trades accuracy for less dependence on the protected message.
    The authors do not guard the division; here a node with bias but without accuracy is inf, unless its weight is 0.

    Args:
      kernel: [in, out], from the nodes of a layer.
      bias: [in], their `m_flow` of the protected message.
      accuracy: [in], their `m_flow` of the label.

    Returns:
      float64[in, out].

    Raises:
      ValueError: flows that do not fit the kernel, or below 0; a weight that is not finite.

    >>> biased_edges([[1.0, -2.0], [3.0, 0.0]], [0.1, 0.0], [0.2, 0.5]).tolist()
    [[0.5, 1.0], [0.0, 0.0]]
    """
    for name, flow in (("bias", bias), ("accuracy", accuracy)):
        if flow.shape != kernel.shape[:1]:
            raise ValueError(f"biased_edges: {name} must be flows of {len(kernel)} nodes, got {shown(flow)}")
        contents.every("biased_edges", name, "at least 0", flow, lambda x: x >= 0)
    weights, bias = np.abs(np.asarray(kernel, np.float64)), np.asarray(bias, np.float64)
    ratio = np.divide(bias, accuracy, out=np.full(len(bias), np.inf), where=accuracy > 0)
    ratio[bias == 0] = 0.0
    return np.multiply(ratio[:, None], weights, out=np.zeros(kernel.shape), where=weights > 0)


@arguments(cov=rules.host_array(2))
def o_information(cov: Any, n_samples: int | None = None) -> float:
    """O-information of Gaussian variables (Rosas et al. 2019; Clauw et al. 2022), in nats.

    `(n - 2) H(X) + sum_i (H(X_i) - H(X_-i))`: above 0 where variables are redundant, below 0 where they are
    synergistic, 0 for two variables or independent ones. Other variables: `copula_normalise` them first.

    Args:
      cov: float[n, n], positive definite; computed in float64.
      n_samples: of how many samples the covariance is, more than n; then the bias of each entropy,
        `(sum_j digamma((N - j) / 2) + n log(2 / (N - 1))) / 2`, is subtracted. None: no correction.

    Raises:
      ValueError: no symmetric, positive definite matrix of two variables or more; too few samples.

    >>> round(o_information([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 2.25]]), 4)  # the third is the sum, noisy
    -0.5108
    """
    n = cov.shape[0]
    cov = np.asarray(cov, np.float64)
    if cov.shape != (n, n) or n < 2 or not np.allclose(cov, cov.T):
        raise ValueError(f"o_information: cov must be a symmetric matrix of two variables or more, got {shown(cov)}")
    if not np.isfinite(cov).all() or np.linalg.eigvalsh(cov)[0] <= 0:
        raise ValueError("o_information: cov must be positive definite; add a little to its diagonal")
    if n_samples is not None and not checks.is_whole(n_samples, n + 1):
        raise ValueError(f"o_information: n_samples must be a whole number above {n}, or None, got {shown(n_samples)}")

    def entropy(keep: list[int]) -> float:
        # Up to constants for each variable, which cancel.
        plain = 0.5 * float(np.linalg.slogdet(cov[np.ix_(keep, keep)])[1])
        return plain - (0.0 if n_samples is None else _bias(len(keep), n_samples))

    every = list(range(n))
    return (n - 2) * entropy(every) + sum(entropy([i]) - entropy([j for j in every if j != i]) for i in every)


def _bias(n: int, samples: int) -> float:
    psi = scipy.special.digamma((samples - np.arange(1, n + 1)) / 2)
    return 0.5 * (float(psi.sum()) + n * float(np.log(2 / (samples - 1))))


@arguments(x=rules.finite_host_array(2))
def copula_normalise(x: Any) -> np.ndarray:
    """Each variable by its ranks as a standard normal one: what depends on its own distribution is gone.

    Args:
      x: [n, variables]. Equal values are ranked in the order of rows.

    Returns:
      float64[n, variables], `Phi^-1(rank / (n + 1))`.

    Raises:
      ValueError: x is empty, or not finite.

    >>> copula_normalise([[5.0], [1.0], [100.0]]).round(3).ravel().tolist()
    [0.0, -0.674, 0.674]
    """
    ranks = np.argsort(np.argsort(x, axis=0, kind="stable"), axis=0, kind="stable") + 1
    return scipy.special.ndtri(ranks / (len(x) + 1))
