# SPDX-License-Identifier: Apache-2.0
"""How much a solver must remove, and in which pattern."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mosaic_kernels import ops


@dataclass(frozen=True)
class Target:
    """Weights to set to zero in one projection.

    Attributes:
        remove: how many, exactly; with a group, what the pattern removes or more.
        group: ``(n, m)`` keeps at most n of every m neighbours in a row; ``None`` leaves the places free.
    """

    remove: int
    group: tuple[int, int] | None = None

    def part(self, share: float) -> Target:
        """A target of ``share`` of the zeros, on the way there; a pattern is kept from the start."""
        return self if self.group is not None or share >= 1 else Target(round(self.remove * share))

    def keep_best(self, scores: Tensor) -> Tensor:
        """Mask of the best scores in this pattern, over the whole matrix."""
        if self.group is not None:
            return self.thin(scores, ops.select(scores, self.group, "group"))
        return ops.select(scores, scores.numel() - self.remove, "matrix")

    def thin(self, scores: Tensor, keep: Tensor) -> Tensor:
        """``keep`` without the worst of what it keeps, down to the exact count."""
        count = scores.numel() - self.remove
        if int(keep.count_nonzero()) <= count:
            return keep
        return ops.select(torch.where(keep, scores, -1.0), count, "matrix")

    def keep_best_per_row(self, scores: Tensor) -> Tensor:
        """The same with equal counts in every row, the first rows losing one more where it does not divide.

        With a group it is :meth:`keep_best`, which has them wherever the pattern removes all.
        """
        if self.group is not None:
            return self.keep_best(scores)
        rows, columns = scores.shape
        counts = torch.full((rows,), columns - self.remove // rows, dtype=torch.int64)
        counts[: self.remove % rows] -= 1
        return ops.select(scores, counts, "row")
