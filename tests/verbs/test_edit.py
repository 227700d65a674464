"""edit: what is asked for happens, to modules and names; what is not stays, to the byte."""

import numpy as np
import pytest
from safetensors.numpy import save_file

import lorakit
from lorakit.errors import InputError, OutputError, UsageError
from tests.verbs.adapters import config_of, drawn, tensors_of
from tests.verbs.conftest import SCRATCH
from tests.verbs.edit_scene import (
    EMBEDDING,
    EVERYTHING,
    H,
    Q,
    R,
    adapter,
    deltas,
    edited,
    folder,
    pair,
    same_bytes,
)

__all__ = ["folder"]


@pytest.mark.parametrize(
    "options",
    [{"scale": 1.0}, {"dtype": "float32"}, {"rename": ["model=model"]}, {"keep": [""]}],
)
def test_an_edit_that_changes_nothing_gives_the_same_file_and_config(folder, options):
    done = edited(folder, **options)
    assert (done.rounded, done.counts["renamed"], done.counts["dropped"]) == (0, 0, 0)
    one, other = (folder / n / "adapter_model.safetensors" for n in ("adapter", "out"))
    assert one.read_bytes() == other.read_bytes()
    assert config_of(folder / "out") == config_of(folder / "adapter")


def test_every_tensor_is_renamed_with_its_module_and_back(folder):
    done = edited(folder, rename=[r"^model\.=transformer.body."])
    assert done.counts == {"kept": 1, "renamed": 13, "dropped": 0}
    names = {
        n.replace("model.", "transformer.body.", 1) for n in EVERYTHING if n != "lm_head.weight"
    }
    assert tensors_of(folder / "out").keys() == {*names, "lm_head.weight"}
    before, after = deltas(folder / "adapter"), deltas(folder / "out")
    assert all(
        np.array_equal(after[n.replace("model", "transformer.body")], d) for n, d in before.items()
    )
    config = config_of(folder / "out")
    assert "transformer.body.layers.0.self_attn.q_proj" in config["target_modules"]
    assert config["trainable_token_indices"] == {"embed_tokens": [3, 5]}
    assert config["modules_to_save"] == ["norm", "lm_head", "classifier"]
    assert "unknown" in config
    edited(folder, "back", "out", rename=[r"^transformer\.body=model"])
    assert same_bytes(folder / "adapter", folder / "back")
    again = deltas(folder / "back")
    assert all(np.array_equal(again[n], d) for n, d in before.items())


def test_names_keep_the_spelling_that_they_had(tmp_path):
    names = {f"{Q}.lora_A.default.weight": (R, H), f"{Q}.lora_B.default.weight": (H, R)}
    adapter(tmp_path, names)
    edited(tmp_path, rename=["self_attn=attn"])
    assert tensors_of(tmp_path / "out").keys() == {n.replace("self_attn", "attn") for n in names}


@pytest.mark.parametrize("drop", [Q, EMBEDDING, "conv", "attention", "experts", "norm", "lm_head"])
def test_a_module_that_is_dropped_takes_all_of_its_tensors_along_and_nothing_else(folder, drop):
    done = edited(folder, drop=[drop])
    left = {n for n in EVERYTHING if drop not in n}
    assert tensors_of(folder / "out").keys() == left
    assert done.tensors_before - done.tensors == len(EVERYTHING) - len(left)
    before, after = deltas(folder / "adapter"), deltas(folder / "out")
    assert after.keys() == {n for n in before if drop not in n}
    assert all(np.array_equal(before[n], d) for n, d in after.items())


def test_the_config_names_no_more_than_is_left(folder):
    edited(folder, drop=[Q, EMBEDDING, "norm", "down_proj"])
    config = config_of(folder / "out")
    assert config["modules_to_save"] == ["lm_head", "classifier"]
    assert config["trainable_token_indices"] is None
    assert config["bias"] == "none"
    assert config["target_parameters"] == ["model.mlp.experts.gate_up_proj"]
    assert config["target_modules"] == [
        "model.attention",
        "model.conv",
        "model.layers.1.self_attn.q_proj",
    ]


def test_of_saved_modules_of_one_name_the_config_names_those_that_are_left(tmp_path):
    """PEFT stops at a module that the config saves and the file has not."""
    norms = {f"model.layers.{n}.norm.weight": (H,) for n in range(3)}
    factors = {f"{Q}.lora_A.weight": (R, H), f"{Q}.lora_B.weight": (H, R)}
    adapter(tmp_path, factors | norms, modules_to_save=["norm", "score"])
    edited(tmp_path, drop=["layers.1.norm"])
    left = ["model.layers.0.norm", "model.layers.2.norm", "score"]
    assert config_of(tmp_path / "out")["modules_to_save"] == left
    edited(tmp_path, "renamed", drop=["layers.1.norm"], rename=["^model=body"])
    renamed = [n.replace("model", "body") for n in left]
    assert config_of(tmp_path / "renamed")["modules_to_save"] == renamed


