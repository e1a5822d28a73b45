# SPDX-License-Identifier: Apache-2.0
"""Makes ``trust_remote_code=True`` enough to load a mosaic checkpoint, however it was saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mosaic_kernels import compat
from mosaic_kernels.checkpoint.checksums import seal_config
from mosaic_kernels.checkpoint.files import read_json
from mosaic_kernels.checkpoint.schema import check_description
from mosaic_kernels.errors import ModelLoadError, MosaicError

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


def extend_configs() -> None:
    """Check every configuration of the mosaic format before transformers uses it, and complete it when it is saved.

    If it were not completed, a checkpoint that was loaded and saved again would lack :data:`FILE_NAME`, and would load
    only after ``import mosaic_kernels``.
    """
    compat.around_config_reading(_checked, _say_why_unread)
    compat.around_config_saving(_completed)


@contextmanager
def _checked(content: Mapping[str, Any], source: str) -> Iterator[None]:
    """Check our part of a ``config.json``; turn transformers' errors about the rest into :class:`ModelLoadError`."""
    found: Any = content.get("quantization_config")
    described = isinstance(found, Mapping) and found.get("quant_method") == METHOD
    if not described and AUTO_MAP["AutoConfig"] not in repr(content.get("auto_map")):
        yield
        return
    if not described:
        raise ModelLoadError(
            f"quantization_config in config.json of {source} must be a table with quant_method {METHOD!r}: copy or "
            "download it again"
        )
    check_description(found)
    auto_map = content.get("auto_map", {})
    if not isinstance(auto_map, Mapping) or not isinstance(auto_map.get("AutoConfig", ""), str):
        raise ModelLoadError(f"auto_map in config.json of {source} must be a table of names: copy or download it again")
    if not isinstance(content.get("model_type", ""), str):
        raise ModelLoadError(f"model_type in config.json of {source} must be a name: copy or download it again")
    try:
        yield
    except MosaicError:
        raise
    except Exception as error:
        raise ModelLoadError(
            f"config.json of {source} is damaged ({type(error).__name__}: {error!s:.300}): copy or download it again"
        ) from error


def _say_why_unread(source: str, error: Exception | None) -> None:
    """Raise in our words where ``config.json`` of a mosaic checkpoint cannot be read; transformers calls it missing."""
    path = Path(source, "config.json")
    named = path.is_file() and METHOD in path.read_text(encoding="utf-8", errors="replace")
    if (
        named or Path(source, FILE_NAME).exists()
    ):  # an older checkpoint, or one saved by another program, has no such file
        read_json(path)
        if isinstance(error, RecursionError):
            raise ModelLoadError(f"{path} nests values too deeply to be read: copy or download it again") from error


@contextmanager
def _completed(config: Any, directory: Path) -> Iterator[None]:
    """Let ``config`` be saved so that it loads again; in memory, its numbers of heads stay as they are."""
    if not is_mosaic(config):
        forget(config)
        yield
        return
    config.auto_map = dict(AUTO_MAP)
    config.verify = False  # makes from_pretrained(..., verify=True) reach the configuration
    heads = config.num_attention_heads, config.num_key_value_heads
    try:
        config.num_attention_heads, config.num_key_value_heads = _accepted(config.hidden_size, *heads)
        yield
    finally:
        config.num_attention_heads, config.num_key_value_heads = heads
    (directory / FILE_NAME).write_text(SOURCE, encoding="utf-8")
    seal_config(directory / "config.json")


def _accepted(hidden_size: int, query: int, key_value: int) -> tuple[int, int]:
    """The smallest numbers of heads, not below these, that configuration classes accept.

    Some classes require that ``hidden_size`` is a multiple of the query heads even if ``head_dim`` is given. At
    loading, the numbers in ``quantization_config`` replace these.
    """
    while hidden_size % query and query < hidden_size:
        query += 1
    while query % key_value and key_value < query:
        key_value += 1
    return query, key_value


def is_mosaic(config: Any) -> bool:
    """True if a configuration, or its ``quantization_config`` as a table, is of the mosaic format."""
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return bool(method == METHOD)


def forget(config: Any) -> None:
    """Remove the attributes of a mosaic checkpoint from a configuration that is no longer in this format."""
    if getattr(config, "auto_map", None) == AUTO_MAP:
        del config.auto_map
        if hasattr(config, "verify"):
            del config.verify
