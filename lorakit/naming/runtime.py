"""What the tensors of a base are called in the model of transformers v5, and which of its weights
are layers.

By transformers itself where v5 of it is installed and knows the model; else by the rules below, for
the model types that they name. What a rule says is held against `lorakit.naming.places`, which has
to find the same tensor on disk from the name that the rule made.

Law: a parameter's places are all of it, and every tensor on disk is in the places of the parameters
that it becomes.

Source: huggingface/transformers v5.23 `conversion_mapping.py`
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lorakit.errors import InputError
from lorakit.naming.canonical import canonical
from lorakit.naming.from_transformers import UNFIT, meta_model, places_of
from lorakit.naming.places import Disk, Place, places

Rules = tuple[tuple[str, str], ...]
Shape = tuple[int, ...]

# Model types whose tensors on disk have the names of the model, but for experts one by one.
SAME = (
    "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text phi phi3 gpt2 opt falcon olmo "
    "olmo2 cohere cohere2 starcoder2 stablelm granite smollm3 gpt_oss llama4_text qwen2_moe "
    "qwen3_moe qwen3_next olmoe flex_olmo deepseek_v2 deepseek_v3 dots1 glm4_moe jamba lfm2_moe"
)
_STACKS: Rules = (
    (r"\.experts\.\d+\.(?:gate_proj|up_proj|w1|w3)\.weight$", ".experts.gate_up_proj"),
    (r"\.experts\.\d+\.(?:down_proj|w2)\.weight$", ".experts.down_proj"),
)
_UNGATED: Rules = ((r"\.experts\.\d+\.(up_proj|down_proj)\.weight$", r".experts.\1"),)
_SPARSE: Rules = ((r"\.block_sparse_moe\.", ".mlp."), *_STACKS)
_GRANITE: Rules = (
    (r"\.input_linear\.weight$", ".experts.gate_up_proj"),
    (r"\.output_linear\.weight$", ".experts.down_proj"),
    (r"\.router\.layer\.weight$", ".router.weight"),
)
_LLAVA: Rules = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(?=vision_tower\.|multi_modal_projector\.)", "model."),
    (r"^model\.vision_tower\.vision_model\.", "model.vision_tower."),
)
_QWEN_VL: Rules = (
    (r"^model\.(?=layers\.|embed_tokens\.|norm\.)", "model.language_model."),
    (r"^visual\.", "model.visual."),
)
RULES: Mapping[str, Rules] = {
    SAME: _STACKS,
    "gpt_neox": ((r"^embed_out\.", "lm_head."),),
    "nemotron_h": ((r"^backbone\.", "model."), *_UNGATED),
    "mixtral minimax": _SPARSE,
    "phimoe": ((r"\.block_sparse_moe\.gate\.", ".mlp.router."), *_SPARSE),
    "granitemoe granitemoeshared": _GRANITE,
    "gemma3 llava paligemma mistral3 internvl vipllava aya_vision": _LLAVA,
    "qwen2_vl qwen2_5_vl": _QWEN_VL,
}
# Routers beside experts are no layers in transformers v5.
_ROUTER = re.compile(r".*\.(?:gate|router)\.weight")
LAYERS = {"Linear", "Conv1D", "Embedding", "Conv1d", "Conv2d", "Conv3d", "MultiheadAttention"}


@dataclass(frozen=True)
class Runtime:
    """The parameters of a model: where each lies on disk, its shape where that is known, and the
    modules that are layers, which have adapters as such.
    """

    places: Mapping[str, Sequence[Place]]
    shapes: Mapping[str, Shape]
    others: frozenset[str]  # parameters of modules that are no layers
    by: str  # what said so
    model_type: str = ""

    @cached_property
    def _of_tensor(self) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for name, there in self.places.items():
            for tensor in dict.fromkeys(p.tensor for p in there):
                found[tensor].append(name)
        return found

    @cached_property
    def _of_spelling(self) -> Mapping[str, str]:
        return {canonical(n, self.model_type): n for n in (*self.places, *self.shapes)}

    @cached_property
    def stacks(self) -> bool:
        """Whether it has experts in one tensor that are one by one on disk."""
        return any(p.expert is not None for there in self.places.values() for p in there)

    def of(self, tensor: str) -> list[str]:
        """The parameters that a tensor on disk becomes; of a head that shares the embedding's
        tensor and is not on disk, its own name.

        Raises:
            InputError: none, or in a way that lorakit does not know.
        """
        if found := self._of_tensor.get(tensor):
            return found
        spelled = self._of_spelling.get(canonical(tensor, self.model_type))
        if spelled and spelled not in self.places:
            return [spelled]
        raise InputError(
            f"{tensor!r} has no name of its own in the model, by {self.by}.",
            hint="Keep the names of the disk: --names disk.",
            tensor=tensor,
        )


def runtime_of(config: Mapping[str, Any], disk: Disk) -> Runtime:
    """The parameters of the model that these tensors are of.

    Raises:
        InputError: transformers v5 is not installed, or does not know it, and neither do the rules.
    """
    found = by_transformers(config, disk) or by_rules(disk)
    if found is None:
        raise InputError(
            f"what transformers v5 calls the weights of {disk.model_type or 'this model'!r} is "
            "known to transformers alone.",
            hint="Install transformers 5 beside lorakit, or write --names disk.",
        )
    return found


def by_transformers(config: Mapping[str, Any], disk: Disk) -> Runtime | None:
    """What the installed transformers says; None without v5 of it, or for a model it has not."""
    if not config.get("model_type"):
        return None
    from huggingface_hub.errors import StrictDataclassError

    try:
        import transformers

        if int(transformers.__version__.partition(".")[0]) < 5:
            return None
        model = meta_model(config)
        found = places_of(model, disk.infos) if model is not None else {}
    except (*UNFIT, StrictDataclassError):
        return None
    if not found:
        return None
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    modules = dict(model.named_modules())
    others = {n for n in shapes if not _is_layer(modules, n)}
    by = f"transformers {transformers.__version__}"
    return Runtime(found, shapes, frozenset(others), by, disk.model_type)


def _is_layer(modules: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT's layer for a module does what the module does: not where a router is a linear
    layer with a forward of its own.
    """
    module, _, parameter = name.rpartition(".")
    kind: Any = type(modules.get(module))
    known = next((k for k in kind.__mro__ if k.__name__ in LAYERS), None)
    if known is None or parameter not in ("weight", "in_proj_weight"):
        return False
    return known.__name__ != "Linear" or kind.forward is known.forward


