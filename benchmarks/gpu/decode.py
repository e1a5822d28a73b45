# SPDX-License-Identifier: Apache-2.0
"""A Llama of 7B parameters writes: dense, with zeros, 2:4 and composite; batch 1, greedy, every token a CUDA graph.

Random weights, pruned by magnitude, one prompt for all. Each variant takes turns with the dense model, run by run;
memory is what it holds and needs beside the dense one. :func:`measure_compiled` does the same with every token
through ``torch.compile``, which merges the small kernels between the products, for the dense model too.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from models import LLAMA_7B, pruned, random_llama
from torch import Tensor

import mosaic_kernels as mk
from gpu.bench import Bench, Row, note, reason
from gpu.timing import Chain, Marks
from mosaic_kernels.checkpoint.writer import pack_model
from mosaic_kernels.compat import with_cache
from mosaic_kernels.evaluate.latency import weight_bytes

PROMPT_TOKENS, NEW_TOKENS, RUNS = 128, 128, 5
TINY = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": 128}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """How a model is pruned; see :func:`models.pruned`."""

    sparsity: float
    structured_share: float = 0.0
    pattern: str = "unstructured"


# The most telling first: what time does not allow is left out from the end.
VARIANTS = {
    "unstructured 50%": Variant(0.5),
    "composite 80%": Variant(0.8, 0.4),
    "unstructured 70%": Variant(0.7),
    "unstructured 60%": Variant(0.6),
    "composite 60%": Variant(0.6, 0.3),
    "2:4": Variant(0.5, pattern="2:4"),
}


COMPILED = ("unstructured 50%", "composite 80%")  # compiling a model takes most of a minute
# The calls of a chain before its first run write beyond the prompt; and attention wants masks of whole 64.
SPARE_TOKENS, CACHE_MULTIPLE = 8, 64


class Decoder:
    """Greedy decoding of one sequence over a static cache.

    Args:
        forward: a forward pass for single tokens, ``model``'s own unless given.

    Attributes:
        step: one token, as a graph where the device captures it.
    """

    def __init__(self, model: Any, prompt: Tensor, new_tokens: int, forward: Callable[..., Any] | None = None) -> None:
        from transformers import StaticCache

        self.model, self.prompt, self.new_tokens = model, prompt, new_tokens
        self._forward = model if forward is None else forward
        length = -(-(prompt.shape[1] + new_tokens + SPARE_TOKENS) // CACHE_MULTIPLE) * CACHE_MULTIPLE
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self._given = with_cache(model, self.cache)
        self.token = prompt.new_zeros(1, 1)
        self.logits: Tensor
        self.read()
        self.step = Chain([self._step], prompt.device)

    @torch.no_grad()
    def read(self) -> Tensor:
        """Empty the cache and read the prompt; logits after it, fp32 ``[vocabulary]``."""
        if self.cache.is_initialized:
            self.cache.reset()
        out = self.model(input_ids=self.prompt, use_cache=True, logits_to_keep=1, **self._given)
        self.token.copy_(out.logits[:, -1:].argmax(-1))
        return out.logits[0, -1].float()

    @torch.no_grad()
    def _step(self) -> None:
        out = self._forward(input_ids=self.token, use_cache=True, **self._given)
        self.logits = out.logits
        self.token.copy_(out.logits[:, -1:].argmax(-1))

    def write(self) -> list[float]:
        """Read the prompt and write; seconds of every token after the first."""
        self.read()
        marks = Marks(self.prompt.device)
        marks.mark()
        for _ in range(self.new_tokens):
            self.step.run()
            marks.mark()
        return marks.seconds()

    @torch.no_grad()
    def drift(self) -> float:
        """Relative difference of the logits after some written tokens from one pass over all of them, without cache."""
        self.read()
        tokens = [self.token.clone()]
        for _ in range(min(8, self.new_tokens)):
            self.step.run()
            tokens.append(self.token.clone())
        whole = self.model(input_ids=torch.cat([self.prompt, *tokens[:-1]], 1), use_cache=False, logits_to_keep=1)
        return difference(self.logits[0, -1], whole.logits[0, -1])


def difference(found: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error; a float that a JSON file can hold."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def rounding(blocks: int) -> float:
    """How far logits of two equal models may differ: some 10 roundings of bf16 in every block, each uniform."""
    return torch.finfo(torch.bfloat16).eps * (2 * 10 * blocks / 12) ** 0.5


def latencies(seconds: list[float]) -> dict[str, float]:
    """Percentiles of single tokens, in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50": statistics.median(seconds) * 1e3, "p90": cuts[89] * 1e3, "p99": cuts[98] * 1e3}


def figures(seconds: list[float]) -> dict[str, Any]:
    found = latencies(seconds)
    return {"tokens_per_s": 1e3 / found["p50"], "latency_ms": found}


