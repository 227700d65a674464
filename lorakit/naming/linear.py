"""Which tensors of a checkpoint are weights of linear layers, by names, shapes and config alone.

Law: on the names of a model of transformers, these are its Linear and Conv1D layers but the output
head, which is what PEFT means by `all-linear`.

Sources: huggingface/peft v0.21.2, `_maybe_include_all_linear_layers`; QLoRA (Dettmers et al. 2023,
arXiv 2305.14314), section 4. Names of embeddings are those of huggingface/transformers v5.23.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from lorakit.naming.embeddings import is_head
from lorakit.tensors import TensorInfo

# Modules that look up rows, by their last segments; a linear layer of such a name has a bias.
TABLES = re.compile(
    r"(^|[._])(embed\w*|embeddings?\w*|wte|wpe|shared|\w*_emb|\w*_embeddings?|tokens?|"
    r"relative_attention_bias|codebook|reference_points|quer(y|ies)_feat\w*)(\.\d+)?$"
)
PATCHES = re.compile(r"patch\w*_embed\w*$")  # of images: linear, whatever they are called
# What sends tokens to the experts beside it; a linear layer of its own in these models alone.
ROUTERS = {"gate", "router"}
LINEAR_ROUTERS = {"llama4", "llama4_text", "phimoe"}
# Heads for classes, by the architectures that have them: PEFT leaves these out as well.
CLASSIFIERS = {"score", "classifier"}
# Linear layers that no adapter or codes act on: the forward around them reads their weight. PEFT
# refuses the second in models of these types (`_check_lora_target_modules_mamba`).
READ = "dt_proj"
FUSED = "out_proj"
MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}


def is_called(module: str, model_type: str) -> bool:
    """Whether a linear layer is called as such, so that it may have an adapter or codes."""
    leaf = module.rpartition(".")[2]
    return leaf != READ and not (leaf == FUSED and model_type in MAMBA)


def linear_layers(infos: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> list[str]:
    """The modules of all linear layers but the output head, in the order of the checkpoint.

    Experts that a checkpoint has one by one are among them, under their names there.
    """
    vocabularies = set(_vocabularies(config))
    blocks = {name.partition(".experts.")[0] for name in infos if ".experts." in name}
    routed = blocks if config.get("model_type") not in LINEAR_ROUTERS else set()
    found = []
    for name, info in infos.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(info.shape) != 2 or is_head(name):
            continue
        parent, _, last = module.rpartition(".")
        if parent in routed and last in ROUTERS:
            continue
        if info.shape[0] in vocabularies and not _inner(module):
            continue
        biased = f"{module}.bias" in infos
        if TABLES.search(module) and not biased and not PATCHES.search(module):
            continue
        found.append(module)
    return _without_classifier(found, config)


def _vocabularies(config: Mapping[str, Any]) -> Iterator[int]:
    """The sizes of all vocabularies that a config tells of."""
    for key, value in config.items():
        if key == "vocab_size" and isinstance(value, int):
            yield value
        elif isinstance(value, Mapping):
            yield from _vocabularies(value)


def _inner(module: str) -> bool:
    """Whether a module is part of a numbered layer, which no head or embedding is."""
    return re.search(r"\.\d+\.", f".{module}.") is not None


def _without_classifier(modules: list[str], config: Mapping[str, Any]) -> list[str]:
    architectures = [str(a) for a in config.get("architectures") or ()]
    if not any(a.endswith("ForSequenceClassification") for a in architectures):
        return modules
    return [m for m in modules if m not in CLASSIFIERS]
