# SPDX-License-Identifier: Apache-2.0
"""What the kernels are to reach on an H200, beside what was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Files = Mapping[str, dict[str, Any] | None]  # stage -> its file, if there is one

# A smaller matrix fits the L2 with its neighbours, and a launch weighs more than its bytes: not judged.
LARGE = 45_000_000

# rows of x -> least speed over cuBLAS bf16, by pattern; of the slowest large shape
KERNELS: dict[tuple[int, ...], dict[str, float]] = {
    (1,): {"50%": 1.40, "60%": 1.65, "70%": 1.90, "2:4": 1.55},
    (8, 16): {"50%": 1.30, "60%": 1.50, "70%": 1.75, "2:4": 1.50},
    (32,): {"50%": 1.20, "60%": 1.35, "70%": 1.50, "2:4": 1.45},
    (64,): {"50%": 1.05, "60%": 1.15, "70%": 1.25, "2:4": 1.30},
    (128, 256, 1024): {"50%": 0.85, "60%": 0.85, "70%": 0.85},
    (2048, 4096): {"50%": 0.95, "60%": 0.95, "70%": 0.95},
}
# variant -> ratio to the dense model, goal, whether more is better
WHOLE_MODELS = (
    ("unstructured 50%", "tokens_per_s", 1.30, True),
    ("unstructured 60%", "tokens_per_s", 1.50, True),
    ("unstructured 70%", "tokens_per_s", 1.75, True),
    ("composite 80%", "latency", 0.33, False),
    ("composite 80%", "peak_bytes", 0.32, False),
)
RANKING_MILLISECONDS = 50.0


@dataclass(frozen=True)
class Goal:
    """A goal and how far it is reached.

    Attributes:
        found: ``None`` where it was not measured.
        failed: why what should have been measured was not.
    """

    name: str
    goal: float
    found: float | None
    at_least: bool = True
    failed: str | None = None
    unit: str = "x"

    @property
    def verdict(self) -> str:
        if self.failed:
            return f"FAILED: {self.failed}"
        if self.found is None:
            return "not measured"
        return "met" if (self.found >= self.goal if self.at_least else self.found <= self.goal) else "MISSED"

    def __str__(self) -> str:
        found = "-" if self.found is None else f"{self.found:.2f}{self.unit}"
        sign = ">=" if self.at_least else "<="
        return f"{self.name:44} {sign} {self.goal:.2f}{self.unit:3} {found:>9}  {self.verdict}"


def goals(files: Files) -> list[Goal]:
    """Every goal; a file that tries the code on small shapes reaches none."""
    real = {stage: file for stage, file in files.items() if file is not None and not file["tiny"]}
    return [*_kernels(real), *_models(real), *_ranking(real)]


def _rows(files: Mapping[str, dict[str, Any]], stage: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = files[stage]["rows"] if stage in files else []
    return rows


def _kernels(files: Mapping[str, dict[str, Any]]) -> Iterator[Goal]:
    measured = [row for row in _rows(files, "kernels") if row["out"] * row["in"] >= LARGE]
    for rows, by_pattern in KERNELS.items():
        for pattern, least in by_pattern.items():
            cells = [row for row in measured if row["rows"] in rows and row["pattern"] == pattern]
            errors = [row["errors"]["mosaic"] for row in cells if "mosaic" in row["errors"]]
            speeds = [row["speed_up"]["mosaic"] for row in cells if "mosaic" in row["speed_up"]]
            shown = str(rows[0]) if len(rows) == 1 else f"{rows[0]} to {rows[-1]}"
            name = f"{pattern} at {shown} row{'s' * (rows != (1,))}, worst of {len(speeds)} cells"
            yield Goal(name, least, min(speeds, default=None), failed=errors[0] if errors else None)


def _models(files: Mapping[str, dict[str, Any]]) -> Iterator[Goal]:
    """With ``torch.compile`` or without, whichever is better; either against the dense model that runs alike."""
    by_variant = {row["variant"]: row for stage in ("e2e", "compiled") for row in _rows(files, stage)}
    for variant, ratio, goal, at_least in WHOLE_MODELS:
        rows = [by_variant[name] for name in (variant, f"{variant}, compiled") if name in by_variant]
        found = [row["ratios"][ratio] for row in rows if row.get("ratios", {}).get(ratio) is not None]
        best = (max if at_least else min)(found, default=None)
        failed = next((row["error"] for row in rows if "error" in row), None)
        what = {"tokens_per_s": "tokens/s", "latency": "latency", "peak_bytes": "peak memory"}[ratio]
        yield Goal(f"7B, {variant}: {what} over dense", goal, best, at_least, failed)


def _ranking(files: Mapping[str, dict[str, Any]]) -> Iterator[Goal]:
    for row in _rows(files, "ranking"):
        if row["operation"] == "score + select + pack, 7B model":
            yield Goal(row["operation"], RANKING_MILLISECONDS, row.get("milliseconds"), False, row.get("error"), "ms")
            return
    yield Goal("score + select + pack, 7B model", RANKING_MILLISECONDS, None, False, unit="ms")


def count(found: list[Goal], says: Callable[[str], bool]) -> int:
    return sum(says(goal.verdict) for goal in found)


def table(files: Files) -> str:
    """All goals, a line each, and how many were met."""
    found = goals(files)
    total = (
        f"{count(found, lambda v: v == 'met')} of {len(found)} goals met, "
        f"{count(found, lambda v: v == 'not measured')} not measured"
    )
    return "\n".join([*map(str, found), total])
