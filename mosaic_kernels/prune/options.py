# SPDX-License-Identifier: Apache-2.0
"""From keyword options to a checked configuration with its texts read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mosaic_kernels.config import PruneConfig
from mosaic_kernels.errors import UsageError
from mosaic_kernels.prune.given import given_calibration, given_text, require_ranks_file


def make_config(options: dict[str, Any]) -> PruneConfig:
    """A checked configuration from keyword options, with all texts read; unknown names are a usage error."""
    unknown = sorted(set(options) - set(PruneConfig.__dataclass_fields__))
    if unknown:
        known = ", ".join(PruneConfig.__dataclass_fields__)
        raise UsageError(f"unknown option {unknown[0]!r}; the options are: {known}")
    config = PruneConfig(**options)
    if config.ranks is not None:
        require_ranks_file(config.ranks)
    if config.eval_text is not None:
        config = replace(config, eval_text=given_text(config.eval_text))
    return replace(config, calibration=given_calibration(config.calibration, config.samples))
