"""The numbers of the RigL paper that need no training: sparsities of layers, FLOPs and sizes, beside those published.

    python -m experiments.studies.paper_tables            # writes docs/paper_tables.md
    python -m experiments.studies.paper_tables --check    # fails if the page is out of date

Nothing is trained: networks are traced with abstract arrays. `PUBLISHED` holds what the paper
(https://arxiv.org/abs/1911.11134) and the README of its code print.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rigl_jax as rx
from experiments import pages
from experiments.models import MODELS

PAGE = Path(__file__).parents[2] / "docs" / "paper_tables.md"
STEPS, PERIOD, STOP = 32_000, 100, 25_000  # ImageNet: 100 epochs of batches of 4096
CONV1 = "conv1/kernel"
DEPTHWISE = ".*depthwise/kernel"


class Network(NamedTuple):
    """The counts of a network: products of one image, kernel shapes, FLOPs of the dense network."""

    counted: rx.Flops
    shapes: Mapping[str, tuple[int, ...]]
    dense: float


class Variant(NamedTuple):
    """A distribution, and regular expressions of the kernels that stay dense."""

    name: str
    distribution: Callable[..., dict[str, float]]
    dense: tuple[str, ...] = ()


UNIFORM = Variant("uniform", rx.uniform)
UNIFORM_1 = Variant("uniform, first layer dense", rx.uniform, (CONV1,))
ERK = Variant("ERK", rx.erk)
ERK_1 = Variant("ERK, first layer dense", rx.erk, (CONV1,))
ER = Variant("ER", rx.erdos_renyi)
UNIFORM_D = Variant("uniform, first and depthwise layers dense", rx.uniform, (CONV1, DEPTHWISE))
ERK_D = Variant("ERK, first and depthwise layers dense", rx.erk, (CONV1, DEPTHWISE))

RESNET_SPARSITIES = (0.8, 0.9, 0.95, 0.965, 0.99)
PUBLISHED: Mapping[tuple[str, str, float], tuple[str, str, str, str]] = {
    ("resnet50", UNIFORM_1.name, 0.8): (".23", ".23", "1.14", "23.685"),
    ("resnet50", UNIFORM_1.name, 0.9): (".13", ".13", ".66", "13.532"),
    ("resnet50", UNIFORM_1.name, 0.95): (".08", "", ".42", "8.433"),
    ("resnet50", UNIFORM_1.name, 0.965): (".07", "", ".34", "6.904"),
    ("resnet50", UNIFORM.name, 0.9): (".10", ".10", ".52", ""),
    ("resnet50", ERK.name, 0.8): (".42", ".42", "2.09", "23.683"),
    ("resnet50", ERK.name, 0.9): (".24", ".25", "1.23", "13.499"),
    ("resnet50", ERK.name, 0.95): (".12", "", ".63", "8.399"),
    ("resnet50", ERK.name, 0.965): (".09", "", ".45", ""),
    ("resnet50", ERK_1.name, 0.965): (".11", "", "", "6.904"),
    ("resnet50", ERK_1.name, 0.99): (".05", "", ".29", "4.354"),
    ("mobilenet", UNIFORM_1.name, 0.75): (".27", "", "", ""),
    ("mobilenet", UNIFORM_1.name, 0.9): (".12", "", "", ""),
    ("mobilenet", ERK_1.name, 0.75): (".52", "", "", ""),
    ("mobilenet", ERK_1.name, 0.9): (".27", "", "", ""),
    ("wide_resnet", UNIFORM.name, 0.8): (".20", "", "", ""),
    ("wide_resnet", ERK.name, 0.8): (".35", "", "", ""),
}
"""`(test FLOPs, training FLOPs, the same 5 times as long, megabytes)`, FLOPs as multiples of the dense network's."""

