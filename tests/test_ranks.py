# SPDX-License-Identifier: Apache-2.0
"""Several processes: the plan and the counts of one, weights that differ by rounding, and failures that end all."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from prune_runs import digests

from mosaic_kernels.errors import CalibrationError
from mosaic_kernels.prune.ranks import ALONE, Team

ROOT = Path(__file__).parents[1]
# 33 sequences: two are held out and 31 split unevenly
OPTIONS = ("--calibration", "random", "--samples", "33", "--seqlen", "16", "--sparsity", "0.6", "--json")


def test_a_process_alone_does_all_and_sends_nothing() -> None:
    tokens = torch.arange(6).view(3, 2)
    assert ALONE.leads
    assert ALONE.mine(tokens) is tokens
    assert ALONE.deal({"a": 3, "b": 5}) == {"a": 0, "b": 0}
    assert ALONE.total(7) == 7
    assert ALONE.gather(lambda: 5) == [5]
    assert ALONE.from_first(lambda: "x") == ALONE.first(lambda: "x") == ALONE.each(lambda: "x") == "x"
    ALONE.sum_(tokens)
    ALONE.send_([tokens])
    assert tokens.flatten().tolist() == list(range(6))
    with pytest.raises(ZeroDivisionError):
        ALONE.gather(lambda: 1 // 0)


def test_sequences_are_split_by_place() -> None:
    tokens = torch.arange(7).view(7, 1)
    parts = [Team(rank, 3).mine(tokens).flatten().tolist() for rank in range(3)]
    assert parts == [[0, 3, 6], [1, 4], [2, 5]]
    assert torch.equal(Team(2, 3).whole().mine(tokens), tokens)
    with pytest.raises(CalibrationError, match="8 processes split 7 calibration sequences"):
        Team(0, 8).mine(tokens)


def test_the_largest_work_is_dealt_first() -> None:
    sizes = {"k": 10, "q": 40, "v": 10, "o": 30}
    assert Team(0, 2).deal(sizes) == Team(1, 2).deal(sizes) == {"q": 0, "o": 1, "k": 1, "v": 0}


# Scenarios run one after the other in the same two processes, which then start once.
SCENARIOS = """
import json, sys
from pathlib import Path
from mosaic_kernels.errors import EnvironmentError_, NonFiniteError
from mosaic_kernels.prune import block, journal
from mosaic_kernels.prune.__main__ import main
from mosaic_kernels.cli import leads

model, options = sys.argv[1], sys.argv[2:]
solve, record = block.solve, journal.Journal.record
codes = {}

def fails_in_the_second_process(*args, **kwargs):
    if not leads() and "layers.1.mlp" in args[4]:
        raise NonFiniteError("made to fail in process 1")
    return solve(*args, **kwargs)

def disk_full(self, block):
    if block.index == 1:
        raise EnvironmentError_("made to be full")
    record(self, block)

def run(name, output, *more):
    codes[name] = main([model, "--output-dir", output, *options, *more])

