# SPDX-License-Identifier: Apache-2.0
"""Random models of every supported architecture, and crude ways to prune them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mosaic_kernels.models import ModelAdapter

KINDS = ("llama", "mistral", "qwen2", "qwen3")


def random_model(kind: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **settings: Any) -> Any:
    """Three blocks, 4 query heads on 2 KV heads of 16 features, 40 channels: no width is a multiple of 64."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": 96,
            "hidden_size": 64,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 128,
            "bos_token_id": 0,
            "eos_token_id": None,
            "pad_token_id": None,
            **settings,
        },
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():  # stock biases and norms are 0 and 1: nothing would show
        if name.endswith("bias") or "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def zero_weights(adapter: ModelAdapter, sparsity: float, *, only: str = "") -> None:
    """Zero the smallest weights of every projection whose name contains ``only``."""
    for _, name, layer in adapter.projections():
        if only in name:
            weight = layer.weight.data
            count = int(sparsity * weight.numel())
            weight.flatten()[weight.abs().flatten().argsort()[:count]] = 0


def cut_block(adapter: ModelAdapter, index: int, *, query: int, key_value: int, channels: int) -> None:
    """Keep the first heads and channels of one block."""
    block = adapter.blocks[index]
    rows = {"self_attn.q_proj": query * block.head_dim, "mlp.gate_proj": channels, "mlp.up_proj": channels}
    rows |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), key_value * block.head_dim)
    for name, count in rows.items():
        block.replace(name, _slice(block.projection(name), rows=count))
    for name, count in (("self_attn.o_proj", query * block.head_dim), ("mlp.down_proj", channels)):
        block.replace(name, _slice(block.projection(name), columns=count))
    block.refresh_heads()


def shapes(adapter: ModelAdapter) -> dict[str, tuple[int, int]]:
    return {b.full_name(n): (layer.out_features, layer.in_features) for b, n, layer in adapter.projections()}


def prompt(tokens: int = 12) -> torch.Tensor:
    return torch.randint(96, (2, tokens), generator=torch.Generator().manual_seed(3))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=prompt()).logits


def _slice(layer: nn.Linear, rows: int | None = None, columns: int | None = None) -> nn.Linear:
    weight = layer.weight.data[:rows, :columns].clone()
    new = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None, dtype=weight.dtype)
    new.weight.data = weight
    if layer.bias is not None:
        new.bias.data = layer.bias.data[:rows].clone()
    return new
