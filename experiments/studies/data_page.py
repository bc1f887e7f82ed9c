"""docs/data_results.md, from the records of `experiments.studies.data`.

python -m experiments.studies.data_page            # writes the page
python -m experiments.studies.data_page --check    # fails if the page is out of date
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import pages
from experiments.studies import data_dynamic as dynamic
from experiments.studies import data_labels as labels
from experiments.studies import data_noise as noise
from experiments.studies import data_pairs as pairs
from experiments.studies import data_sampling as sampling
from experiments.studies.claims import Claim, against, claimed, facts, percent
from experiments.studies.data import NOISE, Cell, cells, read
from experiments.studies.data_training import SEEDS, TRAIN
from experiments.studies.method_page import LEVEL

PAGE = Path(__file__).parents[2] / "docs" / "data_results.md"
Records = Mapping[Cell, Mapping[str, Any]]
DIGITS, FASHION = "digits_mlp", "fashion_mlp"
PARTS = {
    "all": "all, with the wrong labels",
    "clean": "all, with the right labels",
    "random": "a random half",
    "el2n": "the hardest half by EL2N",
    "el2n_offset": "the hardest half after the hardest tenth by EL2N",
    "easiest": "the easiest half by EL2N",
    "complexity_gap": "the half with the smallest complexity gap",
}
START_LABELS = {"random": "random", "k_means": "k-means", "kmeans_pp": "k-means++", "k_center": "k-center"}
FAR = (40, 100, 200)
"""Numbers of labels at which selectors are compared."""


def found_noise(records: Records, model: str) -> str:
    """Precision and AUROC of every score."""
    rows = []
    for name, label in noise.SCORES.items():
        row = [label]
        for share in NOISE:
            cell = Cell(model, "noise", "scores", share)
            precision, auroc = (facts(records, cell, name, fact) for fact in ("precision", "auroc"))
            row += [percent(precision), pages.spread(auroc, 3)]
        rows.append(row)
    head = [f"{text}, {100 * share:.0f} % flipped" for share in NOISE for text in ("precision, %", "AUROC")]
    return pages.table(["score", *head], rows)


def coresets(records: Records) -> str:
    """Test accuracy of networks that are trained on a part of noisy data."""
    of = lambda name, fact: facts(records, Cell(FASHION, "coresets", name, 0.1), fact)  # noqa: E731
    rows = [
        [
            label,
            percent(of(name, "flipped")),
            percent(of(name, "test")),
            against(of(name, "test"), of("random", "test")),
        ]
        for name, label in PARTS.items()
    ]
    return pages.table(["trained on", "wrong labels in it, %", "test accuracy, %", "against a random half"], rows)


def ways(records: Records, keep: float) -> str:
    """Dynamic and static pruning at equal steps."""
    of = lambda name: facts(records, Cell(FASHION, "dynamic", name, keep), "test")  # noqa: E731
    full = facts(records, Cell(FASHION, "dynamic", dynamic.FULL, 1), "test")
    named = {"all examples": full, f"all examples, {100 * keep:.0f} % of the steps": of(dynamic.FULL)}
    named |= {way.label: of(name) for name, way in dynamic.WAYS.items()}
    rows = [[label, percent(v), against(v, full), against(v, of("random_once"))] for label, v in named.items()]
    return pages.table(["", "test accuracy, %", "against all", "against random, once"], rows)


def active(records: Records) -> str:
    """Test accuracy of every selector by the number of labels."""
    rows = []
    for name, label in labels.SELECTORS.items():
        mine, random = (facts(records, Cell(DIGITS, "active", each, 0), "test") for each in (name, "random"))
        row = [label]
        for count in FAR:
            a, b = (None if v is None else v[:, _round(count)] for v in (mine, random))
            row += [percent(a), against(a, b)]
        rows.append(row)
    head = [text for count in FAR for text in (f"{count} labels, %", "against random")]
    return pages.table(["selector", *head], rows)


def _round(count: int) -> int:
    return (count - labels.FIRST) // labels.ADDED


def imbalanced(records: Records) -> str:
    """The same on imbalanced data."""
    rows = []
    for name in labels.IMBALANCED:
        cell = Cell(DIGITS, "imbalanced", name, 0)
        test, entropy = facts(records, cell, "test"), facts(records, cell, "entropy")
        last = None if test is None else test[:, _round(labels.LAST_RARE)]
        rows.append([labels.SELECTORS[name], percent(last), pages.spread(entropy, 3)])
    return pages.table(["selector", "test accuracy, %", "entropy of the labelled classes, nats"], rows)


def self_training(records: Records) -> str:
    """Students by first set of labels and number of teachers."""
    rows = []
    for start, label in START_LABELS.items():
        for teachers in labels.TEACHERS:
            cell = Cell(DIGITS, "self_training", start, teachers)
            test, ece = facts(records, cell, "test"), facts(records, cell, "ece")
            more = [percent(facts(records, cell, fact)) if teachers else "" for fact in ("accepted", "right")]
            rows.append([label, str(teachers), percent(test), percent(ece), *more])
    head = ["first labels", "teachers", "test accuracy, %", "ECE, %", "labelled by teachers, %", "of these right, %"]
    return pages.table(head, rows)


def estimates(records: Records) -> str:
    """Estimates of the mean loss by adaptive bins."""
    cell, rows = Cell(FASHION, "sampling", "adaptive_bins", 0), []
    for name in ("uniform", *(f"{alpha:g}" for alpha in sampling.GREED)):
        of = [facts(records, cell, "ways", name, fact) for fact in ("bias", "rmse", "reward")]
        rows.append(["uniform" if name == "uniform" else f"bins, alpha {name}", *(percent(v) for v in of)])
    head = ["sample", "mean error, % of the true mean", "RMSE, %", "mean loss in the sample, %"]
    return pages.table(head, rows)


def found_pairs(records: Records, model: str) -> str:
    """How well wrong pairs are found."""
    cell, rows = Cell(model, "pairs", "confident", pairs.SHARE), []
    for name, label in (("one", "one network"), ("ensemble", f"mean of {pairs.MEMBERS} networks")):
        precision, auroc = (facts(records, cell, "scores", name, fact) for fact in ("precision", "auroc"))
        rows.append([label, percent(precision), pages.spread(auroc, 3)])
    return pages.table(["score of a pair", "precision, %", "AUROC"], rows)


def parts_of_pairs(records: Records, model: str) -> str:
    """What is accepted, and training on it."""
    cell, rows = Cell(model, "pairs", "confident", pairs.SHARE), []
    every = facts(records, cell, "parts", "all", "test")
    for name, label in pairs.PARTS.items():
        kept, wrong, test = (facts(records, cell, "parts", name, fact) for fact in ("kept", "wrong", "test"))
        rows.append([label, percent(kept), percent(wrong), percent(test), "" if test is None else against(test, every)])
    head = ["trained on", "of all, %", "wrong pairs in it, %", "test accuracy, %", "against all pairs"]
    return pages.table(head, rows)


# --- claims ----------------------------------------------------------------------------------------------------------


def claims(records: Records) -> list[Claim]:
    """Every claim, with what was measured."""
    found = []
    for model, name in ((DIGITS, "digits"), (FASHION, "Fashion-MNIST")):
        of = lambda score, model=model: facts(records, Cell(model, "noise", "scores", 0.1), score, "auroc")  # noqa: E731
        at = f"on {name} with 10 % flipped"
        found += [
            Claim(f"The mean of ten networks makes EL2N better {at} (Paul 2021)", of("el2n_mean"), of("el2n")),
            Claim(f"Complexity gap finds flipped labels better than forgetting {at} (Ki 2023)", of("complexity_gap"),
                  of("forgetting")),
            Claim(f"Complexity gap finds them better than EL2N of one network {at}", of("complexity_gap"), of("el2n")),
        ]  # fmt: skip
        score, part = (
            functools.partial(facts, records, Cell(model, "pairs", "confident", pairs.SHARE), of)
            for of in ("scores", "parts")
        )
        at = f"on {name} with {100 * pairs.SHARE:.0f} % wrong pairs"
        found += [
            Claim(f"Several networks find wrong pairs better than one {at} (Wang 2021)", score("ensemble", "auroc"),
                  score("one", "auroc")),
            Claim(f"Training on accepted pairs is better than on all {at} (Wang 2021)", part("ensemble", "test"),
                  part("all", "test")),
        ]  # fmt: skip
    part = lambda name: facts(records, Cell(FASHION, "coresets", name, 0.1), "test")  # noqa: E731
    found.append(
        Claim("With wrong labels, EL2N is better with an offset (Paul 2021)", part("el2n_offset"), part("el2n"))
    )
    for keep in dynamic.KEEP:
        way = lambda name, keep=keep: facts(records, Cell(FASHION, "dynamic", name, keep), "test")  # noqa: E731
        at = f"at {100 * keep:.0f} % of the examples"
        found += [
            Claim(f"Random, drawn again, is better than EL2N once {at} (Raju 2021)", way("random"), way("el2n_hard")),
            Claim(f"UCB is better than random, drawn again, {at} (Raju 2021)", way("ucb"), way("random")),
            Claim(f"The hardest examples are better than a random part {at} (Paul 2021, of half)", way("el2n_hard"),
                  way("random_once")),
            Claim(f"Weights make epsilon-greedy better {at} (ours)", way("epsilon_half_ht"), way("epsilon_half")),
        ]  # fmt: skip
    return [*found, *_label_claims(records)]


def _label_claims(records: Records) -> list[Claim]:
    def rows(study: str, name: str) -> np.ndarray | None:
        test = facts(records, Cell(DIGITS, study, name, 0), "test")
        return None if test is None else test[:, -1]

    student = lambda start, n, fact: facts(records, Cell(DIGITS, "self_training", start, n), fact)  # noqa: E731
    return [
        Claim("Margin is better than random at 200 labels (Beck 2021)", rows("active", "margin"),
              rows("active", "random")),
        Claim("BADGE is better than margin at 200 labels (Ash 2020)", rows("active", "badge"),
              rows("active", "margin")),
        Claim("BASE is better than margin on imbalanced data (Emam 2021)", rows("imbalanced", "balanced"),
              rows("imbalanced", "margin")),
        Claim("A first set by k-means is better than a random one (Roy 2022)", student("k_means", 1, "test"),
              student("random", 1, "test")),
        Claim("Five teachers are better than one (Ghosh 2021)", student("random", 5, "test"),
              student("random", 1, "test")),
        Claim("Five teachers give a lower ECE than one (Ghosh 2021)", student("random", 5, "ece"),
              student("random", 1, "ece"), lower=True),
    ]  # fmt: skip


def _wrong_labels(records: Records) -> str:
    """Scores that find flipped labels, and training without them."""
    return f"""## Flipped labels

