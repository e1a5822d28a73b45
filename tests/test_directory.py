# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from mosaic_kernels.checkpoint.directory import require_space, write_errors
from mosaic_kernels.checkpoint.writer import OutputDirectory
from mosaic_kernels.errors import EnvironmentError_, UsageError


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An output directory with something in it."""
    path = tmp_path / "out"
    path.mkdir()
    (path / "config.json").write_text("old")
    return path


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_nothing_appears_before_publish(tmp_path: Path) -> None:
    output = OutputDirectory(tmp_path / "deep" / "out")
    (output.staging / "config.json").write_text("new")
    (output.journal / "block-0").write_text("x")
    assert not output.path.exists()
    output.publish()
    assert _names(output.path) == {"config.json"}
    assert _names(output.path.parent) == {"out"}


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    output = OutputDirectory(tmp_path / "out")
    (output.staging / "config.json").write_text("new")
    output.publish()
    assert _names(tmp_path / "out") == {"config.json"}


def test_files_are_refused_without_leave(old: Path) -> None:
    with pytest.raises(UsageError, match=r"not empty.*--overwrite.*--resume"):
        OutputDirectory(old)
    assert _names(old.parent) == {"out"}


def test_files_that_appear_meanwhile_are_not_replaced(tmp_path: Path) -> None:
    output = OutputDirectory(tmp_path / "out")
    output.path.mkdir()
    (output.path / "mine").write_text("x")
    with pytest.raises(UsageError, match="filled by something else"):
        output.publish()
    assert _names(output.path) == {"mine"}
    assert output.staging.exists()


def test_overwrite_keeps_the_old_until_the_end(old: Path) -> None:
    output = OutputDirectory(old, overwrite=True)
    (output.staging / "config.json").write_text("new")
    assert (old / "config.json").read_text() == "old"
    output.publish()
    assert (old / "config.json").read_text() == "new"
    assert _names(old.parent) == {"out"}


def test_discard_touches_nothing_else(old: Path) -> None:
    output = OutputDirectory(old, overwrite=True)
    (output.staging / "config.json").write_text("new")
    output.discard()
    assert (old / "config.json").read_text() == "old"
    assert _names(old.parent) == {"out"}


@pytest.mark.parametrize("resume", [False, True])
def test_what_an_interrupted_run_left(tmp_path: Path, resume: bool) -> None:
    (OutputDirectory(tmp_path / "out").journal / "block-0").write_text("done")
    output = OutputDirectory(tmp_path / "out", resume=resume, overwrite=not resume)
    assert _names(output.journal) == ({"block-0"} if resume else set())


def test_resume_without_an_interrupted_run_starts_afresh(tmp_path: Path) -> None:
    output = OutputDirectory(tmp_path / "out", resume=True)
    output.publish()
    assert output.path.is_dir()


def test_a_failed_rename_restores_the_old(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = OutputDirectory(old, overwrite=True)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self == output.staging:
            raise OSError(errno.EIO, "input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="input/output"):
        output.publish()
    assert (old / "config.json").read_text() == "old"


def test_a_replacement_cut_off_between_its_renames_is_undone(old: Path) -> None:
    old.rename(old.with_name(".out.previous"))  # where kill -9 would leave it
    with pytest.raises(UsageError, match="not empty"):
        OutputDirectory(OutputDirectory(old, resume=True).path)
    assert (old / "config.json").read_text() == "old"


def test_places_that_hold_other_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        OutputDirectory(tmp_path / "file", overwrite=True)
    with pytest.raises(UsageError, match="mount point"):
        OutputDirectory("/proc", overwrite=True)
    (tmp_path / "work" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "deep")
    for place in (".", "..", "~"):
        with pytest.raises(UsageError, match="other work"):
            OutputDirectory(place, overwrite=True)
    (tmp_path / "clone" / ".git").mkdir(parents=True)
    with pytest.raises(UsageError, match="other work"):
        OutputDirectory(tmp_path / "clone", overwrite=True)


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    output = OutputDirectory(tmp_path / "link")
    (output.staging / "config.json").write_text("new")
    output.publish()
    assert (tmp_path / "link").is_symlink()
    assert _names(tmp_path / "disk") == {"config.json"}


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


def test_two_runs_do_not_share_a_directory(tmp_path: Path) -> None:
    first = OutputDirectory(tmp_path / "out")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(UsageError, match="another run is writing"):
            OutputDirectory(tmp_path / "out", **options)
    (first.staging / "config.json").write_text("{}")
    first.publish()
    assert (tmp_path / "out" / "config.json").exists()
    OutputDirectory(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}])
def test_finished_blocks_are_not_dropped_by_repeating_the_command(tmp_path: Path, options: dict[str, bool]) -> None:
    (OutputDirectory(tmp_path / "out").journal / "block-00000.safetensors").write_text("work")
    with pytest.raises(UsageError, match="--resume goes on"):
        OutputDirectory(tmp_path / "out")
    assert any(OutputDirectory(tmp_path / "out", **options).journal.iterdir()) == ("resume" in options)
