"""What a LoRA file holds beside plain factors, carried, folded or refused; and the parts of fused
projections, cut and joined.
"""

import hashlib
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.adapter.files.reading import open_file
from lorakit.formats.templates import denoiser
from tests.files.making_loras import RANK, SHARED, kohya, updates, weights

SCRATCH = lorakit.RunOptions(sync=False)
DENSE = ["flux", "sd3", "hunyuan_video", "lumina2", "z_image", "mochi", "pixart", "minimax_h3"]


@pytest.mark.parametrize("family", DENSE)
def test_a_dense_fused_projection_is_cut_and_joined_bit_for_bit(tmp_path, family):
    """As trainers write it: one A for all parts, and a B without zeros."""
    rng = np.random.default_rng(0)
    tensors, width = {}, 12
    for row in denoiser(family).rows:
        if len(row.parts) > 1 and "_qkv" not in row.original.rpartition(".")[2]:
            name = "lora_unet_" + row.original.replace("#", "0").replace(".", "_")
            rows = {3: 2 * width if family == "lumina2" else 3 * width, 4: 7 * width}
            height = 20 * len(row.parts) if row.even else rows[len(row.parts)]
            tensors[f"{name}.lora_down.weight"] = rng.standard_normal((2, width)).astype("f2")
            tensors[f"{name}.lora_up.weight"] = rng.standard_normal((height, 2)).astype("f2")
            tensors[f"{name}.alpha"] = np.array(1, "f2")
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    done = lorakit.convert(
        tmp_path / "a.safetensors", tmp_path / "b", to="diffusers", family=family, run=SCRATCH
    )
    assert done.counts == {"split": len(done.steps)}
    lorakit.convert(
        weights(tmp_path / "b"), tmp_path / "c.safetensors", to="kohya", family=family, run=SCRATCH
    )
    again = load_file(tmp_path / "c.safetensors")
    assert set(again) == set(tensors)
    for name, values in tensors.items():
        assert (again[name].dtype, again[name].shape) == (values.dtype, values.shape)
        assert again[name].tobytes() == values.tobytes(), name
    one, other = (updates(tmp_path / p, family=family) for p in ("a.safetensors", "c.safetensors"))
    assert all(np.array_equal(one[k], other[k]) for k in one)


def test_scalings_are_carried_or_folded(tmp_path):
    path = kohya(tmp_path / "a.safetensors", SHARED, alpha=0.5)
    expected = updates(path, family="flux")
    for alpha in ("keep", "fold"):
        done = lorakit.convert(
            path, tmp_path / alpha, to="diffusers", family="flux", alpha=alpha, run=SCRATCH
        )
        assert done.counts == ({"renamed": 1} if alpha == "keep" else {"folded": 1})
        found = updates(weights(tmp_path / alpha))
        for key, delta in expected.items():
            np.testing.assert_allclose(found[key], delta, rtol=1e-6)
    kept, folded = (load_file(weights(tmp_path / a)) for a in ("keep", "fold"))
    name = "transformer.x_embedder.lora_A.weight"
    assert kept[name].tobytes() == load_file(path)["lora_unet_img_in.lora_down.weight"].tobytes()
    np.testing.assert_array_equal(folded[name], kept[name] / 2)  # a power of two: exact
    lorakit.convert(weights(tmp_path / "keep"), tmp_path / "x.safetensors", to="kohya", run=SCRATCH)
    again, before = load_file(tmp_path / "x.safetensors"), load_file(path)
    assert {n: t.tobytes() for n, t in again.items()} == {n: t.tobytes() for n, t in before.items()}


def test_folding_says_by_how_much_it_rounds(tmp_path):
    path = kohya(tmp_path / "a.safetensors", SHARED, alpha=0.6)
    tensors = {n: t.astype("f2") if t.ndim else t for n, t in load_file(path).items()}
    save_file(tensors, path)
    done = lorakit.convert(
        path, tmp_path / "out", to="diffusers", family="flux", alpha="fold", run=SCRATCH
    )
    assert 1e-5 < done.error < 1e-3


