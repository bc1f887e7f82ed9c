"""Which examples to train on or to label: scores of examples, and selectors of a fixed number of them.

`scores`: EL2N, GraNd, forgetting events, `top`. `uncertainty`: entropy and its like. `diversity`: sets that cover the
data. `balanced`: the same number for each class. `complexity`: scores before training. `dynamic`: another part of the
data every few epochs. `sampling`: samples with known chances. `teachers`: pseudo labels. Scores are high for what
comes first. Selectors give exactly k different indices; equal scores go to the lower index.
"""

from rigl_jax.coreset.balanced import balanced, boundary_distance
from rigl_jax.coreset.complexity import complexity_gap, complexity_gap_per_class
from rigl_jax.coreset.diversity import badge, k_center, k_means, kmeans_pp
from rigl_jax.coreset.dynamic import RULES, Chosen, SampleStats, Selector, dynamic_pruning
from rigl_jax.coreset.sampling import Sampled, adaptive_bins, horvitz_thompson
from rigl_jax.coreset.scores import Forgetting, ForgettingState, el2n, forgetting, grand, top
from rigl_jax.coreset.teachers import Pseudo, SelfTrained, confident, pseudo_labels, self_training
from rigl_jax.coreset.uncertainty import bald, entropy, least_confidence, margin, mean_std, variation_ratio

__all__ = [
    "RULES",
    "Chosen",
    "Forgetting",
    "ForgettingState",
    "Pseudo",
    "SampleStats",
    "Sampled",
    "Selector",
    "SelfTrained",
    "adaptive_bins",
    "badge",
    "balanced",
    "bald",
    "boundary_distance",
    "complexity_gap",
    "complexity_gap_per_class",
    "confident",
    "dynamic_pruning",
    "el2n",
    "entropy",
    "forgetting",
    "grand",
    "horvitz_thompson",
    "k_center",
    "k_means",
    "kmeans_pp",
    "least_confidence",
    "margin",
    "mean_std",
    "pseudo_labels",
    "self_training",
    "top",
    "variation_ratio",
]
