"""extract: what it carries whole beside the factors, and what it refuses to carry."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.errors import InputError, MisfitError
from tests.verbs.adapters import config_of, drawn, tensors_of
from tests.verbs.conftest import SCRATCH

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 40}
Q, NORM, TABLE = "model.layers.0.self_attn.q_proj", "model.norm", "model.embed_tokens"
SHAPES = {f"{TABLE}.weight": (40, 12), f"{Q}.weight": (16, 12), f"{NORM}.weight": (12,)}
EXPERTS = "model.layers.0.mlp.experts"
STACKS = {
    f"{EXPERTS}.gate_up_proj": (3, 6, 8),
    f"{EXPERTS}.gate_up_proj_bias": (3, 8),
    f"{EXPERTS}.down_proj": (3, 4, 6),
    f"{EXPERTS}.down_proj_bias": (3, 6),
    f"{Q}.bias": (16,),
}


def model(folder, tensors, config=LLAMA):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def of(seed, shapes):
    return {n: drawn(seed + n, *s) for n, s in shapes.items()}


def extracted(base, tuned, out, **options):
    return lorakit.extract(base, tuned, out, run=SCRATCH, **{"rank": 12, "other": "save"} | options)


def assert_merges_to(tuned, base, adapter, out):
    """A merge of the adapter is the tuned model; whatever it has more is the base's."""
    lorakit.merge(base, adapter, out, run=SCRATCH)
    found, expected = (load_file(f / "model.safetensors") for f in (out, tuned))
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-4, err_msg=name)


def two(tmp_path, shapes, config=LLAMA, **changed):
    """A base, and a model of other numbers but for what is said; a dot in a name is `__`."""
    base, tuned = of("x", shapes), of("y", shapes)
    tuned |= {n.replace("__", "."): t for n, t in changed.items()}
    return model(tmp_path / "base", base, config), model(tmp_path / "tuned", tuned, config)


def test_biases_of_experts_go_beside_their_factors_and_no_tensor_twice(tmp_path):
    base, tuned = two(tmp_path, SHAPES | STACKS, LLAMA | {"model_type": "gpt_oss"})
    extracted(base, tuned, tmp_path / "out")
    names, config = tensors_of(tmp_path / "out"), config_of(tmp_path / "out")
    assert f"{EXPERTS}.base_layer.base_layer.down_proj_bias" in names
    assert f"{Q}.base_layer.bias" in names  # PEFT takes no lora_bias beside stacks
    assert not any(n.endswith(("down_proj", "gate_up_proj", "lora_B.bias")) for n in names)
    assert (config["bias"], config["lora_bias"]) == ("all", False)
    assert not any("experts" in m for m in config["modules_to_save"])
    assert_merges_to(tuned, base, tmp_path / "out", tmp_path / "merged")


def test_a_bias_that_differs_alone_finds_its_place_as_well(tmp_path):
    base, _ = two(tmp_path, SHAPES | STACKS, LLAMA | {"model_type": "gpt_oss"})
    values = load_file(base / "model.safetensors")
    values[f"{EXPERTS}.down_proj_bias"] += 1
    tuned = model(tmp_path / "biased", values)
    extracted(base, tuned, tmp_path / "out")
    assert f"{EXPERTS}.base_layer.base_layer.down_proj_bias" in tensors_of(tmp_path / "out")
    assert_merges_to(tuned, base, tmp_path / "out", tmp_path / "merged")


