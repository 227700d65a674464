"""What a config says of quantised weights when some of them, or all, are plain ones now.

Source: huggingface/transformers v5.23, src/transformers/utils/quantization_config.py and
src/transformers/quantizers/quantizers_utils.py (should_convert_module); `_tied_weights_keys` and
`_keep_in_fp32_modules` of its models.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from lorakit.configs import configs, model_type
from lorakit.errors import InputError
from lorakit.folder.facts import fact
from lorakit.naming.embeddings import HEAD_OF
from lorakit.naming.places import Disk
from lorakit.naming.runtime import by_rules, by_transformers
from lorakit.tensors import TensorInfo

CONFIG = "quantization_config"
EXPERTS = ".experts"
# Heads of tied models, which have none on disk; a list replaces the default. Where what is named
# here is on disk, and is no head itself, the head beside it is called so.
HEADS = {
    "": "lm_head",
    "lm_head.": "lm_head.decoder",
    "cls.predictions.": "cls.predictions.decoder",
    "predictions.": "predictions.decoder",
    "pred_layer.": "pred_layer.proj",
    "head.": "decoder",
}
READ = "out_proj.weight"  # of a MultiheadAttention, which takes the weight of that layer
# Modules that are never quantised, whatever the config says (`_keep_in_fp32_modules`).
KEPT = {
    **dict.fromkeys(("t5", "mt5", "umt5", "udop", "pop2piano"), ("wo",)),
    **dict.fromkeys(("deepseek_v32", "glm_moe_dsa", "mistral_large4"), ("indexer.weights_proj",)),
    "blip-2": ("qformer",),
}
# What lists the modules that stay plain, by the method.
LISTS = {
    "bitsandbytes": "llm_int8_skip_modules",
    "fp8": "modules_to_not_convert",
    "mxfp4": "modules_to_not_convert",
    "awq": "modules_to_not_convert",
    "compressed-tensors": "ignore",
}


def unquantised(
    infos: Mapping[str, TensorInfo], taken: Collection[str], config: Mapping[str, Any]
) -> list[str]:
    """The modules with a matrix that is not among the `taken`, and the heads that lie elsewhere."""
    left = [
        name.removesuffix(".weight")
        for name, info in infos.items()
        if name.endswith(".weight") and len(info.shape) == 2 and name not in taken
    ]
    own = HEAD_OF.get(model_type(config), "").removesuffix(".weight")
    fronts = [f for f in HEADS if f"{f}weight" not in infos]
    there = [HEADS[f] for f in fronts if any(n.startswith(f) for n in infos)]
    heads = [h for h in (own, *there) if h and not any(n.startswith(f"{h}.") for n in taken)]
    return list(dict.fromkeys([*left, *heads]))


def left_alone(
    infos: Mapping[str, TensorInfo], weights: Collection[str], config: Mapping[str, Any]
) -> set[str]:
    """Those of the weights that transformers does not quantise: never in such a model, or never in
    a MultiheadAttention, or for the name of a module that is not among them, which is looked for at
    either end of theirs.
    """
    kinds = [model_type(part) for _, part in configs(config)]
    never = [name for kind in kinds for name in KEPT.get(kind, ())]
    found = {w for w in weights if w.removesuffix(READ) + "in_proj_weight" in infos}
    while True:
        names = (*never, *unquantised(infos, set(weights) - found, config))
        fronts = tuple(f"{name}." for name in names)
        more = {
            w
            for w in set(weights) - found
            if w.startswith(fronts) or w.removesuffix(".weight").endswith(names)
        }
        if not more:
            return found
        found |= more


def plain_facts(
    config: Mapping[str, Any],
    infos: Mapping[str, TensorInfo],
    weights: Collection[str],
    plain: Collection[str],
) -> dict[str, Any]:
    """The facts of a config after `plain` of the quantised `weights` are that no more.

    `infos` are the tensors, all weights seen as plain ones.

    Raises:
        InputError: some stay quantised, by a method of which it is not known how it is told so.
    """
    said = fact(config, CONFIG, default=None) or {}
    if len(plain) == len(weights):
        return {CONFIG: None}
    method = str(said.get("quant_method", "a model without a config"))
    if method not in LISTS:
        raise InputError(
            f"how {method} is told of weights that are not quantised is not known.",
            hint="Merge with --quant dequantize.",
        )
    listed = said.get(LISTS[method])
    if listed is None:
        listed = unquantised(infos, weights, config)
    names = [*listed, *_modules(config, infos, plain)]
    return {CONFIG: {**said, LISTS[method]: list(dict.fromkeys(names))}}


def with_new(
    config: Mapping[str, Any], changed: Mapping[str, Any], new: Iterable[str]
) -> dict[str, Any]:
    """The facts of a config that is `changed` so, once it lists the modules of `new` weights, which
    are plain: nothing where it has no list, with which a reader leaves heads alone.
    """
    said = changed.get(CONFIG, fact(config, CONFIG)) or {}
    name = LISTS.get(str(said.get("quant_method")), "")
    if not isinstance(listed := said.get(name), list):
        return {}
    names = [*listed, *map(quantised_module, new)]
    return {CONFIG: {**said, name: list(dict.fromkeys(names))}} if names != listed else {}


def _modules(
    config: Mapping[str, Any], infos: Mapping[str, TensorInfo], weights: Collection[str]
) -> Iterator[str]:
    """The modules of weights, as they are called on disk and in the model."""
    disk = Disk(infos, model_type(config))
    runtime = by_rules(disk) or by_transformers(config, disk)
    for name in weights:
        yield quantised_module(name)
        with suppress(InputError):  # one that has no name of its own in the model
            yield from map(quantised_module, runtime.of(name) if runtime else ())


def quantised_module(weight: str) -> str:
    """The module that is quantised or is not: of experts, all of a layer."""
    front, mark, _ = weight.partition(EXPERTS)
    return front + mark if mark else weight.removesuffix(".weight")
