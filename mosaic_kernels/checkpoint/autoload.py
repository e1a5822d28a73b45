# SPDX-License-Identifier: Apache-2.0
"""What makes ``trust_remote_code=True`` enough to load a mosaic checkpoint."""

from __future__ import annotations

from typing import Any

FILE_NAME = "mosaic_autoload.py"
AUTO_MAP = {"AutoConfig": "mosaic_autoload.MosaicAutoConfig"}
SOURCE = '''\
"""Teaches transformers to read this checkpoint: needs `pip install mosaic-kernels`."""

import mosaic_kernels  # registers the format
from mosaic_kernels.checkpoint.autoload import MosaicAutoConfig
'''


class MosaicAutoConfig:
    """Stands where transformers expects a checkpoint's own configuration class.

    By the time it is looked up, ``mosaic_kernels`` is imported and the format registered. It returns
    the stock configuration, because only that class maps to the stock model.
    """

    @staticmethod
    def register_for_auto_class(auto_class: str = "AutoConfig") -> None:
        """Nothing: marking a stock class as remote code would copy its source into every later save."""

    @staticmethod
    def from_pretrained(path: str, **options: Any) -> Any:
        """The stock configuration of the checkpoint at ``path``."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
