"""Merging into a whole model in one file, which has the names of the original code and its fused
projections. The reference is the dense update by the file's own names, in float64.
"""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.formats.families import FAMILIES
from lorakit.formats.single_file import family_of
from tests.files.making_loras import diffusers_file, drawn, modules, width

SCRATCH = lorakit.RunOptions(sync=False)
FRONT = "model.diffusion_model."
every_transformer = pytest.mark.parametrize(
    "family", [f for f, known in FAMILIES.items() if known.component == "transformer"]
)


def written(path, tensors):
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def denoiser_lora(family, path, **options):
    component = FAMILIES[family].component
    tensors = diffusers_file(family, **options)
    return written(path, {n: v for n, v in tensors.items() if n.startswith(component)})


def by_original(lora, tmp_path):
    """Dense updates by the names of the original code, from a file in these names."""
    lorakit.convert(lora, tmp_path / "comfy.safetensors", to="comfyui", run=SCRATCH)
    held = load_file(tmp_path / "comfy.safetensors")
    found = {}
    for name in held:
        if name.endswith(".lora_A.weight"):
            module = name.removesuffix(".lora_A.weight")
            a, b = (held[f"{module}.lora_{x}.weight"].astype("f8") for x in "AB")
            scaling = float(held[f"{module}.alpha"]) / len(a)
            found[module.removeprefix("diffusion_model.")] = scaling * (b @ a)
    return found


def base_of(deltas, path):
    """A base in which every module is there, with a bias, in the file's own names."""
    tensors = {}
    for name, delta in deltas.items():
        tensors[f"{FRONT}{name}.weight"] = drawn(name, *delta.shape)
        tensors[f"{FRONT}{name}.bias"] = drawn(name + "bias", len(delta))
    tensors["first_stage_model.x.weight"] = np.ones((2, 2), np.float32)
    return written(path, tensors)


@every_transformer
def test_a_base_in_the_names_of_the_original_code_takes_every_module(tmp_path, family):
    lora = denoiser_lora(family, tmp_path / "lora.safetensors")
    deltas = by_original(lora, tmp_path)
    base = base_of(deltas, tmp_path / "base.safetensors")
    lorakit.merge(base, lora, tmp_path / "out.safetensors", run=SCRATCH)
    before, after = load_file(base), load_file(tmp_path / "out.safetensors")
    for name, delta in deltas.items():
        wanted = before[f"{FRONT}{name}.weight"] + delta
        np.testing.assert_allclose(after[f"{FRONT}{name}.weight"], wanted, rtol=1e-6, atol=1e-6)
    same = [n for n in before if not n.startswith(FRONT) or n.endswith(".bias")]
    assert all(np.array_equal(before[n], after[n]) for n in same)


def test_a_folder_of_peft_in_the_names_of_diffusers_is_taken_too(tmp_path):
    lora = denoiser_lora("flux", tmp_path / "lora.safetensors")
    base = base_of(by_original(lora, tmp_path), tmp_path / "base.safetensors")
    lorakit.convert(lora, tmp_path / "peft", to="peft", run=SCRATCH)
    for number, adapter in enumerate((lora, tmp_path / "peft")):
        lorakit.merge(base, adapter, tmp_path / f"{number}.safetensors", run=SCRATCH)
    one, other = (load_file(tmp_path / f"{n}.safetensors") for n in (0, 1))
    assert all(np.array_equal(one[n], other[n]) for n in one)


def test_the_state_dict_of_such_a_file_is_merged_in_memory(tmp_path):
    lora = denoiser_lora("sd3", tmp_path / "lora.safetensors")
    base = base_of(by_original(lora, tmp_path), tmp_path / "base.safetensors")
    lorakit.merge(base, lora, tmp_path / "out.safetensors", run=SCRATCH)
    found = lorakit.merge(load_file(base), lora)
    after = load_file(tmp_path / "out.safetensors")
    assert all(np.array_equal(found[n], after[n]) for n in after)


def test_a_merge_into_such_a_file_is_taken_back(tmp_path):
    lora = denoiser_lora("flux", tmp_path / "lora.safetensors")
    base = base_of(by_original(lora, tmp_path), tmp_path / "base.safetensors")
    lorakit.merge(base, lora, tmp_path / "out.safetensors", run=SCRATCH)
    lorakit.unmerge(tmp_path / "out.safetensors", lora, tmp_path / "b.safetensors", run=SCRATCH)
    before, after = load_file(base), load_file(tmp_path / "b.safetensors")
    for name, values in before.items():
        np.testing.assert_allclose(after[name], values, atol=1e-5)


