# SPDX-License-Identifier: Apache-2.0
"""Running cells: prune, reload, count, judge; every finished cell is one line of a JSONL file."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from measure import machine
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import mosaic_kernels as mk
from mosaic_kernels.models import ModelAdapter
from mosaic_kernels.prune.calibration import calibrate
from mosaic_kernels.text import load_tokens, windows
from quality.baselines import flap
from quality.cells import Cell
from quality.judge import divergence, nonzeros, window_nll
from quality.log import Log

RANKED_AT = 0.7  # probes made here serve 0.6 and 0.8 as well
CHANNEL_MULTIPLE = 8


@dataclass(frozen=True)
class Settings:
    """What all cells of a comparison share.

    Attributes:
        eval_tokens: held-out tokens that are judged.
        kl_tokens: the first of them, on which the divergence from the dense model is measured.
        dtype: in which models are judged; ``auto``, their own, agrees with float32 to 1e-4 nats (tiny-llama, bf16).
    """

    calibration: Path
    validation: Path
    samples: int = 128
    seqlen: int = 256
    eval_tokens: int = 60_000
    kl_tokens: int = 8_192
    dtype: str = "auto"
    device: str = "auto"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What must agree for two results to be comparable; contents instead of paths."""
        own = {name: value for name, value in asdict(self).items() if name != "device"}
        return own | {name: _digest([getattr(self, name)]) for name in ("calibration", "validation")}


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()


