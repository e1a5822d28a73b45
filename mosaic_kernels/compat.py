# SPDX-License-Identifier: Apache-2.0
"""Differences between the supported releases of transformers and PEFT, and all private names that the package uses.

No other file of the package contains them (``tests/test_layering.py`` enforces it). The functions look for the names
that a release has instead of comparing version numbers: if a release moves a name, the message says which one is
missing. Importing this module imports neither library.

If a release lacks something that native decoder blocks need, blocks stay as transformers made them, and
:func:`why_not_native` gives the reason.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

# The name of the cache in arguments and outputs: in transformers 5.24 and later, and up to 5.23.
CACHE_NAMES = ("cache", "past_key_values")

# checkpoint/__init__.py extends these modules after somebody has imported them.
CONFIGURATIONS = "transformers.configuration_utils"
QUANTIZERS = "transformers.quantizers.auto"
MODELS = "transformers.modeling_utils"
TUNERS = "peft.tuners.tuners_utils"
ADAPTED_MODELS = "peft.peft_model"

# Methods of PEFT's tuners that begin to change a model. First argument: the model. Last: the adapter's name.
INJECTIONS = ("_pre_injection_hook", "inject_adapter")

# The attribute of an RMSNorm that holds its epsilon.
NORM_EPSILON = "variance_epsilon"

# The entry of a config's __dict__ behind its property _attn_implementation, which takes four Python calls.
_ATTENTION = "_attn_implementation_internal"
# The module whose hooks stay on a model's modules after a call asked for hidden states or attentions.
_CAPTURING = "transformers.utils.output_capturing"
_BLOCK_ARGUMENTS = ("hidden_states", "attention_mask", "position_ids", "use_cache", "position_embeddings")


def cache_name(module: nn.Module | type[nn.Module]) -> str:
    """The name of the argument with which a model, decoder block or attention module takes its cache."""
    kind = module if isinstance(module, type) else type(module)
    return _cache_argument(kind.forward) or _name_in_outputs()


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Keyword arguments that pass ``cache`` to ``model``: ``model(input_ids=ids, **with_cache(model, cache))``."""
    return {cache_name(model): cache}


def cache_of(output: Any) -> Any:
    """The cache in a model's output."""
    return output.cache if hasattr(output, "cache") else output.past_key_values


@functools.cache
def _cache_argument(forward: Callable[..., Any]) -> str | None:
    names = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in names), None)


@functools.cache
def _name_in_outputs() -> str:
    """The name of the cache for modules that pass all arguments on, such as those of PEFT and torch.compile."""
    from transformers.modeling_outputs import CausalLMOutputWithPast

    names = inspect.signature(CausalLMOutputWithPast).parameters
    return next(name for name in CACHE_NAMES if name in names)


def decoder_layer(family: str) -> type[nn.Module]:
    """The class of a model family's decoder blocks, e.g. of ``llama``."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    kind: type[nn.Module] = getattr(module, f"{family.capitalize()}DecoderLayer")
    return kind


def decoder_family(kind: type[nn.Module]) -> str | None:
    """The model family if ``kind`` is the decoder block class of transformers, else ``None``."""
    start, _, family = kind.__module__.rpartition(".modeling_")
    is_block = start == f"transformers.models.{family}" and kind.__name__ == f"{family.capitalize()}DecoderLayer"
    return family if is_block else None


def block_arguments(kind: type[nn.Module]) -> frozenset[str]:
    """The arguments of a decoder block that native code can take; any other changes the result of the block."""
    return frozenset((*_BLOCK_ARGUMENTS, cache_name(kind)))


def why_not_native(kind: type[nn.Module] | None = None) -> str | None:
    """Why decoder blocks of the installed transformers cannot take tokens natively; ``None`` where they can.

    Args:
        kind: transformers' class of the blocks; ``None`` asks for Llama's.
    """
    kind = decoder_layer("llama") if kind is None else kind
    arguments = inspect.signature(kind.forward).parameters
    unknown = [name for name in _BLOCK_ARGUMENTS if name not in arguments]
    if _cache_argument(kind.forward) is None:
        unknown.append(" or ".join(CACHE_NAMES))
    if unknown:
        return _unknown(f"{kind.__name__}.forward has no argument {', '.join(unknown)}")
    try:  # a call that asks for hidden states must get those of every module
        collector = importlib.import_module(_CAPTURING)._active_collector
    except (ImportError, AttributeError):
        return _unknown(f"{_CAPTURING} has no _active_collector")
    return None if hasattr(collector, "get") else _unknown(f"{_CAPTURING}._active_collector cannot be asked")


def _unknown(found: str) -> str:
    return f"transformers {version('transformers')} is not known to this release of mosaic-kernels: {found}"


def attention_setting(config: Any) -> tuple[dict[str, Any], str] | None:
    """The dictionary and the key that hold a config's attention implementation, or ``None`` if not found.

    A caller that remembers the value there notices a change without calling the property.
    """
    settings: dict[str, Any] = object.__getattribute__(config, "__dict__")
    return (settings, _ATTENTION) if settings.get(_ATTENTION) == config._attn_implementation else None


def attention_of(config: Any) -> str | None:
    """The name of the attention implementation that a model or module with this config calls."""
    found: str | None = config._attn_implementation
    return found


def generation_settings(config: Any) -> list[str]:
    """Generation settings in a model's configuration, which transformers loads but refuses to save there."""
    return list(config._get_generation_parameters())


