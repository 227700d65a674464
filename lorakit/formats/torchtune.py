"""What torchtune calls the linear layers of a decoder, and in which models its queries and keys are
in another order of rows.

Source: pytorch/torchtune, torchtune/models/convert_weights.py and the _convert_weights.py of each
model beside it.
"""

import re
from collections.abc import Collection

from lorakit.formats.llama_cpp import Architecture

# A layer in torchtune -> its place in a checkpoint of Hugging Face.
LAYERS = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
HEAD = {"output": "lm_head"}
ROLES = {
    "lora_a.weight": "a",
    "lora_b.weight": "b",
    "magnitude": "magnitude",
    "magnitude.weight": "magnitude",
}
_ANY = "|".join(map(re.escape, LAYERS))
_NAME = re.compile(rf"(?:layers\.(\d+)\.({_ANY})|(output))\.({'|'.join(map(re.escape, ROLES))})")
# A new model type: a row here. Those of Gemma are in Meta's order there, though not in llama.cpp.
ARCHITECTURES = {
    kind: Architecture(kind, permuted=kind not in ("qwen2", "qwen3"))
    for kind in ("llama", "mistral", "gemma", "gemma2", "qwen2", "qwen3")
}


def place_of(name: str) -> tuple[str, str] | None:
    """The module in the names of Hugging Face and the role of a tensor; None for any other."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    number, layer, head, ending = found.groups()
    module = HEAD[head] if head else f"model.layers.{number}.{LAYERS[layer]}"
    return module, ROLES[ending]


def is_torchtune(names: Collection[str]) -> bool:
    """Whether a file of tensors with these names is an adapter of torchtune."""
    return any(".lora_a." in name and place_of(name) for name in names)
