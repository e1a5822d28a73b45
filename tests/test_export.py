# SPDX-License-Identifier: Apache-2.0
"""Graphs of packed layers and models: ``torch.export``, traces, and ONNX, which knows no packed weights."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import composite, load, logits, prompt, save
from torch import nn

import mosaic_kernels as mk
from mosaic_kernels.config import Weights
from mosaic_kernels.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's exporters


def made(weights: Weights) -> mk.MosaicLinear:
    dense = nn.Linear(70, 9).requires_grad_(False)
    dense.weight[torch.rand(9, 70) < 0.5] = 0
    return mk.MosaicLinear.from_linear(dense, weights=weights)


def loaded(weights: Weights) -> mk.MosaicLinear:
    source, layer = made(weights), mk.MosaicLinear(70, 9, nnz=1, weights=weights)
    layer.load_state_dict(source.state_dict())
    return layer


def names(program: Any) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("make", [made, loaded])
@pytest.mark.parametrize("weights", ["float", "int8"])
def test_a_layer_is_one_operator(weights: Weights, make: Any, strict: bool) -> None:
    layer, x = make(weights), torch.randn(3, 70)
    model = nn.Sequential(layer, nn.ReLU())
    batch = torch.export.Dim("batch", max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    operator = "mosaic.sparse_linear.default" if weights == "float" else "mosaic.sparse_linear_int8.default"
    assert names(program) == [operator, "aten.relu.default"]  # and no index is built inside
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for each in (program, torch.export.load(file)):
        for rows in (3, 5):
            x = torch.randn(rows, 70)
            assert torch.equal(each.module()(x), model(x))


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return found


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_whole_model(tmp_path: Path, strict: bool) -> None:
    model = mk.prepare_inference(load(save(composite(), tmp_path)))
    program = torch.export.export(Logits(model), (prompt(),), strict=strict)
    assert names(program).count("mosaic.sparse_linear.default") > 3
    torch.testing.assert_close(program.module()(prompt()), logits(model))


def test_traces_work() -> None:
    layer, x = made("float"), torch.randn(3, 70)
    traced = torch.jit.trace(layer, (x,), check_trace=False)
    assert torch.equal(traced(x + 1), layer(x + 1))


def test_onnx_says_why_not() -> None:
    with pytest.raises(UsageError, match=r"ONNX has no packed weights: call model\.dequantize\(\)"):
        torch.onnx.export(made("float"), (torch.randn(3, 70),), io.BytesIO(), dynamo=False)
