# SPDX-License-Identifier: Apache-2.0
"""Signals that end a command: one line and the right exit code, while torch is imported and later.

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

# torchrun passes Ctrl-C of a terminal on to processes that have had it already: for so long both are one request.
_SAME_SECONDS = 1.0


@contextmanager
def starting() -> Iterator[None]:
    """Import the package inside. In a command, a signal or a wrong setting ends the process with one line.

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
    """Where stdin, stdout or stderr is closed, open ``/dev/null`` instead.

    Otherwise the next file that is opened would get its number, and what is printed would end in that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the smallest free number, which is this one


@contextmanager
def raised() -> Iterator[None]:
    """Raise :class:`Interrupted` in the main thread at a signal that ends; a second one ends the process at once.

    A signal that is ignored, as SIGHUP under ``nohup``, stays so, and a handler that is not Python's stays, too.
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
