# SPDX-License-Identifier: Apache-2.0
"""Load a model, dense or mosaic, so that every failure names its cause before or instead of garbage."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from torch import nn

from mosaic_kernels.checkpoint.files import read_json, tensor_headers, weight_files
from mosaic_kernels.checkpoint.progress import no_bars_of_transformers
from mosaic_kernels.cli import resolve_device
from mosaic_kernels.errors import (
    EnvironmentError_,
    ModelLoadError,
    MosaicError,
    NonFiniteError,
    UnsupportedModelError,
    UsageError,
)
from mosaic_kernels.models import SUPPORTED_MODEL_TYPES, ModelAdapter
from mosaic_kernels.paths import local_path
from mosaic_kernels.progress import station
from mosaic_kernels.wrappers import MERGE

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def load_model(
    source: str | Path, *, dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu"
) -> tuple[Any, Any]:
    """A causal language model and its tokenizer, ready for inference.

    Args:
        source: a Hugging Face directory, dense or mosaic, or a hub id.
        dtype: ``auto`` (the checkpoint's), ``float32``, ``bfloat16`` or ``float16``.
        device: where to put the model.

    Returns:
        The model in evaluation mode, and the tokenizer or ``None`` where ``source`` has none.

    Raises:
        UsageError: ``dtype`` or ``device`` is not one.
        ModelLoadError: the directory is missing, incomplete or corrupt; the message names the file or tensor.
        UnsupportedModelError: another architecture, or no causal language model; found before weights are read.
        FormatError: a mosaic checkpoint contradicts itself.
        EnvironmentError_: a hub id, and the hub cannot be reached; or no such device.
    """
    from transformers import AutoModelForCausalLM

    place = resolve_device(str(device))
    source = local_path(source, "MODEL") if str(source).startswith("~") else source
    path, _ = _require_supported(source)
    if path is not None:
        tensor_headers(weight_files(path))  # finds a truncated shard now, by name
    with station("load"), _load_errors(source):
        tokenizer = _load_tokenizer(path or source)  # before the weights: it is small, and loading it may fail
        model, loaded = AutoModelForCausalLM.from_pretrained(
            path or source, dtype=_dtype(dtype), trust_remote_code=False, output_loading_info=True
        )
        lacking = sorted({*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])})
        if lacking:  # transformers made these up, and only warned
            raise ModelLoadError(f"{source}: the weight files lack {', '.join(lacking[:3])} ({len(lacking)} in all)")
        ModelAdapter.of(model)
        return model.to(place).eval(), tokenizer


def load_skeleton(source: str | Path, *, dtype: str | torch.dtype = "auto") -> Any:
    """The model of ``source`` on the meta device: its modules and shapes, no weights.

    Args and errors are those of :func:`load_model`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from mosaic_kernels.checkpoint.quantizer import MosaicConfig

    source = local_path(source, "MODEL") if str(source).startswith("~") else source
    path, content = _require_supported(source)
    with _load_errors(source), torch.device("meta"):
        config = AutoConfig.from_pretrained(path or source, trust_remote_code=False)
        chosen = _dtype(dtype)
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype if chosen == "auto" else chosen)
        found = content.get("quantization_config")
        if found is not None:
            MosaicConfig.from_dict(found).lay_out(ModelAdapter.of(model))
        return model