@pytest.mark.parametrize("says", [{}, {"tie_word_embeddings": True}])
def test_a_tied_head_goes_along_with_its_table(tmp_path, says):
    base, tuned = two(tmp_path, SHAPES, LLAMA | says)
    extracted(base, tuned, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    table = load_file(tuned / "model.safetensors")[f"{TABLE}.weight"]
    for name in ("lm_head", TABLE):
        np.testing.assert_array_equal(found[f"{name}.weight"], table)
    assert config_of(tmp_path / "out")["modules_to_save"] == ["lm_head", TABLE, NORM]
    assert_merges_to(tuned, base, tmp_path / "out", tmp_path / "merged")


@pytest.mark.parametrize("architecture", ["LlamaModel", "LlamaForSequenceClassification"])
def test_a_model_without_a_head_gets_none(tmp_path, architecture):
    says = {"tie_word_embeddings": True, "architectures": [architecture]}
    base, tuned = two(tmp_path, SHAPES, LLAMA | says)
    extracted(base, tuned, tmp_path / "out")
    assert config_of(tmp_path / "out")["modules_to_save"] == [TABLE, NORM]


def test_a_table_that_is_used_in_several_places_is_refused(tmp_path):
    base, tuned = two(tmp_path, {"shared.weight": (40, 12)}, {"model_type": "t5"})
    with pytest.raises(MisfitError, match=r"'shared.weight' differs, .*--other drop"):
        extracted(base, tuned, tmp_path / "out")


def test_buffers_and_a_head_that_repeats_its_table_are_no_difference(tmp_path):
    base, tuned = two(tmp_path, SHAPES, LLAMA | {"tie_word_embeddings": True})
    values = load_file(tuned / "model.safetensors")
    values["lm_head.weight"] = values[f"{TABLE}.weight"] = drawn("x" + f"{TABLE}.weight", 40, 12)
    values[f"{NORM}.weight"] = drawn("x" + f"{NORM}.weight", 12)
    values["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    other = model(tmp_path / "other", values, LLAMA | {"tie_word_embeddings": True})
    extracted(base, other, tmp_path / "out", other="")
    assert config_of(tmp_path / "out")["modules_to_save"] is None


def test_a_head_for_classes_is_carried_and_the_old_one_left_out(tmp_path):
    base = model(tmp_path / "base", of("x", SHAPES | {"lm_head.weight": (40, 12)}))
    labels = {**LLAMA, "architectures": ["LlamaForSequenceClassification"]}
    tuned = model(tmp_path / "tuned", of("y", SHAPES | {"score.weight": (3, 12)}), labels)
    said = "1 tensors of the base are not in the other.*--other drop"
    with pytest.raises(MisfitError, match=said):
        extracted(base, tuned, tmp_path / "out", other="")
    report = extracted(base, tuned, tmp_path / "out")
    assert report.notes == ("1 tensors are in the base alone, first 'lm_head.weight': left out.",)
    config = config_of(tmp_path / "out")
    assert ("score" in config["modules_to_save"], config["task_type"]) == (True, None)
    assert_merges_to(tuned, base, tmp_path / "out", tmp_path / "merged")
    notes = extracted(base, tuned, tmp_path / "left", other="drop").notes
    assert notes[0] == "3 tensors that differ are left out, as asked."


def test_a_base_that_has_more_than_heads_is_not_saved_from(tmp_path):
    base, _ = two(tmp_path, SHAPES | {"lm_head.weight": (40, 12)})
    lacking = {n: t for n, t in of("y", SHAPES).items() if "norm" not in n}
    with pytest.raises(MisfitError, match="1 tensors of the base are not"):
        extracted(base, model(tmp_path / "lacking", lacking), tmp_path / "out")


def test_names_that_have_nothing_in_common_are_refused_whatever_is_asked(tmp_path):
    base, _ = two(tmp_path, SHAPES)
    other = model(tmp_path / "other", {f"m.{n}": t for n, t in of("y", SHAPES).items()})
    for way in ("save", "drop"):
        with pytest.raises(MisfitError, match="3 tensors of the base are not in the other"):
            extracted(base, other, tmp_path / "out", other=way)


VIT = {"vit.embeddings.cls_token": (1, 1, 8), "vit.embeddings.projection.weight": (8, 3, 4, 4)}
VIT |= {"vit.layer.0.dense.weight": (8, 8), "vit.layer.0.dense.bias": (8,)}


def test_a_small_module_with_weights_inside_is_carried_whole(tmp_path):
    base, tuned = two(tmp_path, VIT, {})
    extracted(base, tuned, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["modules_to_save"] == ["vit.embeddings"]
    assert config["target_modules"] == ["vit.layer.0.dense"]
    assert_merges_to(tuned, base, tmp_path / "out", tmp_path / "merged")


MIXER = {"layers.0.mixer.A_log": (8, 4), "layers.0.mixer.in_proj.weight": (8, 8)}
MIXER |= {"layers.1.mlp.up.weight": (8, 8), "layers.0.mixer.conv1d.weight": (8, 1, 4)}


def test_a_layer_is_not_saved_around_its_factors(tmp_path):
    base, tuned = two(tmp_path, MIXER, {})
    said = r"'layers.0.mixer' has a tensor .*--exclude-modules '\^layers\\\.\\d\+\\\.mixer'"
    with pytest.raises(MisfitError, match=said):
        extracted(base, tuned, tmp_path / "out")
    extracted(base, tuned, tmp_path / "out", exclude_modules=r"^layers\.\d+\.mixer")
    assert config_of(tmp_path / "out")["modules_to_save"] == ["layers.0.mixer"]
    assert_merges_to(tuned, base, tmp_path / "out", tmp_path / "merged")


def test_a_convolution_in_groups_is_carried_and_gets_no_factors(tmp_path):
    base, tuned = two(
        tmp_path, MIXER, {}, layers__0__mixer__A_log=drawn("xlayers.0.mixer.A_log", 8, 4)
    )
    report = extracted(base, tuned, tmp_path / "out")
    assert [r.name for r in report.rows] == [
        "layers.0.mixer.in_proj.weight",
        "layers.1.mlp.up.weight",
    ]
    assert config_of(tmp_path / "out")["modules_to_save"] == ["layers.0.mixer.conv1d"]


def test_what_peft_would_save_by_the_same_name_is_carried_as_well(tmp_path):
    shapes = {"norm.weight": (8,), "layers.0.norm.weight": (8,), "layers.0.q.weight": (8, 8)}
    same = {"layers__0__norm__weight": drawn("xlayers.0.norm.weight", 8)}
    base, tuned = two(tmp_path, shapes, {}, **same)
    extracted(base, tuned, tmp_path / "out")
    assert config_of(tmp_path / "out")["modules_to_save"] == ["layers.0.norm", "norm"]
    assert_merges_to(tuned, base, tmp_path / "out", tmp_path / "merged")


@pytest.mark.parametrize("name", ["cls_token", "embeddings.cls_token"])
def test_what_peft_cannot_save_by_its_name_is_refused(tmp_path, name):
    shapes = {name: (1, 1, 8), "embeddings.patch_embeddings.x.weight": (8, 8)}
    base, tuned = two(tmp_path, shapes, {})
    with pytest.raises(MisfitError, match="PEFT cannot save it whole: names of others"):
        extracted(base, tuned, tmp_path / "out")


@pytest.mark.parametrize("name", [f"{NORM}.weight", f"{Q}.bias"])
def test_nan_is_refused_in_what_has_no_factors_too(tmp_path, name):
    shapes = {**SHAPES, f"{Q}.bias": (16,)}
    bad = np.full(shapes[name], np.nan, np.float32)
    base, tuned = two(tmp_path, shapes, **{name.replace(".", "__"): bad})
    with pytest.raises(InputError, match=f"{name}' holds NaN"):
        extracted(base, tuned, tmp_path / "out")
    assert not (tmp_path / "out").exists()