def test_norms_of_some_parts_of_a_fused_projection_are_of_their_own_rows(tmp_path):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 16)).astype("f4"), rng.standard_normal((16, 2)).astype("f4")
    norms = (1 + rng.random(16)).astype("f4")
    module = "transformer.transformer_blocks.0.attn.to_k"
    tensors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    lora = written(
        tmp_path / "a.safetensors", {**tensors, f"{module}.lora_magnitude_vector": norms}
    )
    weight = rng.standard_normal((48, 16)).astype("f4")
    others = {"single_blocks.0.linear1.weight": np.zeros((112, 16), "f4")}
    fused = {"double_blocks.0.img_attn.qkv.weight": weight, **others}
    base = written(tmp_path / "base.safetensors", fused)
    lorakit.merge(base, lora, tmp_path / "out.safetensors", run=SCRATCH)
    moved = weight[16:32].astype("f8") + b.astype("f8") @ a.astype("f8")
    moved *= (norms / np.linalg.norm(moved, axis=1))[:, None]
    after = load_file(tmp_path / "out.safetensors")["double_blocks.0.img_attn.qkv.weight"]
    np.testing.assert_allclose(after[16:32], moved, rtol=1e-5)
    assert np.array_equal(np.delete(after, slice(16, 32), 0), np.delete(weight, slice(16, 32), 0))


def clip(stem, layers, dim):
    """A text encoder in the names of open_clip or of transformers."""
    tensors = {}
    for i in range(layers):
        at = f"{stem}transformer.resblocks.{i}." if stem.endswith("1.model.") else ""
        if at:
            shapes = {"attn.in_proj_weight": (3 * dim, dim), "attn.in_proj_bias": (3 * dim,)}
            shapes |= {"attn.out_proj.weight": (dim, dim), "mlp.c_fc.weight": (4 * dim, dim)}
            shapes |= {"mlp.c_proj.weight": (dim, 4 * dim)}
        else:
            at = f"{stem}text_model.encoder.layers.{i}."
            shapes = {f"self_attn.{x}_proj.weight": (dim, dim) for x in ("q", "k", "v", "out")}
            shapes |= {"mlp.fc1.weight": (4 * dim, dim), "mlp.fc2.weight": (dim, 4 * dim)}
        tensors |= {at + n: drawn(at + n, *s) for n, s in shapes.items()}
    return tensors


ENCODER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")


def test_both_text_encoders_of_sdxl_take_theirs_in_one_file(tmp_path):
    dim, rng, tensors, dense = 8, np.random.default_rng(1), {}, {}
    sizes = {"mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    for encoder in ("te1", "te2"):
        for module in (*ENCODER, "mlp.fc1", "mlp.fc2"):
            out, inner = sizes.get(module, (dim, dim))
            a = rng.standard_normal((2, inner)).astype("f4")
            b = rng.standard_normal((out, 2)).astype("f4")
            name = f"lora_{encoder}_text_model_encoder_layers_1_{module.replace('.', '_')}"
            tensors |= {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}
            tensors[f"{name}.alpha"] = np.ones((), "f4")
            dense[encoder, module] = b.astype("f8") @ a / 2
    unet = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    tensors[f"{unet}.lora_down.weight"] = drawn("a", 2, 2048)
    tensors[f"{unet}.lora_up.weight"] = drawn("b", 6, 2)
    lora = written(tmp_path / "a.safetensors", tensors)
    first, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
    base = {**clip(first, 2, dim), **clip(second, 2, dim)}
    there = f"{FRONT}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    base |= {
        there: np.zeros((6, 2048), "f4"),
        f"{FRONT}output_blocks.0.1.proj_in.weight": np.ones((6, 6), "f4"),
    }
    path = written(tmp_path / "base.safetensors", base)
    lorakit.merge(path, lora, tmp_path / "out.safetensors", run=SCRATCH)
    after = load_file(tmp_path / "out.safetensors")
    moved = {n: after[n].astype("f8") - v for n, v in base.items()}
    near = {"rtol": 1e-5, "atol": 1e-5}
    plain, packed = f"{first}text_model.encoder.layers.1.", f"{second}transformer.resblocks.1."
    for module in (*ENCODER, "mlp.fc1", "mlp.fc2"):
        np.testing.assert_allclose(moved[f"{plain}{module}.weight"], dense["te1", module], **near)
    qkv = np.concatenate([dense["te2", m] for m in ENCODER[:3]])
    np.testing.assert_allclose(moved[f"{packed}attn.in_proj_weight"], qkv, **near)
    for theirs, module in {
        "attn.out_proj": ENCODER[3],
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }.items():
        np.testing.assert_allclose(moved[f"{packed}{theirs}.weight"], dense["te2", module], **near)
    np.testing.assert_allclose(moved[there], drawn("b", 6, 2) @ drawn("a", 2, 2048), **near)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_unet_in_the_names_of_ldm_takes_every_module(tmp_path, family):
    lora = denoiser_lora(family, tmp_path / "lora.safetensors")
    from lorakit.formats.templates import denoiser

    names = denoiser(family)
    held, base, wanted = load_file(lora), {}, {}
    for component, module in modules(family):
        if component == "unet":
            name = FRONT + names.fill(names.find(module, "diffusers"), "original") + ".weight"
            a, b = (held[f"unet.{module}.lora_{x}.weight"] for x in "AB")
            base[name] = drawn(name, len(b), width(family, module))
            wanted[name] = base[name] + b.astype("f8") @ a
    assert family_of([n.removesuffix(".weight") for n in base]) in (family, "sd1")
    path = written(tmp_path / "base.safetensors", base)
    lorakit.merge(path, lora, tmp_path / "out.safetensors", run=SCRATCH)
    after = load_file(tmp_path / "out.safetensors")
    for name, values in wanted.items():
        np.testing.assert_allclose(after[name], values, rtol=1e-6, atol=1e-6)


