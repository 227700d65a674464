"""Files of LyCORIS without plain factors, merged: IA3, GLoRA and OFT, by their own formulas."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.errors import InputError, LorakitError, MisfitError

SCRATCH = lorakit.RunOptions(sync=False)
LINEAR = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "down_blocks.0.resnets.0.conv1"
NAMES = {
    LINEAR: "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",
    CONV: "lora_unet_down_blocks_0_resnets_0_conv1",
}
SHAPES = {LINEAR: (12, 768), CONV: (8, 6, 3, 3)}


def drawn(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype("f4")


@pytest.fixture
def unet(tmp_path):
    (tmp_path / "unet").mkdir()
    tensors = {f"{m}.weight": drawn(*s) for m, s in SHAPES.items()}
    save_file(tensors, tmp_path / "unet/diffusion_pytorch_model.safetensors")
    return tmp_path / "unet"


def merged(unet, tensors, tmp_path, **options):
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    lorakit.merge(unet, tmp_path / "a.safetensors", tmp_path / "out", run=SCRATCH, **options)
    lorakit.verify(tmp_path / "out", full=True)
    before, after = (
        load_file(p / "diffusion_pytorch_model.safetensors") for p in (unet, tmp_path / "out")
    )
    return {
        m: (before[f"{m}.weight"].astype("f8"), after[f"{m}.weight"].astype("f8")) for m in SHAPES
    }


@pytest.mark.parametrize("inputs", [False, True])
def test_ia3_multiplies_outputs_or_inputs(unet, tmp_path, inputs):
    tensors, factors = {}, {}
    for module, name in NAMES.items():
        shape = SHAPES[module]
        count = shape[1] if inputs else shape[0]
        factors[module] = drawn(count, seed=1)
        kept = factors[module] if module == LINEAR else factors[module].reshape(1, -1, 1, 1)
        tensors |= {f"{name}.weight": kept, f"{name}.on_input": np.array(int(inputs))}
    for module, (old, new) in merged(unet, tensors, tmp_path, weights=[0.5]).items():
        place = (1, -1) if inputs else (-1, 1)
        factor = factors[module].reshape(*place, *(1,) * (old.ndim - 2))
        np.testing.assert_allclose(new, old * (1 + 0.5 * factor.astype("f8")), atol=1e-6)


@pytest.mark.parametrize("old_layout", [False, True])
def test_glora_goes_through_the_weight(unet, tmp_path, old_layout):
    tensors, wanted, scaling = {}, {}, 0.5 / 2
    for module, name in NAMES.items():
        out, inner, *kernel = SHAPES[module]
        ones = (1,) * len(kernel)
        up, down = drawn(inner, 2, seed=1), drawn(2, inner, seed=2)
        b, a = drawn(out, 2, seed=3), drawn(2, inner, *kernel, seed=4)
        first, second = ("2", "1") if old_layout else ("1", "2")
        tensors |= {
            f"{name}.a{first}.weight": up.reshape(*up.shape, *ones),
            f"{name}.a{second}.weight": down.reshape(*down.shape, *ones),
            f"{name}.b{first}.weight": b.reshape(*b.shape, *ones),
            f"{name}.b{second}.weight": a,
            f"{name}.alpha": np.array(0.5, "f4"),
        }
        through = up.astype("f8") @ down
        wanted[module] = lambda w, through=through, b=b, a=a: (
            w
            + scaling
            * (
                np.einsum("oi...,ij->oj...", w, through)
                + np.einsum("or,ri...->oi...", b.astype("f8"), a)
            )
        )
    for module, (old, new) in merged(unet, tensors, tmp_path).items():
        np.testing.assert_allclose(new, wanted[module](old), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("constraint", [0.0, 0.01])
def test_oft_rotates_the_outputs(unet, tmp_path, constraint):
    tensors, dense, scales = {}, {}, {}
    for module, name in NAMES.items():
        out, *others = SHAPES[module]
        blocks = 0.1 * drawn(out // 4, 4, 4, seed=1)
        scales[module] = (1 + 0.1 * drawn(out, seed=2)).reshape(out, *(1,) * len(others))
        tensors |= {f"{name}.oft_blocks": blocks, f"{name}.rescale": scales[module]}
        tensors[f"{name}.alpha"] = np.array(constraint, "f4")
        skew = (blocks - blocks.transpose(0, 2, 1)).astype("f8")
        norm = np.linalg.norm(skew)
        if constraint and norm > np.float32(constraint) * out:
            skew *= np.float32(constraint).astype("f8") * out / norm
        turns = (np.eye(4) + skew) @ np.linalg.inv(np.eye(4) - skew)
        dense[module] = np.zeros((out, out))
        for i, turn in enumerate(turns):
            dense[module][4 * i : 4 * i + 4, 4 * i : 4 * i + 4] = turn
    for module, (old, new) in merged(unet, tensors, tmp_path).items():
        turned = (dense[module].T @ old.reshape(len(old), -1)).reshape(old.shape)
        np.testing.assert_allclose(new, scales[module] * turned, rtol=1e-5, atol=1e-5)


def test_a_rotation_of_many_blocks_is_that_of_one(tmp_path):
    (tmp_path / "unet").mkdir()
    rows, name = 1200, NAMES[LINEAR]
    old = drawn(rows, 768)
    file = "unet/diffusion_pytorch_model.safetensors"
    save_file({f"{LINEAR}.weight": old}, tmp_path / file)
    blocks = 0.1 * drawn(3, 400, 400, seed=1) / 20
    save_file({f"{name}.oft_blocks": blocks}, tmp_path / "a.safetensors")
    lorakit.merge(tmp_path / "unet", tmp_path / "a.safetensors", tmp_path / "out", run=SCRATCH)
    new = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors")[f"{LINEAR}.weight"]
    skew = (blocks - blocks.transpose(0, 2, 1)).astype("f8")[1]
    turn = np.linalg.solve(np.eye(400) - skew, np.eye(400) + skew)
    np.testing.assert_allclose(new[400:800], turn.T @ old[400:800], atol=1e-4)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_a_kernel_that_lycoris_has_flattened_is_that_of_the_base(tmp_path, kind):
    """Of a patch embedding, which no table says the size of."""
    old = drawn(8, 4, 1, 2, 2)
    (tmp_path / "wan").mkdir()
    file = "diffusion_pytorch_model.safetensors"
    save_file({"patch_embedding.weight": old}, tmp_path / "wan" / file)
    ends = {
        "loha": {f"hada_w{n}_{x}": (8, 2) if x == "a" else (2, 16) for n in "12" for x in "ab"},
        "lokr": {"lokr_w1": (4, 2), "lokr_w2_a": (2, 2), "lokr_w2_b": (2, 8)},
    }
    t = {n: drawn(*s, seed=i) for i, (n, s) in enumerate(ends[kind].items())}
    wide = {n: v.astype("f8") for n, v in t.items()}
    if kind == "loha":
        one, two = (wide[f"hada_w{n}_a"] @ wide[f"hada_w{n}_b"] for n in "12")
        delta = one * two
    else:
        delta = np.kron(wide["lokr_w1"], wide["lokr_w2_a"] @ wide["lokr_w2_b"])
    tensors = {f"diffusion_model.patch_embedding.{n}": v for n, v in t.items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    lorakit.merge(tmp_path / "wan", tmp_path / "a.safetensors", tmp_path / "out", run=SCRATCH)
    lorakit.verify(tmp_path / "out", full=True)
    found = load_file(tmp_path / "out" / file)["patch_embedding.weight"]
    np.testing.assert_allclose(found, old + delta.reshape(old.shape), atol=1e-5)


def test_what_multiplied_a_weight_is_not_taken_out(unet, tmp_path):
    name = NAMES[LINEAR]
    tensors = {f"{name}.weight": drawn(12), f"{name}.on_input": np.array(0)}
    merged(unet, tensors, tmp_path)
    with pytest.raises(InputError, match="multiplied"):
        lorakit.unmerge(tmp_path / "out", tmp_path / "a.safetensors", tmp_path / "b", run=SCRATCH)


def test_what_multiplies_a_fused_projection_is_merged_where_that_is_one(tmp_path):
    """And is the same file's in the other format that has fused ones."""
    name, swapped = "double_blocks.0.img_attn.qkv", "final_layer.adaLN_modulation.1"
    old = {f"{name}.weight": drawn(36, 12), f"{swapped}.weight": drawn(24, 12, seed=1)}
    save_file(old, tmp_path / "base.safetensors")
    low = {x: drawn(*s, seed=2) for x, s in zip("ab", ((12, 2), (36, 2)), strict=True)}
    tensors = {f"{x}1": v for x, v in low.items()} | {f"{x}2": drawn(2, 12) for x in "ab"}
    flat = f"lora_unet_{name.replace('.', '_')}"
    tensors = {f"{flat}.{n}.weight": v for n, v in tensors.items()}
    flat = f"lora_unet_{swapped.replace('.', '_')}"
    factors = drawn(24, seed=3)
    tensors |= {f"{flat}.weight": factors, f"{flat}.on_input": np.array(0)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    options = {"to": "comfyui", "family": "flux", "run": SCRATCH}
    lorakit.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **options)
    for file in "ab":
        out = tmp_path / f"{file}_out.safetensors"
        lorakit.merge(tmp_path / "base.safetensors", tmp_path / f"{file}.safetensors", out)
        new, w = load_file(out), old[f"{name}.weight"].astype("f8")
        wanted = w + w @ low["a"] @ drawn(2, 12) + low["b"].astype("f8") @ drawn(2, 12)
        np.testing.assert_allclose(new[f"{name}.weight"], wanted, rtol=1e-5, atol=1e-4)
        rows = old[f"{swapped}.weight"] * (1 + factors[:, None])
        np.testing.assert_allclose(new[f"{swapped}.weight"], rows, atol=1e-6)