METHODS = ("static, SNIP, SET", "RigL", "SNFS", "pruning", "pruning 1.5x", "small dense")
PUBLISHED_TRAINING: Mapping[tuple[str, str, float], str] = {
    ("static, SNIP, SET", UNIFORM_1.name, 0.8): ".23",
    ("static, SNIP, SET", ERK.name, 0.8): ".42",
    ("static, SNIP, SET", UNIFORM.name, 0.9): ".10",
    ("static, SNIP, SET", ERK.name, 0.9): ".24",
    ("RigL", UNIFORM_1.name, 0.8): ".23",
    ("RigL", UNIFORM.name, 0.9): ".10",
    ("RigL", ERK.name, 0.8): ".42",
    ("RigL", ERK.name, 0.9): ".25",
    ("SNFS", ERK.name, 0.8): ".61",
    ("SNFS", ERK.name, 0.9): ".50",
    ("pruning", UNIFORM_1.name, 0.8): ".56",
    ("pruning", UNIFORM_1.name, 0.9): ".51",
    ("pruning 1.5x", UNIFORM_1.name, 0.8): ".84",
    ("pruning 1.5x", UNIFORM_1.name, 0.9): ".76",
    ("small dense", "", 0.8): ".20",
    ("small dense", "", 0.9): ".12",
}
WIDTHS = {0.8: 0.465, 0.9: 0.34, 0.95: 0.26, 0.965: 0.231}
"""Width multiplier of the small dense ResNet-50 of each sparsity, from the authors' code."""


# --- counting --------------------------------------------------------------------------------------------------------


@functools.cache
def network(name: str, width: float = 1.0) -> Network:
    """Traces a network. The first convolution of ResNet-50 gets the number of outputs that the paper's counter uses.

    That counter applies the arithmetic of "same" padding to the image that is already padded to 230 x 230, so that it
    finds 115 x 115 outputs; the network computes 112 x 112.
    """
    side, classes = (32, 10) if name == "wide_resnet" else (224, 1000)
    module = MODELS[name](classes, **({} if width == 1.0 else {"width": width}))
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), image)
    params = variables.pop("params")
    counted = rx.flops(lambda params, rest, x: module.apply({"params": params, **rest}, x), params, variables, image)
    if name == "resnet50":
        outputs = 115 * 115 * 64
        first = rx.Product(CONV1, 7 * 7 * 3 * outputs, outputs)
        counted = counted._replace(products=tuple(first if p.name == CONV1 else p for p in counted.products))
    shapes = {leaf: tuple(p.shape) for leaf, p in rx.trees.named_leaves(params).items() if leaf.endswith("kernel")}
    return Network(counted, shapes, rx.micronet_flops(counted))


def densities(net: Network, variant: Variant, sparsity: float) -> dict[str, float]:
    """Share of active weights of every kernel, from the whole numbers of the plan."""
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in net.shapes.items()}
    rules = [*((pattern, None) for pattern in variant.dense), (".*", rx.unstructured())]
    plan = rx.make_plan(params, sparsity, variant.distribution, rules=rules)
    active = {name: leaf.n_active / math.prod(leaf.shape) for name, leaf in plan.items()}
    return dict.fromkeys(net.shapes, 1.0) | active


def test_flops(net: Network, density: Mapping[str, float]) -> float:
    """FLOPs of a forward pass, as a multiple of the dense network's."""
    return rx.micronet_flops(net.counted._replace(density={**net.counted.density, **density})) / net.dense


def megabytes(net: Network, density: Mapping[str, float]) -> float:
    """Size by the rules of the MicroNet challenge: 32 bits a weight and one bit a position."""
    return rx.micronet_bits(net.shapes, density) / 8e6


def rigl_training(forward: float) -> float:
    """Training FLOPs of RigL as a multiple of dense training: appendix H of the paper, at its period of 100.

    The appendix assumes that rewiring never stops.
    """
    return (3 * forward * PERIOD + 2 * forward + 1) / (PERIOD + 1) / 3


def training(net: Network, method: str, variant: Variant, sparsity: float) -> float:
    """Training FLOPs of a method as a multiple of dense training."""
    forward = test_flops(net, densities(net, variant, sparsity))
    if method == "RigL":
        return rigl_training(forward)
    if method == "SNFS":
        return (2 * forward + 1) / 3
    if method.startswith("pruning"):
        return pruning(net, variant, sparsity) * (1.5 if method.endswith("1.5x") else 1.0)
    return forward


