# SPDX-License-Identifier: Apache-2.0
"""Shared by all tests: offline, few threads, one small real model."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before everything else
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings
from quick import Executed, is_quick

from mosaic_kernels.ops.isa import LEVELS

settings.register_profile("repeatable", deadline=None, derandomize=True)  # busy machines are slow, not wrong
settings.load_profile("repeatable")

EXECUTED = pytest.StashKey[Executed]()
EXAMPLES = Path(__file__).parents[1] / "examples"


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    whole = option.markexpr == "quick" and not option.keyword and config.args_source.name == "TESTPATHS"
    if whole and not option.collectonly and not getattr(option, "numprocesses", None) and sys.gettrace() is None:
        config.stash[EXECUTED] = Executed()
        config.stash[EXECUTED].start()
    # the models here are small: on a busy 2-core machine a second thread made the suite 5 times slower
    torch.set_num_threads(1)


def pytest_itemcollected(item: pytest.Item) -> None:
    if is_quick(item.path.stem, item.name):
        item.add_marker("quick")


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Fail a complete run of ``-m quick`` in one process if it reached no function of some module."""
    yield
    executed, stopped = session.config.stash.get(EXECUTED, None), session.shouldfail or session.shouldstop
    if executed is None:
        return
    executed.stop()
    if not stopped and (missing := executed.missing()):
        raise pytest.UsageError(f"no quick test calls a function of {', '.join(missing)}: name one in tests/quick.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        why = "torch was built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"needs CUDA: {why}"))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=LEVELS)
def cpu_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set of this processor up to ``MOSAIC_ISA``."""
    from mosaic_kernels import _C_cpu

    most = _C_cpu.isa()
    if LEVELS.index(request.param) > LEVELS.index(most):
        pytest.skip(f"this processor has no {request.param}, or MOSAIC_ISA excludes it")
    _C_cpu.set_isa(request.param)
    yield request.param
    _C_cpu.set_isa(most)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many small operations: two threads on busy cores wait for each other at every one of them."""
    before = torch.get_num_threads()
    # the models here are small: on a busy 2-core machine a second thread made the suite 5 times slower
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    """Directory of the trained Llama that the repository ships."""
    return EXAMPLES / "tiny-llama"


@pytest.fixture(scope="session")
def calibration_text() -> Path:
    return EXAMPLES / "text" / "calibration.txt"


@pytest.fixture(scope="session")
def validation_text() -> Path:
    return EXAMPLES / "text" / "validation.txt"


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="session")
def dense_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """Directory of a small random Llama in bf16 that understands the example's tokenizer."""
    from small_models import random_model

    path = tmp_path_factory.mktemp("dense") / "llama"
    random_model(vocab_size=4096, dtype=torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session", params=[pytest.param(80, marks=pytest.mark.emulator), 90], ids="sm_{}".format)
def gpu(request: pytest.FixtureRequest) -> Any:
    """The CUDA kernels on an emulated GPU, with and without bulk copies: ``simt.Gpu``.

    Each architecture is compiled when its first test needs it, which takes 17 s of one core (Xeon, Sapphire Rapids
    class, Dec 2026). The default run has one architecture, ``-m emulator`` the other.
    """
    from simt import Gpu

    return Gpu(request.param)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call the prune command in an empty directory: ``run("MODEL", "--output-dir", "out")``."""
    from prune_runs import Result

    from mosaic_kernels.prune.__main__ import main

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("logging.raiseExceptions", False)  # transformers logs to the stderr of the first test
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def call(*arguments: str | Path) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def mosaic_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mosaic checkpoint in one file, which no test changes."""
    from small_models import composite, save  # imports most of the package, which not every test file needs

    return save(composite(), tmp_path_factory.mktemp("source") / "mosaic")


@pytest.fixture
def mosaic(mosaic_source: Path, tmp_path: Path) -> Path:
    """A fresh copy of a mosaic checkpoint in one file."""
    return Path(shutil.copytree(mosaic_source, tmp_path / "mosaic"))
