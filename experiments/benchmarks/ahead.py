"""Compiles for an H100 or a TPU v5e on a machine that has neither, and counts what the program does.

    compiled = ahead.compile("h100", step, params, batch)
    ahead.launches(compiled)  # kernels in one call
    ahead.temporary(compiled)  # bytes of buffers beside arguments and results

It needs the compilers, `pip install -e .[ahead]`, but no device and no driver. XLA does not tune kernels here, and
takes its own sort instead of CUB's, so a program on the device may differ in these two.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import jax
from jax.experimental import topologies

H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 }
runtime_version { major: 13 minor: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


class Target(NamedTuple):
    """A device to compile for: JAX's name of its backend, and the plug-in that holds its compiler."""

    backend: str
    plugin: str
    topology: Callable[[], Any]


TARGETS = {
    "h100": Target(
        "gpu",
        "jax_cuda13_plugin",
        lambda: topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1"),
    ),
    "v5e": Target("tpu", "libtpu", lambda: topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")),
}


# Otherwise the TPU's compiler asks the network which machine it is on.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")


def available(name: str) -> bool:
    """Whether the compiler of a target is installed."""
    return importlib.util.find_spec(TARGETS[name].plugin) is not None


@functools.cache
def _sharding(name: str) -> jax.sharding.Sharding:
    """One device of the target."""
    return jax.sharding.SingleDeviceSharding(TARGETS[name].topology().devices[0])


@contextlib.contextmanager
def pretended(name: str) -> Iterator[None]:
    """While it lasts, a trace is that of a process whose one device is the target."""
    backend = TARGETS[name].backend
    device_count = mock.patch.object(jax, "device_count", return_value=1)
    with mock.patch.object(jax, "default_backend", return_value=backend), device_count:
        yield


def compile(name: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> jax.stages.Compiled:
    """A function compiled for a target; only shapes and dtypes of the arguments are read.

    Args:
      name: "h100" or "v5e".
      function: what `jax.jit` takes.
      arguments: trees of arrays or `jax.ShapeDtypeStruct`.
      options: of `jax.jit`.
    """
    sharding = _sharding(name)

    def abstract(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(jax.numpy.shape(x), jax.numpy.result_type(x), sharding=sharding)

    with pretended(name):
        # A new function, so that no trace for another backend is taken from JAX's cache.
        return jax.jit(lambda *args: function(*args), **options).lower(*jax.tree.map(abstract, arguments)).compile()


class Launches(NamedTuple):
    """Kernels that one call of a program starts, and its loops whose number of rounds only the device knows.

    Attributes:
      kernels: outside of such loops; loops with a known number of rounds are multiplied out, of the branches of a
        conditional the longest counts.
      open_loops: loops without a known number of rounds. Each makes the host wait for the device once a round.
      in_open_loops: kernels in one round of all of them.
    """

    kernels: int
    open_loops: int = 0
    in_open_loops: int = 0

    def __add__(self, other: Any) -> Launches:
        """Both, one after the other."""
        return Launches(*(a + b for a, b in zip(self, other, strict=True)))


_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_OPERATION = re.compile(r"^(?:ROOT )?%?[\w.\-]+ = (?:\(.*?\)|\S+) ([\w\-]+)\(")
_STARTED = {
    "rigl_cuda_select": 9,  # of float32; memory is cleared, three digits take two each, ties, and the mask
    "rigl_cuda_gather": 3,  # memory is cleared, the pattern is checked
    "rigl_cuda_scatter": 3,
    "rigl_cuda_dots": 3,
}
"""Kernels that a native handler starts, at most."""
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "copy-done", "async-done", "opt-barrier", "add-dependency",
}  # fmt: skip


def launches(compiled: jax.stages.Compiled) -> Launches:
    """How many kernels a call starts, read off the optimised program. Copies of buffers count as kernels."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", ""
    for line in (compiled.as_text() or "").splitlines():
        if found := _COMPUTATION.match(line):
            current = found[2]
            bodies[current] = []
            entry = current if found[1] else entry
        elif current and line.startswith(" "):
            bodies[current].append(line.strip())

    @functools.cache
    def of(name: str) -> Launches:
        total = Launches(0)
        for line in bodies[name]:
            if found := _OPERATION.match(line):
                total += one(found[1], line)
        return total

    def one(operation: str, line: str) -> Launches:
        called = re.findall(r"(?:to_apply|calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)", line)
        if operation in _FREE:
            return Launches(0)
        if operation == "call":
            return of(called[0])
        if operation == "conditional":
            branches = re.search(r"branch_computations=\{(.*?)\}", line)
            names = [b.strip().lstrip("%") for b in branches[1].split(",")] if branches else called
            return max(map(of, names))
        if operation == "while":
            inside = functools.reduce(Launches.__add__, map(of, called))
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            if trips is None:
                return Launches(0, 1 + inside.open_loops, inside.kernels + inside.in_open_loops)
            return Launches(*(int(trips[1]) * n for n in inside))
        target = re.search(r'custom_call_target="(\w+)"', line)
        return Launches(_STARTED.get(target[1], 1) if target else 1)

    return of(entry)


def temporary(compiled: jax.stages.Compiled) -> int:
    """Bytes of the buffers that are neither arguments nor results."""
    found = compiled.memory_analysis()
    assert found is not None  # the compilers of all targets give it
    return found.temp_size_in_bytes