Each score ranks the training examples, of which 10 % or 20 % have another label, drawn uniformly. Precision is the
share of flipped ones among as many highest scores. A random score has a precision of 10 % or 20 % and an AUROC of 0.5.

### Digits

{found_noise(records, DIGITS)}
### Fashion-MNIST

{found_noise(records, FASHION)}
### Training on a half

Fashion-MNIST with 10 % flipped labels, as many steps as on all of it. EL2N is the mean of {noise.MEMBERS} networks
after {noise.EARLY} epochs.

{coresets(records)}
"""


def page(records: Records) -> str:
    """docs/data_results.md."""
    wanted: Sequence[Cell] = list(cells())
    done = sum(cell in records for cell in wanted)
    levels = "".join(f"### {100 * keep:.0f} % of the examples\n\n{ways(records, keep)}\n" for keep in dynamic.KEEP)
    return f"""# Results of data pruning and selection

Generated by `python -m experiments.studies.data_page` from [experiments/records/data](../experiments/records/data).
{done} of the {len(wanted)} cells have been run by `python -m experiments.studies.data`. How to choose examples is told
in [data_pruning.md](data_pruning.md).

Networks are small MLPs: 64-32 hidden units on scikit-learn's digits (1,437 training images), 128-64 on the first
{TRAIN:,} training images of Fashion-MNIST, tested on all its test images. Numbers are mean and standard deviation over
{len(SEEDS)} seeds; differences are in percentage points, with a paired t-test over seeds, bold below {LEVEL:g}. With
so few seeds and so many tests some differ by chance. No option was tuned. These are small data sets and short
trainings: what came out here says little about ImageNet.

