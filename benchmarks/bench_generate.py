# SPDX-License-Identifier: Apache-2.0
"""A 1.1B-parameter Llama decodes: dense, packed and int8 ones, a composite one, and llama.cpp, in turns.

    pytest benchmarks/bench_generate.py --benchmark-only --benchmark-json=benchmarks/results/generate-CPU.json

Random weights, magnitude pruning, one prompt, one number of threads for all; ``compiled``: single tokens through
``torch.compile`` over a static cache. Where torch's bf16 products are slower than its fp32 ones, the dense model runs
in fp32 too, and "over dense" means the faster of the two. llama.cpp's rows need ``pip install llama-cpp-python gguf``.
The small trained model of ``examples/`` runs in the same way. What a token costs outside our kernels, and what a static
cache and ``torch.compile`` change, have tests of their own. Takes some five minutes, 10 GB of memory (15 with fp32) and
2 GB of disk.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import Run, in_turns, llama_cpp, speeds, step_logits, without_kernels, write, write_by_llama_cpp
from models import LLAMA_1B, NARROW, pruned, random_llama, sharing_copy, write_gguf

import mosaic_kernels as mk
from mosaic_kernels.checkpoint.writer import pack_model
from mosaic_kernels.device import has_fast_products
from mosaic_kernels.evaluate.latency import weight_bytes
from mosaic_kernels.models import ModelAdapter

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 64, 24, 4
BITMAP, INT8, ROUNDED, COMPOSITE = "bitmap 50 %", "int8 50 %", "int8 50 %, rounded activations", "composite 60 %"
DENSE, DENSE_FP32 = "dense", "dense, fp32"
BASELINES = (DENSE,) if has_fast_products(torch.bfloat16) else (DENSE, DENSE_FP32)
EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-llama"
EXAMPLE_ROUNDS = 12  # one of its tokens takes a hundredth of the time that the large model takes
COMPILED = {f"{name}, compiled": name for name in (BITMAP, INT8)} if shutil.which("c++") else {}
OURS = (BITMAP, INT8, ROUNDED, COMPOSITE, *COMPILED)
THEIRS = ("llama.cpp BF16", "llama.cpp Q8_0")
HAS_LLAMA_CPP = all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))
# How far logits may differ: two models, some 10 roundings in every block, each of them a uniform error of one
# step (its deviation is step / sqrt(12)) that is independent of the others. Relative to the values a step is
# bf16's eps at most; int8's is 1/127 of a row's largest weight, which is 4 deviations from zero.
ROUNDINGS = (2 * 10 * LLAMA_1B["num_hidden_layers"] / 12) ** 0.5
BF16, INT8_STEP = torch.finfo(torch.bfloat16).eps * ROUNDINGS, 4 / 127 * ROUNDINGS


@pytest.fixture(scope="session")
def prompt() -> torch.Tensor:
    return torch.randint(LLAMA_1B["vocab_size"], (1, PROMPT_TOKENS), generator=torch.Generator().manual_seed(0))


def variants_of(dense: Any, prompt: torch.Tensor) -> dict[str, Any]:
    """Every form of a dense bf16 model, checked against its own dense form; shared tensors are in memory once."""
    found = {DENSE: dense}
    if DENSE_FP32 in BASELINES:
        found[DENSE_FP32] = copy.deepcopy(dense).float()
    for name, sparsity, structured in ((BITMAP, 0.5, 0.0), (COMPOSITE, 0.6, 0.3)):
        adapter, plan = pruned(dense, sparsity, structured)
        left = sum(int(layer.weight.count_nonzero()) for _, _, layer in adapter.projections())
        assert plan.prunable - left == plan.removed == round(sparsity * plan.prunable)
        wanted = logits(adapter.model, prompt)
        pack_model(adapter)
        found[name] = adapter.model
        assert difference(logits(adapter.model, prompt), wanted) <= BF16
        if name == BITMAP:
            found[INT8] = sharing_copy(adapter.model)
            pack_model(ModelAdapter.of(found[INT8]), "int8")
            found[ROUNDED] = mk.prepare_inference(sharing_copy(found[INT8]), quantize_activations=True)
            for variant in (INT8, ROUNDED):
                assert difference(logits(found[variant], prompt), wanted) <= INT8_STEP
    for name in (BITMAP, INT8, ROUNDED, COMPOSITE):
        mk.prepare_inference(found[name])
    return found


@pytest.fixture(scope="session")
def models(prompt: torch.Tensor) -> dict[str, Any]:
    """Every variant of the 1.1B Llama."""
    torch.manual_seed(0)
    found = variants_of(random_llama(**LLAMA_1B), prompt)
    return found | {name: found[source] for name, source in COMPILED.items()}


@pytest.fixture(scope="session")
def example_models(prompt: torch.Tensor) -> dict[str, Any]:
    """Every variant of the trained model in ``examples/``."""
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.bfloat16).requires_grad_(False)
    return variants_of(dense, prompt % dense.config.vocab_size)


class Lineup:
    """All variants, measured in turns; a row that is asked for a second time has them all measured again."""

    def __init__(self, writers: dict[str, Callable[[], Run]], rounds: int = ROUNDS) -> None:
        self.writers, self.rounds = writers, rounds
        self._found: dict[str, list[Run]] = {}
        self._shown: set[str] = set()

    def runs(self, row: str) -> dict[str, list[Run]]:
        if not self._found or row in self._shown:
            self._found, self._shown = in_turns(self.writers, self.rounds), set()
        self._shown.add(row)
        return self._found


@contextmanager
def theirs(dense: Any, prompt: torch.Tensor, folder: Path) -> Iterator[dict[str, Callable[[], Run]]]:
    """Functions that generate with llama.cpp from the same weights, if it is installed."""
    writers: dict[str, Callable[[], Run]] = {}
    loaded = []
    for name in THEIRS if HAS_LLAMA_CPP else ():
        path = folder / "dense.gguf"
        write_gguf(dense, path, quantized="Q8_0" in name)
        loaded.append(llama_cpp(path, torch.get_num_threads()))
        path.unlink()  # it is in memory
        writers[name] = partial(write_by_llama_cpp, loaded[-1], prompt, NEW_TOKENS)
    yield writers
    for model in loaded:
        model.close()


@pytest.fixture(scope="session")
def lineup(models: dict[str, Any], prompt: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lineup]:
    """All variants of the 1.1B Llama, and llama.cpp."""
    writers = {name: partial(write, model, prompt, NEW_TOKENS) for name, model in models.items()}
    for name in COMPILED:
        fixed = {"cache": static_cache(models[name]), "step": torch.compile(models[name], dynamic=False)}
        writers[name] = partial(write, models[name], prompt, NEW_TOKENS, **fixed)
    with theirs(models[DENSE], prompt, tmp_path_factory.mktemp("gguf")) as foreign:
        yield Lineup({**writers, **foreign})


@pytest.fixture(scope="session")
def example_lineup(
    example_models: dict[str, Any], prompt: torch.Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lineup]:
    """All variants of the model in ``examples/``, and llama.cpp."""
    prompt = prompt % example_models[DENSE].config.vocab_size
    writers = {name: partial(write, model, prompt, NEW_TOKENS) for name, model in example_models.items()}
    with theirs(example_models[DENSE], prompt, tmp_path_factory.mktemp("gguf")) as foreign:
        yield Lineup({**writers, **foreign}, EXAMPLE_ROUNDS)


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """After every token of the prompt, fp32."""
    return model(input_ids=ids).logits.float()


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative Frobenius error."""
    return float((found - wanted).norm() / wanted.norm())


