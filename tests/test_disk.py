# SPDX-License-Identifier: Apache-2.0
"""Full disks and forbidden places end in errors that say what to do."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mosaic_kernels.checkpoint.disk import require_space, write_errors
from mosaic_kernels.errors import EnvironmentError_


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disks_are_environment_errors(tmp_path: Path, code: int) -> None:
    with (
        pytest.raises(EnvironmentError_, match=r"disk full while writing .*out.*MiB free"),
        write_errors(tmp_path / "out"),
    ):
        raise OSError(code, os.strerror(code))


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="input/output"), write_errors(tmp_path):
        raise OSError(errno.EIO, "input/output error")


def test_forbidden_places_are_environment_errors(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentError_, match="no permission to write /locked/out"), write_errors(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied", "/locked/out")


def test_too_little_space_is_known_before(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(EnvironmentError_, match=r"needs \d+ MiB and \d+ MiB are free: free \d+ MiB"):
        require_space(tmp_path, 1 << 62)


def test_safetensors_on_a_full_disk(tmp_path: Path) -> None:
    program = f"""
import torch
from safetensors.torch import save_file
from mosaic_kernels.checkpoint.directory import write_errors
from mosaic_kernels.cli import run_command
def body():
    with write_errors({str(tmp_path)!r}):
        save_file({{"a": torch.zeros(1 << 20)}}, {str(tmp_path / "a.safetensors")!r})
raise SystemExit(run_command(body))
"""
    limit = (1 << 20, 1 << 20)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 3, done.stderr
    assert "disk full while writing" in done.stderr


def test_read_only_disks_are_environment_errors(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentError_, match="no permission to write /cd/out"), write_errors(tmp_path):
        raise OSError(errno.EROFS, "Read-only file system", "/cd/out")
