# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on the CPU (``csrc/simt/simt.h``), built when a test first asks for them."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import shutil
import subprocess
import sys
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

import pytest
import torch
from guarded import Guarded

ROOT = Path(__file__).parents[1]
TREE = ROOT / "build" / "simt" / str(sys.implementation.cache_tag)
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DEVICE = 64  # launchers remember the limits of devices below this one


def tool(name: str) -> str:
    """A program of this environment, which need not be active, or of the path."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        pytest.fail(f"{name} was not found: pip install '.[test]' brings it")
    return found


@functools.cache
def build(target: str) -> None:
    """Compiles what has changed of one module; seconds where nothing has."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        pytest.skip("there is no C++ compiler")
    TREE.mkdir(parents=True, exist_ok=True)
    configure = [tool("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(TREE), "-DMOSAIC_SIMT=ON"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DMOSAIC_OUTPUT={TREE / 'module.so'}"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    with (TREE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for command in (configure, [tool("cmake"), "--build", str(TREE), "--target", target]):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.fail(f"{' '.join(command)}\n{done.stdout[-6000:]}{done.stderr[-2000:]}")


class Gpu:
    """An emulated GPU of architecture ``arch``: 80 copies with cp.async, 90 in bulk.

    ``module`` has the functions of ``_C_cuda`` and takes addresses of ordinary memory, ``DEVICE`` for the device and
    ``CODES`` of the dtypes; a stream is not read. Hand it ``Guarded`` tensors.
    """

    def __init__(self, arch: int) -> None:
        self.arch, name = arch, f"_C_simt_{arch}"
        build(name)
        path = str(next(TREE.glob(f"{name}.*.so")))
        loader = ExtensionFileLoader(name, path)
        self.module = module_from_spec(ModuleSpec(name, loader, origin=path))
        loader.exec_module(self.module)
        self._controls = ctypes.CDLL(path)
        self._controls.mosaic_simt_probe.restype = ctypes.c_char_p
        self.limits()

    def limits(
        self, multiprocessors: int = 4, shared_bytes: int = 164 * 1024, resident_blocks: int = 3, major: int = 0
    ) -> None:
        """What the device has, and how many blocks of a launch run at once; ``major`` as the code's if it is 0."""
        self._controls.mosaic_simt_device(DEVICE, multiprocessors, shared_bytes, major or self.arch // 10)
        self._controls.mosaic_simt_resident_blocks(resident_blocks)

    def seed(self, seed: int) -> None:
        """The order of everything in the launches from here on."""
        self._controls.mosaic_simt_seed(ctypes.c_uint64(seed))

    def probe(self, name: str, variant: int, given: Guarded, out: Guarded) -> str:
        """Runs one of csrc/simt/probes.cu's kernels; what went wrong, or nothing."""
        addresses = ctypes.c_void_p(given.address), ctypes.c_void_p(out.address)
        message: bytes = self._controls.mosaic_simt_probe(name.encode(), variant, *addresses)
        return message.decode()
