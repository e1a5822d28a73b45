# SPDX-License-Identifier: Apache-2.0
"""The options of a pruning run: frozen, and checked before any work starts."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mosaic_kernels.errors import UsageError
from mosaic_kernels.paths import local_path

Category = Literal["auto", "unstructured", "structured", "composite"]
Policy = Literal["curve", "curve+search", "pod", "owl", "uniform", "mosaic-reference"]
SolverName = Literal["admm", "sparsegpt", "wanda", "magnitude"]
Quality = Literal["fast", "default", "best"]
Recovery = Literal["none", "reconstruct", "lora"]
OutputFormat = Literal["mosaic", "dense"]
ComputeDtype = Literal["auto", "float32", "bfloat16", "float16"]
Weights = Literal["float", "int8", "int8-group"]  # what packed values are, and as int8 how many share a scale

DEFAULT_SEQLEN = 2048

# Share of the removed parameters that composite pruning removes as whole heads and channels where no share
# is named and none can be judged (a policy without probes): at 60 % removed in all, a third (20 %) structured
# costs little quality and already shrinks every matrix and the KV cache.
DEFAULT_STRUCTURED_PART = 1 / 3


@dataclass(frozen=True)
class PruneConfig:
    """Options of one pruning run; names and meanings are those of ``python -m mosaic_kernels.prune``.

    Raises:
        UsageError: an option is out of its range or contradicts another.
    """

    sparsity: float = 0.5
    category: Category = "composite"
    structured_share: float | None = None
    pattern: str = "unstructured"
    channel_multiple: int = 8
    policy: Policy | None = None
    outlier_threshold: float = 5.0
    max_deviation: float = 0.08
    solver: SolverName = "admm"
    quality: Quality = "default"
    recover: Recovery = "none"
    ranks: Path | None = None
    calibration: Any = "wikitext2"  # see prune.given.given_calibration
    samples: int = 128
    seqlen: int | None = None
    seed: int = 0
    eval_text: Any = None  # see prune.given.given_text
    eval_tokens: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    compute_dtype: ComputeDtype = "auto"
    format: OutputFormat = "mosaic"
    weights: Weights = "float"
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            object.__setattr__(self, name, _of_kind(name, getattr(self, name), kind))
        if self.policy is None:  # probes cost more than all that `fast` does otherwise
            quick = self.solver == "admm" and self.quality == "fast"
            object.__setattr__(self, "policy", "uniform" if quick else "curve")
        if not 0 <= self.sparsity < 1:  # also refuses NaN
            raise UsageError(f"sparsity is the fraction removed, 0 <= S < 1, got {self.sparsity}")
        if not (math.isfinite(self.outlier_threshold) and self.outlier_threshold > 0):
            raise UsageError(f"outlier threshold must be positive, got {self.outlier_threshold}")
        if not 0 <= self.max_deviation < 1:
            raise UsageError(f"max deviation must lie in [0, 1), got {self.max_deviation}")
        for name in ("samples", "seqlen", "eval_tokens", "channel_multiple"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must lie in [0, 2**63), got {self.seed}")
        if self.eval_tokens is not None and self.eval_text is None:
            raise UsageError("--eval-tokens needs --eval-text FILE: it is the number of tokens of that text to use")
        if self.weights != "float" and self.format == "dense":
            raise UsageError(f"format dense stores ordinary weights: --weights {self.weights} needs --format mosaic")
        if self.recover != "none" and self.samples < 2:
            raise UsageError(f"recovery tunes on some sequences and judges by others: samples is {self.samples}")
        self._check_pattern()
        self._check_share()

    @property
    def group(self) -> tuple[int, int] | None:
        """(n, m) of an N:M pattern that keeps n of every m, or ``None``."""
        return None if self.pattern in ("unstructured", "row") else _parse_group(self.pattern)

    @property
    def per_row(self) -> bool:
        """Whether every row of a projection loses equally many weights."""
        return self.pattern == "row"

    @property
    def by_curves(self) -> bool:
        """Whether the spread follows error curves and what they cost the model."""
        return self.policy in ("curve", "curve+search")

    @property
    def needs_ranks(self) -> bool:
        """Whether the spread over projections follows outlier ratios."""
        return (
            self.policy in ("pod", "owl", "mosaic-reference") and self.group is None and self.category != "structured"
        )

    @property
    def needs_curves(self) -> bool:
        """Whether zeros are spread by error curves, which then must be measured."""
        return self.by_curves and self.group is None and self.category != "structured" and self.sparsity > 0

    @property
    def needs_removal_costs(self) -> bool:
        """Whether heads and channels go where the model suffers least, which then must be measured."""
        return self.by_curves and self.share > 0

    @property
    def chooses_share(self) -> bool:
        """Whether the structured share is left to be found by trying."""
        composite = self.category == "composite" and self.structured_share is None and self.group is None
        return composite and self.by_curves and self.sparsity > 0

    @property
    def share(self) -> float:
        """Fraction of all prunable parameters to remove as whole units."""
        if self.category == "unstructured":
            return 0.0
        if self.category == "structured":
            return self.sparsity
        if self.structured_share is not None:
            return self.structured_share
        if self.group is not None:  # the pattern fixes the unstructured part: 1 - S = (1 - share) n / m
            n, m = self.group
            return 0.0 if self.sparsity == (m - n) / m else 1 - (1 - self.sparsity) * m / n
        return self.sparsity * DEFAULT_STRUCTURED_PART

    def _check_pattern(self) -> None:
        if self.per_row and self.category == "structured":
            raise UsageError("pattern row sets weights to zero; category structured removes units only")
        if self.group is None:
            return
        n, m = self.group
        fixed = (m - n) / m
        if math.isclose(self.sparsity, fixed, abs_tol=1e-6):  # 1:3 removes 2/3, which nobody can type
            object.__setattr__(self, "sparsity", fixed)
        if self.category == "structured":
            raise UsageError(f"pattern {self.pattern} sets weights to zero; category structured removes units only")
        if self.category == "unstructured" and self.sparsity != fixed:
            raise UsageError(
                f"pattern {self.pattern} removes exactly {fixed:.6g} of every projection, not {self.sparsity}: "
                f"use --sparsity {fixed:.6g}, or --category composite to remove more"
            )
        if self.sparsity < fixed:
            raise UsageError(f"pattern {self.pattern} removes at least {fixed:g}, more than --sparsity {self.sparsity}")

    def _check_share(self) -> None:
        share = self.structured_share
        if share is None:
            return
        if self.category == "unstructured" and share != 0:
            raise UsageError("--structured-share needs --category composite or structured")
        if not 0 <= share <= self.sparsity:
            raise UsageError(f"structured share must lie in [0, sparsity = {self.sparsity}], got {share}")
        if self.category == "structured" and share != self.sparsity:
            raise UsageError("category structured removes everything structurally: leave out --structured-share")
        if self.group is not None:
            n, m = self.group
            implied = 1 - (1 - self.sparsity) * m / n
            if abs(share - implied) > 1e-9:
                raise UsageError(
                    f"with pattern {self.pattern} the structured share follows from the sparsity "
                    f"({implied:.4f} here): leave out --structured-share"
                )


def _of_kind(name: str, value: Any, kind: Any) -> Any:
    """``value`` converted to ``kind``, the annotation of the option ``name``.

    Raises:
        UsageError: the value has another type, or is none of the choices.
    """
    kinds = set(get_args(kind)) if get_origin(kind) not in (None, Literal) else {kind}
    if kind is Any or (value is None and NoneType in kinds):
        return value
    (wanted,) = kinds - {NoneType}
    if get_origin(wanted) is Literal:
        if not isinstance(value, str) or value not in get_args(wanted):
            raise UsageError(f"{name} must be one of {', '.join(get_args(wanted))}, got {value!r}")
        return value
    if wanted is Path and isinstance(value, (str, os.PathLike)):
        return local_path(value, name)
    if wanted is float and isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    if wanted is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if wanted is bool and type(value).__name__ in ("bool", "bool_"):  # numpy's own, too
        return bool(value)
    if wanted is str and (isinstance(value, str) or type(value).__name__ in ("dtype", "device")):  # of torch
        return str(value).removeprefix("torch.")
    words = {float: "a number", int: "a whole number", bool: "True or False", str: "a string", Path: "a path"}
    raise UsageError(f"{name} must be {words[wanted]}, got {value!r} ({type(value).__name__})")


def _parse_group(pattern: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+):(\d+)", pattern)
    n, m = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 < n < m:
        raise UsageError(f"pattern must be 'unstructured', 'row' or N:M with 0 < N < M such as 2:4, got {pattern!r}")
    return n, m
