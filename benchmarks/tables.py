# SPDX-License-Identifier: Apache-2.0
"""Tables of README and docs, made from the committed JSON: ``python benchmarks/tables.py`` (``--check``: compare)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu import report

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", HERE.parent / "docs" / "benchmarks.md")

Rows = list[dict[str, Any]]
Found = tuple[dict[str, Any], Rows]


def results(noun: str) -> list[Found]:
    """The machine and the results of its benchmarks, for every machine whose figures are committed."""
    paths = sorted((HERE / "results").glob(f"{noun}-*.json"), reverse=True)  # xeon before epyc: the newest first
    if not paths:
        sys.exit(f"no benchmarks/results/{noun}-*.json: run benchmarks/bench_{noun}.py as its first lines say")
    found = [json.loads(path.read_text()) for path in paths]
    return [
        (file["machine_info"], [b["extra_info"] | {"name": b["name"]} for b in file["benchmarks"]]) for file in found
    ]


def for_every_machine(noun: str, table: Callable[[dict[str, Any], Rows], str]) -> str:
    """One table below the other."""
    return "\n\n".join(table(machine, rows) for machine, rows in results(noun))


def caption(machine: dict[str, Any], file: str) -> str:
    return f"*{described(machine)}, torch {machine['torch']}, commit {machine['commit']}; `benchmarks/{file}`*"


def described(machine: dict[str, Any]) -> str:
    """Processor, threads and instruction set, with a remark if the processor has a higher one."""
    isa, features = machine["isa"], machine.get("features", "").split()
    limited = isa == "avx2" and "avx512" in features
    return f"{machine['cpu']}, {machine['threads']} threads, {f'{isa} (limited to it)' if limited else isa}"


def example() -> str:
    machine, found = results("prune")[0]
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


def linear(machine: dict[str, Any], found: Rows) -> str:
    """A line per shape: one row of x at every density, then more rows at the first density."""
    tests = [row for row in found if row["name"].startswith("test_linear[")]
    densities = sorted({round(row["density"], 1) for row in tests}, reverse=True)
    rows = [cell["rows"] for cell in tests[0]["cells"]]
    lines = [
        f"| out x in | {' | '.join(f'1 row, {d:.0%} kept' for d in densities)} "
        f"| {' | '.join(f'{n} rows, {densities[0]:.0%}' for n in rows[1:])} |",
        "|---|" + "---|" * (len(densities) + len(rows) - 1),
    ]
    shapes: dict[str, dict[float, dict[int, float]]] = {}
    for row in tests:
        speeds = {cell["rows"]: cell["speed_up"]["packed"] for cell in row["cells"]}
        shapes.setdefault("{} x {}".format(*row["shape"]), {})[round(row["density"], 1)] = speeds
    for shape, by_density in shapes.items():
        shown = [by_density[d][1] for d in densities] + [by_density[densities[0]][n] for n in rows[1:]]
        lines.append(f"| {shape} | {' | '.join(f'{speed:.2f}x' for speed in shown)} |")
    shares = ", ".join(
        f"{row['ratios']['share of read bandwidth']:.0%} at {row['density']:.0%} kept"
        for row in found
        if "share of read bandwidth" in row["ratios"]
    )
    return "\n".join([*lines, "", f"One row of 11008 x 4096 against the machine's read bandwidth: {shares}.", "",
                      caption(machine, "bench_linear.py")])  # fmt: skip


def int8(machine: dict[str, Any], found: Rows) -> str:
    """The forms of a packed weight, at one row and at more."""
    tests = [row for row in found if row["name"].startswith("test_int8[")]
    forms = [name for name in tests[0]["cells"][0]["speed_up"] if not name.startswith("dense")]
    rows = [cell["rows"] for cell in tests[0]["cells"]]
    lines = [
        f"| out x in | values | {' | '.join(f'{n} row' + 's' * (n > 1) for n in rows)} | bytes, of dense |",
        "|---|---|" + "---|" * (len(rows) + 1),
    ]
    for row in tests:
        for name in forms:
            speeds = " | ".join(f"{cell['speed_up'][name]:.2f}x" for cell in row["cells"])
            size = row["memory"].get(f"{name}, bytes over dense")
            shown = "bf16" if name == "packed" else name
            lines.append(
                f"| {row['shape'][0]} x {row['shape'][1]} | {shown} | {speeds} | {f'{size:.3f}' if size else ''} |"
            )
    return "\n".join([*lines, "", caption(machine, "bench_linear.py")])


def score() -> str:
    """Every step of pruning a projection that has a kernel, from two result files."""
    machine, scored = results("score")[0]
    cells: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in [*scored, *results("pack")[0][1]]:
        shape = " x ".join(str(size) for size in row["shape"])
        cells.setdefault((row["operation"], shape), {})[row["threads"]] = row
    threads = sorted({count for row in cells.values() for count in row})
    heads = [f"{what}, {count} thread{'s' * (count > 1)}" for count in threads for what in ("ms", "against torch")]
    lines = [f"| operation | shape | {' | '.join(heads)} |", "|---|---|" + "---|" * len(heads)]
    for (operation, shape), found in cells.items():
        shown = [
            cell
            for count in threads
            for cell in (f"{found[count]['ours']['median_us'] / 1e3:.1f}", f"{found[count]['ratios']['speed_up']:.0f}x")
        ]
        lines.append(f"| {operation} | {shape} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", caption(machine, "bench_score.py` and `bench_pack.py")])


def machines() -> str:
    """Whole models on every machine: tokens per second, and the ratios to torch and llama.cpp."""
    lines = [
        "| machine | model | bitmap 50 %: decode, tokens/s | over torch | over llama.cpp BF16 | prefill over torch "
        "| int8 50 %: decode, tokens/s | over torch | over llama.cpp Q8_0 | prefill over torch |",
        "|---" * 10 + "|",
    ]
    for machine, found in results("generate"):
        for model, title in (("example", "example, 5M"), (None, "1.1B")):
            rows = {row["variant"]: row for row in found if "prefill" in row and row.get("model") == model}
            if not rows:
                continue
            cells = [described(machine), title]
            for form, rival in (("bitmap 50 %", "llama.cpp BF16"), ("int8 50 %", "llama.cpp Q8_0")):
                row, foreign = rows[form], rows.get(rival, {}).get("ratios", {}).get(f"{form} over it")
                cells += [f"{row['decode']['tokens_per_s']:.1f}", f"{row['ratios']['decode']:.2f}x"]
                cells += ["" if foreign is None else f"{foreign:.2f}x", f"{row['ratios']['prefill']:.2f}x"]
            lines.append(f"| {' | '.join(cells)} |")
    commits = ", ".join(dict.fromkeys(machine["commit"] for machine, _ in results("generate")))
    return "\n".join([*lines, "", f"*commits {commits}; `benchmarks/bench_generate.py`*"])


def generate(machine: dict[str, Any], found: Rows) -> str:
    """Whole models, and in a sentence what a token costs beside our kernels."""
    rows = {row["variant"]: row for row in found if "prefill" in row and "model" not in row}
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


def gpu() -> str:
    return report.markdown(HERE / "results")


def gpu_state() -> str:
    return report.state(HERE / "results")


TABLES: dict[str, Callable[[], str]] = {
    "example": example,
    "machines": machines,
    "linear": lambda: for_every_machine("linear", linear),
    "int8": lambda: for_every_machine("linear", int8),
    "generate": lambda: for_every_machine("generate", generate),
    "quality": quality,
    "speed": speed,
    "score": score,
    "gpu": gpu,
    "gpu-state": gpu_state,
}


def filled(text: str) -> str:
    """A page with every table between its markers made anew."""
    for name, make in TABLES.items():
        begin, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        if begin not in text:
            continue
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}{make()}\n{end}{after}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if pages and JSON differ; write nothing")
    check = parser.parse_args().check
    texts = {page: page.read_text() for page in PAGES}
    homeless = [name for name in TABLES if not any(f"<!-- table: {name} -->" in text for text in texts.values())]
    stale = {page: filled(text) for page, text in texts.items() if filled(text) != text}
    for name in homeless:
        print(f"no page shows the table {name}", file=sys.stderr)
    for page, text in stale.items():
        if check:
            print(f"{page.name}: tables differ from benchmarks/results: run python benchmarks/tables.py",
                  file=sys.stderr)  # fmt: skip
        else:
            page.write_text(text)
    return int(bool(homeless) or (check and bool(stale)))


if __name__ == "__main__":
    sys.exit(main())