def test_metadata_of_kohya_is_kept_and_its_hash_is_of_the_new_file(tmp_path):
    path = kohya(tmp_path / "a.safetensors", SHARED)
    metadata = {"ss_network_dim": "2", "sshs_model_hash": "stale", "modelspec.title": "x"}
    metadata["modelspec.hash_sha256"] = "stale"
    save_file(load_file(path), path, metadata=metadata)
    before = path
    for to in ("comfyui", "diffusers", "kohya"):
        after = tmp_path / f"{to}.safetensors"
        lorakit.convert(before, after, to=to, family="flux", run=SCRATCH)
        found = open_file(after).metadata
        assert (found["ss_network_dim"], found["modelspec.title"]) == ("2", "x")
        start = int.from_bytes(after.read_bytes()[:8], "little") + 8
        whole = hashlib.sha256(after.read_bytes()[start:]).hexdigest()
        assert found["sshs_model_hash"] == whole
        assert found["modelspec.hash_sha256"] == f"0x{whole}"
        before = after


@pytest.mark.parametrize("algo", ["loha", "lokr", "tucker"])
def test_other_algorithms_become_plain_factors_exactly(tmp_path, algo):
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    shapes = {
        "loha": {f"hada_w{n}_{x}": s for n in (1, 2) for x, s in (("a", (8, 3)), ("b", (3, 4)))},
        "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 2)},
        "tucker": {
            "lora_down.weight": (3, 4, 1, 1),
            "lora_mid.weight": (3, 3, 3, 3),
            "lora_up.weight": (8, 3, 1, 1),
        },
    }[algo]
    path = kohya(tmp_path / "a.safetensors", {f"{name}.{k}": s for k, s in shapes.items()}, alpha=2)
    expected = updates(path, family="sd1")
    done = lorakit.convert(path, tmp_path / "out", to="diffusers", family="sd1", run=SCRATCH)
    assert done.counts == {"computed": 1}
    found = updates(weights(tmp_path / "out"), family="sd1")
    for key, delta in expected.items():
        np.testing.assert_allclose(found[key], delta, rtol=1e-5, atol=1e-6)
    done = lorakit.convert(
        path, tmp_path / "c.safetensors", to="comfyui", family="sd1", run=SCRATCH
    )
    assert done.counts == {"renamed": 1}


def test_without_an_alpha_a_loha_stays_without(tmp_path):
    name, rng = "lora_unet_img_in", np.random.default_rng(0)
    shapes = {f"hada_w{n}_{x}": s for n in (1, 2) for x, s in (("a", (8, 3)), ("b", (3, 4)))}
    tensors = {f"{name}.{k}": rng.standard_normal(s).astype("f4") for k, s in shapes.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    options = {"to": "comfyui", "family": "flux", "run": SCRATCH}
    lorakit.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **options)
    assert not any(n.endswith(".alpha") for n in load_file(tmp_path / "b.safetensors"))
    one, other = (updates(tmp_path / f"{n}.safetensors", family="flux") for n in "ab")
    assert all(np.array_equal(one[k], other[k]) for k in one)


def test_dora_goes_where_there_is_a_place_for_it(tmp_path):
    tensors = {
        "lora_unet_img_in.lora_down.weight": (RANK, 8),
        "lora_unet_img_in.lora_up.weight": (6, RANK),
        "lora_unet_img_in.dora_scale": (6, 1),
    }
    path = kohya(tmp_path / "a.safetensors", tensors, alpha=RANK)
    lorakit.convert(path, tmp_path / "b", to="diffusers", family="flux", run=SCRATCH)
    found = load_file(weights(tmp_path / "b"))["transformer.x_embedder.lora_magnitude_vector"]
    assert found.shape == (6,)
    lorakit.convert(
        weights(tmp_path / "b"),
        tmp_path / "c.safetensors",
        to="comfyui",
        family="flux",
        run=SCRATCH,
    )
    again = load_file(tmp_path / "c.safetensors")["diffusion_model.img_in.dora_scale"]
    assert again.tobytes() == load_file(path)["lora_unet_img_in.dora_scale"].tobytes()
    assert again.shape == (6, 1)
    by_inputs = {**tensors, "lora_unet_img_in.dora_scale": (1, 8)}
    path = kohya(tmp_path / "d.safetensors", by_inputs)
    with pytest.raises(lorakit.LorakitError, match="norms of its inputs"):
        lorakit.convert(path, tmp_path / "e", to="diffusers", family="flux", run=SCRATCH)
    assert not (tmp_path / "e").exists()


