"""docs/pruning_results.md and its figures, from the records of `experiments.studies.pruning`.

python -m experiments.studies.pruning_page            # writes the page and draws the figures
python -m experiments.studies.pruning_page --check    # fails if the page is out of date
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import pages
from experiments.benchmarks import timing
from experiments.report import drawing
from experiments.studies import pruning_tables as tables
from experiments.studies.method_page import LEVEL, paired
from experiments.studies.method_training import BATCH
from experiments.studies.pruning import BUDGETS, CHOICE, SEEDS, SPARSITIES, STUDIES, Cell, cells, choose, read
from experiments.studies.pruning_cells import CRITERIA, PERIOD
from experiments.studies.pruning_tables import ACCURACY, ECE, LOSS, TICKETS, Fact, Place, Runs, fact, percent, values
from experiments.studies.pruning_training import EXAMPLES, MODELS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "pruning_results.md"
TITLES = {"lenet_300_100": "LeNet-300-100 (266,200 weights)", "lenet5": "LeNet-5 (44,190 weights)"}
LOOKS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333", "#999999")
DRAWN = ("magnitude_global", "magnitude_layer", "snip", "synflow", "fisher", "sparsegpt", "m_fac", "random")
"""Criteria of the figure."""


class Claim(NamedTuple):
    """What a paper says of two methods. `higher`: ours has the larger value."""

    text: str
    study: str
    ours: str
    theirs: str
    read_fact: Fact = ACCURACY
    higher: bool = True


def _criterion_claims() -> list[Claim]:
    sources = {
        "obd": "LeCun 1990",
        "fisher": "Theis 2018",
        "taylor": "Molchanov 2019",
        "singe": "Yvinec 2022",
        "wanda": "Sun 2024",
        "sparsegpt": "Frantar 2023",
        "m_fac": "Frantar 2021",
    }
    return [
        Claim(
            f"{CRITERIA[name].label} costs less loss before fine-tuning than magnitude ({source})",
            "criteria",
            name,
            f"magnitude_{CRITERIA[name].scope}",
            fact("before", 1),
            higher=False,
        )
        for name, source in sources.items()
    ]


def _control_claims() -> list[Claim]:
    found = {name: TICKETS[name].removeprefix("control: ") for name in ("reinit", "shuffled", "random")}
    return [
        Claim(f"The ticket is better than {text} (Frankle 2019)", "lottery", "rewind_0", name)
        for name, text in found.items()
    ]


def _ensemble_claims() -> list[Claim]:
    found = {"edst": "EDST has (Liu 2022)", "sup_tickets": "Sup-Tickets have (Yin 2022)"}
    facts = {"a higher accuracy": (ACCURACY, True), "a lower NLL": (LOSS, False), "a lower ECE": (ECE, False)}
    return [
        Claim(text.replace("(", f"{what} than one run of RigL ("), "ensembles", name, "rigl", *how)
        for name, text in found.items()
        for what, how in facts.items()
    ]


CLAIMS = (
    Claim("Magnitude is better than random", "criteria", "magnitude_layer", "random"),
    Claim("Magnitude over all layers is better than by layer", "criteria", "magnitude_global", "magnitude_layer"),
    Claim("Rounds are better than one shot (Han 2015)", "criteria", "iterative", "magnitude_global"),
    Claim("NNrelief is better than magnitude (Dekhovich 2024)", "criteria", "nnrelief", "magnitude_layer"),
    *_criterion_claims(),
    *_control_claims(),
    Claim("Rewinding to a later step is better than to step 0 (Frankle 2020)", "lottery", "rewind_k", "rewind_0"),
    Claim("Rewinding the rate is better than the weights (Renda 2020)", "lottery", "learning_rate", "rewind_k"),
    Claim("LRW is better than FT (Renda 2020)", "retraining", "rewind", "finetune"),
    Claim("CLR is better than LRW (Le 2021)", "retraining", "clr", "rewind"),
    Claim("LLR is better than LRW (Zimmer 2023)", "retraining", "llr", "rewind"),
    Claim("ALLR is better than LLR (Zimmer 2023)", "retraining", "allr", "llr"),
    Claim("BIMP is better than one shot with ALLR", "retraining", "bimp", "allr"),
    *_ensemble_claims(),
    Claim("RigL is better than dense training at equal FLOPs", "ensembles", "rigl", "equal_flops"),
)
"""Accuracies after fine-tuning, unless they say otherwise."""


def outcome(runs: Runs, model: str, claim: Claim) -> str:
    """At how many places a claim came out."""
    kinds: dict[str, list[str]] = {"yes": [], "not told apart": [], "the opposite": []}
    for place in sorted(runs):
        other = place._replace(method=claim.theirs)
        if place[:3] != (model, claim.study, claim.ours) or other not in runs:
            continue
        shared = min(len(runs[p]) for p in (place, other))  # the first seeds
        pair = paired(*(np.array([claim.read_fact(run) for run in runs[p][:shared]]) for p in (place, other)))
        if pair is not None:
            kind = "yes" if (pair[0] > 0) == claim.higher else "the opposite"
            at = percent(place.sparsity) + (f" ({place.epochs:g} epochs)" if claim.study == "retraining" else "")
            kinds["not told apart" if not pair[1] < LEVEL else kind].append(at)
    return "; ".join(f"{kind} at {', '.join(at)}" for kind, at in kinds.items() if at) or "not run"


def claims(runs: Runs, model: str) -> str:
    """One line a claim."""
    return pages.table(
        ["claim", "came out"], [[claim.text, outcome(runs, model, claim)] for claim in CLAIMS], left=[True, True]
    )


def picture(model: str) -> Path:
    """Where the figure of a model is."""
    return ROOT / "docs" / "figures" / f"pruning_{model}.png"


def has_picture(runs: Runs, model: str) -> bool:
    """Whether there is a line to draw: criteria, or tickets, at more than one sparsity."""
    found = ({p.sparsity for p in runs if p[:2] == (model, study)} for study in ("criteria", "lottery"))
    return any(len(sparsities) > 1 for sparsities in found)


def figure(runs: Runs, model: str) -> Figure:
    """Accuracy over sparsity: criteria after fine-tuning, tickets and controls."""
    with matplotlib.rc_context(drawing.LOOK):
        result, [[left, right]] = drawing.new_figure(2, 1, 4.6, 3.9)
        names = {name: tables.label(name) for name in DRAWN}
        _lines(left, runs, model, names, [("criteria", s, BUDGETS[1]) for s in SPARSITIES])
        _lines(right, runs, model, TICKETS, [("lottery", s, 0.0) for s in tables.levels(runs, model)])
        left.set_title("Criteria, after fine-tuning")
        right.set_title("Lottery tickets")
    return result


def _lines(axes: Axes, runs: Runs, model: str, labels: Mapping[str, str], columns: Any) -> None:
    for (name, text), colour, marker in zip(labels.items(), LOOKS, "ovsD^<P*", strict=False):
        found = [values(runs, Place(model, study, name, s, e), ACCURACY) for study, s, e in columns]
        shown = {i: value for i, value in enumerate(found) if value is not None}
        means, bars = [v.mean() for v in shown.values()], [v.std(ddof=1) for v in shown.values()]
        look = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.2, "capsize": 2}
        if shown:
            axes.errorbar(list(shown), means, bars, label=text, **look)
    axes.set_xticks(range(len(columns)), [percent(round(s, 3)) for _, s, _ in columns])
    axes.set_xlabel("Sparsity")
    axes.set_ylabel("Test accuracy, %")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=6.5, loc="lower left")


def section(runs: Runs, records: Mapping[Cell, Any], model: str) -> str:
    """All about one model."""
    if not any(place.model == model for place in runs):
        return f"## {TITLES[model]}\n\nNot run yet.\n"
    spec = MODELS[model]
    chosen = choose(records, model)
    told = f"`{chosen}` came out" if chosen else "it has not been run yet"
    image = f"![accuracy over sparsity: criteria and lottery tickets](figures/{picture(model).name})\n\n"
    return f"""## {TITLES[model]}

