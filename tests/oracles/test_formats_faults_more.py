"""What other converters and trainers do wrong with norms, scalings and ranks, and ours does
right: letters h to k of specs/formats.md, 2.9. Each is held against the algebra in float64.
"""

import numpy as np
import pytest

import lorakit
from lorakit.adapter.files.reading import open_file
from tests.oracles.faulty import (
    PEFT,
    converted,
    drawn,
    folded,
    halves_swapped,
    pair,
    placed_in_flux,
    same,
    saved,
    scalings,
    update,
)

WIDTH = 12

# Family -> modules in kohya's names, with (out, in[, kernel]).
DORAS = {
    "sd1": {
        "down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q": (16, 16),
        "down_blocks_1_resnets_0_conv1": (16, 8, 3, 3),
    },
    "sdxl": {
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": (16, 16),
        "input_blocks_4_0_in_layers_2": (16, 8, 3, 3),
    },
    "flux": {
        "double_blocks_0_img_attn_qkv": (3 * WIDTH, WIDTH),
        "double_blocks_0_img_attn_proj": (WIDTH, WIDTH),
        "final_layer_adaLN_modulation_1": (2 * WIDTH, WIDTH),
    },
}
CHAIN = ("comfyui", "diffusers", "kohya", "peft")


def dora(family):
    tensors = {}
    for name, (out, inner, *kernel) in DORAS[family].items():
        module = f"lora_unet_{name}"
        tensors[f"{module}.lora_down.weight"] = drawn(out, 2, inner, *kernel)
        tensors[f"{module}.lora_up.weight"] = drawn(out + 1, out, 2, *(1 for _ in kernel))
        tensors[f"{module}.alpha"] = np.array(0.5, "f4")
        norms = np.abs(drawn(out + 2, out, 1, *(1 for _ in kernel))) + 1
        tensors[f"{module}.dora_scale"] = norms
    return tensors


def norms_of(path, family):
    return {
        d.module: d.tensors["magnitude"].read().ravel()
        for d in open_file(path, family=family).deltas
    }


@pytest.mark.parametrize("family", DORAS)
def test_norms_of_dora_go_through_every_format_and_come_back(tmp_path, family):
    """h. Every pipeline of Diffusers filters `dora_scale` out and loads what is left, as if it were
    a plain LoRA.
    """
    tensors = dora(family)
    path = first = saved(tmp_path / "a.safetensors", tensors)
    wanted = norms_of(first, family)
    assert all(norms.any() for norms in wanted.values())
    for to in CHAIN:
        out = tmp_path / to
        report, found = converted(path, out, to, family=family)
        ending = ".dora_scale" if to in ("kohya", "comfyui") else ".lora_magnitude_vector"
        assert sum(n.endswith(ending) for n in found) == len(report.steps)
        if ending == ".dora_scale":  # (out, 1): as a row, ComfyUI reads a square one wrong
            assert all(t.shape[1] == 1 for n, t in found.items() if n.endswith(ending))
        seen = norms_of(out, family if to != "peft" else "language")
        assert set(seen) == set(wanted)
        assert all(seen[m].tobytes() == wanted[m].tobytes() for m in wanted)
        path = out
        if to == "kohya":
            assert set(found) == set(tensors)
            assert all(found[n].tobytes() == tensors[n].tobytes() for n in tensors)


def test_norms_lie_beside_the_rows_that_they_are_of(tmp_path):
    """h. Rows of a fused projection are cut, and halves swapped; norms of outputs go with them."""
    tensors = dora("flux")
    path = saved(tmp_path / "a.safetensors", tensors)
    _, found = converted(path, tmp_path / "out", "diffusers", family="flux")
    front = "lora_unet_double_blocks_0_img_attn_qkv.dora_scale"
    for i, x in enumerate("qkv"):
        norms = found[f"transformer.transformer_blocks.0.attn.to_{x}.lora_magnitude_vector"]
        np.testing.assert_array_equal(norms, tensors[front][i * WIDTH : (i + 1) * WIDTH, 0])
    whole = tensors["lora_unet_final_layer_adaLN_modulation_1.dora_scale"][:, 0]
    norms = found["transformer.norm_out.linear.lora_magnitude_vector"]
    np.testing.assert_array_equal(norms, halves_swapped(whole))


