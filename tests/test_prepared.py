# SPDX-License-Identifier: Apache-2.0
"""A layer's quick call gives the operator's result, and makes way for it where it must."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mosaic_kernels as mk
from mosaic_kernels import _C_cpu, ops
from mosaic_kernels.config import Weights
from mosaic_kernels.errors import BackendError, KernelError
from mosaic_kernels.ops import prepared

KINDS: tuple[Weights, ...] = ("float", "int8", "int8-group")


def made(weights: Weights = "float", dtype: torch.dtype = torch.float32, bias: bool = True) -> mk.MosaicLinear:
    dense = nn.Linear(70, 9, bias=bias).to(dtype).requires_grad_(False)
    dense.weight[torch.rand(9, 70) < 0.5] = 0
    return mk.MosaicLinear.from_linear(dense, weights=weights)


def expected(layer: mk.MosaicLinear, x: Tensor) -> Tensor:
    return mk.sparse_linear(x, layer.packed, layer.bias, quantize_x=layer.quantize_activations)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every prepared call that was asked, whether it gave the result."""
    answers: list[bool] = []
    real = prepared.prepare

    def watched(*arguments: Any) -> Any:
        call = real(*arguments)

        def asked(*inputs: Any) -> Tensor | None:
            found = call(*inputs)
            answers.append(found is not None)
            return found

        return call and asked

    monkeypatch.setattr("mosaic_kernels.linear.prepare", watched)
    return answers


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", KINDS)
def test_gives_what_the_operator_gives(quick: list[bool], weights: Weights, dtype: torch.dtype, bias: bool) -> None:
    layer = made(weights, dtype, bias)
    for shape in ((1, 70), (1, 70), (70,), (2, 3, 70), (0, 70), (5, 70), (1, 70)):
        x = torch.randn(shape).to(dtype)
        assert torch.equal(layer(x), expected(layer, x))
    assert quick == [True] * 6
    strided = torch.randn(70, 4).to(dtype).T
    assert torch.equal(layer(strided), expected(layer, strided))
    assert quick == [True] * 7


CHANGES: dict[str, Callable[[mk.MosaicLinear], object]] = {
    "written to": lambda layer: layer.weight.copy_(torch.ones_like(layer.weight)),
    "moved": lambda layer: setattr(layer.weight, "data", layer.weight.data.clone().zero_()),
    "replaced": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros_like(layer.weight), False)),
    "bias moved": lambda layer: setattr(layer.bias, "data", layer.bias + 1),
    "bias replaced": lambda layer: setattr(layer, "bias", nn.Parameter(layer.bias + 1, False)),
    "bias removed": lambda layer: setattr(layer, "bias", None),
    "loaded": lambda layer: layer.load_state_dict(made().state_dict()),
    "loaded, assigned": lambda layer: layer.load_state_dict(made().state_dict(), assign=True),
    "cast": lambda layer: layer.bfloat16().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_notices_what_changed(change: str) -> None:
    layer, x = made(), torch.randn(2, 70)
    before = layer(x)
    layer(x)
    torch.manual_seed(1)
    with torch.no_grad():
        CHANGES[change](layer)
    for _ in range(2):
        assert torch.equal(layer(x), expected(layer, x))
    assert not torch.equal(layer(x), before)


def test_notices_scales_and_how_activations_are_taken() -> None:
    layer, x = made("int8"), torch.randn(2, 70)
    assert layer.scales is not None
    for change in (
        lambda: setattr(layer.scales, "data", layer.scales * 3),
        lambda: setattr(layer, "quantize_activations", True),
        lambda: setattr(layer, "scales", nn.Parameter(layer.scales * 3, False)),
        lambda: setattr(layer, "quantize_activations", False),
    ):
        before = layer(x)
        layer(x)
        change()
        for _ in range(2):
            assert torch.equal(layer(x), expected(layer, x))
        assert not torch.equal(layer(x), before)


def test_a_bias_may_come_later() -> None:
    layer, x = made(bias=False), torch.randn(2, 70)
    without = layer(x)
    layer(x)
    layer.bias = nn.Parameter(torch.ones(9), requires_grad=False)
    assert torch.allclose(layer(x), without + 1, atol=1e-6)


def test_makes_way_for_whoever_must_see_the_call(quick: list[bool]) -> None:
    layer, x = made(), torch.randn(3, 70)
    wanted = layer(x)
    recorded = x.clone().requires_grad_()
    assert layer(recorded).requires_grad
    with torch.no_grad():
        assert torch.equal(layer(recorded), wanted)
    assert torch.equal(torch.vmap(layer)(x), wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing and forward mode use what torch deprecates
        with torch.autograd.forward_ad.dual_level():
            layer(torch.autograd.forward_ad.make_dual(x, x))
        traced = torch.jit.trace(layer, (x,), check_trace=False)
    assert torch.equal(traced(x + 1), layer(x + 1))
    with ops.use_backend("cuda"), pytest.raises(BackendError):
        layer(x)
    with ops.use_backend("reference"):
        assert torch.allclose(layer(x), wanted, atol=1e-5)
    assert quick.count(True) == 2  # under no_grad, and beside the traced one


def test_compiles_after_it_was_prepared() -> None:
    layer, x = made(), torch.randn(3, 70)
    wanted = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), wanted)
    assert torch.equal(layer(x), wanted)
    assert torch.equal(compiled(x), wanted)


