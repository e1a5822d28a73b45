# SPDX-License-Identifier: Apache-2.0
"""Builds the extension modules with CMake and Ninja; everything else is in pyproject.toml.

By default an installation builds only modules that this machine can use. One printed line says which, and why.

MOSAIC_CUDA=auto           default: build _C_cuda if a GPU and nvcc are found, for the GPUs of this machine
MOSAIC_CUDA=on             build it even without a GPU, for 80;86;89;90, and 100;120 if nvcc knows them; or fail
MOSAIC_CUDA=off            do not build it
MOSAIC_CUDA_ARCHS=80;90    build it for these architectures, with or without a GPU; fail if it cannot be built

A GPU is found if /dev/nvidia0 or /proc/driver/nvidia/gpus has one, or nvidia-smi -L lists one; CUDA_VISIBLE_DEVICES
has no effect. nvcc is searched in CUDACXX, CUDA_HOME, PATH and /usr/local/cuda, and must be
of CUDA 12.5 or later. GPUs that nvcc does not know run the PTX of the last architecture that was compiled for.
"""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
# by its path: importing the package would need torch, which an isolated build does not have
cuda_toolkit = runpy.run_path(str(ROOT / "mosaic_kernels" / "cuda_toolkit.py"))
find_nvcc = cuda_toolkit["find_nvcc"]


def cuda_choice():
    """``cuda_toolkit.Choice`` for this machine and environment; "MOSAIC_CUDA" and "MOSAIC_CUDA_ARCHS" decide."""
    nvcc = find_nvcc()
    toolkit = cuda_toolkit["read_toolkit"](nvcc)
    archs = cuda_toolkit["architectures"](archs=toolkit.archs)
    return cuda_toolkit["choose"](os.environ, cuda_toolkit["find_gpu"](), nvcc, archs, toolkit)


def modules() -> list[Extension]:
    cuda = cuda_choice()
    if cuda.error:
        raise SetupError(cuda.error)
    # `depends` is what puts the C++ sources into a source distribution
    files = [ROOT / "CMakeLists.txt", *ROOT.glob("csrc/**/*.*"), *ROOT.glob("python/*")]
    depends = sorted(str(file.relative_to(ROOT)) for file in files)
    built = [Extension("mosaic_kernels._C_cpu", [], depends=depends)]
    if cuda.build:
        built.append(Extension("mosaic_kernels._C_cuda", [], depends=depends, optional=not cuda.required))
    what = f"CPU kernels and CUDA kernels for {cuda.archs}" if cuda.build else "CPU kernels, no CUDA kernels"
    print(f"mosaic-kernels: building {what} ({cuda.why})", file=sys.stderr)
    return built


def cmake_tree(name: str) -> Path:
    """The directory in which CMake builds a module; it stays, so a second installation compiles only what changed.

    setuptools' ``build_temp`` is a new directory at every editable installation. A tree that was copied with its
    checkout is deleted, because CMake stores absolute paths.
    """
    tree = ROOT / "build" / "cmake" / str(sys.implementation.cache_tag) / name
    cache = tree / "CMakeCache.txt"
    if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
        shutil.rmtree(tree)
    return tree


class CMakeBuild(build_ext):
    """One CMake configuration per module, so that a broken CUDA toolkit cannot break the CPU module."""

    def build_extension(self, ext: Extension) -> None:
        output = (ROOT / self.get_ext_fullpath(ext.name)).resolve()
        target, tree = ext.name.rpartition(".")[2], cmake_tree(ext.name)
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(tree), "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DMOSAIC_OUTPUT={output}"]
        # an isolated build's ninja is gone at the next one, which would find its path in the cache
        configure += [f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"]
        if target == "_C_cuda":
            configure += ["-DMOSAIC_CUDA=on", f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"]
            configure += [f"-DMOSAIC_CUDA_ARCHS={cuda_choice().archs}"]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(tree), "--target", target], check=True)
        except (subprocess.CalledProcessError, OSError) as error:
            if ext.optional:
                print(f"mosaic-kernels: {find_nvcc()} could not build {target}, see above: CPU only", file=sys.stderr)
            raise CompileError(f"{ext.name}: {error}") from error


if __name__ == "__main__":
    setup(ext_modules=modules(), cmdclass={"build_ext": CMakeBuild})
