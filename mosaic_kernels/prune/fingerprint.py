# SPDX-License-Identifier: Apache-2.0
"""Everything that decides the bytes of a pruned block. Finished blocks are used again only if all of it is equal.

The model is compared as loaded: every parameter, every buffer and the configuration. So a run may be resumed with a
copy of the model, but not with a model that differs in a single bit. It makes no difference whether the model came from
a directory, the hub or memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from mosaic_kernels.compat import attention_of
from mosaic_kernels.config import PruneConfig
from mosaic_kernels.models import ModelAdapter
from mosaic_kernels.ops.isa import level
from mosaic_kernels.ops.select import running
from mosaic_kernels.ops.threads import threads
from mosaic_kernels.prune.calibration import Calibration
from mosaic_kernels.prune.token_cache import tokenizer_text

# Options of a run that change a block; their values are compared.
RESULT_OPTIONS = (
    "sparsity", "category", "structured_share", "pattern", "channel_multiple", "policy", "outlier_threshold",
    "max_deviation", "solver", "quality", "recover", "seed", "dtype",
)  # fmt: skip

# Options whose effects are compared instead of their values: tokens, a ranking, a dtype, a machine.
SETTLED_OPTIONS = ("calibration", "samples", "seqlen", "ranks", "compute_dtype", "device")

# Options that change no block, but the last step, which a resumed run repeats, or nothing in the result.
OTHER_OPTIONS = ("eval_text", "eval_tokens", "format", "weights", "resume", "overwrite")

# Environment variables that make the libraries choose other instructions or another order of sums.
_ARITHMETIC_VARIABLES = (
    "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DEBUG_CPU_TYPE", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE", "NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG",
)  # fmt: skip

# Entries of a configuration that are not compared: its origin, and the dtype, which the weights show.
_NO_MATTER = ("_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype")


def fingerprint(
    adapter: ModelAdapter,
    tokenizer: Any,
    calibration: Calibration,
    config: PruneConfig,
    compute_dtype: str,
    processes: int = 1,
) -> dict[str, Any]:
    """Everything that decides the bytes of a block, as values that JSON can hold.

    Args:
        adapter: the dense model, before its first block is pruned.
        compute_dtype: the dtype that ``config.compute_dtype`` stands for.
        processes: the number of processes that share the work, which decides the order of sums.
    """
    samples, seqlen = calibration.tokens.shape
    model: Any = adapter.model
    return {
        **{option: getattr(config, option) for option in RESULT_OPTIONS},
        "samples": samples,
        "seqlen": seqlen,
        "calibration": calibration.digest,
        "ranks": None if config.ranks is None else hashlib.sha256(config.ranks.read_bytes()).hexdigest(),
        "compute_dtype": compute_dtype,
        "processes": processes,
        "tokenizer": _tokenizer_digest(tokenizer),
        "config": {key: value for key, value in model.config.to_dict().items() if key not in _NO_MATTER},
        "weights": weight_digests(model),
        "versions": _versions(),
        "machine": _machine(next(model.parameters()).device, attention_of(model.config)),
    }


def weight_digests(model: nn.Module) -> dict[str, str]:
    """A digest of the dtype, shape and bytes of every parameter and buffer, by name.

    Hashing takes 0.85 s of processor time per GB (Xeon, Ice Lake class, with SHA instructions, Dec 2026).
    """
    named = [*model.named_parameters(), *model.named_buffers()]
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:  # hashlib releases Python's lock
        found = pool.map(lambda item: tensor_digest([item]), named)
        return {name: digest for (name, _), digest in zip(named, found, strict=True)}


def tensor_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, the first 128 bits in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.numel() and not tensor.is_meta:
            whole = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(memoryview(cast(Any, whole.view(torch.uint8).numpy())))
    return digest.hexdigest()[:32]


def _tokenizer_digest(tokenizer: Any) -> str | None:
    """A digest of everything that decides the tokens of a text."""
    if tokenizer is None:
        return None
    return hashlib.sha256(tokenizer_text(tokenizer).encode("utf-8", "surrogatepass")).hexdigest()


def _versions() -> dict[str, str | None]:
    from mosaic_kernels import __version__

    found: dict[str, str | None] = {"mosaic-kernels": __version__, "the code of mosaic-kernels": _code_digest()}
    found["torch"] = str(torch.__version__)  # includes the build
    for package in ("transformers", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


@cache
def _code_digest() -> str:
    """A digest of this package's Python files and compiled modules, which a checkout changes without a new version."""
    digest, root = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.so")]):
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _machine(device: torch.device, attention: str | None) -> dict[str, Any]:
    """Properties and settings of the machine that decide how sums are rounded."""
    found: dict[str, Any] = {
        "device": device.type,
        "attention": attention,
        "matmul precision": torch.get_float32_matmul_precision(),
        **{name: os.environ[name] for name in _ARITHMETIC_VARIABLES if name in os.environ},
    }
    if device.type == "cuda":
        found |= {"GPU": torch.cuda.get_device_name(device), "CUDA": torch.version.cuda}
        found["TF32"] = torch.backends.cuda.matmul.allow_tf32
    found["kernels"] = running("sparse_linear", device)
    try:
        from mosaic_kernels import _C_cpu
    except ImportError:  # not built; the other entries are still compared
        features = None
    else:
        features, found["instruction set of kernels (MOSAIC_ISA)"] = _C_cpu.features(), level()
    return found | {
        "processor features": features,
        "instruction set of torch": torch.backends.cpu.get_cpu_capability(),
        "threads of torch (OMP_NUM_THREADS)": torch.get_num_threads(),
        "threads of kernels (MOSAIC_NUM_THREADS)": threads(),
    }


