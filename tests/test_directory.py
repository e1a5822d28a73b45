# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mosaic_kernels.checkpoint import directory, manifest, staging
from mosaic_kernels.checkpoint.writer import OutputDirectory
from mosaic_kernels.errors import EnvironmentError_, UsageError

RESULT = {"config.json", manifest.FILE_NAME}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A directory that an earlier run has finished."""
    output = OutputDirectory(tmp_path / "out")
    (output.staging / "config.json").write_text("old")
    output.publish()
    return output.path


def _names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def _finished(path: Path, **options: bool) -> OutputDirectory:
    """A run that has written everything and one block, and not published yet."""
    output = OutputDirectory(path, **options)
    (output.staging / "config.json").write_text("new")
    (output.journal / "block-00000.safetensors").write_text("work")
    return output


def test_nothing_appears_before_publish(tmp_path: Path) -> None:
    output = OutputDirectory(tmp_path / "deep" / "out")
    (output.staging / "config.json").write_text("new")
    (output.journal / "block-0").write_text("x")
    assert not output.path.exists()
    output.publish()
    assert _names(output.path) == RESULT
    assert _names(output.path.parent) == {"out"}


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    output = OutputDirectory(tmp_path / "out")
    (output.staging / "config.json").write_text("new")
    output.publish()
    assert _names(tmp_path / "out") == RESULT


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


@contextlib.contextmanager
def _failing(output: OutputDirectory, code: int, error: type[BaseException] = OSError) -> Iterator[None]:
    """The rename that puts the result in its place fails."""
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self == output.staging:
            raise error(code, os.strerror(code))
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        yield


@pytest.mark.parametrize("code", [errno.EIO, errno.EXDEV, errno.ENOSPC, errno.EACCES])
def test_a_failed_rename_leaves_everything(old: Path, code: int) -> None:
    output = _finished(old, overwrite=True)
    with (
        _failing(output, code),
        pytest.raises(EnvironmentError_, match=r"finished but not at .*/out: it is in .*/\.out\.partial.*--resume"),
    ):
        output.publish()
    assert (old / "config.json").read_text() == "old"
    assert _names(output.journal) == {"block-00000.safetensors"}
    assert (output.staging / "config.json").read_text() == "new"
    output.release()
    with pytest.raises(UsageError, match="not empty"):
        OutputDirectory(old)
    assert (output.staging / "config.json").read_text() == "new"
    again = OutputDirectory(old, resume=True)
    assert _names(again.journal) == {"block-00000.safetensors"}
    (again.staging / "config.json").write_text("newer")
    again.publish()
    assert (old / "config.json").read_text() == "newer"
    assert _names(old.parent) == {"out"}


def test_ctrl_c_in_the_last_step(tmp_path: Path) -> None:
    output = _finished(tmp_path / "out")
    with _failing(output, errno.EINTR, KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        output.publish()
    assert _names(output.journal) == {"block-00000.safetensors"}


def test_a_finished_result_is_not_dropped_by_repeating_the_command(tmp_path: Path) -> None:
    output = OutputDirectory(tmp_path / "out")  # nothing was removed from the model: no blocks
    (output.staging / "config.json").write_text("new")
    with _failing(output, errno.EIO), pytest.raises(EnvironmentError_):
        output.publish()
    output.release()
    with pytest.raises(UsageError, match="has left its result"):
        OutputDirectory(output.path)
    assert (output.staging / "config.json").read_text() == "new"
    assert _names(OutputDirectory(output.path, overwrite=True).staging) == {"journal", staging.MARKER}


class Killed(BaseException):
    """Stands for ``kill -9``: nothing that the process would do afterwards happens."""


CHANGES_OF_THE_DISK = (
    (staging, "apply_umask"), (manifest, "write"), (staging, "mark"), (directory, "_sync"),
    (Path, "rename"), (Path, "unlink"), (Path, "rmdir"), (Path, "chmod"), (shutil, "rmtree"),
)  # fmt: skip


def _killed_before(patch: pytest.MonkeyPatch, count: int) -> None:
    """Change number ``count`` of the disk does not happen, and no later one."""
    left = [count]

    def watch(owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def step(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return inner(*args, **options)

        patch.setattr(owner, name, step)

    for owner, name in CHANGES_OF_THE_DISK:
        watch(owner, name)


@pytest.mark.parametrize("again", ["resume", "overwrite", "plain"])
@pytest.mark.parametrize("replaces", [False, True])
def test_killed_at_any_step_of_publish(
    tmp_path: Path, replaces: bool, again: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the old result nor the finished block is lost, and the next run goes on."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # the slowest part, and without effect on what is seen here
    for count in range(100):
        path = tmp_path / str(count) / "out"
        if replaces:
            _finished(path).publish()
            old = (path / manifest.FILE_NAME).read_bytes()
        output = _finished(path, overwrite=True)
        (output.staging / "extra").mkdir()
        (output.staging / "extra" / "licence").write_text("newer than the old result")
        with pytest.MonkeyPatch.context() as patch:
            _killed_before(patch, count)
            try:
                output.publish()
                break  # there are no more than `count` changes
            except Killed:
                pass
        output.release()
        if again == "plain":
            with contextlib.suppress(UsageError):  # a result is there already, or blocks are
                OutputDirectory(path).release()
            output = OutputDirectory(path, resume=True)
        else:
            output = OutputDirectory(path, resume=again == "resume", overwrite=again == "overwrite")
        published = (path / "extra" / "licence").exists()
        if not published:
            assert path.exists() == replaces
            assert not replaces or (path / manifest.FILE_NAME).read_bytes() == old
            assert _names(output.journal) == (set() if again == "overwrite" else {"block-00000.safetensors"})
        assert not replaces or manifest.differences(path, thorough=True) == []
        (output.staging / "config.json").write_text("newest")
        output.publish()
        assert (path / "config.json").read_text() == "newest"
        assert _names(path) == RESULT
        assert _names(path.parent) == {"out"}
    assert count > len(CHANGES_OF_THE_DISK)
    assert (path / "extra" / "licence").exists()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_filesystem_that_cannot_sync_folders(old: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    sync = os.fsync

    def refuse(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").is_dir():
            raise OSError(code, os.strerror(code))
        sync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    _finished(old, overwrite=True).publish()
    assert (old / "config.json").read_text() == "new"


def test_what_was_put_into_the_old_directory_meanwhile(old: Path) -> None:
    output = _finished(old, overwrite=True)
    (old / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match=r"notes\.txt.*finished but not at"):
        output.publish()
    assert (old / "notes.txt").exists()
    assert _names(output.journal) == {"block-00000.safetensors"}


def test_what_was_put_into_the_old_directory_in_the_last_moment(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = _finished(old, overwrite=True)
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        if self == old:
            (old / "notes.txt").write_text("x")
        return rename(self, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", late)
        output.publish()
    assert (old.parent / ".out.previous" / "notes.txt").read_text() == "x"
    assert ".out.previous holds files that mosaic-kernels did not write" in caplog.text


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}])
def test_an_old_result_is_kept_where_somebody_else_took_its_place(old: Path, options: dict[str, bool]) -> None:
    old.rename(old.with_name(".out.previous"))  # where kill -9 would leave it
    old.mkdir()
    (old / "notes.txt").write_text("x")
    with pytest.raises(UsageError, match=r"notes\.txt"):
        OutputDirectory(old, **options)
    assert _names(old.with_name(".out.previous")) == RESULT
    assert _names(old) == {"notes.txt"}


def test_a_journal_without_its_staging_folder_is_not_given_to_another(tmp_path: Path) -> None:
    output = _finished(tmp_path / "out")
    staging.mark(output.journal)
    output.journal.rename(tmp_path / ".out.journal")
    staging.unmark(output.staging)  # a folder of somebody else, of the same name
    output.release()
    with pytest.raises(UsageError, match=r"\.out\.partial is not replaced"):
        OutputDirectory(output.path, resume=True)
    assert _names(output.staging) == {"config.json"}


def test_staging_exchanged_meanwhile(tmp_path: Path) -> None:
    output = _finished(tmp_path / "out")
    output.staging.rename(tmp_path / "taken")
    output.staging.symlink_to(tmp_path / "taken")
    with pytest.raises(UsageError, match="exchanged"):
        output.publish()
    assert not output.path.exists()


def test_unfinished_files_of_a_killed_run_are_not_published(tmp_path: Path) -> None:
    output = _finished(tmp_path / "out")
    (output.staging / ".tmpabc").write_text("half")
    (output.staging / "folder").mkdir()
    (output.journal / "block-00001.part").write_text("half")
    output.release()
    again = OutputDirectory(output.path, resume=True)
    assert _names(again.staging) == {"journal", staging.MARKER}
    assert _names(again.journal) == {"block-00000.safetensors"}


def test_folders_made_for_nothing_go_too(tmp_path: Path) -> None:
    OutputDirectory(tmp_path / "a" / "b" / "out").discard()
    assert _names(tmp_path) == set()


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    output = OutputDirectory(tmp_path / "link")
    (output.staging / "config.json").write_text("new")
    output.publish()
    assert (tmp_path / "link").is_symlink()
    assert _names(tmp_path / "disk") == RESULT


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
