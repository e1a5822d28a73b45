# SPDX-License-Identifier: Apache-2.0
"""One linear layer: the packed kernels against torch's ``F.linear`` on the same dense weight.

    pytest benchmarks/bench_linear.py --benchmark-only --no-regression \
        --benchmark-json=benchmarks/results/linear-CPU.json

Weights rotate past the last cache; dense and packed calls take turns; medians and their ratio are in
``extra_info``. Density is the share of weights kept. Where torch's bf16 products are slower than its fp32 ones, both
are measured, and speeds are over the faster of the two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from measure import ROTATED_BYTES, copies, interleaved, summary
from torch import Tensor

import mosaic_kernels as mk
from mosaic_kernels import siblings
from mosaic_kernels.dense import DenseLinear
from mosaic_kernels.device import has_fast_products

# (out_features, in_features): attention and FFN projections of each model; the example's own shapes last,
# where the cost of a call weighs more than its bytes.
SHAPES = {
    "llama2-7b-query": (4096, 4096),
    "llama2-7b-up": (11008, 4096),
    "llama2-7b-down": (4096, 11008),
    "llama3-8b-key": (1024, 4096),
    "llama3-8b-up": (14336, 4096),
    "llama3-8b-down": (4096, 14336),
    "qwen2.5-1.5b-query": (1536, 1536),
    "qwen2.5-1.5b-key": (256, 1536),
    "qwen2.5-1.5b-up": (8960, 1536),
    "qwen2.5-1.5b-down": (1536, 8960),
    "tinyllama-1.1b-query": (2048, 2048),
    "tinyllama-1.1b-key": (256, 2048),
    "tinyllama-1.1b-up": (5632, 2048),
    "tinyllama-1.1b-down": (2048, 5632),
    "example-up": (704, 256),
    "example-query": (256, 256),
}
FEW = ("llama2-7b-up", "llama2-7b-down", "llama3-8b-key", "tinyllama-1.1b-query")
ROWS = (1, 4, 8, 16, 64, 256)
DENSITIES = (0.5, 0.4, 0.3)


def _rounds(out: int, columns: int, rows: int) -> int:
    """Enough for a median and rough percentiles, in half a second to two."""
    return max(11, min(200, int(1e9 / (out * columns * max(1, rows)))))


def _warm(layers: list[mk.MosaicLinear]) -> None:
    """A layer's first call prepares the others, and where there are many copies, each one's turn comes only once."""
    for layer in layers:
        layer(torch.zeros(1, layer.in_features, dtype=torch.bfloat16))


def _copy(packed: mk.PackedWeight) -> mk.PackedWeight:
    return mk.PackedWeight(packed.values.clone(), packed.bitmask.clone(), packed.shape, packed.scales)


@lru_cache(maxsize=1)
def _weights(out: int, columns: int, density: float) -> tuple[list[Tensor], list[mk.MosaicLinear]]:
    """Copies of a random weight, dense and packed, that hold more than the last cache."""
    weight = torch.randn(out, columns, dtype=torch.bfloat16).mul_(columns**-0.5)
    weight *= torch.rand(out, columns) < density
    packed = mk.pack(weight)
    layers = [mk.MosaicLinear.from_packed(_copy(packed)) for _ in range(copies(packed.nbytes))]
    _warm(layers)
    return [weight.clone() for _ in range(copies(weight.nbytes))], layers


Variant = Callable[[Tensor, int], Tensor]


def _by_torch(dense: list[Tensor]) -> dict[str, Variant]:
    """``F.linear`` in bf16, and also in fp32 if that is faster on this processor."""
    found: dict[str, Variant] = {"dense": lambda x, i: F.linear(x, dense[i % len(dense)])}
    if not has_fast_products(torch.bfloat16):
        wide = [weight.float() for weight in dense[: copies(2 * dense[0].nbytes)]]
        found["dense fp32"] = lambda x, i: F.linear(x.float(), wide[i % len(wide)])
    return found


def _measure(variants: dict[str, Variant], shape: tuple[int, int], rows: int) -> dict[str, Any]:
    """Medians of the variants, which take turns, and the speed of each relative to the faster dense variant."""
    x = torch.randn(rows, shape[1]).bfloat16()
    calls = {name: (lambda i, run=run: run(x, i)) for name, run in variants.items()}
    seconds = interleaved(calls, _rounds(*shape, rows))
    found = {name: summary(values) for name, values in seconds.items()}
    dense = min(figures["median_us"] for name, figures in found.items() if name.startswith("dense"))
    speeds = {name: dense / figures["median_us"] for name, figures in found.items()}
    return {"rows": rows, "shape": list(shape), "figures": found, "speed_up": speeds}


def _check(layer: torch.nn.Module, weight: Tensor, limit: float) -> None:
    """A kernel that computes something else would be fast for nothing."""
    x = torch.randn(3, weight.shape[1]).bfloat16()
    exact = x.double() @ weight.double().T
    assert float((layer(x).double() - exact).norm() / exact.norm()) <= limit


@torch.no_grad()
def _against_dense(benchmark: Any, shape: tuple[int, int], density: float, rows: tuple[int, ...]) -> None:
    dense, layers = _weights(*shape, density)
    _check(layers[0], dense[0], torch.finfo(torch.bfloat16).eps)
    variants = {**_by_torch(dense), "packed": lambda x, i: layers[i % len(layers)](x)}
    cells = benchmark.pedantic(lambda: [_measure(variants, shape, n) for n in rows], rounds=1)
    packed = layers[0].packed
    benchmark.extra_info.update(
        shape=list(shape),
        density=packed.density,
        threads=torch.get_num_threads(),
        dtype="bfloat16",
        cells=cells,
        gigabytes_per_s=packed.nbytes / cells[0]["figures"]["packed"]["median_us"] / 1e3,
        ratios={f"{cell['rows']} rows": cell["speed_up"]["packed"] for cell in cells},
        memory={"bytes over dense": packed.nbytes / dense[0].nbytes},
    )


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(benchmark: Any, shape: str, density: float) -> None:
    _against_dense(benchmark, SHAPES[shape], density, ROWS)


@pytest.mark.parametrize("shape", FEW)
def test_linear_on_one_thread(benchmark: Any, shape: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _against_dense(benchmark, SHAPES[shape], DENSITIES[0], ROWS[:5])
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize("shape", FEW)
def test_int8(benchmark: Any, shape: str) -> None:
    out, columns = SHAPES[shape]
    dense, layers = _weights(out, columns, DENSITIES[0])
    rounded = mk.quantize(layers[0].packed)
    forms = {"int8": rounded, "int8, x rounded": rounded, "int8-group": mk.quantize(layers[0].packed, 64)}
    sets = {"packed": layers}
    for name, packed in forms.items():
        sets[name] = [mk.MosaicLinear.from_packed(_copy(packed)) for _ in range(copies(packed.nbytes))]
        for layer in sets[name]:
            layer.quantize_activations = name == "int8, x rounded"
        _warm(sets[name])
        _check(sets[name][0], dense[0], 0.02)
    variants = {
        **_by_torch(dense),
        **{name: (lambda x, i, held=held: held[i % len(held)](x)) for name, held in sets.items()},
    }
    cells = benchmark.pedantic(lambda: [_measure(variants, (out, columns), n) for n in ROWS[:5]], rounds=1)
    benchmark.extra_info.update(
        shape=[out, columns],
        density=DENSITIES[0],
        cells=cells,
        ratios={
            f"{name}, {cell['rows']} rows": speed
            for cell in cells
            for name, speed in cell["speed_up"].items()
            if not name.startswith("dense")
        },
        memory={f"{name}, bytes over dense": packed.nbytes / dense[0].nbytes for name, packed in forms.items()},
    )


@torch.no_grad()
@pytest.mark.parametrize("shape", FEW)
def test_dense_rows(benchmark: Any, shape: str) -> None:
    """What a model keeps dense: the package's own loop for few rows against ``F.linear``."""
    out, columns = SHAPES[shape]
    dense, _ = _weights(out, columns, DENSITIES[0])
    layers = []
    for weight in dense:
        layer = DenseLinear(columns, out, bias=False, device="meta", dtype=torch.bfloat16)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
        layers.append(layer)
    _check(layers[0], dense[0], torch.finfo(torch.bfloat16).eps)
    variants = {**_by_torch(dense), "DenseLinear": lambda x, i: layers[i % len(layers)](x)}
    rows = (1, 4, 16, 32) if has_fast_products(torch.bfloat16) else (1, 4, 16, 32, 256)
    cells = benchmark.pedantic(lambda: [_measure(variants, (out, columns), n) for n in rows], rounds=1)
    ratios = {f"{cell['rows']} rows": cell["speed_up"]["DenseLinear"] for cell in cells}
    benchmark.extra_info.update(shape=[out, columns], cells=cells, ratios=ratios)


