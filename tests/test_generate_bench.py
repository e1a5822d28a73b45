# SPDX-License-Identifier: Apache-2.0
"""What the generation benchmark compares: models pruned on an exact budget, and the same weights for llama.cpp."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from models import LLAMA_1B, gguf_name, interleaved_pairs, pruned, random_llama, sharing_copy, write_gguf

from mosaic_kernels.checkpoint.writer import pack_model
from mosaic_kernels.evaluate.latency import weight_bytes
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.models import ModelAdapter

# heads and groups as in the large one; widths that Q8_0's blocks of 32 divide
SMALL = {**LLAMA_1B, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "vocab_size": 96}


def small(**settings: Any) -> Any:
    torch.manual_seed(0)
    return random_llama(**{**SMALL, **settings})


@pytest.mark.parametrize(("sparsity", "structured"), [(0.5, 0.0), (0.6, 0.3), (0.0, 0.0)])
def test_counts_are_exact(sparsity: float, structured: float) -> None:
    model = small()
    adapter, plan = pruned(model, sparsity, structured)
    dense = ModelAdapter.of(model)
    assert plan.prunable == dense.prunable_parameters
    left = sum(int(layer.weight.count_nonzero()) for _, _, layer in adapter.projections())
    stored = sum(layer.weight.numel() for _, _, layer in adapter.projections())
    assert plan.prunable - left == round(sparsity * plan.prunable)
    step = 8 * 3 * 256  # channels go by eights
    assert 0 <= structured * plan.prunable - (plan.prunable - stored) < step
    # the dense model is as it was, and not stored twice
    assert all(bool(layer.weight.count_nonzero() == layer.weight.numel()) for _, _, layer in dense.projections())
    assert adapter.model.lm_head.weight is model.lm_head.weight  # type: ignore[union-attr]


def test_composite_cuts_whole_groups_and_channels_everywhere_alike() -> None:
    adapter, _ = pruned(small(), 0.6, 0.3)
    for block in adapter.blocks:
        assert (block.query_heads, block.key_value_heads) == (24, 3)
        assert {block.projection(f"mlp.{name}_proj").out_features for name in ("gate", "up")} == {block.channels}
        assert 704 * 0.6 < block.channels < 704 * 0.75
    ids = torch.randint(96, (1, 7))
    wanted = adapter.model(input_ids=ids).logits.float()
    pack_model(adapter)
    found = adapter.model(input_ids=ids).logits.float()
    roundings = (2 * 10 * SMALL["num_hidden_layers"] / 12) ** 0.5
    assert all(isinstance(layer, MosaicLinear) for _, _, layer in adapter.projections())
    assert float((found - wanted).norm() / wanted.norm()) <= torch.finfo(torch.bfloat16).eps * roundings


def test_the_largest_weights_stay() -> None:
    model = small(num_hidden_layers=1)
    adapter, _ = pruned(model, 0.5)
    for block, name, layer in adapter.projections():
        before = model.get_submodule(block.full_name(name)).weight
        gone = before[layer.weight == 0].abs()
        assert torch.equal(layer.weight[layer.weight != 0], before[layer.weight != 0])
        assert float(gone.max()) <= float(layer.weight[layer.weight != 0].abs().min())


def test_a_sharing_copy_can_be_packed_alone() -> None:
    adapter, _ = pruned(small(), 0.5)
    pack_model(adapter)
    before = weight_bytes(adapter.model)
    other = sharing_copy(adapter.model)
    pack_model(ModelAdapter.of(other), "int8")
    assert weight_bytes(adapter.model) == before > weight_bytes(other)
    assert all(layer.scales is None for _, _, layer in adapter.projections())  # type: ignore[union-attr]


def rotated(x: Tensor, *, neighbours: bool) -> Tensor:
    """Rotary embedding of one head's features at positions 0, 1, ...: pairs of neighbours, or of halves."""
    tokens, features = x.shape
    angles = torch.outer(torch.arange(tokens), 10000.0 ** (-torch.arange(0, features, 2) / features)).to(x.dtype)
    a, b = (x[:, ::2], x[:, 1::2]) if neighbours else x.chunk(2, -1)
    turned = [a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()]
    return torch.stack(turned, -1).flatten(1) if neighbours else torch.cat(turned, -1)


def test_interleaved_pairs_give_the_same_attention() -> None:
    heads, features = 3, 8
    query, key, x = (torch.randn(n, 10, dtype=torch.float64) for n in (heads * features, heads * features, 5))
    for head in range(heads):
        own = slice(head * features, (head + 1) * features)
        q, k = (rotated(x @ w[own].T, neighbours=False) for w in (query, key))
        there = [rotated(x @ interleaved_pairs(w, heads)[own].T, neighbours=True) for w in (query, key)]
        torch.testing.assert_close(q @ k.T, there[0] @ there[1].T)


@pytest.mark.parametrize("quantized", [False, True], ids=["BF16", "Q8_0"])
def test_gguf_holds_the_model(tmp_path: Path, quantized: bool) -> None:
    gguf = pytest.importorskip("gguf", reason="needs gguf: pip install gguf")
    model = small()
    write_gguf(model, tmp_path / "model.gguf", quantized=quantized)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    wanted = dict(model.named_parameters())
    assert set(stored) == {gguf_name(name) for name in wanted}
    assert {"token_embd.weight", "output_norm.weight", "output.weight", "blk.1.ffn_norm.weight"} <= set(stored)
    for name, weight in wanted.items():
        tensor = stored[gguf_name(name)]
        assert tensor.tensor_type.name == ("F32" if weight.dim() == 1 else "Q8_0" if quantized else "BF16")
        found = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        heads = {"q_proj": 32, "k_proj": 4}.get(name.split(".")[-2], 0)
        expected = interleaved_pairs(weight, heads).float() if heads else weight.float()
        if quantized and weight.dim() == 2:  # half a step, 1/127 of the largest of 32; the scale itself is fp16
            step = expected.view(len(expected), -1, 32).abs().amax(-1) / 127
            error = (found - expected).view(len(expected), -1, 32).abs().amax(-1)
            assert bool((error <= step * (0.5 + 127 * torch.finfo(torch.float16).eps)).all()), name
        else:
            assert torch.equal(found, expected), name
    fields = {"embedding_length": 256, "attention.head_count": 32, "attention.head_count_kv": 4, "block_count": 2,
              "feed_forward_length": 704, "rope.dimension_count": 8}  # fmt: skip
    assert {name: reader.fields[f"llama.{name}"].contents() for name in fields} == fields
