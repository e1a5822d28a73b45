# SPDX-License-Identifier: Apache-2.0
"""The steps of pruning a projection against the same result from plain torch, and those of a whole 7B model.

Steps wait for the device themselves (a packed weight's size is on it), so the clock times them, waits included.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from bench_score import ALPHAS, stock, stock_outliers
from measure import interleaved, summary
from torch import Tensor

import mosaic_kernels as mk
from gpu.bench import Bench, Row, reason
from gpu.timing import waited
from mosaic_kernels import ops
from mosaic_kernels.ops import reference

SHAPES = {"llama2-7b-query": (4096, 4096), "llama2-7b-up": (11008, 4096)}
# Weights of a Llama-2-7B's block and how many blocks there are.
BLOCK = (*((4096, 4096),) * 4, *((11008, 4096),) * 2, (4096, 11008))
BLOCKS = 32

Steps = dict[str, tuple[Callable[[], Any], Callable[[], Any]]]  # operation -> by torch, by ours


def steps(weight: Tensor, norms: Tensor) -> Steps:
    """Every operation that has a kernel of ours, and its equal in plain torch."""
    rows, columns = weight.shape

    def selection(scope: str, width: int, keep: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
        return (
            lambda: stock(weight, norms, width, width // 2, lambda _: None),
            lambda: mk.pack(weight, ops.score_select(weight, norms, keep, scope)),
        )

    kept = weight * (torch.rand_like(weight, dtype=torch.float32) < 0.5)
    packed = mk.pack(kept)
    x = torch.randn(2048, columns, dtype=weight.dtype, device=weight.device)  # one calibration sequence
    block, keep = weight[:, :128].float(), torch.rand(rows, 128, device=weight.device) < 0.5
    spread = torch.randn(128, 256, dtype=torch.float64)
    inverse = torch.linalg.inv(spread @ spread.T / 128 + torch.eye(128))
    factor = torch.linalg.cholesky(inverse, upper=True).float().to(weight.device)
    alphas = ALPHAS["4"]
    return {
        "score + select + pack, matrix": selection("matrix", rows * columns, rows * columns // 2),
        "score + select + pack, row": selection("row", columns, columns // 2),
        "score + select + pack, 2:4": selection("group", 4, (2, 4)),
        "outlier statistics, 4 thresholds": (
            lambda: stock_outliers(weight, norms, alphas),
            lambda: ops.outlier_stats(weight, norms, alphas),
        ),
        "column sums of squares": (lambda: reference.column_square_sums(x), lambda: ops.column_square_sums(x)),
        "OBS sweep of a block": (
            lambda: reference.obs_block(block, factor, keep, 0, 0),
            lambda: ops.obs_block(block, factor, keep),
        ),
        "pack, 50% kept": (lambda: reference.pack(kept), lambda: mk.pack(kept)),
        "unpack, 50% kept": (
            lambda: reference.unpack(packed.values, packed.bitmask, columns),
            lambda: mk.unpack(packed),
        ),
    }


def same(theirs: Any, ours: Any) -> bool:
    """Whether both computed one thing: bits where it is a choice, rounding apart where it is a sum."""
    if isinstance(ours, mk.PackedWeight):
        return torch.equal(theirs[0], ours.values) and torch.equal(theirs[1], ours.bitmask)
    if isinstance(theirs, list):  # outlier counts against the mean in fp32: a score at the edge may change sides
        return all(abs(a - b) <= 2 + a // 1000 for a, b in zip(theirs, ours[1], strict=True))
    first, second = (found[0] if isinstance(found, tuple) else found for found in (theirs, ours))
    return torch.allclose(first.double(), second.double(), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def measure(bench: Bench) -> Iterator[Row]:
    """A row for every operation and shape, and one for ranking and packing all of a 7B model."""
    torch.manual_seed(0)
    yield model_row(bench)
    for name, shape in ({"tiny": (96, 256)} if bench.tiny else SHAPES).items():
        weight = (torch.randn(shape, device=bench.device) * shape[1] ** -0.5).bfloat16()
        norms = torch.rand(shape[1], device=bench.device) + 0.5
        for operation, (theirs, ours) in steps(weight, norms).items():
            if bench.left <= 0:
                return
            row: Row = {"operation": operation, "shape": name, "out": shape[0], "in": shape[1]}
            try:
                equal = same(theirs(), ours())
                runs = {"torch": waited(theirs, bench.device), "ours": waited(ours, bench.device)}
                seconds = interleaved(runs, 2 if bench.tiny else 9)
            except Exception as error:  # one operation that fails must not take the others' figures along
                yield row | {"error": reason(error)}
                continue
            found = {variant: summary(values) for variant, values in seconds.items()}
            speed_up = found["torch"]["median_us"] / found["ours"]["median_us"]
            yield row | {"same_result": equal, "figures": found, "speed_up": speed_up}
        bench.free()


def model_row(bench: Bench) -> Row:
    """Score, select and pack every projection of a 7B model, one after the other, at 50 %."""
    block, blocks = (((96, 256),), 2) if bench.tiny else (BLOCK, BLOCKS)
    weights = [torch.randn(shape, dtype=torch.bfloat16, device=bench.device) for _ in range(blocks) for shape in block]
    norms = {columns: torch.rand(columns, device=bench.device) + 0.5 for columns in {shape[1] for shape in block}}

    def all_of_it() -> None:
        for weight in weights:
            keep = ops.score_select(weight, norms[weight.shape[1]], weight.numel() // 2)
            mk.pack(weight, keep)

    row: Row = {
        "operation": "score + select + pack, 7B model", "projections": len(weights),
        "weights": sum(weight.numel() for weight in weights),
    }  # fmt: skip
    try:
        seconds = interleaved({"ours": waited(all_of_it, bench.device)}, 3)["ours"]
    except Exception as error:
        return row | {"error": reason(error)}
    return row | {"milliseconds": statistics.median(seconds) * 1e3}