def test_hooks_and_functional_calls_work() -> None:
    layer, x = made(), torch.randn(3, 70)
    wanted = layer(x)
    with layer.register_forward_hook(lambda module, inputs, output: output * 2):
        assert torch.equal(layer(x), wanted * 2)
    with layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,)):
        assert torch.equal(layer(x), layer.forward(x * 2))
    other = {"weight": layer.weight * 2, "bias": layer.bias * 2}
    assert torch.allclose(torch.func.functional_call(layer, other, (x,)), wanted * 2, atol=1e-5)
    assert torch.equal(layer(x), wanted)


def test_weights_that_a_layer_let_go_are_freed() -> None:
    """Offloading replaces parameters by empty ones between the calls, and means their memory."""
    layer, x = made(), torch.randn(3, 70)
    layer(x)
    layer(x)
    values, bias = weakref.ref(layer.weight), weakref.ref(layer.bias)
    layer._parameters["weight"] = layer._parameters["bias"] = None
    gc.collect()
    assert values() is None
    assert bias() is None


def test_copies_prepare_themselves() -> None:
    layer, x = made(), torch.randn(3, 70)
    wanted = layer(x)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        layer.weight.zero_()
    assert torch.equal(other(x), wanted)
    assert torch.equal(other(x), wanted)


def test_wrong_inputs_are_refused_as_before() -> None:
    layer = made()
    layer(torch.randn(3, 70))
    with pytest.raises(KernelError, match="8 features but this projection takes 70"):
        layer(torch.randn(3, 8))
    with pytest.raises(KernelError, match="but the packed values are"):
        layer(torch.randn(3, 70).bfloat16())
    with pytest.raises(IndexError):
        layer(torch.tensor(1.0))


def test_dtypes_may_alternate(quick: list[bool]) -> None:
    layer, x = made("int8", bias=False), torch.randn(2, 70)
    for _ in range(2):
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(layer(x.to(dtype)), expected(layer, x.to(dtype)))
    assert quick == [False] * 3


def test_threads_share_a_layer() -> None:
    layer = made()
    inputs = [torch.randn(1 + i % 3, 70) for i in range(300)]  # shapes that each call remembers for the next
    wanted = [expected(layer, x) for x in inputs]
    with ThreadPoolExecutor(6) as callers:
        assert all(map(torch.equal, callers.map(layer, inputs), wanted))


def test_the_native_call_refuses_values_that_do_not_fit() -> None:
    packed, x, out = mk.pack(torch.eye(3)), torch.randn(1, 3), torch.empty(1, 3)
    index = packed.index()
    addresses = (packed.values.data_ptr(), index.words.data_ptr(), index.offsets.data_ptr(), 0)
    call = _C_cpu.PreparedLinear(*addresses, 3, 3, 2, 0, 0, 0, False)
    with pytest.raises(KernelError, match="offsets end at another number"):
        call.run(x.data_ptr(), out.data_ptr(), 1, 1)


def asked(holders: Any, names: tuple[str, ...], objects: tuple[object, ...], *addresses: int) -> bool:
    return _C_cpu.unchanged(holders, names, objects, b"".join(each.to_bytes(8, "little") for each in addresses))


def test_what_is_unchanged() -> None:
    weight, held = torch.ones(3), {}
    held["weight"] = weight
    for known in (weight, weakref.ref(weight)):
        assert asked(held, ("weight", "bias"), (known, None), weight.data_ptr(), 0)
        assert asked((held, {}), ("weight", "bias"), (known, None), weight.data_ptr(), 0)
        assert not asked(({}, held), ("weight", "bias"), (known, None), 0, 0)
        assert not asked(held, ("weight",), (known,), weight.data_ptr() + 4)
        assert not asked({"weight": weight.clone()}, ("weight",), (known,), 0)
    held["weight"] = None
    assert asked(held, ("weight",), (None,), 0)
    gone = weakref.ref(torch.ones(3))
    gc.collect()
    assert gone() is None
    assert not asked(held, ("weight",), (gone,), 0)  # the None that is there is not the tensor that was
    assert not asked({}, ("weight",), (gone,), 0)
    assert asked((), (), ())


@pytest.mark.parametrize("holders", [({},), ({}, {}, {}), 3, None])
def test_a_question_that_does_not_fit_itself_is_refused(holders: Any) -> None:
    with pytest.raises(KernelError, match="as many"):
        asked(holders, ("a", "b"), (None, None), 0, 0)
    with pytest.raises(KernelError, match="as many"):
        asked({}, ("a", "b"), (None,), 0, 0)
    with pytest.raises(KernelError, match="as many"):
        asked({}, ("a", "b"), (None, None), 0)
    with pytest.raises(KernelError, match="must be a dict"):
        asked((3,), ("a",), (None,), 0)


def test_nothing_has_no_address() -> None:
    assert not asked({}, ("a",), (None,), 8)
    assert not asked({"a": None}, ("a",), (None,), 8)


def test_another_default_device(quick: list[bool]) -> None:
    layer, x = made(), torch.randn(2, 70)
    with torch.device("meta"):
        found = [layer(x) for _ in range(2)]
    assert quick == [True]
    assert all(torch.equal(each, expected(layer, x)) for each in found)
