# SPDX-License-Identifier: Apache-2.0
"""Who gives how much: a removed count per projection, exact to the last parameter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mosaic_kernels.errors import UsageError

logger = logging.getLogger(__name__)

CURVE_DEVIATION = 0.2  # wider bounds leave the range where curves and probes were measured
CURVE_POINTS = 161
MOST_SPARSE = 0.98


def fit_to_budget(
    sizes: Mapping[str, int], wishes: Mapping[str, float], budget: int, *, lower: float = 0.0, upper: float = 1.0
) -> dict[str, int]:
    """Integer counts that sum to ``budget`` exactly, as near to the wished sparsities as a common shift allows.

    Bisects the shift ``mu`` in ``sum n_p * clip(s_p + mu, lower, upper) = budget``, rounds down, and
    hands what is left to the largest fractions (ties in the order of ``sizes``).

    Args:
        sizes: parameters of each projection.
        wishes: wished sparsity of each projection.
        budget: parameters to remove in all.
        lower: least sparsity of any projection.
        upper: greatest sparsity of any projection.

    Raises:
        UsageError: the budget cannot be met within the bounds.
    """
    total = sum(sizes.values())
    least = sum(int(lower * n + 0.5) for n in sizes.values())
    most = sum(int(upper * n) for n in sizes.values())
    if not least <= budget <= most:
        raise UsageError(
            f"cannot remove {budget} of {total} parameters with every projection between {lower:.0%} and {upper:.0%}"
        )

    def wanted(shift: float) -> dict[str, float]:
        return {name: n * min(max(wishes[name] + shift, lower), upper) for name, n in sizes.items()}

    low, high = -2.0 - max(wishes.values(), default=0), 2.0 - min(wishes.values(), default=0)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(wanted(middle).values()) < budget else (low, middle)
    exact = wanted(high)
    counts = {name: min(int(value), sizes[name]) for name, value in exact.items()}
    _spread(counts, exact, sizes, budget - sum(counts.values()))
    return counts


def _spread(counts: dict[str, int], exact: Mapping[str, float], sizes: Mapping[str, int], missing: int) -> None:
    """Add ``missing`` (or take away, if negative) one by one, the largest fractions first."""
    step = 1 if missing > 0 else -1
    order = sorted(counts, key=lambda name: step * (counts[name] - exact[name]))
    while missing:
        before = missing
        for name in order:
            if missing and 0 <= counts[name] + step <= sizes[name]:
                counts[name] += step
                missing -= step
        if missing == before:
            raise UsageError("the projections are too small for this budget")


def uniform(sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """The same sparsity everywhere."""
    share = budget / max(1, sum(sizes.values()))
    return fit_to_budget(sizes, dict.fromkeys(sizes, share), budget)


def pod(sizes: Mapping[str, int], ratios: Mapping[str, float], budget: int, max_deviation: float) -> dict[str, int]:
    """Projections with more outliers are pruned less (arXiv 2504.06323), on an exact budget.

    ``s_p = S - (d_p - mean d)`` with ``d_p = 2 lambda (o_p - min) / (max - min)``, the mean weighted by size.

    Args:
        ratios: outlier ratio of each projection.
        max_deviation: lambda; no target is further from S than twice this.
    """
    return fit_to_budget(sizes, _wishes(sizes, dict(ratios), budget, max_deviation), budget)


def owl(
    sizes: Mapping[str, int],
    block_of: Mapping[str, str],
    ratios: Mapping[str, float],
    budget: int,
    max_deviation: float,
) -> dict[str, int]:
    """One target per block by its outlier ratio (OWL, arXiv 2310.05175), on an exact budget.

    Args:
        block_of: the block of each projection.
        ratios: outlier ratio of each block.
    """
    per_projection = {name: ratios[block_of[name]] for name in sizes}
    return fit_to_budget(sizes, _wishes(sizes, per_projection, budget, max_deviation), budget)


def mosaic_reference(
    sizes: Mapping[str, int],
    block_of: Mapping[str, str],
    block_ratios: Mapping[str, float],
    projection_ratios: Mapping[str, float],
    budget: int,
    max_deviation: float,
) -> dict[str, int]:
    """The formula of the paper's public code, budget leak included; for comparison only.

    Every projection of a kind (``q_proj`` of all blocks, ...) keeps
    ``layer_c - mean(own_c) + (1 - S)``, where ``layer_c`` is its block's scaled outlier ratio and
    ``own_c`` are the kind's own scaled ratios. Their means differ, so the sum misses the budget.
    """
    sparsity = budget / max(1, sum(sizes.values()))
    layer = _scaled(block_ratios, max_deviation)
    kinds: dict[str, list[str]] = {}
    for name in sizes:
        kinds.setdefault(name.removeprefix(block_of[name]), []).append(name)
    counts = {}
    for names in kinds.values():
        own = _scaled({name: projection_ratios[name] for name in names}, max_deviation)
        mean = sum(own.values()) / len(own)
        for name in names:
            kept = layer[block_of[name]] - mean + (1 - sparsity)
            counts[name] = round(sizes[name] * min(max(1 - kept, 0.0), 1.0))
    leak = sum(counts.values()) - budget
    logger.warning(
        "policy mosaic-reference misses the budget by %+d parameters: true sparsity %.4f, asked %.4f",
        leak,
        sum(counts.values()) / max(1, sum(sizes.values())),
        sparsity,
    )
    return counts


def _scaled(ratios: Mapping[str, float], max_deviation: float) -> dict[str, float]:
    """Ratios mapped linearly onto [0, 2 lambda]; all zero where they do not differ."""
    low, high = min(ratios.values()), max(ratios.values())
    if high == low:
        return dict.fromkeys(ratios, 0.0)
    return {name: 2 * max_deviation * (ratio - low) / (high - low) for name, ratio in ratios.items()}


def _wishes(
    sizes: Mapping[str, int], ratios: Mapping[str, float], budget: int, max_deviation: float
) -> dict[str, float]:
    total = max(1, sum(sizes.values()))
    bonus = _scaled(ratios, max_deviation)
    mean = sum(bonus[name] * n for name, n in sizes.items()) / total
    return {name: budget / total - (bonus[name] - mean) for name in sizes}


def by_curves(
    sizes: Mapping[str, int],
    curves: Mapping[str, Callable[[float], float]],
    weights: Mapping[str, float],
    budget: int,
) -> dict[str, int]:
    """Minimise ``sum_p weight_p * curve_p(s_p)`` under the budget.

    At the optimum the marginal cost per parameter is the same everywhere: bisects that price over the lower
    convex hulls of the sampled curves, then meets the budget exactly.

    Args:
        curves: error of each projection at a sparsity.
        weights: what a unit of that error costs the model.
    """
    low, high, at = _bisect_price(sizes, curves, weights, budget)
    # At the price itself whoever has an edge of that slope may stand anywhere on it: go along all these
    # edges by the same share, which keeps to the optimum and the bounds.
    less, more = at(low), at(high)
    below, above = _removed(sizes, less), _removed(sizes, more)
    share = min(1.0, max(0.0, (budget - below) / (above - below))) if above > below else 1.0
    return fit_to_budget(sizes, {name: less[name] + share * (more[name] - less[name]) for name in sizes}, budget)


def marginal_price(
    sizes: Mapping[str, int],
    curves: Mapping[str, Callable[[float], float]],
    weights: Mapping[str, float],
    budget: int,
) -> float:
    """What the last zero of :func:`by_curves` costs."""
    return _bisect_price(sizes, curves, weights, budget)[1]


def sparsity_grid(mean: float) -> NDArray[np.float64]:
    """The sparsities that :func:`by_curves` chooses from."""
    return np.linspace(max(0.0, mean - CURVE_DEVIATION), min(MOST_SPARSE, mean + CURVE_DEVIATION), CURVE_POINTS)


def _bisect_price(
    sizes: Mapping[str, int],
    curves: Mapping[str, Callable[[float], float]],
    weights: Mapping[str, float],
    budget: int,
) -> tuple[float, float, Callable[[float], dict[str, float]]]:
    """The price per parameter just below and just above the budget, and the sparsities at a price."""
    grid = sparsity_grid(budget / max(1, sum(sizes.values())))
    hulls = {}
    for name in sizes:
        costs = np.array([weights[name] * curves[name](s) for s in grid])
        hulls[name] = _lower_hull(grid, costs / sizes[name])

    def at(price: float) -> dict[str, float]:
        return {name: float(points[int((slopes < price).sum())]) for name, (points, slopes) in hulls.items()}

    steepest = max((float(slopes.max()) for _, slopes in hulls.values() if slopes.size), default=0.0)
    low, high = 0.0, steepest * 2 + 1e-300
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _removed(sizes, at(middle)) < budget else (low, middle)
    return low, high, at


def _removed(sizes: Mapping[str, int], sparsities: Mapping[str, float]) -> float:
    return sum(s * sizes[name] for name, s in sparsities.items())


def _lower_hull(x: Any, y: Any) -> tuple[Any, Any]:
    """Corners of the lower convex hull of a sampled curve, and the slopes between them."""
    corners: list[int] = []
    for i in range(len(x)):
        while len(corners) > 1:
            a, b = corners[-2:]
            if (y[b] - y[a]) * (x[i] - x[a]) < (y[i] - y[a]) * (x[b] - x[a]):
                break
            corners.pop()
        corners.append(i)
    points = x[corners]
    return points, np.diff(y[corners]) / np.diff(points)