@torch.no_grad()
@pytest.mark.parametrize("density", DENSITIES)
def test_share_of_the_read_bandwidth(benchmark: Any, density: float) -> None:
    """One row of x reads its weight as fast as the machine reads memory at all: torch's ``amax`` over 192 MB."""
    out, columns = SHAPES["llama2-7b-up"]
    _, layers = _weights(out, columns, density)
    x, memory = torch.randn(1, columns).bfloat16(), torch.ones(ROTATED_BYTES // 4)
    variants: dict[str, Callable[[int], object]] = {
        "read": lambda i: memory.amax(),
        "packed": lambda i: layers[i % len(layers)](x),
    }
    seconds = benchmark.pedantic(lambda: interleaved(variants, 60), rounds=1)
    found = {name: summary(values) for name, values in seconds.items()}
    speeds = {
        "read": memory.nbytes / found["read"]["median_us"] / 1e3,
        "packed": layers[0].packed.nbytes / found["packed"]["median_us"] / 1e3,
    }
    share = speeds["packed"] / speeds["read"]
    benchmark.extra_info.update(density=density, gigabytes_per_s=speeds, ratios={"share of read bandwidth": share})


@torch.no_grad()
def test_call(benchmark: Any) -> None:
    """What a call costs beside its product: microseconds for a layer so small that nothing else counts.

    ``joined`` is the share of one layer of three that run in one dispatch.
    """
    weight = torch.randn(32, 64, dtype=torch.bfloat16) * (torch.rand(32, 64) < DENSITIES[0])
    alone, *group = (mk.MosaicLinear.from_packed(mk.pack(weight)) for _ in range(4))
    siblings.join(group)
    dense = torch.nn.Linear(64, 32, bias=False).bfloat16()
    x = torch.randn(1, 64).bfloat16()
    calls: dict[str, Callable[[], object]] = {
        "nn.Linear": lambda: dense(x),
        "alone": lambda: alone(x),
        "joined": lambda: [layer(x) for layer in group],
    }

    def repeated(call: Callable[[], object]) -> Callable[[int], None]:
        def run(_: int) -> None:
            for _ in range(200):
                call()

        return run

    variants = {name: repeated(call) for name, call in calls.items()}
    seconds = benchmark.pedantic(lambda: interleaved(variants, 60), rounds=1)
    found = {name: summary(values)["median_us"] / 200 for name, values in seconds.items()}
    found["joined"] /= len(group)
    ratios = {f"{name} against nn.Linear": found["nn.Linear"] / found[name] for name in ("alone", "joined")}
    benchmark.extra_info.update(microseconds=found, ratios=ratios)