def test_what_multiplies_a_fused_projection_is_not_for_its_parts(tmp_path):
    (tmp_path / "flux").mkdir()
    parts = {f"transformer_blocks.0.attn.to_{x}.weight": drawn(12, 12) for x in "qkv"}
    save_file(parts, tmp_path / "flux/diffusion_pytorch_model.safetensors")
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.weight": drawn(36), f"{name}.on_input": np.array(0)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    with pytest.raises(MisfitError, match="that this base has in parts"):
        lorakit.merge(tmp_path / "flux", tmp_path / "a.safetensors", tmp_path / "out")


@pytest.mark.parametrize("kind", ["ia3", "glora", "oft", "full"])
def test_norms_of_dora_beside_no_factors_are_not_passed_over(unet, tmp_path, kind):
    name, tensors = NAMES[LINEAR], {}
    if kind == "ia3":
        tensors = {f"{name}.weight": drawn(12), f"{name}.on_input": np.array(0)}
    if kind == "glora":
        shapes = {"a1": (768, 2), "a2": (2, 768), "b1": (12, 2), "b2": (2, 768)}
        tensors = {f"{name}.{n}.weight": drawn(*s) for n, s in shapes.items()}
    if kind == "oft":
        tensors = {f"{name}.oft_blocks": drawn(3, 4, 4)}
    if kind == "full":
        tensors = {f"{name}.diff": drawn(12, 768)}
    with pytest.raises(MisfitError, match=f"of {kind} and has DoRA norms"):
        merged(unet, {**tensors, f"{name}.dora_scale": drawn(12, 1)}, tmp_path)


