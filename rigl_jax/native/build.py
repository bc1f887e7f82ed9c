"""Compile the native kernels: `python -m rigl_jax.native.build`, which does nothing where they are up to date.

Two libraries: one for CPUs, and where nvcc is found one for NVIDIA's GPUs. For CPUs the source of products is compiled
once for each instruction-set level, with that level's flags and no other, and that of selection holds clones of its
loops: a wheel built on one machine runs on all, the level is chosen when it is loaded. For GPUs it holds code for
Hopper, and PTX that the driver compiles for others since Ampere. Beside a library lies a note of what it was built
from. `fault` compares the two with the sources and the jaxlib of now, so that an old or damaged library is never
loaded.

Imports nothing outside the standard library and nothing of rigl_jax, so that setup.py and make can run this file by its
path before anything is installed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import hashlib
import importlib.util
import json
import os
import pathlib
import platform
import re
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
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1")
AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512")
CUDA_LIBRARY = HERE / "_cuda.so"
CUDA_FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-Xcompiler", "-fPIC,-fvisibility=hidden")
CUDA_DEVICES = ("-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_80,code=compute_80")


class Unit(NamedTuple):
    """One object file: which source, under which name, with which extra flags."""

    source: str
    name: str
    flags: tuple[str, ...] = ()


def units(machine: str) -> tuple[Unit, ...]:
    """What a processor family is compiled from: plain sources, a copy of level.cc a level, and of half.cc for some."""
    x86 = machine.lower() in ("x86_64", "amd64")
    family = ("-DRIGL_X86",) if x86 else ()
    levels, halves = [("rigl_portable", 4, ())], []
    if x86:
        levels += [("rigl_avx2", 8, AVX2), ("rigl_avx2_wide", 16, AVX2), ("rigl_avx512", 16, AVX512)]
        halves += [("rigl_half_wide", 16, AVX2), ("rigl_half", 16, (*AVX512, "-mavx512bf16"))]
    plain = ("linear.cc", "conv.cc", "dense.cc", "select.cc", "index.cc", "host.cc")
    handlers = [Unit(source, source, family) for source in plain]
    copies = [
        Unit(source, name, (*family, *flags, f"-DLANES={n}", f"-DLEVEL={name}"))
        for source, built in (("level.cc", levels), ("half.cc", halves))
        for name, n, flags in built
    ]
    return (*handlers, *copies)


CUDA_UNITS = (
    Unit("select.cu", "select.cu", CUDA_DEVICES),
    Unit("linear.cu", "linear.cu", CUDA_DEVICES),
    Unit("handlers.cc", "handlers.cc"),  # no device code
)


def compiler() -> str:
    """The C++ compiler: $CXX, or the first of c++, g++, clang++ on the path. RuntimeError if there is none."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name):
            return name
    raise RuntimeError("no C++ compiler found (looked at $CXX, c++, g++, clang++)")


def cuda_compiler() -> str:
    """NVIDIA's compiler: $NVCC, or nvcc on the path or in CUDA's usual folder. RuntimeError if there is none."""
    for name in (os.environ.get("NVCC"), "nvcc", "/usr/local/cuda/bin/nvcc"):
        if name and shutil.which(name):
            return name
    raise RuntimeError("no nvcc found (looked at $NVCC, the path, /usr/local/cuda/bin)")


def headers() -> pathlib.Path:
    """The folder of XLA's FFI headers, inside the installed jaxlib. RuntimeError if jaxlib is not there."""
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or spec.origin is None:
        raise RuntimeError("jaxlib, whose headers the kernels are compiled against, is not installed")
    folder = pathlib.Path(spec.origin).parent / "include"
    if not (folder / "xla" / "ffi" / "api" / "ffi.h").exists():
        raise RuntimeError(f"jaxlib has no XLA FFI headers in {folder}")
    return folder


