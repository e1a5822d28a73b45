# SPDX-License-Identifier: Apache-2.0
"""How long pruning takes: ``mk.prune`` on a Llama of Llama-2-7B's shapes with random weights, in memory.

Where all 32 blocks would not end in time, a model of fewer blocks is pruned, and the row says of how many its seconds
are; nothing is multiplied up.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from models import LLAMA_7B, random_llama

import mosaic_kernels as mk
from gpu.bench import Bench, Row, note, reason
from gpu.decode import TINY

SAMPLES, SEQLEN = 128, 2048
VARIANTS: dict[str, dict[str, Any]] = {
    "wanda": {"category": "unstructured", "policy": "uniform", "solver": "wanda"},
    "sparsegpt": {"category": "unstructured", "policy": "uniform", "solver": "sparsegpt"},
    "default": {},
}
FIRST_BLOCKS = 1
# Of the time that is left, what a run planned from the seconds of a shorter one may take.
CAUTION = 0.8


def run(bench: Bench, blocks: int, options: dict[str, Any]) -> Row:
    """Prune a model of ``blocks`` blocks at 50 %; seconds of all of it and of its stations."""
    settings, samples, seqlen = (TINY, 8, 16) if bench.tiny else (LLAMA_7B, SAMPLES, SEQLEN)
    torch.manual_seed(0)
    model = random_llama(device=bench.device, **{**settings, "num_hidden_layers": blocks})
    started = time.perf_counter()
    report = mk.prune(
        model, sparsity=0.5, calibration="random", samples=samples, seqlen=seqlen, device=bench.device.type, **options
    )
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    return {
        "seconds": time.perf_counter() - started,
        "stations": report["seconds"],
        "by_kind": report["seconds_by_kind"],
        "removed_difference": report["removed_difference"],
        "tokens": samples * seqlen,
    }


def fitting(blocks: int, seconds: float, whole: int, left: float) -> int:
    """How many blocks to prune next: all, or the largest power of two that should end in the time left."""
    possible = int(blocks * left * CAUTION / seconds)
    if possible >= whole:
        return whole
    return 1 << (possible.bit_length() - 1) if possible else 0


def measure(bench: Bench) -> Iterator[Row]:
    """Every variant on few blocks first, then on as many as its share of the time allows."""
    whole = (TINY if bench.tiny else LLAMA_7B)["num_hidden_layers"]
    few = {"samples": 2, "seqlen": 16}
    note("warming up")
    mk.prune(random_llama(device=bench.device, **TINY), calibration="random", device=bench.device.type, **few)
    for index, (name, options) in enumerate(VARIANTS.items()):
        share = bench.left / (len(VARIANTS) - index)
        started, blocks = time.perf_counter(), FIRST_BLOCKS
        while blocks and bench.left > 0:
            note(f"{name}: {blocks} of {whole} blocks, {bench.left:.0f} s left")
            row: Row = {"variant": name, "blocks": blocks, "of_blocks": whole, "sparsity": 0.5}
            try:
                row |= run(bench, blocks, options)
            except Exception as error:  # one solver that fails must not take the others' figures along
                yield row | {"error": reason(error)}
                break
            yield row
            bench.free()
            left = share - (time.perf_counter() - started)
            more = fitting(blocks, row["seconds"], whole, left)
            blocks = more if more > blocks else 0
