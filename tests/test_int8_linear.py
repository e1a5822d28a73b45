# SPDX-License-Identifier: Apache-2.0
"""``MosaicLinear`` with int8 values: everything a layer goes through leaves values and scales alone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import mosaic_kernels as mk
from mosaic_kernels.config import Weights
from mosaic_kernels.errors import FormatError, KernelError, NonFiniteError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS: tuple[Weights, ...] = ("int8", "int8-group")
EPS = torch.finfo(torch.float32).eps


def _dense(shape: tuple[int, int] = (100, 7), dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(*shape, bias=bias, dtype=dtype).requires_grad_(False)
    layer.weight[torch.rand_like(layer.weight, dtype=torch.float32) >= 0.5] = 0
    return layer


def _int8(weights: Weights = "int8", **options: Any) -> mk.MosaicLinear:
    return mk.MosaicLinear.from_linear(_dense(**options), weights=weights)


def _require_same_weight(layer: mk.MosaicLinear, other: mk.MosaicLinear) -> None:
    assert layer.weight.dtype == torch.int8
    assert layer.scales is not None
    assert other.scales is not None
    assert layer.scales.dtype == torch.float32
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.scales, other.scales)
    assert torch.equal(layer.bitmask, other.bitmask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_computes_what_its_dense_form_does(cpu_level: str, dtype: torch.dtype, weights: Weights, bias: bool) -> None:
    layer = _int8(weights, dtype=dtype, bias=bias)
    dense = layer.to_dense(torch.float32)
    for leading in ((), (1,), (0,), (2, 3)):
        x = torch.randn(*leading, 100, dtype=dtype)
        out = layer(x)
        assert out.dtype == dtype
        assert out.shape == (*leading, 7)
        wanted = nn.functional.linear(x.double(), dense.weight.double(), dense.bias.double() if bias else None)
        # the weight's own rounding to fp32, an fp32 sum, and one rounding of the output
        size = nn.functional.linear(x.double().abs(), dense.weight.double().abs()).norm() + (2.0 if bias else 0.0)
        assert float((out.double() - wanted).norm()) <= 2 * (torch.finfo(dtype).eps + 10 * EPS) * float(size)


def test_rounded_activations_are_asked_for() -> None:
    layer, x = _int8(), torch.randn(3, 100)
    assert layer.quantize_activations is False
    exact = layer(x)
    assert torch.equal(exact, mk.sparse_linear(x, layer.packed, layer.bias))
    layer.quantize_activations = True
    rounded = layer(x)
    assert torch.equal(rounded, mk.sparse_linear(x, layer.packed, layer.bias, quantize_x=True))
    assert not torch.equal(rounded, exact)
    assert copy.deepcopy(layer).quantize_activations is True


@pytest.mark.parametrize("weights", KINDS)
def test_shows_what_it_is(weights: Weights) -> None:
    layer = _int8(weights)
    assert set(layer.state_dict()) == {"weight", "bitmask", "scales", "bias"}
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert f"weights={weights}" in repr(layer)
    floats = mk.MosaicLinear.from_linear(_dense())
    assert floats.scales is None
    assert set(floats.state_dict()) == {"weight", "bitmask", "bias"}
    assert "weights=" not in repr(floats)


@pytest.mark.parametrize("dtype", DTYPES)
def test_back_to_dense(dtype: torch.dtype) -> None:
    with_bias, without = _int8(dtype=dtype), _int8(dtype=dtype, bias=False)
    exact = mk.unpack(with_bias.packed)
    dense = with_bias.to_dense()
    assert dense.weight.dtype == dense.bias.dtype == dtype
    assert torch.equal(dense.weight, exact.to(dtype))
    assert without.to_dense().weight.dtype == torch.float32  # nothing in the layer says more
    assert with_bias.to_dense(torch.float16).bias.dtype == torch.float16
    floats = mk.MosaicLinear.from_linear(_dense(dtype=dtype))
    assert floats.to_dense(torch.float16).weight.dtype == dtype


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_casts_leave_values_and_scales_alone(weights: Weights, dtype: torch.dtype) -> None:
    layer = _int8(weights)
    method = {torch.float32: nn.Module.float, torch.bfloat16: nn.Module.bfloat16, torch.float16: nn.Module.half}[dtype]
    x = torch.randn(3, 100, dtype=dtype)
    for cast in (method, lambda module: module.to(dtype)):
        model = nn.Sequential(copy.deepcopy(layer))
        cast(model)
        _require_same_weight(model[0], layer)  # type: ignore[arg-type]
        assert model[0].bias.dtype == dtype
        assert torch.equal(model(x), mk.sparse_linear(x, layer.packed, layer.bias.to(dtype)))


def test_a_move_that_fails_leaves_the_scales_as_they_were() -> None:
    layer = _int8()
    before = copy.deepcopy(layer)

    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        raise MemoryError

    with pytest.raises(MemoryError):
        layer._apply(refuse)
    _require_same_weight(layer, before)


@pytest.mark.parametrize("weights", KINDS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict", "assign"])
def test_copies_are_independent_and_equal(way: str, weights: Weights) -> None:
    layer = _int8(weights)
    x = torch.randn(3, 100)
    expected, kept = layer(x), copy.deepcopy(layer)
    other: Any
    if way == "deepcopy":
        other = copy.deepcopy(layer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:  # into a layer with another pattern and another number of weights
        other = _int8(weights)
        other(x)
        state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        other.load_state_dict(state, assign=way == "assign")
    with torch.no_grad():
        layer.weight.zero_()
        assert layer.scales is not None
        layer.scales.zero_()
    assert torch.equal(other(x), expected)
    _require_same_weight(other, kept)


def test_state_dicts_of_another_kind_are_refused() -> None:
    floats, rows, groups = mk.MosaicLinear.from_linear(_dense()), _int8(), _int8("int8-group")
    with pytest.raises(RuntimeError, match=r"weight: values are torch\.float32, and those of this layer torch\.int8"):
        rows.load_state_dict(floats.state_dict())
    with pytest.raises(RuntimeError, match=r"weight: values are torch\.int8, and those of this layer torch\.float32"):
        floats.load_state_dict(rows.state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for scales"):
        rows.load_state_dict(groups.state_dict())
    state = rows.state_dict()
    state["scales"] = -state["scales"]
    with pytest.raises(RuntimeError, match="scales must be finite and not negative"):
        rows.load_state_dict(state)


@pytest.mark.parametrize("weights", KINDS)
def test_meta_and_back(weights: Weights) -> None:
    layer = mk.MosaicLinear(100, 7, nnz=200, device="meta", dtype=torch.bfloat16, weights=weights)
    filled = layer.to(torch.bfloat16).to_empty(device="cpu")
    source = _int8(weights, dtype=torch.bfloat16)
    filled.load_state_dict(source.state_dict())
    _require_same_weight(filled, source)
    x = torch.randn(3, 100, dtype=torch.bfloat16)
    assert torch.equal(filled(x), source(x))


def test_packed_weights_make_layers() -> None:
    packed = mk.quantize(_dense().weight, 64)
    layer = mk.MosaicLinear.from_packed(packed)
    assert layer.packed.weights == "int8-group"
    assert layer.weight.data_ptr() == packed.values.data_ptr()
    assert torch.equal(layer(torch.eye(100)).T, mk.unpack(packed))
    assert packed.scales is not None
    packed.scales[0] = float("nan")
    with pytest.raises(FormatError, match="scales must be finite"):
        mk.MosaicLinear.from_packed(mk.PackedWeight(packed.values, packed.bitmask, packed.shape, packed.scales))


def test_weights_that_cannot_be_rounded() -> None:
    dense = _dense()
    dense.weight[2, 3] = float("inf")
    with pytest.raises(NonFiniteError, match="NaN or Inf"):
        mk.MosaicLinear.from_linear(dense, weights="int8")


@pytest.mark.parametrize("rounded", [False, True])
def test_gradient_reaches_the_input(rounded: bool) -> None:
    layer = _int8("int8-group")
    layer.quantize_activations = rounded
    x, upstream = torch.randn(3, 100, requires_grad=True), torch.randn(3, 7)
    layer(x).backward(upstream)
    wanted = upstream.double() @ mk.unpack(layer.packed).double()
    assert x.grad is not None
    assert float((x.grad.double() - wanted).norm()) <= 2 * EPS * (1 + 7**0.5) * float(wanted.norm())
    assert layer.scales is not None
    layer.scales.requires_grad_(True)
    with pytest.raises(KernelError, match="differentiable in its activations only"):
        layer(x)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole(backend: str) -> None:
    model = _int8("int8-group", shape=(130, 32))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(3, 130, requires_grad=True)
    expected = model(x)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    out = compiled(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    limit = 8 * EPS * 130**0.5
    assert float((out - expected).detach().norm()) <= limit * float(expected.detach().norm())
    assert float((gradient - wanted).norm()) <= limit * float(wanted.norm())


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_moves_between_devices(dtype: torch.dtype) -> None:
    layer = _int8(shape=(128, 48), dtype=dtype)
    before, x = copy.deepcopy(layer), torch.randn(3, 128, dtype=dtype)
    layer.cuda()
    assert layer(x.cuda()).is_cuda
    _require_same_weight(layer.cpu(), before)
