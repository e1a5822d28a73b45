# SPDX-License-Identifier: Apache-2.0
"""The Triton operators without a GPU: run by Triton's interpreter, and compiled for two of NVIDIA's.

``tests/test_cuda.py`` runs the same checks on a real one.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_checks
from torch import Tensor

import mosaic_kernels as mk
from mosaic_kernels.ops import reference, tensor_cores
from mosaic_kernels.ops import triton as backend
from mosaic_kernels.ops.library import _SCHEMAS
from mosaic_kernels.ops.triton import configs

pytest.importorskip("triton", reason="triton is not installed")
registry = importlib.import_module("mosaic_kernels.ops.select")  # the package's own name `select` is the operator
MODULES = ("linear", "obs", "pack", "score", "select")


def interpret(*checks: str) -> dict[str, str | None]:
    """What these checks say, or all; the interpreter is chosen when Triton is imported, so in a process of its own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, triton_checks.__file__, *checks], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    return interpret()


def test_a_check_of_every_module_interpreted() -> None:
    """Run the quickest check of each Triton module: pack, score, select, obs and linear."""
    checks = ("packs_what_is_odd", "sums_squares", "selects_in_groups", "sweeps_and_chooses", "multiplies_any_layout")
    assert interpret(*checks) == dict.fromkeys(checks)


def test_sizes_are_the_defaults_or_those_that_are_tried() -> None:
    cpu = torch.device("cpu")
    first, *_ = configs.candidates("obs_block")
    with configs.trying("obs_block", first):
        assert configs.config("obs_block", cpu) == first
    assert configs.config("obs_block", cpu) == configs.DEFAULTS["obs_block"]


@pytest.mark.parametrize("check", triton_checks.CHECKS)
def test_interpreted(interpreted: dict[str, str | None], check: str) -> None:
    assert interpreted[check] is None, interpreted[check]


def test_triton_has_every_operator_on_the_canonical_form() -> None:
    left_to_torch = {"dense_linear", "admm_step", "cg_step"}
    assert set(backend.KERNELS) == set(_SCHEMAS) - left_to_torch - set(tensor_cores.KERNELS)


def test_a_device_takes_the_first_backend_that_has_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    where = torch.device("cuda")

    def resolved(**why_not: str | None) -> dict[str, Callable[..., Any]]:
        for name, found in registry.backends().items():
            if name != "reference":
                reason = partial(why_not.get, name, "not on this machine")
                entry = registry.Backend(name, found.devices, found.kernels, reason)
                monkeypatch.setitem(registry._registry, name, entry)
        monkeypatch.setattr(registry, "resolved", {})
        return {op: registry.kernel(op, where) for op in _SCHEMAS}

    native = dict(registry.backends()["cuda"].kernels)
    every = {op: getattr(reference, op) for op in _SCHEMAS}
    assert resolved() == every  # neither is installed: torch's own operators, on the device
    assert resolved(triton=None) == every | backend.KERNELS
    assert resolved(cuda=None, triton=None) == every | backend.KERNELS | native
    assert resolved(cuda=None) == every | native


NAMES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8",
}  # fmt: skip


