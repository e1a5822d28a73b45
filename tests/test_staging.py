# SPDX-License-Identifier: Apache-2.0
"""Work in progress beside the output directory: who may have made it, its modes, and its lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import mosaic_kernels as mk
from mosaic_kernels.checkpoint import lock, staging
from mosaic_kernels.checkpoint.directory import OutputDirectory
from mosaic_kernels.checkpoint.lock import Lock
from mosaic_kernels.errors import Interrupted, UsageError
from mosaic_kernels.prune import pipeline

WISHES: tuple[dict[str, bool], ...] = ({}, {"resume": True}, {"overwrite": True})
BESIDE = (".out.partial", ".out.journal", ".out.previous", ".out.lock")


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder of somebody else, to which planted links lead."""
    folder = tmp_path / "theirs"
    (folder / "journal").mkdir(parents=True)
    (folder / "journal" / "block-00000.safetensors").write_text("precious")
    return folder


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def _tree(folder: Path) -> dict[str, tuple[int, float]]:
    return {str(path): (path.lstat().st_ino, path.lstat().st_mtime) for path in folder.rglob("*")}


def _refused(path: Path, words: str, options: dict[str, bool]) -> None:
    before = _tree(path.parent)
    with pytest.raises(UsageError, match=words):
        OutputDirectory(path, **options)
    assert _tree(path.parent) == before


def _interrupted(path: Path) -> OutputDirectory:
    output = OutputDirectory(path)
    (output.journal / "block-00000.safetensors").write_text("work")
    output.release()
    return output


@pytest.mark.parametrize("options", WISHES)
@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("kind", ["link", "broken link", "file", "folder", "pipe"])
def test_what_somebody_else_put_there(
    tmp_path: Path, theirs: Path, name: str, kind: str, options: dict[str, bool]
) -> None:
    place = tmp_path / name
    if kind == "folder":
        theirs.rename(place)
    elif kind == "file":
        place.write_text("mine")
    elif kind == "pipe":
        os.mkfifo(place)
    else:
        place.symlink_to(theirs if kind == "link" else "nowhere")
    _refused(tmp_path / "out", f"{name}.*(in the way|is not replaced)", options)


@pytest.mark.parametrize("options", WISHES)
def test_a_journal_that_is_a_link(tmp_path: Path, theirs: Path, options: dict[str, bool]) -> None:
    output = OutputDirectory(tmp_path / "out")
    output.release()
    output.journal.rmdir()
    output.journal.symlink_to(theirs / "journal")
    _refused(output.path, "journal is in the way: it is a link", options)


@pytest.mark.parametrize("options", WISHES)
@pytest.mark.parametrize("name", ["block-00001.safetensors", "run.json", "plan.part"])
def test_a_file_of_the_journal_that_is_a_link(
    tmp_path: Path, theirs: Path, name: str, options: dict[str, bool]
) -> None:
    output = _interrupted(tmp_path / "out")
    (output.journal / name).symlink_to(theirs / "journal" / "block-00000.safetensors")
    _refused(output.path, f"{name} is not a file that a run of this user wrote", options)


def test_links_in_staging_are_deleted_and_not_followed(tmp_path: Path, theirs: Path) -> None:
    output = _interrupted(tmp_path / "out")
    (output.staging / "folder").symlink_to(theirs)
    (output.staging / "config.json").symlink_to(theirs / "journal" / "block-00000.safetensors")
    again = OutputDirectory(output.path, resume=True)
    (again.staging / "config.json").write_text("new")
    again.publish()
    assert (theirs / "journal" / "block-00000.safetensors").read_text() == "precious"
    assert not (output.path / "config.json").is_symlink()


def test_discard_deletes_only_what_is_marked(tmp_path: Path, theirs: Path) -> None:
    output = OutputDirectory(tmp_path / "out")
    output.staging.rename(tmp_path / "away")
    theirs.rename(output.staging)
    output.discard()
    assert (output.journal / "block-00000.safetensors").read_text() == "precious"
    output = OutputDirectory(tmp_path / "other")
    (output.staging / staging.MARKER).unlink()
    output.discard()
    assert output.journal.exists()


@pytest.mark.parametrize("name", [".out.partial", ".out.lock", ".out.partial/journal/block-00000.safetensors"])
def test_what_belongs_to_another_user(tmp_path: Path, name: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may give files away")
    output = _interrupted(tmp_path / "out")
    if name == ".out.lock":
        (tmp_path / name).touch()  # as kill -9 leaves it
    os.chown(tmp_path / name, 65534, 65534)
    _refused(output.path, f"{name}.*(another user|this user)", {"resume": True})


def test_files_of_root_on_a_server_that_has_no_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS gives root's files to nobody: what is new there has the same owner as what is old."""
    output = _interrupted(tmp_path / "out")
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert any(OutputDirectory(output.path, resume=True).journal.iterdir())


def test_a_run_that_was_killed_before_its_marker_was_written(tmp_path: Path) -> None:
    stage = tmp_path / ".out.partial"
    stage.mkdir()
    OutputDirectory(tmp_path / "out").publish()
    stage.mkdir()
    (stage / staging.MARKER).touch()
    OutputDirectory(tmp_path / "out", overwrite=True).publish()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077, 0o027])
