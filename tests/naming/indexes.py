"""The tensor names of three real checkpoints, by rule: a dense, a sparse and a multimodal one.

Checked once, by hand, against the indexes of Llama-3.1-70B, Mixtral-8x22B and Qwen2-VL-7B: the
same sets of names. The shapes are those of their configs.
"""

from collections.abc import Iterator

Shapes = dict[str, tuple[int, ...]]


def _layers(front: str, count: int, leaves: Shapes) -> Iterator[tuple[str, tuple[int, ...]]]:
    for layer in range(count):
        yield from ((f"{front}.{layer}.{leaf}", shape) for leaf, shape in leaves.items())


def _attention(hidden: int, keys: int) -> Shapes:
    sizes = {"q_proj": hidden, "k_proj": keys, "v_proj": keys, "o_proj": hidden}
    return {f"self_attn.{leaf}.weight": (out, hidden) for leaf, out in sizes.items()}


def _mlp(hidden: int, inner: int, names: tuple[str, str, str]) -> Shapes:
    gate, up, down = names
    return {
        f"{gate}.weight": (inner, hidden),
        f"{up}.weight": (inner, hidden),
        f"{down}.weight": (hidden, inner),
    }


def _norms(hidden: int, names: tuple[str, ...]) -> Shapes:
    return {f"{name}.weight": (hidden,) for name in names}


def _language_model(layers: int, vocab: int, leaves: Shapes) -> Shapes:
    hidden = leaves["self_attn.o_proj.weight"][0]
    leaves = leaves | _norms(hidden, ("input_layernorm", "post_attention_layernorm"))
    return {
        "model.embed_tokens.weight": (vocab, hidden),
        **dict(_layers("model.layers", layers, leaves)),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }


def _mixtral() -> Shapes:
    leaves = _attention(6144, 1024) | {"block_sparse_moe.gate.weight": (8, 6144)}
    for expert in range(8):
        front = f"block_sparse_moe.experts.{expert}"
        leaves |= _mlp(6144, 16384, (f"{front}.w1", f"{front}.w3", f"{front}.w2"))
    return _language_model(56, 32000, leaves)


def _visual() -> Shapes:
    linear = {
        "attn.qkv": (3840, 1280),
        "attn.proj": (1280, 1280),
        "mlp.fc1": (5120, 1280),
        "mlp.fc2": (1280, 5120),
    }
    leaves = {f"{n}.weight": s for n, s in linear.items()}
    leaves |= {f"{n}.bias": s[:1] for n, s in linear.items()}
    leaves |= {f"{n}.{p}": (1280,) for n in ("norm1", "norm2") for p in ("weight", "bias")}
    merger = {"mlp.0": (5120, 5120), "mlp.2": (3584, 5120), "ln_q": (1280,)}
    return {
        "visual.patch_embed.proj.weight": (1280, 3, 2, 14, 14),
        **dict(_layers("visual.blocks", 32, leaves)),
        **{f"visual.merger.{n}.weight": s for n, s in merger.items()},
        **{f"visual.merger.{n}.bias": s[:1] for n, s in merger.items()},
    }


def _qwen2_vl() -> Shapes:
    leaves = _attention(3584, 512)
    biases = {n.replace("weight", "bias"): s[:1] for n, s in leaves.items() if "o_proj" not in n}
    leaves |= biases | _mlp(3584, 18944, ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
    return _visual() | _language_model(28, 152064, leaves)


_LLAMA = _attention(8192, 1024) | _mlp(
    8192, 28672, ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
)
INDEXES: dict[str, Shapes] = {
    "llama": _language_model(80, 128262, _LLAMA),
    "mixtral": _mixtral(),
    "qwen2_vl": _qwen2_vl(),
}
