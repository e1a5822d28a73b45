# SPDX-License-Identifier: Apache-2.0
"""Layers that share an input, dense rows, and what a whole model gains from both."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import random_model, zero_weights
from torch import Tensor, nn

import mosaic_kernels as mk
from mosaic_kernels import compat, ops, siblings
from mosaic_kernels.checkpoint.writer import pack_model
from mosaic_kernels.dense import DenseLinear
from mosaic_kernels.errors import BackendError
from mosaic_kernels.models import ModelAdapter
from mosaic_kernels.ops import cpu


def layers(count: int = 3, dtype: torch.dtype = torch.float32, weights: Any = "float") -> list[mk.MosaicLinear]:
    torch.manual_seed(count)
    made = []
    for out in range(8, 8 + count):
        linear = nn.Linear(40, out).to(dtype).requires_grad_(False)
        linear.weight[torch.rand(out, 40) < 0.5] = 0
        made.append(mk.MosaicLinear.from_linear(linear, weights=weights))
    return made


def alone(layer: mk.MosaicLinear, x: Tensor) -> Tensor:
    return mk.sparse_linear(x, layer.packed, layer.bias)


@pytest.fixture
def dispatches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each dispatch of several took."""
    counts: list[int] = []
    real = cpu.Group.__call__

    def counted(group: cpu.Group, x: Tensor) -> list[Tensor]:
        results = real(group, x)
        counts.append(len(results))
        return results

    monkeypatch.setattr(cpu.Group, "__call__", counted)
    return counts


