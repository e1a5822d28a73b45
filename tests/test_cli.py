# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import errno
import logging
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mosaic_kernels.cli import peak_memory_bytes, resolve_device, run_command
from mosaic_kernels.errors import EnvironmentError_, Interrupted, ModelLoadError, UsageError


def _raise(error: BaseException) -> Any:
    def body() -> None:
        raise error

    return body


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ModelLoadError("no such directory"), 1, "error: no such directory\n"),
        (UsageError("bad option"), 2, "error: bad option\n"),
        (EnvironmentError_("disk full"), 3, "error: disk full\n"),
        (Interrupted("resume with X"), 130, "interrupted: resume with X\n"),
        (KeyboardInterrupt(), 130, "interrupted: stopped by the user\n"),
        (OSError(errno.ENOSPC, "No space left on device"), 3, "disk full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 3, "disk full"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), 1, "Permission denied: 'out'"),
        (MemoryError("sixty gigabytes"), 1, "out of memory (sixty gigabytes)"),
        (torch.OutOfMemoryError("device"), 1, "out of memory (device)"),
    ],
)
def test_errors_become_exit_codes(error: BaseException, code: int, said: str, capsys: Any) -> None:
    assert run_command(_raise(error)) == code
    out, err = capsys.readouterr()
    assert said in err
    assert not out
    assert "Traceback" not in err


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(_raise(ZeroDivisionError()))


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (1, 1)])
def test_result_is_the_exit_code(result: int | None, code: int) -> None:
    assert run_command(lambda: result) == code


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["--wrong"], 2)])
def test_argparse_exits(words: list[str], code: int, capsys: Any) -> None:
    parser = argparse.ArgumentParser()
    assert run_command(lambda: parser.parse_args(words) and None) == code
    assert any(capsys.readouterr())


@pytest.mark.parametrize(("level", "shown"), [(None, "info"), ("warning", ""), ("DEBUG", "debuginfo")])
def test_log_level(level: str | None, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv("MOSAIC_LOG_LEVEL", raising=False)
    if level is not None:
        monkeypatch.setenv("MOSAIC_LOG_LEVEL", level)

    def body() -> None:
        logger = logging.getLogger("mosaic_kernels.some_part")
        logger.debug("debug")
        logger.info("info")

    for _ in range(2):  # a second command in one process does not log twice
        assert run_command(body) == 0
        out, err = capsys.readouterr()
        assert err.replace("\n", "") == shown
        assert not out


def test_unknown_log_level_is_a_usage_error(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("MOSAIC_LOG_LEVEL", "chatty")
    assert run_command(lambda: None) == 2
    assert "MOSAIC_LOG_LEVEL='chatty'" in capsys.readouterr().err


def test_reader_that_goes_away_makes_no_noise() -> None:
    program = (
        "from mosaic_kernels.cli import run_command\n"
        "import sys\n"
        "sys.exit(run_command(lambda: [print('x' * 100) for _ in range(10000)] and None))\n"
    )
    command = f'{sys.executable} -W ignore -c "{program}" | head -n 1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert not done.stderr


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "meta"):
        with pytest.raises(UsageError, match=name):
            resolve_device(name)
    with pytest.raises(EnvironmentError_, match="CUDA devices"):
        resolve_device("cuda:99")


def test_peak_memory_is_in_bytes() -> None:
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    peak = peak_memory_bytes()["host"]
    assert peak is not None
    # the kernel rounds the two counters differently by up to 64 pages for each thread
    assert resident - (64 << 20) <= peak < 100 * resident
