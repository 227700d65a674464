"""What a LoRA file is read as: older spellings, names that are not known, files that are none."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.adapter.files.reading import open_file
from lorakit.errors import MisfitError
from lorakit.formats.components import prefix_of
from lorakit.formats.recognise import recognise
from tests.files.making_loras import SHARED, kohya, weights

SCRATCH = lorakit.RunOptions(sync=False)
ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
CLIP = "text_encoder.text_model.encoder.layers.0"
OLD = {
    f"{module}{way}.weight": shape
    for module in (
        f"{ATTENTION}.processor.to_q_lora.",
        f"{ATTENTION}.processor.to_out_lora.",
        f"{CLIP}.self_attn.to_q_lora.",
        f"{CLIP}.mlp.fc1.lora_linear_layer.",
    )
    for way, shape in (("down", (2, 8)), ("up", (8, 2)))
}


def test_older_spellings_of_diffusers_are_read(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal(s).astype("f4") for n, s in OLD.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    opened = open_file(tmp_path / "a.safetensors")
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert [(d.component, d.module) for d in opened.deltas] == [
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1"),
        ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj"),
        ("unet", f"{block}.to_out.0"),
        ("unet", f"{block}.to_q"),
    ]


def test_text_encoders_of_transformers_5_are_read(tmp_path):
    names = ["lora_te1_encoder_layers_3_mlp_fc1", "lora_te2_encoder_layers_3_self_attn_q_proj"]
    shapes = {
        f"{n}.lora_{x}.weight": s for n in names for x, s in (("down", (2, 8)), ("up", (8, 2)))
    }
    path = kohya(tmp_path / "a.safetensors", shapes)
    found = [(d.component, d.module) for d in open_file(path, family="sdxl").deltas]
    assert found == [
        ("text_encoder", "text_model.encoder.layers.3.mlp.fc1"),
        ("text_encoder_2", "text_model.encoder.layers.3.self_attn.q_proj"),
    ]


def test_what_is_unknown_is_named_and_dropped_or_kept_on_request(tmp_path):
    path = kohya(tmp_path / "a.safetensors", SHARED, bundle=np.ones(3, "f4"))
    with pytest.raises(lorakit.LorakitError, match="'bundle'") as caught:
        lorakit.convert(path, tmp_path / "b", to="comfyui", family="flux", run=SCRATCH)
    assert caught.value.exit_code == 4
    done = lorakit.convert(
        path, tmp_path / "b", to="comfyui", family="flux", drop="bundle", run=SCRATCH
    )
    assert list(done.dropped) == ["bundle"]
    done = lorakit.convert(
        path, tmp_path / "c", to="comfyui", family="flux", keep_unknown=True, run=SCRATCH
    )
    assert load_file(weights(tmp_path / "c"))["bundle"].tolist() == [1, 1, 1]


def test_half_a_pair_and_two_algorithms_are_refused(tmp_path):
    half = {"lora_unet_img_in.lora_down.weight": (2, 8)}
    both = {**SHARED, "lora_unet_img_in.hada_w1_a": (8, 2)}
    for number, (tensors, said) in enumerate(((half, "other half"), (both, "tensors of"))):
        path = kohya(tmp_path / f"{number}.safetensors", tensors)
        with pytest.raises(lorakit.LorakitError, match=said):
            open_file(path)


CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"lora_down.weight": (2, 8), "lora_up.weight": (8, 4)}, r"is \[8, 4\], .*: no pair"),
        ({"lora_down.weight": (16,), "lora_up.weight": (8, 2)}, r"is \[16\]: no pair"),
        ({"lora_down.weight": (2, 8), "lora_up.weight": (8, 2, 3, 3)}, "no pair"),
        ({"lora_down.weight": (2, 8), "lora_up.weight": (8, 2), "alpha": (2,)}, r"\[2\], not one"),
        ({"lora_down.weight": (2, 4), "lora_up.weight": (8, 2), "dora_scale": (4,)}, "8 outputs"),
        ({"lora_down.weight": (), "lora_up.weight": (8, 2)}, "no pair"),
        (
            {
                "lora_down.weight": (3, 4, 1, 1),
                "lora_mid.weight": (3, 2, 3, 3),
                "lora_up.weight": (8, 3, 1, 1),
            },
            "no pair",
        ),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (3, 2)}, "no pair"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (4, 2, 1), "lokr_w2_b": (2, 2)}, "no pair"),
        (
            {f"hada_w{n}_{x}": s for n in (1, 2) for x, s in (("a", (8, 3)), ("b", (n, 4)))},
            r"hada_w1_a is \[8, 3\], .*hada_w1_b is \[1, 4\]: no pair",
        ),
    ],
)
def test_factors_without_a_product_are_refused(tmp_path, shapes, said):
    tensors = {f"{CONV}.{k}": np.ones(s, "f4") for k, s in shapes.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(MisfitError, match=said):
        open_file(tmp_path / "a.safetensors", family="sd1")
    assert lorakit.inspect(tmp_path / "a.safetensors").kind  # which looks at names alone


def test_names_of_no_family_are_said_to_be_so(tmp_path):
    tensors = {f"lora_unet_nothing.lora_{x}.weight": (2, 2) for x in ("down", "up")}
    path = kohya(tmp_path / "a.safetensors", tensors)
    with pytest.raises(lorakit.LorakitError, match="no family that is known"):
        lorakit.convert(path, tmp_path / "b", to="diffusers", run=SCRATCH)


def test_the_longest_prefix_is_taken():
    assert prefix_of("unet.base_model.model.conv_in")[1] == "conv_in"
    assert prefix_of("lora_te1_x")[0].slot == "te1"
    assert recognise(["x_embedder"], {}).places


def test_what_several_families_are_called_is_said(tmp_path):
    names = [
        f"transformer.transformer_blocks.0.attn.to_{x}.lora_{y}.weight" for x in "qk" for y in "AB"
    ]
    tensors = {n: np.ones((4, 4), "f4") for n in names}
    save_file(tensors, tmp_path / "a.safetensors")
    options = {"to": "kohya", "run": SCRATCH}
    done = lorakit.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **options)
    assert done.notes[0].startswith("its names fit Stable Diffusion 3, Qwen-Image, HunyuanVideo")
    assert "FLUX.1 is taken, or what --family" in done.notes[0]
    assert "FLUX.1 is taken" in lorakit.inspect(tmp_path / "a.safetensors").notes[0]
    done = lorakit.convert(
        tmp_path / "a.safetensors", tmp_path / "c.safetensors", family="sd3", **options
    )
    assert not done.notes


def test_inspect_says_what_is_wrong(tmp_path):
    path = kohya(tmp_path / "a.safetensors", {"lora_unet_img_in.lora_down.weight": (2, 8)})
    assert "other half" in lorakit.inspect(path).notes[0]
    path = kohya(tmp_path / "b.safetensors", SHARED, bundle=np.ones(3, "f4"))
    assert "'bundle'" in lorakit.inspect(path).notes[0]


def test_a_plain_checkpoint_is_no_adapter(tmp_path):
    save_file({"model.norm.weight": np.ones(3, "f4")}, tmp_path / "model.safetensors")
    assert lorakit.inspect(tmp_path / "model.safetensors").kind != "adapter"
