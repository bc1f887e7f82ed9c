"""docs/diagnostics_results.md, from the records of `experiments.studies.diagnostics`.

python -m experiments.studies.diagnostics_page            # writes the page
python -m experiments.studies.diagnostics_page --check    # fails if the page is out of date
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments import pages
from experiments.studies import diagnostics_certified as certified
from experiments.studies import diagnostics_fairness as fairness
from experiments.studies import diagnostics_flow as flow
from experiments.studies import diagnostics_layers as layers
from experiments.studies import diagnostics_members as members
from experiments.studies import diagnostics_resolution as resolution
from experiments.studies import diagnostics_tables as tables
from experiments.studies import diagnostics_ternary as ternary
from experiments.studies.claims import Claim, claimed, facts
from experiments.studies.data_training import SEEDS, TRAIN
from experiments.studies.diagnostics import CONVOLUTIONS, DIGITS, FASHION, LENET, PEOPLE, Cell, cells, read
from experiments.studies.diagnostics_tables import Records
from experiments.studies.method_page import LEVEL

PAGE = Path(__file__).parents[2] / "docs" / "diagnostics_results.md"
NAMES = {DIGITS: "digits", FASHION: "Fashion-MNIST", LENET: "Fashion-MNIST"}
WAYS = {"static": "static masks", "rigl": "RigL"}


# --- certified accuracy ----------------------------------------------------------------------------------------------


def _certified_claims(records: Records) -> list[Claim]:
    nrs = (certified.NRS, f"{certified.NRS:g}")
    pairs = {
        "Pruning 90 % by magnitude raises certified accuracy (Li 2022)": (("magnitude", 0.9), ("longer", 0.0)),
        "RigL at 90 % has a higher certified accuracy than the dense network": (("rigl", 0.9), ("dense", 0.0)),
        "Pruned by 90 % it is higher than by RigL": (("magnitude", 0.9), ("rigl", 0.9)),
        f"NRS in the loss, weight {nrs[1]}, raises it (Li 2022)": (("nrs", nrs[0]), ("dense", 0.0)),
        "NRS before pruning 90 % is better than pruning alone (Li 2022)": (("nrs_magnitude", 0.9), ("magnitude", 0.9)),
        "Removing half of the units by NRS is better than by norm (Li 2022)": (("stability", 0.5), ("units", 0.5)),
        "Under certified training RigL at 90 % is higher than dense": (("certified_rigl", 0.9), ("certified", 0.0)),
    }
    of = lambda who, radius: tables.certified_fact(records, who[0], who[1], "certified", radius)  # noqa: E731
    lines = [
        Claim(text, of(ours, radius), of(theirs, radius), at=f"{radius:g}")
        for text, (ours, theirs) in pairs.items()
        for radius in certified.RADII[1:3]
    ]
    attacked, clean = (
        [tables.certified_fact(records, *who, fact, radius) for who in (("magnitude", 0.9), ("longer", 0.0))]
        for fact, radius in (("attacked", certified.EPS), ("test", None))
    )
    lines.append(Claim("Pruning 90 % by magnitude raises the accuracy under attack", attacked[0], attacked[1]))
    return [*lines, Claim("It costs accuracy on plain images", clean[0], clean[1], lower=True)]


# --- flow and fairness -----------------------------------------------------------------------------------------------


def _flow_claims(records: Records) -> list[Claim]:
    gap, accuracy = (
        {name: facts(records, tables.CUT, "ways", name, "0", fact) for name in flow.RULES}
        for fact in ("gap", "accuracy")
    )
    whole, rank = (facts(records, tables.CUT, *path) for path in (("whole", "gap"), ("ranks", "flow")))
    settled = {
        (sparsity, parts): facts(
            records, Cell(PEOPLE, "fairness", "magnitude", sparsity), "parts", str(parts), "settled"
        )
        for sparsity in fairness.SPARSITIES
        for parts in fairness.PARTS
    }
    few, many, most = fairness.PARTS[0], fairness.PARTS[-1], fairness.SPARSITIES[-1]
    return [
        Claim("Cutting the two weights with the largest ratio of flows lowers the gap (Venkatesh 2021)", gap["flow"],
              whole, lower=True),
        Claim("It lowers it more than random weights do", gap["flow"], gap["random"], lower=True),
        Claim("It costs less accuracy than cutting the largest weights", accuracy["flow"], accuracy["magnitude"]),
        Claim("Flow ranks weights by how much cutting one lowers the gap (rank correlation above 0)", rank,
              None if rank is None else np.zeros(len(rank))),
        Claim("In smaller boxes intervals settle more ReLUs (Biswas 2023)", settled[0.0, many], settled[0.0, few]),
        Claim(f"Intervals settle more ReLUs of a network pruned by {100 * most:g} %", settled[most, many],
              settled[0.0, many]),
    ]  # fmt: skip


# --- ensembles -------------------------------------------------------------------------------------------------------


def _ensemble_claims(records: Records) -> list[Claim]:
    lines, first = [], f"mimo_{members.RHO[0]:g}"
    pairs = [
        ("deep", "dense", "A deep ensemble has {} than one network (Lakshminarayanan 2017)"),
        (first, "dense", "MIMO has {} than one network (Havasi 2021)"),
        (first, "deep", "MIMO has {} than the deep ensemble"),
        ("rigl_deep", "dense", "An ensemble of RigL's networks at 90 % has {} than one dense network"),
        ("edst_0.9", "deep", "EDST at 90 % has {} than the dense deep ensemble"),
    ]
    for model in (DIGITS, LENET):
        found = {name: each.values for name, each in tables.of_ensembles(records, model).items()}
        for ours, theirs, text in pairs:
            for i, fact in enumerate(("a higher accuracy", "a lower NLL", "a lower ECE")):
                if {ours, theirs} <= found.keys():
                    a, b = (None if (v := found[name]) is None else v[:, i] for name in (ours, theirs))
                    lines.append(Claim(text.format(fact), a, b, lower=i > 0, at=NAMES[model]))
    return lines


# --- layers ----------------------------------------------------------------------------------------------------------


def _layer_claims(records: Records) -> list[Claim]:
    lines = []
    for model, how in ((DIGITS, "static"), (DIGITS, "rigl"), (FASHION, "static")):
        for name in ("ranks", "noise"):
            for sparsity in layers.SPARSITIES:
                ours, erk = (facts(records, Cell(model, how, each, sparsity), "test") for each in (name, "erk"))
                text = f"Density by the {layers.DISTRIBUTIONS[name]} is better than ERK on {NAMES[model]}, {WAYS[how]}"
                lines.append(Claim(text, ours, erk, at=f"{100 * sparsity:g} %"))
    for model in (DIGITS, FASHION):
        ends = facts(records, Cell(model, "layers", "measured", 0.0), "o_information", "end")
        first, last = (None, None) if ends is None else (ends[0], ends[-1])
        zero = None if first is None else np.zeros(len(first))
        lines += [
            Claim(f"Triplets of the first layer are redundant on {NAMES[model]} (Clauw 2022)", first, zero),
            Claim(f"Triplets of the last hidden layer are synergistic on {NAMES[model]} (Clauw 2022)", last, zero,
                  lower=True),
        ]  # fmt: skip
    return lines


# --- ternary weights -------------------------------------------------------------------------------------------------


def _ternary_claims(records: Records) -> list[Claim]:
    full = tables.ternary_fact(records, "float", "float", "test")
    ends = {start: tables.ternary_fact(records, start, "sweeps", ternary.SWEEPS, "test") for start in ternary.STARTS}
    return [
        Claim("Sweeps are better than rounding a trained network", ends["rounded"],
              tables.ternary_fact(records, "float", "rounded", "test")),
        Claim("From random weights, ternary networks reach less than float ones (Date 2020 says as good)",
              ends["random"], full, lower=True),
        Claim("From rounded weights they reach less than float ones", ends["rounded"], full, lower=True),
    ]  # fmt: skip


# --- resolution ------------------------------------------------------------------------------------------------------


def _resolution_claims(records: Records) -> list[Claim]:
    half, lines = f"{100 * resolution.HALF:g} %", []
    for model, data in CONVOLUTIONS.items():
        found = {cell: facts(records, Cell(model, "resolution", *cell), "test") for cell in resolution.cells()[:-1]}
        drawn = found["random", resolution.HALF]
        lines += [
            Claim(f"Small images and filters in {half} of the steps cost accuracy (Poulos 2019: hardly any)", drawn,
                  found["whole", 0.0], lower=True, at=NAMES[data]),
            Claim("They reach more than whole steps alone for as many FLOPs", drawn, found["short", resolution.HALF],
                  at=NAMES[data]),
            Claim("They reach more than small images with whole filters", drawn, found["images", resolution.HALF],
                  at=NAMES[data]),
            Claim("Small steps first reach more than small steps in between", found["first", resolution.HALF], drawn,
                  at=NAMES[data]),
        ]  # fmt: skip
    return lines


# --- the page --------------------------------------------------------------------------------------------------------


def page(records: Records) -> str:
    """docs/diagnostics_results.md."""
    wanted: Sequence[Cell] = list(cells())
    done = sum(cell in records for cell in wanted)
    made = (_certified_claims, _flow_claims, _ensemble_claims, _layer_claims, _ternary_claims, _resolution_claims)
    every = [claim for claims in made for claim in claims(records)]
    return f"""# Results of diagnostics and other systems

