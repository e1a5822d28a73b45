# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import mosaic_kernels as mk
from mosaic_kernels.errors import FormatError, KernelError, UsageError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (in_features, out_features): one weight, whole words, one bit over a byte and a word, a row of bytes
SHAPES = [(1, 1), (64, 32), (33, 9), (40, 7)]


def _dense(shape: tuple[int, int], density: float, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(*shape, bias=bias, dtype=dtype).requires_grad_(False)
    layer.weight[torch.rand_like(layer.weight, dtype=torch.float32) >= density] = 0
    return layer


def _error(layer: nn.Linear, dense: nn.Linear, x: torch.Tensor) -> float:
    """Relative Frobenius error against float64."""
    bias = None if dense.bias is None else dense.bias.double()
    expected = nn.functional.linear(x.double(), dense.weight.double(), bias)
    return float((layer(x).double() - expected).norm() / expected.norm().clamp_min(1e-30))


def _bound(dtype: torch.dtype, features: int) -> float:
    # one rounding of the output, and an fp32 sum whose error grows with the square root of its terms
    return torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps * features**0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_computes_what_the_dense_layer_does(
    cpu_level: str, shape: tuple[int, int], density: float, dtype: torch.dtype, bias: bool
) -> None:
    dense = _dense(shape, density, dtype, bias)
    layer = mk.MosaicLinear.from_linear(dense)
    for rows in ((), (1,), (2, 3)):
        x = torch.randn(*rows, shape[0], dtype=dtype)
        assert layer(x).shape == (*rows, shape[1])
        assert layer(x).dtype == dtype
        assert _error(layer, dense, x) <= _bound(dtype, shape[0])
    assert layer(torch.empty(0, shape[0], dtype=dtype)).shape == (0, shape[1])


def test_looks_like_the_linear_layer_it_replaces() -> None:
    dense = _dense((64, 32), 0.5).eval()
    layer = mk.MosaicLinear.from_linear(dense)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.training) == (64, 32, False)
    assert set(layer.state_dict()) == {"weight", "bitmask", "bias"}
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert layer.nnz == int(dense.weight.count_nonzero()) == round(layer.density * 64 * 32)
    assert f"density={layer.density:.3f}" in repr(layer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_back_to_dense_is_exact(dtype: torch.dtype) -> None:
    dense = _dense((33, 9), 0.5, dtype)
    again = mk.MosaicLinear.from_linear(dense).to_dense()
    assert torch.equal(again.weight, dense.weight)
    assert torch.equal(again.bias, dense.bias)


def test_gradient_reaches_the_input() -> None:
    dense = _dense((40, 7), 0.5, torch.float32)
    layer = mk.MosaicLinear.from_linear(dense)
    x = torch.randn(3, 40, requires_grad=True)
    upstream = torch.randn(3, 7)
    layer(x).backward(upstream)
    expected = upstream.double() @ dense.weight.double()
    assert x.grad is not None
    assert float((x.grad.double() - expected).norm() / expected.norm()) <= _bound(torch.float32, 7)


def test_packed_values_do_not_train() -> None:
    layer = mk.MosaicLinear.from_linear(_dense((40, 7), 0.5)).requires_grad_(False)
    layer.weight.requires_grad_(True)
    with pytest.raises(KernelError, match="differentiable in its activations only"):
        layer(torch.randn(3, 40, requires_grad=True))


def test_wrong_features_are_named() -> None:
    with pytest.raises(KernelError, match="8 features but this projection takes 40"):
        mk.MosaicLinear.from_linear(_dense((40, 7), 0.5))(torch.randn(3, 8))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_copies_are_independent_and_equal(way: str) -> None:
    dense = _dense((40, 7), 0.5)
    layer = mk.MosaicLinear.from_linear(dense)
    x = torch.randn(3, 40)
    expected = layer(x)
    other: Any
    if way == "deepcopy":
        other = copy.deepcopy(layer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:  # into a layer with another pattern and another number of weights
        other = mk.MosaicLinear.from_linear(_dense((40, 7), 0.2))
        other(x)
        other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(other(x), expected)


def test_state_dict_of_another_shape_is_refused() -> None:
    layer = mk.MosaicLinear.from_linear(_dense((40, 7), 0.5))
    with pytest.raises(RuntimeError, match="bitmask"):
        layer.load_state_dict(mk.MosaicLinear.from_linear(_dense((40, 8), 0.5)).state_dict())


def test_state_dict_that_contradicts_itself_is_refused() -> None:
    layer = mk.MosaicLinear.from_linear(_dense((40, 7), 0.5))
    state = layer.state_dict()
    state["weight"] = state["weight"][:-1].clone()
    with pytest.raises(RuntimeError, match="bitmask counts"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_casts_keep_bits_and_pattern(dtype: torch.dtype) -> None:
    dense = _dense((40, 7), 0.5)
    layer = mk.MosaicLinear.from_linear(dense).to(dtype)
    assert (layer.weight.dtype, layer.bias.dtype, layer.bitmask.dtype) == (dtype, dtype, torch.uint8)
    x = torch.randn(3, 40, dtype=dtype)
    assert _error(layer, dense.to(dtype), x) <= _bound(dtype, 40)


def test_parameters_that_were_replaced_are_checked() -> None:
    layer = mk.MosaicLinear.from_linear(_dense((40, 7), 0.5))
    layer.bitmask = nn.Parameter(torch.zeros_like(layer.bitmask), requires_grad=False)
    with pytest.raises(FormatError, match="bitmask counts 0"):
        layer(torch.randn(40))


def test_meta_and_back() -> None:
    layer = mk.MosaicLinear(40, 7, nnz=100, device="meta")
    layer.to(torch.bfloat16)
    filled = layer.to_empty(device="cpu")
    source = mk.MosaicLinear.from_linear(_dense((40, 7), 0.5, torch.bfloat16))
    filled.load_state_dict(source.state_dict())
    x = torch.randn(3, 40, dtype=torch.bfloat16)
    assert torch.equal(filled(x), source(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_whole(backend: str) -> None:
    model = mk.MosaicLinear.from_linear(_dense((64, 32), 0.5))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x = torch.randn(3, 64, requires_grad=True)
    expected = model(x)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    out = compiled(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert float((out - expected).detach().norm() / expected.detach().norm()) <= _bound(torch.float32, 64)
    assert float((gradient - wanted).norm() / wanted.norm()) <= _bound(torch.float32, 64)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_moves_between_devices(dtype: torch.dtype) -> None:
    dense = _dense((128, 48), 0.5, dtype)
    layer = mk.MosaicLinear.from_linear(dense).cuda()
    x = torch.randn(3, 128, dtype=dtype)
    assert layer(x.cuda()).is_cuda
    assert _error(layer, dense.cuda(), x.cuda()) <= _bound(dtype, 128)
    back = layer.cpu()
    assert _error(back, dense.cpu(), x) <= _bound(dtype, 128)


@pytest.mark.cuda
def test_runs_in_a_cuda_graph() -> None:
    layer = mk.MosaicLinear.from_linear(_dense((128, 48), 0.5, torch.bfloat16)).cuda()
    x = torch.randn(1, 128, dtype=torch.bfloat16, device="cuda")
    layer(x)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = layer(x)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(out, layer(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.func's own
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # the same since torch 2.14
@pytest.mark.parametrize("weights", ["float", "int8", "int8-group"])
def test_forward_mode_derivatives_are_the_dense_layers(weights: Any) -> None:
    layer = mk.MosaicLinear.from_linear(_dense((40, 7), 0.5), weights=weights)
    dense, x, direction = layer.to_dense(), torch.randn(3, 40), torch.randn(3, 40)
    for run in (layer, lambda x: mk.sparse_linear(x, layer.packed, layer.bias)):
        found, tangent = torch.func.jvp(run, (x,), (direction,))
        wanted, wanted_tangent = torch.func.jvp(dense, (x,), (direction,))
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(tangent, wanted_tangent)
        # and backward through it: what a Hessian's product with a vector is made of
        point = x.clone().requires_grad_()
        product = torch.func.jvp(lambda x, run=run: run(x).square().sum(), (point,), (direction,))[1]
        expected = torch.func.jvp(lambda x: dense(x).square().sum(), (point,), (direction,))[1]
        torch.testing.assert_close(torch.autograd.grad(product, point)[0], torch.autograd.grad(expected, point)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.func's own
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # the same since torch 2.14
def test_other_forward_mode_derivatives_are_refused() -> None:
    layer = mk.MosaicLinear.from_linear(_dense((40, 7), 0.5))
    with pytest.raises(KernelError, match="one forward-mode derivative"):
        torch.func.jacfwd(torch.func.jacfwd(lambda x: layer(x).tanh().sum()))(torch.randn(40))
    with torch.autograd.forward_ad.dual_level():
        bias = torch.autograd.forward_ad.make_dual(torch.ones(7), torch.ones(7))
        with pytest.raises(KernelError, match="one forward-mode derivative"):
            mk.sparse_linear(torch.ones(2, 40), layer.packed, bias)


@pytest.mark.parametrize("columns", [64, 72])
def test_another_pattern_of_as_many_weights_is_read_right(columns: int) -> None:
    kept = torch.zeros(32 * columns, dtype=torch.bool)
    kept[:1000] = True
    one, other = (_dense((columns, 32), 1.0) for _ in range(2))
    for dense in (one, other):
        dense.weight *= kept[torch.randperm(kept.numel())].view_as(dense.weight)
    layer, x = mk.MosaicLinear.from_linear(one), torch.randn(1, columns)
    layer(x)  # from now on its calls are prepared
    layer.load_state_dict(mk.MosaicLinear.from_linear(other).state_dict())
    torch.testing.assert_close(layer(x), other(x))


def test_unknown_kinds_of_values_are_refused() -> None:
    with pytest.raises(UsageError, match="weights must be one of float, int8, int8-group, got 'int4'"):
        mk.MosaicLinear.from_linear(_dense((8, 8), 0.5), weights="int4")  # type: ignore[arg-type]
