# SPDX-License-Identifier: Apache-2.0
"""Unwraps models in memory that are compiled or parallel; refuses those with adapters or offloaded weights."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from mosaic_kernels import compat
from mosaic_kernels.errors import UnsupportedModelError, UsageError
from mosaic_kernels.models import SUPPORTED_MODEL_TYPES

logger = logging.getLogger(__name__)

_OURS = "mosaic"
_COMPILED, _PARALLEL = "OptimizedModule", "DataParallel"
_DISTRIBUTED = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
MERGE = "merge it first, with model = PeftModel.from_pretrained(model, ADAPTER).merge_and_unload(), and save that model"


def require_prunable(model: Any) -> Any:
    """The plain model inside ``model``, if it can be pruned in place.

    ``torch.compile`` and ``nn.DataParallel`` wrap the plain model. The plain model is pruned, and the wrapper then
    computes with the pruned one. ``torch.compile`` compiles it again at its next call.

    Raises:
        UsageError: the model must be changed first: its weights are offloaded or sharded, it carries an adapter, or it
            is wrapped for training on several devices.
        UnsupportedModelError: it is quantized by another method, or no causal language model of a known architecture.
    """
    model = _unwrapped(model)
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise UsageError(f"cannot prune {type(model).__name__}: pass a directory, a hub id or a Hugging Face model")
    if compat.has_adapter(model) or has_adapter_layers(model):
        raise UsageError(
            f"{type(model).__name__} carries an adapter (PEFT, such as LoRA), which pruning would lose: merge it "
            "first, with model = model.merge_and_unload(), and prune that model"
        )
    _require_own_weights(model)
    method = quantized_by(model.config)
    if method not in (None, _OURS):
        raise UnsupportedModelError(
            f"{type(model).__name__} is quantized with {method!r}: load the model in fp32, bf16 or fp16"
        )
    kind = getattr(model.config, "model_type", None)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} has an encoder and a decoder; only causal language models can be pruned "
            f"({', '.join(SUPPORTED_MODEL_TYPES)})"
        )
    if kind not in SUPPORTED_MODEL_TYPES and any(
        hasattr(model.config, key) for key in ("vision_config", "audio_config")
    ):
        raise UnsupportedModelError(
            f"{type(model).__name__} also reads images or sound (architecture {kind!r}); only models of text alone can "
            f"be pruned ({', '.join(SUPPORTED_MODEL_TYPES)})"
        )
    return model


def quantized_by(config: Any) -> str | None:
    """The name of the method in a configuration's ``quantization_config``, if there is one."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method))


def _unwrapped(model: Any) -> Any:
    while True:
        name = type(model).__name__
        if name == _COMPILED and hasattr(model, "_orig_mod"):
            logger.info("the model inside torch.compile is pruned; its next call compiles it again")
            model = model._orig_mod
        elif name == _PARALLEL:
            model = model.module
        elif name in _DISTRIBUTED:
            raise UsageError(
                f"the model is wrapped in {name}, which keeps its own copies of the weights: pass model.module, or "
                "prune before wrapping"
            )
        else:
            return model


def has_adapter_layers(model: nn.Module) -> bool:
    """True if PEFT has replaced modules of ``model``, or is wrapped around it."""
    return any(_is_of_peft(type(module)) for module in model.modules())


def _is_of_peft(kind: type) -> bool:
    return any(base.__module__.partition(".")[0] == "peft" for base in kind.__mro__)


def _require_own_weights(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UsageError(
                f"{name} is offloaded (accelerate put it on disk or in CPU memory) or has no values yet: load the "
                "model without device_map and offload_folder, or pass its directory, which is pruned block by block"
            )
        if type(parameter.data).__name__ == "DTensor" or type(parameter).__name__ == "DTensor":
            raise UsageError(f"{name} is sharded over several devices: prune the whole model, before it is sharded")
