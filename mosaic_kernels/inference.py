# SPDX-License-Identifier: Apache-2.0
"""What a whole model gains beyond its packed layers, in place and without touching a weight."""

from __future__ import annotations

from typing import Any

from torch import nn

from mosaic_kernels import attention as grouped_attention
from mosaic_kernels import compat, decode
from mosaic_kernels.dense import DenseLinear
from mosaic_kernels.errors import UsageError
from mosaic_kernels.explain import warn_if_slow
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.models import ModelAdapter


def prepare_inference(
    model: Any,
    *,
    quantize_activations: bool | None = None,
    keep_dense_for_prefill: bool | None = None,
    attention: bool = True,
) -> Any:
    """Make a causal language model quick to run. Loading a mosaic checkpoint does this too, except for attention.

    Query, key and value projections run in one dispatch where they are packed, and so do gate and up
    (:mod:`mosaic_kernels.siblings`); every plain ``nn.Linear`` becomes a
    :class:`~mosaic_kernels.dense.DenseLinear`; one new token attends to shared key/value heads in one
    product (:mod:`mosaic_kernels.attention`); on a CPU a decoder block takes one token of one sequence in two
    native calls (:mod:`mosaic_kernels.decode`). Gradients, ``state_dict`` and ``save_pretrained`` are as
    before, and dense models gain as well. Call it again after replacing layers. If blocks or packed layers
    cannot run the fast way on a CPU, one warning gives the reason; :func:`~mosaic_kernels.explain.explain` tells more.

    Args:
        model: a Hugging Face causal language model, or its base model with any head, dense or with packed layers;
            changed in place.
        quantize_activations: whether int8 layers round their input to int8 as well, which is faster and
            less exact; ``None`` leaves each layer as it is.
        keep_dense_for_prefill: whether packed layers hold their dense weight too, for inputs of more than 64
            rows: prompts at the speed of the dense model, for its memory; ``None`` leaves each layer as it is.
        attention: whether to switch a model from transformers' ``sdpa`` to ``mosaic_sdpa``, which continuous
            batching does not know; off when a checkpoint is loaded.

    Returns:
        ``model``.

    Raises:
        UnsupportedModelError: its architecture is not known.
        UsageError: ``quantize_activations`` is true and no layer has int8 values.
    """
    layers = [module for module in model.modules() if isinstance(module, MosaicLinear)]
    if quantize_activations and all(layer.scales is None for layer in layers):
        raise UsageError(
            "quantize_activations=True rounds the inputs of int8 layers, and this model has none: leave it out, or "
            "prune with weights='int8'"
        )
    for layer in layers:
        if quantize_activations is not None:
            layer.quantize_activations = quantize_activations and layer.scales is not None
        if keep_dense_for_prefill is not None:
            layer.keep_dense_for_prefill(keep_dense_for_prefill)
        layer.arrange()
    for block in ModelAdapter.of(model, any_head=True).blocks:
        decode.join_siblings(block.module)
        decode.take_tokens_natively(block.module)
    if attention and compat.attention_of(model.config) == "sdpa":
        grouped_attention.register_with_transformers()
        model.set_attn_implementation(grouped_attention.NAME)
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = DenseLinear
    warn_if_slow(model)
    return model