class Bench:
    """One model, dense, and all that is done to it."""

    def __init__(self, path: Path, settings: Settings, log: Log, *, same_commit: bool = False) -> None:
        self.path, self.settings, self.log = path, settings, log
        self.digest = _digest([path / "config.json", *sorted(path.glob("*.safetensors"))])
        self.machine = machine()
        self.same_commit = same_commit
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    @cached_property
    def windows(self) -> Tensor:
        tokens = load_tokens(self.settings.validation, self.tokenizer)[: self.settings.eval_tokens]
        return windows(tokens, self.settings.seqlen)

    @cached_property
    def dense(self) -> Any:
        return self._load(self.path)

    def _load(self, path: Path, dtype: str | None = None) -> Any:
        device = self.settings.device
        place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        return AutoModelForCausalLM.from_pretrained(path, dtype=dtype or self.settings.dtype).to(place).eval()

    def run(self, cells: Iterable[Cell], *, fresh_ranks: bool = False) -> list[str]:
        """Run what is not finished yet; returns the cells that failed, and why."""
        cells, failed, skipped = list(cells), [], set()
        self.dense_record()
        ranks = None if fresh_ranks else Ranking(self)
        with tempfile.TemporaryDirectory(prefix="quality-") as scratch:
            for index, cell in enumerate(cells):
                if cell.missing:
                    if cell.missing not in skipped:
                        print(f"skipped (such as {cell}): {cell.missing}", file=sys.stderr)
                    skipped.add(cell.missing)
                    continue
                try:
                    record, new = self._finished(cell, ranks, Path(scratch) / "pruned")
                except Exception as error:  # one cell's fault must not cost a night's other cells
                    failed.append(f"{cell}: {type(error).__name__}: {error}")
                    traceback.print_exc()
                    continue
                if new:
                    place, nll = f"[{index + 1}/{len(cells)}]", sum(record["window_nll"]) / len(record["window_nll"])
                    print(f"{place} {cell}: nll {nll:.4f}, kl {record['kl']:.4f}, {record['wall_s']:.1f} s", flush=True)
        return failed

    def dense_record(self) -> dict[str, Any]:
        """The dense model's own record, which excess is counted from."""
        key = self.key({"method": "dense"})
        if key not in self.log.records:
            nll = window_nll(self.dense, self.windows).tolist()
            prunable = ModelAdapter.of(self.dense).prunable_parameters
            self.log.add(
                {
                    "key": key,
                    "method": "dense",
                    "prunable": prunable,
                    "window_nll": _short(nll),
                    "machine": self.machine,
                }
            )
        return self.log.records[key]

    def records(self, cells: Iterable[Cell]) -> list[dict[str, Any]]:
        """The finished ones of these cells."""
        found = []
        for cell in cells:
            options = None if cell.missing else self._options(cell)
            record = None if options is None else self.log.records.get(self._cell_key(cell, options))
            if record is not None:
                found.append(record)
        return found

    def key(self, content: dict[str, Any]) -> str:
        """Hash of this content and of all that the bench's results depend on."""
        content = {**content, "model": self.digest, **self.settings.identity}
        if self.same_commit:
            content["commit"] = self.machine["commit"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]

    def _cell_key(self, cell: Cell, options: dict[str, Any]) -> str:
        return self.key({**asdict(cell), "options": options})

    def _options(self, cell: Cell) -> dict[str, Any] | None:
        """Options of the run; ``None`` where they follow from a cell that is not finished."""
        if cell.method != "sparsegpt-matched":
            return cell.options or {}
        reference = Cell(cell.category, cell.sparsity, cell.share, "mosaic-reference", cell.seed)
        for record in self.records([reference]):
            return {**(cell.options or {}), "sparsity": record["removed"] / self.dense_record()["prunable"]}
        return None

    def _finished(self, cell: Cell, ranks: Ranking | None, scratch: Path) -> tuple[dict[str, Any], bool]:
        options = self._options(cell)
        if options is None:
            raise LookupError("needs the true sparsity of mosaic-reference, which is not there")
        key = self._cell_key(cell, options)
        if key in self.log.records:
            return self.log.records[key], False
        started = time.perf_counter()
        if cell.options is None:
            model, found = self._flap(cell), {}
        else:
            # Where there is a ranking, a cell that makes no use of it is still spared the pass that makes one.
            ranked = ranks if ranks and (cell.ranked or ranks.path(cell.seed).exists()) else None
            given = {"ranks": ranked.of(cell.seed)} if ranked else {}
            report = self.prune(cell.seed, scratch, **options, **given)
            if ranked:
                ranked.learn(cell.seed, scratch / "ranks.json")
            model = self._load(scratch)
            found = {"reported": report["removed_parameters"], "seconds": report["seconds"]}
            found["projections"] = {
                name: [round(p["sparsity"], 4), p["outlier_ratio"]] for name, p in report["projections"].items()
            }
            found["versions"] = report["versions"]
        kept = nonzeros(model)
        nll = window_nll(model, self.windows).tolist()
        kl = divergence(self.dense, model, self.windows[: max(1, self.settings.kl_tokens // self.settings.seqlen)])
        self.log.add({
            "key": key, **asdict(cell), **found, "nonzeros": kept, "removed": self.dense_record()["prunable"] - kept,
            "window_nll": _short(nll), "kl": kl, "commit": self.machine["commit"], "date": time.strftime("%Y-%m-%d"),
            "wall_s": time.perf_counter() - started,
        })  # fmt: skip
        return self.log.records[key], True

    def prune(self, seed: int, output: Path, **options: Any) -> dict[str, Any]:
        """The package's public entry, with what all cells share."""
        s = self.settings
        return mk.prune(
            self.path, output_dir=output, overwrite=True, calibration=s.calibration, samples=s.samples,
            seqlen=s.seqlen, seed=seed, device=s.device, **options,
        )  # fmt: skip

    def _flap(self, cell: Cell) -> Any:
        model, s = self._load(self.path, "auto"), self.settings
        drawn = calibrate(
            str(s.calibration), self.tokenizer, model.config.vocab_size, samples=s.samples, seqlen=s.seqlen,
            seed=cell.seed,
        )  # fmt: skip
        budget = round(cell.sparsity * self.dense_record()["prunable"])
        flap(model, drawn.tokens, budget, CHANNEL_MULTIPLE, pooled=cell.method == "flap-pooled")
        return model if s.dtype == "auto" else model.to(getattr(torch, s.dtype))


class Ranking:
    """One ``ranks.json`` for each seed, made once, handed to every cell, and kept beside the log."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def path(self, seed: int) -> Path:
        key = self.bench.key({"ranking": seed})
        return self.bench.log.path.with_suffix("") / f"ranks-{seed}-{key}.json"

    def of(self, seed: int) -> Path:
        """The ranking, made now where it is not there."""
        path = self.path(seed)
        if not path.exists():  # the cheapest run that leaves error curves and probes behind
            with tempfile.TemporaryDirectory(prefix="quality-") as scratch:
                options = {"category": "unstructured", "sparsity": RANKED_AT, "quality": "fast", "policy": "curve"}
                self.bench.prune(seed, Path(scratch) / "out", **options)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text((Path(scratch) / "out" / "ranks.json").read_text())
        return path

    def learn(self, seed: int, path: Path) -> None:
        """Keep what a cell had to measure beyond what it was given."""
        new = path.read_text()
        if _leaves(json.loads(new)) > _leaves(json.loads(self.of(seed).read_text())):
            self.of(seed).write_text(new)


def _leaves(content: Any) -> int:
    if isinstance(content, dict):
        return sum(map(_leaves, content.values()))
    return sum(map(_leaves, content)) if isinstance(content, list) else int(content is not None)


def _short(values: list[float]) -> list[float]:
    return [round(value, 7) for value in values]
