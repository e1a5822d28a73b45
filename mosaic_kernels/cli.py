# SPDX-License-Identifier: Apache-2.0
"""What every command shares: logging on stderr, errors to exit codes, devices, peak memory."""

from __future__ import annotations

import errno
import logging
import os
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import distributed
from tqdm import tqdm

from mosaic_kernels.errors import EnvironmentError_, ExitCode, Interrupted, MosaicError, UsageError

logger = logging.getLogger("mosaic_kernels")

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_command(body: Callable[[], int | None]) -> int:
    """Run the body of a command; errors become one line on stderr and an exit code.

    Args:
        body: does the work and prints the result; returns an exit code, or ``None`` for 0.

    Returns:
        The exit code: see :class:`mosaic_kernels.errors.ExitCode`. An exception that is nobody's
        known failure is a bug and passes through with its traceback.
    """
    try:
        with log_to_stderr():
            code = int(body() or ExitCode.OK)
            sys.stdout.flush()
            return code
    except SystemExit as stop:  # argparse: 0 after --help, 2 after a wrong option
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Interrupted as stop:
        return _fail(str(stop), stop.exit_code, "interrupted")
    except KeyboardInterrupt:
        return _fail("stopped by the user", ExitCode.INTERRUPTED, "interrupted")
    except MosaicError as error:
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:  # the reader of our output went away (`| head`): end without noise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return ExitCode.FAILED
    except (MemoryError, torch.OutOfMemoryError) as error:
        return _fail(f"out of memory ({error}): lower --seqlen or --samples, or use --device cpu", ExitCode.FAILED)
    except OSError as error:
        if error.errno in DISK_FULL:
            return _fail(f"disk full: {error}", ExitCode.ENVIRONMENT)
        return _fail(str(error), ExitCode.FAILED)


def _fail(message: str, code: ExitCode, label: str = "error") -> int:
    logger.debug("traceback", exc_info=True)
    print(f"{label}: {message}", file=sys.stderr)  # noqa: T201
    return code


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
