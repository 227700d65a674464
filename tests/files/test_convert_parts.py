"""Files for what lies beside a denoiser, and of which some tensors are of nothing that is known."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.errors import MisfitError
from lorakit.formats.recognise import recognise

SCRATCH = lorakit.RunOptions(sync=False)


def test_the_connectors_of_ltx_2_have_a_name_of_their_own_in_each_format(tmp_path):
    names = {
        "text_embedding_projection.aggregate_embed": "connectors.text_proj_in",
        "diffusion_model.audio_patchify_proj": "transformer.audio_proj_in",
    }
    tensors = {
        f"{n}.lora_{x}.weight": np.full(shape, 0.5, "f4")
        for n in names
        for x, shape in (("A", (2, 6)), ("B", (8, 2)))
    }
    save_file(tensors, tmp_path / "a.safetensors")
    lorakit.convert(tmp_path / "a.safetensors", tmp_path / "lora", to="diffusers", run=SCRATCH)
    found = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert {n.partition(".lora_")[0] for n in found} == set(names.values())
    lorakit.convert(tmp_path / "lora", tmp_path / "b.safetensors", to="comfyui", run=SCRATCH)
    assert set(tensors) <= set(load_file(tmp_path / "b.safetensors"))


def test_what_a_merge_cannot_read_is_left_out_by_the_command_that_it_names(tmp_path):
    name = "diffusion_model.blocks.0.self_attn"
    tensors = {f"{name}.q.lora_{x}.weight": np.ones((4, 4), "f4") for x in "AB"}
    tensors |= {
        f"{name}.norm_q.diff": np.ones(4, "f4"),
        "diffusion_model.blocks.0.diff_x": np.ones((1, 6, 4), "f4"),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    (tmp_path / "base").mkdir()
    weights = {
        "blocks.0.attn1.to_q.weight": np.ones((4, 4), "f4"),
        "blocks.0.attn1.norm_q.weight": np.ones(4, "f4"),
    }
    save_file(weights, tmp_path / "base/diffusion_pytorch_model.safetensors")
    with pytest.raises(lorakit.LorakitError) as caught:
        lorakit.merge(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "out", run=SCRATCH)
    assert "--to comfyui --drop" in caught.value.hint
    options = {"to": "comfyui", "drop": "diff_x$", "run": SCRATCH}
    lorakit.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **options)
    lorakit.merge(tmp_path / "base", tmp_path / "b.safetensors", tmp_path / "out", run=SCRATCH)


def test_flattened_names_of_no_family_are_not_those_of_a_language_model():
    known = recognise(["lora_prior_unet_down_blocks_0_0_attention_to_q"], {})
    assert (known.places, len(known.unknown)) == ({}, 1)


def test_layers_of_a_language_model_alone_are_not_a_text_encoder():
    names = ["lora_te_layers_0_self_attn_q_proj", "lora_te_layers_0_mlp_up_proj"]
    assert recognise(names, {}).places == {}
    known = recognise([*names, "lora_unet_layers_0_adaLN_modulation_1"], {})
    assert (known.family, known.unknown) == ("lumina2", ())


# Text encoders by number: of a file for several of them, the family and where each module goes.
NUMBERED = {
    "hunyuan_video": {
        "lora_transformer_single_transformer_blocks_0_norm_linear": "transformer",
        "lora_te1_layers_0_self_attn_q_proj": "text_encoder",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": "text_encoder_2",
        "text_encoders.llama.transformer.model.layers.1.mlp.up_proj": "text_encoder",
    },
    "hidream": {
        "lora_transformer_double_stream_blocks_0_block_attn1_to_q": "transformer",
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": "text_encoder_2",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q": "text_encoder_3",
        "lora_te4_model_layers_0_self_attn_q_proj": "text_encoder_4",
    },
}


@pytest.mark.parametrize("family", NUMBERED)
def test_text_encoders_go_by_their_number_language_models_among_them(family):
    modules = NUMBERED[family]
    known = recognise(list(modules), {})
    assert (known.family, known.unknown) == (family, ())
    assert {m: p.component for m, p in known.places.items()} == modules


def test_a_folder_of_peft_in_names_of_the_original_code_is_told_the_way_to_a_base_of_diffusers(
    tmp_path,
):
    name, (a, b) = "double_blocks.0.img_attn.qkv", (np.ones((2, 8), "f4"), np.ones((24, 2), "f4"))
    weights = {f"transformer_blocks.0.attn.to_{x}.weight": np.ones((8, 8), "f4") for x in "qkv"}
    for folder in ("base", "lora"):
        (tmp_path / folder).mkdir()
    save_file(weights, tmp_path / "base/diffusion_pytorch_model.safetensors")
    lora = {f"base_model.model.{name}.lora_{x}.weight": v for x, v in (("A", a), ("B", b))}
    save_file(lora, tmp_path / "lora/adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["qkv"]}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(MisfitError, match="not in the base") as caught:
        lorakit.merge(tmp_path / "base", tmp_path / "lora", tmp_path / "out", run=SCRATCH)
    assert f"convert {tmp_path / 'lora'} -o OUT --to diffusers" in caught.value.hint
    lorakit.convert(tmp_path / "lora", tmp_path / "named", to="diffusers", run=SCRATCH)
    lorakit.merge(tmp_path / "base", tmp_path / "named", tmp_path / "out", run=SCRATCH)
    found = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors")
    assert all((v == 1 + 2 * 2).all() for v in found.values())