def called(tensor: str, model_type: str) -> str:
    """What a tensor is called in the model, as far as the rules say."""
    return _renamed(tensor, _rules_of(model_type) or ())


def _rules_of(model_type: str) -> Rules | None:
    return next((rules for types, rules in RULES.items() if model_type in types.split()), None)


def _renamed(tensor: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        tensor = re.sub(pattern, replacement, tensor)
    return tensor


def by_rules(disk: Disk) -> Runtime | None:
    """What the rules say; None for a model type that they do not name."""
    if (rules := _rules_of(disk.model_type)) is None:
        return None
    found: dict[str, Sequence[Place]] = {}
    for tensor in disk.infos:
        name = _renamed(tensor, rules)
        if name not in found:
            module, _, parameter = name.rpartition(".")
            there = places(module, parameter, disk, disk.infos[tensor].rows)
            if tensor in {p.tensor for p in there}:
                found[name] = there
    experts = {n.partition(".experts.")[0] for n in found if ".experts." in n}
    others = {n for n in found if not _weighs(n) or _routes(n, experts)}
    return Runtime(found, {}, frozenset(others), "lorakit's own table", disk.model_type)


def _weighs(name: str) -> bool:
    return name.rpartition(".")[2] in ("weight", "in_proj_weight")


def _routes(name: str, experts: set[str]) -> bool:
    return bool(_ROUTER.fullmatch(name)) and name.rsplit(".", 2)[0] in experts
