"""Adapters of a few tensors, drawn from their names, for tests of the verbs that make adapters."""

import json

import numpy as np
from safetensors.numpy import load_file, save_file

from lorakit.adapter.adapter import open_adapter
from lorakit.adapter.files.reading import open_file
from lorakit.adapter.weights import adapted
from lorakit.math.lowrank import delta

PREFIX = "base_model.model."


def drawn(name, *shape):
    seed = sum(map(ord, name))
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def pair(module, out, inner, rank):
    return {f"{module}.lora_A.weight": (rank, inner), f"{module}.lora_B.weight": (out, rank)}


def save(folder, tensors, **config):
    """An adapter with these tensors, by name without the prefix: an array, or a shape to draw."""
    folder.mkdir()
    made = {
        PREFIX + n: t if hasattr(t, "dtype") else drawn(folder.name + n, *t)
        for n, t in tensors.items()
    }
    save_file(made, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["q"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def tensors_of(folder):
    found = load_file(folder / "adapter_model.safetensors")
    return {n.removeprefix(PREFIX): t for n, t in found.items()}


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def deltas(folder):
    """The delta of every weight, float64; those of all experts of a stack in one array."""
    found = adapted(open_adapter(str(folder)))
    return {
        key: np.stack([delta(x, "float64") for x in one.lows("float64")])
        for key, one in found.items()
    }


def updates(file):
    """The delta of every module of a LoRA file, by its path or as it was opened; float64."""
    found = {}
    for one in (file if hasattr(file, "deltas") else open_file(file)).deltas:
        a, b = (one.tensors[r].read().astype("f8") for r in "ab")
        found[one.module] = one.scaling * b @ a
    return found


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}
