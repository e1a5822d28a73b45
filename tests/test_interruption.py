# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and full disks: finished blocks stay, nothing looks finished, and the printed command goes on."""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prune_runs import QUICK, Run, digests, require_failure, stopped_at, watched
from small_models import random_model

from mosaic_kernels.prune import pipeline
from mosaic_kernels.prune.__main__ import main

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount, or resize, a disk of the given size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: str) -> Path:
        how = "remount," if place.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{how}size={size}", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a small disk; test_files_that_may_not_grow covers the rest")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(("size", "solved"), [("64k", 1), ("256k", 3)])
def test_a_full_disk_and_on_when_there_is_space(
    run: Run, dense_dir: Path, small_disk: Callable[[str], Path], size: str, solved: int
) -> None:
    """64 KiB hold the journal of one block, 256 KiB that of all three but not the model."""
    out = small_disk(size) / "out"
    command = (dense_dir, "--output-dir", out, "--category", "unstructured", *QUICK)
    result = run(*command)
    require_failure(result, 3, "out", "free", "--output-dir")
    assert not out.exists()
    again: list[int] = []
    small_disk("16m")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "prune_block", watched(again))
        assert run(*command, "--resume").code == 0
    assert again == list(range(solved, 3))
    assert run(dense_dir, "--output-dir", "whole", "--category", "unstructured", *QUICK).code == 0
    assert digests(out) == digests(Path("whole"))


def test_files_that_may_not_grow(run: Run, dense_dir: Path) -> None:
    """A quota of another kind, which needs no mount: no file may exceed 100 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        result = run(dense_dir, "--output-dir", "out", *QUICK)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (result.code, result.out) == (3, "")
    assert "disk full" in result.err
    assert not Path("out").exists()
    assert run(dense_dir, "--output-dir", "out", *QUICK, "--resume").code == 0


def resume_command(err: str) -> list[str]:
    assert "Resume with:" in err
    words = shlex.split(err.split("Resume with:")[1].strip().splitlines()[0])
    assert words[:3] == ["python", "-m", "mosaic_kernels.prune"]
    return words[3:]


def test_interrupted_and_resumed_with_the_printed_command(run: Run, dense_dir: Path) -> None:
    options = ("--sparsity", "0.6", "--solver", "wanda", *QUICK)
    assert run(dense_dir, "--output-dir", "whole", *options).code == 0
    with stopped_at(1):
        result = run(dense_dir, "--output-dir", "my out", *options)
    assert (result.code, result.out) == (130, "")
    assert "interrupted" in result.err
    assert "Traceback" not in result.err
    assert not Path("my out").exists()
    again = run(*resume_command(result.err))
    assert again.code == 0, again.err
    assert digests(Path("my out")) == digests(Path("whole"))
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["my out", "whole"]


def test_resume_with_other_options(run: Run, dense_dir: Path) -> None:
    with stopped_at(1):
        result = run(dense_dir, "--output-dir", "out", *QUICK)
    changed = run(*resume_command(result.err), "--sparsity", "0.7", "--solver", "magnitude")
    assert changed.code == 2
    assert "cannot resume: sparsity, solver differ" in changed.err
    assert "--overwrite" in changed.err
    assert run(*resume_command(result.err)).code == 0  # what was done is still there


def _as_from_a_terminal() -> None:
    """Background jobs of a shell ignore SIGINT, and their children with them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_a_real_signal(tmp_path: Path) -> None:
    """SIGINT while blocks are being solved: 130, a journal, and a command that finishes the work."""
    random_model(num_hidden_layers=60).save_pretrained(tmp_path / "deep")
    command = [sys.executable, "-m", "mosaic_kernels.prune", str(tmp_path / "deep"), "--output-dir", "out", *QUICK]
    command += ["--policy", "uniform", "--solver", "sparsegpt", "--samples", "64"]  # not done before the signal comes
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path,
        preexec_fn=_as_from_a_terminal,
    ) as process:  # fmt: skip
        journal = tmp_path / ".out.partial" / "journal"
        deadline = time.monotonic() + 120
        while not (journal / "block-00002.safetensors").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    finished = len(list(journal.glob("block-*.safetensors")))
    assert 3 <= finished < 60
    assert not (tmp_path / "out").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        seen: list[int] = []
        patch.setattr(pipeline, "prune_block", watched(seen))
        assert main(resume_command(err)) == 0
    assert seen == list(range(finished, 60))
    assert not (tmp_path / ".out.partial").exists()