def check_finite(model: nn.Module) -> None:
    """Raise where a weight holds NaN or Inf.

    Raises:
        NonFiniteError: names the first such tensor and how many of its weights are not finite.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel() and not parameter.is_meta:
            low, high = parameter.detach().aminmax()  # NaN passes through; no copy of the weight
            if not (torch.isfinite(low) and torch.isfinite(high)):
                count = int((~torch.isfinite(parameter)).sum())
                raise NonFiniteError(
                    f"{name}: {count} of {parameter.numel()} weights are NaN or Inf; the checkpoint is damaged"
                )


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if dtype == "auto" or dtype in DTYPES.values():
        return dtype
    if dtype in DTYPES:
        return DTYPES[str(dtype)]
    raise UsageError(f"dtype {dtype!r} is not supported; use auto, {', '.join(DTYPES)}")


def _require_supported(source: str | Path) -> tuple[Path | None, dict[str, Any]]:
    """The directory (``None``: a hub id) and the content of its ``config.json``, if we can use the model."""
    path = local_path(source, "model")
    if path.is_dir():
        _require_no_adapter(path)
        local, content = path, read_json(path / "config.json")
    elif path.exists():
        raise ModelLoadError(f"{source} is a file; give the directory that holds the model")
    elif _is_path(str(source)):
        raise ModelLoadError(f"{source}: no such directory{_meant(path)}")
    elif _meant(path) and not _hub_answers():  # transformers would try for half a minute
        raise ModelLoadError(f"{source}: no such directory, and the hub cannot be reached{_meant(path)}")
    else:
        local = None
        with _load_errors(source):
            from transformers import PreTrainedConfig

            content, _ = PreTrainedConfig.get_config_dict(str(source))
    kind, classes = content.get("model_type"), content.get("architectures") or []
    described = content.get("quantization_config") or {"quant_method": "mosaic"}
    if not isinstance(described, dict) or not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        raise ModelLoadError(
            f"quantization_config in config.json of {source} must be a table, and architectures a list of names: copy "
            "or download it again"
        )
    if kind not in SUPPORTED_MODEL_TYPES:
        supported = ", ".join(SUPPORTED_MODEL_TYPES)
        raise UnsupportedModelError(
            f"{source}: architecture {kind!r} is not supported; supported dense models: {supported}"
        )
    if classes and not any(name.endswith("ForCausalLM") for name in classes):
        raise UnsupportedModelError(f"{source}: {classes[0]} is not a causal language model (...ForCausalLM)")
    method = described.get("quant_method")
    if method != "mosaic":
        raise UnsupportedModelError(f"{source} is quantized with {method!r}: give the model in fp32, bf16 or fp16")
    return local, content


def _is_path(source: str) -> bool:
    return source.startswith(("/", ".", "~")) or source.endswith("/") or source.count("/") > 1


def _meant(path: Path) -> str:
    """``; did you mean ...?`` if a directory with a model has nearly this name, else an empty string."""
    for first in (
        get_close_matches(path.parts[0], [p.name for p in Path().iterdir()], cutoff=0.75) if path.parts else ()
    ):
        nearby = Path(first, *path.parts[1:])
        names = [p.name for p in nearby.parent.iterdir()] if nearby.parent.is_dir() else []
        for last in get_close_matches(nearby.name, names, cutoff=0.75):
            if nearby.with_name(last).joinpath("config.json").is_file():
                return f"; did you mean {nearby.with_name(last)}?"
    return ""


def _hub_answers() -> bool:
    """False if a connection to the hub fails at once; True otherwise, and always behind a proxy."""
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if constants.HF_HUB_OFFLINE or getproxies():
        return not constants.HF_HUB_OFFLINE
    try:
        with socket.create_connection((address.hostname or "", address.port or 443), timeout=3):
            return True
    except OSError:
        return False


def _require_no_adapter(path: Path) -> None:
    if (path / "adapter_config.json").exists():
        beside = "beside the weights" if (path / "config.json").exists() else "and no model"
        raise ModelLoadError(f"{path} holds an adapter (PEFT, such as LoRA: adapter_config.json) {beside}: {MERGE}")


def _load_tokenizer(source: str | Path) -> Any:
    from transformers import AutoTokenizer

    if isinstance(source, Path) and not any((source / name).exists() for name in _TOKENIZER_FILES):
        logger.info("%s has no tokenizer files", source)
        return None
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        if "custom code" in str(error) or "trust_remote_code" in str(error):
            raise ModelLoadError(
                f"{source}: its tokenizer is code of the model, which this package does not run: convert it to a "
                "tokenizer.json, or remove the tokenizer's files and use --calibration random"
            ) from error
        raise ModelLoadError(f"{source}: its tokenizer does not load: {_first_line(error)}") from error


@contextmanager
def _load_errors(source: str | Path) -> Iterator[None]:
    """The border to transformers and the hub: what they raise becomes an error of ours."""
    try:
        with no_bars_of_transformers(downloads=not Path(source).is_dir()):
            yield
    except (MosaicError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if _is_offline(error):
            raise EnvironmentError_(
                f"{source} is not a local directory and the hub cannot be reached ({_first_line(error)})"
                f"{_meant(Path(source))}: download the model where there is a network and give its directory"
            ) from error
        hint = "" if Path(source).is_dir() else _meant(Path(source))
        raise ModelLoadError(f"{source} does not load: {_first_line(error)}{hint}") from error


def _is_offline(error: BaseException | None) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    while error is not None:
        if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}"
