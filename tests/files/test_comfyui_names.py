"""Models that ComfyUI has otherwise than their own code: HunyuanVideo 1.5, whose queries, keys and
values it fuses, and ACE-Step, which lies in its decoder; and what it calls text encoders.

Sources: Comfy-Org/ComfyUI, comfy/lora.py and comfy/ldm/hunyuan_video/model.py
"""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.errors import LorakitError

SCRATCH = lorakit.RunOptions(sync=False)
WIDTH = 8
KOHYA = "lora_unet_double_blocks_0_"
COMFY = "double_blocks.0."
MUSIC = "layers.0.cross_attn."


def drawn(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype("f4")


def saved(path, tensors):
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def hunyuan():
    """What musubi-tuner trains of a block, and the deltas."""
    tensors, deltas = {}, {}
    for seed, leaf in enumerate(("img_attn_q", "img_attn_k", "img_attn_v", "img_mlp_fc1")):
        a = drawn(2, WIDTH, seed=seed)
        b = drawn(4 * WIDTH if leaf.endswith("fc1") else WIDTH, 2, seed=seed)
        tensors |= {f"{KOHYA}{leaf}.lora_down.weight": a, f"{KOHYA}{leaf}.lora_up.weight": b}
        tensors[f"{KOHYA}{leaf}.alpha"] = np.array(1, "f4")
        deltas[leaf] = 0.5 * b.astype("f8") @ a
    return tensors, deltas


def product(tensors, name):
    a, b = (tensors[f"{name}.lora_{x}.weight"].astype("f8") for x in "AB")
    return float(tensors[f"{name}.alpha"]) / len(a) * b @ a


def test_queries_keys_and_values_of_hunyuan_video_15_are_fused_for_comfyui(tmp_path):
    tensors, deltas = hunyuan()
    path = saved(tmp_path / "a.safetensors", tensors)
    options = {"family": "hunyuan_video_15", "run": SCRATCH}
    out = tmp_path / "comfy.safetensors"
    with pytest.raises(LorakitError, match=r"img_attn_[qkv].* is not what it reads"):
        lorakit.check(path, "comfyui")
    lorakit.convert(path, out, to="comfyui", **options)
    made, front = load_file(out), f"diffusion_model.{COMFY}"
    assert {n.partition(".lora_")[0].removesuffix(".alpha") for n in made} == {
        f"{front}img_attn.qkv",
        f"{front}img_mlp.0",
    }
    whole = np.concatenate([deltas[f"img_attn_{x}"] for x in "qkv"])
    np.testing.assert_allclose(product(made, f"{front}img_attn.qkv"), whole, atol=1e-6)
    lorakit.convert(out, tmp_path / "back.safetensors", to="kohya", **options)
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(back[name], values, err_msg=name)


@pytest.mark.parametrize("comfy", [False, True])
def test_hunyuan_video_15_is_merged_into_either_kind_of_file(tmp_path, comfy):
    """The names of the attention tell the family of the one, the refiner's vision of the other."""
    tensors, deltas = hunyuan()
    path = saved(tmp_path / "a.safetensors", tensors)
    parts = {f"{COMFY}img_attn_{x}.weight": deltas[f"img_attn_{x}"] for x in "qkv"}
    whole = {f"{COMFY}img_attn.qkv.weight": np.concatenate(list(parts.values()))}
    wanted = {**(whole if comfy else parts)}
    wanted[f"{COMFY}img_mlp.{'0' if comfy else 'fc1'}.weight"] = deltas["img_mlp_fc1"]
    base = {n: np.zeros(v.shape, "f4") for n, v in wanted.items()}
    base |= {f"vision_in.proj.{n}.weight": np.zeros((WIDTH, WIDTH), "f4") for n in (1, 3)}
    base |= {f"byt5_in.fc{n}.weight": np.zeros((WIDTH, WIDTH), "f4") for n in (1, 2, 3)}
    there = saved(tmp_path / "base.safetensors", base)
    lorakit.merge(there, path, tmp_path / "out.safetensors", run=SCRATCH)
    found = load_file(tmp_path / "out.safetensors")
    for name, delta in wanted.items():
        np.testing.assert_allclose(found[name], delta, atol=1e-6)


def test_ace_step_is_in_the_decoder_for_comfyui_and_in_its_own_files(tmp_path):
    a, b = drawn(2, WIDTH), drawn(WIDTH, 2)
    name = f"base_model.model.{MUSIC}q_proj"
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    path = saved(tmp_path / "a.safetensors", tensors)
    out = tmp_path / "comfy.safetensors"
    lorakit.convert(path, out, to="comfyui", run=SCRATCH)
    assert f"diffusion_model.decoder.{MUSIC}q_proj.lora_A.weight" in load_file(out)
    assert lorakit.check(out, "comfyui").loads
    base = {f"decoder.{MUSIC}q_proj.weight": np.zeros((WIDTH, WIDTH), "f4")}
    base |= {f"encoder.{MUSIC}q_proj.weight": np.zeros((WIDTH, WIDTH), "f4")}
    there = saved(tmp_path / "base.safetensors", base)
    for file in (path, out):
        merged = tmp_path / f"{file.stem}_merged.safetensors"
        lorakit.merge(there, file, merged, run=SCRATCH)
        found = load_file(merged)
        np.testing.assert_allclose(found[f"decoder.{MUSIC}q_proj.weight"], b @ a, atol=1e-6)
        assert not found[f"encoder.{MUSIC}q_proj.weight"].any()


def test_names_of_ace_step_without_the_decoder_are_none_of_comfyui(tmp_path):
    name = f"diffusion_model.{MUSIC}q_proj"
    tensors = {f"{name}.lora_A.weight": drawn(2, WIDTH), f"{name}.lora_B.weight": drawn(WIDTH, 2)}
    path = saved(tmp_path / "a.safetensors", tensors)
    with pytest.raises(LorakitError, match="is not what it reads"):
        lorakit.check(path, "comfyui")
    lorakit.convert(path, tmp_path / "b.safetensors", to="comfyui", run=SCRATCH)
    assert lorakit.check(tmp_path / "b.safetensors", "comfyui").loads


NAMES = {
    "lora_unet_double_blocks_0_img_mlp_fc1": False,  # musubi-tuner's
    "lora_unet_double_blocks_0_img_mlp_0": True,
    "diffusion_model.double_blocks.0.img_mlp.fc1": True,  # diffusion-pipe's
    "diffusion_model.double_blocks.0.img_mlp.0": True,
}


@pytest.mark.parametrize("name", NAMES)
def test_comfyui_reads_flattened_names_of_hunyuan_video_as_its_own_alone(tmp_path, name):
    leaf = "self_attn_qkv" if name.endswith("fc1") else "self_attn.qkv"
    telling = f"diffusion_model.txt_in.individual_token_refiner.blocks.0.{leaf}"
    if "unet" in name:
        telling = telling.replace("diffusion_model.", "lora_unet_").replace(".", "_")
    tensors = {
        f"{n}.lora_{x}.weight": drawn(*s)
        for n, rows in ((name, 4 * WIDTH), (telling, 3 * WIDTH))
        for x, s in (("down", (2, WIDTH)), ("up", (rows, 2)))
    }
    path = saved(tmp_path / "a.safetensors", tensors)
    if NAMES[name]:
        assert lorakit.check(path, "comfyui").loads
        return
    with pytest.raises(LorakitError, match=r"img_mlp_fc1.* is not what it reads"):
        lorakit.check(path, "comfyui")


READ = {
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": True,
    "lora_te1_encoder_layers_0_mlp_fc1": False,  # of transformers 5
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": True,
    "lora_te1_text_projection": True,
    "lora_transformer_transformer_blocks_0_attn_to_out_0": True,  # OneTrainer's
}


@pytest.mark.parametrize("name", READ)
def test_names_of_text_encoders_are_those_that_comfyui_reads(tmp_path, name):
    tensors = {}
    for module in (name, "lora_transformer_single_transformer_blocks_0_proj_out"):
        tensors[f"{module}.lora_down.weight"] = drawn(2, 5 * WIDTH)
        tensors[f"{module}.lora_up.weight"] = drawn(WIDTH, 2)
    path = saved(tmp_path / "a.safetensors", tensors)
    if READ[name]:
        assert lorakit.check(path, "comfyui").loads
        return
    with pytest.raises(LorakitError, match="is not what it reads"):
        lorakit.check(path, "comfyui")


@pytest.mark.parametrize("front", ["lora_transformer_", "lycoris_"])
def test_prefixes_are_read_of_some_models_only(tmp_path, front):
    name = f"{front}blocks_0_attn1_to_q"  # of Wan
    tensors = {
        f"{name}.lora_down.weight": drawn(2, WIDTH),
        f"{name}.lora_up.weight": drawn(WIDTH, 2),
    }
    path = saved(tmp_path / "a.safetensors", tensors)
    with pytest.raises(LorakitError, match="is not what it reads"):
        lorakit.check(path, "comfyui")
    lorakit.convert(path, tmp_path / "b.safetensors", to="comfyui", run=SCRATCH)
    assert lorakit.check(tmp_path / "b.safetensors", "comfyui").loads


ENCODERS = {  # what tells the model, the encoder's module in kohya's files, and in ComfyUI's
    "sd2": (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k",
        "lora_te_text_model_encoder_layers_0_mlp_fc1",
        "text_encoders.clip_h.transformer.text_model.encoder.layers.0.mlp.fc1",
    ),
    "wan": (
        "lora_unet_blocks_0_self_attn_q",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        "text_encoders.umt5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q",
    ),
}


@pytest.mark.parametrize("family", ENCODERS)
def test_text_encoders_are_called_as_comfyui_has_them(tmp_path, family):
    denoiser, encoder, comfy = ENCODERS[family]
    tensors = {}
    for name, width in ((denoiser, 1024), (encoder, WIDTH)):
        tensors[f"{name}.lora_down.weight"] = drawn(2, width)
        tensors[f"{name}.lora_up.weight"] = drawn(WIDTH, 2)
        tensors[f"{name}.alpha"] = np.array(1, "f4")
    path, out = saved(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors"
    lorakit.convert(path, out, to="comfyui", family=family, run=SCRATCH)
    assert f"{comfy}.lora_A.weight" in load_file(out)
    lorakit.convert(out, tmp_path / "c.safetensors", to="kohya", family=family, run=SCRATCH)
    back = load_file(tmp_path / "c.safetensors")
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[n], v) for n, v in tensors.items())
    there = {f"{comfy}.weight": np.zeros((WIDTH, WIDTH), "f4")}
    own = denoiser.removeprefix("lora_unet_").replace("_self_attn_", ".self_attn.")
    own = own.replace("blocks_0", "blocks.0")
    if family == "sd2":
        own = "input_blocks.1.1.transformer_blocks.0.attn2.to_k"
    there[f"model.diffusion_model.{own}.weight"] = np.zeros((WIDTH, 1024), "f4")
    merged = tmp_path / "merged.safetensors"
    lorakit.merge(saved(tmp_path / "base.safetensors", there), out, merged, run=SCRATCH)
    wanted = 0.5 * drawn(WIDTH, 2).astype("f8") @ drawn(2, WIDTH)
    np.testing.assert_allclose(load_file(merged)[f"{comfy}.weight"], wanted, atol=1e-6)
