# SPDX-License-Identifier: Apache-2.0
"""Builds the two extension modules with CMake and Ninja; everything else is in pyproject.toml.

MOSAIC_CUDA=auto|on|off    build _C_cuda where nvcc works (default), require it, or leave it out
MOSAIC_CUDA_ARCHS=80;90    GPU architectures to compile for (default 80;86;89;90)
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent


def find_nvcc() -> str | None:
    """CUDACXX, then CUDA_HOME, then PATH, then the usual place."""
    candidates = [os.environ.get("CUDACXX")]
    candidates += [f"{os.environ[home]}/bin/nvcc" for home in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(home)]
    candidates += ["nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def modules() -> list[Extension]:
    wanted = os.environ.get("MOSAIC_CUDA", "auto").lower()
    if wanted not in ("auto", "on", "off"):
        raise SetupError(f"MOSAIC_CUDA={wanted!r}: choose auto, on or off")
    # `depends` is what puts the C++ sources into a source distribution
    files = [ROOT / "CMakeLists.txt", *ROOT.glob("csrc/**/*.*"), *ROOT.glob("python/*")]
    depends = sorted(str(file.relative_to(ROOT)) for file in files)
    built = [Extension("mosaic_kernels._C_cpu", [], depends=depends)]
    if wanted == "on" and find_nvcc() is None:
        raise SetupError("MOSAIC_CUDA=on but nvcc was not found: set CUDACXX or CUDA_HOME, or use MOSAIC_CUDA=auto")
    if wanted != "off" and find_nvcc() is not None:
        built.append(Extension("mosaic_kernels._C_cuda", [], depends=depends, optional=wanted == "auto"))
    print(f"mosaic-kernels: MOSAIC_CUDA={wanted}, building {', '.join(e.name for e in built)}", file=sys.stderr)
    return built


class CMakeBuild(build_ext):
    """One CMake configuration per module, so that a broken CUDA toolkit cannot break the CPU module."""

    def build_extension(self, ext: Extension) -> None:
        output = (ROOT / self.get_ext_fullpath(ext.name)).resolve()
        target, tree = ext.name.rpartition(".")[2], (ROOT / self.build_temp / ext.name).resolve()
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(tree), "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DMOSAIC_OUTPUT={output}"]
        # an isolated build's ninja is gone at the next one, which would find its path in the cache
        configure += [f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"]
        if target == "_C_cuda":
            archs = os.environ.get("MOSAIC_CUDA_ARCHS", "80;86;89;90")
            configure += ["-DMOSAIC_CUDA=on", f"-DCMAKE_CUDA_COMPILER={find_nvcc()}", f"-DMOSAIC_CUDA_ARCHS={archs}"]
        try:
            subprocess.run(configure, check=True)
            subprocess.run(["cmake", "--build", str(tree), "--target", target], check=True)
        except (subprocess.CalledProcessError, OSError) as error:
            if ext.optional:
                print(f"mosaic-kernels: {find_nvcc()} could not build {target}, see above: CPU only", file=sys.stderr)
            raise CompileError(f"{ext.name}: {error}") from error


setup(ext_modules=modules(), cmdclass={"build_ext": CMakeBuild})
