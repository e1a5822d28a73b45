# SPDX-License-Identifier: Apache-2.0
"""One job in a process of its own, for its peak memory: ``python memory_worker.py JOB DIRECTORY [OUTPUT] DEVICE``.

Prints one JSON line: ``peak_bytes``, of the host's resident memory above what the interpreter held with everything
imported; ``device_bytes``, the peak that CUDA allocated, or null.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers

import mosaic_kernels as mk
from mosaic_kernels.evaluate.latency import latencies, weight_bytes

TOKENS = 8


def resident(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def load(directory: str, device: str) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(directory).to(device)


def main(job: str, directory: str, *rest: str) -> None:
    *output, device = rest
    transformers.LlamaForCausalLM  # noqa: B018  transformers imports a model's code when it is first named
    before = resident("VmRSS")
    # The import's own peak may lie above `before`: forget it.
    Path("/proc/self/clear_refs").write_text("5")
    found = {}
    if job == "prune":
        mk.prune(
            directory, output_dir=output[0], sparsity=0.5, category="unstructured", solver="wanda", policy="uniform",
            calibration="random", samples=8, seqlen=128, device=device,
        )  # fmt: skip
    else:
        model = load(directory, device)
        found["weight_bytes"] = weight_bytes(model)
        for parameter in model.parameters():
            parameter.sum()  # a mapped file is resident where it was read
        if job == "decode":
            latencies([model], prompt_tokens=TOKENS, new_tokens=TOKENS, repeats=1)
    found["peak_bytes"] = resident("VmHWM") - before
    found["device_bytes"] = torch.cuda.max_memory_allocated() if device != "cpu" else None
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