Generated by `python -m experiments.studies.diagnostics_page` from
[experiments/records/diagnostics](../experiments/records/diagnostics). {done} of the {len(wanted)} cells have been run
by `python -m experiments.studies.diagnostics`. The functions are those of [`rx.diagnostics`](api/measurements.md).

Numbers are mean and standard deviation over {len(SEEDS)} seeds; differences are in percentage points, with a paired
t-test over seeds, bold below {LEVEL:g}. With so few seeds and so many tests some differ by chance. No option was tuned.
Networks and data are small: what came out here says little about larger ones.

## Against what the papers claim

{claimed(every)}
The claim of a paper is in our words; most were made of other data and networks. Where no paper is named, the line is
ours.

{_robust(records)}{_fair(records)}{_others(records)}"""


def _robust(records: Records) -> str:
    return f"""## Certified accuracy

scikit-learn's digits, 64-32 hidden units. An image is certified at a radius, a share of the range of pixels, if
interval arithmetic (IBP) proves the prediction for all changes of so much in each pixel: a lower bound. Attacked is the
accuracy after {certified.STEPS} steps of projected gradients: an upper bound of what is true. Li et al. (2022) verify
by branch and bound, which proves more. A pruned network is trained on for half as many steps; "trained on" is the
control. NRS and certified training have the radius {certified.EPS:g}, which grows over the first half of the training.
A removed unit counts as stable.

