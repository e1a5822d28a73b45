# SPDX-License-Identifier: Apache-2.0
"""The measurement of floating-point types that a processor multiplies quickly, and its comparison with CPUID."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mosaic_kernels import device

HALF = (torch.bfloat16, torch.float16)
# Limits torch to AVX2; it works only if it is set before the process starts.
AVX2_ONLY = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


@pytest.fixture(autouse=True)
def _nothing_known_yet() -> Iterator[None]:
    device.products.cache_clear()
    yield
    device.products.cache_clear()


def measured(monkeypatch: pytest.MonkeyPatch, ratio: float) -> list[torch.dtype]:
    """Make every measurement return ``ratio``; returns the list of measured dtypes."""
    asked: list[torch.dtype] = []

    def ratio_of(dtype: torch.dtype) -> float:
        asked.append(dtype)
        return ratio

    monkeypatch.setattr(device, "_speed_over_fp32", ratio_of)
    return asked


def test_fp32_is_what_others_are_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = measured(monkeypatch, 0.0)
    assert device.has_fast_products(torch.float32)
    assert not asked


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("ratio", "fast"), [(0.06, False), (0.79, False), (0.81, True), (4.0, True)])
@pytest.mark.parametrize("features", [None, frozenset({"avx2"}), frozenset({"avx512_bf16", "avx512_fp16"})])
def test_the_measurement_decides(
    dtype: torch.dtype, ratio: float, fast: bool, features: frozenset[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = measured(monkeypatch, ratio)
    monkeypatch.setattr(device, "_features", features)
    assert device.has_fast_products(dtype) is fast
    assert device.products(dtype).ratio == ratio
    assert asked == [dtype], "measured once"


@pytest.mark.parametrize(("has", "ratio"), [(True, 0.17), (False, 2.0)])
def test_a_contradiction_is_logged(
    has: bool, ratio: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured(monkeypatch, ratio)
    monkeypatch.setattr(device, "_features", frozenset({"avx2", "avx512_bf16"} if has else {"avx2"}))
    with caplog.at_level(logging.INFO, logger=device.logger.name):
        device.has_fast_products(torch.bfloat16)
        device.has_fast_products(torch.bfloat16)
    assert len(caplog.messages) == 1
    for word in ("bfloat16", "has instructions" if has else "has no instructions", f"{ratio:.2g}x"):
        assert word in caplog.text


@pytest.mark.parametrize(("has", "ratio"), [(True, 3.0), (False, 0.1)])
def test_agreement_says_nothing(
    has: bool, ratio: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured(monkeypatch, ratio)
    monkeypatch.setattr(device, "_features", frozenset({"amx_bf16"} if has else {"avx2"}))
    with caplog.at_level(logging.INFO, logger=device.logger.name):
        assert device.products(torch.bfloat16).instructions is has
    assert not caplog.messages


def test_fp32_measured_against_itself_is_as_fast() -> None:
    """With unequal shapes or thread counts, or a wrong clock, the ratio would be off by more."""
    assert 0.6 < device._speed_over_fp32(torch.float32) < 1.6


def test_measuring_is_short_and_leaves_torch_as_it_was() -> None:
    threads = torch.get_num_threads()
    before = time.process_time()
    with torch.device("meta"):  # a default device that computes nothing
        assert device._speed_over_fp32(torch.bfloat16) > 0
    assert torch.get_num_threads() == threads
    # 50 ms, or two rounds where one takes longer; on a slow processor that is about 60 ms
    assert time.process_time() - before < 1.0


def test_importing_the_package_measures_nothing() -> None:
    code = (
        "import torch.nn.functional as F; F.linear = None; import mosaic_kernels; "
        "from mosaic_kernels import device; print(device.products.cache_info().currsize)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "0", done.stderr


def test_torch_without_bf16_kernels_is_found_out_whatever_cpuid_says() -> None:
    """The processor is the same: only torch is told not to use its newer instructions."""
    code = "import torch; from mosaic_kernels import device; print(device.has_fast_products(torch.bfloat16))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **AVX2_ONLY}
    )
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.skipif(
    device._features is None or not Path("/proc/cpuinfo").exists(),
    reason="no CPUID, or no /proc/cpuinfo to compare it with",
)
@pytest.mark.parametrize("name", ["avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16"])
def test_cpuid_is_read_as_linux_reads_it(name: str) -> None:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    flags = {word for line in lines if line.startswith("flags") for word in line.split()}
    assert device._features is not None
    assert (name in device._features) is (name in flags)