@pytest.mark.parametrize("weights", ["float", "int8", "int8-group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_dispatch_for_all(dispatches: list[int], dtype: torch.dtype, weights: str) -> None:
    group, x = layers(3, dtype, weights), torch.randn(2, 5, 40).to(dtype)
    siblings.join(group)
    with torch.no_grad():
        for order in ((0, 1, 2), (2, 0, 1)):
            y = x.clone()
            for i in order:
                assert torch.equal(group[i](y), alone(group[i], y))
    assert dispatches == [3, 3]


def test_another_input_or_a_changed_one_is_computed_anew() -> None:
    group = layers(2)
    siblings.join(group)
    with torch.no_grad():
        x = torch.randn(1, 40)
        group[0](x)
        x.mul_(2)
        assert torch.equal(group[1](x), alone(group[1], x))
        group[0](x)
        other = torch.randn(1, 40)
        assert torch.equal(group[1](other), alone(group[1], other))
        group[0](x)
        del x
        gc.collect()
        fresh = torch.randn(1, 40)  # may take the freed tensor's place in memory
        assert torch.equal(group[1](fresh), alone(group[1], fresh))


def test_one_dispatch_in_inference_mode(dispatches: list[int]) -> None:
    group = layers(3)
    siblings.join(group)
    with torch.inference_mode():
        for shape in ((1, 40), (2, 5, 40), (0, 40)):
            x = torch.randn(shape)
            assert x.is_inference()
            for layer in group:
                assert torch.equal(layer(x), alone(layer, x))
        strided = torch.randn(40, 3).T
        for layer in group:
            assert torch.equal(layer(strided), alone(layer, strided))
    assert dispatches == [3] * 4
    assert group[0].siblings is not None
    assert group[0].siblings._kept is None  # no copy of an input lives longer than it is of use


def test_changes_in_inference_mode_are_noticed() -> None:
    """Nothing counts them there."""
    group, x = layers(2), torch.randn(1, 40)
    siblings.join(group)
    with torch.inference_mode():
        for change in (
            lambda x: x.mul_(2),
            lambda x: x.numpy().__imul__(2),
            lambda x: x[:, 7:8].neg_(),
            lambda x: x.resize_(2, 20).resize_(1, 40).copy_(torch.ones(1, 40)),
        ):
            y = x.clone()
            group[0](y)
            change(y)
            assert torch.equal(group[1](y), alone(group[1], y))
        y = x.clone()
        group[0](y)
        group[1].weight.mul_(2)
        assert torch.equal(group[1](y), alone(group[1], y))
        y = torch.zeros(1, 40)
        group[0](y)
        assert torch.equal(group[1](y.view(2, 20).view(1, 1, 40)), alone(group[1], y.view(1, 1, 40)))


def test_results_do_not_leave_inference_mode() -> None:
    group, x = layers(2), torch.randn(1, 40)
    siblings.join(group)
    with torch.inference_mode():
        group[0](x)
    with torch.no_grad():
        assert not group[1](x).is_inference()
    with torch.inference_mode():
        y = x.clone()
        group[0](y)
    with torch.no_grad():
        assert not group[1](y).is_inference()


def test_weights_made_in_inference_mode_run_each_alone(dispatches: list[int]) -> None:
    with torch.inference_mode():
        group, x = layers(2), torch.randn(1, 40)
        siblings.join(group)
        for layer in group:
            assert torch.equal(layer(x), alone(layer, x))
    assert dispatches == []


def test_gradients_run_each_alone(dispatches: list[int]) -> None:
    group, x = layers(2), torch.randn(1, 40, requires_grad=True)
    siblings.join(group)
    (group[0](x).sum() + group[1](x).sum()).backward()
    assert x.grad is not None
    y = x.detach()
    with ops.use_backend("reference"), torch.no_grad():
        group[0](y)
    assert dispatches == []


def test_layers_that_differ_are_not_joined() -> None:
    pair = [layers(1)[0], mk.MosaicLinear.from_linear(nn.Linear(41, 3))]
    siblings.join(pair)
    siblings.join([layers(1)[0], nn.Linear(40, 3)])
    assert all(layer.siblings is None for layer in pair)


def test_replaced_weights_are_noticed() -> None:
    group, x = layers(2), torch.randn(1, 40)
    siblings.join(group)
    with torch.no_grad():
        group[0](x)
        for change in (
            lambda: group[0].weight.mul_(2),
            lambda: setattr(group[0].weight, "data", group[0].weight * 2),
            lambda: setattr(group[0].bias, "data", group[0].bias + 1),
            lambda: group[1].load_state_dict(layers(2)[1].state_dict()),
            lambda: group[1].bfloat16().float(),
        ):
            change()
            y = x.clone()
            for layer in group:
                assert torch.equal(layer(y), alone(layer, y))


def test_replaced_scales_are_noticed() -> None:
    group, x = layers(2, weights="int8"), torch.randn(1, 40)
    siblings.join(group)
    with torch.no_grad():
        group[0](x)
        for layer in group:
            layer.scales.data = layer.scales * 3  # type: ignore[union-attr]
        y = x.clone()
        for layer in group:
            assert torch.equal(layer(y), alone(layer, y))


def test_a_kept_result_is_not_given_where_the_layer_or_the_backend_changed() -> None:
    group, x = layers(3), torch.randn(1, 40)
    siblings.join(group)
    with torch.no_grad():
        group[0](x)
        group[1].weight.mul_(2)
        assert torch.equal(group[1](x), alone(group[1], x))
        group[0](x)
        with ops.use_backend("cuda"), pytest.raises(BackendError):
            group[2](x)


def test_a_layer_that_is_used_alone_leaves_its_siblings() -> None:
    group = layers(2)
    siblings.join(group)
    with torch.no_grad():
        for _ in range(2 * siblings.Siblings.PATIENCE):
            x = torch.randn(1, 40)
            assert torch.equal(group[0](x), alone(group[0], x))
    assert group[0].siblings is None
    assert group[1].siblings is None


def test_joining_again_forgets_the_old_group() -> None:
    group = layers(3)
    siblings.join(group)
    siblings.join(group[:1])
    assert all(layer.siblings is None for layer in group)


def test_copies_run_alone() -> None:
    group = layers(2)
    siblings.join(group)
    assert copy.deepcopy(group[0]).siblings is None
    assert pickle.loads(pickle.dumps(group[1])).siblings is None


def test_rounding_activations_of_one_layer_takes_it_out() -> None:
    group, x = layers(2, weights="int8"), torch.randn(3, 40)
    siblings.join(group)
    group[1].quantize_activations = True
    with torch.no_grad():
        for layer in group:
            expected = mk.sparse_linear(x, layer.packed, layer.bias, quantize_x=layer.quantize_activations)
            assert torch.equal(layer(x), expected)


def test_threads_that_share_a_model_do_not_mix_their_results() -> None:
    group = layers(3)
    siblings.join(group)
    wrong: list[int] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(200):
                x = torch.randn(1, 40, generator=generator)
                wrong.extend(seed for layer in group if not torch.equal(layer(x), alone(layer, x)))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


@pytest.mark.parametrize("rows", [1, 7, DenseLinear.MAX_ROWS, DenseLinear.MAX_ROWS + 1])
@pytest.mark.parametrize("bias", [True, False])
def test_dense_linear_is_linear(rows: int, bias: bool) -> None:
    torch.manual_seed(rows)
    layer = DenseLinear(70, 33, bias=bias).bfloat16().requires_grad_(False)
    x = torch.randn(2, rows, 70).bfloat16()[1]
    expected = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    assert float((layer(x).double() - expected).norm() / expected.norm()) <= torch.finfo(torch.bfloat16).eps


def test_dense_linear_trains() -> None:
    layer = DenseLinear(8, 4).bfloat16()
    layer(torch.randn(1, 8).bfloat16()).sum().backward()
    assert layer.weight.grad is not None


def test_dense_linear_trains_its_bias_alone() -> None:
    layer = DenseLinear(8, 4).bfloat16()
    layer.weight.requires_grad_(False)
    layer(torch.randn(1, 8).bfloat16()).sum().backward()
    assert layer.bias.grad is not None


@pytest.mark.parametrize("rows", [1, 24])
def test_dense_linear_without_inputs_is_its_bias(rows: int) -> None:
    layer = DenseLinear(1, 8).bfloat16().requires_grad_(False)
    layer.weight = nn.Parameter(torch.zeros(8, 0).bfloat16(), requires_grad=False)
    layer.bias.fill_(2)
    assert torch.equal(layer(torch.zeros(rows, 0).bfloat16()), torch.full((rows, 8), 2.0).bfloat16())


def test_function_transforms_see_dense_layers() -> None:
    layer = DenseLinear(8, 4, bias=False).bfloat16().requires_grad_(False)
    x = torch.randn(3, 8).bfloat16()
    expected = F.linear(x, layer.weight)
    assert torch.equal(torch.vmap(layer)(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forward mode and tracing use what torch deprecates
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            assert torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent is not None
        traced = torch.jit.trace(layer, (x,), check_trace=False)
    y = torch.randn(3, 8).bfloat16()
    assert torch.allclose(traced(y), layer(y), atol=0.05)


def test_a_model_is_prepared_where_it_is_packed(dispatches: list[int]) -> None:
    model = random_model(dtype=torch.bfloat16).eval().requires_grad_(False)
    adapter = ModelAdapter.of(model)
    zero_weights(adapter, 0.5)
    ids = torch.randint(64, (1, 6))
    expected = model(ids).logits.float()
    pack_model(adapter)
    found = model(ids).logits.float()
    assert isinstance(model.lm_head, DenseLinear)
    assert dispatches == [3, 2] * len(adapter.blocks)
    assert float((found - expected).norm() / expected.norm()) < 0.02
    block = adapter.blocks[0]
    block.replace("self_attn.k_proj", block.projection("self_attn.k_proj").to_dense())  # type: ignore[operator]
    assert block.projection("self_attn.q_proj").siblings is None
    assert float((model(ids).logits.float() - expected).norm() / expected.norm()) < 0.02


def test_activations_are_rounded_on_request() -> None:
    model = random_model(dtype=torch.bfloat16).eval().requires_grad_(False)
    adapter = ModelAdapter.of(model)
    pack_model(adapter, "int8")
    ids = torch.randint(64, (1, 6))
    exact = model(ids).logits.float()
    rounded = mk.prepare_inference(model, quantize_activations=True)(ids).logits.float()
    assert all(layer.quantize_activations for _, _, layer in adapter.projections())  # type: ignore[union-attr]
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.1
    again = mk.prepare_inference(model, quantize_activations=False)(ids).logits.float()
    assert torch.equal(again, exact)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_attention_of_one_token_is_that_of_transformers(kind: str, padded: bool) -> None:
    model = random_model(kind).eval().requires_grad_(False)
    ids, mask = torch.randint(64, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    if padded:  # the second prompt, on the left
        mask[1, :4] = 0

    def decode() -> list[Tensor]:
        out, found, seen = model(ids, attention_mask=mask, use_cache=True), [], mask
        for _ in range(4):
            seen = torch.cat([seen, torch.ones(2, 1, dtype=torch.long)], 1)
            token = out.logits[:, -1:].argmax(-1)
            out = model(token, attention_mask=seen, use_cache=True, **compat.with_cache(model, compat.cache_of(out)))
            found.append(out.logits)
        return found

    expected = decode()
    mk.prepare_inference(model)
    assert model.config._attn_implementation == "mosaic_sdpa"
    for one, other in zip(decode(), expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    assert "mosaic" not in model.config.to_json_string()
