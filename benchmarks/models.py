# SPDX-License-Identifier: Apache-2.0
"""Random Llamas of real shapes, pruned on an exact budget, and the same weights as llama.cpp's file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mosaic_kernels import ops
from mosaic_kernels.config import PruneConfig
from mosaic_kernels.models import ModelAdapter
from mosaic_kernels.prune.composite import Plan, make_plan

# TinyLlama's shapes, 1.1B parameters; Llama-2-7B's; and a model with as many blocks as the first whose weights cost
# nothing to read.
LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
NARROW = {**LLAMA_1B, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 128}

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@torch.no_grad()
def random_llama(dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu", **settings: Any) -> Any:
    """A Llama with normal weights (0.02, as models start), made on ``device``, frozen and in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{"max_position_embeddings": 2048, "eos_token_id": None, **settings}, dtype=dtype)
    with torch.device("meta"):  # its own initialisation would take longer than everything below
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device=device)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, config.initializer_range)
        else:
            parameter.fill_(1)
    return model.eval().requires_grad_(False)


def sharing_copy(model: nn.Module) -> Any:
    """Modules of its own over the same parameters: layers can be replaced, and nothing takes memory twice."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


@torch.no_grad()
def pruned(
    model: nn.Module, sparsity: float, structured_share: float = 0.0, pattern: str = "unstructured"
) -> tuple[ModelAdapter, Plan]:
    """A copy of ``model`` with exactly ``round(sparsity * prunable)`` weights less, spread uniformly.

    The first heads and channels stay (weights are random, so any would do), and of what they hold the
    largest. Projections stay dense layers with zeros; what is not pruned is shared with ``model``.

    Args:
        structured_share: of all prunable weights, how many leave as whole KV groups and FFN channels, as
            nearly as these allow; zeros make up the rest.
        pattern: of the zeros, free or N:M.
    """
    adapter = ModelAdapter.of(sharing_copy(model))
    config = PruneConfig(
        sparsity=sparsity, category="composite", structured_share=structured_share, pattern=pattern,
        policy="uniform", solver="magnitude",
    )  # fmt: skip
    plan = make_plan(adapter, None, config)
    for block, name, layer in adapter.projections():
        out_features, in_features = plan.shapes[block.full_name(name)]
        weight = layer.weight[:out_features, :in_features]
        scores, left = weight.float().abs(), weight.numel() - plan.zeros[block.full_name(name)]
        kept = ops.select(scores, left) if config.group is None else ops.select(scores, config.group, "group")
        layer = nn.Linear(in_features, out_features, bias=False, device="meta")
        layer.weight = nn.Parameter(weight * kept, requires_grad=False)
        block.replace(name, layer.eval())
    for block in adapter.blocks:
        block.refresh_heads()
    return adapter, plan


def write_gguf(model: Any, path: Path, *, quantized: bool) -> None:
    """Write a dense Llama as llama.cpp reads it: matrices in BF16, or all of them in Q8_0; no vocabulary."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    kind = gguf.GGMLQuantizationType.Q8_0 if quantized else gguf.GGMLQuantizationType.BF16
    for name, parameter in model.named_parameters():
        weight = parameter.detach().float()
        if weight.dim() == 1:
            writer.add_tensor(gguf_name(name), weight.numpy())
            continue
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            weight = interleaved_pairs(weight, heads)
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    """What llama.cpp calls a parameter of a Llama."""
    prefix, name = "", name.removesuffix(".weight")
    if name.startswith("model.layers."):
        _, _, index, name = name.split(".", 3)
        prefix = f"blk.{index}."
    return f"{prefix}{GGUF_NAMES[name]}.weight"


def interleaved_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in llama.cpp's order.

    Rotary embeddings turn features in pairs: transformers pairs i with i + head_dim / 2, llama.cpp
    neighbours.

    Args:
        weight: ``[heads * head_dim, in_features]``.
    """
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
