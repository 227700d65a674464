"""Language models whose LoRA llama.cpp takes with other names alone, and in which of them queries
and keys are in another order of rows.

Source: ggml-org/llama.cpp, convert_hf_to_gguf.py and convert_lora_to_gguf.py (LlamaModel,
undo_permute).
"""

from collections.abc import Mapping
from dataclasses import dataclass

_ATTENTION = tuple(f"self_attn.{x}_proj" for x in "qkvo")
GATED = (*_ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PLAIN = (*_ATTENTION, "mlp.c_fc", "mlp.c_proj")
FUSED = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls it; `permuted`: rows of queries and keys in Meta's rotary order."""

    name: str
    permuted: bool = False
    leaves: tuple[str, ...] = GATED  # its linear layers, within a layer


# A new model type: a row here.
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", permuted=True),
    "mistral": Architecture("llama", permuted=True),
    "granite": Architecture("granite", permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2"),
    "gemma3_text": Architecture("gemma3"),
    "olmo2": Architecture("olmo2"),
    "phi3": Architecture("phi3", leaves=FUSED),
    "starcoder2": Architecture("starcoder2", leaves=PLAIN),
}
# The end of a module's name -> what its heads are counted by.
HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def heads_of(module: str, config: Mapping[str, object], architecture: Architecture) -> int:
    """The number of heads whose rows are in another order, 0 where none are."""
    field = HEADS.get(module.rpartition(".")[2])
    if not architecture.permuted or field is None:
        return 0
    count = config.get(field, config.get("num_attention_heads"))
    return count if isinstance(count, int) else 0
