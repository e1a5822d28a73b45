# SPDX-License-Identifier: Apache-2.0
"""The grid: which methods are run on which budgets, and in which order."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from mosaic_kernels import config

_SPARSEGPT = {"solver": "sparsegpt", "policy": "uniform"}
_RECONSTRUCT = {"recover": "reconstruct"}

# Methods of every category and what they add to the category and the budget; None: a baseline of our own here.
# Whatever is not named is the package's default.
METHODS: dict[str, dict[str, dict[str, Any] | None]] = {
    "unstructured": {
        "magnitude": {"solver": "magnitude", "policy": "uniform"},
        "wanda": {"solver": "wanda", "policy": "uniform"},
        "sparsegpt": _SPARSEGPT,
        "owl": {"solver": "sparsegpt", "policy": "owl"},
        "pod": {"solver": "sparsegpt", "policy": "pod"},
        "fast": {"quality": "fast"},
        "default": {"quality": "default"},
        "best": {"quality": "best"},
        "curve+search": {"policy": "curve+search"},
        "default+reconstruct": {"quality": "default", **_RECONSTRUCT},
        "best+reconstruct": {"quality": "best", **_RECONSTRUCT},
    },
    # A pattern fixes every projection's count, so policies have nothing to allocate.
    "2:4": {
        "magnitude": {"solver": "magnitude"},
        "wanda": {"solver": "wanda"},
        "sparsegpt": {"solver": "sparsegpt"},
        "fast": {"quality": "fast"},
        "default": {"quality": "default"},
        "best": {"quality": "best"},
        "default+reconstruct": {"quality": "default", **_RECONSTRUCT},
        "best+reconstruct": {"quality": "best", **_RECONSTRUCT},
    },
    "structured": {
        "flap": None,
        "flap-pooled": None,
        "ours-uniform": {"policy": "uniform"},
        "ours": {},
        "ours+reconstruct": _RECONSTRUCT,
    },
    "composite": {
        "sparsegpt-pod": {"solver": "sparsegpt", "policy": "pod"},
        "ours": {},
        "ours+reconstruct": _RECONSTRUCT,
    },
    # Misses its budget by design, so it is compared at the count it really reached.
    "mosaic-reference": {
        "mosaic-reference": {"solver": "sparsegpt", "policy": "mosaic-reference"},
        "sparsegpt-matched": _SPARSEGPT,
    },
}
SPARSITIES: dict[str, tuple[float, ...]] = {
    "unstructured": (0.5, 0.6, 0.7, 0.8),
    "2:4": (0.5,),
    "structured": (0.25, 0.5, 0.6),
    "composite": (0.6,),
    "mosaic-reference": (0.5, 0.6, 0.7, 0.8),
}
SHARES = (0.1, 0.2, 0.3)  # of the composite rows

# A row of 60 % structured is there to set composite pruning against, so only ours is needed.
_ONLY = {("structured", 0.6): ("ours",)}

# What decides most is run first, so that a run that is cut off has already answered it.
_FIRST = (
    ("unstructured", (0.7, 0.6, 0.8), ("sparsegpt", "owl", "fast", "default")),
    ("structured", (0.25, 0.5), ("flap", "flap-pooled", "ours-uniform", "ours")),
    ("composite", (0.6,), ("sparsegpt-pod", "ours")),
    ("structured", (0.6,), ("ours",)),
)


@dataclass(frozen=True)
class Cell:
    """One model to prune and judge.

    Attributes:
        category: a key of :data:`METHODS`.
        sparsity: fraction to remove.
        share: fraction to remove as whole units, in composite rows.
        method: a name within the category.
        seed: of the calibration draw.
    """

    category: str
    sparsity: float
    share: float | None
    method: str
    seed: int

    @property
    def row(self) -> tuple[str, float, float | None]:
        """Cells of one row and one seed must keep equally many weights."""
        return self.category, self.sparsity, self.share

    @property
    def options(self) -> dict[str, Any] | None:
        """Options of ``mk.prune`` beside calibration and device; ``None`` for a baseline of our own."""
        own = METHODS[self.category][self.method]
        if own is None:
            return None
        category = self.category if self.category in ("structured", "composite") else "unstructured"
        options = {"category": category, "sparsity": self.sparsity, **own}
        if self.category == "2:4":
            options["pattern"] = self.category
        if self.share is not None:
            options["structured_share"] = self.share
        return options

    @property
    def missing(self) -> str | None:
        """Which option the installed package does not have yet, or ``None`` if it can run this cell."""
        options = self.options or {}
        for name in options:
            if name not in config.PruneConfig.__dataclass_fields__:
                return f"mosaic_kernels has no option {name}"
        policy = options.get("policy")
        return None if policy in (None, *get_args(config.Policy)) else f"mosaic_kernels has no policy {policy}"

    @property
    def ranked(self) -> bool:
        """Whether its budget is spread by a ranking."""
        options = self.options or {"policy": "uniform"}
        return "pattern" not in options and options.get("policy") != "uniform"

    def __str__(self) -> str:
        share = "" if self.share is None else f" ({self.share:.0%} structured)"
        return f"{self.category} {self.sparsity:g}{share} {self.method} seed {self.seed}"

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Cell:
        """The cell of a finished record."""
        return cls(**{name: record[name] for name in cls.__dataclass_fields__})


def grid(
    seeds: Iterable[int],
    *,
    categories: Collection[str] = (),
    sparsities: Collection[float] = (),
    methods: Collection[str] = (),
) -> Iterator[Cell]:
    """The chosen cells, all of one seed before the next, the most important ones first.

    Args:
        categories, sparsities, methods: keep only these; empty keeps all.
    """
    chosen = [
        (category, sparsity, share, method)
        for category, known in METHODS.items()
        for sparsity in SPARSITIES[category]
        for share in (SHARES if category == "composite" else (None,))
        for method in known
        if method in _ONLY.get((category, sparsity), known)
        if not categories or category in categories
        if not sparsities or sparsity in sparsities
        if not methods or method in methods or (method == "sparsegpt-matched" and "mosaic-reference" in methods)
    ]
    chosen.sort(key=lambda cell: _urgency(cell[0], cell[1], cell[3]))
    for seed in seeds:
        for cell in chosen:
            yield Cell(*cell, seed)


def _urgency(category: str, sparsity: float, method: str) -> tuple[int, int]:
    for place, (first, sparsities, methods) in enumerate(_FIRST):
        if category == first and sparsity in sparsities and method in methods:
            return place, sparsities.index(sparsity)
    return len(_FIRST), 0
