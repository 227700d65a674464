"""An adapter of every kind of layer, and its deltas before and after an edit."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import lorakit
from lorakit.adapter.adapter import open_adapter
from lorakit.adapter.weights import adapted
from lorakit.math.lowrank import delta
from tests.verbs.adapters import PREFIX, drawn, tensors_of
from tests.verbs.conftest import SCRATCH

H, E, R, V = 6, 3, 2, 10
Q = "model.layers.0.self_attn.q_proj"
EMBEDDING = "model.embed_tokens"


def adapter(folder, tensors, name="adapter", **config):
    """An adapter with these tensors, by name without the prefix: an array, or a shape to draw."""
    made = {PREFIX + n: t if hasattr(t, "dtype") else drawn(n, *t) for n, t in tensors.items()}
    (folder / name).mkdir()
    save_file(made, folder / name / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 3, **config}
    (folder / name / "adapter_config.json").write_text(json.dumps(config))
    return folder / name


def pair(module, out=H, inner=H, rank=R):
    return {f"{module}.lora_A.weight": (rank, inner), f"{module}.lora_B.weight": (out, rank)}


def edited(folder, name="out", source="adapter", **options):
    return lorakit.edit(folder / source, folder / name, run=SCRATCH, **options)


def deltas(folder, **reading):
    """What each weight gains, in float64."""
    found = adapted(open_adapter(str(folder)), **reading)
    return {
        key: np.concatenate([delta(x, "float64") for x in one.lows("float64")])
        for key, one in found.items()
    }


def same_bytes(one, other):
    return {n: (t.dtype, t.tobytes()) for n, t in tensors_of(one).items()} == {
        n: (t.dtype, t.tobytes()) for n, t in tensors_of(other).items()
    }


EVERYTHING = {
    **pair(Q),
    f"{Q}.lora_B.bias": (H,),
    f"{Q}.base_layer.bias": (H,),
    **pair("model.layers.1.self_attn.q_proj", rank=4),
    "model.conv.lora_A.weight": (R, 4, 3),
    "model.conv.lora_B.weight": (5, R, 1),
    f"{EMBEDDING}.lora_embedding_A": (R, V),
    f"{EMBEDDING}.lora_embedding_B": (H, R),
    f"{EMBEDDING}.token_adapter.trainable_tokens_delta": (2, H),
    f"{EMBEDDING}.base_layer.weight": (V, H),
    **pair("model.attention", 3 * H),
    "model.attention.base_layer.out_proj.lora_A.weight": (R, H),
    "model.attention.base_layer.out_proj.lora_B.weight": (H, R),
    "model.mlp.experts.base_layer.lora_A.weight": (E * R, H),
    "model.mlp.experts.base_layer.lora_B.weight": (8, R * E),
    "model.mlp.experts.lora_A.weight": (E * R, 4),
    "model.mlp.experts.lora_B.weight": (H, R * E),
    "model.norm.weight": (H,),
    "lm_head.weight": (V, H),
    f"{Q}.lora_velora_embed": (3,),
}
CONFIG = {
    "lora_bias": True,
    "bias": "lora_only",
    "target_modules": ["q_proj", "conv", "embed_tokens", "attention"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    "modules_to_save": ["norm", "lm_head", "classifier"],
    "trainable_token_indices": {"embed_tokens": [3, 5]},
    "rank_pattern": {"layers.1.self_attn.q_proj": 4},
    "alpha_pattern": {"conv": 5, "q_proj": 7},
    "peft_version": "0.21.2",
    "unknown": None,
}


@pytest.fixture
def folder(tmp_path):
    """A folder with an adapter that has a bit of everything."""
    adapter(tmp_path, EVERYTHING, **CONFIG)
    return tmp_path
