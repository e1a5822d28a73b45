# SPDX-License-Identifier: Apache-2.0
"""Weights that one thread replaces while others multiply: a result is of the old ones or of the new ones."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from small_models import composite
from torch import Tensor, nn

import mosaic_kernels as mk
from mosaic_kernels import siblings
from mosaic_kernels.config import Weights
from mosaic_kernels.errors import UsageError

COLUMNS, ROWS = 512, 256
KINDS: tuple[Weights, ...] = ("float", "int8", "int8-group")
SECONDS = 0.4  # of each test; the marker slow has longer ones


def made(seed: int, density: float, weights: Weights = "float", bias: bool = True) -> mk.MosaicLinear:
    torch.manual_seed(seed)
    dense = nn.Linear(COLUMNS, ROWS, bias=bias).requires_grad_(False)
    dense.weight[torch.rand(ROWS, COLUMNS) >= density] = 0
    return mk.MosaicLinear.from_linear(dense, weights=weights)


def same_count(seed: int, weights: Weights = "float") -> mk.MosaicLinear:
    """Layers of different seeds have different patterns and equally many weights."""
    torch.manual_seed(seed)
    dense = nn.Linear(COLUMNS, ROWS).requires_grad_(False)
    dense.weight.flatten()[torch.randperm(dense.weight.numel())[: dense.weight.numel() // 2]] = 0
    return mk.MosaicLinear.from_linear(dense, weights=weights)


@contextmanager
def often() -> Iterator[None]:
    """Threads change places every 10 us instead of every 5 ms."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def race(call: Callable[[], Any], check: Callable[[Any], bool], change: Callable[[int], object], seconds: float) -> int:
    """Two threads call while this one makes changes; returns how often they called.

    The first wrong result or error of theirs is raised here.
    """
    stop, count, wrong = threading.Event(), [0, 0], []

    def serve(which: int) -> None:
        with torch.inference_mode():
            while not stop.is_set() and not wrong:
                try:
                    found = call()
                    if not check(found):
                        wrong.append(AssertionError("a result is neither of the old nor of the new weights"))
                except Exception as error:
                    wrong.append(error)
                count[which] += 1

    threads = [threading.Thread(target=serve, args=(which,)) for which in range(2)]
    with often():
        for thread in threads:
            thread.start()
        end, step = time.monotonic() + seconds, 0
        while time.monotonic() < end and not wrong:
            change(step)
            step += 1
        stop.set()
        for thread in threads:
            thread.join()
    if wrong:
        raise wrong[0]
    assert step > 2
    return min(count)


def one_of(*wanted: Tensor) -> Callable[[Tensor], bool]:
    return lambda found: any(torch.equal(found, each) for each in wanted)


def loaded_in_turns(layer: nn.Module, *states: dict[str, Tensor]) -> Callable[[int], object]:
    return lambda step: layer.load_state_dict(states[step % len(states)])


def state_of(layer: nn.Module) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in layer.state_dict().items()}


def check_loading(first: mk.MosaicLinear, second: mk.MosaicLinear, rows: int, seconds: float) -> None:
    x = torch.randn(rows, COLUMNS)
    wanted = first(x), second(x)
    change = loaded_in_turns(first, state_of(first), state_of(second))
    assert race(lambda: first(x), one_of(*wanted), change, seconds) > 0


@pytest.mark.parametrize("weights", KINDS)
def test_loading_another_pattern(weights: Weights) -> None:
    check_loading(made(0, 0.5, weights), made(1, 0.3, weights), 4, SECONDS)


@pytest.mark.parametrize("weights", KINDS)
def test_loading_as_many_weights_elsewhere(weights: Weights) -> None:
    check_loading(same_count(0, weights), same_count(1, weights), 4, SECONDS)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 48, 100])
@pytest.mark.parametrize("weights", KINDS)
def test_loading_for_longer(weights: Weights, rows: int) -> None:
    check_loading(made(0, 0.5, weights), made(1, 0.3, weights), rows, 5)


