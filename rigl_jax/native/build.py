"""Compile the native kernels: `python -m rigl_jax.native.build`.

The source of products is compiled once for each instruction-set level, with that level's flags and no other, and that
of selection holds clones of its loops: a wheel built on one machine runs on all, the level is chosen when it is loaded.
Imports nothing outside the standard library and nothing of rigl_jax, so that setup.py can run this file by its path
before anything is installed.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

HERE = pathlib.Path(__file__).parent
SOURCES = HERE / "src"
LIBRARY = HERE / "_native.so"
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi", "-DNDEBUG")
AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")


class Unit(NamedTuple):
    """One object file: which source, under which name, with which extra flags."""

    source: str
    name: str
    flags: tuple[str, ...] = ()


def units(machine: str) -> tuple[Unit, ...]:
    """What a processor family is compiled from: the handlers, and one copy of level.cc a level."""
    x86 = machine.lower() in ("x86_64", "amd64")
    family = ("-DRIGL_X86",) if x86 else ()
    levels = [("rigl_portable", 4, ())]
    if x86:
        levels += [("rigl_avx2", 8, AVX2), ("rigl_avx2_wide", 16, AVX2), ("rigl_avx512", 16, AVX512)]
    handlers = [Unit(source, source, family) for source in ("linear.cc", "conv.cc", "select.cc", "host.cc")]
    copies = [Unit("level.cc", name, (*family, *f, f"-DLANES={n}", f"-DLEVEL={name}")) for name, n, f in levels]
    return (*handlers, *copies)


def compiler() -> str:
    """The C++ compiler: $CXX, or the first of c++, g++, clang++ on the path. RuntimeError if there is none."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise RuntimeError("no C++ compiler found (looked at $CXX, c++, g++, clang++)")


def headers() -> pathlib.Path:
    """The folder of XLA's FFI headers, inside the installed jaxlib. RuntimeError if jaxlib is not there."""
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or spec.origin is None:
        raise RuntimeError("jaxlib, whose headers the kernels are compiled against, is not installed")
    folder = pathlib.Path(spec.origin).parent / "include"
    if not (folder / "xla" / "ffi" / "api" / "ffi.h").exists():
        raise RuntimeError(f"jaxlib has no XLA FFI headers in {folder}")
    return folder


def build(target: pathlib.Path = LIBRARY, extra: Sequence[str] = ()) -> pathlib.Path:
    """Compile and link the library to `target` and return it. RuntimeError says what is missing or what failed."""
    if sys.platform == "win32":
        raise RuntimeError("the native kernels are not built on Windows")
    command, include = compiler(), headers()
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for unit in units(platform.machine()):
            objects.append(os.path.join(folder, unit.name + ".o"))
            flags = (*FLAGS, *unit.flags, *extra, "-isystem", str(include))
            _run([command, *flags, "-c", str(SOURCES / unit.source), "-o", objects[-1]])
        linked = os.path.join(folder, "linked.so")
        _run([command, "-shared", *objects, "-o", linked, "-pthread"])
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(".so.new")
        shutil.copyfile(linked, fresh)
        os.replace(fresh, target)  # a process that has the old library mapped keeps it
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise RuntimeError(f"{command[0]} failed ({done.returncode}): {lines[0] if lines else 'no message'}")


def main() -> int:
    """Build in place, beside this file; 0 if it worked."""
    try:
        print(f"built {build()}")
    except RuntimeError as error:
        print(f"rigl_jax: native kernels not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
