"""How XLA is told to compile quickly. Tests measure results, never speed, so it may skip optimisations."""

import importlib.metadata

# Gone from jaxlib 0.11 on, which aborts the process at a flag that it does not know.
_OLD_EMITTERS = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11)

COMPILER_OPTIONS = {"xla_cpu_use_fusion_emitters": False} if _OLD_EMITTERS else {}
"""For `jax.jit(..., compiler_options=)`: they compile twice as fast and change no result."""


def flags(devices: int) -> str:
    """`XLA_FLAGS` for so many host devices; they must be set before JAX starts."""
    quick = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
    quick += [f"--{name}={str(value).lower()}" for name, value in COMPILER_OPTIONS.items()]
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *quick])
