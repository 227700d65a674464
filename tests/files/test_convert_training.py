"""What factors alone do not say: what a config tells of the training, biases and norms of only some
modules, embeddings, scalings of nothing.
"""

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import lorakit
from lorakit.adapter.files.reading import open_file
from lorakit.errors import InputError, LorakitError, MisfitError, UsageError
from tests.files.making_loras import RANK, diffusers_file, updates
from tests.files.test_convert_losses import kohya, saved
from tests.verbs.adapters import config_of, deltas, pair, save

SCRATCH = lorakit.RunOptions(sync=False)
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
PLAIN = {**pair(Q, 12, 8, 2), **pair(UP, 20, 12, 2)}
TRAINED = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "loftq": {"init_lora_weights": "loftq"},
    "kasa": {"kasa_config": {"beta": 1}},
    "invocation": {"alora_invocation_tokens": [1, 2]},
    "qalora": {"use_qalora": True},
    "bdlora": {"use_bdlora": {"nblocks": 2}},
    "layer_replication": {"layer_replication": [[0, 2], [0, 2]]},
    "target_parameters": {"target_parameters": ["experts.down_proj"]},
    "IA3": {"peft_type": "IA3"},
}


@pytest.mark.parametrize("said", TRAINED)
def test_what_only_peft_has_a_place_for_is_refused(tmp_path, said):
    path = save(tmp_path / "a", PLAIN, **TRAINED[said])
    with pytest.raises(InputError, match=said) as caught:
        lorakit.convert(path, tmp_path / "b", to="mlx", run=SCRATCH)
    assert caught.value.hint
    assert lorakit.convert(path, tmp_path / "c", to="peft", run=SCRATCH).modules == 2


@pytest.mark.parametrize("to", ["kohya", "diffusers", "comfyui"])
def test_an_adapter_of_an_image_model_says_it_too(tmp_path, to):
    path = save(
        tmp_path / "a", pair("transformer_blocks.0.attn.to_q", 12, 8, 2), **TRAINED["olora"]
    )
    with pytest.raises(InputError, match="olora"):
        lorakit.convert(path, tmp_path / "b", to=to, family="flux", run=SCRATCH)


@pytest.mark.parametrize("alphas", [(0, 0), (0, 3)])
def test_a_scaling_of_nothing_is_nothing(tmp_path, alphas):
    config = {"lora_alpha": alphas[0], "alpha_pattern": {"up_proj": alphas[1]}}
    path = save(tmp_path / "a", PLAIN, **config)
    lorakit.convert(path, tmp_path / "b", to="mlx", run=SCRATCH)
    found = {d.module: d for d in open_file(tmp_path / "b").deltas}
    assert not found[Q].tensors["b"].read().any()
    assert found[UP].tensors["b"].read().any() == bool(alphas[1])


def test_nothing_left_is_refused(tmp_path):
    path = save(tmp_path / "a", PLAIN)
    for to in ("mlx", "peft"):
        with pytest.raises(UsageError, match="nothing of the adapter"):
            lorakit.convert(path, tmp_path / "b", to=to, drop=".*", run=SCRATCH)


def test_parts_of_a_fused_projection_of_old_are_told_as_such(tmp_path):
    """B has a column for each rank of a part, and is no pair with A as a whole."""
    name = "transformer.h.0.self_attention.query_key_value"
    shapes = {f"{name}.lora_A.weight": (4, 8), f"{name}.lora_B.weight": (16, 2, 1)}
    path = save(tmp_path / "a", shapes, enable_lora=[True, False, True], merge_weights=False)
    for run in (
        lambda: lorakit.convert(path, tmp_path / "b", to="peft", run=SCRATCH),
        lambda: lorakit.check(path, "peft"),
    ):
        with pytest.raises(InputError, match="enable_lora") as caught:
            run()
        assert "lorakit extract BASE" in caught.value.hint


WHOLE = {
    "lm_head.weight": (40, 12),
    "model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 8),
    f"{Q}.base_layer.bias": (12,),
}
SAID = {
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": {"embed_tokens": [1, 2]},
    "bias": "lora_only",
}


