# SPDX-License-Identifier: Apache-2.0
"""Which pruning method loses least, at equal counts, on held-out text: ``python benchmarks/quality``.

Every cell of the grid (category x sparsity x method x seed) is one ``mk.prune``, a reload with
``from_pretrained`` and a judgement. Finished cells are kept, so the same command goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # ``quality`` and ``measure`` are siblings there

from measure import machine

from quality import plots, speed, summary
from quality.cells import METHODS, grid
from quality.log import Log
from quality.runner import Bench, Settings

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python benchmarks/quality", description=(__doc__ or "").split("\n")[0])
    models = [ROOT / "examples" / name for name in ("tiny-llama", "tiny-llama-mha")]
    text = ROOT / "examples" / "text"
    parser.add_argument("--models", type=Path, nargs="+", metavar="DIR", default=models, help="dense models")
    chosen = parser.add_argument_group("which cells (default: all)")
    chosen.add_argument("--categories", nargs="+", choices=list(METHODS), default=[])
    chosen.add_argument("--sparsities", type=float, nargs="+", metavar="S", default=[])
    known = sorted({method for methods in METHODS.values() for method in methods})
    chosen.add_argument("--methods", nargs="+", choices=known, metavar="M", default=[], help=", ".join(known))
    chosen.add_argument("--seeds", type=int, nargs="+", metavar="N", default=[0, 1, 2, 3, 4])
    run = parser.add_argument_group("how")
    run.add_argument("--calibration", type=Path, default=text / "calibration.txt", metavar="FILE")
    run.add_argument("--validation", type=Path, default=text / "validation.txt", metavar="FILE")
    run.add_argument("--samples", type=int, default=128, metavar="N", help="calibration windows (%(default)s)")
    run.add_argument("--seqlen", type=int, default=256, metavar="N", help="tokens in any window (%(default)s)")
    run.add_argument("--eval-tokens", type=int, default=40_000, metavar="N", help="held-out tokens (%(default)s)")
    run.add_argument("--kl-tokens", type=int, default=8192, metavar="N", help="of these, for the KL (%(default)s)")
    run.add_argument("--judge-dtype", default="auto", help="in which models are judged (%(default)s)")
    run.add_argument("--device", default="auto")
    run.add_argument("--fresh-ranks", action="store_true", help="every cell ranks anew instead of once for each seed")
    run.add_argument("--same-commit", action="store_true", help="run cells again that another commit finished")
    out = parser.add_argument_group("results")
    out.add_argument("--output", type=Path, metavar="FILE", help="JSONL of cells (results/quality-MODEL.jsonl)")
    out.add_argument("--report-only", action="store_true", help="run nothing; report on what is finished")
    out.add_argument("--plots", type=Path, metavar="DIR", help="figures (DIR/MODEL; default: beside the JSONL)")
    timing = parser.add_argument_group("instead of quality")
    timing.add_argument("--speed", action="store_true", help="seconds against a naive SparseGPT loop")
    timing.add_argument("--repeats", type=int, default=5, metavar="N")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run and report; 1 where a cell failed or methods of a row keep different counts."""
    arguments = make_parser().parse_args(argv)
    if arguments.output and len(arguments.models) > 1:
        print("error: --output takes one model; leave it out and each gets a file of its own", file=sys.stderr)
        return 2
    if arguments.output and not arguments.speed and arguments.output.suffix != ".jsonl":
        print("error: --output names the JSONL file of cells; the result goes beside it as .json", file=sys.stderr)
        return 2
    settings = Settings(
        arguments.calibration, arguments.validation, arguments.samples, arguments.seqlen, arguments.eval_tokens,
        arguments.kl_tokens, arguments.judge_dtype, arguments.device,
    )  # fmt: skip
    each = _speed if arguments.speed else _quality
    return max(each(model, settings, arguments) for model in arguments.models)


def _quality(path: Path, settings: Settings, arguments: argparse.Namespace) -> int:
    output = arguments.output or RESULTS / f"quality-{path.resolve().name}.jsonl"
    bench = Bench(path, settings, Log(output), same_commit=arguments.same_commit)
    cells = list(
        grid(
            arguments.seeds, categories=arguments.categories, sparsities=arguments.sparsities, methods=arguments.methods
        )
    )
    failed = [] if arguments.report_only else bench.run(cells, fresh_ranks=arguments.fresh_ranks)
    records = bench.records(cells)
    if not records:
        print("nothing to report: none of these cells is finished", file=sys.stderr)
        return 1
    result, faults, unavoidable = _report(path.resolve().name, bench, records)
    output.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(summary.markdown(result))
    for line in unavoidable:
        print(f"within one unit: {line}")
    try:
        folder = arguments.plots / path.resolve().name if arguments.plots else output.with_suffix("")
        for figure in plots.draw(result, records, folder):
            print(figure)
    except ImportError as error:
        print(f"no figures: {error}; pip install 'mosaic-kernels[plots]'", file=sys.stderr)
    for line in faults:
        print(f"counts differ: {line}", file=sys.stderr)
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return int(bool(faults or failed))


def _report(model: str, bench: Bench, records: list[dict[str, Any]]) -> tuple[dict[str, Any], list[str], list[str]]:
    """The result file, count faults, and differences that whole units cannot avoid."""
    dense = bench.dense_record()
    findings = summary.Findings(dense, records)
    hidden = json.loads((bench.path / "config.json").read_text())["hidden_size"]
    faults, unavoidable = findings.count_faults(summary.unit_parameters(hidden))
    nll = float(np.mean(dense["window_nll"]))
    cells = []
    for record in records:
        own = float(np.mean(record["window_nll"]))
        dropped = ("key", "window_nll", "projections", "versions")
        kept = {name: value for name, value in record.items() if name not in dropped}
        cells.append(kept | {"excess": own - nll, "perplexity": math.exp(min(700.0, own))})
    seqlen = bench.settings.seqlen
    result = {
        "schema": 1,
        "model": model,
        "model_digest": bench.digest,
        "prunable": dense["prunable"],
        "date": time.strftime("%Y-%m-%d"),
        "machine_info": dense["machine"],
        "commits": sorted({record["commit"] for record in records}),
        "versions": next((r["versions"] for r in records if "versions" in r), {}),
        "settings": bench.settings.identity,
        "dense": {"nll": nll, "perplexity": math.exp(nll), "tokens": len(dense["window_nll"]) * (seqlen - 1)},
        "rows": findings.rows(),
        "bars": findings.bars(),
        "count_faults": faults,
        "within_one_unit": unavoidable,
        "cells": cells,
    }
    return result, faults, unavoidable


def _speed(path: Path, settings: Settings, arguments: argparse.Namespace) -> int:
    name = path.resolve().name
    output = (arguments.output or RESULTS / f"pruning-speed-{name}.json").with_suffix(".json")
    result = {"model": name, "machine_info": machine(), **speed.measure(path, settings, repeats=arguments.repeats)}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(speed.markdown(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
