"""The native library is loaded only if it was built from these sources, for this jaxlib, and is whole."""

import ctypes
import fnmatch
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tomllib
import types

import jax
import pytest

from rigl_jax import native
from rigl_jax.execution import backends
from rigl_jax.native import build, cuda

built = pytest.mark.skipif(native.library() is None, reason=native.reason())


@pytest.fixture
def library(tmp_path):
    """A copy of the library and of its note."""
    copy = tmp_path / "_native.so"
    shutil.copyfile(native.LIBRARY, copy)
    shutil.copyfile(build.note_of(native.LIBRARY), build.note_of(copy))
    return copy


def noted(library, **changes):
    note = build.note_of(library)
    note.write_text(json.dumps(json.loads(note.read_text()) | changes))


def as_folder(library):
    library.unlink()
    library.mkdir()


DAMAGE = {
    "not built": lambda library: library.unlink(),
    "no readable note": lambda library: build.note_of(library).unlink(),
    "other sources": lambda library: noted(library, stamp="0" * 64),
    "damaged": lambda library: os.truncate(library, library.stat().st_size // 2),
    "another jaxlib": lambda library: noted(library, ffi=[build.ffi_version(build.headers())[0], 10**6]),
    "not readable, or its sources are not ([Errno 21]": as_folder,
}


@built
@pytest.mark.parametrize("named", DAMAGE)
def test_what_is_not_loaded(library, named):
    assert build.fault(library) == ""
    DAMAGE[named](library)
    assert named in build.fault(library)


@built
@pytest.mark.parametrize(
    "note",
    ["", "{}", "[]", '{"stamp": 1, "sha256": 2, "ffi": 3}', '{"stamp": "1", "sha256": "2", "ffi": [0, "x"]}'],
)
def test_a_note_that_says_nothing(library, note):
    build.note_of(library).write_text(note)
    assert build.fault(library).endswith(f"no readable note _native.json lies beside {library}")


@built
def test_a_library_that_may_not_be_read(library, monkeypatch):
    """Root may read everything, so the refusal is raised here."""

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    for method in ("exists", "read_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(pathlib.Path, method, refuse)
            assert "not readable, or its sources are not ([Errno 13]" in build.fault(library)


@built
def test_missing_sources_are_plain_jax_with_one_warning(library, monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(build, "SOURCES", tmp_path / "none")
    monkeypatch.setattr(native, "LIBRARY", library)
    loaded, why = native._load.__wrapped__()
    assert loaded is None
    assert "its sources are not ([Errno 2]" in why
    assert [record.getMessage().count(native.REBUILD) for record in caplog.records] == [1]


def test_a_build_that_cannot_read_its_sources_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(build, "SOURCES", tmp_path / "none")
    monkeypatch.setattr(sys, "argv", ["build", "--force"])
    monkeypatch.setattr(build, "compiler", lambda: "c++")
    assert build.main() == 1
    assert capsys.readouterr().err.startswith("rigl_jax: native kernels not built: [Errno 2]")


@built
def test_a_library_for_an_older_ffi_serves(library):
    major, minor = build.ffi_version(build.headers())
    noted(library, ffi=[major, minor - 1])
    assert build.fault(library) == ""


@built
def test_a_truncated_library_is_one_line_and_plain_jax(library):
    DAMAGE["damaged"](library)
    script = (
        "import numpy as np, rigl_jax.execution as e; print(e.kernels.make_pattern(np.eye(3) > 0).nnz, e.backends())"
    )
    environment = {**os.environ, "RIGL_JAX_NATIVE_LIBRARY": str(library)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 ")
    assert "available=False, detail='damaged" in done.stdout
    lines = [line for line in done.stderr.splitlines() if "native CPU kernels" in line]
    assert len(lines) == 1
    assert native.REBUILD in lines[0]


def test_the_stamp_follows_the_sources(tmp_path, monkeypatch):
    before = build.stamp()
    sources = tmp_path / "src"
    shutil.copytree(build.SOURCES, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    assert build.stamp() == before
    (sources / "conv.cc").write_text("// other\n")
    assert build.stamp() != before


@built
@pytest.mark.skipif(
    shutil.which("objdump") is None or platform.machine() != "x86_64", reason="needs objdump, and reads x86-64"
)
def test_what_the_levels_share_is_for_every_processor():
    """Templates of the standard library are compiled in every level, and the linker keeps one of the copies."""
    symbols = subprocess.run(["nm", "--defined-only", native.LIBRARY], capture_output=True, text=True, check=True)
    shared = {line.split()[2] for line in symbols.stdout.splitlines() if line.split()[1] in "WVu"}
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", native.LIBRARY], capture_output=True, text=True)
    wide, function = set(), ""
    for line in code.stdout.splitlines():
        if line.endswith(">:"):
            function = line.partition("<")[2][:-2]
        elif re.search(r"\tv[a-z]", line):  # AVX and later
            wide.add(function)
    assert len(wide) > 20  # the levels above the portable one
    assert shared & wide == set()


def test_packages_hold_every_source_and_what_it_is_built_with():
    project = tomllib.loads((pathlib.Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["rigl_jax.native"]
    sources = [str(path.relative_to(build.HERE)) for path in build.SOURCES.rglob("*.*")]
    assert all(any(fnmatch.fnmatch(source, pattern) for pattern in patterns) for source in sources)
    assert {f"src/{unit.source}" for unit in build.units("x86_64")} <= set(sources)
    assert {f"src/cuda/{unit.source}" for unit in build.CUDA_UNITS} <= set(sources)
    assert any(need.startswith("jaxlib") for need in project["build-system"]["requires"])


@pytest.mark.skipif(not build.cuda_wanted(), reason="no nvcc, or RIGL_JAX_CUDA=0")
def test_nvcc_compiles_the_kernels_for_gpus(tmp_path):
    """The library of this checkout, which `make` builds; another one where it is not up to date."""
    library = build.CUDA_LIBRARY
    if build.fault(library, cuda=True):
        library = build.build_cuda(tmp_path / "_cuda.so")
    assert build.fault(library, cuda=True) == ""
    assert build.fault(library) == "built from other sources"  # it is not the one for CPUs
    loaded = ctypes.CDLL(str(library))  # without a driver
    assert all(hasattr(loaded, target) for target in cuda.TARGETS)
    assert b"sm_90a" in library.read_bytes()


@pytest.mark.parametrize("missing", ["nothing built", "switched off"])
def test_no_kernels_for_gpus_are_plain_jax_without_a_word(monkeypatch, caplog, capfd, tmp_path, missing):
    monkeypatch.setattr(build, "CUDA_LIBRARY", tmp_path / "_cuda.so")
    monkeypatch.setenv("RIGL_JAX_CUDA", "0" if missing == "switched off" else "1")
    monkeypatch.setattr(cuda, "_load", cuda._load.__wrapped__)
    monkeypatch.setattr(cuda, "reason", cuda.reason.__wrapped__)
    found = backends()["cuda"]
    assert not found.available
    assert ("RIGL_JAX_CUDA=0" if missing == "switched off" else "not built") in found.detail
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_a_gpu_or_driver_that_is_too_old_is_plain_jax(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda platform: ["a GPU"])
    loaded = types.SimpleNamespace(rigl_cuda_fault=lambda: b"no kernel image is available")
    monkeypatch.setattr(cuda, "_load", lambda: (loaded, ""))
    assert "no kernel image" in cuda.reason.__wrapped__()
    loaded.rigl_cuda_fault = lambda: None
    assert cuda.reason.__wrapped__() == ""


@pytest.mark.parametrize(("nvcc", "wanted"), [(None, False), ("false", True)])
def test_a_build_goes_on_without_kernels_for_gpus(monkeypatch, capsys, tmp_path, nvcc, wanted):
    """Silently without nvcc, with a line where it fails."""
    monkeypatch.setattr(shutil, "which", lambda name: name if name == nvcc else None)
    monkeypatch.setenv("NVCC", nvcc or "")
    monkeypatch.delenv("RIGL_JAX_CUDA", raising=False)
    monkeypatch.setattr(build, "CUDA_LIBRARY", tmp_path / "_cuda.so")
    monkeypatch.setattr(build, "fault", lambda *library, cuda=False: "not built" if cuda else "")
    monkeypatch.setattr(sys, "argv", ["build"])
    assert build.cuda_wanted() == wanted
    assert build.main() == 0
    said = capsys.readouterr()
    assert said.out.startswith("up to date: ")
    assert said.err.startswith("rigl_jax: kernels for GPUs not built") if wanted else said.err == ""
    monkeypatch.setenv("RIGL_JAX_CUDA", "0")
    assert not build.cuda_wanted()
