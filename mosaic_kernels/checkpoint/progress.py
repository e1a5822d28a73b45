# SPDX-License-Identifier: Apache-2.0
"""transformers draws progress bars of its own, into log files too; ours says what is under way."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_bars_of_transformers(*, downloads: bool = False) -> Iterator[None]:
    """Keep transformers' bars away while the block runs: a terminal shows one bar.

    Args:
        downloads: files may be fetched, of which only transformers knows how far it is: a terminal shows that.
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
