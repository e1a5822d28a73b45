# SPDX-License-Identifier: Apache-2.0
"""Shapes, zeros and heads of a model: described for a checkpoint, and put into place from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from torch import nn

from mosaic_kernels.config import Weights
from mosaic_kernels.errors import FormatError, UsageError
from mosaic_kernels.format import scale_groups, weights_group
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.models import Block, ModelAdapter

# Widths that must agree inside a block: (projection, side) on the left equals that on the right.
_SAME_WIDTH = (
    (("self_attn.k_proj", "out"), ("self_attn.v_proj", "out")),
    (("self_attn.q_proj", "out"), ("self_attn.o_proj", "in")),
    (("mlp.gate_proj", "out"), ("mlp.up_proj", "out")),
    (("mlp.up_proj", "out"), ("mlp.down_proj", "in")),
    (("self_attn.q_proj", "in"), ("self_attn.k_proj", "in")),
    (("self_attn.q_proj", "in"), ("self_attn.v_proj", "in")),
    (("self_attn.q_proj", "in"), ("self_attn.o_proj", "out")),
    (("self_attn.q_proj", "in"), ("mlp.gate_proj", "in")),
    (("self_attn.q_proj", "in"), ("mlp.down_proj", "out")),
)


def describe(adapter: ModelAdapter) -> tuple[dict[str, Any], dict[str, Any]]:
    """``projections`` and ``heads`` of a model as ``quantization_config`` states them."""
    projections, heads = {}, {}
    weights = packed_weights(adapter)
    for block, name, layer in adapter.projections():
        shape = [layer.out_features, layer.in_features]
        packed = isinstance(layer, MosaicLinear)
        nnz = layer.weight.numel() if packed or layer.weight.is_meta else int(layer.weight.count_nonzero())
        entry: dict[str, Any] = {"shape": shape, "nnz": nnz}
        if not packed and _is_packed(entry, weights):
            entry["packed"] = False
        projections[block.full_name(name)] = entry
    for block in adapter.blocks:
        heads[block.prefix] = {"query": block.query_heads, "key_value": block.key_value_heads}
    return projections, heads


def packed_weights(adapter: ModelAdapter) -> Weights:
    """What the values of a model's packed projections are.

    Raises:
        UsageError: not the same everywhere, for which the description has no words.
    """
    layers = [layer for _, _, layer in adapter.projections() if isinstance(layer, MosaicLinear)]
    kinds: tuple[Weights, ...] = get_args(Weights)
    for weights in kinds:
        if all(_holds(layer, weights) for layer in layers):
            return weights
    found = ", ".join(sorted({layer.weights for layer in layers}))
    raise UsageError(f"packed projections of one model hold values of one kind, and these hold {found}: pack all alike")


def _holds(layer: MosaicLinear, weights: Weights) -> bool:
    if weights == "float" or layer.scales is None:
        return weights == "float" and layer.scales is None
    return layer.scales.shape[1] == scale_groups(layer.in_features, weights_group(weights))


def apply_layout(
    adapter: ModelAdapter,
    projections: Mapping[str, Any],
    heads: Mapping[str, Any],
    *,
    packed: bool,
    weights: Weights = "float",
) -> None:
    """Give every projection of a model on the meta device the kind and shape it has in a checkpoint.

    Args:
        adapter: the model, as its stock configuration builds it.
        projections: see :func:`describe`; checked by :mod:`~mosaic_kernels.checkpoint.schema`. Names may have another
            prefix than in the model; names of a base model have none.
        heads: see :func:`describe`.
        packed: whether the checkpoint packs weights at all.
        weights: what the packed values are.

    Raises:
        FormatError: the description contradicts the model or itself.
    """
    known = {_stem(block.full_name(name)): (block, name) for block, name, _ in adapter.projections()}
    for full_name, entry in projections.items():
        if _stem(full_name) not in known:
            raise FormatError(f"{full_name}: described in quantization_config, but the model has no such projection")
        (rows, columns), nnz = entry["shape"], entry["nnz"]
        block, name = known[_stem(full_name)]
        old = block.projection(name)
        kind: dict[str, Any] = {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}
        if packed and _is_packed(entry, weights):
            block.replace(name, MosaicLinear(columns, rows, nnz=nnz, weights=weights, **kind))
        elif (rows, columns) != (old.out_features, old.in_features):
            block.replace(name, nn.Linear(columns, rows, **kind))
    described = {_stem(prefix): found for prefix, found in heads.items()}
    unknown = set(described) - {_stem(block.prefix) for block in adapter.blocks}
    if unknown:
        raise FormatError(f"{min(unknown)}: its heads are described in quantization_config, but there is no such block")
    for block in adapter.blocks:
        _check_block(block, described.get(_stem(block.prefix)))
        block.refresh_heads()


def _stem(name: str) -> str:
    """A name without the base model's prefix: the same in a base model and in one with any head."""
    start, layers, rest = name.partition("layers.")
    return layers + rest if layers else start


def _is_packed(entry: Mapping[str, Any], weights: Weights) -> bool:
    """Left unsaid, float values are packed where there are zeros, and int8 values everywhere."""
    rows, columns = entry["shape"]
    return bool(entry.get("packed", weights != "float" or entry["nnz"] < rows * columns))


def is_uniform(adapter: ModelAdapter) -> bool:
    """True if every block has the same heads and channels, and a stock configuration can express them."""
    found = stock_shapes(adapter)
    config: Any = adapter.model.config
    # some configuration classes insist on whole heads of hidden_size even where head_dim is given
    return len(found) == _STOCK_KEYS and bool(config.hidden_size % found["num_attention_heads"] == 0)


_STOCK_KEYS = 4


def stock_shapes(adapter: ModelAdapter) -> dict[str, int]:
    """The keys of a stock configuration for shapes that all blocks share, with their values.

    If blocks differ in heads or channels, no number is right for all of them. The configuration then keeps the number
    from before pruning, which is large enough for every block.
    """
    block = adapter.blocks[0]
    found: dict[str, int] = {}
    if len({(other.query_heads, other.key_value_heads) for other in adapter.blocks}) == 1:
        found["num_attention_heads"], found["num_key_value_heads"] = block.query_heads, block.key_value_heads
        found["head_dim"] = block.head_dim
    if len({other.channels for other in adapter.blocks}) == 1:
        found["intermediate_size"] = block.channels
    return found


def _check_block(block: Block, heads: Any) -> None:
    def width(place: tuple[str, str]) -> int:
        layer = block.projection(place[0])
        return layer.out_features if place[1] == "out" else layer.in_features

    for left, right in _SAME_WIDTH:
        if width(left) != width(right):
            raise FormatError(
                f"{block.full_name(left[0])}: {left[1]}_features is {width(left)} but {right[1]}_features of "
                f"{right[0]} is {width(right)}"
            )
    for projection in ("self_attn.q_proj", "self_attn.k_proj"):
        if width((projection, "out")) % block.head_dim:
            raise FormatError(
                f"{block.full_name(projection)}: not a whole number of heads of {block.head_dim} features"
            )
    found = {"query": block.query_heads, "key_value": block.key_value_heads}
    if heads is not None and heads != found:
        raise FormatError(f"{block.prefix}: heads are described as {heads} but the projections have {found}")
    if block.query_heads % block.key_value_heads:
        raise FormatError(
            f"{block.prefix}: {block.query_heads} query heads do not share {block.key_value_heads} KV heads evenly"
        )