def ffi_version(include: pathlib.Path) -> list[int]:
    """[major, minor] of XLA's FFI. A library serves any jaxlib of the same major and no smaller minor version."""
    text = (include / "xla" / "ffi" / "api" / "c_api.h").read_text()
    found = [re.search(rf"define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    return [int(number[1]) for number in found if number]


def stamp(cuda: bool = False) -> str:
    """Digest of the sources of a library, and of how they are compiled on this kind of processor."""
    how = (CUDA_FLAGS, CUDA_UNITS) if cuda else (FLAGS, units(platform.machine()))
    digest = hashlib.sha256(repr(how).encode())
    folder = SOURCES / "cuda" if cuda else SOURCES
    for source in sorted(path for path in folder.iterdir() if path.suffix in (".cc", ".cu", ".h")):
        digest.update(f"{source.name}\n".encode() + source.read_bytes())
    return digest.hexdigest()


def note_of(library: pathlib.Path) -> pathlib.Path:
    """The note beside a library: JSON with its `stamp`, the `ffi` version, and its own `sha256`."""
    return library.with_suffix(".json")


def fault(library: pathlib.Path = LIBRARY, *, cuda: bool = False) -> str:
    """Why a library is not to be loaded: it is not there, not readable, old, damaged, for another jaxlib. Or ""."""
    try:
        return _fault(library, cuda)
    except OSError as error:
        return f"not readable, or its sources are not ({error})"


def _fault(library: pathlib.Path, cuda: bool) -> str:
    if not library.exists():
        return "not built"
    try:
        note = json.loads(note_of(library).read_text())
        built, digest, ffi = note["stamp"], note["sha256"], list(map(int, note["ffi"]))
    except (OSError, ValueError, KeyError, TypeError):
        return f"built by another version, for no readable note {library.stem}.json lies beside {library}"
    if built != stamp(cuda):
        return "built from other sources"
    if hashlib.sha256(library.read_bytes()).hexdigest() != digest:
        return "damaged"
    try:
        here = ffi_version(headers())
    except (OSError, RuntimeError):
        return ""  # XLA itself checks the version, when a kernel is registered
    if ffi[:1] != here[:1] or ffi > here:
        return f"built for another jaxlib (FFI {'.'.join(map(str, ffi))}, this one has {'.'.join(map(str, here))})"
    return ""


def build(target: pathlib.Path = LIBRARY, extra: Sequence[str] = ()) -> pathlib.Path:
    """Compile and link the library for CPUs to `target` and return it.

    Raises:
      RuntimeError: says what is missing or what failed.
    """
    if sys.platform == "win32":
        raise RuntimeError("the native kernels are not built on Windows")
    make = [compiler(), *FLAGS, *extra]
    _build(target, SOURCES, units(platform.machine()), make, [compiler(), "-shared", *extra, "-pthread"], stamp())
    return target


def build_cuda(target: pathlib.Path = CUDA_LIBRARY) -> pathlib.Path:
    """Compile and link the library for NVIDIA's GPUs to `target` and return it. It needs no driver and no GPU.

    Raises:
      RuntimeError: says what is missing or what failed.
    """
    command = cuda_compiler()
    link = [command, "-shared", "-cudart", "static"]  # so that it loads where no CUDA is installed
    _build(target, SOURCES / "cuda", CUDA_UNITS, [command, *CUDA_FLAGS], link, stamp(cuda=True))
    return target


def cuda_wanted() -> bool:
    """Whether the library for GPUs is to be built here: nvcc is found, and RIGL_JAX_CUDA is not 0."""
    if os.environ.get("RIGL_JAX_CUDA") == "0":
        return False
    with contextlib.suppress(RuntimeError):
        return bool(cuda_compiler())
    return False


def _build(
    target: pathlib.Path, sources: pathlib.Path, made_of: Sequence[Unit], make: list[str], link: list[str], digest: str
) -> None:
    include = headers()
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:

        def compiled(unit: Unit) -> str:
            made = os.path.join(folder, unit.name + ".o")
            flags = (*unit.flags, "-isystem", str(include))
            _run([*make, *flags, "-c", str(sources / unit.source), "-o", made])
            return made

        note = {"stamp": digest, "ffi": ffi_version(include)}
        objects = list(pool.map(compiled, made_of))
        linked = os.path.join(folder, "linked.so")
        _run([*link, *objects, "-o", linked])
        note["sha256"] = hashlib.sha256(pathlib.Path(linked).read_bytes()).hexdigest()
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace(target, pathlib.Path(linked).read_bytes())  # a process that has the old library mapped keeps it
        _replace(note_of(target), json.dumps(note).encode())


def _replace(path: pathlib.Path, content: bytes) -> None:
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_bytes(content)
    os.replace(fresh, path)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise RuntimeError(f"{command[0]} failed ({done.returncode}): {lines[0] if lines else 'no message'}")


def main() -> int:
    """Build in place, beside this file, what is not up to date; 0 if there is a library for CPUs."""
    parser = argparse.ArgumentParser(prog="python -m rigl_jax.native.build", description="Compile the native kernels.")
    parser.add_argument("--force", action="store_true", help="build anew what is up to date")
    parser.add_argument("--sanitize", type=pathlib.Path, metavar="LIBRARY", help="build for `make sanitize`, to there")
    arguments = parser.parse_args()
    try:
        if arguments.sanitize:
            print(f"built {build(arguments.sanitize, SANITIZE)}")
            return 0
        print(f"built {build()}" if arguments.force or fault() else f"up to date: {LIBRARY}")
    except (RuntimeError, OSError) as error:
        print(f"rigl_jax: native kernels not built: {error}", file=sys.stderr)
        return 1
    if cuda_wanted():
        try:
            if arguments.force or fault(CUDA_LIBRARY, cuda=True):
                print(f"built {build_cuda()}")
            else:
                print(f"up to date: {CUDA_LIBRARY}")
        except (RuntimeError, OSError) as error:
            print(f"rigl_jax: kernels for GPUs not built, plain JAX will serve there: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
