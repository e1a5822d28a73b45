# SPDX-License-Identifier: Apache-2.0
"""One linear layer: ``MosaicLinear`` against cuBLAS on the same weight, and torch's own 2:4 where it applies.

A figure is the time of one product in a captured chain of products, each with the next of several copies of the weight,
which together hold more than the L2. Gigabytes are those of the weight as the layer holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measure import ROTATED_BYTES
from torch import Tensor, nn

import mosaic_kernels as mk
from gpu.bench import Bench, Row, note, reason
from gpu.timing import Chain, copies, in_turns, microseconds, passes
from mosaic_kernels import ops
from mosaic_kernels.ops.select import backends

# (out_features, in_features), the most telling first: what time does not allow is left out from the end.
SHAPES = {
    "llama2-7b-up": (11008, 4096),
    "llama2-7b-down": (4096, 11008),
    "llama3-8b-up": (14336, 4096),
    "llama2-70b-query": (8192, 8192),
    "llama2-7b-query": (4096, 4096),
    "llama2-70b-up": (28672, 8192),
    "llama3-8b-key": (1024, 4096),
}
ROWS = (1, 8, 16, 32, 64, 128, 256, 1024, 2048, 4096)
KEPT = {"50%": 0.5, "60%": 0.4, "70%": 0.3}  # removed -> kept
PATTERNS = (*KEPT, "2:4")
TRITON_ROWS = (1, 16)  # of the first shape at 50 %: compiling costs seconds
ROUNDS = 15

Variant = Callable[[Tensor, int], Tensor]


def random_weight(shape: tuple[int, int], pattern: str, device: torch.device) -> Tensor:
    """bf16 with as many zeros as the pattern says, at random places."""
    weight = torch.randn(shape, dtype=torch.bfloat16, device=device) * shape[1] ** -0.5
    if pattern == "2:4":
        groups = weight.view(-1, 4)
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.abs().topk(2).indices, True)
        return (groups * kept).view(shape)
    return weight * (torch.rand(shape, device=device) < KEPT[pattern])


def linear(weight: Tensor) -> nn.Linear:
    """A layer without bias around ``weight``."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