class Compiler:
    """Stands in for ``launch``: compiles what would run and makes its tensors zero, so that the operator goes on."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.report: list[tuple[str, int, int]] = []  # kernel, registers, bytes of stack: what spilt lies there
        self.seen: set[str] = set()

    def launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource, compile

        assert all(isinstance(n, int) and n > 0 for n in grid)
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
        signature, fixed, attributes = self._specialised(kernel, arguments, constants)
        key = f"{kernel.fn.__name__} {signature} {fixed} {attributes} {options}"
        if key not in self.seen:
            self.seen.add(key)
            source = ASTSource(kernel, signature, fixed, attributes)
            compiled = compile(
                source, target=GPUTarget("cuda", self.capability, 32), options={"enable_fp_fusion": True, **options}
            )
            assert f"sm_{self.capability}" in compiled.asm["ptx"]
            self.report.append((kernel.fn.__name__, *resources(compiled.asm["cubin"])))
        for argument in arguments:
            if isinstance(argument, Tensor):
                argument.zero_()

    @staticmethod
    def _specialised(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, Any, Any]:
        """As Triton does at a launch: numbers that are 1 are constants, and divisibility by 16 is known."""
        signature, fixed, attributes = {}, dict(constants), {}
        for i, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
            if isinstance(value, Tensor):
                signature[name] = "*" + NAMES[value.dtype]
            elif value == 1:
                fixed[name] = 1
            else:
                signature[name] = "i32"
            if isinstance(value, Tensor) or (name in signature and value % 16 == 0):
                attributes[i,] = [["tt.divisibility", 16]]
        return {n: signature.get(n, "constexpr") for n in kernel.arg_names}, fixed, attributes


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes of its stack, as ``cuobjdump`` of Triton's wheel reads them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    path = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    path.write_bytes(cubin)
    text = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()  # type: ignore[union-attr]
    return int(registers), int(stack)


def products(rows: int, dtype: torch.dtype) -> None:
    weight = torch.ones(128, 256, dtype=dtype)
    packed = mk.pack(weight)
    index = packed.index()
    call = backend.KERNELS["sparse_linear"]
    call(torch.ones(rows, 256, dtype=dtype), packed.values, index.words, index.offsets, weight[0, :128].clone(), 256)


def int8_products(rows: int, group: int | None, rounded: bool) -> None:
    packed = mk.quantize(mk.pack(torch.ones(128, 256)), group)
    operands = (packed.values, packed.scales, packed.index().words, packed.index().offsets, None, 256, rounded)
    backend.KERNELS["sparse_linear_int8"](torch.ones(rows, 256).bfloat16(), *operands)


def selections(dtype: torch.dtype) -> None:
    weight, norms = torch.ones(64, 4096, dtype=dtype), torch.ones(4096)
    for keep, scope in ((torch.tensor([8]), "matrix"), (torch.full((64,), 8), "row"), (torch.tensor([2, 4]), "group")):
        if dtype == torch.float32:
            backend.KERNELS["select"](weight, keep, scope)
        else:
            backend.KERNELS["score_select"](weight, norms, keep.clone(), scope)


def sweeps() -> None:
    weight, keep = torch.ones(64, 128), torch.ones(64, 128, dtype=torch.bool)
    for n, m in ((0, 0), (2, 4)):
        backend.KERNELS["obs_block"](weight, torch.eye(128), keep, n, m)


def packings(dtype: torch.dtype) -> None:
    weight = torch.ones(64, 4096, dtype=dtype)
    values, bits = backend.KERNELS["pack"](weight, weight > 0)
    backend.KERNELS["unpack"](values, bits, 4096)


def sums() -> None:
    weight = torch.ones(64, 4096).bfloat16()
    backend.KERNELS["outlier_stats"](weight, torch.ones(4096), [3.0, 5.0])
    backend.KERNELS["column_square_sums"](weight)


OPERATORS: dict[str, Callable[[], None]] = {
    "pack": lambda: packings(torch.bfloat16),
    "sums": sums,
    "select": lambda: selections(torch.float32),
    "score_select": lambda: selections(torch.bfloat16),
    "obs_block": sweeps,
    "registers-1": lambda: products(1, torch.bfloat16),
    "registers-4": lambda: products(4, torch.bfloat16),
    "registers-16": lambda: products(16, torch.float32),
    "tiles-16": lambda: products(16, torch.bfloat16),
    "tiles-64": lambda: products(64, torch.float16),
    "tiles-128": lambda: products(128, torch.bfloat16),
    "int8-registers": lambda: int8_products(1, None, False),
    "int8-registers-groups": lambda: int8_products(4, 64, True),
    "int8-tiles": lambda: int8_products(16, None, True),
    "int8-tiles-groups": lambda: int8_products(128, 64, False),
}


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_compile_and_spill_nothing(
    operator: str, capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(capability)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for module in MODULES:
        monkeypatch.setattr(importlib.import_module(f"mosaic_kernels.ops.triton.{module}"), "launch", compiler.launch)
    OPERATORS[operator]()
    print(*compiler.report, sep="\n")  # noqa: T201 - for `pytest -rA`: registers and stack of every kernel
    assert compiler.report
    assert [name for name, _, stack in compiler.report if stack] == []
