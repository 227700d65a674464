"""What llama.cpp calls the linear layers of a decoder, by their names in Hugging Face checkpoints.

Source: ggml-org/llama.cpp, gguf-py/gguf/tensor_mapping.py.
"""

import re

# The end of a module's name within its layer -> llama.cpp's.
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
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)$")


def llama_cpp_name(module: str) -> str:
    """The name without `.weight`, as `blk.3.attn_q`; "" for what is no such layer."""
    found = _LAYER.search(module)
    role = _ROLES.get(found[2]) if found else None
    return f"blk.{found[1]}.{role}" if found and role else ""
