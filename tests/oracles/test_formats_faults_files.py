"""Files that other converters refuse, pass through or spoil, and ours converts: letter g of
specs/formats.md, 2.9. Each is held against the algebra in float64.
"""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest

import lorakit
from lorakit.formats.families import FAMILIES
from tests.oracles.faulty import (
    FUSED,
    PEFT,
    PLAIN,
    converted,
    drawn,
    folded,
    pair,
    placed_in_flux,
    same,
    saved,
    update,
)

LISTS = Path(__file__).parent.parent.parent / "fixtures/loras"
WIDTH = 12


ENCODERS = {
    "te1": ("text_model.encoder.layers.3.self_attn.out_proj", "text_encoder."),
    "te3": ("encoder.block.2.layer.1.DenseReluDense.wi_0", "text_encoder_2."),
}


def shapes(name):
    return json.loads(gzip.decompress((LISTS / f"{name}.json.gz").read_bytes()))


def narrow(name):
    """Tensors of a real file's names, a sixty-fourth as wide."""
    found = {}
    for number, (tensor, shape) in enumerate(shapes(name).items()):
        small = [-(-s // 64) if s > 64 else s for s in shape]
        found[tensor] = np.asarray(drawn(number, *small) + 2, "f4")
    return found


@pytest.mark.parametrize("encoders", [(), ("te1",), ("te1", "te3")])
def test_a_file_of_kohya_for_flux_is_converted_whole(tmp_path, encoders):
    """g. The 14 lists of real files begin with those that Diffusers converts too; of T5, which is
    the third encoder for kohya and the second for Diffusers, it logs that it is left out.
    """
    tensors = narrow("kohya-flux")
    expected = {}
    for encoder in encoders:
        here, there = ENCODERS[encoder]
        made = pair(f"lora_{encoder}_{here.replace('.', '_')}", WIDTH, WIDTH, alpha=0.5)
        expected[there + here] = update(made, next(iter(made)).partition(".")[0])
        tensors |= made
    for name in tensors:
        module, _, ending = name.partition(".")
        if ending == "lora_down.weight" and module.startswith("lora_unet_"):
            found = re.fullmatch(r"lora_unet_(double|single)_blocks_(\d+)_(.*)", module)
            end = next(e for e in (*PLAIN, *FUSED) if e.replace(".", "_") == found[3])
            expected |= placed_in_flux(found[1], found[2], end, update(tensors, module))
    path = saved(tmp_path / "a.safetensors", tensors)
    same(folded(path, tmp_path), expected)


def test_a_file_of_xlabs_is_converted_whole(tmp_path):
    """g. Streams are numbered 1 and 2, and the fused projections of both are cut."""
    tensors, expected = narrow("xlabs-flux"), {}
    names = (".down.weight", ".up.weight")
    for name in tensors:
        if name.endswith(names[0]):
            module = name.removesuffix(names[0])
            found = re.fullmatch(r"double_blocks\.(\d+)\.processor\.(\w+)_lora([12])", module)
            end = f"{'img' if found[3] == '1' else 'txt'}_attn.{found[2]}"
            expected |= placed_in_flux(
                "double", found[1], end, update(tensors, module, names=names)
            )
    path = saved(tmp_path / "a.safetensors", tensors)
    same(folded(path, tmp_path), expected)


def test_a_dora_of_onetrainer_with_t5_is_read_to_the_last_module(tmp_path):
    """g. Diffusers stops at an assertion. Norms of inputs have no place in PEFT's DoRA, which
    Diffusers loads: that is refused, and the file for ComfyUI has every number.
    """
    tensors = narrow("onetrainer-flux-dora")
    path = saved(tmp_path / "a.safetensors", tensors)
    with pytest.raises(lorakit.LorakitError, match="norms of its inputs") as caught:
        converted(path, tmp_path / "out", "diffusers")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()
    report, found = converted(path, tmp_path / "x.safetensors", "comfyui")
    assert len(report.steps) == report.modules == 506
    assert len(found) == len(tensors)
    assert sorted(t.tobytes() for t in found.values()) == sorted(
        t.tobytes() for t in tensors.values()
    )
    again, whole = converted(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "comfyui")
    assert again.modules == 506
    assert set(whole) == set(found)


# How the modules of FLUX.1 are named in files that Diffusers leaves as they are, or stops at.
SPELLED = {
    "ai-toolkit": "diffusion_model.{}",
    "the original code": "{}",
    "PEFT": "base_model.model.{}",
}


@pytest.mark.parametrize("whose", SPELLED)
def test_names_of_the_original_code_with_factors_a_and_b_are_converted(tmp_path, whose):
    """g. ai-toolkit's files are passed through, so that nothing of them loads."""
    tensors, expected = {}, {}
    for end in (*PLAIN, *FUSED):
        kind = "single" if end.startswith(("linear", "modulation")) else "double"
        module = SPELLED[whose].format(f"{kind}_blocks.11.{end}")
        rows = 7 if end == "linear1" else 3
        tensors |= pair(module, rows * WIDTH, WIDTH, names=PEFT)
        expected |= placed_in_flux(kind, 11, end, update(tensors, module, names=PEFT))
    path = saved(tmp_path / "a.safetensors", tensors)
    same(folded(path, tmp_path), expected, tolerance=1e-7)


@pytest.mark.parametrize("front", ["base_model.model.", "transformer.base_model.model."])
def test_names_of_diffusers_behind_those_of_peft_are_converted(tmp_path, front):
    """g. Diffusers takes them for another trainer's file, and stops at a key that it has not."""
    modules = ["attn.to_q", "attn.to_add_out", "ff.net.0.proj", "norm1_context.linear"]
    tensors, expected = {}, {}
    for module in (f"transformer_blocks.4.{m}" for m in modules):
        tensors |= pair(front + module, WIDTH, WIDTH, names=PEFT)
        expected[f"transformer.{module}"] = update(tensors, front + module, names=PEFT)
    path = saved(tmp_path / "a.safetensors", tensors)
    same(folded(path, tmp_path), expected, tolerance=1e-7)


def lokr(module, *, low):
    """A Kronecker product of 36 x 12, its second factor whole or of rank 2; and its update."""
    one, alpha = drawn(3, 3, 2), 1.0
    if not low:
        two = drawn(4, 12, 6)
        found = {"lokr_w1": one, "lokr_w2": two}
        dense = np.kron(one.astype("f8"), two.astype("f8"))
    else:
        up, down = drawn(5, 12, 2), drawn(6, 2, 6)
        found = {"lokr_w1": one, "lokr_w2_a": up, "lokr_w2_b": down}
        dense = alpha / 2 * np.kron(one.astype("f8"), up.astype("f8") @ down.astype("f8"))
    found["alpha"] = np.array(alpha, "f4")
    return {f"{module}.{n}": t for n, t in found.items()}, dense


@pytest.mark.parametrize("low", [False, True])
@pytest.mark.parametrize(
    "spelled",
    ["diffusion_model.double_blocks.2.img_attn.qkv", "lora_unet_double_blocks_2_img_attn_qkv"],
)
def test_a_lokr_of_a_fused_projection_is_cut_into_its_parts(tmp_path, spelled, low):
    """g. Diffusers has no LoKr for FLUX.1. Of two whole factors the alpha is not read."""
    tensors, dense = lokr(spelled, low=low)
    path = saved(tmp_path / "a.safetensors", tensors)
    expected = placed_in_flux("double", 2, "img_attn.qkv", dense)
    same(folded(path, tmp_path, family="flux"), expected)


def test_a_lokr_of_qwen_image_is_converted_whole(tmp_path):
    """g. Diffusers stops at the kohya spelling of a LoKr for Qwen-Image."""
    tensors, expected = {}, {}
    for module in ("attn_to_q", "attn_to_out_0", "img_mlp_net_0_proj", "txt_mlp_net_2"):
        made, dense = lokr(f"lora_unet_transformer_blocks_7_{module}", low=True)
        tensors |= made
        dotted = module.replace("attn_", "attn.").replace("_net_0_", ".net.0.")
        dotted = dotted.replace("_net_2", ".net.2").replace("out_0", "out.0")
        expected[f"transformer.transformer_blocks.7.{dotted}"] = dense
    path = saved(tmp_path / "a.safetensors", tensors)
    same(folded(path, tmp_path), expected)


ANIMA = {
    "self_attn_q_proj": "attn1.to_q",
    "self_attn_output_proj": "attn1.to_out.0",
    "cross_attn_k_proj": "attn2.to_k",
    "mlp_layer1": "ff.net.0.proj",
    "adaln_modulation_cross_attn_1": "norm2.linear_1",
}
KREA = {
    "blocks_3_attn_wq": "transformer_blocks.3.attn.to_q",
    "blocks_3_attn_wo": "transformer_blocks.3.attn.to_out.0",
    "blocks_3_attn_gate": "transformer_blocks.3.attn.to_gate",
    "blocks_3_mlp_down": "transformer_blocks.3.ff.down",
    "txtfusion_projector": "text_fusion.projector",
    "tmlp_2": "time_embed.linear_2",
}
FLATTENED = {
    "cosmos": {f"blocks_3_{k}": f"transformer_blocks.3.{v}" for k, v in ANIMA.items()},
    "krea2": KREA,
}


@pytest.mark.parametrize("family", FLATTENED)
def test_flattened_names_of_anima_and_krea_2_are_unflattened(tmp_path, family):
    """g. Diffusers' converters pass kohya's spelling of both through as it is."""
    if family not in FAMILIES:
        pytest.skip("no such family")
    tensors, expected = {}, {}
    for here, there in FLATTENED[family].items():
        tensors |= pair(f"lora_unet_{here}", WIDTH, WIDTH, alpha=0.5)
        expected[f"transformer.{there}"] = update(tensors, f"lora_unet_{here}")
    path = saved(tmp_path / "a.safetensors", tensors)
    same(folded(path, tmp_path), expected)


NORMS = {
    "double_blocks.{}.img_attn.norm.query_norm": "transformer_blocks.{}.attn.norm_q",
    "double_blocks.{}.img_attn.norm.key_norm": "transformer_blocks.{}.attn.norm_k",
    "double_blocks.{}.txt_attn.norm.query_norm": "transformer_blocks.{}.attn.norm_added_q",
    "double_blocks.{}.txt_attn.norm.key_norm": "transformer_blocks.{}.attn.norm_added_k",
    "single_blocks.{}.norm.query_norm": "single_transformer_blocks.{}.attn.norm_q",
    "single_blocks.{}.norm.key_norm": "single_transformer_blocks.{}.attn.norm_k",
}


def control():
    """A control file of two blocks: factors, biases of the updates, and norms in whole."""
    tensors, expected, beside = {}, {}, {}
    for end in (*PLAIN, *FUSED):
        kind = "single" if end.startswith(("linear", "modulation")) else "double"
        for number in (0, 18):
            module = f"{kind}_blocks.{number}.{end}"
            rows = 7 if end == "linear1" else 3
            tensors |= pair(module, rows * WIDTH, WIDTH, names=PEFT)
            bias = drawn(rows + number, rows * WIDTH)
            tensors[f"{module}.lora_B.bias"] = bias
            wide = np.tile(bias[:, None], WIDTH)
            for there, delta in placed_in_flux(kind, number, end, wide).items():
                beside[f"{there}.lora_B.bias"] = delta[:, 0]
            delta = update(tensors, module, names=PEFT)
            expected |= placed_in_flux(kind, number, end, delta)
    for seed, (here, there) in enumerate(NORMS.items()):
        for number in (0, 18):
            tensors[f"{here.format(number)}.scale"] = norm = drawn(seed + number, 4)
            beside[f"transformer.{there.format(number)}.weight"] = norm
    return tensors, expected, beside


def test_a_control_file_of_bfl_is_converted_with_biases_and_norms(tmp_path):
    """g, d. Diffusers asks for all 19 and 38 blocks of it, and swaps A."""
    tensors, expected, beside = control()
    path = saved(tmp_path / "a.safetensors", tensors)
    same(folded(path, tmp_path), expected, tolerance=1e-7)
    _, found = converted(path, tmp_path / "out", "diffusers")
    assert set(found) == {f"{m}{n}" for m in expected for n in PEFT} | set(beside)
    assert all(found[n].tobytes() == np.ascontiguousarray(t).tobytes() for n, t in beside.items())
    _, comfy = converted(tmp_path / "out", tmp_path / "x.safetensors", "comfyui", family="flux")
    for here in NORMS:
        name = f"diffusion_model.{here.format(18)}.set_weight"
        assert comfy[name].tobytes() == tensors[f"{here.format(18)}.scale"].tobytes()
    _, again = converted(tmp_path / "x.safetensors", tmp_path / "y", "diffusers", family="flux")
    assert {n: t.tobytes() for n, t in again.items()} == {n: t.tobytes() for n, t in found.items()}
    for to, said in (("peft", "no plain factors"), ("comfyui", "reads as it is")):
        with pytest.raises(lorakit.LorakitError, match=said) as caught:
            converted(path, tmp_path / to, to, family="flux")
        assert caught.value.exit_code == 4


def test_norms_of_a_model_are_no_adapter(tmp_path):
    """They are that only beside factors."""
    tensors = {f"{n.format(0)}.scale": drawn(0, 4) for n in NORMS}
    path = saved(tmp_path / "model.safetensors", tensors)
    assert lorakit.inspect(path).kind != "adapter"
