# SPDX-License-Identifier: Apache-2.0
"""transformers draws progress bars into log files too; ours go to terminals only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bars_on_terminals_only() -> Iterator[None]:
    """Keep transformers' bars away while the block runs, unless stderr is a terminal."""
    from transformers.utils import logging

    if sys.stderr.isatty() or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
