# SPDX-License-Identifier: Apache-2.0
"""Says what is wrong where PEFT would merge an adapter into packed weights."""

from __future__ import annotations

from typing import Any

from mosaic_kernels import compat
from mosaic_kernels.errors import UsageError
from mosaic_kernels.linear import MosaicLinear


def guard_merge() -> None:
    """Let PEFT's LoRA layer raise :class:`UsageError` where it cannot merge.

    PEFT adds a dense update to ``base_layer.weight``; on packed values torch's message is about the
    shapes of two tensors, which helps nobody.
    """
    layer = compat.lora_linear()
    merge = layer.merge

    def checked(self: Any, *args: Any, **options: Any) -> Any:
        if isinstance(self.get_base_layer(), MosaicLinear):
            raise UsageError(
                "a LoRA adapter is dense and cannot be merged into packed sparse weights: keep it as an adapter, "
                "or call model.dequantize() before attaching it and merge into dense weights"
            )
        return merge(self, *args, **options)

    layer.merge = checked