def test_assigning_parameters() -> None:
    layer, x = made(0, 0.5), torch.randn(3, COLUMNS)
    values = [layer.weight.detach().clone(), layer.weight.detach() * 2]
    other = made(0, 0.5)
    other.weight = nn.Parameter(values[1].clone(), requires_grad=False)

    def change(step: int) -> None:
        layer.weight = nn.Parameter(values[step % 2].clone(), requires_grad=False)

    assert race(lambda: layer(x), one_of(layer(x), other(x)), change, SECONDS) > 0


def test_casting_and_dense_weights() -> None:
    layer, x = made(0, 0.5, "int8", bias=False), torch.randn(3, COLUMNS)

    def change(step: int) -> None:
        layer.to((torch.bfloat16, torch.float32)[step % 2])

    assert race(lambda: layer(x), one_of(layer(x)), change, SECONDS) > 0
    layer, x = made(0, 0.5), torch.randn(100, COLUMNS)
    wanted = layer(x), layer.to_dense()(x)
    assert (
        race(lambda: layer(x), one_of(*wanted), lambda step: layer.keep_dense_for_prefill(step % 2 == 0), SECONDS) > 0
    )


def test_siblings() -> None:
    layers = [made(seed, 0.5) for seed in range(3)]
    others = [made(seed, 0.3) for seed in range(3, 6)]
    x = torch.randn(1, COLUMNS)
    wanted = [(layer(x), other(x)) for layer, other in zip(layers, others, strict=True)]
    states = [[state_of(layer) for layer in each] for each in (layers, others)]
    siblings.join(layers)

    def change(step: int) -> None:
        for layer, state in zip(layers, states[step % 2], strict=True):
            layer.load_state_dict(state)
        if step % 5 == 0:
            siblings.join(layers)

    def check(found: list[Tensor]) -> bool:
        return all(any(torch.equal(y, each) for each in pair) for y, pair in zip(found, wanted, strict=True))

    assert race(lambda: [layer(x.clone()) for layer in layers], check, change, SECONDS) > 0


def step_of(block: Any) -> Callable[[], Tensor]:
    from transformers import DynamicCache

    torch.manual_seed(5)
    x, rotation = torch.randn(1, 1, 64), (torch.ones(1, 1, 16), torch.zeros(1, 1, 16))

    def call() -> Tensor:
        from mosaic_kernels import compat

        found = block(x, position_embeddings=rotation, attention_mask=None, **compat.with_cache(block, DynamicCache()))
        return found[0] if isinstance(found, tuple) else found

    return call


@pytest.mark.parametrize("weights", ["float", "int8"])
def test_decoder_blocks(weights: Weights) -> None:
    """Every layer of a block loads alone, so that a result may be of some old and some new ones; none crashes."""
    model, other = (mk.prepare_inference(composite(weights=weights, seed=seed).model.eval()) for seed in (0, 1))
    block, states = model.model.layers[1], [state_of(each.model.layers[1]) for each in (model, other)]
    call = step_of(block)
    with torch.inference_mode():
        wanted = [step_of(each.model.layers[1])() for each in (model, other)]
    assert block.native_tokens
    changes: list[Callable[[], object]] = [
        lambda: block.load_state_dict(states[0]),
        lambda: block.load_state_dict(states[1]),
        lambda: mk.prepare_inference(model, keep_dense_for_prefill=True),
        lambda: mk.prepare_inference(model, keep_dense_for_prefill=False),
    ]
    finite = lambda found: bool(found.isfinite().all())  # noqa: E731
    assert race(call, finite, lambda step: changes[step % 4](), 2 * SECONDS) > 0
    for state, right in zip(states, wanted, strict=True):
        block.load_state_dict(state)
        with torch.inference_mode():
            assert torch.equal(call(), right)