@pytest.mark.parametrize("dropped", ["", "lm_head|trainable", "bias$"])
def test_a_config_says_of_what_is_held_whole_what_is_carried(tmp_path, dropped):
    """PEFT passes over a saved module that its config does not name."""
    path = save(tmp_path / "a", {**PLAIN, **WHOLE}, **SAID)
    lorakit.convert(
        path, tmp_path / "b", to="peft", alpha="fold", keep_unknown=True, drop=dropped, run=SCRATCH
    )
    gone = dropped.startswith("lm_head")
    found = config_of(tmp_path / "b")
    assert found["modules_to_save"] == (None if gone else ["lm_head"])
    assert bool(found["trainable_token_indices"]) != gone
    assert found["bias"] == ("none" if dropped == "bias$" else "lora_only")


@pytest.mark.parametrize("alpha", ["keep", "fold"])
def test_an_embedding_is_a_module_of_its_own(tmp_path, alpha):
    """Which the config names, and whose scaling is folded with those of the others."""
    tokens = "model.embed_tokens"
    more = {f"{tokens}.lora_embedding_A": (2, 40), f"{tokens}.lora_embedding_B": (8, 2)}
    path = save(tmp_path / "a", {**PLAIN, **more}, alpha_pattern={"embed_tokens": 5})
    lorakit.convert(path, tmp_path / "b", to="peft", alpha=alpha, drop="up_proj", run=SCRATCH)
    assert tokens in config_of(tmp_path / "b")["target_modules"]
    before, after = deltas(path), deltas(tmp_path / "b")
    assert set(after) == {f"{tokens}.weight", f"{Q}.weight"}
    for name, delta in after.items():
        np.testing.assert_allclose(delta, before[name], rtol=1e-6, atol=1e-6)


def test_a_pattern_that_leaves_nothing_out_is_refused(tmp_path):
    path = save(tmp_path / "a", PLAIN)
    with pytest.raises(UsageError, match="is found in no name") as caught:
        lorakit.convert(path, tmp_path / "b", to="mlx", drop="lm_hed", run=SCRATCH)
    assert Q in caught.value.hint


WAN = "diffusion_model.blocks.0."
ONE, OTHER = f"{WAN}self_attn.q", f"{WAN}ffn.0"


def wan(path, *, alpha=RANK, **more):
    tensors = {**kohya(ONE), **kohya(OTHER, rows=32)}
    tensors |= {f"{m}.alpha": np.array(alpha, "f4") for m in (ONE, OTHER)}
    return saved(path, tensors | {f"{ONE}.{n}": np.ones(s, "f4") for n, s in more.items()})


@pytest.mark.parametrize("alpha", [RANK, RANK / 2])
@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_a_bias_of_one_module_is_a_bias_of_all(tmp_path, to, alpha):
    """Readers make room for one in every module, and leave it as it comes if the file has none."""
    path = wan(tmp_path / "a.safetensors", alpha=alpha, diff_b=(16,))
    lorakit.convert(path, tmp_path / "b", to=to, run=SCRATCH)
    file = next((tmp_path / "b").glob("*.safetensors"))
    found = {n: v for n, v in load_file(file).items() if n.endswith("lora_B.bias")}
    assert [v.any() for _, v in sorted(found.items())] == [True, False]
    assert [len(v) for _, v in sorted(found.items())] == [16, 32]
    if to == "peft":
        assert json.loads((tmp_path / "b/adapter_config.json").read_text())["lora_bias"]
        return
    with safe_open(file, "np") as opened:
        told = json.loads(opened.metadata().get("lora_adapter_metadata", "{}"))
    assert told.get("transformer.lora_bias", False) == (alpha != RANK)


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_norms_of_some_modules_only_are_refused(tmp_path, to):
    path = wan(tmp_path / "a.safetensors", dora_scale=(16, 1))
    with pytest.raises(MisfitError, match="has all or none"):
        lorakit.convert(path, tmp_path / "b", to=to, run=SCRATCH)
    lorakit.convert(path, tmp_path / "c", to=to, drop="ffn", run=SCRATCH)
    lorakit.convert(path, tmp_path / "d", to="comfyui", run=SCRATCH)


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_norms_and_biases_together_are_refused(tmp_path, to):
    tensors = load_file(wan(tmp_path / "a.safetensors", diff_b=(16,)))
    tensors |= {f"{m}.dora_scale": np.ones((r, 1), "f4") for m, r in ((ONE, 16), (OTHER, 32))}
    path = saved(tmp_path / "b.safetensors", tensors)
    with pytest.raises(MisfitError, match="norms and biases"):
        lorakit.convert(path, tmp_path / "c", to=to, run=SCRATCH)
    lorakit.convert(path, tmp_path / "d", to="comfyui", run=SCRATCH)


