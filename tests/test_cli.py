# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import argparse
import contextlib
import errno
import io
import logging
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mosaic_kernels import cli
from mosaic_kernels.cli import peak_memory_bytes, resolve_device, run_command, show
from mosaic_kernels.errors import EnvironmentError_, ExitCode, Interrupted, ModelLoadError, UsageError


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
        (Interrupted("stopped by SIGTERM", ExitCode.TERMINATED), 143, "interrupted: stopped by SIGTERM\n"),
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


@pytest.fixture
def no_reader() -> Iterator[Any]:
    """A stream whose reader went away."""
    read, write = os.pipe()
    os.close(read)
    stream = os.fdopen(write, "w")
    yield stream
    with contextlib.suppress(OSError):
        stream.close()


@pytest.fixture
def full() -> Iterator[Any]:
    """A stream on a full disk."""
    stream = Path("/dev/full").open("w")  # noqa: SIM115
    yield stream
    with contextlib.suppress(OSError):
        stream.close()


def ascii_stream() -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")


def test_a_result_that_cannot_be_printed_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, no_reader: Any, full: Any
) -> None:
    for stream, reason in ((None, "it is closed"), (full, "No space left on device"), (no_reader, "Broken pipe")):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            assert run_command(lambda: show("result", "in out")) == 3
        said = f"error: the result could not be printed on stdout ({reason}): it is in out\n"
        assert capsys.readouterr().err == said
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert run_command(lambda: show("result")) == 3
    assert capsys.readouterr().err.endswith("(No space left on device): it is lost\n")


def test_words_that_are_lost_at_the_end_make_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, full: Any, no_reader: Any
) -> None:
    parser = argparse.ArgumentParser()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert run_command(lambda: parser.parse_args(["--help"]) and None) == 1
    assert "what was printed on stdout is lost" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", no_reader)
        assert run_command(lambda: parser.parse_args(["--help"]) and None) == 1
    assert not capsys.readouterr().err


@pytest.mark.parametrize("stream", ["full", "no_reader", None])
def test_a_stderr_that_takes_nothing_stops_nothing(
    stream: str | None, monkeypatch: pytest.MonkeyPatch, capsys: Any, request: pytest.FixtureRequest
) -> None:
    def body() -> None:
        logging.getLogger("mosaic_kernels.some_part").warning("something")
        show("result")

    monkeypatch.setattr(sys, "stderr", stream and request.getfixturevalue(stream))
    assert run_command(body) == 0
    assert capsys.readouterr().out == "result\n"
    assert run_command(_raise(EnvironmentError_("no device"))) == 3


def test_characters_that_stdout_cannot_encode_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = ascii_stream()
    monkeypatch.setattr(sys, "stdout", stream)
    assert run_command(lambda: show("m\u00f6del \udce9")) == 0
    assert stream.buffer.getvalue() == b"m\\xf6del \\udce9\n"  # type: ignore[attr-defined]
    assert stream.errors == "strict"  # as it was


@pytest.mark.parametrize(
    ("redirection", "code", "said"),
    [
        (">&-", 3, "error: the result could not be printed on stdout (it is closed): it is lost\n"),
        (">/dev/full", 3, "error: the result could not be printed on stdout (No space left on device): it is lost\n"),
        ("2>/dev/full", 0, ""),
        ("2>&-", 0, ""),
    ],
)
def test_python_ends_with_our_exit_code(redirection: str, code: int, said: str) -> None:
    """It would end with 120 where a standard stream cannot be written out."""
    program = (
        "import logging, sys, types\n"
        "sys.modules['torch'] = torch = types.ModuleType('torch')\n"  # the real one takes seconds to import
        "torch.distributed, torch.OutOfMemoryError = types.ModuleType('distributed'), MemoryError\n"
        "sys.modules['mosaic_kernels'] = package = types.ModuleType('mosaic_kernels')\n"
        f"package.__path__ = [{str(Path(cli.__file__).parent)!r}]\n"
        "from mosaic_kernels.cli import run_command, show\n"
        "sys.exit(run_command(lambda: [logging.getLogger('mosaic_kernels.a').warning('w'), show('r')] and None))\n"
    )
    command = f'{sys.executable} -c "{program}" {redirection}'
    environment = {**os.environ, "MOSAIC_LOG_LEVEL": "error" if said else "info"}
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, timeout=120, env=environment
    )
    assert (done.returncode, done.stderr) == (code, said)


@pytest.mark.parametrize(
    ("variable", "command"),
    [
        ("MOSAIC_NUM_THREADS", "info"),
        *(
            pytest.param(variable, command, marks=pytest.mark.slow)
            for variable in ("MOSAIC_ISA", "MOSAIC_BACKEND", "MOSAIC_LOG_LEVEL", "MOSAIC_NUM_THREADS")
            for command in ("prune", "evaluate", "info")
        ),
    ],
)
def test_a_wrong_variable_is_one_line(variable: str, command: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"mosaic_kernels.{command}", *([] if command == "info" else ["model"])],
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1]), variable: "wrong"},
        capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {variable}='wrong' is not")
    assert done.stderr.count("\n") == 1


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
