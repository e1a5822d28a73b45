# SPDX-License-Identifier: Apache-2.0
"""Which way of multiplying is the fastest for how many rows of x: what ``tensor_cores.MEASURED`` is filled from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from gpu.bench import Bench, Row, note
from gpu.kernels import SHAPES, Variant, Weights, cell
from mosaic_kernels.ops import tensor_cores
from mosaic_kernels.ops.tensor_cores import Rows

ALWAYS, NEVER = 1 << 30, 0
WAYS = {
    "decode": Rows(decode=ALWAYS, prefill=NEVER),
    "prefill": Rows(decode=NEVER, prefill=ALWAYS),
    "expand": Rows(decode=NEVER, prefill=NEVER),  # into scratch memory, for cuBLAS
}
PATTERNS = ("50%", "70%", "2:4")
ROWS = (8, 16, 32, 64, 96, 128, 256, 512, 1024, 2048, 4096)


@contextmanager
def going(way: Rows, device: torch.device) -> Iterator[None]:
    """Products of tiles take this way inside; on a CPU there is but one."""
    if device.type != "cuda":
        yield
        return
    index = torch.cuda.current_device()
    before = tensor_cores.rows_of(index)
    tensor_cores._rows[index] = way
    try:
        yield
    finally:
        tensor_cores._rows[index] = before


def variants(weights: Weights, pattern: str, device: torch.device) -> dict[str, tuple[Variant, int]]:
    """The dense product, and every way that this pattern can go."""

    def by(way: Rows) -> Variant:
        def run(x: Tensor, i: int) -> Tensor:
            with going(way, device):
                return weights.layers[i % len(weights.layers)](x)

        return run

    ways = {name: way for name, way in WAYS.items() if (pattern, name) != ("2:4", "prefill")}
    return {
        "dense": weights.variants(0)["dense"],
        **{name: (by(way), len(weights.layers)) for name, way in ways.items()},
    }


@torch.no_grad()
def measure(bench: Bench) -> Iterator[Row]:
    """A row for every shape, pattern and number of rows of x."""
    torch.manual_seed(0)
    shapes = {"tiny": (192, 136)} if bench.tiny else {name: SHAPES[name] for name in ("llama2-7b-up", "llama2-7b-down")}
    for shape, (out, columns) in shapes.items():
        for pattern in PATTERNS:
            weights = Weights(bench, (out, columns), pattern)
            note(f"{shape} {pattern}: {bench.left:.0f} s left")
            for rows in (8, 128) if bench.tiny else ROWS:
                if bench.left <= 0:
                    return
                found = cell(bench, weights, rows, variants(weights, pattern, bench.device))
                yield {"shape": shape, "out": out, "in": columns, "pattern": pattern, **found}
            del weights
            bench.free()
