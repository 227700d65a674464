"""A model's `config.json`. What lorakit looks at in it is of the kind that it should be, so whoever
asks for one of these facts need not look twice.

A new fact that is relied on: one more name here. `null` counts as absent, and may stand anywhere.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lorakit.configs import NESTED, SIDES, configs
from lorakit.errors import InputError
from lorakit.store.json_file import read_json

LARGEST = 10**9  # of a size
MOST = 10_000  # of layers, or experts in one, each of which transformers makes a module of


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _is_size(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and 0 <= value <= LARGEST


def _are_few(value: Any) -> bool:
    return not isinstance(value, int | float) or 0 <= value <= MOST


def _is_map(value: Any) -> bool:
    return isinstance(value, dict)


# What a fact must be, in words and as a test, and which are.
KINDS: Mapping[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "a string": (_is_text, ("model_type",)),
    "a list of strings": (_are_texts, ("architectures",)),
    "a size": (
        _is_size,
        ("vocab_size", "hidden_size", "d_model", "hidden_size_per_layer_input", "scale_emb"),
    ),
    "a number of layers or experts": (
        _are_few,
        ("num_hidden_layers", "num_local_experts", "num_experts"),
    ),
    "an object": (_is_map, (*NESTED, "quantization_config", "id2label")),
}


def read_model_config(path: Path) -> dict[str, Any]:
    """The config of a model, its facts as `KINDS` has them.

    Raises:
        InputError: it is not there, no JSON object, or a fact is something else.
    """
    config = read_json(path)
    for place, found in configs(config, NESTED + SIDES):
        for what, (fits, names) in KINDS.items():
            for name in names:
                if (value := found.get(name)) is not None and not fits(value):
                    raise InputError(
                        f"has {place}{name} {value!r:.60}, which is not {what}.",
                        hint="Take the file from where the model came from.",
                        file=path,
                    )
    return config