def captures_nothing(hook: Any) -> bool:
    """True for a hook of transformers that records hidden states or attentions while no call has asked for any."""
    if getattr(hook, "__module__", None) != _CAPTURING or hook.__name__ != "output_capturing_hook":
        return False
    collector = getattr(sys.modules.get(_CAPTURING), "_active_collector", None)
    return collector is not None and not collector.get()


def is_silu(activation: nn.Module) -> bool:
    """True if ``activation`` is SiLU."""
    return type(activation).__name__ in ("SiLU", "SiLUActivation")


def sdpa() -> Callable[..., tuple[Tensor, None]]:
    """The function behind transformers' attention implementation ``sdpa``."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found: Callable[..., tuple[Tensor, None]] = sdpa_attention_forward
    return found


def register_attention(name: str, function: Callable[..., tuple[Tensor, None]]) -> None:
    """Make ``function`` an attention implementation of transformers, with the masks of ``sdpa``."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


def register_format(method: str, config: type, quantizer: type) -> None:
    """Let ``from_pretrained`` read checkpoints whose ``quant_method`` is ``method``; calls may repeat."""
    from transformers.quantizers import auto

    if method not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:  # registering twice raises
        auto.register_quantization_config(method)(config)
    if method not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(method)(quantizer)


def take_loading_attributes(config: type) -> None:
    """Let ``from_pretrained(..., quantization_config=config(...))`` use what ``get_loading_attributes`` returns."""
    from transformers.quantizers import auto

    if config not in auto.LOADING_ATTRIBUTES_CONFIG_TYPES:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (config,)


def around_config_saving(around: Callable[[Any, Path], AbstractContextManager[None]]) -> None:
    """Run ``save_pretrained`` of every configuration inside ``around(config, directory)``; calls may repeat.

    ``save_pretrained`` and ``push_to_hub`` of a model call it before they upload.
    """
    from transformers.configuration_utils import PreTrainedConfig  # while transformers is being imported, too

    save = PreTrainedConfig.save_pretrained
    if getattr(save, "_is_mosaic", False):
        return

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **options: Any) -> Any:
        with around(self, Path(save_directory)):
            return save(self, save_directory, *args, **options)

    save_pretrained._is_mosaic = True  # type: ignore[attr-defined]
    PreTrainedConfig.save_pretrained = save_pretrained


def around_config_reading(
    around: Callable[[Any, str], AbstractContextManager[None]], unread: Callable[[str, Exception | None], None]
) -> None:
    """Make every configuration from a ``config.json`` inside ``around(content, source)``; calls may repeat.

    Args:
        around: entered twice: once with nothing inside, as soon as the file is read, and while its class reads it.
        unread: called with the source and the error, if any, where transformers reads nothing or fails.
    """
    from transformers.configuration_utils import PreTrainedConfig  # while transformers is being imported, too

    make, read = PreTrainedConfig.from_dict.__func__, PreTrainedConfig.get_config_dict.__func__
    if getattr(make, "_is_mosaic", False):
        return

    @functools.wraps(make)
    def from_dict(cls: Any, config_dict: Any, **options: Any) -> Any:
        with around(config_dict, str(options.get("name_or_path") or "the checkpoint")):
            return make(cls, config_dict, **options)

    @functools.wraps(read)
    def get_config_dict(cls: Any, source: Any, **options: Any) -> Any:
        try:
            found = read(cls, source, **options)
        except Exception as error:  # a file without a JSON object in it ends in any of them
            unread(str(source), error)
            raise
        if not found[0]:  # a pipe or a folder in the file's place
            unread(str(source), None)
        with around(found[0], str(source)):
            return found

    from_dict._is_mosaic = True  # type: ignore[attr-defined]
    _put(PreTrainedConfig, from_dict, get_config_dict)


def after_from_config(call: Callable[[Any], None]) -> None:
    """Call ``call(model)`` with every model that ``from_config`` makes; calls may repeat."""
    from transformers import PreTrainedModel

    make = PreTrainedModel._from_config.__func__
    if getattr(make, "_is_mosaic", False):
        return

    @functools.wraps(make)
    def _from_config(cls: Any, config: Any, **options: Any) -> Any:
        model = make(cls, config, **options)
        call(model)
        return model

    _from_config._is_mosaic = True  # type: ignore[attr-defined]
    _put(PreTrainedModel, _from_config)


