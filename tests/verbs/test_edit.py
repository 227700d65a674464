"""edit: what is asked for happens, to deltas and names; what is not stays, to the byte."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.adapter.adapter import open_adapter
from lorakit.adapter.weights import adapted
from lorakit.errors import InputError, MisfitError, OutputError, UsageError
from lorakit.math.lowrank import delta
from tests.verbs.adapters import PREFIX, config_of, drawn, tensors_of
from tests.verbs.conftest import SCRATCH

H, E, R, V = 6, 3, 2, 10
Q = "model.layers.0.self_attn.q_proj"
EMBEDDING = "model.embed_tokens"


def adapter(folder, tensors, name="adapter", **config):
    """An adapter with these tensors, by name without the prefix: an array, or a shape to draw."""
    made = {PREFIX + n: t if hasattr(t, "dtype") else drawn(n, *t) for n, t in tensors.items()}
    (folder / name).mkdir()
    save_file(made, folder / name / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 3, **config}
    (folder / name / "adapter_config.json").write_text(json.dumps(config))
    return folder / name


def pair(module, out=H, inner=H, rank=R):
    return {f"{module}.lora_A.weight": (rank, inner), f"{module}.lora_B.weight": (out, rank)}


def edited(folder, name="out", source="adapter", **options):
    return lorakit.edit(folder / source, folder / name, run=SCRATCH, **options)


def deltas(folder, **reading):
    """What each weight gains, in float64."""
    found = adapted(open_adapter(str(folder)), **reading)
    return {
        key: np.concatenate([delta(x, "float64") for x in one.lows("float64")])
        for key, one in found.items()
    }


def same_bytes(one, other):
    return {n: (t.dtype, t.tobytes()) for n, t in tensors_of(one).items()} == {
        n: (t.dtype, t.tobytes()) for n, t in tensors_of(other).items()
    }


EVERYTHING = {
    **pair(Q),
    f"{Q}.lora_B.bias": (H,),
    f"{Q}.base_layer.bias": (H,),
    **pair("model.layers.1.self_attn.q_proj", rank=4),
    "model.conv.lora_A.weight": (R, 4, 3),
    "model.conv.lora_B.weight": (5, R, 1),
    f"{EMBEDDING}.lora_embedding_A": (R, V),
    f"{EMBEDDING}.lora_embedding_B": (H, R),
    f"{EMBEDDING}.token_adapter.trainable_tokens_delta": (2, H),
    f"{EMBEDDING}.base_layer.weight": (V, H),
    **pair("model.attention", 3 * H),
    "model.attention.base_layer.out_proj.lora_A.weight": (R, H),
    "model.attention.base_layer.out_proj.lora_B.weight": (H, R),
    "model.mlp.experts.base_layer.lora_A.weight": (E * R, H),
    "model.mlp.experts.base_layer.lora_B.weight": (8, R * E),
    "model.mlp.experts.lora_A.weight": (E * R, 4),
    "model.mlp.experts.lora_B.weight": (H, R * E),
    "model.norm.weight": (H,),
    "lm_head.weight": (V, H),
    f"{Q}.lora_velora_embed": (3,),
}
CONFIG = {
    "lora_bias": True,
    "bias": "lora_only",
    "target_modules": ["q_proj", "conv", "embed_tokens", "attention"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    "modules_to_save": ["norm", "lm_head", "classifier"],
    "trainable_token_indices": {"embed_tokens": [3, 5]},
    "rank_pattern": {"layers.1.self_attn.q_proj": 4},
    "alpha_pattern": {"conv": 5, "q_proj": 7},
    "peft_version": "0.21.2",
    "unknown": None,
}


@pytest.fixture
def folder(tmp_path):
    """A folder with an adapter that has a bit of everything."""
    adapter(tmp_path, EVERYTHING, **CONFIG)
    return tmp_path


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


SLOW = settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SLOW
@given(scale=st.floats(-8, 8, allow_subnormal=False), rslora=st.booleans())
def test_scale_multiplies_every_delta_and_no_byte_of_a_factor(folder, scale, rslora):
    for old in ("adapter", "out"):
        shutil.rmtree(folder / old, ignore_errors=True)
    adapter(folder, EVERYTHING, **CONFIG, use_rslora=rslora)
    done = edited(folder, scale=scale)
    assert done.rounded == 0
    assert same_bytes(folder / "adapter", folder / "out")
    before, after = deltas(folder / "adapter"), deltas(folder / "out")
    for name, found in after.items():
        np.testing.assert_allclose(found, scale * before[name], rtol=1e-14, atol=1e-300)
    assert config_of(folder / "out")["target_modules"] == CONFIG["target_modules"]


KEEPING = [
    {"bake": True},
    {"flatten": True},
    {"flatten": True, "bake": True},
    {"alpha": 16.0},
    {"flatten": True, "alpha": 5.5},
]


@pytest.mark.parametrize("options", KEEPING)
@pytest.mark.parametrize("rslora", [False, True])
def test_scalings_told_in_another_way_keep_every_delta(tmp_path, options, rslora):
    adapter(tmp_path, EVERYTHING, **CONFIG, use_rslora=rslora)
    done = edited(tmp_path, **options)
    before, after = deltas(tmp_path / "adapter"), deltas(tmp_path / "out")
    assert done.rounded > 0
    assert before.keys() == after.keys()
    for name, found in after.items():
        limit = 2.0**-22 * np.abs(before[name]).max()
        np.testing.assert_allclose(found, before[name], rtol=0, atol=limit)
    bias = [
        one[f"{Q}.weight"].bias("float64")
        for one in (adapted(open_adapter(str(tmp_path / n))) for n in ("adapter", "out"))
    ]
    np.testing.assert_allclose(bias[1], bias[0], rtol=2.0**-22)


def test_a_baked_adapter_has_scalings_of_one(folder):
    done = edited(folder, bake=True)
    assert {c.scaling for c in done.changes if c.kind == "update"} == {1.0}
    config = config_of(folder / "out")
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    assert not config.get("use_rslora")
    longer = {"model.layers.1.self_attn.q_proj": 4}
    assert config["rank_pattern"] == config["alpha_pattern"] == longer


def test_a_flattened_adapter_has_one_rank_and_one_alpha_and_no_patterns(folder):
    done = edited(folder, flatten=True)
    updates = [c for c in done.changes if c.kind == "update"]
    assert {(c.rank, c.scaling) for c in updates} == {(4, 1.5)}  # what most had
    assert sum(c.factor == 1.0 for c in updates) == 5
    config = config_of(folder / "out")
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    shapes = {n: t.shape for n, t in tensors_of(folder / "out").items()}
    assert shapes["model.conv.lora_A.weight"] == (4, 4, 3)
    assert shapes["model.conv.lora_B.weight"] == (5, 4, 1)
    assert shapes["model.mlp.experts.lora_A.weight"] == (E * 4, 4)
    assert shapes[f"{EMBEDDING}.lora_embedding_B"] == (H, 4)


def test_stacks_of_the_other_packing_are_padded_in_it(folder):
    edited(folder, flatten=True, expert_packing="unsloth")
    before, after = (deltas(folder / n, packing="unsloth") for n in ("adapter", "out"))
    for name, found in after.items():
        np.testing.assert_allclose(found, before[name], atol=1e-5)


@pytest.mark.parametrize("alpha", [1, 8, 64])
def test_powers_of_two_round_nothing(tmp_path, alpha):
    adapter(tmp_path, pair(Q, rank=4), lora_alpha=16, r=4)
    assert edited(tmp_path, bake=True).rounded == 0
    assert edited(tmp_path, "other", alpha=alpha).rounded == 0
    before = deltas(tmp_path / "adapter")
    for name in ("out", "other"):
        np.testing.assert_array_equal(deltas(tmp_path / name)[f"{Q}.weight"], before[f"{Q}.weight"])


def test_an_alpha_that_leaves_the_factors_changes_the_strength_and_says_so(folder):
    done = edited(folder, alpha=6.0, keep_factors=True)
    assert same_bytes(folder / "adapter", folder / "out")
    assert done.notes == ("8 updates change their strength, as asked.",)
    before, after = deltas(folder / "adapter"), deltas(folder / "out")
    conv = "model.conv.weight"
    np.testing.assert_allclose(after[conv], 6 / 5 * before[conv])


def test_another_dtype_is_rounded_once_and_counted(folder):
    import ml_dtypes

    done = edited(folder, dtype="bfloat16")
    before, after = (
        load_file(folder / n / "adapter_model.safetensors") for n in ("adapter", "out")
    )
    rounded = {n: t.astype(ml_dtypes.bfloat16) for n, t in before.items()}
    assert all(after[n].tobytes() == t.tobytes() for n, t in rounded.items())
    assert done.rounded == sum(int((rounded[n] != t).sum()) for n, t in before.items())
    assert edited(folder, "wide", "out", dtype="float32").rounded == 0


def test_a_scaling_and_a_dtype_together_round_once(tmp_path):
    adapter(tmp_path, pair(Q))
    edited(tmp_path, bake=True, dtype="float16")
    found = tensors_of(tmp_path / "out")[f"{Q}.lora_B.weight"]
    expected = (drawn(f"{Q}.lora_B.weight", H, R).astype("f8") * 1.5).astype("f2")
    np.testing.assert_array_equal(found, expected)


def test_a_number_that_the_dtype_cannot_hold_is_refused_and_nothing_is_left(tmp_path):
    adapter(tmp_path, pair(Q), lora_alpha=1e6)
    with pytest.raises(MisfitError, match="does not fit float16"):
        edited(tmp_path, bake=True, dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_strength_leaves_what_replaces_the_base_and_says_so(folder):
    done = edited(folder, scale=2.0)
    (note,) = done.notes
    assert "5 tensors that replace" in note


DORA = {**pair(Q), f"{Q}.lora_magnitude_vector": np.abs(drawn("m", H)) + 1}


def test_dora_is_baked_but_not_scaled(tmp_path):
    adapter(tmp_path, DORA, use_dora=True)
    edited(tmp_path, bake=True)
    found = tensors_of(tmp_path / "out")
    np.testing.assert_array_equal(
        found[f"{Q}.lora_magnitude_vector"], DORA[f"{Q}.lora_magnitude_vector"]
    )
    with pytest.raises(InputError, match="DoRA"):
        edited(tmp_path, "other", scale=0.5)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"init_lora_weights": "pissa"}, {"bake": True}),
        ({"init_lora_weights": "olora"}, {"flatten": True}),
        ({"init_lora_weights": "corda"}, {"scale": 2.0}),
        ({"init_lora_weights": "loftq"}, {"scale": 2.0}),
    ],
)
def test_what_is_half_of_a_delta_keeps_its_strength(tmp_path, config, options):
    adapter(tmp_path, pair(Q), **config)
    with pytest.raises(InputError, match="base"):
        edited(tmp_path, **options)
    edited(tmp_path, rename=["self_attn=attn"], dtype="bfloat16")


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
