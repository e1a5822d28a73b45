# SPDX-License-Identifier: Apache-2.0
"""Hides the progress bars of transformers, which appear in log files too; this package shows its own progress."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_bars_of_transformers(*, downloads: bool = False) -> Iterator[None]:
    """Hide transformers' bars while the block runs, so that a terminal shows only one bar.

    Args:
        downloads: files may be downloaded. Only transformers knows the progress of a download, so its bars stay on a
            terminal.
    """
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled() or (downloads and sys.stderr.isatty()):
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
