"""What llama.cpp calls the modules of a model, and which of their rows it has in another order, by
the config of the base.

Source: ggml-org/llama.cpp, gguf-py/gguf/tensor_mapping.py
"""

from collections.abc import Mapping
from typing import Any

from lorakit.configs import model_type
from lorakit.errors import InputError, MisfitError
from lorakit.formats.llama_cpp import (
    ARCHITECTURES,
    BESIDE,
    HEADS,
    Architecture,
    heads_of,
    language_in,
    tied,
)
from lorakit.store.gguf import package

Config = Mapping[str, Any]
LAYERS = 10_000  # more than any model has


def architecture_of(config: Config) -> Architecture:
    """What llama.cpp has of a model.

    Raises:
        InputError: lorakit does not know that.
    """
    kind = model_type(config)
    if kind not in ARCHITECTURES:
        raise InputError(
            f"adapters of {kind or 'a model without config.json'} are not converted to GGUF.",
            hint=f"Known are {', '.join(ARCHITECTURES)}. Name the folder of the base with --base.",
        )
    return ARCHITECTURES[kind]


def names_of(config: Config) -> dict[str, str]:
    """llama.cpp's name of every linear layer of a model, and of its embedding and its head where
    these are two, by that in models of language alone; all without `.weight`.

    Raises:
        InputError: the config does not say how many layers there are, or knows no such model.
    """
    gguf, config = package(), language_in(config)
    wanted = architecture_of(config)
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted.name)
    layers = config.get("num_hidden_layers")
    if type(layers) is not int or not 0 < layers <= LAYERS:
        raise InputError(
            f"the config of the base has num_hidden_layers {layers!r}.",
            hint="Take config.json from where the base came from.",
        )
    known = gguf.get_tensor_name_map(arch, layers)
    found: dict[str, str] = {}
    for layer in range(layers):
        for leaf in (*wanted.leaves, *wanted.experts):
            module = f"model.layers.{layer}.{leaf}"
            if name := known.get_name(module):
                found[module] = name
    beside = {module: known.get_name(module) for module in BESIDE}
    apart = all(beside.values()) and not tied(config, wanted)
    return found | (beside if apart else {})


def heads_in(module: str, rows: int, config: Config) -> int:
    """The heads whose rows llama.cpp has in another order, 0 where it has not.

    Raises:
        MisfitError: the config of the base does not say how many there are, or other than that.
    """
    known, config = architecture_of(config), language_in(config)
    heads = heads_of(module, config, known)
    asked = known.permuted and module.rpartition(".")[2] in HEADS
    if asked and (heads < 1 or rows % (2 * heads)):
        raise MisfitError(
            f"{module!r} has {rows} rows, and the config of the base says {heads or 'no'} heads.",
            hint="Give --base the folder of the base that the adapter is for.",
            tensor=module,
        )
    return heads
