# SPDX-License-Identifier: Apache-2.0
"""Where a model keeps its decoder blocks, projections and heads."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mosaic_kernels.errors import UnsupportedModelError

SUPPORTED_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# The projections of a block in the order the data meets them; each inner tuple shares one input.
STAGES: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
PROJECTIONS = tuple(name for stage in STAGES for name in stage)


@dataclass(frozen=True)
class Block:
    """One decoder block: its module, its place in the model, and its heads and channels.

    Attributes:
        index: position in the model.
        prefix: dotted name of the block in the model, e.g. ``model.layers.3``.
        module: the block itself.
        head_dim: features of one head; pruning never changes it.
        stored: the stored dtype of each parameter, by full name, while the model computes in another dtype.
    """

    index: int
    prefix: str
    module: nn.Module
    head_dim: int
    stored: Mapping[str, torch.dtype] = field(default_factory=dict, compare=False, repr=False)

    def copy(self) -> Block:
        """The same block with weights of its own."""
        return replace(self, module=copy.deepcopy(self.module))

    def projection(self, name: str) -> nn.Linear:
        """The projection with this name inside the block, e.g. ``mlp.up_proj``."""
        module = self.module.get_submodule(name)
        assert isinstance(module, nn.Linear)  # checked when the adapter was made
        return module

    def full_name(self, name: str) -> str:
        """The projection's name in the whole model."""
        return f"{self.prefix}.{name}"

    def stored_dtype(self, name: str, parameter: str = "weight") -> torch.dtype:
        """The dtype in which a projection's weight or bias is stored; new values must be rounded to it."""
        found: torch.dtype = getattr(self.projection(name), parameter).dtype
        return self.stored.get(f"{self.full_name(name)}.{parameter}", found)

    def rounded(self, name: str, values: Tensor, parameter: str = "weight") -> Tensor:
        """New values of a projection, rounded to its stored dtype and returned in the dtype it computes in."""
        held: Tensor = getattr(self.projection(name), parameter)
        return values.to(self.stored_dtype(name, parameter)).to(held.dtype)

    @property
    def after_attention(self) -> nn.Module:
        """The norm that reads the residual stream after attention has written to it."""
        return self.module.get_submodule("post_attention_layernorm")

    @property
    def ffn(self) -> nn.Module:
        """The feed-forward network, from its normed input to what it adds to the residual stream."""
        return self.module.get_submodule("mlp")

    def replace(self, name: str, layer: nn.Linear) -> None:
        """Put ``layer`` in the place of the projection ``name``."""
        siblings = getattr(self.projection(name), "siblings", None)
        if siblings is not None:  # the others would go on computing the layer that leaves
            siblings.part()
        parent, _, leaf = name.rpartition(".")
        setattr(self.module.get_submodule(parent), leaf, layer)

    @property
    def query_heads(self) -> int:
        return self.projection("self_attn.q_proj").out_features // self.head_dim

    @property
    def key_value_heads(self) -> int:
        return self.projection("self_attn.k_proj").out_features // self.head_dim

    @property
    def channels(self) -> int:
        """FFN channels."""
        return self.projection("mlp.down_proj").in_features

    def refresh_heads(self) -> None:
        """Make the attention module's own head counts agree with its projections."""
        attention: Any = self.module.get_submodule("self_attn")
        attention.num_key_value_groups = self.query_heads // self.key_value_heads
        for attribute, count in (("num_heads", self.query_heads), ("num_key_value_heads", self.key_value_heads)):
            if hasattr(attention, attribute):
                setattr(attention, attribute, count)


@dataclass(frozen=True)
class ModelAdapter:
    """A causal language model seen as decoder blocks of linear projections."""

    model: nn.Module
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, model: Any, *, any_head: bool = False) -> ModelAdapter:
        """Discover the blocks of ``model``.

        Args:
            any_head: also take a base model, or one with another head, such as a classifier.

        Raises:
            UnsupportedModelError: not a causal language model of a supported architecture.
        """
        config = model.config
        supported = ", ".join(SUPPORTED_MODEL_TYPES)
        if config.model_type not in SUPPORTED_MODEL_TYPES:
            raise UnsupportedModelError(
                f"architecture '{config.model_type}' is not supported; supported dense models: {supported}"
            )
        if model.get_output_embeddings() is None and not any_head:
            raise UnsupportedModelError(
                f"{type(model).__name__} is not a causal language model (it has no output head); "
                "load the checkpoint's ...ForCausalLM class"
            )
        prefix, layers = _find_blocks(model)
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        blocks = tuple(Block(i, f"{prefix}.{i}", module, head_dim) for i, module in enumerate(layers))
        return cls(model, blocks)

    def storing(self, dtypes: Mapping[str, torch.dtype]) -> ModelAdapter:
        """An adapter of the same model whose blocks know the stored dtypes of its parameters."""
        return replace(self, blocks=tuple(replace(block, stored=dtypes) for block in self.blocks))

    @property
    def final_norm(self) -> nn.Module:
        """The norm between the last block and the output head."""
        parent, _, _ = self.blocks[0].prefix.rpartition(".layers.")
        return self.model.get_submodule(f"{parent}.norm")

    def projections(self) -> Iterator[tuple[Block, str, nn.Linear]]:
        """Every prunable projection: its block, its name inside the block, and the layer."""
        for block in self.blocks:
            for name in PROJECTIONS:
                yield block, name, block.projection(name)

    def sizes(self) -> dict[str, int]:
        """Weights of every prunable projection by full name."""
        return {
            block.full_name(name): layer.in_features * layer.out_features for block, name, layer in self.projections()
        }

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in; its packed values may be of another."""
        model: Any = self.model
        found: torch.dtype = model.get_input_embeddings().weight.dtype
        return found

    @property
    def prunable_parameters(self) -> int:
        return sum(self.sizes().values())


def _find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(_is_block(child) for child in module):
            return name, module
    raise UnsupportedModelError(
        f"{type(model).__name__}: no list of decoder blocks with the linear projections {', '.join(PROJECTIONS)} found"
    )


def _is_block(module: nn.Module) -> bool:
    try:
        return all(isinstance(module.get_submodule(name), nn.Linear) for name in PROJECTIONS)
    except AttributeError:
        return False