def test_a_bias_that_an_alpha_of_nothing_would_take_is_refused(tmp_path):
    path = wan(tmp_path / "a.safetensors", alpha=0, diff_b=(16,))
    with pytest.raises(MisfitError, match="scaling of 0") as caught:
        lorakit.convert(path, tmp_path / "b", to="diffusers", run=SCRATCH)
    assert "--alpha fold" in caught.value.hint
    lorakit.convert(path, tmp_path / "c", to="diffusers", alpha="fold", run=SCRATCH)


@pytest.mark.parametrize("to", ["diffusers", "comfyui", "peft"])
def test_an_alpha_that_is_no_number_is_refused(tmp_path, to):
    path = wan(tmp_path / "a.safetensors", alpha=np.nan)
    with pytest.raises(LorakitError, match=r"alpha is nan") as caught:
        lorakit.convert(path, tmp_path / "b", to=to, run=SCRATCH)
    assert caught.value.exit_code == 3
    assert caught.value.tensor == f"{OTHER}.alpha"


@pytest.mark.parametrize(
    "there", [["lokr_w1"], ["hada_w1_a", "hada_w1_b"], ["lokr_w1", "lokr_w2_a"]]
)
def test_half_a_product_is_refused(tmp_path, there):
    name = "lora_unet_single_blocks_0_modulation_lin"
    path = saved(tmp_path / "a.safetensors", {f"{name}.{r}": np.ones((4, 4), "f4") for r in there})
    with pytest.raises(MisfitError, match="has no w2_") as caught:
        lorakit.convert(path, tmp_path / "b", to="diffusers", run=SCRATCH)
    assert "a.safetensors" in str(caught.value)
    with pytest.raises(MisfitError, match="has no w2_"):
        lorakit.check(path, "comfyui")


def test_rows_without_halves_are_refused_by_name(tmp_path):
    name = "lora_unet_final_layer_adaLN_modulation_1"
    path = saved(tmp_path / "a.safetensors", kohya(name, 15))
    with pytest.raises(MisfitError, match="15 rows") as caught:
        lorakit.convert(path, tmp_path / "b", to="diffusers", family="flux", run=SCRATCH)
    assert caught.value.tensor.startswith(name)


CONV = "lora_unet_down_blocks_0_resnets_0_conv1"
KERNELS = {
    "loha": {"hada_w1_a": (8, 3), "hada_w1_b": (3, 36), "hada_w2_a": (8, 3), "hada_w2_b": (3, 36)},
    "loha, cores": {
        **{f"hada_t{n}": (3, 3, 3, 3) for n in (1, 2)},
        **{f"hada_w{n}_a": (3, 8) for n in (1, 2)},
        **{f"hada_w{n}_b": (3, 4) for n in (1, 2)},
    },
    "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 18)},
}


@pytest.mark.parametrize("kind", KERNELS)
def test_factors_of_a_convolution_keep_its_kernel(tmp_path, kind):
    rng = np.random.default_rng(0)
    tensors = {f"{CONV}.{n}": rng.standard_normal(s).astype("f4") for n, s in KERNELS[kind].items()}
    path = saved(tmp_path / "a.safetensors", tensors)
    options = {"to": "diffusers", "family": "sd1", "run": SCRATCH}
    lorakit.convert(path, tmp_path / "b.safetensors", **options)
    found = load_file(tmp_path / "b.safetensors")
    shapes = {n.rpartition(".lora_")[2]: v.shape for n, v in found.items()}
    assert shapes["A.weight"][1:] == (4, 3, 3)
    assert shapes["B.weight"][0] == 8
    assert shapes["B.weight"][2:] == (1, 1)
    one, other = (updates(tmp_path / f"{n}.safetensors", family="sd1") for n in "ab")
    assert all(np.allclose(one[k], other[k], rtol=1e-5, atol=1e-6) for k in one)


def test_metadata_names_clip_as_every_release_of_transformers_finds_it(tmp_path):
    layer = "lora_te1_text_model_encoder_layers_0_"
    tensors = {**kohya(f"{layer}mlp_fc1"), **kohya(f"{layer}mlp_fc2")}
    tensors |= {f"{layer}mlp_{x}.alpha": np.array(a, "f4") for x, a in (("fc1", 1), ("fc2", 3))}
    path = saved(tmp_path / "a.safetensors", tensors)
    out = tmp_path / "b.safetensors"
    lorakit.convert(path, out, to="diffusers", family="sdxl", run=SCRATCH)
    with safe_open(out, "np") as opened:
        told = opened.metadata()["lora_adapter_metadata"]
    assert "text_model" not in told
    one, other = updates(path, family="sdxl"), updates(out, family="sdxl")
    assert all(np.allclose(one[k], other[k], rtol=1e-6) for k in one)


