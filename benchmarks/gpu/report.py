# SPDX-License-Identifier: Apache-2.0
"""README's tables of GPU figures, which a run also prints last; nothing where nothing was measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu.bench import load
from gpu.goals import KERNELS, LARGE

STAGES = ("micro", "kernels", "e2e", "compiled", "ranking", "prune", "dispatch")
NOTHING = "**No GPU figure is given because none has been measured yet.**"


def files(folder: Path, *, tiny: bool = False) -> dict[str, dict[str, Any] | None]:
    """The file of every stage. Those that only tried the code (``tiny``) hold no measurement."""
    found = {stage: load(stage, folder) for stage in STAGES}
    return {stage: file if file is not None and (tiny or not file["tiny"]) else None for stage, file in found.items()}


def caption(file: dict[str, Any]) -> str:
    """On what, and whether all of it."""
    machine = file["machine_info"]
    if file["tiny"]:
        return "**Small shapes, to try the code: not a measurement.**"
    partly = "" if file["complete"] else "; not all of it was measured in the time given"
    where = f"{machine['gpu']}, CUDA {machine['cuda']}" if "gpu" in machine else machine["cpu"]
    return f"*{where}, torch {machine['torch']}, commit {machine['commit'] or 'unknown'}{partly}; `benchmarks/gpu`*"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def kernels(file: dict[str, Any]) -> str:
    """Speed over cuBLAS by rows and pattern: the median of the large shapes and, in brackets, the lowest."""
    large = [row for row in file["rows"] if row["out"] * row["in"] >= LARGE] or file["rows"]
    columns = [(pattern, "mosaic") for pattern in KERNELS[1,]] + [("2:4", "torch 2:4")]
    lines = []
    for rows in sorted({row["rows"] for row in large}):
        cells = [str(rows)]
        for pattern, variant in columns:
            found = [row for row in large if row["rows"] == rows and row["pattern"] == pattern]
            speeds = [row["speed_up"][variant] for row in found if variant in row["speed_up"]]
            broken = any(variant in row["errors"] for row in found)
            shown = f"{statistics.median(speeds):.2f}x ({min(speeds):.2f}x)" if speeds else ""
            eager = any(variant in row["not_captured"] for row in found)
            cells.append(shown + " failed" * broken + " without a graph" * eager)
        lines.append(cells)
    shapes = ", ".join(dict.fromkeys(f"{row['out']} x {row['in']}" for row in large))
    heads = ["rows of x", *(f"{p} removed" if p != "2:4" else "2:4" for p in KERNELS[1,]), "torch's 2:4"]
    return f"{_table(heads, lines)}\n\nShapes: {shapes}.\n\n{caption(file)}"


def e2e(file: dict[str, Any]) -> str:
    """Whole models: speed, latency, memory."""
    lines = []
    for row in file["rows"]:
        if "tokens_per_s" not in row:
            lines.append([row["variant"], f"failed: {row['error']}", *[""] * 4])
            continue
        ms, ratios = row["latency_ms"], row.get("ratios", {})
        over = f"{ratios['tokens_per_s']:.2f}x" if ratios else ""
        lines.append([
            row["variant"], f"{row['tokens_per_s']:.1f}", over,
            " / ".join(f"{ms[cut]:.2f}" for cut in ("p50", "p90", "p99")),
            *(_bytes(row[what], ratios.get(what)) for what in ("weight_bytes", "peak_bytes")),
        ])  # fmt: skip
    heads = ["model", "tokens/s", "over dense", "ms a token, p50 / p90 / p99", "weights, MB", "peak memory, MB"]
    beside = next((row["beside_weights"]["p50"] for row in file["rows"] if "beside_weights" in row), None)
    sentence = "" if beside is None else f"A dense model as deep but 64 features wide: {beside:.2f} ms a token.\n\n"
    return f"{_table(heads, lines)}\n\n{sentence}{caption(file)}"


def _bytes(size: int | None, ratio: float | None) -> str:
    if size is None:
        return "-"
    return f"{size / 1e6:,.0f}" + (f" ({ratio:.2f}x)" if ratio else "")


def ranking(file: dict[str, Any]) -> str:
    """Steps of pruning against plain torch."""
    lines = []
    for row in file["rows"]:
        shape = f"{row['out']} x {row['in']}" if "out" in row else f"{row['projections']} projections"
        if "error" in row:
            lines.append([row["operation"], shape, f"failed: {row['error']}", ""])
        elif "milliseconds" in row:
            lines.append([row["operation"], shape, f"{row['milliseconds']:.1f}", ""])
        else:
            ms = row["figures"]["ours"]["median_us"] / 1e3
            wrong = "" if row["same_result"] else " (results differ)"
            lines.append([row["operation"], shape, f"{ms:.2f}", f"{row['speed_up']:.1f}x{wrong}"])
    return f"{_table(['operation', 'shape', 'ms', 'against torch'], lines)}\n\n{caption(file)}"


def prune(file: dict[str, Any]) -> str:
    """Seconds of pruning runs, the longest of each variant."""
    longest = {row["variant"]: row for row in file["rows"] if "seconds" in row}
    failed = {row["variant"]: row["error"] for row in file["rows"] if "error" in row}
    lines = [
        [name, f"{row['blocks']} of {row['of_blocks']}", f"{row['tokens']:,}", f"{row['seconds']:.1f}",
         ", ".join(f"{kind} {seconds:.1f}" for kind, seconds in row["by_kind"].items())]
        for name, row in longest.items()
    ]  # fmt: skip
    lines += [[name, "", "", f"failed: {error}", ""] for name, error in failed.items()]
    heads = ["pruning run", "blocks pruned", "tokens", "seconds", "of which"]
    return f"{_table(heads, lines)}\n\n{caption(file)}"


def micro(file: dict[str, Any]) -> str:
    """The device's ceilings in a few lines."""
    rates = next(row for row in file["rows"] if row["kind"] == "rates")
    dense = [row for row in file["rows"] if row["kind"] == "dense"]
    if "skipped" in rates:
        lines = [f"Instruction rates were not measured: {rates['skipped']}."]
    else:
        names = {"popc": "POPC", "shfl": "SHFL", "lds_u16": "LDS.U16", "lds_64_broadcast": "LDS.64 (broadcast)"}
        shown = ", ".join(f"{names[key]} {rates[f'{key}_lanes_per_cycle']:.1f}" for key in names)
        lines = [
            f"Lanes a cycle on one of {rates['multiprocessors']} multiprocessors: {shown}.",
            f"HMMA {rates['hmma_tflops']:.0f} TFLOP/s; memory {rates['copy_gb_per_s']:.0f} GB/s copied (read and "
            f"written), {rates['read_gb_per_s']:.0f} GB/s read.",
        ]
    speeds = ", ".join(f"{row['out']} x {row['in']} {row['gigabytes_per_s']:.0f}" for row in dense)
    return "\n".join([*lines, f"cuBLAS at one row, GB/s: {speeds}.", "", caption(file)])


