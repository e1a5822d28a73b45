# SPDX-License-Identifier: Apache-2.0
"""The device's own ceilings: instructions and memory (``micro.cu``), and how near cuBLAS comes to it at one row."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from measure import ROTATED_BYTES

from gpu.bench import Bench, Row
from gpu.kernels import SHAPES
from gpu.timing import Chain, copies, in_turns, microseconds, passes

SOURCE = Path(__file__).parent / "micro.cu"
DENSE = ("llama2-7b-query", "llama2-7b-up", "llama2-7b-down", "llama2-70b-up")


def rates(device: torch.device) -> Row:
    """What ``micro.cu`` prints, compiled for this device; or why it did not run."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None or device.type != "cuda":
        return {"kind": "rates", "skipped": "no nvcc" if nvcc is None else "no CUDA device"}
    major, minor = torch.cuda.get_device_capability(device)
    with TemporaryDirectory() as folder:
        program = Path(folder) / "micro"
        command = [nvcc, "-std=c++17", "-O3", f"-arch=sm_{major}{minor}", str(SOURCE), "-o", str(program)]
        for step in (command, [str(program)]):
            done = subprocess.run(step, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode:
                return {"kind": "rates", "skipped": f"{Path(step[0]).name}: {done.stderr[-2000:]}"}
    return {"kind": "rates", **json.loads(done.stdout)}


@torch.no_grad()
def measure(bench: Bench) -> Iterator[Row]:
    """One row of rates, then one for each dense shape: cuBLAS with one row of x."""
    yield rates(bench.device)
    torch.manual_seed(0)
    for name in DENSE:
        out, columns = (48, 64) if bench.tiny else SHAPES[name]
        weight = torch.randn(out, columns, dtype=torch.bfloat16, device=bench.device)
        count = copies(weight.nbytes, 1 << 14 if bench.tiny else ROTATED_BYTES)
        weights = [weight, *(weight.clone() for _ in range(count - 1))]
        x = torch.randn(1, columns, dtype=torch.bfloat16, device=bench.device)
        calls = [partial(F.linear, x, each) for each in weights] * passes(count * weight.nbytes / 4e12)
        chain = Chain(calls, bench.device)
        found = microseconds(in_turns({"dense": chain}, 3 if bench.tiny else 20)["dense"])
        speed = weight.nbytes / found["median_us"] / 1e3
        yield {"kind": "dense", "shape": name, "out": out, "in": columns, **found, "gigabytes_per_s": speed,
               "not_captured": chain.why_not_captured}  # fmt: skip
        del weights, weight, calls, chain
        bench.free()
