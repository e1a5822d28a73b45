# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and full disks: finished blocks stay, nothing looks finished, and the printed command goes on."""

from __future__ import annotations

import contextlib
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prune_runs import QUICK, Run, digests, require_failure, stopped_at, watched
from small_models import random_model

import mosaic_kernels as mk
from mosaic_kernels import signals
from mosaic_kernels.errors import Interrupted
from mosaic_kernels.prune import pipeline
from mosaic_kernels.prune.__main__ import main

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
FAST = (*QUICK, "--policy", "uniform", "--structured-share", "0", "--solver", "magnitude")  # no probes, no trials
PYTHON_FAST: dict[str, Any] = {
    "calibration": "random", "samples": 4, "seqlen": 16, "policy": "uniform", "structured_share": 0.0,
    "solver": "magnitude",
}  # fmt: skip


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


@contextmanager
def signalled(number: signal.Signals, index: int = 1) -> Iterator[None]:
    """This process gets a signal when it is to solve block ``index``."""
    inner = pipeline.prune_block

    def send(block: Any, *args: Any, **options: Any) -> Any:
        if block.index == index:
            os.kill(os.getpid(), number)
        return inner(block, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "prune_block", send)
        yield


SIGNALS = [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]


@pytest.fixture
def default_handlers() -> Iterator[None]:
    """Those of a process that a terminal has started, whatever has started pytest."""
    before = {number: signal.getsignal(number) for number, _ in SIGNALS}
    for number in before:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("default_handlers")
@pytest.mark.parametrize(("number", "code"), SIGNALS)
def test_a_signal_keeps_the_blocks_and_prints_the_command(
    run: Run, dense_dir: Path, number: signal.Signals, code: int
) -> None:
    before = signal.getsignal(number)
    with signalled(number):
        result = run(dense_dir, "--output-dir", "out", *FAST)
    assert (result.code, result.out) == (code, "")
    assert result.err.count("interrupted: ") == 1
    assert (number == signal.SIGINT) == (f"stopped by {number.name}" not in result.err)
    assert "Traceback" not in result.err
    assert signal.getsignal(number) is before
    again: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "prune_block", watched(again))
        assert run(*resume_command(result.err)).code == 0
    assert again == [1, 2]


@pytest.mark.usefixtures("default_handlers")
@pytest.mark.parametrize("renamed", [False, True])
def test_a_signal_in_the_last_step_says_where_the_result_is(
    run: Run, dense_dir: Path, monkeypatch: pytest.MonkeyPatch, renamed: bool
) -> None:
    def stop(before: Any) -> Any:
        def rename(path: Path, target: Path) -> Path:
            moves = path.name == ".out.partial"  # the last rename of the run
            if moves and not renamed:
                os.kill(os.getpid(), signal.SIGTERM)
            found: Path = before(path, target)
            if moves and renamed:
                os.kill(os.getpid(), signal.SIGTERM)
            return found

        return rename

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", stop(Path.rename))
        result = run(dense_dir, "--output-dir", "out", *FAST)
    assert (result.code, Path("out").exists()) == (143, renamed), result.err
    if renamed:
        assert f"the result is finished, in {Path('out').resolve()}; the next run" in result.err
        assert run(dense_dir, "--output-dir", "out", "--overwrite", *FAST).code == 0
    else:
        assert f"the result is finished, in {Path('.out.partial').resolve()}. Resume with:" in result.err
        assert run(*resume_command(result.err)).code == 0
    assert [path.name for path in Path.cwd().iterdir()] == ["out"]