def let_cast(is_ours: Callable[[Any], bool]) -> None:
    """Let ``half`` and ``float`` cast models whose configuration is ours, as ``to(dtype)`` does; calls may repeat.

    transformers refuses both for every quantized model.
    """
    from transformers import PreTrainedModel

    for name in ("half", "float"):
        refuse = getattr(PreTrainedModel, name)
        if not getattr(refuse, "_is_mosaic", False):
            setattr(PreTrainedModel, name, _casting(refuse, getattr(nn.Module, name), is_ours))


def _casting(refuse: Any, cast: Callable[[Any], Any], is_ours: Callable[[Any], bool]) -> Any:
    @functools.wraps(refuse)
    def casting(self: Any, *args: Any) -> Any:
        return cast(self) if is_ours(self.config) else refuse(self, *args)

    casting._is_mosaic = True  # type: ignore[attr-defined]
    return casting


def _put(owner: type, *methods: Callable[..., Any]) -> None:
    """Replace class methods of a class."""
    for method in methods:
        setattr(owner, method.__name__, classmethod(method))


def saved_tensors(model: Any, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors that ``save_pretrained`` of ``model`` writes: tied ones once, offloaded ones read back.

    Args:
        tensors: the ``state_dict`` passed to ``save_pretrained``, if any.
    """
    from transformers import modeling_utils
    from transformers.integrations.accelerate import load_offloaded_parameter

    ignored = model._keys_to_ignore_on_save or ()
    given = (model.state_dict() if tensors is None else tensors).items()
    kept = modeling_utils.remove_tied_weights_from_state_dict({n: t for n, t in given if n not in ignored}, model)
    return {name: load_offloaded_parameter(model, name) if t.is_meta else t for name, t in kept.items()}


def keep_as_loaded(module: nn.Module) -> None:
    """Keep transformers from filling a module that stays on disk with random numbers."""
    module._is_hf_initialized = True  # type: ignore[assignment]


def tied_weights(model: Any) -> Mapping[str, str]:
    """Names of tied tensors, which no file holds, mapped to the tensors whose memory they share."""
    found: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    return found


def has_adapter(model: Any) -> bool:
    """True if transformers' own integration of PEFT has put an adapter on ``model``."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def counting_class() -> type:
    """The class of transformers that gives every model its ``num_parameters``."""
    from transformers import modeling_utils  # works even while transformers is being imported

    kind: type = modeling_utils.ModuleUtilsMixin
    return kind


def adapted_model_class() -> type:
    """PEFT's class of models with adapters."""
    from peft import peft_model

    kind: type = peft_model.PeftModel
    return kind


@functools.cache
def tuner_classes() -> tuple[type, type]:
    """PEFT's base class of tuners, which put adapters on a model, and its base class of layers with an adapter."""
    from peft.tuners import tuners_utils

    return tuners_utils.BaseTuner, tuners_utils.BaseTunerLayer


def adapter_kind(config: Any) -> str:
    """The kind of an adapter, such as ``LORA``."""
    kind = config.peft_type
    return str(getattr(kind, "value", kind)).upper()


def injected_adapter(tuner: Any, *args: Any, **options: Any) -> tuple[Any, str, Any]:
    """The model, the adapter's name and its config, from the arguments of a method in :data:`INJECTIONS`."""
    model = args[0] if args else options["model"]
    given = [each for each in (*args[1:], options.get("adapter_name")) if isinstance(each, str)]
    return model, given[0], tuner.peft_config[given[0]]


def trained_copies(config: Any) -> tuple[str, ...]:
    """Names of modules that PEFT would copy and train beside the adapter."""
    found = getattr(config, "modules_to_save", None) or ()
    return (found,) if isinstance(found, str) else tuple(found)


def target_parameters(config: Any) -> tuple[str, ...]:
    """Names of parameters that PEFT would put an adapter on."""
    found = getattr(config, "target_parameters", None) or ()
    return (found,) if isinstance(found, str) else tuple(found)


def adapted_modules(tuner: Any, model: nn.Module, adapter_name: str) -> set[str] | None:
    """Names of the modules on which PEFT will put an adapter; ``None`` if this release cannot be asked."""
    from peft.tuners import tuners_utils

    complete = getattr(tuners_utils, "_maybe_include_all_linear_layers", None)
    is_target = getattr(tuner, "_check_target_module_exists", None)
    if complete is None or is_target is None or not hasattr(tuner, "_prepare_adapter_config"):
        return None
    config = copy.deepcopy(tuner.peft_config[adapter_name])
    settings = tuner.get_model_config(model) if hasattr(tuner, "get_model_config") else {}
    config = complete(tuner._prepare_adapter_config(config, settings), model)
    return {name for name, _ in model.named_modules() if name and is_target(config, name)}


def lora_linear() -> Any:
    """PEFT's class of a linear layer with a LoRA adapter."""
    from peft.tuners.lora import layer  # works even while PEFT is being imported

    return layer.Linear