def pruning(net: Network, variant: Variant, sparsity: float) -> float:
    """Mean FLOPs of a step of gradual pruning: dense until step 10,000, then a cubic with changes every 1,000 steps.

    The logits are pruned to at most 80 %, as in the pruned networks that the paper cites.
    """
    steps = np.arange(STEPS)
    cubic = np.asarray(jax.vmap(rx.schedules.cubic(0.0, 1.0, 10_000, STOP))(steps // 1000 * 1000))
    values, counts = np.unique(cubic, return_counts=True)
    final = densities(net, variant, sparsity) | {"logits/kernel": 1 - min(sparsity, 0.8)}
    costs = [test_flops(net, {name: 1 - done * (1 - density) for name, density in final.items()}) for done in values]
    return float(np.average(costs, weights=counts))


def small_dense(net: Network, width: float) -> float:
    """Test FLOPs of the network with every number of channels multiplied by `width` and rounded down."""

    def thinner(channels: int) -> float:
        return math.floor(width * channels) / channels

    total = 0.0
    for product in net.counted.products:
        *_, inputs, outputs = net.shapes[str(product.name)]
        out = 1.0 if product.name == "logits/kernel" else thinner(outputs)
        total += 2 * product.macs * out * (1.0 if product.name == CONV1 else thinner(inputs)) + product.outputs * out
    return total / net.dense


# --- the page --------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    return pages.table(head, rows, left=[column < words for column in range(len(head))])


def _percent(sparsity: float) -> str:
    return f"{100 * sparsity:.3g} %"


def _beside(value: float, published: str, digits: int = 4) -> str:
    return f"{value:.{digits}f} ({published})" if published else f"{value:.{digits}f}"


def _costs(name: str, variants: Sequence[Variant], sparsities: Sequence[float]) -> str:
    net, rows = network(name), []
    for variant in variants:
        for sparsity in sparsities:
            density = densities(net, variant, sparsity)
            forward = test_flops(net, density)
            published = PUBLISHED.get((name, variant.name, sparsity), ("",) * 4)
            values = (forward, rigl_training(forward), 5 * rigl_training(forward))
            cells = [_beside(value, known) for value, known in zip(values, published[:3], strict=True)]
            rows.append([variant.name, _percent(sparsity), *cells, _beside(megabytes(net, density), published[3], 3)])
    head = ["distribution", "sparsity", "test FLOPs", "training FLOPs, RigL", "RigL, 5 times as long", "megabytes"]
    return _table(head, rows, words=2)


def _methods() -> str:
    net, rows = network("resnet50"), []
    for method in METHODS[:-1]:
        for variant in (UNIFORM_1, UNIFORM, ERK):
            if method.startswith("pruning") and variant is not UNIFORM_1:
                continue
            values = [(s, training(net, method, variant, s)) for s in RESNET_SPARSITIES]
            cells = [_beside(v, PUBLISHED_TRAINING.get((method, variant.name, s), ""), 3) for s, v in values]
            rows.append([method, variant.name, *cells])
    small = [
        _beside(small_dense(net, w), PUBLISHED_TRAINING.get((METHODS[-1], "", s), ""), 3) for s, w in WIDTHS.items()
    ]
    rows.append([METHODS[-1], "widths " + ", ".join(map(str, WIDTHS.values())), *small, ""])
    return _table(["method", "distribution", *map(_percent, RESNET_SPARSITIES)], rows, words=2)


def _layers(name: str, variant: Variant, sparsities: Sequence[float]) -> str:
    """Sparsity by kernel shape: layers of one shape have one sparsity."""
    net = network(name)
    found = {s: densities(net, variant, s) for s in sparsities}
    groups: dict[tuple[int, ...], list[str]] = {}
    for leaf, shape in net.shapes.items():
        groups.setdefault(shape, []).append(leaf)
    rows = []
    for shape, leaves in sorted(groups.items(), key=lambda item: (len(item[0]), math.prod(item[0]), item[0])):
        first = min(
            leaves, key=lambda leaf: [int(c) if c.isdigit() else c for c in leaf.split("/")[0].rpartition("k")[::2]]
        )
        values = [f"{1 - found[s][first]:.6f}" for s in sparsities]
        rows.append([" x ".join(map(str, shape)), first.removesuffix("/kernel"), str(len(leaves)), *values])
    return _table(["kernel", "first of", "layers", *map(_percent, sparsities)], rows, words=2)


def _resnet50() -> str:
    """The section of ResNet-50."""
    resnet = network("resnet50")
    return f"""## ResNet-50 on ImageNet

Dense: {resnet.dense:,.0f} FLOPs (8.2e9), {megabytes(resnet, {}):.3f} MB (102.122),
{sum(map(math.prod, resnet.shapes.values())):,} weights in {len(resnet.shapes)} kernels.

{_costs("resnet50", (UNIFORM_1, UNIFORM, ERK, ERK_1, ER), RESNET_SPARSITIES)}
Where the published figures differ from ours or from each other:

* The paper's uniform figures mix two conventions. The pair at 80 % (.23, 1.14) has a dense first layer, the pair at
  90 % (.10, .52) has none. The README of the authors' code (.13, .66) has a dense first layer throughout.
* 23.685 MB at 80 % uniform is what ER takes; uniform with a dense first layer takes
  {megabytes(resnet, densities(resnet, UNIFORM_1, 0.8)):.3f} MB.
* At 96.5 % ERK the README's FLOPs (.09) are those of all layers, its size (6.904) and the paper's FLOPs (.11) those
  with a dense first layer.
* The published counts round zeros up and ours down, as the authors' later code does: a difference in the fifth digit.
* Table 4 of the paper repeats, in its column of training FLOPs at 95 % and 96.5 %, the entries of 80 % and 90 %.

### Training FLOPs by method

Multiples of dense training, {3 * resnet.dense * 4096 * STEPS:.2g} FLOPs (3.2e18). With M times the steps multiply by M.

{_methods()}
* Pruning: masks change every 1,000 steps and are counted as they are in between. A cubic without steps gives .558 and
  .503 at 80 % and 90 %; the published .56 and .51 lie between the two.
* Small dense, 80 %: .20 does not follow from the width of .465.
* DSR moves weights between layers while it trains, so its FLOPs (.40 and .30 published) do not follow from a plan.
* SNFS is counted with the counts of the plan, that is without its redistribution, as in the paper.

### Sparsity of each layer, ERK

{_layers("resnet50", ERK, RESNET_SPARSITIES)}
### Sparsity of each layer, ER

{_layers("resnet50", ER, RESNET_SPARSITIES)}
Uniform: every layer has the sparsity of the whole.

"""


def _mobilenet() -> str:
    """The section of MobileNet-v1."""
    mobile, big = network("mobilenet"), network("mobilenet", 1.98)
    grown = [test_flops(big, densities(big, v, 0.75)) * big.dense / mobile.dense for v in (UNIFORM_1, ERK_1)]
    kept = densities(mobile, UNIFORM_D, 0.9)
    active = sum(kept[name] * math.prod(shape) for name, shape in mobile.shapes.items())
    realised = 1 - active / sum(map(math.prod, mobile.shapes.values()))
    return f"""## MobileNet-v1 on ImageNet

Dense: {mobile.dense:,.0f} FLOPs (1.1e9).

{_costs("mobilenet", (UNIFORM_1, UNIFORM_D, ERK_1, ERK_D), (0.75, 0.9))}
* The published .27, .12, .52 and .27 come out with depthwise layers sparse and the first layer dense. The paper's text
  and code keep depthwise layers dense too, which gives .29, .15, .53 and .29.
* "Big sparse", 75 % and 1.98 times as wide: {grown[0]:.3f} times the FLOPs of the dense network at width 1 with uniform
  sparsity (.98), {grown[1]:.3f} with ERK (1.91). No variant that we tried gives 1.91.
* The README's checkpoints of 89 % are those of 90 % with dense depthwise layers, {realised:.4f} over all kernels. Its
  .09 (uniform) and .21 (ERK) are not their FLOPs, nor those of another variant that we tried.

### Sparsity of each layer, ERK, first layer dense

{_layers("mobilenet", ERK_1, (0.75, 0.9))}
"""


def page() -> str:
    """docs/paper_tables.md."""
    return f"""# The paper's arithmetic

Generated by `python -m experiments.studies.paper_tables`, which trains nothing: it counts. Published figures are in
brackets; FLOPs are multiples of the dense network's. A figure without brackets is not in the paper.

Conventions are those of the MicroNet challenge, as in the paper: a layer of fan-in v, density d and n outputs costs
2 v d n + n (`rx.micronet_flops`), a sparse weight is stored in 32 bits, and each position of a sparse kernel takes one
bit more (`rx.micronet_bits`). A layer keeps a whole number of weights: zeros are rounded down.

{_resnet50()}{_mobilenet()}## WideResNet-22-2 on CIFAR-10

Published figures are those of the reproduction report (https://github.com/varun19299/rigl-reproducibility): the paper
gives a plot.

{_costs("wide_resnet", (UNIFORM, ERK), (0.5, 0.8, 0.9, 0.95))}
### Sparsity of each layer, ERK

{_layers("wide_resnet", ERK, (0.5, 0.8, 0.9, 0.95))}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the page, or checks it; returns the exit code."""
    return pages.main("experiments.studies.paper_tables", __doc__ or "", lambda: {PAGE: page()}, arguments=argv)


if __name__ == "__main__":
    raise SystemExit(main())
