"""`layer_replication`: the stack of decoder layers rebuilt from ranges of itself, by names alone.

Law: of ranges [[0, 4], [2, 5]] the new layers are copies of layers 0 1 2 3 2 3 4; a layer in no
range is gone, and whatever is outside the stack stays. An adapter trained so names the new layers.

Source: huggingface/peft v0.21.2, replicate_layers in tuners/tuners_utils.py: the stack is `layers`,
`encoder.layer` or `h` of the backbone, whichever it has.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lorakit.configs import configs
from lorakit.errors import InputError

Ranges = Sequence[Sequence[int]]

# The backbone on disk has the name that its task model gives it, or none. BERT's kin call it by
# their own names.
STACK = re.compile(
    r"((?:(?:model|transformer|bert|[a-z0-9_]+(?=\.encoder\.layer\.))\.)*"
    r"(?:layers|encoder\.layer|h))\.(\d+)\.(.+)"
)
COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
# Lists that hold indices of layers; any other list of as many elements has one for each layer.
INDICES = (
    *("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs"),
    *("cross_attention_layers", "rope_scaling_layers"),
)
NOT_BY_LAYER = re.compile(r"architectures|.*(token_ids?|tokens|_names|_section)")
# What makes every so-many-th layer another kind, and the list that says the same layer by layer.
PERIODS = {
    **dict.fromkeys(("sliding_window_pattern", "_sliding_window_pattern"), "layer_types"),
    **dict.fromkeys(("full_attention_interval", "global_attn_every_n_layers"), "layer_types"),
    "attn_layer_period": "layers_block_type",
    "expert_layer_period": "",
    "decoder_sparse_step": "",
    "moe_layer_freq": "",
    "interleave_moe_layer_step": "moe_layers",
    "no_rope_layer_interval": "no_rope_layers",
    "cross_attention_interval": "",
}
# The same, where the config need not say it.
PERIOD_OF = {"gemma2": 2, "gpt_oss": 2, "cohere2": 4, "gemma3_text": 6, "gemma3n_text": 5}


def replicated(names: Iterable[str], ranges: Ranges) -> list[tuple[str, str]]:
    """(new name, name of its source) for every tensor of the rebuilt model.

    In the base's order, with the whole stack, layer by layer, where its first tensor was.

    Raises:
        InputError: the base has no stack, or more than one, or the ranges do not lie within it.
    """
    names = list(names)
    stack, members = _stack(names)
    layers = _flattened(ranges, max(members) + 1)
    missing = sorted(set(layers) - members.keys())
    if missing:
        raise InputError(f"the base has no tensor of {stack}.{missing[0]}, which is replicated")
    rebuilt = [
        (f"{stack}.{new}.{rest}", f"{stack}.{old}.{rest}")
        for new, old in enumerate(layers)
        for rest in members[old]
    ]
    inside = {f"{stack}.{i}.{rest}" for i, rests in members.items() for rest in rests}
    first = next(k for k, name in enumerate(names) if name in inside)
    others = [(name, name) for name in names if name not in inside]
    return [*others[:first], *rebuilt, *others[first:]]


def config_facts(config: Mapping[str, Any], ranges: Ranges) -> dict[str, Any]:
    """The facts of `config.json` that the rebuilt stack changes, under their names.

    The number of layers, lists with an element for each layer and lists of layers.

    Raises:
        InputError: the ranges are not within the stack, or a rule in the config would make another
            kind of layer of a copy.
    """
    place = next((c for _, c in configs(config) if any(n in c for n in COUNTS)), None)
    if place is None:
        raise InputError("the config does not say how many layers the base has")
    count = next(place[n] for n in COUNTS if n in place)
    if type(count) is not int:
        raise InputError(f"the config says that the base has {count!r} layers")
    layers = _flattened(ranges, count)
    _check_periods(place, layers)
    facts: dict[str, Any] = {n: len(layers) for n in COUNTS if n in place}
    for name, value in place.items():
        if name in INDICES and isinstance(value, list):
            facts[name] = [new for new, old in enumerate(layers) if old in value]
        elif isinstance(value, list) and len(value) == count and not NOT_BY_LAYER.fullmatch(name):
            facts[name] = [value[old] for old in layers]
    return facts | _dense_start(place, layers)


def _stack(names: Sequence[str]) -> tuple[str, dict[int, list[str]]]:
    """The one stack of layers, and of each layer what its tensors are called, in their order."""
    found: dict[str, dict[int, list[str]]] = {}
    for name in names:
        if match := STACK.fullmatch(name):
            stack, index, rest = match.groups()
            found.setdefault(stack, {}).setdefault(int(index), []).append(rest)
    if len(found) != 1:
        raise InputError(
            f"layer_replication needs one stack of layers, and the base has {len(found)}"
            + "".join(f", {stack}" for stack in sorted(found))
        )
    return next(iter(found.items()))


def _flattened(ranges: Ranges, count: int) -> list[int]:
    """The source of each new layer."""
    if not ranges:
        raise InputError(f"layer_replication {ranges!r} has no ranges of layers")
    return [i for pair in ranges for i in _range(pair, count)]


def _range(pair: Any, count: int) -> range:
    whole = isinstance(pair, Sequence) and len(pair) == 2 and all(type(i) is int for i in pair)
    if not whole or not 0 <= pair[0] < pair[1] <= count:
        raise InputError(
            f"layer_replication has {pair!r}, which is no range of the base's {count} layers"
        )
    return range(*pair)


def _check_periods(place: Mapping[str, Any], layers: Sequence[int]) -> None:
    for name, period in _periods(place):
        if type(period) is not int or any((new - old) % period for new, old in enumerate(layers)):
            raise InputError(
                f"after layer_replication, {name} {period!r} would make another kind of layer "
                "of a copy, and the config has no list of the kinds that could say otherwise"
            )
    if place.get("num_kv_shared_layers") and list(layers) != list(range(len(layers))):
        raise InputError("layer_replication of layers that share keys and values is not supported")


def _periods(place: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The rules by which layers differ that no list in the config overrides."""
    for name, instead in PERIODS.items():
        value = place.get(name)
        by_layer = isinstance(value, list) or isinstance(place.get(instead), list)
        if value not in (None, 0, 1) and not by_layer:
            yield name, value
    family = place.get("model_type", "")
    if family in PERIOD_OF and not isinstance(place.get("layer_types"), list):
        yield f"the pattern of {family}, every", PERIOD_OF[family]


def _dense_start(place: Mapping[str, Any], layers: Sequence[int]) -> dict[str, int]:
    """How many layers at the start are dense, where a config says that of a mixture of experts."""
    start = place.get("first_k_dense_replace")
    if type(start) is not int:
        return {}
    dense = [old < start for old in layers]
    if dense != sorted(dense, reverse=True):
        raise InputError("after layer_replication, a dense layer would follow one with experts")
    return {"first_k_dense_replace": sum(dense)}