MAKERS = {"kernels": kernels, "e2e": e2e, "compiled": e2e, "ranking": ranking, "prune": prune, "micro": micro}
TITLES = {
    "kernels": "One bf16 linear layer against cuBLAS, weights rotating past the L2; median (lowest) of the shapes",
    "e2e": "A Llama of 7B parameters, random weights, batch 1, greedy, CUDA graphs",
    "compiled": "The same with every token through `torch.compile`",
    "ranking": "Pruning one bf16 projection, against plain torch",
    "prune": "Pruning that model at 50 %",
    "micro": "The device",
}


def ways(folder: Path, *, tiny: bool = False) -> str:
    """Speed over cuBLAS of every way that a product can go, by rows: for who sets the limits, not for README."""
    file = files(folder, tiny=tiny)["dispatch"]
    if file is None:
        return ""
    columns = list(dict.fromkeys((row["pattern"], way) for row in file["rows"] for way in row["speed_up"]))
    columns = [(pattern, way) for pattern, way in columns if way != "dense"]
    lines = []
    for rows in sorted({row["rows"] for row in file["rows"]}):
        cells = [str(rows)]
        for pattern, way in columns:
            here = [row["speed_up"] for row in file["rows"] if (row["rows"], row["pattern"]) == (rows, pattern)]
            speeds = [speed_up[way] for speed_up in here if way in speed_up]
            cells.append(f"{statistics.median(speeds):.2f}" if speeds else "")
        lines.append(cells)
    heads = ["rows of x", *(f"{pattern} {way}" for pattern, way in columns)]
    return f"\n**Ways of a product, times cuBLAS**\n\n{_table(heads, lines)}\n\n{caption(file)}"


def state(folder: Path) -> str:
    """Whether there are figures, and of what."""
    found = [file for file in files(folder).values() if file is not None]
    names = sorted({file["machine_info"].get("gpu", file["machine_info"]["cpu"]) for file in found})
    return f"Figures of {', '.join(names)} are under [On a GPU](#on-a-gpu)." if names else NOTHING


def markdown(folder: Path, *, tiny: bool = False) -> str:
    """Every table that there are figures for, each under a line that says what it is."""
    found = files(folder, tiny=tiny)
    parts = [
        f"**{TITLES[stage]}**\n\n{make(file)}"
        for stage, make in MAKERS.items()
        if (file := found[stage]) is not None and file["rows"]
    ]
    return "\n\n".join(parts) if parts else NOTHING
