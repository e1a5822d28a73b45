# SPDX-License-Identifier: Apache-2.0
"""Kill a pruning run at random moments, resume it, and compare: ``python killed_runs.py DIRECTORY MODEL KILLS SEED``.

A process of its own: it imports torch once, and forks a process for each run.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}

import torch
from transformers import AutoModelForCausalLM, utils

import mosaic_kernels  # noqa: F401
from mosaic_kernels.prune import pipeline  # noqa: F401
from mosaic_kernels.prune.__main__ import main

torch.set_num_threads(1)
utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
OPTIONS = (
    "--sparsity", "0.6", "--calibration", "random", "--samples", "16", "--seqlen", "32", "--solver", "sparsegpt",
    "--policy", "uniform", "--structured-share", "0.2",
)  # fmt: skip
CHANGES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "fcntl.flock"}


def start(model: Path, out: Path, *more: str, before: Callable[[], None] | None = None) -> int:
    """Start a run; its process id."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            log = os.open(out.with_name("log"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            if before is not None:
                before()
            code = main([str(model), "--output-dir", str(out), *OPTIONS, *more])
        finally:
            os._exit(code)
    return pid


def end(pid: int) -> tuple[int, float]:
    """Wait for a run: its exit code, and the seconds that the processor has worked for it."""
    _, status, used = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


def kill_after(pid: int, seconds: float) -> None:
    """Kill a run when the processor has worked for it so long, which does not depend on how busy the machine is."""
    ticks = os.sysconf("SC_CLK_TCK")
    while True:
        used = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if (int(used[11]) + int(used[12])) / ticks >= seconds:
            break
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)


def at_change(number: int, counter: Path | None = None) -> Callable[[], None]:
    """Kill the process when it opens, renames or removes a file for the ``number``-th time; or count these times."""

    def install() -> None:
        seen = 0

        def hook(event: str, _: object) -> None:
            nonlocal seen
            if event in CHANGES:
                seen += 1
                if counter is not None:
                    os.truncate(counter, seen)  # the size of a file holds the number: this is no change of its own
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return install


def digests(out: Path) -> dict[str, str]:
    names = ("*.safetensors", "config.json", "ranks.json")
    found = sorted(path for pattern in names for path in out.glob(pattern))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def loads(place: Path) -> bool:
    try:
        AutoModelForCausalLM.from_pretrained(place)
    except Exception:
        return False
    return True


def campaign(place: Path, model: Path, kills: int, seed: int) -> None:
    whole, counter = place / "whole", place / "counter"
    counter.touch()
    assert loads(model)  # imports what every run would import
    assert end(start(model, whole, before=at_change(0, counter)))[0] == 0, (place / "log").read_text()
    code, seconds = end(start(model, place / "again"))
    assert code == 0
    changes = counter.stat().st_size
    expected = digests(whole)
    assert expected == digests(place / "again")
    chance, reached = random.Random(seed), set()
    for kill in range(kills):
        out = place / "out" / "result"
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        if kill % 2:  # spread over the whole run
            pid = start(model, out)
            kill_after(pid, seconds * (kill + chance.random()) / kills)
        else:  # at a file, every other time one of the last, which are those of the result and of its publishing
            first = 1 if kill % 4 else int(0.8 * changes)
            pid = start(model, out, before=at_change(chance.randint(first, changes)))
        code, _ = end(pid)
        partial = out.with_name(f".{out.name}.partial")
        blocks = len(list(partial.glob("journal/block-*.safetensors")))
        reached.add(blocks)
        assert not out.exists() or digests(out) == expected, f"kill {kill}: a partial result"
        for each in (out, partial):
            assert not (each / "config.json").exists() or not loads(each) or digests(each) == expected, each
        published = out.exists()
        assert end(start(model, out, "--resume"))[0] == 0, (out.with_name("log")).read_text()
        assert digests(out) == expected, f"kill {kill} with {blocks} blocks: other bytes"
        assert not partial.exists()

        print(f"kill {kill}: exit {code}, {blocks} blocks, published {published}")  # noqa: T201
    print(f"{kills} kills, blocks in the journal {sorted(reached)}, {changes} changes of files, {seconds:.2f} s a run")  # noqa: T201
    assert len(reached) > 3


if __name__ == "__main__":
    campaign(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
