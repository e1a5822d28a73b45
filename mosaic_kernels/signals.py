# SPDX-License-Identifier: Apache-2.0
"""Makes signals end a command with one line and the right exit code, also while torch is being imported.

Nothing here imports torch. Only commands change how a signal is handled; a program that imports the package keeps its
own handlers.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from mosaic_kernels.errors import ExitCode, Interrupted, MosaicError

ENDING = {
    signal.SIGINT: ExitCode.INTERRUPTED,
    signal.SIGTERM: ExitCode.TERMINATED,
    signal.SIGHUP: ExitCode.HUNG_UP,
}
_COMMANDS = ("mosaic-prune", "mosaic-evaluate")

# torchrun passes a terminal's Ctrl-C on to processes that already had it. For this many seconds both are one request.
_SAME_SECONDS = 1.0


@contextmanager
def starting() -> Iterator[None]:
    """Context in which the package is imported. In a command, a signal or wrong setting ends the process with one line.

    ``python -m mosaic_kernels.prune`` imports the package before any line of the command runs.
    """
    if not _is_command():
        yield
        return
    open_standard_files()
    for number in ENDING:
        if _may_replace(number):
            signal.signal(number, _end_at_once)
    try:
        yield
    except MosaicError as error:
        _write(f"error: {error}\n")
        raise SystemExit(int(error.exit_code)) from None


def _is_command() -> bool:
    """True while Python looks for a module of this package to run, and in the scripts that pip installs."""
    if threading.current_thread() is not threading.main_thread():
        return False
    first = (getattr(sys, "argv", None) or [""])[0]
    if first != "-m":
        return Path(first).name in _COMMANDS
    words = sys.orig_argv
    modules = [after if word == "-m" else word[2:] for word, after in zip(words, [*words[1:], ""], strict=True)]
    flags = [word.startswith("-m") for word in words]
    return any(flag and name.partition(".")[0] == "mosaic_kernels" for flag, name in zip(flags, modules, strict=True))


def open_standard_files() -> None:
    """If stdin, stdout or stderr is closed, open ``/dev/null`` instead.

    Otherwise the next file that is opened would get that descriptor, and printed text would end up in this file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the smallest free number, which is this one


@contextmanager
def raised() -> Iterator[None]:
    """Raise :class:`Interrupted` in the main thread at a signal that ends; a second signal ends the process at once.

    Signals that are ignored, such as SIGHUP under ``nohup``, stay ignored. Handlers that are not Python's stay, too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING if _may_replace(number)}
    handler = _raise_once()
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _raise_once() -> Callable[[int, FrameType | None], Any]:
    first: float | None = None

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if first is None:
            first = time.monotonic()
            raise Interrupted(f"stopped by {_word(number)}", ENDING[signal.Signals(number)])
        if time.monotonic() - first > _SAME_SECONDS:
            _end_at_once(number, frame)

    return handle


def _may_replace(number: signal.Signals) -> bool:
    return signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler, _end_at_once)


def _end_at_once(number: int, frame: FrameType | None) -> None:
    _write(f"interrupted: stopped by {_word(number)}\n")
    os._exit(128 + number)


def _word(number: int) -> str:
    return "the user" if number == signal.SIGINT else signal.Signals(number).name


def _write(line: str) -> None:
    """Write to stderr past Python's buffer, which the interrupted code may be using."""
    with contextlib.suppress(OSError):
        os.write(2, line.encode(errors="backslashreplace"))
