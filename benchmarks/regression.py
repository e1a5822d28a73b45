# SPDX-License-Identifier: Apache-2.0
"""Whether a benchmark got worse than the committed figures of the same kind of machine.

A benchmark declares what is compared in its ``extra_info``: ``ratios``, speeds over a baseline of the same run
(higher is better), and ``memory``, bytes or multiples of bytes (lower is better). Nothing else is compared,
absolute times least of all.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
# Medians of runs that take turns repeat to a few percent on an idle machine; bytes repeat almost exactly.
LIMITS = {"ratios": 0.15, "memory": 0.03}
SAME_MACHINE = ("cpu", "threads", "isa", "torch_isa")


@dataclass(frozen=True)
class Miss:
    """A figure that got worse than its limit allows, or is no longer measured (``found`` is ``None``)."""

    benchmark: str
    kind: str
    key: str
    committed: float
    found: float | None

    def __str__(self) -> str:
        name = f"{self.benchmark}: {self.kind}[{self.key!r}]"
        if self.found is None:
            return f"{name} is committed as {self.committed:.4g} but was not measured"
        limit = bound(self.kind, self.committed)
        least = "at least" if self.kind == "ratios" else "at most"
        allowed = f"{LIMITS[self.kind]:.0%} allow {least} {limit:.4g}"
        return f"{name} was {self.committed:.4g} and is {self.found:.4g}; {allowed}"


def bound(kind: str, committed: float) -> float:
    """The worst figure that still passes."""
    return committed * (1 - LIMITS[kind] if kind == "ratios" else 1 + LIMITS[kind])


def misses(benchmark: str, found: Mapping[str, Any], committed: Mapping[str, Any]) -> list[Miss]:
    """Compare two ``extra_info`` of a benchmark; figures that are new are not compared."""
    result = []
    for kind in LIMITS:
        for key, before in committed.get(kind, {}).items():
            now = found.get(kind, {}).get(key)
            limit = bound(kind, before)
            if now is None or (now < limit if kind == "ratios" else now > limit):
                result.append(Miss(benchmark, kind, key, before, now))
    return result


def committed_figures(
    noun: str, machine: Mapping[str, Any], results: Path = RESULTS
) -> dict[str, dict[str, Any]] | None:
    """``extra_info`` of every benchmark of ``bench_NOUN.py``; ``None`` where no file is of this kind of machine."""
    for path in sorted(results.glob(f"{noun}-*.json")):
        file = json.loads(path.read_text())
        its = file.get("machine_info", {})
        # files of November 2026 have no torch_isa: torch was not limited then
        if all(its.get(key, machine[key]) == machine[key] for key in SAME_MACHINE):
            return {b["name"]: b["extra_info"] for b in file["benchmarks"]}
    return None


class Comparison:
    """One session's comparisons, and what could not be compared."""

    def __init__(self, machine: Mapping[str, Any], results: Path = RESULTS) -> None:
        self.machine, self.results = machine, results
        self.compared = 0
        self.without: set[str] = set()  # nouns that have no figures of this kind of machine
        self.new: list[str] = []  # benchmarks that the committed file lacks
        self.partial: set[str] = set()  # nouns of which only some benchmarks were asked for
        self.vanished: list[str] = []  # benchmarks that only the committed file has
        self._figures: dict[str, dict[str, dict[str, Any]] | None] = {}

    def _committed(self, noun: str) -> dict[str, dict[str, Any]] | None:
        if noun not in self._figures:
            self._figures[noun] = committed_figures(noun, self.machine, self.results)
        return self._figures[noun]

    def collected(self, noun: str, benchmarks: Collection[str]) -> None:
        """Note what ``bench_NOUN.py`` has, run or skipped, unless only a part of it was asked for."""
        if noun not in self.partial:
            self.vanished += [name for name in self._committed(noun) or {} if name not in benchmarks]

    def of(self, noun: str, benchmark: str, found: Mapping[str, Any]) -> list[Miss]:
        """What got worse in one benchmark of ``bench_NOUN.py``."""
        figures = self._committed(noun)
        if figures is None:
            self.without.add(noun)
            return []
        if benchmark not in figures:
            self.new.append(benchmark)
            return []
        self.compared += 1
        return misses(benchmark, found, figures[benchmark])

    def summary(self) -> str:
        """One line on what was compared and what was not."""
        kind = ", ".join(f"{self.machine[key]}{' threads' * (key == 'threads')}" for key in SAME_MACHINE)
        parts = [f"{self.compared} compared with benchmarks/results"] if self.compared else ["nothing was compared"]
        if self.without:
            parts.append(f"no committed figures of a machine like this ({kind}) for {', '.join(sorted(self.without))}")
        if self.new:
            parts.append(f"not in the committed files: {', '.join(self.new)}")
        if self.vanished:
            parts.append(f"committed but no longer there: {', '.join(self.vanished)}")
        return "; ".join(parts)
