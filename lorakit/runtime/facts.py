"""What a live model and its config say of the weights, changed with these and back."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from lorakit.naming.embeddings import is_classifier
from lorakit.runtime.fitting import config_of, parameters_in
from lorakit.runtime.quantised import is_quantised
from lorakit.tensors import TensorInfo
from lorakit.verbs.base.tying import tie_of

# What transformers remembers of a quantisation on the model itself.
QUANTISED = (
    "hf_quantizer",
    "quantization_method",
    "is_quantized",
    "is_loaded_in_4bit",
    "is_loaded_in_8bit",
)
Undo = Callable[[], Any]  # plain functions and data, so that copies of a model have their own


def untied(model: nn.Module) -> list[Undo]:
    """Let the config say that embeddings are not shared; the way back."""
    config = getattr(model, "config", None)
    told = getattr(config, "tie_word_embeddings", None)
    return _changed([(config, "tie_word_embeddings")], False) if told else []


def resized(
    model: nn.Module, place: str, layers: Sequence[nn.Module], before: int, rows: int
) -> list[Undo]:
    """Let the model and its layers say that the parameter at `place` has so many rows, not
    `before`; the way back.
    """
    config: Any = getattr(model, "config", None)
    if is_classifier(place):
        return _relabelled(model, config, before, rows) + _sized(layers, before, rows)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    told = [(owner, "vocab_size") for owner in (config, text, *model.modules())]
    return _changed(_telling(told, before), rows) + _sized(layers, before, rows)


def _sized(layers: Sequence[nn.Module], before: int, rows: int) -> list[Undo]:
    names = ("num_embeddings", "out_features")
    return _changed(_telling([(one, n) for one in layers for n in names], before), rows)


def _relabelled(model: nn.Module, config: Any, before: int, rows: int) -> list[Undo]:
    """Let the model say that it tells so many labels apart."""
    undo = _changed(_telling([(m, "num_labels") for m in model.modules()], before), rows)
    if len(getattr(config, "id2label", None) or ()) == before:
        names = {i: f"LABEL_{i}" for i in range(rows)}
        undo += _changed([(config, "id2label")], names)
        undo += _changed([(config, "label2id")], {v: i for i, v in names.items()})
    return undo


def _telling(told: Sequence[tuple[Any, str]], value: object) -> list[tuple[Any, str]]:
    """Those whose own attribute has a value."""
    return [(owner, name) for owner, name in told if _own(owner).get(name) == value]


def inseparable(model: nn.Module, parted: Sequence[str]) -> str:
    """The first of some parameters that are no longer shared if that is an embedding which the kind
    of model shares whatever its config says; "" if none is.
    """
    own: dict[int, tuple[str, Any]] = {}
    for name, parameter in parameters_in(model).items():
        own.setdefault(id(parameter), (name, parameter))
    infos = {n: TensorInfo(n, "F32", tuple(p.shape)) for n, p in own.values()}
    tie = tie_of(infos, config_of(model), parted)
    return parted[0] if parted and tie.embedding and not tie.separable else ""


def tell_quantised(model: nn.Module) -> None:
    """Let the model say which of its layers bitsandbytes is to leave as they are; where it has none
    that is quantised, nothing of that.
    """
    config: Any = getattr(model, "config", None)
    told = getattr(config, "quantization_config", None)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    plain = [n for n, m in layers.items() if not is_quantised(m)]
    if told is None:
        return
    if len(plain) < len(layers):
        if isinstance(told, dict):
            told["llm_int8_skip_modules"] = plain
        else:
            told.llm_int8_skip_modules = plain
        return
    del config.quantization_config
    for name in QUANTISED:
        model.__dict__.pop(name, None)


def _own(owner: Any) -> dict[str, Any]:
    return getattr(owner, "__dict__", {})


def _changed(told: Sequence[tuple[Any, str]], value: object) -> list[Undo]:
    undo: list[Undo] = [partial(setattr, owner, n, getattr(owner, n)) for owner, n in told]
    for owner, name in told:
        setattr(owner, name, value)
    return undo
