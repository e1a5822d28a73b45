# SPDX-License-Identifier: Apache-2.0
"""``--dry-run``: the plan with its sizes, from the configuration alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch

from mosaic_kernels.checkpoint.reader import load_skeleton
from mosaic_kernels.cli import resolve_device
from mosaic_kernels.compute import settle_compute_dtype
from mosaic_kernels.config import DEFAULT_SEQLEN, PruneConfig
from mosaic_kernels.models import STAGES, ModelAdapter
from mosaic_kernels.prune.capture import TOKENS_PER_BATCH
from mosaic_kernels.prune.composite import Plan, make_plan
from mosaic_kernels.prune.given import sequence_length
from mosaic_kernels.prune.importance import Ranks
from mosaic_kernels.prune.options import make_config
from mosaic_kernels.prune.pipeline import keeps_dense_side, settle_category
from mosaic_kernels.prune.planning import to_measure
from mosaic_kernels.prune.sensitivity import PROBE_TOKENS
from mosaic_kernels.prune.solvers import choose_solver
from mosaic_kernels.prune.walk import KEPT_BYTES


def predict(model: str, options: dict[str, Any]) -> dict[str, Any]:
    """Predict what a run would remove and need. Reads the configuration and local texts, but no weights.

    Without ``ranks``, or where the structured share is yet to be chosen, the spread over projections is not
    known before calibration; the totals are, because every policy but ``mosaic-reference`` meets the same
    budget. The targets shown are then uniform, at the share that is usual.

    Returns:
        Totals, bytes before and after, predicted peak host bytes, and per projection shape and zeros.
    """
    config = make_config(options)
    device = resolve_device(config.device)
    config = settle_category(config, device)
    skeleton = load_skeleton(model, dtype=config.dtype)
    adapter = ModelAdapter.of(skeleton)
    ranks = None if config.ranks is None else Ranks.load(config.ranks, adapter, config.outlier_threshold)
    known = not any(to_measure(config, ranks)) and not config.chooses_share
    known = known and not (config.policy == "curve+search" and config.needs_curves)
    known = known and (ranks is not None or not config.needs_ranks)
    plan = make_plan(adapter, ranks, config if known else replace(config, policy="uniform"))
    dtype = next(skeleton.parameters()).dtype
    computing = settle_compute_dtype(config.compute_dtype, adapter.dtype, device)
    dense = sum(p.numel() * p.element_size() for p in skeleton.parameters())
    projections = plan.predicted_bytes(dtype.itemsize, packed=config.format == "mosaic", weights=config.weights)
    pruned = dense - plan.prunable * dtype.itemsize + projections
    pruned -= _lost_biases(adapter, plan) * dtype.itemsize
    limit = getattr(skeleton.config, "max_position_embeddings", None) or DEFAULT_SEQLEN
    seqlen = sequence_length(config.calibration, config.seqlen, limit)
    return {
        "model": model,
        "category": config.category,
        "policy": config.policy,
        "compute_dtype": computing.name,
        "targets": "exact" if known else "uniform until a ranking is made",
        "prunable_parameters": plan.prunable,
        "removed_parameters": plan.removed,
        "structured_removed": plan.structured_removed,
        "unstructured_zeros": sum(plan.zeros.values()),
        "bytes": {"dense": dense, "pruned": pruned},
        "peak_memory_bytes": {
            "host": _peak(
                adapter,
                plan,
                dense // dtype.itemsize * computing.dtype.itemsize,
                computing.dtype,
                config.samples,
                seqlen,
                config,
            )
        },
        "projections": {
            name: {"shape": list(shape), "zeros": plan.zeros[name], "target": plan.target(name)}
            for name, shape in plan.shapes.items()
        },
    }


def _lost_biases(adapter: ModelAdapter, plan: Plan) -> int:
    """Biases that leave with their heads or channels."""
    return sum(
        layer.out_features - plan.shapes[block.full_name(name)][0]
        for block, name, layer in adapter.projections()
        if layer.bias is not None
    )


def _peak(
    adapter: ModelAdapter,
    plan: Plan,
    dense: int,
    dtype: torch.dtype,
    samples: int,
    seqlen: int,
    config: PruneConfig,
) -> int:
    """Weights, two generations of hidden states, and the largest projection's working set.

    A solve holds about four fp32 Grams (sum, damped copy, factor, inverse factor) and four fp32 copies of the
    weight, two Grams more beside the dense stream, whose kept inputs come on top; a forward pass holds one batch of
    the widest activation in fp32. A search holds two copies of the model and all Grams.
    """
    solver, beside = choose_solver(config.solver, config.quality), keeps_dense_side(config)
    searches = config.policy == "curve+search" and config.needs_curves
    hidden = adapter.blocks[0].projection("self_attn.q_proj").in_features
    states = (4 if beside else 2) * samples * seqlen * hidden * dtype.itemsize
    widest = max(i for _, i in plan.original_shapes.values())
    largest = max(o * i for o, i in plan.original_shapes.values())
    kept = (1 + beside) * min(KEPT_BYTES["cpu"], samples * seqlen * widest * dtype.itemsize)
    gram = (6 if solver.two_streams else 4) * widest * widest * 4 if solver.with_gram or plan.structured_removed else 0
    # probes keep the dense model's predictions and make as many again
    vocabulary = cast(Any, adapter.model).get_output_embeddings().out_features
    predictions = (
        2 * min(samples * seqlen, PROBE_TOKENS) * vocabulary * dtype.itemsize
        if config.needs_curves or config.needs_removal_costs
        else 0
    )
    activations = 3 * min(samples * seqlen, max(TOKENS_PER_BATCH, seqlen)) * widest * 4
    searching = 0
    if searches:
        inputs = [adapter.blocks[0].projection(names[0]).in_features for names in STAGES]
        searching = 2 * plan.prunable * dtype.itemsize + len(adapter.blocks) * sum(4 * i * i for i in inputs)
    # tuning holds masters, gradients and two moments in fp32: of half a block, or a masked copy of the weights
    tuning = {"none": 0, "reconstruct": 5 * 3 * largest * 4, "lora": plan.prunable * dtype.itemsize}[config.recover]
    return dense + states + max(activations, kept + gram + 4 * largest * 4, predictions, searching, tuning)


def describe(prediction: dict[str, Any]) -> str:
    """The prediction as people read it."""
    size, peak = prediction["bytes"], prediction["peak_memory_bytes"]["host"]
    removed, prunable = prediction["removed_parameters"], prediction["prunable_parameters"]
    lines = [
        f"model        {prediction['model']}",
        f"method       {prediction['category']}, policy {prediction['policy']} (targets: {prediction['targets']})",
        f"removes      {removed:,} of {prunable:,} prunable parameters ({removed / prunable:.2%})",
        f"             {prediction['structured_removed']:,} in heads and channels, "
        f"{prediction['unstructured_zeros']:,} as zeros",
        f"bytes        {size['dense']:,} -> {size['pruned']:,} ({size['pruned'] / size['dense']:.1%})",
        f"peak memory  about {peak / 2**30:.2f} GiB on the host, computing in {prediction['compute_dtype']}",
        "",
    ]
    lines += [
        f"{name:<48} {entry['shape'][0]:>6} x {entry['shape'][1]:<6} {entry['target']:>7.2%}"
        for name, entry in prediction["projections"].items()
    ]
    return "\n".join(lines)
