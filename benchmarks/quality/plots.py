# SPDX-License-Identifier: Apache-2.0
"""Figures: perplexity against what was really removed, and where outliers and zeros are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def draw(result: Mapping[str, Any], records: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Write all figures of a result; returns their files.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    made = [_perplexities(result, folder)]
    seen = set()
    for record in records:
        if "projections" not in record:
            continue
        if "pod" not in seen:
            seen.add("pod")
            title = f"{result['model']}: outlier ratio (POD)"
            made.append(_heatmap(record["projections"], 1, title, folder / "pod.png"))
        place = (record["category"], record["sparsity"], record["share"], record["method"])
        if record["method"] in ("default", "ours", "owl", "pod", "mosaic-reference") and place not in seen:
            seen.add(place)
            share = "" if record["share"] is None else f"-{record['share']:g}"
            name = f"{record['category']}-{record['sparsity']:g}{share}-{record['method']}".replace(":", "-")
            title = f"{result['model']}: removed by {name}"
            made.append(_heatmap(record["projections"], 0, title, folder / f"removed-{name}.png"))
    return made


def _perplexities(result: Mapping[str, Any], folder: Path) -> Path:
    """Every method's perplexity over its true count, one panel for each category."""
    from matplotlib import pyplot as plt

    panels = [c for c in ("unstructured", "structured", "composite") if any(r["category"] == c for r in result["rows"])]
    figure, axes = plt.subplots(1, max(1, len(panels)), figsize=(6 * max(1, len(panels)), 4.5), squeeze=False)
    for axis, category in zip(axes[0], panels, strict=False):
        points: dict[str, list[tuple[float, float]]] = {}
        for row in result["rows"]:
            # the reference misses its budget: it belongs where it really is
            if row["category"] == category or (category, row["method"]) == ("unstructured", "mosaic-reference"):
                removed = float(np.median(row["removed"])) / result["prunable"]
                points.setdefault(row["method"], []).append((_structured(row, removed), row["perplexity"]))
        for method, values in points.items():
            axis.plot(*zip(*sorted(values), strict=True), marker="o", label=method)
        axis.axhline(result["dense"]["perplexity"], color="grey", linestyle=":", label="dense")
        axis.set(title=category, ylabel="perplexity", yscale="log")
        axis.set_xlabel("structured share" if category == "composite" else "share of parameters removed")
        axis.legend(fontsize="small")
    return _save(figure, folder / "perplexity.png")


def _structured(row: Mapping[str, Any], removed: float) -> float:
    """Composite rows all remove the same; they differ in how much of it is structured."""
    return removed if row["share"] is None else float(row["share"])


def _heatmap(projections: Mapping[str, Sequence[float]], value: int, title: str, path: Path) -> Path:
    """Block x projection."""
    from matplotlib import pyplot as plt

    cells: dict[str, dict[str, float]] = {}
    for name, values in projections.items():
        block, projection = name.partition(".layers.")[2].partition(".")[::2]
        cells.setdefault(projection.rpartition(".")[2], {})[block] = values[value]
    blocks = sorted(next(iter(cells.values())), key=int)
    table = np.array([[cells[projection][block] for projection in cells] for block in blocks])
    figure, axis = plt.subplots(figsize=(6, 1.5 + 0.3 * len(blocks)))
    image = axis.imshow(table, aspect="auto", cmap="viridis")
    axis.set(title=title, ylabel="block", xticks=range(len(cells)), yticks=range(len(blocks)), yticklabels=blocks)
    axis.set_xticklabels(list(cells), rotation=30, ha="right")
    figure.colorbar(image)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