def test_modes_are_those_of_the_umask(tmp_path: Path, umask: Callable[[int], int], mask: int) -> None:
    umask(mask)
    output = OutputDirectory(tmp_path / "out")
    assert stat.S_IMODE(output.staging.stat().st_mode) == 0o700
    (output.staging / "deep").mkdir(mode=0o700)
    for name, mode in (("model.safetensors", 0o600), ("deep/config.json", 0o644), ("run.sh", 0o777)):
        (output.staging / name).write_text("x")
        (output.staging / name).chmod(mode)
    output.publish()
    for path in (output.path, *output.path.rglob("*")):
        whole = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == whole & ~mask, path


def test_a_group_is_handed_on(tmp_path: Path, umask: Callable[[int], int]) -> None:
    umask(0o002)
    tmp_path.chmod(0o2775)
    output = OutputDirectory(tmp_path / "out")
    (output.staging / "deep").mkdir()
    (output.staging / "deep" / "file").touch()
    output.publish()
    assert stat.S_IMODE((output.path / "deep").stat().st_mode) == 0o2775
    assert stat.S_IMODE(output.path.stat().st_mode) == 0o2775


def test_a_resumed_run_closes_its_folder_again(tmp_path: Path) -> None:
    output = _interrupted(tmp_path / "out")
    output.staging.chmod(0o755)
    assert stat.S_IMODE(OutputDirectory(output.path, resume=True).staging.stat().st_mode) == 0o700


def test_a_lock_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first = Lock(path, "busy")
    with pytest.raises(UsageError, match="busy"):
        Lock(path, "busy")
    first.release()
    assert not path.exists()
    path.touch()  # as kill -9 leaves it
    del first
    second = Lock(path, "busy")
    del second  # forgotten, for example after an error
    assert not path.exists()


def test_a_lock_whose_file_was_removed_while_it_was_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder ends between our open() and our flock(): we would hold a file that nobody else can find."""
    path, real, held = tmp_path / "lock", fcntl.flock, [Lock(tmp_path / "lock", "busy")]

    def late(handle: int, how: int) -> None:
        if held:
            held.pop().release()
        real(handle, how)

    monkeypatch.setattr(lock.fcntl, "flock", late)
    ours = Lock(path, "busy")
    assert path.exists()
    with pytest.raises(UsageError, match="busy"):
        Lock(path, "busy")
    ours.release()


def test_the_lock_holds_until_the_result_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = OutputDirectory(tmp_path / "out")
    (output.staging / "config.json").write_text("new")
    steps = []

    def refusing(inner: Callable[..., object]) -> Callable[..., object]:
        def step(*args: object) -> object:
            with pytest.raises(UsageError, match="another run"):
                OutputDirectory(output.path, resume=True)
            steps.append(inner)
            return inner(*args)

        return step

    monkeypatch.setattr(Path, "rename", refusing(Path.rename))
    monkeypatch.setattr(os, "fsync", refusing(os.fsync))
    output.publish()
    assert len(steps) > 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_filesystem_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    OutputDirectory(tmp_path / "out").publish()
    assert "no locks on this filesystem" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_that_failed_holds_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook keeps the last error, and with it everything that the run held."""

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_run", stop)
    with pytest.raises(Interrupted) as kept:
        mk.prune("any/model", output_dir=tmp_path / "out")
    OutputDirectory(tmp_path / "out", resume=True).publish()
    assert kept.value.__traceback__ is not None


def test_of_two_starts_at_one_instant_one_is_refused(tmp_path: Path) -> None:
    """Threads stand for processes: a lock of one open file excludes all others, in this process too."""
    rounds, both = range(200), threading.Barrier(2, timeout=60)
    won: tuple[list[int], list[int]] = ([], [])

    def start(number: int) -> None:
        for turn in rounds:
            both.wait()
            held = None
            with contextlib.suppress(UsageError):  # another run is writing there; any other error fails the test
                held = OutputDirectory(tmp_path / str(turn))
                won[number].append(turn)
            both.wait()
            if held is not None:
                held.release()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(start, range(2)))
    finally:
        sys.setswitchinterval(interval)
    assert sorted([*won[0], *won[1]]) == list(rounds)