@pytest.mark.parametrize("shape", [(1, WIDTH), (WIDTH, 1)])
@pytest.mark.parametrize("trained", ["qkv", "qk"])
def test_norms_that_a_fused_projection_cannot_have_stay_with_its_parts(tmp_path, shape, trained):
    """h. Norms of inputs run over all rows of a weight: three of them are not those of the whole,
    even where they have as many numbers as it has rows.
    """
    tensors = {}
    for x in trained:
        module = f"lora_transformer_transformer_blocks_0_attn_to_{x}"
        tensors |= pair(module, WIDTH, WIDTH, alpha=1.0)
        tensors[f"{module}.dora_scale"] = np.abs(drawn(ord(x), *shape)) + 1
    path = saved(tmp_path / "a.safetensors", tensors)
    out = tmp_path / "x.safetensors"
    if trained == "qkv" and shape[1] == 1:
        converted(path, out, "kohya", family="flux")
        return
    with pytest.raises(lorakit.LorakitError, match="DoRA norms") as caught:
        converted(path, out, "kohya", family="flux")
    assert caught.value.exit_code == 4
    _, found = converted(path, out, "comfyui", family="flux")
    front = "transformer.transformer_blocks.0.attn.to_"
    for x in trained:
        before = f"lora_transformer_transformer_blocks_0_attn_to_{x}"
        delta = update(found, front + x, names=PEFT)
        np.testing.assert_array_equal(delta, update(tensors, before))
        norms = found[f"{front}{x}.dora_scale"]
        assert norms.tobytes() == tensors[f"{before}.dora_scale"].tobytes()
        assert norms.shape == shape


def test_parts_are_not_written_under_names_that_comfyui_does_not_know(tmp_path):
    """h. Of HunyuanVideo it takes the fused projections alone."""
    module = "transformer.transformer_blocks.0.attn.to_q"
    tensors = pair(module, WIDTH, WIDTH, names=PEFT)
    tensors[f"{module}.lora_magnitude_vector"] = drawn(3, WIDTH)
    path = saved(tmp_path / "a.safetensors", tensors)
    with pytest.raises(lorakit.LorakitError, match="DoRA norms") as caught:
        converted(path, tmp_path / "x.safetensors", "comfyui", family="hunyuan_video")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("algo", ["lora", "loha"])
def test_a_fused_projection_with_norms_of_inputs_is_not_cut(tmp_path, algo):
    """h. They run over all of its rows, of whatever algorithm the update is."""
    module = "lora_unet_double_blocks_0_img_attn_qkv"
    shapes = {"a": (3 * WIDTH, 2), "b": (2, WIDTH)}
    tensors = {f"{module}.hada_w{n}_{x}": drawn(n, *shapes[x]) for n in (1, 2) for x in "ab"}
    if algo == "lora":
        tensors = pair(module, 3 * WIDTH, WIDTH, alpha=1.0)
    tensors[f"{module}.dora_scale"] = drawn(3, 1, WIDTH)
    path = saved(tmp_path / "a.safetensors", tensors)
    for to in ("diffusers", "peft"):
        with pytest.raises(lorakit.LorakitError, match="norms run over all of it") as caught:
            converted(path, tmp_path / to, to, family="flux")
        assert caught.value.exit_code == 4
    out = tmp_path / "x.safetensors"
    report, found = converted(path, out, "comfyui", family="flux")
    assert report.counts == {"renamed": 1}
    assert len(found) == len(tensors)
    assert all(n.startswith("diffusion_model.double_blocks.0.img_attn.qkv.") for n in found)
    _, again = converted(out, tmp_path / "y.safetensors", "kohya", family="flux")
    assert {n: t.tobytes() for n, t in again.items()} == {
        n: t.tobytes() for n, t in tensors.items()
    }


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_diffusers_loads_the_norms_that_are_written_for_it(tmp_path, kernel):
    """h. Under PEFT's name they pass the filter."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        cross_attention_dim=768,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    module = (
        "down_blocks.1.resnets.1.conv1"
        if kernel
        else ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
    )
    out, inner, *_ = model.get_submodule(module).weight.shape
    base = model.get_submodule(module).weight.detach().double().numpy()
    name = "lora_unet_" + module.replace(".", "_")
    tensors = {
        f"{name}.lora_down.weight": drawn(0, 2, inner, *kernel),
        f"{name}.lora_up.weight": drawn(1, out, 2, *(1 for _ in kernel)),
        f"{name}.alpha": np.array(1, "f4"),
        f"{name}.dora_scale": np.abs(drawn(2, out, 1, *(1 for _ in kernel))) + 1,
    }
    path = saved(tmp_path / "a.safetensors", tensors)
    converted(path, tmp_path / "out", "diffusers", family="sd1")
    mixin = diffusers.loaders.StableDiffusionLoraLoaderMixin
    state, alphas, metadata = mixin.lora_state_dict(tmp_path / "out", return_lora_metadata=True)
    mixin.load_lora_into_unet(state, alphas, model, metadata=metadata)
    (layer,) = (m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    layer.merge()
    changed = base.reshape(out, -1) + update(tensors, name)
    norms = tensors[f"{name}.dora_scale"].reshape(out, 1).astype("f8")
    changed *= norms / np.linalg.norm(changed, axis=1, keepdims=True)
    found = layer.weight.detach().double().numpy().reshape(out, -1)
    np.testing.assert_allclose(found, changed, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 8.0, -1.0, 0.0])
def test_a_scaling_is_applied_once(tmp_path, alpha):
    """i. ai-toolkit's `convert_lora_to_peft_format.py` multiplies A and B by alpha / rank each."""
    name = "diffusion_model.double_blocks.0.img_attn.proj"
    tensors = pair(name, WIDTH, WIDTH, rank=4, alpha=alpha, names=PEFT)
    expected = placed_in_flux("double", 0, "img_attn.proj", update(tensors, name, names=PEFT))
    (module,) = expected
    path = saved(tmp_path / "a.safetensors", tensors)
    same(folded(path, tmp_path, family="flux"), expected)
    out = tmp_path / "peft"
    _, found = converted(path, out, "peft", family="flux")
    plain = module.removeprefix("transformer.")
    a, b = (found[f"base_model.model.{plain}{n}"].astype("f8") for n in PEFT)
    same({module: scalings(out)(plain, len(a)) * b @ a}, expected)


