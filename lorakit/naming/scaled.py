"""Embeddings that multiply their own output, and by how much, told from the config alone.

Law: for every embedding module of a model, `embed_scale` is the factor between its output and the
rows of its weight. A factor that the model applies after the module is not the embedding's:
whatever an adapter adds to the output of the module is then scaled with it.

PEFT's path of an embedding beside such a module is scaled as well since PEFT 0.18.0. Up to 0.17 it
was not, so that an adapter trained there means `delta / embed_scale`.

Sources: huggingface/transformers v5.23 (v4.57 for FAMILIES_OF_V4), `*ScaledWordEmbedding` in
models/*/modeling_*.py; huggingface/peft v0.17.1 and v0.18.0, Embedding in tuners/lora/layer.py.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lorakit.configs import NESTED, SIDES
from lorakit.errors import InputError

Config = Mapping[str, Any]

WORDS = ("embed_tokens", "shared")
PER_LAYER = "embed_tokens_per_layer"


def embed_scale(config: Config, module: str) -> float:
    """The factor of the embedding `module`; 1.0 for one that does not scale, and for no embedding.

    Raises:
        InputError: the config does not say what the factor depends on.
    """
    leaf = module.rpartition(".")[2]
    for family, part in _parts(config, module, ""):
        if family in FAMILIES:
            return FAMILIES[family](part, leaf, module)
    return 1.0


def scale_left_out(config: Config, module: str, peft_version: str | None) -> float:
    """The factor by which this PEFT took the path of an adapter beside `module` too small.

    A version is written since 0.18.0; without one, PEFT was older. An adapter's effective delta is
    its delta over this. PEFT up to 0.17 does not run with transformers 5, so only what scaled in
    transformers 4 counts: Gemma 1 and 2, for one, scaled after the module then.
    """
    if not before_0_18(peft_version or ""):
        return 1.0
    families = {family for family, _ in _parts(config, module, "")}
    return embed_scale(config, module) if families & FAMILIES_OF_V4 else 1.0


def before_0_18(version: str) -> bool:
    """Whether a release of PEFT, "" where none is named, left out the scales of embeddings."""
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    return not version or (major == "0" and minor.isdigit() and int(minor) < 18)


def _parts(config: Config, module: str, inherited: str) -> Iterator[tuple[str, Config]]:
    """The configs that may describe `module` with their families, the innermost first."""
    family = config.get("model_type") or inherited
    segments = module.split(".")
    for key in (*(s for s in segments if s in SIDES), *NESTED):
        if isinstance(config.get(key), Mapping):
            yield from _parts(config[key], module, family)
    yield family, config


def _root(config: Config, *names: str) -> float:
    """The square root of the first of these sizes that the config has."""
    return math.sqrt(_fact(config, *names))


def _fact(config: Config, *names: str) -> Any:
    for name in names:
        if config.get(name) is not None:
            return config[name]
    raise InputError(
        f"the config of this {config.get('model_type', 'model')} does not say {names[0]}, "
        "on which the scale of its embedding depends"
    )


def _gemma(config: Config, leaf: str, module: str) -> float:
    if leaf == PER_LAYER:
        return _root(config, "hidden_size_per_layer_input")
    return _root(config, "hidden_size") if leaf in WORDS else 1.0


def _minicpm(config: Config, leaf: str, module: str) -> float:
    return float(config.get("scale_emb", 12)) if leaf in WORDS else 1.0


def _bart(config: Config, leaf: str, module: str) -> float:
    if leaf not in WORDS or not config.get("scale_embedding", False):
        return 1.0
    return _root(config, "d_model", "hidden_size")


def _m2m(config: Config, leaf: str, module: str) -> float:
    return _bart({"scale_embedding": True, **config}, leaf, module)


def _seamless(config: Config, leaf: str, module: str) -> float:
    return 1.0 if leaf == "shared" else _m2m(config, leaf, module)


def _seamless_v2(config: Config, leaf: str, module: str) -> float:
    return 1.0 if "t2u_model" in module.split(".") else _seamless(config, leaf, module)


# `scale_embedding` is off, or on, where a config of these does not say.
_OFF = ("bart", "blenderbot", "mbart", "trocr")
_ON = ("bigbird_pegasus", "biogpt", "m2m_100", "nllb-moe", "pegasus_x", "plbart", "xglm")
_GEMMA_OF_V4 = ("gemma3", "gemma3_text", "gemma3n", "gemma3n_text")
_GEMMA = (
    *("gemma", "gemma2", "vaultgemma", "diffusion_gemma", "diffusion_gemma_text"),
    *("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text"),
    *("embedding_gemma2", "embedding_gemma2_text"),
    *("t5gemma2", "t5gemma2_text", "t5gemma2_encoder", "t5gemma2_decoder"),
)
FAMILIES: Mapping[str, Callable[[Config, str, str], float]] = {
    **dict.fromkeys(_OFF, _bart),
    **dict.fromkeys(_ON, _m2m),
    **dict.fromkeys((*_GEMMA_OF_V4, *_GEMMA), _gemma),
    **dict.fromkeys(("pp_formulanet", "pp_formulanet_text"), _m2m),
    "minicpm3": _minicpm,
    "seamless_m4t": _seamless,
    "seamless_m4t_v2": _seamless_v2,
}
FAMILIES_OF_V4 = {*_OFF, *_ON, *_GEMMA_OF_V4, "seamless_m4t", "seamless_m4t_v2"}
