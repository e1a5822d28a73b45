# SPDX-License-Identifier: Apache-2.0
"""From finished cells to rows, bars and a table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from quality.cells import METHODS, Cell
from quality.judge import Array, Bootstrap, compare, interval, median
from quality.runner import CHANNEL_MULTIPLE

Record = Mapping[str, Any]
Row = tuple[str, float, float | None]
Place = tuple[str, float, float | None, str]  # a row and a method in it

# What a row's methods are compared with: the better of these, where they are there.
BASELINES = {
    "unstructured": ("sparsegpt", "owl"),
    "2:4": ("sparsegpt",),
    "structured": ("flap", "flap-pooled"),
    "composite": ("sparsegpt-pod",),
    "mosaic-reference": ("sparsegpt-matched",),
}


@dataclass(frozen=True)
class Bar:
    """What a median excess may be at most, as a share of the better one of ``against``.

    Where ``below`` is set the bar is on the difference instead: its whole interval must lie below zero.
    """

    place: Place
    against: tuple[Place, ...]
    must: float = 1.0
    aim: float | None = None
    below: bool = False

    @property
    def name(self) -> str:
        row, other = self.place[:3], self.against[0][:3]
        against = " or ".join(place[-1] for place in self.against)
        return f"{_in_words(row)}: {self.place[-1]} against {against}" + (
            "" if row == other else f" in {_in_words(other)}"
        )


def _in_words(row: Row) -> str:
    category, sparsity, share = row
    return f"{category} {sparsity:g}" + ("" if share is None else f" with {share:.0%} structured")


def _bars() -> list[Bar]:
    bars = []
    for s, must, aim in ((0.6, 0.40, 0.28), (0.7, 0.35, 0.25), (0.8, 0.32, 0.22)):
        row = ("unstructured", s, None)
        bars.append(Bar((*row, "default"), ((*row, "owl"), (*row, "sparsegpt")), must, aim))
    for method, bounds in (("ours", ((0.25, 0.25, 0.16), (0.5, 0.30, 0.20))),
                           ("ours-uniform", ((0.25, 0.55, 0.40), (0.5, 0.52, 0.38)))):  # fmt: skip
        for s, must, aim in bounds:
            bars.append(Bar(("structured", s, None, method), (("structured", s, None, "flap"),), must, aim))
    whole = ("structured", 0.6, None, "ours")
    for share, must, aim in ((0.1, 0.15, 0.10), (0.2, 0.20, 0.13), (0.3, 0.30, 0.20)):
        bars.append(Bar(("composite", 0.6, share, "ours"), (whole,), must, aim))
    for category, sparsities in (("unstructured", (0.5, 0.6, 0.7, 0.8)), ("2:4", (0.5,))):
        for s in sparsities:
            bars.append(Bar((category, s, None, "fast"), ((category, s, None, "sparsegpt"),)))
    for s in (0.5, 0.6, 0.7, 0.8):
        row = ("unstructured", s, None)
        bars.append(Bar((*row, "best+reconstruct"), ((*row, "default"),), below=True))
    return bars


BARS = _bars()


class Findings:
    """All finished cells of one model under one set of settings."""

    def __init__(self, dense: Record, records: Iterable[Record]) -> None:
        self.dense = dense
        self.cells: dict[Place, dict[int, Record]] = {}
        for record in records:
            cell = Cell.of(record)
            self.cells.setdefault((*cell.row, cell.method), {})[cell.seed] = record

    def excess(self, place: Place, seeds: Sequence[int]) -> Array:
        """NLL over the dense model's, ``[seeds, windows]``."""
        dense = np.array(self.dense["window_nll"])
        return np.array([self.cells[place][seed]["window_nll"] for seed in seeds]) - dense

    def compare(self, place: Place, against: Sequence[Place], how: Callable[..., Any] = np.divide) -> dict[str, Any]:
        """Paired comparison on the seeds that all of them have; empty where there are none."""
        if not all(p in self.cells for p in (place, *against)):
            return {}
        seeds = sorted(set.intersection(*(set(self.cells[p]) for p in (place, *against))))
        if not seeds:
            return {}
        value, bounds = compare(self.excess(place, seeds), [self.excess(p, seeds) for p in against], how)
        return {"value": value, "interval": bounds, "seeds": seeds}

    def rows(self) -> list[dict[str, Any]]:
        """Medians over seeds of every method in every row, in the grid's order."""
        dense = float(np.mean(self.dense["window_nll"]))
        methods = {category: list(known) for category, known in METHODS.items()}
        order = sorted(
            self.cells,
            key=lambda p: (list(METHODS).index(p[0]), p[1], p[2] or 0, methods[p[0]].index(p[3])),
        )
        found = []
        for place in order:
            category, sparsity, share, method = place
            seeds = sorted(self.cells[place])
            records = [self.cells[place][seed] for seed in seeds]
            excess = self.excess(place, seeds)
            row = {
                "category": category, "sparsity": sparsity, "share": share, "method": method, "seeds": seeds,
                "removed": [r["removed"] for r in records],
                "excess": median(excess),
                "interval": interval(Bootstrap(*excess.shape).medians(excess)),
                "perplexity": math.exp(min(700.0, dense + median(excess))),
                "kl": float(np.median([r["kl"] for r in records])),
            }  # fmt: skip
            baselines = [(*place[:3], b) for b in BASELINES[category] if (*place[:3], b) in self.cells]
            if baselines and method not in BASELINES[category]:
                row["ratio"] = self.compare(place, baselines)
                row["against"] = [b[-1] for b in baselines]
            found.append(row)
        return found

    def bars(self) -> list[dict[str, Any]]:
        """Every bar, and whether it is met; ``None`` where its cells are not finished."""
        found = []
        for bar in BARS:
            result = self.compare(bar.place, bar.against, np.subtract if bar.below else np.divide)
            if bar.below:
                bounds: dict[str, Any] = {"must": "interval below 0", "aim": None}
                met = {"must_met": result["interval"][1] < 0 if result else None, "aim_met": None}
            else:
                bounds = {"must": bar.must, "aim": bar.aim}
                met = {
                    f"{level}_met": result["value"] <= bound if result and bound is not None else None
                    for level, bound in bounds.items()
                }
            found.append({"name": bar.name, **result, **bounds, **met})
        return found

    def count_faults(self, step: int) -> tuple[list[str], list[str]]:
        """Rows whose methods do not agree: (faults, differences that whole units cannot avoid).

        Args:
            step: parameters of the smallest unit, which a structured row may differ by.
        """
        faults, unavoidable = [], []
        rows: dict[tuple[Row, int], dict[str, Record]] = {}
        for (category, sparsity, share, method), by_seed in self.cells.items():
            for seed, record in by_seed.items():
                rows.setdefault(((category, sparsity, share), seed), {})[method] = record
                reported = record.get("reported", record["removed"])
                if reported != record["removed"]:
                    cell = Cell.of(record)
                    faults.append(f"{cell}: the report says {reported} removed, the model {record['removed']}")
        for (row, seed), by_method in rows.items():
            kept = {method: record["nonzeros"] for method, record in by_method.items()}
            difference = max(kept.values()) - min(kept.values())
            if difference:
                text = f"{_in_words(row)} seed {seed}: non-zeros differ by {difference}: {kept}"
                (unavoidable if row[0] == "structured" and difference <= step else faults).append(text)
        return faults, unavoidable