@pytest.mark.parametrize("kind", ["ia3", "oft"])
def test_a_bias_beside_what_multiplies_a_weight_is_merged_too(unet, tmp_path, kind):
    file = unet / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), f"{LINEAR}.bias": drawn(12, seed=5)}, file)
    tensors = {"ia3": {"weight": drawn(12), "on_input": np.array(0)}}
    tensors["oft"] = {"oft_blocks": 0.1 * drawn(3, 4, 4)}
    given = {f"{NAMES[LINEAR]}.{n}": v for n, v in tensors[kind].items()}
    merged(unet, {**given, f"{NAMES[LINEAR]}.diff_b": drawn(12, seed=6)}, tmp_path)
    after = load_file(tmp_path / "out/diffusion_pytorch_model.safetensors")
    wanted = drawn(12, seed=5) + drawn(12, seed=6)
    np.testing.assert_allclose(after[f"{LINEAR}.bias"], wanted, atol=1e-6)


@pytest.mark.parametrize("spare", ["lokr_w1_a", "lokr_w2_b", "lokr_t2"])
def test_a_side_of_a_lokr_that_is_there_twice_is_refused(unet, tmp_path, spare):
    tensors = {"lokr_w1": drawn(4, 4), "lokr_w2": drawn(3, 192), spare: drawn(2, 2)}
    with pytest.raises(MisfitError, match=f"of lokr and has w. and {spare[5:]} too"):
        merged(unet, {f"{NAMES[LINEAR]}.{n}": v for n, v in tensors.items()}, tmp_path)


def test_boft_is_refused_by_name(unet, tmp_path):
    with pytest.raises(MisfitError, match="BOFT"):
        merged(unet, {f"{NAMES[LINEAR]}.oft_blocks": drawn(2, 3, 4, 4)}, tmp_path)


def test_rotations_of_another_size_are_refused(unet, tmp_path):
    with pytest.raises(MisfitError, match="in the base, the adapter has"):
        merged(unet, {f"{NAMES[LINEAR]}.oft_blocks": drawn(2, 4, 4)}, tmp_path)


def test_only_a_merge_takes_them(unet, tmp_path):
    name = NAMES[LINEAR]
    save_file({f"{name}.oft_blocks": drawn(3, 4, 4)}, tmp_path / "a.safetensors")
    with pytest.raises(LorakitError, match="no plain factors"):
        lorakit.compare(tmp_path / "a.safetensors", tmp_path / "a.safetensors")


def test_halves_of_a_lokr_change_places_too(tmp_path):
    """Of SD3's and FLUX's last modulation; the Kronecker factors do not have these rows."""
    w1, w2 = drawn(4, 4, seed=1), drawn(4, 2, seed=2)
    name = "lora_unet_final_layer_adaLN_modulation_1"
    tensors = {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    options = {"to": "diffusers", "family": "flux", "run": SCRATCH}
    lorakit.convert(tmp_path / "a.safetensors", tmp_path / "out", **options)
    held = load_file(tmp_path / "out/pytorch_lora_weights.safetensors")
    a, b = (held[f"transformer.norm_out.linear.lora_{x}.weight"].astype("f8") for x in "AB")
    dense = np.kron(w1.astype("f8"), w2)
    np.testing.assert_allclose(b @ a, np.concatenate([dense[8:], dense[:8]]), atol=1e-6)
