# SPDX-License-Identifier: Apache-2.0
"""A run gives the same result whatever torch was set to, and leaves torch as it was."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from small_models import logits, random_model
from torch import nn

import mosaic_kernels as mk
from mosaic_kernels.errors import UsageError
from mosaic_kernels.prune.torch_state import as_by_default

PRUNING: dict[str, Any] = {
    "sparsity": 0.5, "calibration": "random", "samples": 4, "seqlen": 16, "policy": "uniform", "recover": "reconstruct"
}  # fmt: skip


def state_after(model: Any) -> dict[str, torch.Tensor]:
    mk.prune(model, **PRUNING)
    return {name: each.clone() for name, each in model.state_dict().items()}


@pytest.fixture(scope="module")
def wanted() -> dict[str, torch.Tensor]:
    return state_after(random_model())


def require_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, each in wanted.items():
        assert found[name].dtype is each.dtype
        assert torch.equal(found[name], each), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_default_dtypes(dtype: torch.dtype, wanted: dict[str, torch.Tensor]) -> None:
    model = random_model()
    torch.set_default_dtype(dtype)
    try:
        found = state_after(model)
        with pytest.raises(UsageError):
            mk.prune(model, sparsity=2)
        assert torch.get_default_dtype() is dtype
        layer = mk.MosaicLinear(8, 4)
        assert layer(torch.zeros(2, 8)).dtype is dtype
    finally:
        torch.set_default_dtype(torch.float32)
    require_equal(found, wanted)


@pytest.mark.parametrize(
    "context",
    [torch.no_grad(), torch.autocast("cpu"), torch.device("meta")],
    ids=["no_grad", "autocast", "default device"],
)
def test_contexts(context: AbstractContextManager[Any], wanted: dict[str, torch.Tensor]) -> None:
    model = random_model()
    with context:
        found = state_after(model)
    require_equal(found, wanted)


def test_inference_mode(wanted: dict[str, torch.Tensor]) -> None:
    with torch.inference_mode():
        model = random_model(tie_word_embeddings=True)
        assert model.lm_head.weight.is_inference()
        mk.prune(model, **PRUNING)
        assert torch.is_inference_mode_enabled()
    assert not any(p.is_inference() for p in model.parameters())
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.inference_mode():
        model = random_model()
        found = state_after(model)
    require_equal(found, wanted)


def test_threads_leave_the_default_dtype_as_it_was() -> None:
    barrier = threading.Barrier(2)

    def run(first: bool) -> None:
        with as_by_default():
            barrier.wait()
            if not first:
                barrier.wait()
            seen.append(torch.get_default_dtype())
        if first:
            barrier.wait()

    seen: list[torch.dtype] = []
    torch.set_default_dtype(torch.float64)
    try:
        threads = [threading.Thread(target=run, args=(first,)) for first in (True, False)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert seen == [torch.float32, torch.float32]
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_model_pruned_in_memory_can_be_saved_and_made_dense(tmp_path: Any) -> None:
    from small_models import load

    model = random_model()
    mk.prune(model, **PRUNING)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert isinstance(again.model.layers[1].mlp.up_proj, mk.MosaicLinear)
    assert torch.equal(logits(again), logits(model))
    dense = model.dequantize()
    assert all(p.requires_grad for p in dense.parameters())
    assert type(dense.model.layers[1].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(logits(dense), logits(again))
    other = random_model()
    mk.prune(other, format="dense", **PRUNING)
    assert torch.equal(other.model.layers[1].mlp.up_proj.weight, dense.model.layers[1].mlp.up_proj.weight)
    assert not any(isinstance(module, mk.MosaicLinear) for module in other.modules())
