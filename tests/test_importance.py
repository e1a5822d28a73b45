# SPDX-License-Identifier: Apache-2.0
"""The ranking: outlier ratios equal their definition, and files that do not fit are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import KINDS, random_model

from mosaic_kernels.errors import NonFiniteError, UsageError
from mosaic_kernels.models import STAGES, ModelAdapter
from mosaic_kernels.prune.capture import embed
from mosaic_kernels.prune.importance import DEFAULT_THRESHOLDS, Ranks, rank

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.randint(96, (4, 16), generator=torch.Generator().manual_seed(1))
THRESHOLDS = (1.5, 3.0, 5.0)
# scores carry the rounding of norm, product and mean; each is 2^-24, and the mean one per level of its sum
NEAR = 32 * 2.0**-24


def ranked(adapter: ModelAdapter) -> Ranks:
    return rank(adapter, embed(adapter, TOKENS), THRESHOLDS, model="m", calibration="c")


def direct_scores(adapter: ModelAdapter) -> dict[str, torch.Tensor]:
    """``|W_ij| ‖X_j‖`` of every projection in float64, X seen by hooks in a forward pass of the model."""
    inputs: dict[str, torch.Tensor] = {}

    def observer(name: str) -> Any:
        return lambda _, args: inputs.__setitem__(name, args[0].detach().flatten(0, 1).double())

    layers = {block.full_name(name): layer for block, name, layer in adapter.projections()}
    handles = [layer.register_forward_pre_hook(observer(name)) for name, layer in layers.items()]
    with torch.no_grad():
        adapter.model(input_ids=TOKENS)
    for handle in handles:
        handle.remove()
    return {name: layer.weight.detach().double().abs() * inputs[name].norm(dim=0) for name, layer in layers.items()}


def bounds(scores: torch.Tensor, threshold: float) -> tuple[float, float]:
    """The share of outliers if every score this near to the threshold fell on one side, and on the other."""
    line = threshold * float(scores.mean())
    return (float((scores > line * (1 + sign * NEAR)).sum()) / scores.numel() for sign in (1, -1))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ratios_equal_the_definition(kind: str, dtype: torch.dtype) -> None:
    adapter = ModelAdapter.of(random_model(kind, dtype=dtype))
    found, scores = ranked(adapter), direct_scores(adapter)
    assert found.tokens == TOKENS.numel()
    assert set(found.projections) == set(adapter.sizes())
    for threshold in THRESHOLDS:
        ratios = found.projection_ratios(threshold)
        for name, own in scores.items():
            low, high = bounds(own, threshold)
            assert low <= ratios[name] <= high
        for block in adapter.blocks:
            whole = torch.cat([scores[block.full_name(n)].flatten() for names in STAGES for n in names])
            low, high = bounds(whole, threshold)
            assert low <= found.block_ratios(threshold)[block.prefix] <= high
    assert any(ratio > 0 for ratio in found.projection_ratios(1.5).values())


def test_outliers_are_found_where_they_were_put() -> None:
    adapter = ModelAdapter.of(random_model())
    layer, name = adapter.blocks[1].projection("mlp.up_proj"), adapter.blocks[1].full_name("mlp.up_proj")
    before = ranked(adapter).projection_ratios(5.0)
    with torch.no_grad():
        layer.weight[3, :16] = 100 * layer.weight.abs().mean()
    after = ranked(adapter).projection_ratios(5.0)
    # the mean grows, so some that were outliers before may no longer be
    assert 16 / layer.weight.numel() <= after[name] <= 16 / layer.weight.numel() + before[name]
    assert {key for key in after if key < "model.layers.1" and after[key] != before[key]} == set()


def test_a_projection_without_scores_has_no_outliers() -> None:
    adapter = ModelAdapter.of(random_model())
    with torch.no_grad():
        adapter.blocks[0].projection("self_attn.v_proj").weight.zero_()  # o_proj then sees zeros
    found = ranked(adapter)
    for name in ("self_attn.v_proj", "self_attn.o_proj"):
        assert set(found.projections[adapter.blocks[0].full_name(name)].values()) == {0.0}


def test_overflow_is_named() -> None:
    adapter = ModelAdapter.of(random_model(dtype=torch.float16))
    with torch.no_grad():
        adapter.blocks[1].projection("mlp.up_proj").weight.fill_(6e4)
    with pytest.raises(NonFiniteError, match=r"the input of model.layers.1.mlp.down_proj is NaN or infinite"):
        ranked(adapter)


@pytest.fixture
def adapter() -> ModelAdapter:
    return ModelAdapter.of(random_model())


def test_round_trip(adapter: ModelAdapter, tmp_path: Path) -> None:
    found = ranked(adapter)
    found.save(tmp_path / "ranks.json")
    assert Ranks.load(tmp_path / "ranks.json", adapter, 5.0) == found


def spoiled(adapter: ModelAdapter, path: Path, **changes: Any) -> Path:
    ranked(adapter).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '{"schema": 1}', "\x00\x01", '{"model": "m"}'])
def test_corrupt_files_are_refused(adapter: ModelAdapter, tmp_path: Path, text: str) -> None:
    path = tmp_path / "ranks.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"ranks.json is not a readable ranking .* without --ranks"):
        Ranks.load(path, adapter, 5.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"projections": []},
        {"projections": {"model.layers.0.mlp.up_proj": 3}},
        {"projections": {"model.layers.0.mlp.up_proj": {"five": 0.1}}},
        {"blocks": {"model.layers.0": {"5": "many"}}},
        {"tokens": None},
    ],
)
def test_damaged_tables_are_refused(adapter: ModelAdapter, tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"not a readable ranking"):
        Ranks.load(spoiled(adapter, tmp_path / "ranks.json", **changes), adapter, 5.0)


def test_a_missing_file_is_refused(adapter: ModelAdapter, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere.json is not a readable ranking .*No such file"):
        Ranks.load(tmp_path / "nowhere.json", adapter, 5.0)


def test_another_schema_is_refused(adapter: ModelAdapter, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="ranking schema 2, this version reads 1"):
        Ranks.load(spoiled(adapter, tmp_path / "ranks.json", schema=2), adapter, 5.0)


def test_another_model_is_refused(adapter: ModelAdapter, tmp_path: Path) -> None:
    path = tmp_path / "ranks.json"
    ranked(adapter).save(path)
    deeper = ModelAdapter.of(random_model(num_hidden_layers=4))
    with pytest.raises(UsageError, match=r"ranks another model \(it differs at model.layers.3"):
        Ranks.load(path, deeper, 5.0)
    for blocks in ({}, {"model.layers.7": {"5.0": 0.1}}):
        with pytest.raises(UsageError, match=r"ranks another model \(it differs at model.layers.0\)"):
            Ranks.load(spoiled(adapter, path, blocks=blocks), adapter, 5.0)


def test_a_missing_threshold_is_named_with_those_that_exist(adapter: ModelAdapter, tmp_path: Path) -> None:
    path = tmp_path / "ranks.json"
    ranked(adapter).save(path)
    with pytest.raises(UsageError, match=r"no outlier threshold 4 for .* it has: 1.5, 3, 5"):
        Ranks.load(path, adapter, 4.0)


@pytest.mark.parametrize("ratio", [float("nan"), -0.1, 1.1, float("inf")])
def test_an_impossible_ratio_is_refused(adapter: ModelAdapter, tmp_path: Path, ratio: float) -> None:
    projections = ranked(adapter).projections
    projections["model.layers.1.mlp.up_proj"][5.0] = ratio
    with pytest.raises(UsageError, match=r"damaged: an outlier ratio of model.layers.1.mlp.up_proj"):
        Ranks.load(spoiled(adapter, tmp_path / "ranks.json", projections=projections), adapter, 5.0)


def test_the_usual_thresholds_hold_the_default() -> None:
    from mosaic_kernels.config import PruneConfig

    assert PruneConfig().outlier_threshold in DEFAULT_THRESHOLDS
