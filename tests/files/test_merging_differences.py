"""Files that say by how much a weight changes as a whole: differences, norms, and new values."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.errors import MisfitError

SCRATCH = lorakit.RunOptions(sync=False)
FRONT = "diffusion_model.blocks.0."
LAYER = "text_model.encoder.layers.0"
QUERY = "blocks.0.attn1.to_q"


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


@pytest.fixture
def base(tmp_path):
    """A part of Wan in the names of Diffusers."""
    (tmp_path / "base").mkdir()
    tensors = {
        f"{QUERY}.weight": drawn(8, 8, seed=1),
        f"{QUERY}.bias": drawn(8, seed=2),
        "blocks.0.attn1.norm_q.weight": drawn(8, seed=3),
        "blocks.0.norm2.weight": drawn(8, seed=4),
        "blocks.0.norm2.bias": drawn(8, seed=5),
        "blocks.0.ffn.net.2.weight": drawn(8, 16, seed=6),
        "blocks.0.ffn.net.2.bias": drawn(8, seed=7),
        "patch_embedding.weight": drawn(8, 4, 1, 2, 2, seed=8),
    }
    save_file(tensors, tmp_path / "base/model.safetensors")
    return tmp_path / "base"


def merged(base, tensors, tmp_path, **options):
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    lorakit.merge(base, tmp_path / "a.safetensors", tmp_path / "out", run=SCRATCH, **options)
    before, after = (load_file(p / "model.safetensors") for p in (base, tmp_path / "out"))
    return {n: after[n].astype("f8") - v for n, v in before.items() if not (after[n] == v).all()}


def test_differences_of_weights_norms_and_biases_are_added_as_they_are(base, tmp_path):
    wanted = {
        f"{QUERY}.weight": (f"{FRONT}self_attn.q.diff", drawn(8, 8, seed=11)),
        f"{QUERY}.bias": (f"{FRONT}self_attn.q.diff_b", drawn(8, seed=12)),
        "blocks.0.attn1.norm_q.weight": (f"{FRONT}self_attn.norm_q.diff", drawn(8, seed=13)),
        "blocks.0.norm2.weight": (f"{FRONT}norm3.w_norm", drawn(8, seed=14)),
        "blocks.0.norm2.bias": (f"{FRONT}norm3.b_norm", drawn(8, seed=15)),
        "blocks.0.ffn.net.2.bias": (f"{FRONT}ffn.2.diff_b", drawn(8, seed=16)),
        "patch_embedding.weight": (
            "diffusion_model.patch_embedding.diff",
            drawn(8, 4, 1, 2, 2, seed=17),
        ),
    }
    found = merged(base, dict(wanted.values()), tmp_path, weights=[0.5])
    assert set(found) == set(wanted)
    for name, (_, values) in wanted.items():
        np.testing.assert_allclose(found[name], 0.5 * values.astype("f8"), atol=1e-6)


def test_a_bias_beside_factors_is_not_scaled_with_them(base, tmp_path):
    a, b, bias = drawn(2, 8, seed=21), drawn(8, 2, seed=22), drawn(8, seed=23)
    name = f"{FRONT}self_attn.q"
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, f"{name}.diff_b": bias}
    found = merged(base, {**tensors, f"{name}.alpha": np.array(0.5, "f4")}, tmp_path)
    np.testing.assert_allclose(found[f"{QUERY}.weight"], 0.25 * b.astype("f8") @ a, atol=1e-6)
    np.testing.assert_allclose(found[f"{QUERY}.bias"], bias, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 5.0])
def test_a_bias_beside_factors_is_not_rounded_by_their_scaling(base, tmp_path, alpha):
    """As where PEFT scales both; of a scaling of 0 nothing could be left of it."""
    name, bias = f"{FRONT}self_attn.q", drawn(8, seed=23).astype(ml_dtypes.bfloat16)
    tensors = {f"{name}.lora_A.weight": drawn(3, 8, seed=21), f"{name}.diff_b": bias}
    tensors |= {f"{name}.lora_B.weight": drawn(8, 3, seed=22), f"{name}.alpha": np.array(alpha)}
    found = merged(base, tensors, tmp_path)
    np.testing.assert_allclose(found[f"{QUERY}.bias"], bias.astype("f8"), atol=1e-6)


def test_a_bias_that_a_file_has_scaled_is_not_rounded_either(base, tmp_path):
    name, bias = f"transformer.{QUERY}", drawn(8, seed=23).astype(ml_dtypes.bfloat16)
    tensors = {f"{name}.lora_A.weight": drawn(3, 8), f"{name}.lora_B.bias": bias}
    tensors |= {f"{name}.lora_B.weight": drawn(8, 3, seed=22), f"{name}.alpha": np.array(0.3)}
    found = merged(base, tensors, tmp_path)
    np.testing.assert_allclose(found[f"{QUERY}.bias"], 0.1 * bias.astype("f8"), atol=1e-6)


@pytest.mark.parametrize("to", ["diffusers", "peft", "kohya"])
def test_biases_of_zeros_need_none_in_the_base(base, tmp_path, to):
    """Where some modules have biases, files for Diffusers and PEFT have zeros for all others."""
    other = "blocks.0.ffn.net.0.proj"
    tensors = load_file(base / "model.safetensors")
    save_file({**tensors, f"{other}.weight": drawn(16, 8)}, base / "model.safetensors")
    names = {f"{FRONT}self_attn.q": (8, 8), f"{FRONT}ffn.0": (16, 8)}
    given = {f"{n}.lora_A.weight": drawn(2, s[1], seed=1) for n, s in names.items()}
    given |= {f"{n}.lora_B.weight": drawn(s[0], 2, seed=2) for n, s in names.items()}
    given[f"{FRONT}self_attn.q.diff_b"] = drawn(8, seed=3)
    save_file(given, tmp_path / "a.safetensors", metadata={"format": "pt"})
    lorakit.convert(tmp_path / "a.safetensors", tmp_path / "b", to=to, run=SCRATCH)
    lorakit.merge(base, tmp_path / "b", tmp_path / "out", run=SCRATCH)
    lorakit.verify(tmp_path / "out", full=True)
    after = load_file(tmp_path / "out/model.safetensors")
    wanted = tensors[f"{QUERY}.bias"] + drawn(8, seed=3)
    np.testing.assert_allclose(after[f"{QUERY}.bias"], wanted, atol=1e-6)
    wanted = drawn(16, 8) + drawn(16, 2, seed=2).astype("f8") @ drawn(2, 8, seed=1)
    np.testing.assert_allclose(after[f"{other}.weight"], wanted, atol=1e-5)


def test_new_values_take_the_place_of_the_old(base, tmp_path):
    values = drawn(8, seed=31)
    found = merged(base, {f"{FRONT}norm3.set_weight": values}, tmp_path)
    old = load_file(base / "model.safetensors")["blocks.0.norm2.weight"]
    np.testing.assert_allclose(found["blocks.0.norm2.weight"], values - old.astype("f8"))


@pytest.mark.parametrize("front", ["", "model.diffusion_model."])
def test_differences_of_modulations_are_those_of_parameters(base, tmp_path, front):
    """`.diff_m`, as LightX2V writes them beside all others; ComfyUI reads the parameter's name.

    Source: ModelTC/LightX2V, tools/extract/lora_extractor.py
    """
    names = {"blocks.0.modulation": "blocks.0.scale_shift_table"}
    names["head.modulation"] = "scale_shift_table"
    shapes = dict(zip(names, ((1, 6, 8), (1, 2, 8)), strict=True))
    old = {n: drawn(*s, seed=len(n)) for n, s in shapes.items()}
    file = base / "model.safetensors"
    save_file({**load_file(file), **{names[n]: v for n, v in old.items()}}, file)
    single = {f"{front}{n}": v for n, v in old.items()}
    single |= {f"{front}blocks.0.self_attn.{x}.weight": drawn(8, 8) for x in "qkvo"}
    save_file(single, tmp_path / "one.safetensors")
    ends = {f"diffusion_model.{n.removesuffix('modulation')}diff_m": n for n in names}
    tensors = {e: drawn(*shapes[n], seed=9) for e, n in ends.items()}
    tensors[f"{FRONT}self_attn.q.diff"] = drawn(8, 8, seed=3)
    found = merged(base, tensors, tmp_path, weights=[0.5])
    path, one = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    lorakit.merge(tmp_path / "one.safetensors", path, one, weights=[0.5], run=SCRATCH)
    lorakit.verify(one, full=True)
    for end, name in ends.items():
        wanted = 0.5 * tensors[end].astype("f8")
        np.testing.assert_allclose(found[names[name]], wanted, atol=1e-6)
        gained = load_file(one)[front + name] - old[name].astype("f8")
        np.testing.assert_allclose(gained, wanted, atol=1e-6)
    lorakit.unmerge(one, path, tmp_path / "back.safetensors", weights=[0.5], run=SCRATCH)
    back = load_file(tmp_path / "back.safetensors")
    assert all(np.allclose(back[n], v, atol=1e-6) for n, v in single.items())
    lorakit.convert(path, tmp_path / "b.safetensors", to="comfyui", run=SCRATCH)
    made = load_file(tmp_path / "b.safetensors")
    assert {f"diffusion_model.{n}.diff" for n in names} <= made.keys()


def test_a_difference_of_a_part_goes_to_its_rows_of_a_fused_projection(tmp_path):
    old = {
        "double_blocks.0.img_attn.qkv.weight": drawn(24, 8, seed=1),
        "double_blocks.0.img_attn.qkv.bias": drawn(24, seed=2),
    }
    save_file(old, tmp_path / "base.safetensors")
    module, values = "transformer.transformer_blocks.0.attn.to_v", drawn(8, 8, seed=41)
    tensors = {f"{module}.diff": values, f"{module}.diff_b": drawn(8, seed=42)}
    save_file(tensors, tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    lorakit.merge(tmp_path / "base.safetensors", tmp_path / "a.safetensors", out, run=SCRATCH)
    after = load_file(out)
    for name, delta in zip(old, tensors.values(), strict=True):
        np.testing.assert_allclose(after[name][16:], old[name][16:] + delta, atol=1e-6)
        assert np.array_equal(after[name][:16], old[name][:16])


def test_a_merge_of_differences_is_verified_and_taken_back(base, tmp_path):
    tensors = {f"{FRONT}self_attn.q.diff": drawn(8, 8, seed=51)}
    merged(base, tensors, tmp_path)
    assert lorakit.verify(tmp_path / "out", full=True).folded_tensors == 1
    lorakit.unmerge(tmp_path / "out", tmp_path / "a.safetensors", tmp_path / "b", run=SCRATCH)
    back, old = (load_file(p / "model.safetensors") for p in (tmp_path / "b", base))
    assert all(np.allclose(back[n], old[n], atol=1e-6) for n in old)


def test_what_works_on_factors_says_that_there_are_none(tmp_path):
    save_file({f"{FRONT}self_attn.q.diff": drawn(8, 8)}, tmp_path / "a.safetensors")
    with pytest.raises(MisfitError, match="which has no plain factors"):
        lorakit.compare(tmp_path / "a.safetensors", tmp_path / "a.safetensors")


def test_a_difference_of_another_shape_is_refused(base, tmp_path):
    with pytest.raises(MisfitError):
        merged(base, {f"{FRONT}self_attn.q.diff": drawn(8, 4)}, tmp_path)


def test_norms_of_a_file_are_found_under_the_names_of_the_original_code(tmp_path):
    old = {
        "double_blocks.0.img_attn.qkv.weight": drawn(24, 8, seed=1),
        "double_blocks.0.img_attn.norm.query_norm.scale": drawn(8, seed=2),
    }
    save_file(old, tmp_path / "base.safetensors")
    norm = drawn(8, seed=61)
    module = "transformer.transformer_blocks.0.attn"
    tensors = {f"{module}.norm_q.diff": norm, f"{module}.to_q.diff": drawn(8, 8, seed=62)}
    save_file(tensors, tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    lorakit.merge(tmp_path / "base.safetensors", tmp_path / "a.safetensors", out, run=SCRATCH)
    name = "double_blocks.0.img_attn.norm.query_norm.scale"
    np.testing.assert_allclose(load_file(out)[name], old[name] + norm, atol=1e-6)


def test_flattened_names_of_a_language_model_are_those_of_the_base(tmp_path):
    (tmp_path / "base").mkdir()
    name = "model.layers.0.self_attn.q_proj"
    old = drawn(8, 8, seed=1)
    save_file({f"{name}.weight": old}, tmp_path / "base/model.safetensors")
    a, b = drawn(2, 8, seed=71), drawn(8, 2, seed=72)
    flat = "lora_unet_model_layers_0_self_attn_q_proj"
    tensors = {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}
    save_file(tensors, tmp_path / "a.safetensors")
    base, lora = tmp_path / "base", tmp_path / "a.safetensors"
    lorakit.merge(base, lora, tmp_path / "out", run=SCRATCH)
    found = load_file(tmp_path / "out/model.safetensors")[f"{name}.weight"]
    np.testing.assert_allclose(found, old + b.astype("f8") @ a, atol=1e-5)
    lorakit.verify(tmp_path / "out", full=True)
    lorakit.unmerge(tmp_path / "out", lora, tmp_path / "back", run=SCRATCH)
    found = load_file(tmp_path / "back/model.safetensors")[f"{name}.weight"]
    np.testing.assert_allclose(found, old, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_factors_of_a_linear_layer_may_have_the_kernel_of_one_place(tmp_path, fused):
    name = "double_blocks.0.img_attn.qkv" if fused else "transformer_blocks.0.attn.to_q"
    weight, rng = np.ones((48, 16), "f4"), np.random.default_rng(0)
    save_file({f"{name}.weight": weight}, tmp_path / "base.safetensors")
    a, b = (rng.standard_normal(s).astype("f4") for s in ((2, 16, 1, 1), (48, 2, 1, 1)))
    if fused:  # queries, of which the base has the first rows of a projection
        name, b = "transformer_blocks.0.attn.to_q", b[:16]
    lora = {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    save_file(lora, tmp_path / "a.safetensors")
    where = [tmp_path / f"{n}.safetensors" for n in ("base", "a", "out")]
    lorakit.merge(*where, run=SCRATCH)
    (found,) = load_file(where[2]).values()
    wanted = weight.astype("f8")
    wanted[: len(b)] += b[:, :, 0, 0].astype("f8") @ a[:, :, 0, 0].astype("f8")
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_factors_of_a_convolution_do_not_fit_a_linear_layer(tmp_path):
    name = "transformer_blocks.0.attn.to_q"
    save_file({f"{name}.weight": np.ones((8, 6), "f4")}, tmp_path / "base.safetensors")
    a, b = np.ones((2, 6, 3, 3), "f4"), np.ones((8, 2, 1, 1), "f4")
    lora = {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    save_file(lora, tmp_path / "a.safetensors")
    with pytest.raises(MisfitError, match=r"\[8, 6\] in the base"):
        lorakit.merge(tmp_path / "base.safetensors", tmp_path / "a.safetensors", tmp_path / "out")


def test_norms_of_both_text_encoders_are_found_in_one_file(tmp_path):
    """LyCORIS trains them with `train_norm`; the second encoder has the names of open_clip."""
    first, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
    unet = "model.diffusion_model.output_blocks.0.1.proj_in"
    places = {
        "te1_text_model_encoder_layers_0_layer_norm1": f"{first}{LAYER}.layer_norm1",
        "te1_text_model_final_layer_norm": f"{first}text_model.final_layer_norm",
        "te2_text_model_encoder_layers_0_layer_norm2": f"{second}transformer.resblocks.0.ln_2",
        "te2_text_model_final_layer_norm": f"{second}ln_final",
    }
    base, lora, wanted = {f"{unet}.weight": drawn(8, 8)}, {}, {}
    for number, (name, there) in enumerate(places.items()):
        for ending, parameter in (("w_norm", "weight"), ("b_norm", "bias")):
            base[f"{there}.{parameter}"] = drawn(8, seed=number)
            lora[f"lora_{name}.{ending}"] = drawn(8, seed=number + 10)
            wanted[f"{there}.{parameter}"] = drawn(8, seed=number) + drawn(8, seed=number + 10)
    lora |= {
        f"lora_unet_output_blocks_0_1_proj_in.lora_{x}.weight": drawn(8, 8) for x in ("down", "up")
    }
    save_file(base, tmp_path / "base.safetensors")
    save_file(lora, tmp_path / "a.safetensors")
    where = [tmp_path / f"{n}.safetensors" for n in ("base", "a", "out")]
    lorakit.merge(*where, run=SCRATCH)
    found = load_file(where[2])
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, atol=1e-6)