def unit_parameters(hidden_size: int) -> int:
    """Parameters of the smallest unit that structured pruning removes."""
    return 3 * hidden_size * CHANNEL_MULTIPLE


def markdown(result: Mapping[str, Any]) -> str:
    """The rows and bars of a result file as tables."""
    lines = [
        f"**{result['model']}**, dense perplexity {result['dense']['perplexity']:.2f} "
        f"on {result['dense']['tokens']:,} tokens",
        "",
        "| category | removed | method | perplexity | excess NLL | 95 % | KL | ratio | 95 % | against |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        share = "" if row["share"] is None else f", {row['share']:.0%} structured"
        removed = f"{np.median(row['removed']) / result['prunable']:.2%}{share}"
        ratio = row.get("ratio") or {}
        value = f"{ratio['value']:.2f} | {_span(ratio['interval'], 2)}" if ratio else " | "
        lines.append(
            f"| {row['category']} | {removed} | {row['method']} | {row['perplexity']:.2f} | {row['excess']:.4f} "
            f"| {_span(row['interval'], 4)} | {row['kl']:.4f} | {value} | {' or '.join(row.get('against', []))} |"
        )
    lines += ["", "| bar | value | 95 % | must | aim |", "|---|---|---|---|---|"]
    for bar in result["bars"]:
        value = f"{bar['value']:.3f} | {_span(bar['interval'], 3)}" if "value" in bar else "not run | "
        lines.append(f"| {bar['name']} | {value} | {_verdict(bar, 'must')} | {_verdict(bar, 'aim')} |")
    return "\n".join(lines)


def _span(bounds: Sequence[float], digits: int) -> str:
    return f"{bounds[0]:.{digits}f} to {bounds[1]:.{digits}f}"


def _verdict(bar: Mapping[str, Any], level: str) -> str:
    if bar[level] is None:
        return ""
    word = {True: " met", False: " **missed**", None: ""}[bar[f"{level}_met"]]
    return f"{bar[level]}{word}"
