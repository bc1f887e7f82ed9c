"""Claims of docs/diagnostics_results.md: what papers say, and what the records say of it."""

from __future__ import annotations

import numpy as np

from experiments.studies import diagnostics_certified as certified
from experiments.studies import diagnostics_dead as dead
from experiments.studies import diagnostics_fairness as fairness
from experiments.studies import diagnostics_flow as flow
from experiments.studies import diagnostics_layers as layers
from experiments.studies import diagnostics_members as members
from experiments.studies import diagnostics_resolution as resolution
from experiments.studies import diagnostics_tables as tables
from experiments.studies import diagnostics_ternary as ternary
from experiments.studies.claims import Claim, facts
from experiments.studies.diagnostics import CONVOLUTIONS, DIGITS, FASHION, LENET, PEOPLE, Cell
from experiments.studies.diagnostics_tables import Records

NAMES = {DIGITS: "digits", FASHION: "Fashion-MNIST", LENET: "Fashion-MNIST"}
WAYS = {"static": "static masks", "rigl": "RigL"}


def claims(records: Records) -> list[Claim]:
    """Every claim, in the order of the page."""
    made = (
        _certified_claims, _flow_claims, _ensemble_claims, _layer_claims, _dead_claims, _ternary_claims,
        _resolution_claims,
    )  # fmt: skip
    return [claim for claims in made for claim in claims(records)]


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


# --- dead units ------------------------------------------------------------------------------------------------------


def _dead_claims(records: Records) -> list[Claim]:
    end, at = dead.SHOWN[-1], f"{100 * dead.sparsity(dead.SHOWN[-1]):.0f} %"
    of = lambda name, fact: tables.dead_fact(records, name, fact, end)  # noqa: E731
    return [
        Claim(f"AP lowers the dead neuron rate of networks pruned by {at} (Liu 2023)", of("ap", "rate"),
              of("magnitude", "rate"), lower=True),
        Claim("It raises their accuracy (Liu 2023)", of("ap", "test"), of("magnitude", "test")),
        Claim("The rate is lower than without AP's sign", of("ap", "rate"), of("moved", "rate"), lower=True),
        Claim("Pruning by magnitude raises the dead neuron rate of the dense network", of("magnitude", "rate"),
              tables.dead_fact(records, "magnitude", "rate", 0)),
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