block.solve = fails_in_the_second_process
run("failed", "failed")
block.solve = solve
journal.Journal.record = disk_full
run("full", "out")
journal.Journal.record = record
run("resumed", "out", "--resume")
run("whole", "whole")
run("recovered", "recovered", "--recover", "reconstruct", "--policy", "uniform", "--quality", "fast")
run("wrong", "whole")
Path(f"codes-{int(not leads())}.json").write_text(json.dumps(codes))
"""


def torchrun(place: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False, timeout=600)


def outcome(report: dict[str, Any]) -> dict[str, Any]:
    return {name: (p["shape"], p["nnz"], p["target"], p["outlier_ratio"]) for name, p in report["projections"].items()}


@pytest.mark.slow
def test_two_processes_make_what_one_makes(run: Any, dense_dir: Path, validation_text: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(validation_text.read_text()[:20000])
    options = (*OPTIONS, "--eval-text", text)
    both = torchrun(Path.cwd(), "-m", "mosaic_kernels.prune", dense_dir, "--output-dir", "two", *options)
    assert both.returncode == 0, both.stderr
    (line,) = both.stdout.splitlines()  # one process prints
    two = json.loads(line)
    alone = run(dense_dir, "--output-dir", "one", *options)
    one = json.loads(alone.out)
    assert outcome(one) == outcome(two)
    assert one["removed_difference"] == two["removed_difference"] == 0
    assert both.stderr.count("structured share") == alone.err.count("structured share") == 1
    assert Path("one/ranks.json").read_text() == Path("two/ranks.json").read_text()
    assert two["command"][:4] == ["torchrun", "--nproc-per-node=2", "-m", "mosaic_kernels.prune"]
    losses = [math.log(report["perplexity"]["pruned"]) for report in (one, two)]
    assert two["perplexity"]["dense"] == one["perplexity"]["dense"]
    assert abs(losses[0] - losses[1]) < 0.01  # of 8.3 nats, the logarithm of the vocabulary
    assert sorted(path.name for path in Path("one").iterdir()) == sorted(path.name for path in Path("two").iterdir())


@pytest.mark.slow
def test_failures_end_all_processes_and_runs_go_on(dense_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "scenarios.py").write_text(SCENARIOS)
    done = torchrun(tmp_path, "scenarios.py", dense_dir, *OPTIONS)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    codes = [json.loads((tmp_path / f"codes-{rank}.json").read_text()) for rank in (0, 1)]
    assert codes[0] == codes[1] == {"failed": 1, "full": 3, "resumed": 0, "whole": 0, "recovered": 0, "wrong": 2}
    assert done.stderr.count("error: made to fail in process 1") == 2  # where it happened, and in the first process
    assert done.stderr.count("error: made to be full") == 1
    assert "error: process 1 ends: process 0 has failed" in done.stderr
    assert done.stderr.count("finished blocks are kept. Resume with:") == 1  # the other run had none, and left nothing
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["out", "recovered", "whole"]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert [json.loads(line)["removed_difference"] for line in done.stdout.splitlines()] == [0, 0, 0]


# A short patience, and blocks that take long enough for a signal to come between.
IMPATIENT = """
import sys, time
from mosaic_kernels.prune import pipeline, ranks, roll_call
from mosaic_kernels.prune.__main__ import main

ranks.PATIENCE_SECONDS = roll_call.PATIENCE_SECONDS = 5.0
roll_call.BEAT_SECONDS = 0.1
solve = pipeline.prune_block

def slow(block, *args, **options):
    if block.index:
        time.sleep(0.5)
    return solve(block, *args, **options)

pipeline.prune_block = slow
sys.exit(main(sys.argv[1:]))
"""


def processes_of(launcher: int) -> dict[str, int]:
    """Process ids by rank."""
    found = {}
    for task in Path(f"/proc/{launcher}/task").iterdir():
        for pid in map(int, (task / "children").read_text().split()):
            entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {entry[5:].decode(): pid for entry in entries if entry.startswith(b"RANK=")}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, r"error: process 0 ends: another one has gone|interrupted: stopped by SIGTERM of torchrun"),
        (signal.SIGSTOP, r"error: process 0 ends: (process 1 has given no sign|another one has gone \(Timed out)"),
    ],
)
def test_a_process_that_dies_or_stops_ends_all_and_costs_no_block(
    number: signal.Signals, said: str, dense_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "impatient.py").write_text(IMPATIENT)
    options = (*OPTIONS, "--policy", "uniform", "--structured-share", "0", "--solver", "magnitude")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "impatient.py", str(dense_dir)]
    command += ["--output-dir", "out", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    journal = tmp_path / ".out.partial" / "journal"
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as launcher:
        while not (journal / "block-00000.safetensors").exists():
            assert launcher.poll() is None, launcher.communicate()
            time.sleep(0.01)
        pids = processes_of(launcher.pid)
        os.kill(pids["1"], number)
        while Path(f"/proc/{pids['0']}").exists():
            time.sleep(0.05)
        if number == signal.SIGSTOP:  # torchrun would wait for 30 s before it kills it
            os.kill(pids["1"], signal.SIGCONT)
        _, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 1
    assert re.search(said, err), err
    assert err.count("finished blocks are kept. Resume with:") == 1
    assert "/mosaic_kernels/" not in err  # no traceback of ours, below those of torchrun
    assert not (tmp_path / "out").exists()
    assert list(journal.glob("block-*.safetensors"))
    again = torchrun(tmp_path, "-m", "mosaic_kernels.prune", dense_dir, "--output-dir", "out", *options, "--resume")
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_a_command_that_fails_says_so_to_the_shell(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "-m", "mosaic_kernels.prune", "./nowhere", "--output-dir", "out", *OPTIONS)
    assert done.returncode != 0
    assert "./nowhere: no such directory" in done.stderr
    assert not list(tmp_path.iterdir())