def test_parts_with_as_many_rows_are_cut_evenly_whatever_the_inputs(tmp_path):
    """As Mochi has them, whose text is narrower than its heads."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 4)).astype("f4"), rng.standard_normal((30, 2)).astype("f4")
    name = "diffusion_model.blocks.0.attn.qkv_y"
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path / "a.safetensors")
    found = updates(tmp_path / "a.safetensors", family="mochi")
    for number, part in enumerate("qkv"):
        there = found["transformer", f"transformer_blocks.0.attn1.add_{part}_proj"]
        np.testing.assert_array_equal(there, (b[10 * number :][:10].astype("f8") @ a))


@pytest.mark.parametrize("parts", ["q", "qk", "qv", "v"])
@pytest.mark.parametrize("to", ["comfyui", "kohya"])
def test_parts_of_a_fused_projection_that_were_not_trained_are_zeros(tmp_path, parts, to):
    rng = np.random.default_rng(0)
    tensors = {}
    for part in parts:
        name = f"transformer.transformer_blocks.0.attn.to_{part}"
        tensors[f"{name}.lora_A.weight"] = rng.standard_normal((2, 4)).astype("f4")
        tensors[f"{name}.lora_B.weight"] = rng.standard_normal((4, 2)).astype("f4")
    save_file(tensors, tmp_path / "a.safetensors")
    out = tmp_path / "b.safetensors"
    lorakit.convert(tmp_path / "a.safetensors", out, to=to, family="flux", run=SCRATCH)
    before, after = (updates(p, family="flux") for p in (tmp_path / "a.safetensors", out))
    assert len(after) == 3
    for place, delta in after.items():
        np.testing.assert_array_equal(delta, before.get(place, np.zeros((4, 4))))


def test_a_part_that_was_not_trained_has_as_many_rows_as_the_others(tmp_path):
    rng = np.random.default_rng(0)
    name = "transformer.transformer_blocks.0.attn2.to_k"
    tensors = {
        f"{name}.lora_A.weight": rng.standard_normal((2, 4)).astype("f4"),
        f"{name}.lora_B.weight": rng.standard_normal((10, 2)).astype("f4"),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    out = tmp_path / "b.safetensors"
    lorakit.convert(tmp_path / "a.safetensors", out, to="comfyui", family="pixart", run=SCRATCH)
    up = next(t for n, t in load_file(out).items() if "cross_attn.kv_linear.lora_B" in n)
    assert up.shape == (20, 2)
    assert not up[10:].any()


def test_a_bias_of_peft_comes_back_to_the_byte_and_is_applied_as_peft_does(tmp_path):
    """PEFT scales the bias of lora_B with the rest; what others call diff_b is added as it is."""
    rng, module = np.random.default_rng(0), "blocks.0.attn1.to_q"
    front = f"base_model.model.{module}"
    tensors = {
        f"{front}.lora_A.weight": rng.standard_normal((3, 8)).astype("f2"),
        f"{front}.lora_B.weight": rng.standard_normal((8, 3)).astype("f2"),
        f"{front}.lora_B.bias": rng.standard_normal(8).astype("f2"),
    }
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 1, "lora_bias": True}
    (tmp_path / "peft").mkdir()
    save_file(tensors, tmp_path / "peft/adapter_model.safetensors")
    text = json.dumps({**config, "target_modules": ["to_q"]})
    (tmp_path / "peft/adapter_config.json").write_text(text)
    options = {"family": "wan", "run": SCRATCH}
    lorakit.convert(tmp_path / "peft", tmp_path / "diffusers", to="diffusers", **options)
    held = load_file(tmp_path / "diffusers/pytorch_lora_weights.safetensors")
    for name, values in tensors.items():
        there = name.replace("base_model.model.", "transformer.")
        assert held[there].tobytes() == values.tobytes()
    lorakit.convert(tmp_path / "peft", tmp_path / "k.safetensors", to="kohya", **options)
    bias = load_file(tmp_path / "k.safetensors")["lora_unet_blocks_0_self_attn_q.diff_b"]
    np.testing.assert_allclose(bias, tensors[f"{front}.lora_B.bias"].astype("f8") / 3, rtol=1e-3)
