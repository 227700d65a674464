"""Adapters to check, and what is in the way of each."""

import pytest

import lorakit
from lorakit.verbs.check import UnloadableError
from tests.verbs.adapters import pair
from tests.verbs.adapters import save as saved

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
PLAIN = {**pair(Q, 12, 8, 2), **pair(UP, 20, 12, 2)}
NORMS = {f"{m}.lora_magnitude_vector": (n,) for m, n in ((Q, 12), (UP, 20))}
BIASES = {f"{m}.lora_B.bias": (n,) for m, n in ((Q, 12), (UP, 20))}
LANGUAGE = ("vllm", "sglang", "peft")


def save(folder, tensors, **config):
    """An adapter whose config targets what it has."""
    return saved(folder, tensors, **{"target_modules": ["q_proj", "up_proj"], **config})


def obstacles(path, consumer):
    with pytest.raises(UnloadableError) as caught:
        lorakit.check(path, consumer)
    assert caught.value.exit_code == 8
    return [o.what for o in caught.value.checked.obstacles]
