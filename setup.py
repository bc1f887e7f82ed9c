"""The native kernels. Everything else about the package is in pyproject.toml.

A failed or impossible build (no C++ compiler, no jaxlib headers, an odd platform) never fails the install: the library
then runs its kernels in plain JAX, says so when it first would have used them, and `python -m rigl_jax.native.build`
builds them later. Kernels for NVIDIA's GPUs are built too where nvcc is found, unless RIGL_JAX_CUDA=0 is set.
"""

import importlib.util
import os
import pathlib
import shutil

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = pathlib.Path(__file__).parent / "rigl_jax" / "native"


def load_build():
    """native/build.py by its path: the package itself needs JAX, which a build environment lacks."""
    spec = importlib.util.spec_from_file_location("rigl_jax_build", NATIVE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build = load_build()


class BuildKernels(build_ext):
    """Compiles with native/build.py instead of setuptools' own compiler logic, which has no flags a source."""

    def get_ext_filename(self, fullname):
        """_native.so without the interpreter's tag: ctypes loads it, Python never imports it."""
        return str(pathlib.Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext):
        """Build, or say why not and go on. A build that is up to date is taken from the sources' own folder."""
        target = pathlib.Path(self.get_ext_fullpath(ext.name))
        try:
            if os.environ.get("RIGL_JAX_NATIVE") == "0":  # the wheel for all platforms
                raise RuntimeError("switched off by RIGL_JAX_NATIVE=0")
            if ext.name.endswith("_cuda"):
                self._take(target, build.CUDA_LIBRARY, build.fault(build.CUDA_LIBRARY, cuda=True), build.build_cuda)
            else:
                self._take(target, build.LIBRARY, build.fault(), build.build)
        except Exception as error:  # whatever it is, the install goes on without native kernels
            self.warn(f"rigl_jax: native kernels not built, plain JAX will serve: {error}")
            for left in (target, build.note_of(target)):  # of an older build
                left.unlink(missing_ok=True)

    def copy_extensions_to_source(self):
        """For an editable install: the library with its note."""
        for ext in self.extensions:
            made = pathlib.Path(self.build_lib, self.get_ext_filename(ext.name))
            if made.exists():
                self._copy(made, NATIVE / made.name)

    def get_outputs(self):
        """The note belongs to the library."""
        return [
            name for library in super().get_outputs() for name in (library, str(build.note_of(pathlib.Path(library))))
        ]

    def _take(self, target, library, fault, make):
        """The library in the sources' own folder if it is up to date, else a new one."""
        if fault:
            make(target)
        else:
            self._copy(library, target)

    @staticmethod
    def _copy(library, target):
        if library.resolve() != target.resolve():
            target.parent.mkdir(parents=True, exist_ok=True)
            for source, copy in ((library, target), (build.note_of(library), build.note_of(target))):
                shutil.copyfile(source, copy.with_suffix(".new"))
                copy.with_suffix(".new").replace(copy)


class Wheel(bdist_wheel):
    """One wheel serves all Pythons of a platform: its library is no extension module."""

    def get_tag(self):
        """py3-none and the platform, or any platform where no library was built."""
        built = any(pathlib.Path(self.bdist_dir, "rigl_jax", "native").glob("*.so"))
        return ("py3", "none", super().get_tag()[2] if built else "any")


LIBRARIES = ["_native", "_cuda"] if build.cuda_wanted() else ["_native"]

setup(
    ext_modules=[Extension(f"rigl_jax.native.{name}", sources=[], optional=True) for name in LIBRARIES],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": Wheel},
)
