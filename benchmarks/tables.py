# SPDX-License-Identifier: Apache-2.0
"""README's tables, written from the committed JSON: ``python benchmarks/tables.py`` (``--check``: only compare)."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def load(noun: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The machine of a result file, and what each of its benchmarks found."""
    paths = sorted((HERE / "results").glob(f"{noun}-*.json"))
    if not paths:
        sys.exit(f"no benchmarks/results/{noun}-*.json: run benchmarks/bench_{noun}.py as its first lines say")
    path = paths[-1]
    found = json.loads(path.read_text())
    return found["machine_info"], [b["extra_info"] | {"name": b["name"]} for b in found["benchmarks"]]


def caption(machine: dict[str, Any], file: str) -> str:
    return (
        f"*{machine['cpu']}, {machine['threads']} threads, {machine['isa']}, torch {machine['torch']}, "
        f"commit {machine['commit']}; `benchmarks/{file}`*"
    )


def example() -> str:
    machine, found = load("prune")
    lines = [
        "| category | solver, policy | parameters | weight bytes | perplexity | decode, vs dense | pruning, s |",
        "|---|---|---|---|---|---|---|",
    ]
    first = found[0]
    lines.append(
        f"| dense | - | {first['parameters']['dense']:,} | {first['bytes']['dense']:,} "
        f"| {first['perplexity']['dense']:.2f} | {first['decode_tokens_per_s']['dense']:.0f} tokens/s | - |"
    )
    for row in found:
        speed = row["decode_tokens_per_s"]
        seconds = sum(row["seconds"][station] for station in ("allocate", "prune"))
        lines.append(
            f"| {row['category']} | {row['solver']}, {row['policy']} | {row['parameters']['pruned']:,} "
            f"| {row['bytes']['pruned']:,} | {row['perplexity']['pruned']:.2f} "
            f"| {speed['pruned']:.0f} tokens/s, {speed['pruned'] / speed['dense']:.2f}x | {seconds:.0f} |"
        )
    return "\n".join([*lines, "", caption(machine, "bench_prune.py")])


def linear() -> str:
    machine, found = load("linear")
    rows = sorted({row["rows"] for row in found})
    lines = [
        "| out x in | density | " + " | ".join(f"{r} row{'s' if r > 1 else ''}" for r in rows) + " | weight bytes |",
        "|---|---|" + "---|" * (len(rows) + 1),
    ]
    cells: dict[tuple[str, str], dict[int, float]] = {}
    sizes: dict[tuple[str, str], float] = {}
    for row in found:
        key = (f"{row['shape'][0]} x {row['shape'][1]}", f"{row['density']:.1f}")
        cells.setdefault(key, {})[row["rows"]] = row["speed_up"]
        sizes[key] = 1 / row["byte_ratio"]
    for (shape, density), speeds in cells.items():
        shown = " | ".join(f"{speeds[r]:.2f}x" if r in speeds else "" for r in rows)
        lines.append(f"| {shape} | {density} | {shown} | {sizes[shape, density]:.2f} of dense |")
    return "\n".join([*lines, "", caption(machine, "bench_linear.py")])


