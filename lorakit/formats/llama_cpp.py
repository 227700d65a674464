"""llama.cpp's names of the linear layers of a decoder; the language models whose LoRA it takes with
other names alone, and in which of them queries and keys are in another order of rows.

Source: ggml-org/llama.cpp, gguf-py/gguf/tensor_mapping.py, convert_hf_to_gguf.py and
convert_lora_to_gguf.py (LlamaModel, undo_permute); which of them share embedding and head by
default, huggingface/transformers v5.23.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_ATTENTION = tuple(f"self_attn.{x}_proj" for x in "qkvo")
GATED = (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PLAIN = (*_ATTENTION, "mlp.c_fc", "mlp.c_proj")
ROUTED = (*_ATTENTION, "mlp.gate")
SHARED = tuple(f"mlp.shared_expert.{x}_proj" for x in ("gate", "up", "down"))
EXPERTS = tuple(f"mlp.experts.{x}_proj" for x in ("gate", "up", "down"))
MIXTRAL = tuple(f"block_sparse_moe.experts.w{n}" for n in (1, 2, 3))
UNGATED = (*_ATTENTION, "mlp.up_proj", "mlp.down_proj")
PHI = (*_ATTENTION[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2")
FUSED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls it; `permuted`: rows of queries and keys in Meta's rotary order; `tied`:
    whether the head is the embedding where a config does not say; `front`: what the checkpoint has
    before the names of its layers, where others have `model.`.
    """

    name: str
    permuted: bool = False
    leaves: tuple[str, ...] = GATED  # its linear layers, within a layer
    tied: bool = False
    front: str = "model."
    experts: tuple[str, ...] = ()  # what is a stack of all experts of a layer


# A new model type: a row here.
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True),
    "granite": Architecture("granite", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", tied=True),
    "gemma2": Architecture("gemma2", tied=True),
    "gemma3_text": Architecture("gemma3", tied=True),
    "smollm3": Architecture("smollm3", permuted=True, tied=True),
    "seed_oss": Architecture("seed_oss"),
    "olmo": Architecture("olmo", permuted=True),
    "olmo2": Architecture("olmo2"),
    "phi3": Architecture("phi3", leaves=FUSED),
    "phi": Architecture("phi2", leaves=PHI),
    "nemotron": Architecture("nemotron", leaves=UNGATED),
    "starcoder2": Architecture("starcoder2", leaves=PLAIN, tied=True),
    "stablelm": Architecture("stablelm"),
    "cohere": Architecture("command-r", tied=True),
    "cohere2": Architecture("cohere2", tied=True),
    # Of those that see, what reads and writes.
    "gemma3": Architecture("gemma3", tied=True, front="language_model.model."),
    "qwen2_vl": Architecture("qwen2vl"),
    "qwen2_5_vl": Architecture("qwen2vl"),
    "qwen3_vl": Architecture("qwen3vl", front="model.language_model."),
    "mixtral": Architecture(
        "llama", permuted=True, leaves=(*_ATTENTION, "block_sparse_moe.gate"), experts=MIXTRAL
    ),
    "qwen2_moe": Architecture("qwen2moe", leaves=(*ROUTED, *SHARED), experts=EXPERTS),
    "qwen3_moe": Architecture("qwen3moe", leaves=ROUTED, experts=EXPERTS),
    "olmoe": Architecture("olmoe", leaves=ROUTED, experts=EXPERTS),
}
# Beside the layers: module -> whether it is an embedding.
BESIDE = {"model.embed_tokens": True, "lm_head": False}
# The end of a module's name -> what its heads are counted by.
HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}

# What it calls a linear layer -> the ends of its names in checkpoints, within a layer.
LAYERS = {
    "attn_q": "self_attn.q_proj attn.q_proj attention.wq attn.attention.q_proj",
    "attn_k": "self_attn.k_proj attn.k_proj attention.wk attn.attention.k_proj",
    "attn_v": "self_attn.v_proj attn.v_proj attention.wv attn.attention.v_proj",
    "attn_qkv": (
        "self_attn.qkv_proj attn.c_attn self_attention.query_key_value attention.query_key_value "
        "attn.Wqkv transformer.attention.wqkv"
    ),
    "attn_output": (
        "self_attn.o_proj self_attn.out_proj self_attn.dense attn.c_proj self_attention.dense "
        "attention.dense attention.wo attn.out_proj attn.attention.out_proj"
    ),
    "ffn_gate": "mlp.gate_proj feed_forward.w1 mlp.w2",
    "ffn_up": (
        "mlp.up_proj feed_forward.w3 mlp.gate_up_proj mlp.c_fc mlp.fc1 mlp.dense_h_to_4h mlp.w1 fc1"
    ),
    "ffn_down": "mlp.down_proj feed_forward.w2 mlp.c_proj mlp.fc2 mlp.dense_4h_to_h fc2",
}
_ROLES = {end: role for role, ends in LAYERS.items() for end in ends.split()}
# Where models that see have their language model, in transformers 4 and 5 and on disk.
_SEEING = re.compile(
    r"^(?:model\.)?language_model\.(?:model\.)?(?=layers\.|embed_tokens$|lm_head$)"
)
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)$")


def language_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a language model, where it is that of one that sees as well."""
    text = config.get("text_config") or {}
    return {**config, **text, "model_type": config.get("model_type")}


def plain(module: str) -> str:
    """A module as a model of language alone calls it."""
    found = _SEEING.sub("model.", module)
    return "lm_head" if found == "model.lm_head" else found


def in_checkpoint(module: str, architecture: Architecture) -> str:
    """The name on disk of a module that a model of language alone calls so."""
    if not module.startswith("model."):
        return module
    return architecture.front + module.removeprefix("model.")


def tied(config: Mapping[str, object], architecture: Architecture) -> bool:
    """Whether a model has no head of its own."""
    found = config.get("tie_word_embeddings")
    return architecture.tied if found is None else bool(found)


def heads_of(module: str, config: Mapping[str, object], architecture: Architecture) -> int:
    """The number of heads whose rows are in another order, 0 where none are."""
    field = HEADS.get(module.rpartition(".")[2])
    if not architecture.permuted or field is None:
        return 0
    count = config.get(field) or config.get("num_attention_heads")
    return count if isinstance(count, int) else 0


def llama_cpp_name(module: str) -> str:
    """The name without `.weight`, as `blk.3.attn_q`; "" for what is no such layer."""
    found = _LAYER.search(module)
    role = _ROLES.get(found[2]) if found else None
    return f"blk.{found[1]}.{role}" if found and role else ""
