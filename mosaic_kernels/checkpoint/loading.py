# SPDX-License-Identifier: Apache-2.0
"""Checks a mosaic checkpoint while transformers loads it: first the files, then the loaded values."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mosaic_kernels import compat
from mosaic_kernels.checkpoint.checksums import config_is_as_written, damaged_tensors, header_digest
from mosaic_kernels.checkpoint.files import (
    DTYPE_NAMES,
    GENERATION_FILE,
    WEIGHTS,
    WEIGHTS_INDEX,
    Header,
    read_json,
    tensor_headers,
    weight_files,
)
from mosaic_kernels.checkpoint.values import check_values
from mosaic_kernels.errors import FormatError, ModelLoadError, MosaicError
from mosaic_kernels.linear import MosaicLinear

logger = logging.getLogger(__name__)

_FLOATS = ("F64", "F32", "BF16", "F16")
# A cast makes nonsense of tensors of these dtypes; float tensors may be cast to the dtype of the model.
_WHOLE_NUMBERS = (torch.int8, torch.uint8)


def check_directory(config: Any, checksums: Mapping[str, Any]) -> None:
    """Look at the files of a local checkpoint before transformers builds the model or opens a weight file.

    transformers alone would wait for ever at a weight file that is a pipe, call an unreadable file missing, and build
    as many blocks as ``config.json`` asks for. A warning says if ``config.json`` was changed after it was written.

    Raises:
        ModelLoadError, FormatError: a file, or the configuration, is not as it must be.
        EnvironmentError_: a file may not be read.
    """
    directory = Path(config.name_or_path or "")
    if not config.name_or_path or not (directory / "config.json").is_file():
        return  # from the hub or in a subfolder; check_files checks the files that transformers finds
    if any((directory / name).is_symlink() or (directory / name).exists() for name in (WEIGHTS, WEIGHTS_INDEX)):
        headers = tensor_headers(weight_files(directory))
        _check_sizes(config, headers)
    if (directory / GENERATION_FILE).is_file():  # transformers would fail after the weights, or take its defaults
        read_json(directory / GENERATION_FILE)
    if not config_is_as_written(directory, checksums):
        _require_buildable(config, directory)


def _check_sizes(config: Any, headers: Mapping[str, Header]) -> None:
    """Compare the sizes in the configuration with the tensors in the files, before a model of these sizes is built."""
    blocks = {name.partition("layers.")[2].partition(".")[0] for name in headers if "layers." in name}
    counts = {"num_hidden_layers": len(blocks)}
    embedding = next((h for name, h in headers.items() if name.endswith("embed_tokens.weight")), None)
    if embedding is not None and len(embedding.shape) == 2:
        counts |= {"vocab_size": embedding.shape[0], "hidden_size": embedding.shape[1]}
    for key, count in counts.items():
        said = getattr(config, key, count)
        if said != count:
            raise FormatError(
                f"config.json says {key} is {said!r:.40}, but by the weight files it is {count}: copy or download the "
                "checkpoint again"
            )


def _require_buildable(config: Any, directory: Path) -> None:
    """Build the model of a changed configuration without weights, to raise :class:`ModelLoadError` if that fails."""
    from transformers import AutoModel

    logger.warning(
        "%s was changed after the checkpoint was written; `python -m mosaic_kernels.info %s --verify` checks the rest",
        directory / "config.json", directory,
    )  # fmt: skip
    plain = copy.deepcopy(config)
    plain.quantization_config = None
    try:
        with torch.device("meta"):
            AutoModel.from_config(plain)
    except MosaicError:
        raise
    except Exception as error:
        raise ModelLoadError(
            f"{directory / 'config.json'} was changed after the checkpoint was written, and transformers makes no "
            f"model of it ({type(error).__name__}: {error!s:.200}): copy or download the checkpoint again"
        ) from error


def check_files(
    model: Any, files: Sequence[Path], checksums: Mapping[str, Any], *, verify: bool
) -> Mapping[str, Header]:
    """Refuse weight files that do not fit the model or differ from their checksums; return their headers.

    Args:
        model: on the meta device, with the layers that the configuration describes.
        files: the weight files, all in one directory.
        checksums: those of ``quantization_config``; empty for checkpoints of older releases.
        verify: also compare the bytes of all tensors.

    Raises:
        ModelLoadError, FormatError: a file or tensor is wrong; the message names it.
        EnvironmentError_: a file may not be read.
    """
    directory = files[0].parent
    outside = [file for file in files if file.parent != directory or ".." in file.parts[len(directory.parts) :]]
    if outside:
        raise ModelLoadError(f"{directory}: the weight file {outside[0]} lies outside the checkpoint")
    headers = tensor_headers(files)
    _require_tensors(model, headers)
    if "header" in checksums and header_digest(headers) != checksums["header"]:
        raise FormatError(
            f"{directory}: the weight files hold other names, dtypes or shapes than when they were written: copy or "
            "download the checkpoint again; if you changed them on purpose, remove checksums from config.json"
        )
    if verify:
        require_verified(directory, files, checksums)
    return headers


def require_verified(directory: Path, files: Sequence[Path], checksums: Mapping[str, Any]) -> None:
    """Refuse weight files in which any byte differs from what was written.

    Raises:
        ModelLoadError: tensors are damaged (the message names them), or there are no checksums.
    """
    if not checksums.get("tensors"):
        raise ModelLoadError(
            f"{directory} has no checksums and cannot be verified: an older release wrote it; load it and save it with "
            "save_pretrained to add them"
        )
    if not config_is_as_written(directory, checksums):
        raise ModelLoadError(f"{directory / 'config.json'} is not as it was written: copy or download it again")
    damaged = damaged_tensors(files, checksums)
    if damaged:
        raise ModelLoadError(
            f"{directory}: the bytes of {_some(damaged)} are not as they were written: copy or download the checkpoint "
            "again"
        )


def _require_tensors(model: Any, headers: Mapping[str, Header]) -> None:
    """Refuse files that lack a tensor of the model, or hold it with another shape or dtype.

    transformers would fill a missing tensor with random values and cast one of another dtype.
    """
    wanted = model.state_dict()
    tied = compat.tied_weights(model)
    tied = {**tied, **{source: target for target, source in tied.items()}}
    missing = []
    for name, tensor in wanted.items():
        header = _find(name, headers, model.base_model_prefix)
        if header is None:
            if _find(tied.get(name), headers, model.base_model_prefix) is None:
                missing.append(name)
            continue
        shape = tuple(tensor.shape)
        if header.shape != shape:
            raise FormatError(
                f"{name}: the file holds shape {list(header.shape)} but the config asks for {list(shape)}"
            )
        asked = DTYPE_NAMES[tensor.dtype] if tensor.dtype in _WHOLE_NUMBERS else None
        if header.dtype not in ((asked,) if asked else _FLOATS):
            raise FormatError(
                f"{name}: the file holds {header.dtype} values but the config asks for {asked or 'floats'}"
            )
    new = [name for name in missing if _is_of_a_new_head(model, name)]
    lacking = [name for name in missing if name not in new]
    if lacking:
        made_by = ", ".join(map(str, getattr(model.config, "architectures", None) or ()))
        hint = f" (the checkpoint is of {made_by})" if made_by and made_by != type(model).__name__ else ""
        raise ModelLoadError(f"the weight files lack {_some(lacking)}{hint}: copy or download the model again")


def _find(name: str | None, headers: Mapping[str, Header], prefix: str) -> Header | None:
    """The header of a tensor of the model, whether or not the file's name for it has the base model's prefix."""
    if name is None:
        return None
    return headers.get(name) or headers.get(f"{prefix}.{name}") or headers.get(name.removeprefix(f"{prefix}."))


def _is_of_a_new_head(model: Any, name: str) -> bool:
    """True for tensors of a new head, such as a classifier, which transformers makes with a warning."""
    in_base = model.base_model is model or name.startswith(f"{model.base_model_prefix}.")
    return not in_base and model.get_output_embeddings() is None


def check_loaded(model: Any, headers: Mapping[str, Header]) -> None:
    """Refuse NaN and Inf among all loaded values, and zeros among packed ones.

    Args:
        headers: headers of the files. If values were cast at loading, small ones may have become zero rightly.

    Raises:
        NonFiniteError, FormatError: a value is refused; the message names the tensor.
    """
    for prefix, module in model.named_modules():
        for leaf, tensor in module.named_parameters(prefix, recurse=False):
            header = _find(leaf, headers, model.base_model_prefix)
            is_packed = isinstance(module, MosaicLinear)
            if header is not None and not (is_packed and tensor is module.scales):  # build_index checks scales
                packed = is_packed and tensor is module.weight
                as_stored = header.dtype == DTYPE_NAMES.get(tensor.dtype)
                check_values(leaf, tensor, packed=packed and as_stored, stored=header.dtype)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")