class Weights:
    """Copies of one weight in every form that is compared.

    Attributes:
        bytes: of a packed copy, as its device reads it.
        errors: of variants that could not be made.
        not_captured: of variants that failed to become a graph once, and are not tried again.
    """

    def __init__(self, bench: Bench, shape: tuple[int, int], pattern: str, *, with_triton: bool = False) -> None:
        rotated = 1 << 16 if bench.tiny else ROTATED_BYTES
        weight = random_weight(shape, pattern, bench.device)
        layer = linear(weight)
        self.dense = [weight, *(weight.clone() for _ in range(copies(weight.nbytes, rotated) - 1))]
        first = mk.MosaicLinear.from_linear(layer)
        self.bytes, self.density = sum(parameter.nbytes for parameter in first.parameters()), first.density
        count = copies(self.bytes, rotated)
        self.layers = [first, *(mk.MosaicLinear.from_linear(layer) for _ in range(count - 1))]
        # what Triton reads is the canonical form, which a layer around a packed weight keeps
        self.triton = [mk.MosaicLinear.from_packed(mk.pack(weight)) for _ in range(count if with_triton else 0)]
        self.torch_semi: list[Tensor] = []
        self.errors: dict[str, str] = {}
        self.not_captured: dict[str, str] = {}
        if pattern == "2:4" and bench.device.type == "cuda":
            try:
                self.torch_semi = [torch.sparse.to_sparse_semi_structured(each) for each in self.dense]
            except (RuntimeError, ValueError) as error:
                self.errors["torch 2:4"] = reason(error)

    def variants(self, rows: int) -> dict[str, tuple[Variant, int]]:
        """What takes ``x`` and the number of a call, and how many copies it goes through."""

        def triton(x: Tensor, i: int) -> Tensor:
            with ops.use_backend("triton"):
                return self.triton[i % len(self.triton)](x)

        found: dict[str, tuple[Variant, int]] = {
            "dense": (lambda x, i: F.linear(x, self.dense[i % len(self.dense)]), len(self.dense)),
            "mosaic": (lambda x, i: self.layers[i % len(self.layers)](x), len(self.layers)),
        }
        if self.torch_semi:
            semi = self.torch_semi
            found["torch 2:4"] = (lambda x, i: F.linear(x, semi[i % len(semi)]), len(semi))
        if self.triton and rows in TRITON_ROWS:
            found["triton"] = (triton, len(self.triton))
        return found


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Frobenius; NaN where anything is."""
    return float((found.float() - exact).norm() / exact.norm())


def _tried(run: Variant, x: Tensor, exact: Tensor) -> tuple[float, bool]:
    """The error of a call whose output lies where NaN were before, and whether a second one gives the same bits."""
    poison = torch.full_like(exact, float("nan"), dtype=x.dtype)
    del poison  # the allocator hands this memory out again
    first = run(x, 0)
    return relative_error(first, exact), torch.equal(first, run(x, 0))


def cell(bench: Bench, weights: Weights, rows: int, variants: dict[str, tuple[Variant, int]]) -> Row:
    """Check and time ``variants``, ``dense`` among them, at one number of rows of x."""
    out, columns = weights.dense[0].shape
    x = torch.randn(rows, columns, dtype=torch.bfloat16, device=bench.device)
    exact = x.float() @ weights.dense[0].float().T
    chains: dict[str, Chain] = {}
    checked: dict[str, Any] = {
        "relative_error": {}, "deterministic": {}, "errors": dict(weights.errors), "not_captured": {}
    }  # fmt: skip
    product = max(weights.dense[0].nbytes / 4e12, 2 * rows * out * columns / 7e14)  # seconds on an H200, about
    for name, (run, count) in variants.items():
        try:
            error, same = _tried(run, x, exact)
            checked["relative_error"][name], checked["deterministic"][name] = error, same
            if not error <= torch.finfo(x.dtype).eps:
                raise ArithmeticError(f"wrong result: relative error {error:.3g}")
            calls = [partial(run, x, i) for i in range(count * passes(product * count))]
            chains[name] = Chain(calls, bench.device, weights.not_captured.get(name))
        except Exception as error:  # a variant that cannot run must not take the others' figures along
            checked["errors"][name] = reason(error)
            if name == "dense":
                raise
            continue
        why_not = chains[name].why_not_captured
        if why_not is not None and bench.device.type == "cuda":
            checked["not_captured"][name] = weights.not_captured[name] = why_not
    seconds = in_turns(chains, 2 if bench.tiny else ROUNDS)
    figures = {name: microseconds(values) for name, values in seconds.items()}
    sizes = {name: weights.dense[0].nbytes if name == "dense" else weights.bytes for name in figures}
    return {
        "rows": rows,
        "figures": figures,
        "speed_up": {name: figures["dense"]["median_us"] / each["median_us"] for name, each in figures.items()},
        "gigabytes_per_s": {name: sizes[name] / each["median_us"] / 1e3 for name, each in figures.items()},
        **checked,
    }


@torch.no_grad()
def measure(bench: Bench) -> Iterator[Row]:
    """A row for every shape, pattern and number of rows of x."""
    torch.manual_seed(0)
    shapes = {"tiny": (192, 136)} if bench.tiny else SHAPES
    triton_runs = bench.device.type == "cuda" and backends()["triton"].why_not() is None
    for shape, (out, columns) in shapes.items():
        for pattern in PATTERNS:
            few = triton_runs and pattern == "50%" and shape == next(iter(shapes))
            weights = Weights(bench, (out, columns), pattern, with_triton=few)
            note(f"{shape} {pattern}: {len(weights.layers)} copies, {bench.left:.0f} s left")
            for rows in (1, 8, 64, 128) if bench.tiny else ROWS:
                if bench.left <= 0:
                    return
                found = cell(bench, weights, rows, weights.variants(rows))
                yield {
                    "shape": shape, "out": out, "in": columns, "pattern": pattern, "density": weights.density,
                    "bytes": weights.bytes, "dense_bytes": weights.dense[0].nbytes, **found,
                }  # fmt: skip
            del weights
            bench.free()
