# SPDX-License-Identifier: Apache-2.0
"""What makes ``trust_remote_code=True`` enough to load a mosaic checkpoint, however it was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mosaic_kernels import compat
from mosaic_kernels.checkpoint.checksums import seal_config

FILE_NAME = "mosaic_autoload.py"
AUTO_MAP = {"AutoConfig": "mosaic_autoload.MosaicAutoConfig"}
SOURCE = '''\
"""Teaches transformers to read this checkpoint: needs `pip install mosaic-kernels`."""

import mosaic_kernels  # registers the format
from mosaic_kernels.checkpoint.autoload import MosaicAutoConfig
'''
METHOD = "mosaic"  # the quant_method of a checkpoint


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


def complete_saved_configs() -> None:
    """Let every configuration of the mosaic format that transformers saves be as a run of this package writes it.

    Without this, a checkpoint that was loaded and saved again would lack :data:`FILE_NAME`, and would load only after
    ``import mosaic_kernels``.
    """
    compat.around_config_saving(_before_saving, _after_saving)


def _before_saving(config: Any) -> None:
    if is_mosaic(config):
        config.auto_map = dict(AUTO_MAP)
        config.verify = False  # makes from_pretrained(..., verify=True) reach the configuration
    else:
        forget(config)


def _after_saving(config: Any, directory: Path) -> None:
    if is_mosaic(config):
        (directory / FILE_NAME).write_text(SOURCE, encoding="utf-8")
        seal_config(directory / "config.json")


def is_mosaic(config: Any) -> bool:
    """True if a configuration, or its ``quantization_config`` as a table, is of the mosaic format."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return bool(method == METHOD)


def forget(config: Any) -> None:
    """Remove what only a mosaic checkpoint's configuration has, once the format is gone from it."""
    if getattr(config, "auto_map", None) == AUTO_MAP:
        del config.auto_map
        if hasattr(config, "verify"):
            del config.verify
