"""Whether a config of PEFT says what its tensors are: PEFT builds layers by the one and fills them
with the other, and passes over a tensor that it built no layer for.

Law: where nothing is said, PEFT builds a layer of the same rank for every update.

Source: huggingface/peft v0.21.2, src/peft/tuners/tuners_utils.py (check_target_module_exists)
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorakit.adapter.config import AdapterConfig
from lorakit.adapter.delta import Delta
from lorakit.formats.embeddings import is_embedding
from lorakit.formats.peft import PREFIX, parse

FLAGS = {"use_dora": ("magnitude", "DoRA norms"), "lora_bias": ("bias", "biases of B")}
_NUMBER = re.compile(r"\.(\d+)\.")


def disagreements(deltas: Sequence[Delta], config: AdapterConfig) -> Iterator[str]:
    """What a config says otherwise than its tensors, each in a few words; nothing of other types
    than LoRA.

    Raises:
        InputError: a pattern of the config is no regular expression, or a field of another type.
    """
    if config.peft_type != "LORA":
        return
    layers = layers_of(deltas, config)
    if left := [m for m in layers if not _targeted(m, config)]:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        yield f"its config does not target {left[0]!r}{more}"
    yield from wrong_ranks(deltas, config)
    for flag, (role, what) in FLAGS.items():
        there = any(role in d.tensors for d in deltas)
        if there != bool(config.raw.get(flag)):
            yield f"it has {what if there else f'no {what}'}, and its config says otherwise"


def wrong_ranks(deltas: Sequence[Delta], config: AdapterConfig) -> Iterator[str]:
    """The first module whose rank is another than its config says."""
    for module, delta in layers_of(deltas, config).items():
        said = config.rank(module)
        if said is not None and said != delta.rank:
            yield f"the rank of {module!r} is {delta.rank}, and its config says {said}"
            return


def layers_of(deltas: Sequence[Delta], config: AdapterConfig) -> dict[str, Delta]:
    """The adapted modules by the names that patterns are held against, without those of bare
    parameters.
    """
    bare = [p.rpartition(".")[0] for p in config.target_parameters]
    found = {}
    for delta in (d for d in deltas if d.algo == "lora"):
        key = parse(f"{PREFIX}{delta.module}.lora_A.weight")
        module = key.module.rpartition(".")[0] if key.inner else key.module
        if not any(f".{module}".endswith(f".{b}") for b in bare):
            found[module] = delta
    return found


def _targeted(module: str, config: AdapterConfig) -> bool:
    wanted = config.raw.get("target_modules")
    if not wanted or not config.targets(module):
        return False
    if wanted == "all-linear":
        return not is_embedding(module)
    return isinstance(wanted, str) or _in_layers(module, config.raw) or module in wanted


def _in_layers(module: str, raw: Mapping[str, Any]) -> bool:
    """Whether a module is in the layers that a config takes; it takes all where it names none."""
    wanted, patterns = (_listed(raw.get(n)) for n in ("layers_to_transform", "layers_pattern"))
    if not wanted:
        return True
    places = [re.search(rf"(?:^|\.){re.escape(str(p))}\.(\d+)\.", module) for p in patterns]
    found = next((p for p in places if p), None) if patterns else _NUMBER.search(module)
    return found is not None and int(found[1]) in wanted


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
