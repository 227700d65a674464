"""A base, and adapters of its layers there and back by llama.cpp's format."""

import json

import numpy as np
import pytest

import lorakit
from tests.verbs.adapters import pair, save

gguf = pytest.importorskip("gguf")

SCRATCH = lorakit.RunOptions(sync=False)
HEADS, KV, DIM, WIDTH = 4, 2, 6, 24
Q, K, UP = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.k_proj",
    "model.layers.1.mlp.up_proj",
)
NAMES = {Q: "blk.0.attn_q", K: "blk.0.attn_k", UP: "blk.1.ffn_up"}


@pytest.fixture
def base(tmp_path):
    return config(tmp_path / "base", "llama")


def config(folder, model_type):
    folder.mkdir()
    text = {
        "model_type": model_type,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
    }
    (folder / "config.json").write_text(json.dumps(text))
    return folder


def adapter(folder, *, rank=2, dtype="f4", extra=None, **options):
    shapes = {**pair(Q, HEADS * DIM, WIDTH, 2), **pair(K, KV * DIM, WIDTH, 2)}
    shapes |= {**pair(UP, 40, WIDTH, rank), **(extra or {})}
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal(s).astype(dtype) for n, s in shapes.items()}
    modules = ["q_proj", "k_proj", "up_proj"]
    return save(folder, tensors, r=2, lora_alpha=3, target_modules=modules, **options)


def converted(source, out, to, base):
    return lorakit.convert(source, out, to=to, base=base, run=SCRATCH)


def up_factors(rank=32):
    rng = np.random.default_rng(0)
    shapes = {"a": (rank, 64), "b": (96, rank)}
    name = f"{NAMES[UP]}.weight.lora_"
    return {name + x: rng.standard_normal(s).astype("f4") for x, s in shapes.items()}
