# SPDX-License-Identifier: Apache-2.0
"""Shared by all tests: offline, few threads, one small real model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before everything else
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings

settings.register_profile("repeatable", deadline=None, derandomize=True)  # busy machines are slow, not wrong
settings.load_profile("repeatable")

EXAMPLES = Path(__file__).parents[1] / "examples"


def pytest_configure() -> None:
    # the models here are small: on a busy 2-core machine a second thread made the suite 5 times slower
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        why = "torch was built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"needs CUDA: {why}"))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


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