## Against what the papers claim

{claimed(claims(records))}
The claim of a paper is in our words; most were made of other data and networks. "Ours" is what the library's own
documentation says.

{_wrong_labels(records)}## Dynamic and static pruning at equal steps

RigL at {100 * dynamic.SPARSITY:.0f} % on Fashion-MNIST. All rows but one train for as many steps, with the same
learning rates; the networks that EL2N is averaged over, and the whole run whose forgetting events are counted, cost
more steps, which are not in the table.

{levels}## Active learning

Digits, from {labels.FIRST} random labels to {labels.LAST} in rounds of {labels.ADDED}. After each round
{labels.MEMBERS} networks are trained anew; accuracy is their mean. A selector sees 1,000 images without labels, drawn
anew, and reads the first network, or all where the table says so.

{active(records)}
### Imbalanced data

Digits of which the classes {", ".join(map(str, labels.RARE[:-1]))} and {labels.RARE[-1]} keep a tenth;
{labels.LAST_RARE} labels at the end, test images of all classes. The entropy of equal shares is 2.303.

{imbalanced(records)}
{_few_labels(records)}"""


def _few_labels(records: Records) -> str:
    """Students, estimates, and what was not run."""
    return f"""## A first set of labels, and labels by teachers

Digits, {labels.GIVEN} labels, chosen by pixels. Teachers label an image where their mean probability is at least
{labels.THRESHOLD:g}; 0 teachers: the network is trained on the {labels.GIVEN} labels alone.

