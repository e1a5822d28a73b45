# SPDX-License-Identifier: Apache-2.0
"""Removes generation settings that transformers loads but cannot save; they would fail a run in its last step."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

from mosaic_kernels.compat import generation_settings

logger = logging.getLogger(__name__)

# Settings that decide which other settings are valid, so they are tried first.
_MODES = ("do_sample", "num_beams", "return_dict_in_generate", "use_cache", "num_return_sequences")


def plain_config(config: Any) -> Any:
    """A copy of a model's configuration without generation settings, which transformers refuses to save there.

    These settings have no effect: transformers uses those of ``generation_config.json``.
    """
    found = copy.deepcopy(config)
    for key in generation_settings(config):
        delattr(found, key)
        logger.debug("config.json: %s is left out: it is a setting of generation", key)
    for key in ("quantization_config", "auto_map"):
        if hasattr(found, key):
            delattr(found, key)
    return found


def valid_generation(generation: Any) -> Any:
    """Generation settings without those that transformers calls invalid, so that ``save_pretrained`` accepts them.

    Published models have invalid settings, for example a ``temperature`` beside ``do_sample: false``. transformers
    loads them with a warning and refuses to save them. A warning names each setting that is left out.

    Args:
        generation: a ``GenerationConfig``, which stays as it is, or ``None``.

    Returns:
        A copy.
    """
    if generation is None:
        return None
    candidate = copy.deepcopy(generation)
    if _is_valid(candidate):
        return candidate
    kind = type(generation)
    settings = {key: value for key, value in vars(generation).items() if not _same(value, vars(kind()).get(key))}
    settings = {key: value for key, value in settings.items() if not key.startswith("_")}
    order = sorted(settings, key=lambda key: _MODES.index(key) if key in _MODES else len(_MODES))
    kept, dropped = kind(), []
    for key in order:
        before = getattr(kept, key, None)
        setattr(kept, key, copy.deepcopy(settings[key]))
        if not _is_valid(kept):
            setattr(kept, key, before)
            dropped.append(f"{key} = {settings[key]!r}")
    logger.warning(
        "generation_config.json: transformers calls invalid, and the result leaves out: %s", ", ".join(dropped)
    )
    return kept


def _is_valid(generation: Any) -> bool:
    """True if transformers would save these settings."""
    try:
        generation.validate(strict=True)
        json.dumps(generation.to_dict())
    except Exception:  # comparing a setting of a wrong type may raise anything
        return False
    return True


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)