def projection_bytes(model: Any) -> int:
    """Bytes of everything that pruning may touch."""
    return sum(weight_bytes(layer) for _, _, layer in ModelAdapter.of(model).projections())


def static_cache(model: Any) -> Any:
    """Room for the prompt and all that is written."""
    from transformers import StaticCache

    return StaticCache(config=model.config, max_cache_len=PROMPT_TOKENS + NEW_TOKENS)


def over(runs: list[Run], *baselines: list[Run]) -> dict[str, float]:
    """The decode and prefill speeds of ``runs``, each relative to the baseline that is fastest at it."""
    found, bases = speeds(runs), [speeds(each) for each in baselines]
    return {
        kind: found[kind]["tokens_per_s"] / max(base[kind]["tokens_per_s"] for base in bases)
        for kind in ("decode", "prefill")
    }


def record(benchmark: Any, models: dict[str, Any], lineup: Lineup, variant: str, **info: Any) -> None:
    """Record a variant's speeds and bytes, and their ratios to the dense model's."""
    runs = benchmark.pedantic(lambda: lineup.runs(variant), rounds=1)
    benchmark.extra_info.update(info, variant=variant, **speeds(runs[variant]))
    if variant in THEIRS:
        # the comparison means nothing if the file holds another model
        bound = INT8_STEP if "Q8_0" in variant else BF16
        assert difference(runs[variant][0].logits, runs[DENSE][0].logits) <= bound
        ours = [name for name in models if name not in BASELINES]
        ratios = {f"{name} over it": over(runs[name], runs[variant]) for name in ours}
        benchmark.extra_info.update(
            ratios={name: both["decode"] for name, both in ratios.items()},
            prefill_ratios={name: both["prefill"] for name, both in ratios.items()},
        )
        return
    sizes = {"projections": projection_bytes, "model": weight_bytes}
    found = {what: size(models[variant]) for what, size in sizes.items()}
    benchmark.extra_info.update(weight_bytes=found)
    if variant not in BASELINES:
        benchmark.extra_info.update(
            ratios=over(runs[variant], *(runs[name] for name in BASELINES)),
            memory={what: found[what] / size(models[DENSE]) for what, size in sizes.items()},
        )


needs_llama_cpp = pytest.mark.skipif(
    not HAS_LLAMA_CPP, reason="compares with llama.cpp: pip install llama-cpp-python gguf"
)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("variant", [*BASELINES, *OURS])
def test_generate(benchmark: Any, models: dict[str, Any], lineup: Lineup, variant: str) -> None:
    record(benchmark, models, lineup, variant)


