# SPDX-License-Identifier: Apache-2.0
"""How much a solver must remove, and in which pattern."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mosaic_kernels import ops


@dataclass(frozen=True)
class Target:
    """Weights to set to zero in one projection.

    Attributes:
        remove: how many, exactly; with a group, what the pattern removes or more.
        group: ``(n, m)`` keeps at most n of every m neighbours in a row; ``None`` leaves the places free.
        per_row: every row loses equally many, the first ones one more where it does not divide.
    """

    remove: int
    group: tuple[int, int] | None = None
    per_row: bool = False

    def part(self, share: float) -> Target:
        """A target of ``share`` of the zeros, on the way there; a pattern is kept from the start."""
        return self if self.group is not None or share >= 1 else replace(self, remove=round(self.remove * share))

    def keep_best(self, scores: Tensor) -> Tensor:
        """Mask of the best scores in this pattern; where it leaves the places free, over the whole matrix."""
        if self.per_row:
            return self.keep_best_per_row(scores)
        if self.group is not None:
            return self.thin(scores, ops.select(scores, self.group, "group"))
        return ops.select(scores, scores.numel() - self.remove, "matrix")

    def thin(self, scores: Tensor, keep: Tensor) -> Tensor:
        """A mask that the pattern made, without the worst of what it keeps, down to the exact count."""
        count, (n, m) = scores.numel() - self.remove, self.group or (1, 1)
        if scores.numel() // m * n <= count:  # known without counting, which a GPU would have to be waited for
            return keep
        return ops.select(torch.where(keep, scores, -1.0), count, "matrix")

    def keep_best_per_row(self, scores: Tensor) -> Tensor:
        """The same with equal counts in every row, the first rows losing one more where it does not divide.

        With a group it is :meth:`keep_best`, which has them wherever the pattern removes all.
        """
        if self.group is not None:
            return self.keep_best(scores)
        return ops.select(scores, scores.shape[1] - self.removed_per_row(len(scores)), "row")

    def removed_per_row(self, rows: int) -> Tensor:
        """How many weights each row loses, ``int64 [rows]``."""
        counts = torch.full((rows,), self.remove // rows, dtype=torch.int64)
        counts[: self.remove % rows] += 1
        return counts
