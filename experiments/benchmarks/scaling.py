"""What a step and a rewiring send between devices and compute on each, read from the compiled programs.

    python -m experiments.benchmarks.scaling

Nothing is timed: host devices stand in for a mesh, XLA splits the programs for it as for accelerators, and the
collectives and their sizes are counted in the result, a loop's as often as it turns. `docs/scaling.md` explains the
formula that extends the counts to more weights and devices.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import optax

import rigl_jax as rx
from experiments import sharding
from experiments.benchmarks import timing
from rigl_jax.base import Array, PyTree

DEVICES, LAYERS, BATCH = 16, 3, 64
WIDTHS = (64, 128, 256)
LAYOUTS: dict[str, tuple[dict[str, int], sharding.Rules]] = {
    "data": ({"data": DEVICES}, ()),
    "fsdp": ({"data": DEVICES}, ((".*", "fsdp"),)),
    "tensor": ({"data": 4, "model": 4}, ((".*", (None, "model")),)),
    "fsdp x tensor": ({"data": 4, "model": 4}, ((".*", ("data", "model")),)),
}
BYTES = {
    **dict.fromkeys(("pred", "s8", "u8"), 1),
    **dict.fromkeys(("s16", "u16", "bf16", "f16"), 2),
    **dict.fromkeys(("s64", "u64", "f64"), 8),
}
"""Of one number, by HLO type; 4 for the others."""

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


class Traffic(NamedTuple):
    """Collectives of one program on one device: how many run, one after another, and the bytes of their results."""

    count: int
    bytes: int

    def plus(self, other: Traffic, times: int = 1) -> Traffic:
        """The sum with another, which runs so many times."""
        return Traffic(self.count + times * other.count, self.bytes + times * other.bytes)


def size(text: str) -> int:
    """Bytes of all the arrays in an HLO type.

    >>> size("(f32[2,3]{1,0}, pred[])")
    25
    """
    arrays = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", text)
    return sum(BYTES.get(kind, 4) * math.prod(int(n) for n in shape.split(",") if n) for kind, shape in arrays)


def traffic(hlo: str) -> Traffic:
    """What a compiled program sends. Loops of unknown length count as none: the search among ties, which are rare."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in hlo.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name:
            computations[name].append(line)

    @functools.cache
    def of(name: str) -> Traffic:
        total = Traffic(0, 0)
        for line in computations[name]:
            sent = re.search(rf"= (.*?) (?:{KINDS})(?:-start)?\(", line)
            if sent:
                total = total.plus(Traffic(1, size(sent[1])))
            turns = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            if body := re.search(r"body=%?([\w.\-]+)", line):
                total = total.plus(of(body[1]), int(turns[1]) if turns else 0)
            for called in re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", line):
                total = total.plus(of(called))
        return total

    return of(entry)


def programs(width: int, layout: str) -> dict[str, Any]:
    """The counts of both programs for a network of square layers."""
    axes, rules = LAYOUTS[layout]
    mesh = sharding.mesh(axes, jax.devices()[: math.prod(axes.values())])
    params = {f"layer_{i}": jax.ShapeDtypeStruct((width, width), jnp.float32) for i in range(LAYERS)}
    plan = rx.make_plan(params, 0.9, rx.uniform)
    tx = rx.sparsify(optax.sgd(0.1, momentum=0.9), rx.rigl(plan, period=100), key=jax.random.key(0))
    state = (params, jax.eval_shape(tx.init, params))
    laid = sharding.shardings(rules, state, params, mesh)
    batch = jax.ShapeDtypeStruct((BATCH, width), jnp.float32)
    split = jax.NamedSharding(mesh, jax.P("data"))

    def loss(params: PyTree, x: Array) -> Array:
        for i in range(LAYERS):
            x = jnp.tanh(x @ params[f"layer_{i}"])
        return jnp.mean(x**2)

    def step(rewire: bool, state: Any, x: Array) -> Any:
        params, sparse = state
        updates, sparse = tx.update(jax.grad(loss)(params, x), sparse, params, rewire=rewire)
        return optax.apply_updates(params, updates), sparse

    found: dict[str, Any] = {"layout": layout, "width": width, "weights": LAYERS * width**2, **mesh.shape}
    for kind, rewire in (("step", False), ("rewiring", True)):
        jitted = jax.jit(functools.partial(step, rewire), in_shardings=(laid, split), out_shardings=laid)
        # On CPU counts are summed in another order, which suits its vectors and not a mesh.
        with mock.patch.object(jax, "default_backend", return_value="tpu"):
            compiled: Any = jitted.lower(state, batch).compile()
        sent = traffic(compiled.as_text())
        flops = int(compiled.cost_analysis()["flops"])
        found |= {f"{kind}_count": sent.count, f"{kind}_bytes": sent.bytes, f"{kind}_flops": flops}
    return found


def extrapolate(rows: list[dict[str, Any]], *, weights: int, devices: int, leaves: int, axes: int) -> dict[str, Any]:
    """What a rewiring adds to a step, computed and not measured, for weights sharded over all devices.

    Args:
      rows: what the programs showed; those of "fsdp x tensor" say how many counts a leaf and a mesh axis take.
      weights: of all sparse leaves together.
      devices: in the mesh.
      leaves: sparse leaves; one has to have fewer than 2^31 weights.
      axes: of the mesh over which a leaf is cut.

    Returns:
      All for one device: collectives one after another and their bytes; bytes of its gradient, of its weights with
      one moment and mask, and of scores that the search reads (2 selections of 32 passes over 16 bits).
    """
    shown = [row for row in rows if row["layout"] == "fsdp x tensor"]
    extra = {tuple(row[f"rewiring_{what}"] - row[f"step_{what}"] for what in Traffic._fields) for row in shown}
    if len(extra) != 1:
        raise ValueError(f"scaling: what a rewiring adds must not depend on the weights, got {sorted(extra)}")
    count, size = (total / LAYERS / 2 for total in extra.pop())  # by leaf and mesh axis
    here = weights / devices
    return {
        "weights": weights,
        "devices": devices,
        "leaves": leaves,
        "weights_per_device": round(here),
        "rewiring_count": round(count * leaves * axes),
        "rewiring_bytes": round(size * leaves * axes),
        "gradient_bytes": round(4 * here),
        "state_bytes": round(here * (4 + 4 + 1)),
        "score_bytes_read": round(here * 2 * 32 * 2),
    }


def main() -> None:
    """The command."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    rows = [programs(width, layout) for layout in LAYOUTS for width in WIDTHS]
    for row in rows:
        print(row, flush=True)
    largest = [
        extrapolate(rows, weights=weights, devices=devices, leaves=400, axes=2)
        for weights, devices in ((10**9, 16), (10**10, 256), (10**11, 4096))
    ]
    what = "collectives and FLOPs of one device in compiled programs; `computed` extends them by formula"
    timing.write("scaling", rows, what=what, layers=LAYERS, batch=BATCH, devices=DEVICES, computed=largest)


if __name__ == "__main__":
    main()
