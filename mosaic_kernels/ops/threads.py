# SPDX-License-Identifier: Apache-2.0
"""How many threads the CPU kernels use."""

from __future__ import annotations

import os

import torch

from mosaic_kernels.errors import UsageError


def _forced_threads() -> int:
    text = os.environ.get("MOSAIC_NUM_THREADS", "")
    if text and not (text.isdecimal() and int(text) > 0):
        raise UsageError(f"MOSAIC_NUM_THREADS={text!r} is not a positive number")
    return int(text or 0)


_FORCED_THREADS = _forced_threads()


def threads() -> int:
    """The number of threads that a kernel may use: ``MOSAIC_NUM_THREADS`` if it is set, else torch's number."""
    return _FORCED_THREADS or torch.get_num_threads()
