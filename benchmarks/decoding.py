# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding of whole models, timed token by token: ours, compiled, and llama.cpp's."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from measure import interleaved, summary
from torch import Tensor

from mosaic_kernels import _C_cpu
from mosaic_kernels.compat import cache_of, with_cache
from mosaic_kernels.ops import cpu


@dataclass
class Run:
    """A prompt read and tokens written.

    Attributes:
        prompt_tokens: length of the prompt.
        prefill: seconds until the first token was there.
        steps: seconds of every further token.
        logits: after the prompt, fp32 ``[vocabulary]``.
        tokens: all that were written.
    """

    prompt_tokens: int
    prefill: float
    logits: Tensor
    tokens: list[int] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


Writer = Callable[[], Run]


@torch.no_grad()
def write(
    model: Any, ids: Tensor, new_tokens: int, *, cache: Any = None, step: Callable[..., Any] | None = None
) -> Run:
    """Read ``ids`` (``[1, tokens]``) and write ``new_tokens`` more.

    Args:
        cache: a static cache, emptied first; ``None`` takes the model's own, which grows.
        step: a forward pass for single tokens, ``model``'s own unless given.
    """
    if cache is not None and cache.is_initialized:
        cache.reset()
    started = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1, **with_cache(model, cache))
    token = out.logits[:, -1:].argmax(-1)
    run = Run(ids.shape[1], time.perf_counter() - started, out.logits[0, -1].float(), [int(token)])
    given, step = with_cache(model, cache_of(out)), model if step is None else step
    for _ in range(new_tokens):
        started = time.perf_counter()
        token = step(input_ids=token, use_cache=True, **given).logits[:, -1:].argmax(-1)
        run.tokens.append(int(token))
        run.steps.append(time.perf_counter() - started)
    return run


@torch.no_grad()
def step_logits(model: Any, ids: Tensor, *, cache: Any = None, step: Callable[..., Any] | None = None) -> Tensor:
    """Logits of one ``step`` after ``model`` has read all but the last of ``ids``, fp32 ``[vocabulary]``."""
    if cache is not None and cache.is_initialized:
        cache.reset()
    out = model(input_ids=ids[:, :-1], use_cache=True, logits_to_keep=1, **with_cache(model, cache))
    step = model if step is None else step
    last = ids[:, -1:].clone(memory_format=torch.contiguous_format)  # a compiled step is compiled for strides too
    out = step(input_ids=last, use_cache=True, **with_cache(model, cache_of(out)))
    return out.logits[0, -1].float()


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, *, threads: int = 1) -> Tensor:
    """A decoder block's attention alone.

    Args:
        query: ``[query heads, dim]``.
        keys, values: ``[key heads, tokens, dim]``, with any strides but the last.
        mask: bool ``[tokens]``.
    """
    (heads, dim), (key_heads, tokens, _) = query.shape, keys.shape
    out = torch.empty_like(query)
    _C_cpu.attend(
        query.data_ptr(), keys.data_ptr(), values.data_ptr(), cpu.address(mask), out.data_ptr(), heads, key_heads, dim,
        tokens, (*keys.stride()[:2], *values.stride()[:2]), dim**-0.5, cpu._DTYPES[query.dtype], threads,
    )  # fmt: skip
    return out


def llama_cpp(path: Path, threads: int) -> Any:
    """llama.cpp's model of a file, in memory, on this many threads."""
    from llama_cpp import Llama

    return Llama(str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, use_mmap=False, verbose=False)


def write_by_llama_cpp(model: Any, ids: Tensor, new_tokens: int) -> Run:
    """As :func:`write`, by llama.cpp."""
    from llama_cpp import llama_get_logits_ith

    def logits() -> Any:
        return np.ctypeslib.as_array(llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),))

    model.reset()
    started = time.perf_counter()
    model.eval(ids[0].tolist())
    token = int(logits().argmax())
    run = Run(ids.shape[1], time.perf_counter() - started, torch.from_numpy(logits().copy()), [token])
    for _ in range(new_tokens):
        started = time.perf_counter()
        model.eval([token])
        token = int(logits().argmax())
        run.tokens.append(token)
        run.steps.append(time.perf_counter() - started)
    return run


def in_turns(writers: Mapping[str, Writer], rounds: int) -> dict[str, list[Run]]:
    """``rounds`` runs of every writer, in turns, after one that warms up."""
    found: dict[str, list[Run]] = {name: [] for name in writers}

    def turn(name: str) -> Callable[[int], None]:
        return lambda _: found[name].append(writers[name]())

    interleaved({name: turn(name) for name in writers}, rounds)
    return {name: runs[1:] for name, runs in found.items()}


def speeds(runs: list[Run]) -> dict[str, dict[str, float]]:
    """Tokens in a second: medians over all tokens (``decode``) and all runs (``prefill``), with percentiles."""
    steps = summary([seconds for run in runs for seconds in run.steps])
    prefill = runs[0].prompt_tokens / statistics.median(run.prefill for run in runs)
    return {
        "decode": {
            "tokens_per_s": 1e6 / steps["median_us"],
            "p5": 1e6 / steps["p95_us"],
            "p95": 1e6 / steps["p5_us"],
        },
        "prefill": {"tokens_per_s": prefill},
    }


class _Idle:
    """The native module with products that return at once and leave their result unwritten."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if name.startswith("Prepared"):
            return lambda *_: SimpleNamespace(**dict.fromkeys(("run", "run_if", "input", "output"), lambda *_: True))
        return (lambda *_: None) if name.startswith("sparse_linear") else getattr(self._module, name)


@contextmanager
def without_kernels(model: Any) -> Iterator[None]:
    """Everything runs but our products: what a token costs then is Python's and torch's part of it."""
    real = cpu._C_cpu
    cpu._C_cpu = _Idle(real)  # type: ignore[assignment]
    model._apply(lambda tensor: tensor)  # as a cast does, it makes layers forget the calls they prepared
    try:
        yield
    finally:
        cpu._C_cpu = real
        model._apply(lambda tensor: tensor)