def test_modules_of_several_ranks_have_each_their_own(tmp_path):
    """j. PEFT's example for kohya's files takes `(16, 120)`, the most common rank and how often it
    is, for the rank, and in one place has A where B should be.
    """
    ranks = {"img_attn_proj": 16, "txt_attn_proj": 16, "img_mlp_0": 4}
    ends = {n: n.replace("_0", ".0").replace("_proj", ".proj") for n in ranks}
    tensors, expected = {}, {}
    for name, rank in ranks.items():
        module = f"lora_unet_double_blocks_0_{name}"
        tensors |= pair(module, WIDTH, WIDTH, rank=rank, alpha=2.0)
        expected |= placed_in_flux("double", 0, ends[name], update(tensors, module))
    out = tmp_path / "peft"
    path = saved(tmp_path / "a.safetensors", tensors)
    _, found = converted(path, out, "peft", family="flux")
    scaling, deltas = scalings(out), {}
    for module in (n.removeprefix("transformer.") for n in expected):
        a, b = (found[f"base_model.model.{module}{n}"] for n in PEFT)
        assert a.shape[0] == b.shape[1] in (4, 16)
        deltas[f"transformer.{module}"] = scaling(module, len(a)) * b.astype("f8") @ a.astype("f8")
    same(deltas, expected)


FUSED = {
    "z_image": (
        "diffusion_model.layers.0.attention.qkv",
        "transformer.layers.0.attention.to_{}",
    ),
    "hunyuan_video": (
        "diffusion_model.double_blocks.0.img_attn.qkv",
        "transformer.transformer_blocks.0.attn.to_{}",
    ),
}


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("family", FUSED)
def test_a_fused_projection_is_cut_without_loss_whether_b_is_dense_or_not(tmp_path, family, blocks):
    """k. musubi's `--reverse` takes the blocks on the diagonal of B, and of a dense B no more."""
    name, there = FUSED[family]
    tensors = pair(name, 3 * WIDTH, WIDTH, rank=6, alpha=3.0, names=PEFT)
    if blocks:
        diagonal = np.kron(np.eye(3), np.ones((WIDTH, 2))) == 1
        tensors[f"{name}.lora_B.weight"][~diagonal] = 0
    whole = update(tensors, name, names=PEFT)
    rows = {there.format(x): whole[i * WIDTH : (i + 1) * WIDTH] for i, x in enumerate("qkv")}
    path = saved(tmp_path / "a.safetensors", tensors)
    same(folded(path, tmp_path, family=family), rows)
    _, parts = converted(path, tmp_path / "parts", "diffusers", family=family)
    ranks = {len(t) for n, t in parts.items() if n.endswith(PEFT[0])}
    assert ranks == ({2} if blocks else {6})
    _, again = converted(tmp_path / "parts", tmp_path / "x.safetensors", "comfyui", family=family)
    assert set(again) == set(tensors)
    assert all(again[n].tobytes() == tensors[n].tobytes() for n in tensors)
