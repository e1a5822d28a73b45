# SPDX-License-Identifier: Apache-2.0
"""What every command shares: logging on stderr, errors to exit codes, devices, peak memory."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TextIO

import torch
from torch import distributed
from tqdm import tqdm

from mosaic_kernels import signals
from mosaic_kernels.errors import EnvironmentError_, ExitCode, MosaicError, UsageError

logger = logging.getLogger("mosaic_kernels")

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_command(body: Callable[[], int | None]) -> int:
    """Run the body of a command; errors become one line on stderr and an exit code.

    SIGTERM and SIGHUP act as Ctrl-C does. If stderr is closed or full, the command goes on. If stdout is closed or
    full, the exit code is not 0.

    Args:
        body: does the work and shows the result (:func:`show`); returns an exit code, or ``None`` for 0.

    Returns:
        The exit code: see :class:`mosaic_kernels.errors.ExitCode`. An unexpected exception is
        a bug and passes through with its traceback.
    """
    signals.open_standard_files()
    try:
        with _any_character(), signals.raised():
            return _flushed(_exit_code(body))
    except KeyboardInterrupt as stop:  # Ctrl-C or a signal while an error was being printed
        return _flushed(_stopped(stop))


def _flushed(code: int) -> int:
    """Flush stdout and stderr, and return the exit code: not 0 if the output on stdout is lost."""
    lost = _flush(sys.stdout)
    if lost is not None and code == ExitCode.OK:
        code = ExitCode.FAILED
        if not isinstance(lost, BrokenPipeError):  # no message if the reader of the pipe has ended
            _fail(f"what was printed on stdout is lost ({lost})", ExitCode.FAILED)
    _flush(sys.stderr)
    return code


def _exit_code(body: Callable[[], int | None]) -> int:
    try:
        with log_to_stderr():
            return int(body() or ExitCode.OK)
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a wrong option
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt as stop:
        return _stopped(stop)
    except MosaicError as error:
        return _fail(str(error), error.exit_code, error)
    except BrokenPipeError:  # the reader of our output went away (`| head`): end without noise
        return ExitCode.FAILED
    except (MemoryError, torch.OutOfMemoryError) as error:
        said = f"out of memory ({error}): lower --seqlen or --samples, or use --device cpu"
        return _fail(said, ExitCode.FAILED, error)
    except OSError as error:
        if error.errno in DISK_FULL:
            return _fail(f"disk full: {error}", ExitCode.ENVIRONMENT, error)
        return _fail(str(error), ExitCode.FAILED, error)


def _stopped(stop: KeyboardInterrupt) -> int:
    code = getattr(stop, "exit_code", ExitCode.INTERRUPTED)
    return _fail(str(stop) or "stopped by the user", code, label="interrupted")


def _fail(message: str, code: ExitCode, error: BaseException | None = None, label: str = "error") -> int:
    """Print an error and below it its notes, such as the command that resumes; return the exit code."""
    logger.debug("traceback", exc_info=True)
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed or full
        print("\n".join([f"{label}: {message}", *getattr(error, "__notes__", ())]), file=sys.stderr)  # noqa: T201
    return code


def show(text: str, kept: str | None = None) -> None:
    """Print the result of a command on stdout.

    Args:
        text: the result.
        kept: where the result is on disk, in words; ``None`` if it is not on disk.

    Raises:
        EnvironmentError_: stdout is closed or full, or its reader has ended; the message says where the result is.
        BrokenPipeError: the reader has ended and the result is not on disk.
    """
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "it is closed")
        print(text)  # noqa: T201
        sys.stdout.flush()
    except OSError as error:
        if kept is None and isinstance(error, BrokenPipeError):
            raise
        where = "it is lost" if kept is None else f"it is {kept}"
        raise EnvironmentError_(f"the result could not be printed on stdout ({error.strerror}): {where}") from error


def _flush(stream: TextIO | None) -> Exception | None:
    """Flush a standard stream. If that fails, drop its contents, because Python would fail on them when it ends."""
    try:
        if stream is not None:
            stream.flush()
    except (OSError, ValueError) as error:
        with contextlib.suppress(OSError, ValueError):
            number = stream.fileno() if stream is not None else 0
            if number in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        return error
    return None


@contextmanager
def _any_character() -> Iterator[None]:
    """Print characters that stdout or stderr cannot encode as escapes; otherwise they would raise an error."""
    before = []
    for stream in (sys.stdout, sys.stderr):
        errors = getattr(stream, "errors", None)
        if errors == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
            before.append((stream, errors))
    try:
        yield
    finally:
        for stream, errors in before:
            with contextlib.suppress(OSError, ValueError):
                stream.reconfigure(errors=errors)


@contextmanager
def log_to_stderr() -> Iterator[None]:
    """Show the package's log on stderr from ``MOSAIC_LOG_LEVEL`` (default ``info``) upwards.

    Raises:
        UsageError: ``MOSAIC_LOG_LEVEL`` is not a level.
    """
    name = os.environ.get("MOSAIC_LOG_LEVEL") or "info"
    level = logging.getLevelNamesMapping().get(name.upper())
    if level is None:
        raise UsageError(f"MOSAIC_LOG_LEVEL={name!r} is not a level; choose debug, info, warning or error")
    handler = _BesideBars(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def launched() -> bool:
    """True if torchrun started this process as one of several."""
    return distributed.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1


def leads() -> bool:
    """True for the one process that prints and shows progress; works before the processes have connected."""
    return not launched() or os.environ.get("RANK") == "0"


class _BesideBars(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes log lines above the progress bar of a terminal instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        with tqdm.external_write_mode(self.stream):
            super().emit(record)


def resolve_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the first CUDA device, else the CPU.

    Raises:
        UsageError: not the name of a device.
        EnvironmentError_: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name!r} is not a device; use auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EnvironmentError_(
            f"--device {name}: this machine shows {torch.cuda.device_count()} CUDA devices; "
            "check the driver and CUDA_VISIBLE_DEVICES, or use --device cpu"
        )
    return device


@contextmanager
def current_device(device: torch.device) -> Iterator[None]:
    """Make ``device`` the current one of CUDA inside, where events are recorded and Triton's kernels start."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield


def peak_memory_bytes() -> dict[str, int | None]:
    """Peak memory of this process so far, bytes: ``host``, and ``device`` (``None`` without CUDA)."""
    device = None
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        device = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "device": device}
