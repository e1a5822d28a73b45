# SPDX-License-Identifier: Apache-2.0
"""Random models of every supported architecture, crude ways to prune them, and saving and loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mosaic_kernels.checkpoint.writer import pack_model, write_checkpoint
from mosaic_kernels.config import Weights
from mosaic_kernels.models import ModelAdapter

KINDS = ("llama", "mistral", "qwen2", "qwen3")
REPORT = {
    "prunable_parameters": 1000,
    "removed_parameters": 600,
    "sparsity": 0.6,
    "structured_removed": 200,
    "unstructured_zeros": 400,
    "category": "composite",
    "policy": "pod",
    "solver": "wanda",
    "seed": 7,
    "versions": {"mosaic-kernels": "0.1.0", "torch": "2.13.0"},
    "command": ["python", "-m", "mosaic_kernels.prune", "/home/me/model", "--sparsity", "0.6"],
    "bytes": {"dense": 4 << 20, "pruned": 2 << 20},
    "perplexity": {"text": "/home/me/text.txt", "tokens": 510, "dense": 9.5, "pruned": 11.25},
}


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


def save(
    adapter: ModelAdapter,
    directory: Path,
    *,
    format: Literal["mosaic", "dense"] = "mosaic",
    tokenizer: Any = None,
    source: str = "some/model",
    **options: Any,
) -> Path:
    """Write a checkpoint as the pipeline does."""
    original = {name: (64, 64) for name in shapes(adapter)}
    report = {**REPORT, "projections": {name: {"nnz": 2048} for name in original}}
    write_checkpoint(
        adapter, directory, tokenizer=tokenizer, report=report, original_shapes=original, source=source, format=format,
        **options,
    )  # fmt: skip
    return directory


def composite(kind: str = "llama", *, pack: bool = True, weights: Weights = "float", **settings: Any) -> ModelAdapter:
    """Blocks with different heads and widths, and zeros everywhere but in o_proj."""
    adapter = ModelAdapter.of(random_model(kind, **settings))
    cut_block(adapter, 0, query=2, key_value=2, channels=33)
    cut_block(adapter, 2, query=2, key_value=1, channels=40)
    for part in ("q_proj", "k_proj", "v_proj", "mlp"):
        zero_weights(adapter, 0.5, only=part)
    if pack:
        pack_model(adapter, weights)
    return adapter


def load(directory: Path, **options: Any) -> Any:
    """What a user's ``from_pretrained`` gives."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, **options)


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


def edit_json(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a JSON file holds."""
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def edit_tensors(directory: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a checkpoint in one file."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
