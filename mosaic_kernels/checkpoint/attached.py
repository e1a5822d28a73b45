# SPDX-License-Identifier: Apache-2.0
"""A model pruned in memory knows its format, as one does that was loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mosaic_kernels.checkpoint.quantizer import MosaicConfig, MosaicQuantizer
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.models import ModelAdapter


def settle_format(model: Any, format: str) -> None:
    """Let ``dequantize`` and ``save_pretrained`` of a pruned model do what they do after loading.

    Args:
        model: a causal language model that was pruned where it is; for the path of one there is nothing to do.
        format: ``mosaic`` leaves them packed, ``dense`` makes ordinary linear layers of them.
    """
    if isinstance(model, (str, Path)):
        return
    adapter = ModelAdapter.of(model)
    if not any(isinstance(layer, MosaicLinear) for _, _, layer in adapter.projections()):
        return
    config = MosaicConfig.of(adapter)
    model.hf_quantizer = MosaicQuantizer(config, pre_quantized=True)
    model.config.quantization_config = config
    model.is_quantized, model.quantization_method = True, config.quant_method
    if format == "dense":
        model.dequantize()