{tables.certified_accuracy(records)}
"""


def _fair(records: Records) -> str:
    first, second = flow.HIDDEN
    return f"""## Flow of a protected attribute

People are drawn: a bit z, a merit that does not depend on it, and a label that favours z = 1. Networks of 3 features
(merit with noise, a proxy of z, a mixture), {first} and {second} hidden units predict the label. The flow of z and of
the label through each unit is estimated by support vector machines on all subsets of a layer. The gap is the difference
of the shares of both groups that get the favourable answer; the gap of the labels themselves is what a right answer
has. Weights of the last layer are not cut. "Random" is the mean of {flow.DRAWS} pairs.

{tables.cut(records)}
{tables.ranks(records)}
## Individual fairness, proven or refuted

Networks of {"-".join(map(str, fairness.SIZES))} units that also see z. A box is fair if no two people in it that differ
in z alone get different answers. The solver z3 has {fairness.SECONDS:g} seconds for a box; "unknown" is where that was
not enough. Features are between -{fairness.LIMIT:g} and {fairness.LIMIT:g}; 8 boxes halve each of the three.

{tables.verdicts(records)}
"""


def _others(records: Records) -> str:
    return f"""## Ensembles

FLOPs are multiplications of weights, one dense network = 1. MIMO trains for as many steps as one network, each member
on each image once an epoch, by the mean of their losses: by the sum, at the rate of one network, it diverges. The
authors repeat every image four times in a batch. The first layer is most of these
networks, so that three inputs multiply their cost; in the authors' wide ResNet they are nearly free.

