"""The figures of docs/why_not_faster.md, and their summary in the README, generated from the records.

`python -m experiments.benchmarks.page` fills the tables between the markers and draws the picture; with `--check` it
changes nothing and fails if a table is out of date.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from experiments import pages
from experiments.benchmarks import timing

PAGES = (Path("docs/why_not_faster.md"), Path("docs/pruning.md"), Path("README.md"))
PICTURE = Path("docs/figures/break_even.png")
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
MODELS = {"mlp": "MLP 784-2048-2048-10, Adam, batch 256", "wrn": "WRN-22-2, SGD, batch 64"}
KINDS = {
    "1x1": "single weights",
    "4x1": "runs of 4",
    "16x1": "runs of 16",
    "32x32": "32 x 32 tiles, plain XLA",
    "1x1 bfloat16": "single weights, bfloat16",
    "4x1 bfloat16": "runs of 4, bfloat16",
    "16x1 bfloat16": "runs of 16, bfloat16",
}
GOALS: dict[tuple[str, str], dict[float, float]] = {
    ("linear", "1x1"): {0.8: 2.5, 0.9: 5, 0.95: 8, 0.98: 14},
    ("linear", "4x1"): {0.8: 3.5, 0.9: 7, 0.95: 12, 0.98: 20},
    ("linear", "16x1"): {0.8: 3.5, 0.9: 7, 0.95: 12, 0.98: 20},
    ("linear", "32x32"): {0.8: 1, 0.9: 2.5, 0.95: 4, 0.98: 8},
    ("conv", "1x1"): {0.8: 4, 0.9: 6, 0.95: 8, 0.98: 12},
    ("gemv", "1x1"): {0.8: 2, 0.9: 4, 0.95: 6, 0.98: 15},
    ("gemv", "16x1"): {0.9: 25, 0.95: 40, 0.98: 60},
}


Record = dict[str, Any]


def record(name: str) -> Record:
    """A committed record, of the machine that was measured last."""
    return json.loads((timing.RECORDS / f"{name}.json").read_text())


def machines(name: str, tell: Callable[[Record], str]) -> str:
    """What there is to tell of a record, and of those of the same name from machines that were measured earlier."""
    earlier = [json.loads(path.read_text()) for path in sorted(timing.RECORDS.glob(f"*/{name}.json"))]
    told = [f"{tell(found)}\n{machine(found)}" for found in (record(name), *earlier)]
    leads = [f"On {found['environment']['processor']}, with earlier kernels:\n\n" for found in earlier]
    return "\n".join(map("".join, zip(("", *leads), told, strict=True)))


def by_sparsity(rows: list[dict[str, Any]], keys: tuple[str, ...], column: str = "ratio") -> dict[tuple[Any, ...], Any]:
    """`{identity: {sparsity: value}}`."""
    found: dict[tuple[Any, ...], Any] = {}
    for row in rows:
        cells = found.setdefault(tuple(row[key] for key in keys), {})
        assert row["sparsity"] not in cells, f"two rows of one identity: {row}"
        cells[row["sparsity"]] = row[column]
    return found


def cells(values: dict[float, float]) -> list[str]:
    """One cell a sparsity."""
    return [f"{values[s]:.1f}" if s in values else "" for s in SPARSITIES]


def machine(found: Record) -> str:
    """What a record was measured on."""
    about = found["environment"]
    level = f", kernels for {about['kernels'].split()[0].upper()}" if "kernels" in about else ""
    return f"Measured on: {about['processor']}, {about.get('cores', about.get('threads'))} cores{level}.\n"


def aims(which: str) -> list[list[str]]:
    """The rows of what we set out to reach."""
    found = {kind: goals for (name, kind), goals in GOALS.items() if name == which}
    return [[f"{KINDS[kind]}, what we aimed at", *cells(goals)] for kind, goals in found.items()]


def linear(found: Record) -> str:
    """Dense time / sparse time of a linear layer, one row a kernel and shape."""
    values = by_sparsity(found["rows"], ("kind", "batch", "in", "out"))
    rows = [[f"{KINDS[kind]}, {b} x {i} x {o}", *cells(v)] for (kind, b, i, o), v in values.items()]
    head = ["kernel, batch x in x out", *(f"{s:.0%}" for s in SPARSITIES)]
    return pages.table(head, sorted([*rows, *aims("linear")]))


def conv(found: Record) -> str:
    """The same for 3 x 3 convolutions, against XLA's own convolution and against an im2col product in XLA."""
    rows = []
    for title, column in (("XLA's convolution", "ratio"), ("XLA's im2col product", "gemm_ratio")):
        whole = [{"groups": 1, "depth": 1, **row} for row in found["rows"]]
        values = by_sparsity(whole, ("kind", "batch", "size", "channels", "groups", "depth"), column)
        rows += [[f"{layer(*sizes)}, against {title}", *cells(v)] for sizes, v in values.items()]
    head = ["layer", *(f"{s:.0%}" for s in SPARSITIES)]
    return pages.table(head, [*sorted(rows), *aims("conv")])


