"""The masks of this library and of others on the same trained weights, and how long each takes; CPU, one process.

    python -m pip install torch '.[experiments]'
    git clone https://github.com/locuslab/wanda && git clone https://github.com/IST-DASLab/sparsegpt
    git clone https://github.com/IST-DASLab/M-FAC
    python -m experiments.benchmarks.pruning_peers --wanda wanda --sparsegpt sparsegpt --m-fac M-FAC

A LeNet-300-100 is trained densely and pruned to 90 %. Peers that are not given are left out. Counts are made equal: the
plan of this library gets those of the peer. PyTorch has one thread; give JAX one by
`XLA_FLAGS=--xla_cpu_multi_thread_eigen=false`. Code of the peers is run from their checkouts as it is; what only a GPU
or a transformer of another library needs is replaced by nothing (`torch.cuda.synchronize`, the module `transformers`).
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import rigl_jax as rx
from experiments.benchmarks import timing
from experiments.studies import pruning_training as training
from experiments.studies.cells import SOURCE
from experiments.studies.method_training import load
from rigl_jax.criteria.m_fac import inverse_fisher

SPARSITY, BLOCK, DAMPING, SIZE = 0.9, 128, 1e-5, 32
LAYERS = ("Dense_0/kernel", "Dense_1/kernel", "Dense_2/kernel")
Rows = list[dict[str, Any]]


def torch_network(params: Any) -> Any:
    """The network in PyTorch, whose weights are `[out, in]`."""
    torch = importlib.import_module("torch")
    layers = []
    for layer in params.values():
        linear = torch.nn.Linear(*layer["kernel"].shape)
        linear.weight.data = torch.tensor(np.asarray(layer["kernel"]).T.copy())
        linear.bias.data = torch.tensor(np.asarray(layer["bias"]))
        layers += [linear, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def with_counts(plan: rx.base.Plan, counts: Sequence[int]) -> rx.base.Plan:
    """A plan of other counts."""
    return {name: plan[name]._replace(n_active=n) for name, n in zip(LAYERS, counts, strict=True)}


def compare(peer: str, layers: Sequence[str], ours: Any, theirs: Any, seconds: Any, why: str) -> Rows:
    """One row a layer; masks are `{layer: bool[in, out]}`."""
    rows: Rows = []
    for name in layers:
        a, b = np.asarray(ours[name]), np.asarray(theirs[name])
        differ = int((a != b).sum())
        rows.append(
            {
                "peer": peer,
                "layer": name,
                "weights": a.size,
                "kept": int(a.sum()),
                "kept_by_peer": int(b.sum()),
                "differ": differ,
                "why": why if differ else "",
                "ours_ms": timing.milliseconds(seconds["ours"]),
                "peer_ms": timing.milliseconds(seconds["peer"]),
            }
        )
    return rows


def masks_of(pruned: Any) -> dict[str, Any]:
    """`{layer: mask}`."""
    return rx.trees.named_leaves(pruned.masks)


def torch_prune(params: Any, plan: rx.base.Plan) -> Rows:
    """`torch.nn.utils.prune`: magnitude over all layers, and layer by layer."""
    tools = importlib.import_module("torch.nn.utils.prune")
    counts = [layer.size - layer.n_active for layer in plan.values()]
    found = []
    network = torch_network(params)

    def everywhere(copied: Any) -> None:
        kernels = [(layer, "weight") for layer in copied[::2]]
        tools.global_unstructured(kernels, pruning_method=tools.L1Unstructured, amount=sum(counts))

    def layer_by_layer(copied: Any) -> None:
        for layer, amount in zip(copied[::2], counts, strict=True):
            tools.l1_unstructured(layer, "weight", amount=amount)

    for title, theirs, scope in (("global", everywhere, "global"), ("layer", layer_by_layer, "layer")):
        copies = [copy.deepcopy(network) for _ in range(7)]
        left = iter(copies)
        contenders = {
            "ours": lambda scope=scope: rx.prune(plan, params, scope=scope).params,
            "peer": lambda theirs=theirs, left=left: theirs(next(left)),
        }
        seconds = timing.interleave(contenders, rounds=5)
        masks = {n: m.weight_mask.numpy().T.astype(bool) for n, m in zip(LAYERS, copies[0][::2], strict=True)}
        ours = masks_of(rx.prune(plan, params, scope=scope))
        found += compare(f"torch.nn.utils.prune, {title}", LAYERS, ours, masks, seconds, "equal magnitudes")
    return found


def wanda(folder: Path, params: Any, x: jax.Array) -> Rows:
    """Its scores of each layer on the inputs of the dense network; each output drops the lowest."""
    torch, peer = importlib.import_module("torch"), module(folder / "lib", "layerwrapper")
    network = torch_network(params)
    inputs = torch.tensor(np.asarray(x).reshape(len(x), -1))
    plan = rx.make_plan(params, SPARSITY, rx.uniform, rules=[(".*kernel", rx.fan_in()), (".*", None)])
    plan = with_counts(plan, [n - int(n * SPARSITY) for n in (784, 300, 100)])

    def theirs() -> dict[str, Any]:
        masks, here = {}, inputs
        for name, layer in zip(LAYERS, network[::2], strict=True):
            wrapped = peer.WrappedGPT(layer)
            wrapped.add_batch(here, None)
            scores = layer.weight.data.abs() * torch.sqrt(wrapped.scaler_row.reshape(1, -1))
            kept = torch.sort(scores, dim=-1, stable=True)[1][:, int(scores.shape[1] * SPARSITY) :]
            masks[name] = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, kept, True).numpy().T
            here = torch.relu(layer(here)).detach()
        return masks

    criterion = jax.jit(rx.criteria.wanda(network_of(params)))
    ours = functools.partial(rx.prune, plan, params, criterion, x)
    seconds = timing.interleave({"ours": lambda: ours().params, "peer": theirs}, rounds=5)
    kept, masks, scores = masks_of(ours()), theirs(), rx.trees.named_leaves(criterion(params, x))
    rows = compare("Wanda (locuslab/wanda)", LAYERS, kept, masks, seconds, "rounding: scores that are apart by ")
    for row in rows:
        name = row["layer"]
        gap = _gap(np.asarray(scores[name]), np.asarray(kept[name]) != masks[name])
        row["why"] += f"{gap:.0e} of themselves" if row["why"] else ""
    return rows


def _gap(scores: np.ndarray, differ: np.ndarray) -> float:
    """How far apart the scores of an output are at most, relatively, where masks differ; both `[in, out]`."""
    apart = [column[at].max() / column[at].min() - 1 for column, at in zip(scores.T, differ.T, strict=True) if at.any()]
    return float(max(apart, default=0.0))


def sparsegpt(folder: Path, params: Any, x: jax.Array, plan: rx.base.Plan) -> Rows:
    """Layer by layer, each on the outputs of the pruned layers before it."""
    torch = importlib.import_module("torch")
    sys.modules.setdefault("transformers", types.SimpleNamespace(Conv1D=type("Conv1D", (), {})))  # pyrefly: ignore
    torch.cuda.synchronize = lambda: None
    peer = module(folder, "sparsegpt")
    inputs = torch.tensor(np.asarray(x).reshape(len(x), -1))

    def theirs() -> dict[str, Any]:
        network, masks, here = torch_network(params), {}, inputs
        for name, layer in zip(LAYERS, network[::2], strict=True):
            surgeon = peer.SparseGPT(layer)
            surgeon.add_batch(here, None)
            surgeon.fasterprune(SPARSITY, blocksize=BLOCK, percdamp=0.01)
            masks[name] = layer.weight.data.numpy().T != 0
            here = torch.relu(layer(here)).detach()
        return masks

    masks = theirs()
    plan = with_counts(plan, [int(masks[name].sum()) for name in LAYERS])
    ours = functools.partial(rx.prune, plan, params, rx.criteria.sparsegpt(network_of(params), 0.01, BLOCK), x)
    seconds = timing.interleave({"ours": lambda: ours().params, "peer": theirs}, rounds=3, warmup=1)
    kept = masks_of(ours())
    why = "rounding in float32, and counts of blocks of inputs that differ by up to "
    rows = compare("SparseGPT (IST-DASLab/sparsegpt)", LAYERS, kept, masks, seconds, why)
    for row in rows:
        starts = np.arange(0, len(masks[row["layer"]]), BLOCK)
        a, b = (np.add.reduceat(np.asarray(m[row["layer"]]).sum(1), starts) for m in (kept, masks))
        row["why"] += str(np.abs(a - b).max()) if row["why"] else ""
    return rows


def m_fac(folder: Path, params: Any, batch: Any, plan: rx.base.Plan) -> Rows:
    """The diagonal of the inverse Fisher matrix from the same gradients, and the ranking by it, in one step."""
    torch, peer = importlib.import_module("torch"), module(folder, "prun")
    loss = functools.partial(training._loss, network_of(params))
    cut = jax.tree.map(lambda a: a.reshape(-1, SIZE, *a.shape[1:]), batch)
    grads = rx.trees.named_leaves(jax.lax.map(lambda part: jax.grad(loss)(params, part), cut))
    rows = np.concatenate([np.asarray(grads[name]).reshape(len(cut[1]), -1) for name in LAYERS], 1)

    def theirs() -> Any:
        block = rows.shape[1] // BLOCK
        return peer.HInvFastBlock(torch.tensor(rows), BLOCK, block, torch.device("cpu"), damp=DAMPING).diag()

    def ours() -> Any:
        return inverse_fisher(rows.astype(np.float64), DAMPING, BLOCK).diagonal

    seconds = timing.interleave({"ours": ours, "peer": theirs}, rounds=3, warmup=1)
    ends = np.cumsum([plan[name].size for name in LAYERS])[:-1]
    diagonals = dict(zip(LAYERS, np.split(theirs().numpy(), ends), strict=True))
    names = rx.trees.names(params)
    scores = jax.tree.map(
        lambda n, p: p**2 / (2 * diagonals[n].reshape(p.shape)) if n in diagonals else p, names, params
    )
    masks = masks_of(rx.prune(plan, params, lambda p, b: scores))
    pruned = rx.prune(plan, params, rx.criteria.m_fac(loss, DAMPING, BLOCK, steps=1, size=SIZE), batch)
    why = "recursion in float32 there, identity of Woodbury in float64 here"
    return compare("M-FAC (IST-DASLab/M-FAC)", LAYERS, masks_of(pruned), masks, seconds, why)


def network_of(params: Any) -> Callable[[Any, Any], Any]:
    """`(params, x) -> logits` of the dense layers of params."""

    def apply(params: Any, x: Any) -> Any:
        x = x.reshape(x.shape[0], -1)
        *hidden, last = params.values()
        for layer in hidden:
            x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
        return x @ last["kernel"] + last["bias"]

    del params
    return apply


def module(folder: Path, name: str) -> Any:
    """A module of a checkout."""
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))


def main(argv: Sequence[str] | None = None) -> None:
    """Compares and writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default=SOURCE, help="folder of the four IDX files")
    parser.add_argument("--epochs", type=int, default=2, help="of the dense training")
    for name in ("wanda", "sparsegpt", "m-fac"):
        parser.add_argument(f"--{name}", type=Path, help="a checkout")
    options = parser.parse_args(argv)
    bench = training.make_bench("lenet_300_100", load(options.source), options.epochs)
    params, batch = training.train_dense(bench, 0).trained, training.examples(bench, 0)
    plan = training.plan_of(params, SPARSITY)
    importlib.import_module("torch").set_num_threads(1)
    rows = torch_prune(params, plan)
    if options.wanda:
        rows += wanda(options.wanda, params, batch[0])
    if options.sparsegpt:
        rows += sparsegpt(options.sparsegpt, params, batch[0], plan)
    if options.m_fac:
        rows += m_fac(options.m_fac, params, batch, plan)
    for row in rows:
        print(row)
    version = importlib.import_module("torch").__version__
    timing.write("pruning_peers", rows, what="masks and time of pruning, LeNet-300-100 at 90 %", torch=version)


if __name__ == "__main__":
    main()