@pytest.mark.parametrize("rslora", [False, True])
def test_a_header_of_a_lone_model_tells_its_scalings(tmp_path, rslora):
    front = "transformer."  # which `save_lora_adapter` of Diffusers leaves out, in the header too
    alone = {
        n.removeprefix(front): v for n, v in diffusers_file("flux").items() if n.startswith(front)
    }
    one = "single_transformer_blocks.0.attn.to_k"
    told = {"r": RANK, "lora_alpha": 6, "use_rslora": rslora, "alpha_pattern": {one: 10}}
    path = saved(tmp_path / "a.safetensors", alone, lora_adapter_metadata=json.dumps(told))
    root = RANK**0.5 if rslora else RANK
    factors = {n.removesuffix(".lora_A.weight"): n for n in alone if n.endswith("A.weight")}
    opened = lorakit.open_adapter(str(path))
    assert factors.keys() == opened.modules.keys()
    assert one in factors
    found = updates(path)
    for name, a in factors.items():
        alpha = 10 if name == one else 6
        exact = alpha / root * (alone[a.replace("A.w", "B.w")].astype("f8") @ alone[a])
        assert np.allclose(found["transformer", name], exact, rtol=1e-6)
        assert np.isclose(opened.config.scaling(name, RANK), alpha / root)


@pytest.mark.parametrize("front", ["", "transformer."])
@pytest.mark.parametrize(
    ("field", "value"), [("init_lora_weights", "pissa"), ("alora_invocation_tokens", [1])]
)
def test_a_header_that_says_more_than_factors_do_is_refused(tmp_path, front, field, value):
    tensors = {n.removeprefix("transformer."): v for n, v in diffusers_file("flux").items()}
    tensors = {f"{front}{n}": v for n, v in tensors.items() if not n.startswith("text_encoder")}
    told = json.dumps({f"{front}{n}": v for n, v in (("r", 2), ("lora_alpha", 2), (field, value))})
    path = saved(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=told)
    calls = (
        lambda: lorakit.open_adapter(path),
        lambda: lorakit.convert(path, tmp_path / "b", to="peft", run=SCRATCH),
    )
    for call in calls:
        with pytest.raises(InputError, match=f"{value}|{field}"):
            call()
    assert lorakit.inspect(path).kind == "adapter"


@pytest.mark.parametrize("to", ["comfyui", "kohya"])
def test_folded_scalings_leave_an_alpha_of_the_rank(tmp_path, to):
    path = wan(tmp_path / "a.safetensors", alpha=RANK * 3)
    done = lorakit.convert(path, tmp_path / "b.safetensors", to=to, alpha="fold", run=SCRATCH)
    assert done.counts == {"folded": 2}
    found = load_file(tmp_path / "b.safetensors")
    assert {float(v) for n, v in found.items() if n.endswith(".alpha")} == {RANK}
    one, other = (updates(tmp_path / f"{n}.safetensors") for n in "ab")
    assert all(np.allclose(one[k], other[k], rtol=1e-6) for k in one)


def test_where_scalings_cannot_be_folded_a_note_says_so(tmp_path):
    path = save(tmp_path / "a", PLAIN)
    done = lorakit.convert(path, tmp_path / "b", to="mlx", alpha="fold", run=SCRATCH)
    assert any("--alpha" in note for note in done.notes)


def test_a_raw_dump_of_peft_is_written_in_the_names_that_it_loads(tmp_path):
    raw = {n.replace(".weight", ".default.weight"): v for n, v in PLAIN.items()}
    path = save(tmp_path / "a", raw)
    lorakit.convert(path, tmp_path / "b", to="peft", run=SCRATCH)
    found = load_file(tmp_path / "b/adapter_model.safetensors")
    assert set(found) == {f"base_model.model.{n}" for n in PLAIN}
    lorakit.convert(tmp_path / "b", tmp_path / "c", to="peft", run=SCRATCH)
    name = "adapter_model.safetensors"
    assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