class Memory:
    """Bytes that are allocated on a device from now on; nothing is known on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        gc.collect()
        self._before = torch.cuda.memory_allocated() if self._cuda else 0

    def forget_peak(self) -> None:
        """Count the peak from here on."""
        gc.collect()
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() - self._before if self._cuda else None


def packed_model(variant: Variant, device: torch.device, settings: dict[str, int], prompt: Tensor) -> tuple[Any, float]:
    """A model of its own, pruned, packed and prepared; and how far packing moved its logits."""
    torch.manual_seed(0)
    adapter, plan = pruned(
        random_llama(device=device, **settings), variant.sparsity, variant.structured_share, variant.pattern
    )
    left = sum(int(layer.weight.count_nonzero()) for _, _, layer in adapter.projections())
    if plan.prunable - left != plan.removed:
        raise ArithmeticError(f"{plan.prunable - left} weights are gone instead of {plan.removed}")
    with torch.no_grad():
        wanted = adapter.model(input_ids=prompt).logits  # type: ignore[operator]
        pack_model(adapter)
        found = adapter.model(input_ids=prompt).logits  # type: ignore[operator]
    return mk.prepare_inference(adapter.model), difference(found, wanted)


@dataclass(frozen=True)
class Setting:
    """What all models of a run have in common."""

    shapes: dict[str, int]
    prompt: Tensor
    new_tokens: int
    runs: int
    compiled: bool

    @classmethod
    def of(cls, bench: Bench, *, compiled: bool) -> Setting:
        shapes = TINY if bench.tiny else LLAMA_7B
        prompt_tokens, new_tokens, runs = (5, 6, 2) if bench.tiny else (PROMPT_TOKENS, NEW_TOKENS, RUNS)
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(shapes["vocab_size"], (1, prompt_tokens), generator=generator).to(bench.device)
        return cls(shapes, prompt, new_tokens, runs, compiled)

    def decoder(self, model: Any) -> tuple[Decoder, Row]:
        """A decoder that is ready to run, and what is known of it before it is timed."""
        started = time.perf_counter()
        forward = None
        if self.compiled:
            torch.compiler.reset()
            backend = "inductor" if self.prompt.is_cuda else "eager"  # on a CPU this only tries the code
            forward = torch.compile(model, dynamic=False, backend=backend)
        decoder = Decoder(model, self.prompt, self.new_tokens, forward)
        decoder.write()
        ready = time.perf_counter() - started
        return decoder, {
            "prompt_tokens": self.prompt.shape[1], "new_tokens": self.new_tokens, "runs": self.runs,
            "weight_bytes": weight_bytes(model), "not_captured": decoder.step.why_not_captured,
            "ready_seconds": ready, "drift_limit": rounding(self.shapes["num_hidden_layers"]),
        }  # fmt: skip

    def name(self, variant: str) -> str:
        return f"{variant}, compiled" if self.compiled else variant


def measure(bench: Bench) -> Iterator[Row]:
    """A row for the dense model alone, then one for every variant with the dense model's figures of the same turns."""
    return _measure(bench, Setting.of(bench, compiled=False), VARIANTS)


def measure_compiled(bench: Bench) -> Iterator[Row]:
    """As :func:`measure`, for few variants whose tokens go through ``torch.compile``, as the dense model's do."""
    return _measure(bench, Setting.of(bench, compiled=True), {name: VARIANTS[name] for name in COMPILED})


def _measure(bench: Bench, setting: Setting, variants: dict[str, Variant]) -> Iterator[Row]:
    memory = Memory(bench.device)
    torch.manual_seed(0)
    model = random_llama(device=bench.device, **setting.shapes)
    memory.forget_peak()
    dense, known = setting.decoder(model)
    known |= {"peak_bytes": memory.peak(), "drift": dense.drift()}
    if not setting.compiled:
        known["beside_weights"] = _beside_weights(bench, setting)
    yield {"variant": setting.name("dense"), **known, **figures(_turns([dense], setting.runs)[0])}
    for name, variant in variants.items():
        if bench.left <= 0:
            return
        note(f"{name}: {bench.left:.0f} s left")
        row = {"variant": setting.name(name), "removed": variant.sparsity, "structured_share": variant.structured_share}
        memory = Memory(bench.device)
        try:
            packed, moved = packed_model(variant, bench.device, setting.shapes, setting.prompt)
            memory.forget_peak()
            decoder, found = setting.decoder(packed)
            row |= found | {"peak_bytes": memory.peak(), "packing_error": moved, "drift": decoder.drift()}
            if not max(moved, row["drift"]) <= row["drift_limit"]:
                raise ArithmeticError(f"wrong result: packing moved logits by {moved:.3g}, decoding {row['drift']:.3g}")
            own, base = (figures(seconds) for seconds in _turns([decoder, dense], setting.runs))
            row |= {**own, "dense_in_turns": base, "ratios": _ratios(row | own, known | base)}
        except Exception as error:  # a variant that cannot run must not take the others' figures along
            row["error"] = reason(error)
        yield row
        packed = decoder = None  # its memory is the next one's
        bench.free()


def _beside_weights(bench: Bench, setting: Setting) -> dict[str, float]:
    """Milliseconds of a token of a dense model as deep, whose weights cost nothing to read: all but the products."""
    narrow = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    model = random_llama(device=bench.device, **{**setting.shapes, **narrow, **heads})
    decoder, _ = replace(setting, prompt=setting.prompt % 128).decoder(model)
    return latencies(_turns([decoder], 2)[0])


def _turns(decoders: list[Decoder], runs: int) -> list[list[float]]:
    """Seconds of all tokens of each decoder; they take turns, run by run."""
    seconds: list[list[float]] = [[] for _ in decoders]
    for _ in range(runs):
        for found, decoder in zip(seconds, decoders, strict=True):
            found += decoder.write()
    return seconds


def _ratios(own: dict[str, Any], dense: dict[str, Any]) -> dict[str, float | None]:
    peak = None if own["peak_bytes"] is None else own["peak_bytes"] / dense["peak_bytes"]
    return {
        "tokens_per_s": own["tokens_per_s"] / dense["tokens_per_s"],
        "latency": own["latency_ms"]["p50"] / dense["latency_ms"]["p50"],
        "weight_bytes": own["weight_bytes"] / dense["weight_bytes"],
        "peak_bytes": peak,
    }
