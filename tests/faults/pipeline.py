"""The folder of a small pipeline of Diffusers, and a LoRA for two of its models."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

# Component: the name of its layer, and the front of that in a LoRA file.
LAYERS = {
    "unet": ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k", "lora_unet_"),
    "text_encoder": ("text_model.encoder.layers.0.self_attn.q_proj", "lora_te1_"),
}
SHAPE = (8, 2048)  # inputs of a UNet of SDXL


def make_pipeline(folder: Path) -> None:
    """Write `pipe`, with a model that nothing is for and files in nested folders, and `image`."""
    pipe, rng, factors = folder / "pipe", np.random.default_rng(0), {}
    for component, (name, front) in LAYERS.items():
        (pipe / component).mkdir(parents=True)
        (pipe / component / "config.json").write_text('{"sample_size": 8}')
        weight = rng.standard_normal(SHAPE).astype("f4")
        save_file({f"{name}.weight": weight}, pipe / component / "model.safetensors")
        module = front + name.replace(".", "_")
        factors[f"{module}.lora_down.weight"] = rng.standard_normal((2, SHAPE[1])).astype("f4")
        factors[f"{module}.lora_up.weight"] = rng.standard_normal((SHAPE[0], 2)).astype("f4")
    (pipe / "vae").mkdir()
    save_file({"x": np.ones(9, "f4")}, pipe / "vae/diffusion_pytorch_model.safetensors")
    (pipe / "tokenizer/deep").mkdir(parents=True)
    (pipe / "tokenizer/deep/vocab.json").write_text("{}")
    (pipe / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    (folder / "image").mkdir()
    save_file(factors, folder / "image/pytorch_lora_weights.safetensors")