@needs_llama_cpp
@pytest.mark.parametrize("variant", THEIRS)
def test_llama_cpp(benchmark: Any, models: dict[str, Any], lineup: Lineup, variant: str) -> None:
    record(benchmark, models, lineup, variant)


@pytest.mark.parametrize("variant", [*BASELINES, BITMAP, INT8, ROUNDED, COMPOSITE])
def test_example(benchmark: Any, example_models: dict[str, Any], example_lineup: Lineup, variant: str) -> None:
    record(benchmark, example_models, example_lineup, variant, model="example")


@needs_llama_cpp
@pytest.mark.parametrize("variant", THEIRS)
def test_example_by_llama_cpp(
    benchmark: Any, example_models: dict[str, Any], example_lineup: Lineup, variant: str
) -> None:
    record(benchmark, example_models, example_lineup, variant, model="example")


def test_outside_kernels(benchmark: Any, models: dict[str, Any], prompt: torch.Tensor) -> None:
    """Milliseconds of a token that none of our kernels takes, and how many of them are calls.

    ``calls`` is from as many blocks, so narrow that torch's operators cost no more than being called: Python
    and dispatch. What is left of ``outside_kernels`` is torch's operators at work.
    """
    narrow, _ = pruned(random_llama(**NARROW), 0.5)
    pack_model(narrow)

    def idle(model: Any) -> Run:
        with without_kernels(model):
            return write(model, prompt % NARROW["vocab_size"], NEW_TOKENS)

    writers = {
        "token": partial(write, models[BITMAP], prompt, NEW_TOKENS),
        "outside_kernels": partial(idle, models[BITMAP]),
        "calls": partial(idle, narrow.model),
    }
    found = benchmark.pedantic(lambda: in_turns(writers, ROUNDS), rounds=1)
    benchmark.extra_info.update(
        variant=BITMAP,
        milliseconds={name: 1e3 / speeds(runs)["decode"]["tokens_per_s"] for name, runs in found.items()},
    )


@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_static_and_compiled(benchmark: Any, models: dict[str, Any], prompt: torch.Tensor) -> None:
    """A static cache, eager and with every step compiled, against the cache that grows."""
    model = models[BITMAP]
    cache = static_cache(model)
    compiled = torch.compile(model, dynamic=False)
    started = time.perf_counter()
    found = step_logits(model, prompt, cache=cache, step=compiled)
    compile_seconds = time.perf_counter() - started
    wanted = step_logits(model, prompt)
    assert difference(step_logits(model, prompt, cache=cache), wanted) <= BF16
    assert difference(found, wanted) <= BF16

    writers = {
        "dynamic": partial(write, model, prompt, NEW_TOKENS),
        "static": partial(write, model, prompt, NEW_TOKENS, cache=cache),
        "compiled": partial(write, model, prompt, NEW_TOKENS, cache=cache, step=compiled),
    }
    runs = benchmark.pedantic(lambda: in_turns(writers, ROUNDS), rounds=1)
    benchmark.extra_info.update(
        variant=BITMAP,
        **{name: speeds(each)["decode"] for name, each in runs.items()},
        compile_seconds=compile_seconds,
        ratios={name: over(runs[name], runs["dynamic"])["decode"] for name in ("static", "compiled")},
    )


@torch.no_grad()
def test_generate_call(benchmark: Any, models: dict[str, Any], prompt: torch.Tensor) -> None:
    """``generate`` writes what the bare loop writes, with either cache; its seconds include its bookkeeping."""
    model = models[BITMAP]
    static = {"cache": static_cache(model)}

    def call(cache: str) -> tuple[list[int], float]:
        started = time.perf_counter()
        ids = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, cache_implementation=cache)
        return ids[0, PROMPT_TOKENS:].tolist(), time.perf_counter() - started

    found = benchmark.pedantic(lambda: {cache: call(cache) for cache in ("dynamic", "static")}, rounds=1)
    written = {cache: tokens for cache, (tokens, _) in found.items()}
    for cache, options in (("dynamic", {}), ("static", static)):
        assert written[cache] == write(model, prompt, NEW_TOKENS - 1, **options).tokens
    same = sum(itertools.takewhile(bool, (a == b for a, b in zip(*written.values(), strict=True))))
    if same < NEW_TOKENS:  # attention over a padded cache rounds elsewhere: only equally good tokens may change places
        last = logits(model, torch.cat([prompt, torch.tensor([written["dynamic"][:same]], dtype=prompt.dtype)], 1))[
            0, -1
        ]
        gap = last[written["dynamic"][same]] - last[written["static"][same]]
        assert abs(float(gap)) <= BF16 * float(last.abs().max())
    benchmark.extra_info.update(
        variant=BITMAP,
        tokens=NEW_TOKENS,
        same_tokens=same,
        seconds={cache: seconds for cache, (_, seconds) in found.items()},
    )
