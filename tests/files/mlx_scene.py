"""Adapters in MLX-LM's names."""

import numpy as np
from safetensors.numpy import save_file

import lorakit

SCRATCH = lorakit.RunOptions(sync=False)
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.3.mlp.up_proj"


def converted(source, out, to):
    return lorakit.convert(source, out, to=to, run=SCRATCH)


def mlx(folder, scale="2.5", name="adapters.safetensors", **tensors):
    """What MLX-LM writes: one module, and more."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    drawn = {f"{Q}.lora_a": rng.standard_normal((8, 2)), f"{Q}.lora_b": rng.standard_normal((2, 8))}
    drawn = {n: t.astype("f4") for n, t in drawn.items()} | tensors
    save_file(drawn, folder / name)
    (folder / "adapter_config.json").write_text(f'{{"lora_parameters": {{"scale": {scale}}}}}')
    return folder