@pytest.mark.usefixtures("default_handlers")
def test_nohup_is_respected(run: Run, dense_dir: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with signalled(signal.SIGHUP):
        assert run(dense_dir, "--output-dir", "out", *FAST).code == 0


def test_before_the_first_block_nothing_is_said_to_be_finished(run: Run, dense_dir: Path) -> None:
    with stopped_at(0):
        result = run(dense_dir, "--output-dir", "out", *FAST)
    assert result.code == 130
    assert "no block is finished yet. Resume with:" in result.err
    assert run(*resume_command(result.err)).code == 0


@pytest.mark.usefixtures("default_handlers")
def test_a_call_from_python_changes_no_handler(dense_dir: Path, tmp_path: Path) -> None:
    """The program that calls decides; so does a handler of its own in a command that it runs."""
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    with signalled(signal.SIGTERM):
        mk.prune(dense_dir, output_dir=tmp_path / "out", **PYTHON_FAST)
        assert seen == [signal.SIGTERM]
        assert main([str(dense_dir), "--output-dir", str(tmp_path / "second"), *FAST]) == 0
    assert seen == [signal.SIGTERM] * 2


def test_a_loop_over_runs_ends_at_ctrl_c(dense_dir: Path, tmp_path: Path) -> None:
    """``except Exception`` around a run goes on after errors, not after Ctrl-C."""

    def sweep() -> None:
        for name in "ab":
            with contextlib.suppress(Exception):
                mk.prune(dense_dir, output_dir=tmp_path / name, **PYTHON_FAST)

    with pytest.raises(KeyboardInterrupt, match="finished blocks are kept"), stopped_at(1):
        sweep()
    assert not (tmp_path / ".b.partial").exists()


@pytest.mark.usefixtures("default_handlers")
def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """But not one that comes with the first, as torchrun passes on what the terminal has sent."""
    ended: list[tuple[int, Any]] = []
    monkeypatch.setattr(signals, "_end_at_once", lambda number, frame: ended.append((number, frame)))
    with signals.raised():
        with pytest.raises(Interrupted, match="SIGTERM"):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        assert not ended
        monkeypatch.setattr(signals, "_SAME_SECONDS", 0.0)
        signal.raise_signal(signal.SIGTERM)
    assert [number for number, _ in ended] == [signal.SIGTERM]


@pytest.mark.parametrize(("number", "code"), SIGNALS)
@pytest.mark.parametrize("command", ["prune", "evaluate", "info"])
def test_a_signal_while_torch_is_imported(tmp_path: Path, number: signal.Signals, code: int, command: str) -> None:
    (tmp_path / "torch.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\n")
    done = subprocess.run(
        [sys.executable, "-m", f"mosaic_kernels.{command}"], capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}, preexec_fn=_as_from_a_terminal,
    )  # fmt: skip
    name = "the user" if number == signal.SIGINT else number.name
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"interrupted: stopped by {name}\n")


def test_nothing_to_resume_is_said(run: Run, dense_dir: Path) -> None:
    Path("empty").mkdir()
    for place in ("absent", "empty"):
        result = run(dense_dir, "--output-dir", place, *FAST, "--resume")
        assert result.code == 0
        (line,) = (line for line in result.err.splitlines() if "resume" in line)
        assert line == f"nothing to resume in {Path(place).resolve()}: the run starts afresh"
    with stopped_at(1):
        interrupted = run(dense_dir, "--output-dir", "out", *FAST)
    assert "nothing to resume" not in run(*resume_command(interrupted.err)).err


def test_a_refused_resume_says_where_the_blocks_are(run: Run, dense_dir: Path) -> None:
    with stopped_at(1):
        result = run(dense_dir, "--output-dir", "out", *FAST)
    journal = Path(".out.partial/journal")
    before = digests(journal, "*")
    refused = run(*resume_command(result.err), "--seed", "3")
    assert refused.code == 2
    assert "seed 0, now 3" in refused.err
    assert f"finished blocks are kept in {journal.resolve()}" in refused.err
    assert "Resume with" not in refused.err
    assert digests(journal, "*") == before


@pytest.mark.parametrize("options", [("--weights", "int8"), ("--format", "dense")])
def test_options_of_the_last_step_may_change(run: Run, dense_dir: Path, options: tuple[str, str]) -> None:
    with stopped_at(2):
        result = run(dense_dir, "--output-dir", "out", *FAST)
    assert run(*resume_command(result.err), *options).code == 0
    assert run(dense_dir, "--output-dir", "whole", *FAST, *options).code == 0
    assert digests(Path("out")) == digests(Path("whole"))


def test_a_model_that_was_moved_or_touched_is_the_same(run: Run, dense_dir: Path, tmp_path: Path) -> None:
    first = shutil.copytree(dense_dir, tmp_path / "first")
    with stopped_at(2):
        run(first, "--output-dir", "out", *FAST)
    first.rename(tmp_path / "moved")
    for path in (tmp_path / "moved").iterdir():
        os.utime(path, (1, 1))
    again: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "prune_block", watched(again))
        assert run(tmp_path / "moved", "--output-dir", "out", *FAST, "--resume").code == 0
    assert again == [2]


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """``kill -9`` anywhere, in the last step, too: nothing partial loads, and a resumed run makes the same bytes."""
    random_model(num_hidden_layers=12).save_pretrained(tmp_path / "model")
    command = [
        sys.executable,
        str(ROOT / "tests" / "killed_runs.py"),
        str(tmp_path),
        str(tmp_path / "model"),
        "20",
        "0",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 kills" in done.stdout


def _as_from_a_terminal() -> None:
    """Background jobs of a shell ignore SIGINT, and their children with them; so it is with SIGHUP below ``nohup``."""
    for number, _ in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


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
