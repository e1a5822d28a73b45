# SPDX-License-Identifier: Apache-2.0
"""Exceptions of the package, each with the exit code its command ends with."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    ENVIRONMENT = 3
    HUNG_UP = 129  # 128 + SIGHUP, as shells report it
    INTERRUPTED = 130
    TERMINATED = 143


class MosaicError(Exception):
    """Base of every error this package raises on purpose: what, where, what to do."""

    exit_code = ExitCode.FAILED


class UsageError(MosaicError, ValueError):
    """An option or argument is invalid, alone or together with another."""

    exit_code = ExitCode.USAGE


class UnsupportedModelError(MosaicError):
    """The model's architecture has no adapter, or it is not a causal language model."""


class ModelLoadError(MosaicError):
    """A model directory is missing, incomplete or corrupt."""


class CalibrationError(MosaicError):
    """The calibration text is missing, unreadable or too short."""


class TextFileError(UsageError, CalibrationError):
    """A text file that an option names is missing, cannot be opened, or is no file of texts; exit code 2."""


class NonFiniteError(MosaicError):
    """A weight or an activation holds NaN or Inf."""


class FormatError(MosaicError):
    """A packed checkpoint contradicts itself or is of an unknown version."""


class KernelError(MosaicError, ValueError):
    """An operator was called with arguments it cannot take."""


class BackendError(MosaicError, RuntimeError):
    """A backend that was asked for cannot run here; the message says why."""

    exit_code = ExitCode.ENVIRONMENT


class EnvironmentError_(MosaicError):  # the trailing underscore keeps the builtin's name free
    """The machine lacks something: disk space, a device, the network."""

    exit_code = ExitCode.ENVIRONMENT


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a signal has stopped the run; the message holds the command that resumes it.

    It is a ``KeyboardInterrupt`` and no ``MosaicError``, so that a loop over runs that catches errors ends here.

    Attributes:
        exit_code: the command's exit code: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP.
    """

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.INTERRUPTED) -> None:
        super().__init__(message)
        self.exit_code = exit_code
