# SPDX-License-Identifier: Apache-2.0
"""A layer that holds another form than the canonical one is the same layer; the forms' CPU references stand in."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import random_model, zero_weights
from torch import nn

import mosaic_kernels as mk
from mosaic_kernels import arrangement
from mosaic_kernels.checkpoint.writer import pack_model
from mosaic_kernels.errors import FormatError
from mosaic_kernels.models import ModelAdapter
from mosaic_kernels.semistructured import TwoOfFour
from mosaic_kernels.tiles import TileBitmap


@pytest.fixture(autouse=True)
def every_device_takes_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrangement, "takes_tiles", lambda device: True)


def dense(out: int = 70, columns: int = 72, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(out)
    linear = nn.Linear(columns, out).to(dtype).requires_grad_(False)
    linear.weight[torch.rand(out, columns) < 0.5] = 0
    return linear


def canonical(linear: nn.Linear) -> dict[str, torch.Tensor]:
    packed = mk.pack(linear.weight)
    return {"weight": packed.values, "bitmask": packed.bitmask, "bias": linear.bias}


def assert_state(layer: mk.MosaicLinear, linear: nn.Linear) -> None:
    state, wanted = layer.state_dict(), canonical(linear)
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("shape", [(70, 72), (1, 1), (64, 64), (130, 20)])
def test_it_is_the_same_layer(shape: tuple[int, int]) -> None:
    linear = dense(*shape)
    layer = mk.MosaicLinear.from_linear(linear)
    assert layer.arranged is not None
    assert isinstance(layer.arranged, TileBitmap)
    assert layer.weight.data_ptr() == layer.arranged.tiles.data_ptr()  # held once
    x = torch.randn(3, 2, shape[1]).bfloat16()
    assert torch.equal(layer(x), linear(x))
    assert layer.nnz == int((linear.weight != 0).sum())
    assert f"density={layer.density:.3f}" in repr(layer)
    assert_state(layer, linear)
    assert torch.equal(layer.to_dense().weight, linear.weight)


def test_2_of_4_weights_have_a_form_of_their_own() -> None:
    linear = dense()
    linear.weight.copy_(torch.randn(70, 72))
    linear.weight.view(70, 18, 4)[..., 1:3] = 0
    layer = mk.MosaicLinear.from_linear(linear)
    assert isinstance(layer.arranged, TwoOfFour)
    assert layer.weight.dtype is torch.bfloat16  # what a model is asked for its dtype
    x = torch.randn(5, 72).bfloat16()
    assert torch.equal(layer(x), linear(x))
    assert layer.nnz == 70 * 36
    assert_state(layer, linear)
    assert_state(copy.deepcopy(layer), linear)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.ones(5, 70).bfloat16() @ linear.weight)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x.detach()), linear(x.detach()))
    layer.float()
    assert layer.arranged is None
    assert_state(layer, linear.float())


def test_other_layers_stay_canonical() -> None:
    assert mk.MosaicLinear.from_linear(dense(dtype=torch.float32)).arranged is None
    assert mk.MosaicLinear.from_linear(dense(), weights="int8").arranged is None
    empty = mk.pack(torch.zeros(0, 5).bfloat16())
    assert arrangement.arrange(empty) is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(copied: object) -> None:
    linear = dense()
    layer = mk.MosaicLinear.from_linear(linear)
    twin = copied(layer)  # type: ignore[operator]
    assert twin.arranged is not None
    assert twin.weight.data_ptr() != layer.weight.data_ptr()
    x = torch.randn(2, 72).bfloat16()
    assert torch.equal(twin(x), layer(x))
    assert_state(twin, linear)


def test_casts() -> None:
    linear = dense()
    layer = mk.MosaicLinear.from_linear(linear)
    x = torch.randn(2, 72)
    layer.half()
    assert layer.arranged is not None
    assert torch.equal(layer(x.half()), linear.half()(x.half()))
    layer.float()
    assert layer.arranged is None
    assert torch.allclose(layer(x), linear.float()(x), atol=1e-5)
    layer.bfloat16()
    assert layer.arranged is not None


def test_a_state_dict_loads() -> None:
    first, second = dense(), dense()
    second.weight[:, ::3] = 0
    layer = mk.MosaicLinear.from_linear(first)
    layer.load_state_dict(mk.MosaicLinear.from_linear(second).state_dict())
    assert layer.arranged is not None
    assert_state(layer, second)
    x = torch.randn(4, 72).bfloat16()
    assert torch.equal(layer(x), second(x))


def test_a_replaced_parameter_counts_as_canonical() -> None:
    """Libraries that move weights in for one forward pass put canonical parameters in place."""
    first, second = dense(), dense()
    second.weight.neg_()
    layer = mk.MosaicLinear.from_linear(first)
    for name, tensor in canonical(second).items():
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
    assert layer.arranged is None
    x = torch.randn(4, 72).bfloat16()
    assert torch.allclose(layer(x), second(x), atol=0.05)


def test_gradients_and_compilation() -> None:
    linear = dense()
    layer = mk.MosaicLinear.from_linear(linear)
    x = torch.randn(3, 72).bfloat16().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, (torch.ones(3, 70).bfloat16() @ linear.weight))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x.detach()), linear(x.detach()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_dense_weight_is_kept_for_many_rows(dtype: torch.dtype) -> None:
    linear = dense(dtype=dtype)
    layer = mk.MosaicLinear.from_linear(linear)
    layer.keep_dense_for_prefill()
    many, few = torch.randn(65, 72).to(dtype), torch.randn(64, 72).to(dtype)
    assert torch.equal(layer(many), linear(many))
    assert "_dense" not in layer.state_dict()
    layer.half()
    assert torch.equal(layer(many.half()), linear.half()(many.half()))
    other = dense(dtype=torch.half)
    other.weight[:, :9] = 0
    layer.load_state_dict(mk.MosaicLinear.from_linear(other).state_dict())
    assert torch.equal(layer(many.half()), other(many.half()))
    layer.keep_dense_for_prefill(False)
    assert torch.allclose(layer(few.half()), other(few.half()), atol=1e-2)


def test_wrong_features_are_refused() -> None:
    layer = mk.MosaicLinear.from_linear(dense())
    with pytest.raises((mk.errors.KernelError, RuntimeError)):
        layer(torch.randn(2, 71).bfloat16())


def test_a_damaged_state_dict_is_refused() -> None:
    layer = mk.MosaicLinear.from_linear(dense())
    state = layer.state_dict()
    state["weight"] = state["weight"][:-1]
    with pytest.raises((FormatError, RuntimeError), match="values are stored"):
        layer.load_state_dict(state)


def packed_model() -> Any:
    adapter = ModelAdapter.of(random_model(dtype=torch.bfloat16))
    zero_weights(adapter, 0.5)
    pack_model(adapter)
    return adapter.model


def test_a_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model = packed_model()
    for module in model.modules():
        if isinstance(module, mk.MosaicLinear):
            module.arrange()
            assert module.arranged is not None
    ids = torch.arange(6)[None]
    wanted = model(ids).logits
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = packed_model()
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.allclose(other(ids).logits, wanted, atol=0.05)
