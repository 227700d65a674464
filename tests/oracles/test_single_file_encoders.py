"""Text encoders in one file with SDXL: where Diffusers' converter finds them after a merge.

Source: huggingface/diffusers, src/diffusers/loaders/single_file_utils.py
"""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint  # noqa: E402

SCRATCH = lorakit.RunOptions(sync=False)
STEM, DIM, LAYERS = "conditioner.embedders.1.model.", 16, 2
SHAPES = {
    "attn.in_proj_weight": (3 * DIM, DIM),
    "attn.in_proj_bias": (3 * DIM,),
    "attn.out_proj.weight": (DIM, DIM),
    "mlp.c_fc.weight": (4 * DIM, DIM),
    "mlp.c_proj.weight": (DIM, 4 * DIM),
}
MODULES = {
    **{f"self_attn.{x}_proj": (DIM, DIM) for x in ("q", "k", "v", "out")},
    "mlp.fc1": (4 * DIM, DIM),
    "mlp.fc2": (DIM, 4 * DIM),
}


def as_transformers(path):
    checkpoint = {n: torch.tensor(v) for n, v in load_file(path).items()}
    found = convert_open_clip_checkpoint(None, checkpoint, prefix=STEM)
    return {n: v.double().numpy() for n, v in found.items()}


def test_the_second_encoder_of_sdxl_has_every_update_where_diffusers_reads_it(tmp_path):
    rng = np.random.default_rng(0)
    base = {
        f"{STEM}transformer.resblocks.{i}.{n}": rng.standard_normal(s).astype("f4")
        for i in range(LAYERS)
        for n, s in SHAPES.items()
    }
    base[f"{STEM}text_projection"] = rng.standard_normal((DIM, DIM)).astype("f4")
    unet = "model.diffusion_model.output_blocks.0.1.proj_in.weight"
    base[unet] = rng.standard_normal((8, 8)).astype("f4")
    lora, wanted = {}, {}
    layers = [(f"text_model.encoder.layers.{i}.{m}", m) for i in range(LAYERS) for m in MODULES]
    # open_clip has the projection turned, which the shape of a square one does not tell.
    for module, kind in [*layers, ("text_projection", "")]:
        name = f"lora_te2_{module.replace('.', '_')}"
        out, inner = MODULES.get(kind, (DIM, DIM))
        a, b = rng.standard_normal((2, inner)), rng.standard_normal((out, 2))
        lora |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
        lora[f"{name}.alpha"] = np.array(3.0)
        wanted[f"{module}.weight"] = 1.5 * b @ a
    save_file(base, tmp_path / "base.safetensors")
    out = tmp_path / "out.safetensors"
    lora["lora_unet_output_blocks_0_1_proj_in.lora_down.weight"] = rng.standard_normal((2, 8))
    lora["lora_unet_output_blocks_0_1_proj_in.lora_up.weight"] = rng.standard_normal((8, 2))
    save_file({n: v.astype("f4") for n, v in lora.items()}, tmp_path / "a.safetensors")
    lorakit.merge(tmp_path / "base.safetensors", tmp_path / "a.safetensors", out, run=SCRATCH)
    before, after = (as_transformers(p) for p in (tmp_path / "base.safetensors", out))
    assert set(wanted) <= set(before)
    for name, values in before.items():
        delta = wanted.get(name, np.zeros(values.shape))
        np.testing.assert_allclose(after[name] - values, delta, atol=1e-5)
