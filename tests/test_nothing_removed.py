# SPDX-License-Identifier: Apache-2.0
"""A sparsity that removes nothing, hardly anything, or less than is zero already: a whole result, and a word."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from prune_runs import QUICK, Run

import mosaic_kernels as mk
from mosaic_kernels.checkpoint.reader import load_model
from mosaic_kernels.errors import NonFiniteError
from mosaic_kernels.prune.share import largest_worthwhile

OPTIONS: dict[str, Any] = {
    "sparsity": 0.5, "solver": "wanda", "policy": "uniform", "calibration": "random", "samples": 4, "seqlen": 16,
}  # fmt: skip
WAYS = (
    (), ("--policy", "curve+search"), ("--policy", "pod"), ("--policy", "owl"), ("--policy", "mosaic-reference"),
    ("--solver", "sparsegpt"), ("--solver", "wanda"), ("--solver", "magnitude"),
    ("--category", "unstructured"), ("--category", "structured"), ("--category", "auto"),
    ("--quality", "fast"), ("--weights", "int8"), ("--format", "dense"), ("--recover", "reconstruct"),
    ("--pattern", "row", "--category", "unstructured"),
)  # fmt: skip
QUICK_ONES = {
    ("0", WAYS[0]),
    ("1e-9", WAYS[0]),
    ("0.0001", WAYS[0]),
    ("1e-9", WAYS[9]),
    ("0.0001", WAYS[9]),
    ("0.0001", WAYS[2]),
}
CASES = [
    pytest.param(
        sparsity, way, marks=() if (sparsity, way) in QUICK_ONES else pytest.mark.slow, id=" ".join((sparsity, *way))
    )
    for sparsity in ("0", "1e-9", "0.0001")
    for way in WAYS
]


@pytest.mark.parametrize(("sparsity", "options"), CASES)
def test_the_result_is_whole(run: Run, dense_dir: Path, sparsity: str, options: tuple[str, ...]) -> None:
    result = run(dense_dir, "--output-dir", "out", "--json", "--sparsity", sparsity, *QUICK, *options)
    assert result.code == 0, result.err
    report = json.loads(result.out)
    removed = report["removed_parameters"]
    if "mosaic-reference" not in options:  # the one policy without an exact budget
        # structured: the nearest that whole units allow
        wanted = 0 if "structured" in options else round(float(sparsity) * report["prunable_parameters"])
        assert removed == wanted
        assert ("nothing is removed" in result.err) is (wanted == 0)
    model, _ = load_model("out")
    assert sum(p.numel() for p in model.parameters()) > 0


def test_a_divergence_below_zero_is_rounding() -> None:
    assert largest_worthwhile({0.1: -2e-9, 0.2: -1e-9, 0.3: 1e-9}) == 0.2
    assert largest_worthwhile({0.1: 1e-9, 0.2: -1e-9, 0.3: 2e-9}) == 0.2
    assert largest_worthwhile({0.1: 0.04, 0.2: 0.05, 0.3: 0.06}) == 0.2
    assert largest_worthwhile({0.1: 0.0, 0.2: 0.0}) == 0.2
    with pytest.raises(NonFiniteError):
        largest_worthwhile({0.1: float("nan"), 0.2: 0.1})


def test_zeros_that_are_there_already(dense_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = mk.prune(dense_dir, output_dir=tmp_path / "half", **{**OPTIONS, "category": "unstructured"})
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="mosaic_kernels"):
        mk.prune(tmp_path / "half", output_dir=tmp_path / "more", **{**OPTIONS, "sparsity": 0.7})
        assert (
            f"{first['removed_parameters']:,} of {first['prunable_parameters']:,} prunable parameters (50.00 %)"
            in caplog.text
        )
        assert "meet the budget" not in caplog.text
        mk.prune(tmp_path / "half", output_dir=tmp_path / "less", **{**OPTIONS, "sparsity": 0.25})
    assert "these zeros meet the budget of sparsity 0.25" in caplog.text
    assert "more than 0.5 removes more" in caplog.text
