# SPDX-License-Identifier: Apache-2.0
"""The report of a run: ``mosaic_report.json``, and the table people read."""

from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from mosaic_kernels.checkpoint.public import public_command, public_name
from mosaic_kernels.cli import peak_memory_bytes
from mosaic_kernels.compute import Computing
from mosaic_kernels.config import OutputFormat, PruneConfig
from mosaic_kernels.device import name_of
from mosaic_kernels.linear import MosaicLinear
from mosaic_kernels.models import ModelAdapter
from mosaic_kernels.prune.calibration import Calibration
from mosaic_kernels.prune.composite import Plan
from mosaic_kernels.prune.importance import Ranks

logger = logging.getLogger(__name__)

REPORT_SCHEMA = 1


def make_report(
    adapter: ModelAdapter,
    plan: Plan,
    ranks: Ranks,
    config: PruneConfig,
    computing: Computing,
    calibration: Calibration,
    *,
    command: Sequence[str],
    model: str,
    seconds: dict[str, float],
    by_kind: dict[str, float],
    tuned: dict[str, Any] | None,
    perplexities: dict[str, Any] | None,
) -> dict[str, Any]:
    """The report, counted from the pruned model itself, not from the plan. It holds only the last parts of paths.

    ``seconds`` is kept by reference, so stations that end later still appear.
    """
    ratios = ranks.projection_ratios(config.outlier_threshold)
    projections: dict[str, dict[str, Any]] = {}
    for block, name, layer in adapter.projections():
        full = block.full_name(name)
        rows, columns = plan.original_shapes[full]
        nnz = layer.nnz if isinstance(layer, MosaicLinear) else int(layer.weight.count_nonzero())
        projections[full] = {
            "original_shape": [rows, columns],
            "shape": [layer.out_features, layer.in_features],
            "nnz": nnz,
            "target": plan.target(full),
            "sparsity": 1 - nnz / (rows * columns),
            "outlier_ratio": ratios[full],
        }
    structured = plan.prunable - sum(o["shape"][0] * o["shape"][1] for o in projections.values())
    zeros = sum(o["shape"][0] * o["shape"][1] - o["nnz"] for o in projections.values())
    return {
        "schema": REPORT_SCHEMA,
        "model": public_name(model),
        "command": public_command(command),
        "seed": config.seed,
        "versions": _versions(),
        "device": {**_device(adapter), "compute_dtype": computing.name, "compute_dtype_why": computing.why},
        "dtype": name_of(adapter.dtype),
        "category": config.category,
        "policy": config.policy,
        "solver": config.solver,
        "quality": config.quality,
        "recover": {"method": config.recover, **(tuned or {})},
        "weights": config.weights,
        "calibration": dict(zip(("samples", "seqlen"), calibration.tokens.shape, strict=True))
        | {"source": public_name(calibration.source)},
        "prunable_parameters": plan.prunable,
        "removed_parameters": structured + zeros,
        "removed_difference": structured + zeros - plan.budget,
        "sparsity": (structured + zeros) / plan.prunable,
        "structured_removed": structured,
        "unstructured_zeros": zeros,
        "projections": projections,
        "bytes": {"dense": _dense_bytes(adapter, plan), "pruned": _pruned_bytes(adapter, config.format)},
        "perplexity": None if perplexities is None else {**perplexities, "text": public_name(perplexities["text"])},
        "seconds": seconds,
        "seconds_by_kind": by_kind,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def log_removed(adapter: ModelAdapter, plan: Plan, config: PruneConfig) -> None:
    """Log if nothing will be removed, and how much of the budget existing zeros already meet.

    Args:
        adapter: the model before pruning.
        plan: the weights to remove.
        config: the configuration, whose sparsity is the budget.
    """
    if not plan.removed:
        logger.info(
            "nothing is removed: sparsity %g of %s prunable parameters removes none of them; the weights stay",
            config.sparsity, f"{plan.prunable:,}",
        )  # fmt: skip
    there = sum(layer.weight.numel() - int(layer.weight.count_nonzero()) for _, _, layer in adapter.projections())
    if not there:
        return
    share = there / plan.prunable
    logger.info("%s of %s prunable parameters (%.2f %%) are zero already; they count as removed", f"{there:,}",
                f"{plan.prunable:,}", 100 * share)  # fmt: skip
    if there >= plan.removed:
        logger.warning(
            "these zeros meet the budget of sparsity %g (%s parameters) already: more than %g removes more, and less "
            "may fill some of them", config.sparsity, f"{plan.removed:,}", share,
        )  # fmt: skip


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("mosaic-kernels", "torch", "transformers", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _device(adapter: ModelAdapter) -> dict[str, Any]:
    device = next(adapter.model.parameters()).device
    found: dict[str, Any] = {"type": device.type, "machine": platform.machine(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found["name"] = torch.cuda.get_device_name(device)
    return found


def _pruned_bytes(adapter: ModelAdapter, format: OutputFormat) -> int:
    """Bytes a checkpoint stores: every parameter once, tied ones once; zeros too in format dense."""
    stored = sum(p.nbytes for p in adapter.model.parameters())
    for _, _, layer in adapter.projections():
        if format == "dense" and isinstance(layer, MosaicLinear):
            stored += layer.out_features * layer.in_features * adapter.dtype.itemsize - layer.packed.nbytes
    return stored


def _dense_bytes(adapter: ModelAdapter, plan: Plan) -> int:
    """Bytes of the same model before pruning."""
    parameters = dict(adapter.model.named_parameters())
    stored = sum(p.nbytes for p in parameters.values())
    for block, name, layer in adapter.projections():
        full = block.full_name(name)
        rows, columns = plan.original_shapes[full]
        bias = rows if layer.bias is not None else 0
        stored += (rows * columns + bias) * adapter.dtype.itemsize
        stored -= sum(p.nbytes for key, p in parameters.items() if key.startswith(f"{full}."))
    return stored


def format_table(report: dict[str, Any]) -> str:
    """The result as people read it."""
    dense, pruned = report["bytes"]["dense"], report["bytes"]["pruned"]
    calibration = report["calibration"]
    stored = "" if report["weights"] == "float" else f", weights {report['weights']}"
    lines = [
        f"model          {report['model']}",
        f"method         {report['category']}, policy {report['policy']}, solver {report['solver']}",
        f"dtype          {report['dtype']}, computed in {report['device']['compute_dtype']}",
        f"calibration    {calibration['samples']} sequences of {calibration['seqlen']} tokens: {calibration['source']}",
        f"removed        {report['removed_parameters']:,} of {report['prunable_parameters']:,} prunable parameters "
        f"({report['sparsity']:.2%})",
        f"               {report['structured_removed']:,} in heads and channels, "
        f"{report['unstructured_zeros']:,} as zeros",
        f"bytes          {dense:,} -> {pruned:,} ({pruned / dense:.1%})" + stored,
    ]
    if report["removed_difference"]:
        lines.insert(6, f"               {report['removed_difference']:+,} from the exact budget")
    if report["perplexity"] is not None:
        found = report["perplexity"]
        change = f"{found['dense']:.2f} -> {found['pruned']:.2f}"
        if "before_int8" in found:
            change += f" ({found['before_int8']:.2f} before int8)"
        lines.append(f"perplexity     {change} on {found['tokens']:,} tokens of {found['text']}")
    spent = ", ".join(f"{station} {seconds:.1f}" for station, seconds in report["seconds"].items())
    lines.append(f"seconds        {spent}")
    kinds = ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in report["seconds_by_kind"].items())
    lines.append(f"of these       {kinds}")
    return "\n".join(lines)