def generate() -> str:
    """Whole models, and in a sentence what a token costs beside our kernels."""
    machine, found = load("generate")
    rows = {row["variant"]: row for row in found if "prefill" in row}
    (outside,) = (row["milliseconds"] for row in found if "milliseconds" in row)
    (cached,) = (row for row in found if "compile_seconds" in row)
    theirs = [name for name in rows if name.startswith("llama.cpp")]
    dense = rows["dense"]["weight_bytes"]
    heads = ["model", "decode, tokens/s", *(f"over {name}" for name in ("dense", *theirs))]
    heads += ["prefill, tokens/s", "over dense", "projections, MB", "all weights, MB"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in rows.items():
        over = row["ratios"] if "memory" in row else {}
        cells = [name, f"{row['decode']['tokens_per_s']:.1f}", f"{over['decode']:.2f}x" if over else ""]
        cells += [f"{rows[t]['ratios'][f'{name} over it']:.2f}x" if over else "" for t in theirs]
        cells += [f"{row['prefill']['tokens_per_s']:.0f}", f"{over['prefill']:.2f}x" if over else ""]
        for what in ("projections", "model"):
            size = row.get("weight_bytes", {}).get(what)
            share = f" ({size / dense[what]:.2f}x)" if over else ""
            cells.append("" if size is None else f"{size / 1e6:,.0f}{share}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        f"Of the {outside['token']:.1f} ms of a token (bitmap 50 %), {outside['outside_kernels']:.1f} ms pass outside "
        f"our kernels, {outside['calls']:.1f} ms of them in Python and calls. A static cache decodes "
        f"{cached['ratios']['static']:.2f}x as fast, and with `torch.compile` (`dynamic=False`) "
        f"{cached['ratios']['compiled']:.2f}x.",
    ]
    return "\n".join([*lines, "", caption(machine, "bench_generate.py")])


OURS = (
    "fast",
    "default",
    "ours",
    "best",
    "curve+search",
    "default+reconstruct",
    "best+reconstruct",
    "ours+reconstruct",
)


def quality() -> str:
    """One table per judged model."""
    parts = []
    for path in sorted((HERE / "results").glob("quality-*.json"), reverse=True):
        found = json.loads(path.read_text())
        rows: dict[str, dict[str, dict[str, Any]]] = {}
        for row in found["rows"]:
            share = "" if row["share"] is None else f", {row['share']:.0%} of all structured"
            rows.setdefault(f"{row['category']} {row['sparsity']:.0%}{share}", {})[row["method"]] = row
        shown = [
            m for m in ("fast", "default", "best", "best+reconstruct") if any(m in cells for cells in rows.values())
        ]
        lines = [
            f"**{found['model']}**, dense perplexity {found['dense']['perplexity']:.2f} "
            f"on {found['dense']['tokens']:,} tokens:",
            "",
            f"| removed | other methods | {' | '.join(shown)} | default / best other (95 %) |",
            "|---|---|" + "---|" * (len(shown) + 1),
        ]
        for name, cells in rows.items():
            others = ", ".join(f"{m} {row['excess']:.3f}" for m, row in cells.items() if m not in OURS)
            renamed = {("default" if m == "ours" else m): row for m, row in cells.items()}
            excesses = " | ".join(f"{renamed[m]['excess']:.3f}" if m in renamed else "" for m in shown)
            ratio = renamed.get("default", {}).get("ratio")
            against = (
                f"{ratio['value']:.2f} ({ratio['interval'][0]:.2f} to {ratio['interval'][1]:.2f})" if ratio else ""
            )
            lines.append(f"| {name} | {others} | {excesses} | {against} |")
        seeds = max(len(row["seeds"]) for row in found["rows"])
        settings = found["settings"]
        lines += ["", f"*up to {seeds} calibration seeds of {settings['samples']} x {settings['seqlen']} tokens, "
                      f"commit {', '.join(found['commits'])}; `benchmarks/quality`*", ""]  # fmt: skip
        parts.append("\n".join(lines))
    return "\n".join(parts).rstrip()


def speed() -> str:
    path = HERE / "results" / "pruning-speed-tiny-llama.json"
    found = json.loads(path.read_text())
    lines = ["| pruning run | seconds | naive / it |", "|---|---|---|"]
    naive = found["medians"]["naive"]
    lines += [f"| {name} | {value:.1f} | {naive / value:.2f}x |" for name, value in found["medians"].items()]
    what = f"{found['samples']} x {found['seqlen']} tokens; naive: SparseGPT sample by sample"
    return "\n".join([*lines, "", f"*{what}; `benchmarks/quality --speed`*"])


def filled(text: str) -> str:
    """The README with every table between its markers made anew."""
    for name, make in (
        ("example", example), ("linear", linear), ("generate", generate), ("quality", quality), ("speed", speed),
    ):  # fmt: skip
        begin, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}{make()}\n{end}{after}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail where README and JSON differ; write nothing")
    check = parser.parse_args().check
    text = README.read_text()
    new = filled(text)
    if check:
        if new != text:
            print(
                "README's tables are not those of benchmarks/results: run python benchmarks/tables.py", file=sys.stderr
            )
        return int(new != text)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
