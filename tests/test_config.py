# SPDX-License-Identifier: Apache-2.0
"""Options of a pruning run: what is refused, in which words, and what follows from what."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mosaic_kernels.config import PruneConfig
from mosaic_kernels.errors import ExitCode, UsageError


def test_defaults_are_valid_and_frozen() -> None:
    config = PruneConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sparsity = 0.9  # type: ignore[misc]
    assert (config.category, config.sparsity, config.seqlen) == ("composite", 0.5, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": "0.5"}, r"sparsity must be a number, got '0\.5' \(str\)"),
        ({"sparsity": None}, r"sparsity must be a number, got None \(NoneType\)"),
        ({"sparsity": True}, "sparsity must be a number, got True"),
        ({"sparsity": [0.5]}, "sparsity must be a number"),
        ({"sparsity": 0.5j}, "sparsity must be a number"),
        ({"structured_share": "0.1"}, "structured_share must be a number"),
        ({"max_deviation": "a"}, "max_deviation must be a number"),
        ({"samples": 8.0}, r"samples must be a whole number, got 8\.0 \(float\)"),
        ({"samples": "8"}, "samples must be a whole number"),
        ({"seqlen": True}, "seqlen must be a whole number"),
        ({"seed": None}, "seed must be a whole number"),
        ({"seed": -1}, r"seed must lie in \[0, 2\*\*63\), got -1"),
        ({"seed": 2**63}, "seed must lie in"),
        ({"category": ["composite"]}, "category must be one of"),
        ({"policy": 3}, "policy must be one of"),
        ({"pattern": 2}, "pattern must be a string"),
        ({"pattern": None}, "pattern must be a string"),
        ({"ranks": 3}, "ranks must be a path"),
        ({"device": 0}, "device must be a string"),
        ({"resume": "yes"}, "resume must be True or False"),
        ({"overwrite": 1}, "overwrite must be True or False"),
    ],
)
def test_options_of_another_type(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        PruneConfig(**options)
    assert caught.value.exit_code == ExitCode.USAGE


def test_options_of_a_type_that_says_the_same() -> None:
    config = PruneConfig(
        sparsity=np.float32(0.25), samples=np.int64(8), dtype=torch.bfloat16, device=torch.device("cpu"),
        resume=np.True_, ranks="~/r.json", structured_share=0,
    )  # type: ignore[arg-type]  # fmt: skip
    assert (config.sparsity, config.samples, config.dtype, config.device, config.resume) == (
        0.25,
        8,
        "bfloat16",
        "cpu",
        True,
    )
    assert [type(value) for value in (config.sparsity, config.samples, config.structured_share)] == [float, int, float]
    assert config.ranks == Path.home() / "r.json"
    assert PruneConfig(sparsity=0).sparsity == 0


def test_a_home_directory_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: (_ for _ in ()).throw(KeyError(uid)))
    with pytest.raises(UsageError, match=r"ranks: ~/r\.json: the home directory .* is not known here"):
        PruneConfig(ranks="~/r.json")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="is not known here"):
        PruneConfig(ranks="~nobody-of-this-name/r.json")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": -0.01}, "sparsity"),
        ({"sparsity": math.nan}, "sparsity"),
        ({"sparsity": math.inf}, "sparsity"),
        ({"category": "half"}, "unstructured, structured, composite"),
        ({"policy": "best"}, "pod, owl, uniform, mosaic-reference"),
        ({"solver": "adam"}, "sparsegpt, wanda, magnitude"),
        ({"format": "pickle"}, "mosaic, dense"),
        ({"outlier_threshold": 0.0}, "outlier threshold"),
        ({"outlier_threshold": math.nan}, "outlier threshold"),
        ({"outlier_threshold": math.inf}, "outlier threshold"),
        ({"max_deviation": -0.1}, "max deviation"),
        ({"max_deviation": math.nan}, "max deviation"),
        ({"samples": 0}, "samples"),
        ({"seqlen": 0}, "seqlen"),
        ({"channel_multiple": 0}, "channel_multiple"),
        ({"eval_text": "a.txt", "eval_tokens": 0}, "eval_tokens must be at least 1"),
        ({"eval_tokens": 100}, "--eval-text FILE"),
        ({"pattern": "two:four"}, "two:four"),
        ({"pattern": "4:4"}, "0 < N < M"),
        ({"pattern": "0:4"}, "0 < N < M"),
        ({"pattern": "4:2"}, "0 < N < M"),
        ({"structured_share": 0.6}, "sparsity = 0.5"),
        ({"structured_share": -0.1}, "structured share"),
        ({"structured_share": math.nan}, "structured share"),
        ({"category": "unstructured", "structured_share": 0.1}, "--category composite"),
        ({"category": "structured", "structured_share": 0.1}, "leave out --structured-share"),
        ({"category": "structured", "pattern": "2:4"}, "removes units only"),
        ({"category": "unstructured", "pattern": "2:4", "sparsity": 0.6}, "--sparsity 0.5"),
        ({"pattern": "1:4", "sparsity": 0.5}, "at least 0.75"),
        ({"pattern": "2:4", "sparsity": 0.6, "structured_share": 0.5}, "leave out --structured-share"),
    ],
)
def test_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        PruneConfig(**options)
    assert words in str(caught.value)
    assert caught.value.exit_code == ExitCode.USAGE


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_sparsity_is_a_fraction_below_one(sparsity: float) -> None:
    if 0 <= sparsity < 1:
        assert PruneConfig(sparsity=sparsity).sparsity == sparsity
    else:
        with pytest.raises(UsageError):
            PruneConfig(sparsity=sparsity)


@given(st.floats(0, 1, exclude_max=True), st.floats(0, 1))
def test_share_is_part_of_what_goes(sparsity: float, part: float) -> None:
    assert PruneConfig(category="unstructured", sparsity=sparsity).share == 0
    assert PruneConfig(category="structured", sparsity=sparsity).share == sparsity
    assert PruneConfig(sparsity=sparsity, structured_share=part * sparsity).share == part * sparsity
    assert 0 <= PruneConfig(sparsity=sparsity).share <= sparsity


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "7:10", "3:10", "1:3", "2:3", "4:8", "1:7"])
def test_the_sparsity_that_the_message_names_is_accepted(pattern: str) -> None:
    n, m = map(int, pattern.split(":"))
    with pytest.raises(UsageError, match="use --sparsity ") as caught:
        PruneConfig(category="unstructured", pattern=pattern, sparsity=0.01)
    advice = float(str(caught.value).split("use --sparsity ")[1].split(",")[0])
    config = PruneConfig(category="unstructured", pattern=pattern, sparsity=advice)
    assert config.group == (n, m)
    # of every m weights m - n go: the exact fraction, so that the budget of whole groups is met exactly
    assert round(config.sparsity * 1000 * m) == 1000 * (m - n)


@given(st.sampled_from([(2, 4), (1, 4), (3, 10)]), st.floats(1e-5, 0.99) | st.just(0.0))
def test_a_pattern_fixes_the_structured_share(group: tuple[int, int], extra: float) -> None:
    n, m = group
    fixed = (m - n) / m
    sparsity = fixed + extra * (1 - fixed)
    share = PruneConfig(pattern=f"{n}:{m}", sparsity=sparsity).share
    # 1 - S = (1 - share) n / m; three roundings of numbers up to m / n
    assert (1 - share) * n / m == pytest.approx(1 - sparsity, abs=2**-50 * m / n)