def test_what_the_file_has_no_place_for_is_named(tmp_path):
    lora = denoiser_lora("flux", tmp_path / "a.safetensors")
    base = written(
        tmp_path / "b.safetensors", {"double_blocks.0.img_attn.qkv.weight": np.ones((48, 16), "f4")}
    )
    with pytest.raises(lorakit.LorakitError, match="are not in the base; the first is") as caught:
        lorakit.merge(base, lora, tmp_path / "out.safetensors", run=SCRATCH)
    assert "of the adapter's" in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    lora = written(
        tmp_path / "a.safetensors",
        {
            "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": np.ones((2, 16), "f4"),
            "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": np.ones((16, 2), "f4"),
        },
    )
    base = written(
        tmp_path / "b.safetensors",
        {
            "double_blocks.0.img_attn.qkv.weight": np.ones((96, 32), "f4"),
            "double_blocks.0.img_mlp.0.weight": np.ones((128, 32), "f4"),
        },
    )
    with pytest.raises(lorakit.LorakitError):
        lorakit.merge(base, lora, tmp_path / "out.safetensors", run=SCRATCH)


# Modules of Anima in one file, and in the folders of Diffusers.
ANIMA = {
    "blocks.0.self_attn.q_proj": "transformer/transformer_blocks.0.attn1.to_q",
    "llm_adapter.blocks.0.self_attn.q_proj": "text_conditioner/blocks.0.self_attn.q_proj",
    "llm_adapter.blocks.1.mlp.2": "text_conditioner/blocks.1.mlp.2",
}


def anima(folder):
    """Its LoRA in kohya's names, the dense updates, and both kinds of base."""
    lora, deltas, one, parts = {}, {}, {}, {}
    for name, there in ANIMA.items():
        a, b, weight = drawn(name + "a", 2, 6), drawn(name + "b", 8, 2), drawn(name, 8, 6)
        flat = f"lora_unet_{name.replace('.', '_')}"
        lora |= {f"{flat}.lora_down.weight": a, f"{flat}.lora_up.weight": b}
        deltas[name] = weight.astype("f8") + b.astype("f8") @ a.astype("f8")
        one[f"net.{name}.weight"] = weight
        component, module = there.split("/")
        parts.setdefault(component, {})[f"{module}.weight"] = weight
    for component, tensors in parts.items():
        (folder / "pipe" / component).mkdir(parents=True)
        save_file(tensors, folder / "pipe" / component / "diffusion_pytorch_model.safetensors")
    (folder / "pipe/model_index.json").write_text("{}")
    written(folder / "one.safetensors", one)
    return written(folder / "lora.safetensors", lora), deltas


def test_anima_has_its_conditioner_in_the_same_file_or_in_a_folder_of_its_own(tmp_path):
    lora, deltas = anima(tmp_path)
    lorakit.merge(tmp_path / "one.safetensors", lora, tmp_path / "out.safetensors", run=SCRATCH)
    lorakit.merge(tmp_path / "pipe", lora, tmp_path / "out", run=SCRATCH)
    one = load_file(tmp_path / "out.safetensors")
    for name, wanted in deltas.items():
        component, module = ANIMA[name].split("/")
        weights = tmp_path / "out" / component / "diffusion_pytorch_model.safetensors"
        np.testing.assert_allclose(one[f"net.{name}.weight"], wanted, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(load_file(weights)[f"{module}.weight"], wanted, rtol=1e-5)
