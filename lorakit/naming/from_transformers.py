"""Where on disk the parameters of a model lie, by transformers' own mapping: names and shapes only.

The model is built on the meta device from its config, so this costs the import of transformers and
a second or so, and no weights. It is the second opinion on lorakit.naming.places, and the first on
families that its table does not have.

Source: huggingface/transformers v5.23 `conversion_mapping.py`, `core_model_loading.py`.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

from lorakit.naming.places import Place
from lorakit.tensors import TensorInfo

# What building a class from a config that it was not written for can raise.
UNFIT = (
    *(ArithmeticError, AttributeError, ImportError, LookupError, OSError),
    *(RuntimeError, TypeError, ValueError),
)
Shape = tuple[int, ...]


def meta_model(config: Mapping[str, Any]) -> Any:
    """The model of a config.json, on the meta device; None if it says no known class."""
    import torch
    import transformers

    settings = {k: v for k, v in config.items() if k not in ("model_type", "quantization_config")}
    known = transformers.AutoConfig.for_model(config["model_type"], **settings)
    kind = model_class(config.get("architectures") or (), known)
    if kind is None:
        return None
    with torch.device("meta"):
        return kind(known)


def model_class(architectures: Sequence[str], config: Any) -> Any:
    """The class of a model: the first of these that is known, else the usual one of its config."""
    import transformers

    for architecture in architectures:
        if kind := getattr(transformers, architecture, None):
            return kind
    autos = (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM)
    for auto in (*autos, transformers.AutoModel):
        if kind := auto._model_mapping.get(type(config), None):
            return kind[0] if isinstance(kind, (tuple, list)) else kind
    return None


def places_of(model: Any, infos: Mapping[str, TensorInfo]) -> dict[str, list[Place]]:
    """Parameter name -> places on disk, for a model of transformers v5 on any device."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key

    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    mapping = get_model_conversion_mapping(model)
    renamings = [t for t in mapping if isinstance(t, WeightRenaming)]
    converters = [t for t in mapping if isinstance(t, WeightConverter)]
    converter_of = {pattern: c for c in converters for pattern in c.source_patterns}
    found: dict[str, list[Place]] = {}
    conversions: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(infos, key=dot_natural_key):
        target, pattern = _target(name, (renamings, converters), model.base_model_prefix, shapes)
        if pattern:
            conversions[target][pattern].append(name)
        elif target in shapes:
            found[target] = [Place(name)]
    for target, sources in conversions.items():
        found |= _converted(target, sources, converter_of[next(iter(sources))], (infos, shapes))
    return found


def _target(
    name: str, mapping: tuple[list[Any], list[Any]], base_prefix: str, shapes: Mapping[str, Shape]
) -> tuple[str, str | None]:
    """The (first) parameter that a tensor is loaded into, and the converter's pattern if any."""
    from transformers.core_model_loading import rename_source_key

    # What it looks up are names; that a value is not None is all it asks of them.
    target, pattern = rename_source_key(name, *mapping, base_prefix, dict(shapes))
    if target not in shapes and name in shapes:
        return name, None
    return target, pattern


def _converted(
    target: str,
    sources: Mapping[str, list[str]],
    converter: Any,
    known: tuple[Mapping[str, TensorInfo], Mapping[str, Shape]],
) -> dict[str, list[Place]]:
    """The places of the parameters that one converter makes of some tensors."""
    infos, shapes = known
    targets = [target.replace(converter.target_patterns[0], t) for t in converter.target_patterns]
    names = [sources[p] for p in converter.source_patterns if p in sources]
    match tuple(type(op).__name__ for op in converter.operations):
        case ("MergeModulelist",) | ("MergeModulelist", "Concatenate"):
            return {target: _stacked(names, infos)}
        case ("Concatenate",):
            dim = converter.operations[0].dim
            return {target: _consecutive([n for part in names for n in part], infos, dim)}
        case ("Chunk",) | ("Split",) if converter.operations[0].dim == 0:
            begins = accumulate((shapes[t][0] for t in targets[:-1]), initial=0)
            return {t: [Place(names[0][0], at=b)] for t, b in zip(targets, begins, strict=True)}
        case ("Transpose",):
            return {target: [Place(names[0][0])]}
    return {}


def _stacked(names: Sequence[Sequence[str]], infos: Mapping[str, TensorInfo]) -> list[Place]:
    """Tensors of one expert each, several lists of them if they follow one another by rows."""
    experts = enumerate(zip(*names, strict=True))
    return [replace(p, expert=e) for e, parts in experts for p in _consecutive(parts, infos, 0)]


def _consecutive(names: Sequence[str], infos: Mapping[str, TensorInfo], dim: int) -> list[Place]:
    if len(names) == 1:
        return [Place(names[0])]
    ends = pairwise(accumulate((infos[n].shape[dim] for n in names), initial=0))
    return [Place(n, rows=rows) for n, rows in zip(names, ends, strict=True)]
