# SPDX-License-Identifier: Apache-2.0
"""``python -m mosaic_kernels.prune``: the main command."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from mosaic_kernels.cli import leads, run_command, show
from mosaic_kernels.config import (
    Category,
    ComputeDtype,
    OutputFormat,
    Policy,
    PruneConfig,
    Quality,
    Recovery,
    SolverName,
    Weights,
)

_EXAMPLE = """example:
  python -m mosaic_kernels.prune examples/tiny-llama --output-dir out --sparsity 0.6 \\
      --calibration examples/text/calibration.txt --seqlen 256 --eval-text examples/text/validation.txt

several devices, or processes on a CPU:
  torchrun --nproc-per-node N -m mosaic_kernels.prune MODEL --output-dir DIR ...
"""

_DEFAULTS = PruneConfig()


def make_parser() -> argparse.ArgumentParser:
    """The command line of ``mosaic-prune``."""
    parser = argparse.ArgumentParser(
        prog="python -m mosaic_kernels.prune",
        description="Prune a Hugging Face causal language model per projection, on an exact budget, and write a "
        "checkpoint that reloads with from_pretrained and runs fast.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="local Hugging Face directory, or hub id")
    parser.add_argument("--output-dir", metavar="DIR", help="where to write (needed unless --dry-run)")

    target = parser.add_argument_group("target")
    target.add_argument("--sparsity", type=float, metavar="S", help="fraction of parameters to remove, 0 <= S < 1")
    target.add_argument(
        "--category",
        choices=get_args(Category),
        help="zeros, whole heads and channels, or both; auto: composite where sparse kernels run, else structured",
    )
    target.add_argument(
        "--structured-share",
        type=float,
        metavar="R",
        help="fraction of all prunable parameters removed as heads and channels (composite; default: S/6, S/3 or S/2, "
        "as trials tell)",
    )
    target.add_argument(
        "--pattern", help="unstructured, row (equal counts in every row), or N:M such as 2:4, which keeps N of M"
    )
    target.add_argument("--channel-multiple", type=int, metavar="M", help="FFN widths stay multiples of M channels")

    method = parser.add_argument_group("method")
    method.add_argument(
        "--policy",
        choices=get_args(Policy),
        help="how the budget is spread over projections (default: curve; uniform with --quality fast)",
    )
    method.add_argument("--outlier-threshold", type=float, metavar="A", help="an outlier scores above A times the mean")
    method.add_argument("--max-deviation", type=float, metavar="L", help="half the spread of targets around S")
    method.add_argument("--solver", choices=get_args(SolverName), help="who chooses the zeros and the new values")
    method.add_argument(
        "--quality",
        choices=get_args(Quality),
        help="fast: Wanda's mask and a refit, no probes; best: longer solves, every projection probed",
    )
    method.add_argument(
        "--recover",
        choices=get_args(Recovery),
        help="tune what is kept: reconstruct (block by block), or lora (the whole model, masked low-rank, needs peft)",
    )
    method.add_argument("--ranks", metavar="FILE", help="reuse the ranks.json of an earlier run on this model")

    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibration",
        metavar="PATH|DATASET|random",
        help="a local file or folder (works offline): text, or a table with a column 'text' (.jsonl, .json, .csv, "
        ".parquet; PATH:COLUMN for another); - is the standard input; or wikitext2, c4, ptb, a hub id, or random",
    )
    calibration.add_argument("--samples", type=int, help="calibration sequences")
    calibration.add_argument(
        "--seqlen", type=int, help="tokens per sequence, also in evaluation (default: 2048, or the model's limit)"
    )
    calibration.add_argument("--seed", type=int)

    evaluation = parser.add_argument_group("evaluation")
    evaluation.add_argument("--eval-text", metavar="FILE", help="perplexity on this text or table before and after")
    evaluation.add_argument(
        "--eval-tokens",
        type=int,
        metavar="N",
        help="number of tokens of that text to evaluate on, from its beginning (default: all)",
    )

    running = parser.add_argument_group("running")
    running.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    running.add_argument(
        "--dtype", help="dtype of the stored weights: auto (that of the checkpoint), float32, bfloat16 or float16"
    )
    running.add_argument(
        "--compute-dtype",
        choices=get_args(ComputeDtype),
        help="dtype of the arithmetic; auto: the dtype of the weights, or float32 on a CPU that multiplies it slowly; "
        "does not change the dtype of the checkpoint",
    )
    running.add_argument("--format", choices=get_args(OutputFormat), help="packed, or ordinary weights with zeros")
    running.add_argument(
        "--weights",
        choices=get_args(Weights),
        help="packed values: the model's floats, or int8 with a scale for each "
        "row or for each 64 columns of it; 9 bits a weight where nothing is zero",
    )
    running.add_argument(
        "--resume",
        action="store_true",
        help="go on with an interrupted run; if there is none, start anew, as --overwrite does",
    )
    running.add_argument("--overwrite", action="store_true", help="replace a non-empty output directory")
    running.add_argument("--dry-run", action="store_true", help="print the plan and its sizes; reads no weights")
    running.add_argument("--json", action="store_true", help="print the report as one line of JSON")

    for action in parser._actions:
        default = None if action.dest == "policy" else getattr(_DEFAULTS, action.dest, None)
        if action.dest in PruneConfig.__dataclass_fields__:
            action.default = argparse.SUPPRESS
            if default is not None and not isinstance(default, bool):
                action.help = f"{action.help + ' ' if action.help else ''}(default: {default})"
    return parser


def _body(argv: list[str]) -> None:
    options = vars(make_parser().parse_args(argv))
    model, output_dir = options.pop("model"), options.pop("output_dir")
    as_json, dry_run = options.pop("json"), options.pop("dry_run")
    if dry_run:
        from mosaic_kernels.checkpoint.ownership import require_output
        from mosaic_kernels.prune.dry_run import describe, predict

        if output_dir is not None:
            wishes = {name: options.get(name, False) for name in ("overwrite", "resume")}
            require_output(output_dir, source=model, **wishes)
        prediction = predict(model, options)
        show(json.dumps(prediction) if as_json else describe(prediction))
        return
    from mosaic_kernels.prune.pipeline import prune
    from mosaic_kernels.prune.ranks import launcher
    from mosaic_kernels.prune.report import format_table

    command = [*launcher(), "-m", "mosaic_kernels.prune", *argv]
    report = prune(model, output_dir=output_dir, command=command, **options)
    if leads():
        kept = f"in {output_dir}, and the report in {Path(output_dir, 'mosaic_report.json')}"
        show(json.dumps(report) if as_json else format_table(report), kept)


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``mosaic-prune``; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    return run_command(lambda: _body(arguments))


if __name__ == "__main__":
    sys.exit(main())
