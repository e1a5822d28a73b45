# SPDX-License-Identifier: Apache-2.0
"""Autocast and float64 change the dtypes of packed layers as they do those of ``nn.Linear``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import composite, load, logits, prompt, random_model, save
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mosaic_kernels as mk
from mosaic_kernels.config import Weights
from mosaic_kernels.dense import DenseLinear
from mosaic_kernels.errors import FormatError, UsageError
from mosaic_kernels.tiles import TileBitmap

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS: tuple[Weights, ...] = ("float", "int8", "int8-group")


def made(weights: Weights = "float", dtype: torch.dtype = torch.float32, bias: bool = True) -> mk.MosaicLinear:
    dense = nn.Linear(128, 32, bias=bias, dtype=dtype).requires_grad_(False)
    dense.weight[torch.rand(32, 128) < 0.5] = 0
    return mk.MosaicLinear.from_linear(dense, weights=weights)


def error(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach(), wanted.detach()
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("to", DTYPES[1:], ids=str)
@pytest.mark.parametrize("given", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("weights", KINDS)
def test_dtypes_and_gradients_are_those_of_linear(
    weights: Weights, stored: torch.dtype, given: torch.dtype, to: torch.dtype
) -> None:
    layer = made(weights, stored)
    dense = layer.to_dense(stored)
    # x, weight, bias and result are each rounded once in both
    bound = 8 * max(torch.finfo(each).eps for each in (stored, given, to))
    for _ in range(2):
        x = torch.randn(3, 128).to(given)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=to):
            found, wanted = layer(ours), dense(theirs)
            with torch.no_grad():
                assert layer(x).dtype == wanted.dtype
        found.sum().backward()
        wanted.sum().backward()
        assert found.dtype == wanted.dtype
        assert error(found, wanted) <= bound
        assert ours.grad is not None
        assert theirs.grad is not None
        assert ours.grad.dtype == theirs.grad.dtype
        assert error(ours.grad, theirs.grad) <= bound


def test_a_nested_region_that_is_off() -> None:
    layer, x = made(), torch.randn(2, 128)
    wanted = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert torch.equal(layer(x), wanted)
    assert torch.equal(layer(x), wanted)


def test_the_operator_casts_as_well() -> None:
    layer, x = made(), torch.randn(2, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mk.sparse_linear(x, layer.packed, layer.bias), layer(x))


def test_compiled() -> None:
    layer, x = made(), torch.randn(2, 128)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(compiled(x), layer(x))
    assert torch.equal(compiled(x), layer(x))


@pytest.mark.parametrize("columns", [1.0, 0.0])
def test_tiles(columns: float) -> None:
    """Tile forms through their operators, whose kernels on a CPU are the reference."""
    weight = torch.randn(64, 128).bfloat16()
    tiles = TileBitmap.from_dense(weight * (torch.rand(64, 128) < 0.5))
    x = torch.randn(2, 128)
    with torch.autocast("cpu", dtype=torch.float16):
        found = torch.ops.mosaic.tile_linear(x, tiles.tiles, tiles.offsets, None, *tiles.shape, tiles.largest_step)
    assert found.dtype is torch.float16


def test_dense_layers_of_a_prepared_model() -> None:
    layer = nn.Linear(64, 32).requires_grad_(False)
    wanted = nn.Linear(64, 32)
    for stored in DTYPES:
        layer.to(stored).__class__ = DenseLinear
        wanted.load_state_dict(layer.state_dict())
        wanted.to(stored)
        for given in DTYPES:
            x = torch.randn(2, 64).to(given)
            for to in DTYPES[1:]:
                with torch.no_grad(), torch.autocast("cpu", dtype=to):
                    assert torch.equal(layer(x), wanted(x))


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_whole_models(weights: Weights) -> None:
    packed = mk.prepare_inference(composite(weights=weights).model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert logits(packed).dtype == logits(random_model()).dtype == torch.bfloat16
        loss = packed(input_ids=prompt(), labels=prompt()).loss
    loss.backward()
    assert packed.model.embed_tokens.weight.grad.dtype is torch.float32


def test_a_bias_that_trains() -> None:
    layer = made()
    dense, x = layer.to_dense(), torch.randn(3, 128)
    layer(x)
    for each in (layer, dense):
        each.bias.requires_grad_()
    for _ in range(2):
        layer(x).square().sum().backward()
        dense(x).square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_float64_models_compute_with_plain_torch(weights: Weights, tmp_path: Path) -> None:
    model: Any = load(save(composite(weights=weights), tmp_path))
    wanted = logits(model)
    model = mk.prepare_inference(model).to(torch.float64)
    assert {p.dtype for p in model.parameters()} <= {torch.float64, torch.uint8, torch.int8, torch.float32}
    found = logits(model)
    assert found.dtype is torch.float64
    assert error(found, wanted) <= 1e-4  # fp32 logits of a 3-block model
    assert error(logits(model.to(torch.float32)), wanted) <= 1e-6


def test_dtypes_that_nothing_multiplies_are_held_and_named() -> None:
    layer, x = made(), torch.randn(2, 128)
    layer.to(torch.float8_e4m3fn)
    with pytest.raises(FormatError, match="float8_e4m3fn"):
        layer(x)
    assert layer.to(torch.float32)(x).isfinite().all()


def test_rounding_activations_where_nothing_is_int8_is_refused() -> None:
    model = composite().model
    with pytest.raises(UsageError, match="has none"):
        mk.prepare_inference(model, quantize_activations=True)
    mk.prepare_inference(composite(weights="int8").model, quantize_activations=True)


@pytest.mark.filterwarnings("ignore")  # of transformers and PEFT
def test_a_trainer_in_bf16_with_an_adapter(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import Trainer, TrainingArguments

    base = load(save(composite(), tmp_path / "packed"))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))
    data = [{"input_ids": prompt()[0], "labels": prompt()[0]}] * 8
    options = TrainingArguments(
        str(tmp_path / "out"), bf16=True, use_cpu=True, max_steps=3, learning_rate=0.05, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, options, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


class Copies(TorchDispatchMode):
    """Counts the casts of a tensor of this shape."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += op is torch.ops.aten._to_copy.default and args[0].shape == self.shape
        return op(*args, **(kwargs or {}))


def test_a_layer_with_a_dense_copy_casts_a_prompt_once() -> None:
    layer = made()
    layer.keep_dense_for_prefill()
    x = torch.randn(mk.MosaicLinear.DECODE_ROWS + 1, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16), Copies(x.shape) as copies:
        layer(x)
    assert copies.count == 1