def test_what_is_kept_is_what_is_not_dropped(folder):
    edited(folder, keep=["q_proj", "norm"])
    edited(folder, "other", drop=["embed", "conv", "attention$", "out_proj", "experts", "lm_head"])
    assert same_bytes(folder / "out", folder / "other")
    edited(folder, "both", keep=["q_proj", "norm"], drop=["norm"])
    assert "model.norm.weight" not in tensors_of(folder / "both")


def test_a_bare_parameter_whose_outer_one_is_dropped_lies_at_the_surface(folder):
    edited(folder, keep=["gate_up_proj"])
    names = {"model.mlp.experts.lora_A.weight", "model.mlp.experts.lora_B.weight"}
    assert tensors_of(folder / "out").keys() == names
    (found,) = deltas(folder / "out").values()
    np.testing.assert_array_equal(
        found, deltas(folder / "adapter")["model.mlp.experts.gate_up_proj"]
    )


def test_biases_alone_can_be_dropped(folder):
    edited(folder, drop=[r"\.bias$"])
    assert f"{Q}.base_layer.bias" not in tensors_of(folder / "out")
    assert f"{Q}.lora_B.bias" in tensors_of(folder / "out")
    assert config_of(folder / "out")["bias"] == "none"


def test_what_is_no_lora_or_of_an_unknown_kind_is_refused(tmp_path):
    adapter(tmp_path, pair(Q), peft_type="IA3")
    with pytest.raises(InputError, match="is of type IA3"):
        edited(tmp_path, drop=["q_proj"])
    adapter(tmp_path, pair(Q), "new", brand_new=True)
    with pytest.raises(InputError, match="brand_new"):
        edited(tmp_path, source="new", scale=2.0)
    edited(tmp_path, source="new", rename=["self_attn=attn"])
    assert config_of(tmp_path / "out")["brand_new"] is True


def test_small_files_go_along(folder):
    (folder / "adapter/README.md").write_text("mine")
    (folder / "adapter/tokenizer.json").write_text("{}")
    (folder / "adapter/optimizer.pt").write_text("large")
    edited(folder, scale=2.0)
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
    assert sorted(p.name for p in (folder / "out").iterdir()) == names


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "nothing is asked for"),
        ({"drop": ["nowhere"]}, "--drop 'nowhere' is found in no name"),
        ({"keep": ["q_proj", "nowhere"]}, "--keep 'nowhere'"),
        ({"rename": ["nowhere=x"]}, "--rename 'nowhere'"),
        ({"drop": [""]}, "nothing of the adapter would be left"),
        ({"rename": [r"layers\.\d=layers.7"]}, "one name, 'model.layers.7.self_attn.q_proj'"),
        ({"rename": [r"model="]}, "is no name"),
        ({"scale": float("nan")}, "no finite number"),
        ({"alpha": 0.0}, "other than 0"),
        ({"keep_factors": True}, "--alpha"),
        ({"keep_factors": True, "alpha": 2.0, "scale": 2.0}, "leave out --scale"),
        ({"bake": True, "alpha": 2.0}, "leave out --alpha"),
        ({"scale": 1e300}, "would be"),
        ({"dtype": "int8"}, "is none of"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(folder, options, said):
    with pytest.raises(UsageError) as error:
        edited(folder, **options)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert [p.name for p in folder.iterdir()] == ["adapter"]


def test_an_output_that_exists_or_is_the_input_is_left_alone(folder):
    edited(folder, scale=2.0)
    with pytest.raises(OutputError, match="exists"):
        edited(folder, scale=2.0)
    with pytest.raises(OutputError, match="never written to"):
        edited(folder, "adapter", scale=2.0)
    with pytest.raises(UsageError, match="a folder"):
        edited(folder, "x.safetensors", scale=2.0)


def test_a_preview_says_what_a_run_does(folder):
    plan = lorakit.plan_edit(folder / "adapter", flatten=True, drop=["conv"], dtype="bfloat16")
    assert plan.preview() == plan.run(folder / "out", SCRATCH)


def flattened(path, *names):
    """A file of kohya's names, of FLUX.1."""
    tensors = {f"{n}.lora_down.weight": drawn(n, R, H) for n in names}
    tensors |= {f"{n}.lora_up.weight": drawn(n, H, R) for n in names}
    path.parent.mkdir()
    save_file(tensors, path)
    return path


def test_a_file_among_others_leaves_them_where_they_are(tmp_path):
    path = flattened(tmp_path / "downloads/style.safetensors", "lora_unet_img_in")
    for name in ("private.txt", "other.json", "README.md"):
        (path.parent / name).write_text("not of this adapter")
    edited(tmp_path, source="downloads/style.safetensors", scale=2)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"adapter_model.safetensors", "adapter_config.json"}


def test_a_file_for_several_models_is_refused_with_the_way_out(tmp_path):
    text = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    flattened(tmp_path / "downloads/style.safetensors", "lora_unet_img_in", text)
    with pytest.raises(InputError, match="is for text_encoder, transformer") as caught:
        edited(tmp_path, source="downloads/style.safetensors", scale=2)
    assert "convert" in caught.value.hint