{image if has_picture(runs, model) else ""}The dense networks were trained for {spec["epochs"]} epochs from a
learning rate of {spec["rate"]:g}. Of the schedules of fine-tuning, chosen by validation accuracy at
{percent(CHOICE[1])} and {CHOICE[2]:g} epochs, {told}.

### Criteria at once, then {BUDGETS[1]:g} epochs of fine-tuning

{tables.criteria(runs, model)}
### Lottery tickets

Test accuracy in percent. Each level trains for as long as the dense network.

{tables.lottery(runs, model)}
### Retraining at equal budget

Magnitude over all layers, once, then so many epochs by each schedule; test accuracy in percent.

{tables.retraining(runs, model)}
### Ensembles and superposed tickets

All but the dense network of equal FLOPs train for as many steps as the dense one.

{tables.ensembles(runs, model)}
### Against what the papers claim

{claims(runs, model)}
"""


_SEEDS = ", ".join(
    f"{spec['seeds']}{' or more' if spec['seeds'] < len(SEEDS) else ''} of {TITLES[model].split()[0]}"
    for model, spec in MODELS.items()
)
METHOD = f"""Networks are trained on the first 50,000 images of Fashion-MNIST with SGD (momentum 0.9, Nesterov, weight
decay 5e-4 on kernels) at a batch of {BATCH} and a learning rate that falls by a cosine. The last 10,000 training images
are for validation, and the test images are looked at once for each network. Kernels are pruned, biases are not. Counts
are the same share of every layer ("layer"), or of all together ("global"). Numbers are mean and standard deviation over
seeds: {_SEEDS}. All that is compared shares, seed by seed, the dense network, the order of the images, and the
{EXAMPLES} training images that criteria see. A claim "came out" by a paired t-test over seeds at the level of
{LEVEL:g}: so few seeds cannot show a small difference, and with this many tests some differ by chance.

