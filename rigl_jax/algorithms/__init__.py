"""The methods, one small file each; `registry` is the table of them."""

from rigl_jax.algorithms.ac_dc import ac_dc
from rigl_jax.algorithms.deep_r import deep_r, langevin
from rigl_jax.algorithms.dsr import dsr
from rigl_jax.algorithms.gmp import gmp
from rigl_jax.algorithms.granet import granet
from rigl_jax.algorithms.grasp import grasp
from rigl_jax.algorithms.itop import explored, itop
from rigl_jax.algorithms.mest import mest
from rigl_jax.algorithms.one_shot import one_shot
from rigl_jax.algorithms.registry import ALGORITHMS, METHODS, Entry
from rigl_jax.algorithms.rigl import rigl, rigl_inverted, set_
from rigl_jax.algorithms.snfs import snfs
from rigl_jax.algorithms.snip import snip
from rigl_jax.algorithms.srigl import srigl
from rigl_jax.algorithms.static import static
from rigl_jax.algorithms.ste import dnw, ste
from rigl_jax.algorithms.synflow import synflow
from rigl_jax.algorithms.top_kast import exploration_penalty, top_kast

__all__ = [
    "ALGORITHMS",
    "METHODS",
    "Entry",
    "ac_dc",
    "deep_r",
    "dnw",
    "dsr",
    "exploration_penalty",
    "explored",
    "gmp",
    "granet",
    "grasp",
    "itop",
    "langevin",
    "mest",
    "one_shot",
    "rigl",
    "rigl_inverted",
    "set_",
    "snfs",
    "snip",
    "srigl",
    "static",
    "ste",
    "synflow",
    "top_kast",
]