{self_training(records)}
## Estimates from few labels

The mean loss on the test images of Fashion-MNIST, estimated from {sampling.LABELS} labels that adaptive bin sampling
asks for, by the entropy of the prediction; {sampling.DRAWS} samples for each of {len(SEEDS)} networks. The estimator
is unbiased at every alpha, so the mean error here is noise of the draws. A larger alpha finds a larger loss, and the
estimate has a larger error.

{estimates(records)}
{_pairs(records)}## What was not run

Pairs of images and sentences, which Wang et al. filter: the texts here are names of ten classes. Convolutional
networks, augmentation, and data sets whose size makes pruning worth its cost.
"""


def _pairs(records: Records) -> str:
    """Pairs of images and names."""
    models = "".join(
        f"### {name}\n\n{found_pairs(records, model)}\n{parts_of_pairs(records, model)}\n"
        for model, name in ((DIGITS, "Pairs of digits"), (FASHION, "Pairs of Fashion-MNIST"))
    )
    return f"""## Pairs that do not belong together

In the style of EfficientCLIP, whose code for filtering is not public: a network for images and a table of names, each
{pairs.WIDTH} numbers long, are trained so that the cosine of a pair is higher than that of the image with other names.
{100 * pairs.SHARE:.0f} % of the images have the name of another class. The score of a pair is the softmax of its cosine
over {pairs.TEMPERATURE:g}, among all names, after {pairs.EARLY} epochs. Pairs whose mean score reaches
{pairs.THRESHOLD:g} are accepted (`rx.coreset.confident`), and a new network is trained on these for all epochs.
Precision and AUROC are those of finding wrong pairs by a low score.

{models}"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the page; returns the exit code."""
    about = (__doc__ or "").splitlines()[0]
    return pages.main("experiments.studies.data_page", about, lambda: {PAGE: page(read())}, arguments=arguments)


if __name__ == "__main__":
    raise SystemExit(main())