Networks are trained for few epochs, and no option of a criterion was tuned. OBD estimates the diagonal from 64
products with the Hessian, M-FAC prunes in 4 steps with {EXAMPLES // 32} gradients, SynFlow in 100 rounds; Wanda and
NNrelief rank the weights of one output. Taylor FO ranks by the square of SNIP's score, so the two prune alike. BIMP
starts from the same dense networks as the others. FT and LRW take the last rates of the dense run. Its cosine ends
near 0, where the stepwise schedules of the papers do not: FT hardly trains here. RigL moves 0.3 of the weights every
{PERIOD} steps from an Erdos-Renyi start, in one run until 3/4 of training, in EDST all along. EDST explores for a third
of the training, Sup-Tickets take its last tenth.
"""

NOT_RUN = """## What was not run

{cells}
* OBS: its Hessian is a matrix of the square of all weights, and the library takes at most 10,000.
* Gibbs pruning, SCL and COLT; structures other than single weights; other data than Fashion-MNIST, and the networks
  of the papers (ResNets on CIFAR-10 and ImageNet, language models): what came out here says little about them.
"""


def peers() -> str:
    """The comparison with other libraries on the same weights."""
    rows = timing.rows("pruning_peers")
    if not rows:
        return "Not run yet.\n"
    head = ["peer", "layer", "weights that differ", "of", "ours, ms", "peer, ms", "why"]
    cut = [
        [row["peer"], row["layer"], str(row["differ"]), f"{row['weights']:,}", f"{row['ours_ms']:.1f}",
         f"{row['peer_ms']:.1f}", row["why"]]
        for row in rows
    ]  # fmt: skip
    return pages.table(head, cut, left=[True, True, False, False, False, False, True])


def missing(records: Mapping[Cell, Any]) -> str:
    """How many cells of each study have been run, and what the plan leaves out."""
    rows, cut = [], []
    for model, spec in MODELS.items():
        whole, wanted = (list(cells([model], whole=every)) for every in (True, False))
        counts = [[c in records for c in whole if c.study == study] for study in STUDIES]
        rows.append([TITLES[model], *(f"{sum(found)} of {len(found)}" for found in counts)])
        if len(wanted) < len(whole):
            name = TITLES[model].split()[0]
            cut.append(
                f"* {name} is slow on CPU, so the plan leaves out {len(whole) - len(wanted)} of {len(whole)} cells: "
                f"seeds from {spec['seeds']} on, and the retraining schedules at other places than "
                f"{percent(CHOICE[1])} and {CHOICE[2]:g} epochs. "
                f"`python -m experiments.studies.pruning --model {model} --whole` runs them."
            )
    head = "Cells that have been run, of all that the study has:\n\n"
    return head + pages.table(["", *STUDIES], rows) + "\n" + "\n".join(cut)


def page(records: Mapping[Cell, Mapping[str, Any]]) -> str:
    """docs/pruning_results.md."""
    runs, wanted = tables.gather(records), list(cells())  # what is planned
    done = sum(cell in records for cell in wanted)
    return f"""# Results of pruning on Fashion-MNIST

Generated by `python -m experiments.studies.pruning_page` from
[experiments/records/pruning](../experiments/records/pruning). {done:,} of the {len(wanted):,} planned cells have been
run; `python -m experiments.studies.pruning` runs the others. How to prune is told in [pruning.md](pruning.md).

{METHOD}
{"".join(section(runs, records, model) + chr(10) for model in MODELS)}## Other libraries on the same weights

`python -m experiments.benchmarks.pruning_peers` prunes one trained LeNet-300-100 to 90 % with this library and with
others, in one process.

{peers()}
{NOT_RUN.format(cells=missing(records))}"""


def main(argv: Any = None) -> int:
    """Writes page and figures, or checks the page; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, fail if the page is out of date")
    check, records = parser.parse_args(argv).check, read()
    runs = tables.gather(records)
    for model in () if check else filter(functools.partial(has_picture, runs), MODELS):
        picture(model).write_bytes(drawing.png(figure(runs, model)))
    return pages.update({PAGE: page(records)}, check=check, command="make figures")


if __name__ == "__main__":
    raise SystemExit(main())