def test_a_model_made_dense_while_it_runs() -> None:
    model = mk.prepare_inference(composite().model.eval())
    ids = torch.arange(8)[None]
    with torch.inference_mode():
        wanted = model(ids, use_cache=False).logits

    def change(step: int) -> None:
        layer = model.model.layers[1].mlp.up_proj
        if isinstance(layer, mk.MosaicLinear):
            packed[0] = layer
            model.model.layers[1].mlp.up_proj = layer.to_dense()
        else:
            model.model.layers[1].mlp.up_proj = packed[0]

    packed: list[nn.Module] = [nn.Identity()]
    # sums in another order
    close = lambda found: torch.allclose(found, wanted, atol=1e-5)  # noqa: E731
    assert race(lambda: model(ids, use_cache=False).logits, close, change, SECONDS) > 0


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    layer, x = made(0, 0.5), torch.randn(3, COLUMNS)
    wanted, state = layer(x), state_of(made(1, 0.3))
    state["weight"] = state["weight"][:-1]
    with pytest.raises(RuntimeError, match="bitmask counts"):
        layer.load_state_dict(state)
    assert torch.equal(layer(x), wanted)


def test_loading_makes_new_tensors_and_leaves_the_old() -> None:
    layer, other = same_count(0), same_count(1)
    before = dict(layer.state_dict())
    copies = state_of(layer)
    layer.load_state_dict(other.state_dict())
    assert all(torch.equal(before[name], copies[name]) for name in before)
    assert torch.equal(layer.weight, other.weight)
    assert layer.weight.data_ptr() not in (other.weight.data_ptr(), before["weight"].data_ptr())


def test_a_bias_that_trains_stays_the_object_that_its_optimizer_knows() -> None:
    layer = made(0, 0.5)
    bias = layer.bias.requires_grad_()
    layer.load_state_dict(state_of(made(1, 0.3)))
    layer.to(torch.bfloat16).to(torch.float32)
    assert layer.bias is bias
    assert bias.requires_grad


@pytest.mark.parametrize("weights", KINDS)
def test_assigning_another_shape_is_refused(weights: Weights) -> None:
    layer, x = made(0, 0.5, weights), torch.randn(3, COLUMNS)
    wanted = layer(x)
    for name in ("weight", "bitmask", "bias", "scales"):
        with pytest.raises(UsageError, match=rf"the {name} of this packed 256x512 layer has shape .* was assigned"):
            setattr(layer, name, nn.Parameter(torch.zeros(ROWS, COLUMNS, 2), requires_grad=False))
    for name in ("weight", "bitmask"):
        with pytest.raises(UsageError, match=f"needs its {name}"):
            setattr(layer, name, None)
    with pytest.raises(TypeError, match="cannot assign"):
        layer.weight = torch.zeros_like(layer.weight)  # type: ignore[assignment]
    assert torch.equal(layer(x), wanted)


def test_results_of_siblings_do_not_outlive_a_bias() -> None:
    layers, x = [made(seed, 0.5) for seed in range(2)], torch.randn(1, COLUMNS)
    alone = [layer(x) for layer in layers]
    siblings.join(layers)
    with torch.no_grad():
        assert torch.equal(layers[0](x), alone[0])
        layers[1].bias = nn.Parameter(layers[1].bias + 1, requires_grad=False)
        torch.testing.assert_close(layers[1](x), alone[1] + 1)
        assert torch.equal(layers[0](x), alone[0])
        layers[1].bias.add_(1)
        torch.testing.assert_close(layers[1](x), alone[1] + 2)


def test_a_kept_dense_weight_is_that_of_the_values() -> None:
    layer, x = made(0, 0.5), torch.randn(100, COLUMNS)
    layer.keep_dense_for_prefill()
    for change in (
        lambda: layer.weight.mul_(2),
        lambda: setattr(layer, "weight", nn.Parameter(layer.weight * 2, requires_grad=False)),
        lambda: layer.load_state_dict(made(1, 0.3).state_dict()),
    ):
        with torch.no_grad():
            change()
        torch.testing.assert_close(layer(x), layer.to_dense()(x))
