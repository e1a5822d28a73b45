# SPDX-License-Identifier: Apache-2.0
"""``python -m mosaic_kernels.ops.triton``: measure the kernels' sizes on this GPU and keep the fastest."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack

import torch
import triton
from torch import Tensor
from triton import testing

from mosaic_kernels.format import RowIndex
from mosaic_kernels.ops import triton as backend
from mosaic_kernels.ops.triton.configs import DEFAULTS, Config, candidates, record, trying

OUT, IN, DENSITY = 4096, 11008, 0.5  # a down projection of a 7B model

# The path that an operation's sizes matter to, whatever the limits between the paths are.
_PATHS = {"register": {"most_in_registers": {"ROWS": 16}}, "tiles": {"most_in_registers": {"ROWS": 0}}}

Call = Callable[[], object]


def calls(op: str) -> list[Call]:
    """What takes the time that ``op`` decides, on random bf16 weights (fp32 in ``obs_block``)."""
    keep = torch.rand(OUT, IN, device="cuda") < DENSITY
    if op == "obs_block":
        weight, mask, factor = torch.randn(OUT, 128, device="cuda"), keep[:, :128], torch.eye(128, device="cuda")
        return [lambda: backend.KERNELS["obs_block"](weight, factor, mask, 0, 0)]
    size = op.rpartition("_")[2]
    rows = {"registers": (1, 2, 4, 8, 16), "tiles": (64, 128, 256, 512, 1024)}.get(size) or (int(size),)
    values, bits = backend.KERNELS["pack"](torch.randn(OUT, IN, device="cuda").bfloat16(), keep)
    index = RowIndex.from_bitmask(bits)

    def product(x: Tensor) -> Call:
        return lambda: backend.KERNELS["sparse_linear"](x, values, index.words, index.offsets, None, IN)

    return [product(torch.randn(n, IN, device="cuda").bfloat16()) for n in rows]


def microseconds(op: str, chosen: Config, timed: list[Call]) -> float | None:
    """The sum of the calls' medians, the L2 cache overwritten before each; ``None`` where the GPU cannot hold it."""
    with ExitStack() as stack:
        for name, sizes in {**_PATHS.get(op.partition("_")[0], {}), op: chosen}.items():
            stack.enter_context(trying(name, sizes))
        try:
            return sum(1e3 * float(testing.do_bench(call, return_mode="median")) for call in timed)
        except triton.runtime.errors.OutOfResources:
            return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mosaic_kernels.ops.triton", description=__doc__)
    parser.add_argument("operations", nargs="*", help=f"of {', '.join(DEFAULTS)} (default: all, the limits last)")
    parser.add_argument("--write", action="store_true", help="keep the fastest sizes in configs.json")
    options = parser.parse_args()
    unknown = set(options.operations) - set(DEFAULTS)
    if unknown:
        parser.error(f"no operation is called {', '.join(sorted(unknown))}")
    if backend.why_not() is not None or not torch.cuda.is_available():
        print(f"needs a GPU: {backend.why_not() or 'torch sees no CUDA device'}", file=sys.stderr)
        return 3
    gpu = torch.cuda.get_device_name()
    for op in options.operations or sorted(DEFAULTS, key=lambda name: name.startswith("most_in")):
        timed = calls(op)
        found = [(time, sizes) for sizes in candidates(op) if (time := microseconds(op, sizes, timed)) is not None]
        best, sizes = min(found, key=lambda pair: pair[0])
        default = dict((str(sizes), time) for time, sizes in found)[str(DEFAULTS[op])]
        print(f"{gpu}: {op}: {sizes} {best:.1f} us (default {default:.1f} us, {len(found)} measured)")
        if options.write:
            versions = {"torch": torch.__version__, "triton": triton.__version__}
            record(gpu, op, {"config": sizes, "microseconds": round(best, 2), "default": round(default, 2), **versions})
    return 0


if __name__ == "__main__":
    sys.exit(main())
