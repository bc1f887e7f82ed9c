"""The optional native kernels. Everything else about the package is in pyproject.toml.

A failed or impossible build (no C++ compiler, no jaxlib headers, an odd platform) is a warning, never a failed install:
the library then runs its kernels in plain JAX, and `python -m rigl_jax.native.build` builds them later.
"""

import importlib.util
import pathlib

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = pathlib.Path(__file__).parent / "rigl_jax" / "native"


def load_build():
    """native/build.py by its path: the package itself needs JAX, which a build environment lacks."""
    spec = importlib.util.spec_from_file_location("rigl_jax_build", NATIVE / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildKernels(build_ext):
    """Compiles with native/build.py instead of setuptools' own compiler logic, which has no flags a source."""

    def get_ext_filename(self, fullname):
        """_native.so without the interpreter's tag: ctypes loads it, Python never imports it."""
        return str(pathlib.Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext):
        """Build, or say why not and go on."""
        try:
            load_build().build(pathlib.Path(self.get_ext_fullpath(ext.name)))
        except Exception as error:  # whatever it is, the install goes on without native kernels
            self.warn(f"rigl_jax: native kernels not built, plain JAX will serve: {error}")


setup(
    ext_modules=[Extension("rigl_jax.native._native", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels},
)