def layer(kind: str, batch: int, size: int, channels: int, groups: int, depth: int) -> str:
    """What a convolution is of."""
    deep, grouped = f"{depth} x " if depth > 1 else "", f" in {groups} groups" if groups > 1 else ""
    dtype = ", bfloat16" if "bfloat16" in kind else ""
    return f"{batch} images, {deep}{size} x {size}, {channels} channels{grouped}{dtype}"


def gemv(found: Record) -> str:
    """Batch 1, forward."""
    values = by_sparsity(found["rows"], ("kind", "in", "out"))
    rows = [[f"{KINDS[kind]}, {i} x {o}", *cells(v)] for (kind, i, o), v in values.items()]
    return pages.table(["kernel, in x out", *(f"{s:.0%}" for s in SPARSITIES)], [*rows, *aims("gemv")])


def training_step(found: Record) -> str:
    """Whole steps with rewirings, and bytes of the train state."""
    rows = [
        [
            f"{MODELS[row['model']]}, {row['structure']}",
            f"{row['sparsity']:.0%}",
            f"{row['dense_ms']:.1f}",
            f"{row['packed_ms']:.1f}",
            f"{row['rewiring_ms']:.0f}",
            f"{row['ratio']:.2f}",
            f"{row['state_ratio']:.3f}",
        ]
        for row in found["rows"]
    ]
    head = ["model", "sparsity", "dense ms", "packed ms", "rewiring ms", "dense / packed", "state bytes / dense"]
    return pages.table(head, rows)


def summary() -> str:
    """Whole steps in short: how many times faster than dense, and the share of its state."""
    rows = record("training_step")["rows"]
    faster, smaller = (by_sparsity(rows, ("model", "structure"), column) for column in ("ratio", "state_ratio"))
    columns = sorted({row["sparsity"] for row in rows})
    lines = []
    for (model, structure), ratios in faster.items():
        kind = KINDS["1x1" if structure == "unstructured" else structure]
        share = smaller[model, structure]
        lines.append([f"{MODELS[model]}, {kind}", *(f"{ratios[s]:.1f}x, {100 * share[s]:.0f} %" for s in columns)])
    head = ["times faster, state / dense state", *(f"{100 * s:.0f} % sparse" for s in columns)]
    (row,) = record("wide")["rows"]
    note = (
        f"And what does not fit dense: a network of width {row['width']:,}, {row['dense_weights']:,} weights or "
        f"{row['dense_bytes_with_adam'] / 1e9:.1f} GB with Adam, trains by RigL at {100 * row['sparsity']:.0f} % in a "
        f"process of {row['peak_resident_bytes'] / 1e9:.2f} GB, to {100 * row['test_accuracy']:.1f} % on Fashion-MNIST "
        f"after {row['steps']} steps (`python -m experiments.benchmarks.wide`).\n"
    )
    steps, alone = machine(record("training_step")), machine(record("wide"))
    return f"{pages.table(head, lines)}\n{steps}\n{note}\n{alone}"


def masked_step(found: Record) -> str:
    """Masked steps relative to dense."""
    rows = [
        [
            f"{row['model']} {'x'.join(map(str, row['options'].get('features', [])))}, batch {row['batch']}",
            row["optimizer"],
            f"{row['static_ratio']:.2f}",
            f"{row['cond_ratio']:.2f}",
            *(f"{row[of]:.2f}" if of in row else "" for of in ("around_ratio", "static_cpu_ratio", "cond_cpu_ratio")),
        ]
        for row in found["rows"]
    ]
    head = ["model", "optimizer", "static", "in graph", "cond around", "CPU: static", "CPU: in graph"]
    return pages.table(head, rows)


def rewiring(found: Record) -> str:
    """One rewiring."""
    rows = [
        [f"{r['weights']}, {r['method']}", f"{r['sparse_weights']:,}", f"{r['ms']:.0f}", str(r["seconds_per_25M"])]
        for r in found["rows"]
    ]
    return pages.table(["weights, method", "sparse weights", "ms", "s per 25 M"], rows)


def rewiring_memory() -> str:
    """The memory of a rewiring beyond that of a dense step."""
    found = record("rewiring_memory")["rows"]
    rows = []
    for row in found:
        extra = row["temporary_beyond_dense_in_copies_of_the_largest_leaf"]
        beyond = [f"{extra[step]:.1f}" for step in ("static", "rewiring", "cond")]
        rows.append([{"rigl": "RigL", "set": "SET"}[row["method"]], ORDERS[row["order"]], *beyond])
    default, saving = (
        next(row for row in found if row["order"] == order)["bytes"]["dense"]["temporary"] for order in ORDERS
    )
    return pages.table(["method", "order", "plain step", "rewiring", "decides by itself"], rows) + (
        f"\nMasks take {found[0]['state_bytes_per_weight_beyond_dense']} byte a weight beside that. The dense step "
        f"itself takes {(default - saving) / (4 * 1024**2):.1f} copies less in the order that saves memory.\n"
    )


