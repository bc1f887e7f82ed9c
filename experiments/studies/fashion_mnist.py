"""Fashion-MNIST: dense, static, SET and RigL at 90 % and 98 % (ERK), for an MLP and LeNet-5, 3 seeds each.

    python -m experiments.launch --study fashion_mnist
    python -m experiments.io.export runs/fashion_mnist experiments/records/fashion_mnist

42 runs, an hour and a half on 2 cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from experiments.report.runs import Run
from experiments.report.tables import markdown

MODELS = {"mlp": "configs/fashion_mnist_mlp.py", "lenet5": "configs/fashion_mnist_lenet5.py"}
METHODS = ("static", "set", "rigl")
SPARSITIES = (0.9, 0.98)
SEEDS = (0, 1, 2)

Add = Callable[[str, str, Mapping[str, Any]], None]


def sweep(add: Add) -> None:
    """Names every run: `add(name, config file, {key: value})`. A whole seed comes before the next begins."""
    for seed in SEEDS:
        for model, config in MODELS.items():
            add(f"{model}-dense-s{seed}", config, {"method.name": "dense", "seed": seed})
            for sparsity in SPARSITIES:
                for method in METHODS:
                    values = {"method.name": method, "sparsity": sparsity, "seed": seed}
                    add(f"{model}-{method}-{sparsity}-s{seed}", config, values)


def table(runs: Iterable[Run]) -> str:
    """The study's tables as Markdown: accuracy over seeds, weights in use, FLOPs."""
    return markdown(runs)
