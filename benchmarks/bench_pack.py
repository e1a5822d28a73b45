# SPDX-License-Identifier: Apache-2.0
"""Packing and unpacking a weight against torch's boolean indexing and bit arithmetic.

    pytest benchmarks/bench_pack.py --benchmark-only --no-regression \
        --benchmark-json=benchmarks/results/pack-CPU.json

The baselines are the reference operators.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from measure import record
from torch import Tensor

import mosaic_kernels as mk
from mosaic_kernels import ops
from mosaic_kernels.ops import reference

SHAPES = {"4096x4096": (4096, 4096), "2048x5632": (2048, 5632)}
PATTERNS = ("50%", "30%", "2:4")


def pruned(shape: str, pattern: str) -> Tensor:
    torch.manual_seed(0)
    weight = torch.randn(SHAPES[shape])
    if pattern == "2:4":
        keep = ops.select(weight.abs(), (2, 4), "group")
    else:
        keep = torch.rand(weight.shape) < float(pattern[:-1]) / 100
    return (weight * keep).bfloat16()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", SHAPES)
def test_pack(benchmark: Any, threads: int, shape: str, pattern: str) -> None:
    weight = pruned(shape, pattern)
    assert torch.equal(mk.pack(weight).values, reference.pack(weight)[0])
    variants = {"torch": lambda _: reference.pack(weight), "ours": lambda _: mk.pack(weight)}
    operation = f"pack, {pattern} kept" if pattern != "2:4" else "pack, 2:4"
    record(benchmark, variants, 15, operation=operation, shape=list(weight.shape), threads=threads)


@pytest.mark.parametrize("shape", SHAPES)
def test_unpack(benchmark: Any, threads: int, shape: str) -> None:
    weight = pruned(shape, "50%")
    packed = mk.pack(weight)
    assert torch.equal(mk.unpack(packed), weight)
    variants = {
        "torch": lambda _: reference.unpack(packed.values, packed.bitmask, packed.shape[1]),
        "ours": lambda _: mk.unpack(packed),
    }
    record(benchmark, variants, 15, operation="unpack, 50% kept", shape=list(weight.shape), threads=threads)
