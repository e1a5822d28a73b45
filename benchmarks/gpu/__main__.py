# SPDX-License-Identifier: Apache-2.0
"""Measure on a GPU: ``python benchmarks/gpu kernels e2e``; ``benchmarks/run_gpu.sh`` does all of it and the tests.

Every stage writes ``gpu-STAGE-DEVICE.json``; ``summary`` prints what is there against the goals.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

# Python puts this folder first where it starts here, and transformers would take kernels.py for a package.
if __name__ == "__main__":
    sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).parents[1]))  # ``gpu``, ``measure`` and ``models`` are siblings there

from gpu import decode, dispatch, goals, kernels, micro, pruning, ranking, report
from gpu.bench import Bench, Row, note, write

STAGES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "micro": micro.measure,
    "kernels": kernels.measure,
    "e2e": decode.measure,
    "ranking": ranking.measure,
    "prune": pruning.measure,
    "dispatch": dispatch.measure,
    "compiled": decode.measure_compiled,
}


FOREIGN = ("dense", "torch 2:4")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python benchmarks/gpu", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("stages", nargs="+", choices=[*STAGES, "summary"], metavar="STAGE", help=", ".join(STAGES))
    results = Path(__file__).parents[1] / "results"
    parser.add_argument("--output", type=Path, default=results, metavar="DIR", help="for the files (%(default)s)")
    parser.add_argument("--seconds", type=float, default=3600, help="a stage starts nothing new after so many")
    parser.add_argument("--dry-run", action="store_true", help="small shapes, on a CPU too: tries the code")
    return parser


def errors(rows: Sequence[Row]) -> list[str]:
    """What of ours failed or computed something else, a line for each; a foreign baseline may fail."""
    found = []
    for row in rows:
        what = " ".join(str(row[key]) for key in ("variant", "operation", "shape", "pattern", "rows") if key in row)
        if "error" in row:
            found.append(f"{what}: {row['error']}")
        found += [f"{what}, {name}: {why}" for name, why in row.get("errors", {}).items() if name not in FOREIGN]
        same = row.get("deterministic", {})
        found += [f"{what}, {name}: two runs differ" for name in same if not (same[name] or name in FOREIGN)]
        if not row.get("same_result", True):
            found.append(f"{what}: not the result of plain torch")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor")
    failed = False
    for stage in options.stages:
        if stage == "summary":
            print(report.markdown(options.output, tiny=options.dry_run))
            print(report.ways(options.output, tiny=options.dry_run))
            print(f"\n{goals.table(report.files(options.output, tiny=options.dry_run))}")
            continue
        if not torch.cuda.is_available() and not options.dry_run:
            print(f"{stage}: torch sees no CUDA device; --dry-run tries the code without one", file=sys.stderr)
            return 3
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        bench = Bench(device, options.dry_run, options.seconds)
        try:
            path = write(stage, STAGES[stage](bench), bench, options.output)
            found = errors(json.loads(path.read_text())["rows"])
            note(f"wrote {path}", *found, sep="\n")
            failed = failed or bool(found)
        except Exception:
            traceback.print_exc()
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
