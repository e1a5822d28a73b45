# SPDX-License-Identifier: Apache-2.0
"""``python -m mosaic_kernels.ops.triton``: measure the kernels' sizes on this GPU and keep the fastest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import triton
from triton import testing

from mosaic_kernels.ops import triton as backend
from mosaic_kernels.ops.triton.configs import DEFAULTS, Config, candidates, config, record, trying

OUT, IN, DENSITY = 4096, 11008, 0.5  # a down projection of a 7B model


def problems(op: str) -> list[Callable[[], object]]:
    """Calls whose time ``op`` decides; their inputs are random."""
    if op == "obs_block":
        weight, factor = torch.randn(OUT, 128, device="cuda"), torch.eye(128, device="cuda")
        keep = torch.rand_like(weight) < DENSITY
        return [lambda: backend.KERNELS["obs_block"](weight, factor, keep, 0, 0)]
    kind, _, size = op.rpartition("_")
    rows = {"registers": (1, 2, 4, 8, 16), "tiles": (64, 128, 256, 512, 1024)}.get(size) or (int(size),)
    # in half precision 8 and 16 rows are tiles by default, whichever is faster: "most_in_registers" tells
    weight = torch.randn(OUT, IN, device="cuda", dtype=torch.bfloat16)
    values, bits = backend.KERNELS["pack"](weight, torch.rand(OUT, IN, device="cuda") < DENSITY)
    words = bits.view(torch.int32)
    offsets = torch.zeros(OUT + 1, dtype=torch.int64, device="cuda")
    offsets[1:] = backend.KERNELS["unpack"](values, bits, IN).ne(0).sum(1).cumsum(0)

    def call(x: torch.Tensor) -> Callable[[], object]:
        return lambda: backend.KERNELS["sparse_linear"](x, values, words, offsets, None, IN)

    return [call(torch.randn(n, IN, device="cuda", dtype=torch.bfloat16)) for n in rows]


def microseconds(op: str, chosen: Config, calls: list[Callable[[], object]]) -> float:
    """The sum of the calls' medians; every run finds the L2 cache overwritten."""
    forced: dict[str, Config] = {op: chosen}
    if op.startswith("register_"):
        forced["most_in_registers"] = {"ROWS": 16}
    elif op.startswith("tiles_"):
        forced["most_in_registers"] = {"ROWS": 0}
    try:
        for name, sizes in forced.items():
            trying(name, sizes).__enter__()
        return sum(1e3 * testing.do_bench(call, return_mode="median") for call in calls)
    finally:
        pass


def main() -> int:
    raise NotImplementedError


if __name__ == "__main__":
    sys.exit(main())