ORDERS = {"default": "XLA's default, for concurrency", "memory": "to save memory"}
"""The orders of operations, by their names in the record."""


def wide(found: Record) -> str:
    """The network that does not fit dense."""
    (row,) = found["rows"]
    lines = {
        "dense weights that it stands for": f"{row['dense_weights']:,}",
        "their bytes with Adam": f"{row['dense_bytes_with_adam'] / 1e9:.1f} GB",
        "bytes of the packed train state": f"{row['train_state_bytes'] / 1e9:.2f} GB",
        "peak resident memory of the process": f"{row['peak_resident_bytes'] / 1e9:.2f} GB",
        "steps, rewirings": f"{row['steps']}, {row['rewirings']}",
        "seconds for a step, for a rewiring": f"{row['median_step_s']}, {row['median_rewiring_s']}",
        "loss of the first batch, of the last 20": f"{row['first_loss']}, {row['last_loss']}",
        "test accuracy": f"{100 * row['test_accuracy']:.1f} %",
    }
    head = ["", f"width {row['width']:,}, {row['sparsity']:.0%} sparse"]
    return pages.table(head, [[k, v] for k, v in lines.items()])


def compiled() -> str:
    """What programs compiled for an H100 start."""
    rows = []
    for row in record("compiled")["rows"]:
        loops = f" + {row['in_open_loops']} a round of {row['open_loops']} loop(s)" if row["open_loops"] else ""
        rows.append([row["program"], f"{row['kernels']}{loops}", f"{row['temporary_MB']:.0f}"])
    return pages.table(["program", "kernels", "temporary MB"], rows)


def optimizers() -> str:
    """Steps to 95 % of the training images."""
    found, rows = record("optimizers"), []
    for row in found["rows"]:
        steps, right = row["rates"][str(row["rate"])], [100 * a for a in row["test_accuracy"]]
        late = sum(n == found["at_most"] for n in steps)
        line = [row["optimizer"], f"{row['sparsity']:.0%}", f"{row['rate']:g}", pages.spread(steps, 0)]
        rows.append([*line, str(late), pages.spread(right), f"{row['step_ratio']:.1f}"])
    head = ["optimizer", "sparse", "rate", "steps to 95 %", "seeds not there", "test accuracy, %", "cost of a step"]
    return pages.table(head, rows)


TABLES: dict[str, Callable[[], str]] = {f.__name__: f for f in (summary, rewiring_memory, compiled, optimizers)} | {
    f.__name__: functools.partial(machines, f.__name__, f)
    for f in (masked_step, linear, conv, gemv, training_step, rewiring, wide)
}


def fill(text: str) -> str:
    """The page with every table written again."""
    return pages.fill(text, "bench", lambda name: TABLES[name]())


def draw(path: Path) -> None:
    """Dense / sparse against density, for every linear shape and kernel; 1 is the break-even line."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, name in zip(axes, ("linear", "conv"), strict=True):
        keys = ("kind", "batch", "in", "out") if name == "linear" else ("kind", "batch", "size", "channels")
        column, rows = "ratio" if name == "linear" else "gemm_ratio", record(name)["rows"]
        rows = [row for row in rows if row.get("groups", 1) == 1 and row.get("depth", 1) == 1]
        for colour, kind in enumerate(KINDS):
            lines = [v for k, v in by_sparsity(rows, keys, column).items() if k[0] == kind]
            for i, values in enumerate(lines):
                density = [100 * (1 - s) for s in values]
                label = KINDS[kind] if i == 0 else None
                axis.plot(density, list(values.values()), f"C{colour}o-", ms=3, lw=1, label=label)
        axis.axhline(1, color="black", lw=0.8)
        axis.set(xscale="log", yscale="log", xlabel="active weights, %", title=f"{name}, forward and backward")
        axis.set_xticks([2, 5, 10, 20], ["2", "5", "10", "20"], minor=False)
        axis.minorticks_off()
        axis.legend(fontsize=7)
    axes[0].set_ylabel("dense time / sparse time")
    axes[0].set_yticks([0.5, 1, 2, 4, 8, 16], ["0.5", "1", "2", "4", "8", "16"])
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes or checks the tables, and draws the picture."""
    return pages.main(
        "experiments.benchmarks.page",
        __doc__ or "",
        lambda: {page: fill(page.read_text(encoding="utf-8")) for page in PAGES},
        draw=lambda: draw(PICTURE),
        arguments=arguments,
    )


if __name__ == "__main__":
    sys.exit(main())
