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


def filled(text: str) -> str:
    """The README with every table between its markers made anew."""
    for name, make in (("example", example), ("linear", linear)):
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