# Part of the fingerprint -> what to do if an entry in it differs; "" stands for the options.
_ADVICE = {
    "": "repeat its options",
    "tokenizer": "give it the model it began with",
    "weights": "give it the model it began with",
    "config": "give it the model it began with",
    "versions": "use the versions it began with",
    "machine": "resume on a machine and with settings like those it began with",
}


def differences(before: dict[str, Any], now: dict[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """The differences of two fingerprints: their names, both values where people can read them, and what to do."""
    names: list[str] = []
    values: list[str] = []
    advice: dict[str, None] = {}
    for part in dict.fromkeys([*now, *before]):
        if _same(before, now, part):
            continue
        old, new = before.get(part), now.get(part)
        if part in ("compute_dtype", "weights") and "dtype" in names:  # these follow from it
            continue
        advice[_ADVICE.get(part, _ADVICE[""])] = None
        if not (isinstance(old, dict) and isinstance(new, dict)):
            names.append(part)
            values += _both(part, old, new)
            continue
        for key in dict.fromkeys([*new, *old]):
            if not _same(old, new, key):
                names.append(f"{key} in config.json" if part == "config" else key)
                values += [] if part == "weights" else _both(key, old.get(key), new.get(key))
    return names, values, list(advice)


def _same(before: dict[str, Any], now: dict[str, Any], key: str) -> bool:
    return key in before and key in now and _canonical(before[key]) == _canonical(now[key])


def _both(name: str, old: Any, new: Any) -> list[str]:
    """A text such as ``seed 0, now 1``; no text for digests and for values that are too long to read."""
    if name.startswith("the code") or any(isinstance(each, str) and len(each) >= 32 for each in (old, new)):
        return []
    texts = ["none" if each is None else _canonical(each).strip('"') for each in (old, new)]
    return [f"{name} {texts[0]}, now {texts[1]}"] if max(map(len, texts)) <= 60 else []


def plain(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The fingerprint as it comes back from its file."""
    found: dict[str, Any] = json.loads(json.dumps(fingerprint, default=_kind))
    return found


def run_id(fingerprint: dict[str, Any]) -> str:
    """A digest that tells runs with different fingerprints apart."""
    return hashlib.sha256(_canonical(fingerprint).encode()).hexdigest()[:32]


def _canonical(value: Any) -> str:
    """JSON with sorted keys; equal for values that JSON writes alike, such as tuples and lists, or two NaN."""
    return json.dumps(value, sort_keys=True, default=_kind)


def _kind(value: object) -> str:
    return type(value).__name__