### digits

{tables.ensembles_of_three(records, DIGITS)}
### LeNet-300-100 on Fashion-MNIST

Trained as in [the study of pruning](pruning_results.md), from whose records the dense networks, RigL and EDST are.

{tables.ensembles_of_three(records, LENET)}
{_distributions(records)}## Ternary weights by coordinate descent

Digits, {"-".join(map(str, ternary.HIDDEN))} hidden units, in the style of CoNNTrA, of whose text only the abstract was
at hand. Each visit tries -s, 0 and s on all training images and keeps the best; a sweep visits all weights in a random
order. s is a constant of a layer. "Rounded" keeps the biases of the float network; from random weights they are 0.

{tables.ternary_weights(records)}
{_resolution(records)}## What was not run

Real data with protected attributes: none is at hand. Certified accuracy by branch and bound. Approximate multipliers:
noise tolerance is used for sparsity alone. Residual networks, on which Poulos et al. trained.
"""


def _resolution(records: Records) -> str:
    parts = "".join(f"### {NAMES[data]}\n\n{tables.resolutions(records, m)}\n" for m, data in CONVOLUTIONS.items())
    small, large = resolution.FEATURES
    channels = {side: "-".join(map(str, widths)) for side, widths in resolution.FEATURES.items()}
    return f"""## Some steps at half the resolution

In the style of Poulos et al. (2019), of whose text only the abstract was at hand: some batches train with pooled images
and pooled filters, whose gradients reach the whole filters through the pooling. How filters are pooled, which batches
and how many are our choice. Images are averaged and filters summed over {resolution.K} x {resolution.K} pixels or taps.

Networks are two convolutions of {resolution.SIDE} x {resolution.SIDE}, of {channels[small]} channels for digits and
{channels[large]} for the first {TRAIN:,} images of Fashion-MNIST, and a mean over the image before the last layer. They
train {resolution.EPOCHS[small]} and {resolution.EPOCHS[large]} epochs and are tested on whole images. The authors say
that residual networks train in up to 23 % less time with hardly less accuracy. What training shorter gives is the last
row. Costs of training are relative to whole steps alone; CPU seconds are those of {resolution.TIMED} steps of each kind
on one thread, timed in turn.

{parts}"""


def _distributions(records: Records) -> str:
    parts = [
        f"""### {NAMES[model]}

{tables.by_layer(records, model)}
Test accuracy, percent, {WAYS["static"]}:

{tables.distributions(records, model, "static")}
"""
        for model in (DIGITS, FASHION)
    ]
    digits, fashion = parts
    hidden = {name: "-".join(map(str, layers.HIDDEN[size])) for name, size in ((DIGITS, 64), (FASHION, 784))}
    return f"""## Sparsity by what was measured of each layer

Hidden layers of {hidden[DIGITS]} units on digits, {hidden[FASHION]} on the first {TRAIN:,} images of Fashion-MNIST.
Ranks and learned noise tolerances are measured on dense networks with {layers.EXAMPLES} training images; a distribution
has their means over the seeds, the inverse of the tolerance. "Accuracy lost" is that of the dense network without the
{100 * layers.ALONE:g} % smallest weights of the layer alone. O-information is the mean of {layers.TRIPLETS} triplets of
what ReLUs read: above 0 redundant, below 0 synergistic. Sparse networks begin with the weights of dense ones, not
scaled up; where the accuracy is 10 % they did not learn.

{digits}Test accuracy, percent, {WAYS["rigl"]}:

{tables.distributions(records, DIGITS, "rigl")}
{fashion}"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the page; returns the exit code."""
    about = (__doc__ or "").splitlines()[0]
    return pages.main("experiments.studies.diagnostics_page", about, lambda: {PAGE: page(read())}, arguments=arguments)


if __name__ == "__main__":
    raise SystemExit(main())
