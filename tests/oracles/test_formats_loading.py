"""Converted files in what reads them: Diffusers takes every module with its scaling, PEFT too."""

import numpy as np
import pytest
from safetensors.numpy import save_file

import lorakit
from lorakit.adapter.files.reading import open_file
from lorakit.formats.families import FAMILIES
from lorakit.formats.templates import denoiser
from lorakit.verbs.reformat.projecting import as_plain

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

SCRATCH = lorakit.RunOptions(sync=False)
ALPHA, RANK = 1.0, 2


def flux():
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )


def unet():
    return diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64, 64),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2048,
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        attention_head_dim=8,
        norm_num_groups=8,
    )


MODELS = {
    "flux": (flux, diffusers.loaders.FluxLoraLoaderMixin, "load_lora_into_transformer"),
    "sdxl": (unet, diffusers.loaders.StableDiffusionXLLoraLoaderMixin, "load_lora_into_unet"),
}


def kohya(family, model, path):
    """A file of kohya's, with a pair for every linear layer and a fused one for fused ones."""
    rng, names, shapes = np.random.default_rng(0), denoiser(family), {}
    for module, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            there = names.find(module, "diffusers")
            name = names.fill(there, FAMILIES[family].kohya, flat=True)
            out, inner = layer.weight.shape
            shapes[name] = shapes.get(name, (0, inner))[0] + out, inner
    tensors = {}
    for name, (out, inner) in shapes.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = rng.standard_normal((RANK, inner))
        tensors[f"lora_unet_{name}.lora_up.weight"] = rng.standard_normal((out, RANK))
        tensors[f"lora_unet_{name}.alpha"] = np.array(ALPHA)
    save_file({n: t.astype("f4") for n, t in tensors.items()}, path, metadata={"format": "pt"})
    return path


def expected(path, family):
    found = {}
    for delta in open_file(path, family=family).deltas:
        plain = as_plain(delta)
        a, b = (plain.tensors[r].read().astype("f8") for r in "ab")
        found[plain.module] = plain.scaling * b @ a
    return found


def injected(model):
    """The update of every layer that PEFT put one on."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            (adapter,) = layer.lora_A.keys()
            found[name] = layer.get_delta_weight(adapter).detach().double().numpy()
    return found


def check(found, wanted):
    assert set(found) == set(wanted)
    for module, delta in wanted.items():
        np.testing.assert_allclose(found[module], delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", ["keep", "fold"])
@pytest.mark.parametrize("family", MODELS)
def test_diffusers_takes_every_module(tmp_path, family, alpha):
    make, mixin, load = MODELS[family]
    model = make()
    path = kohya(family, model, tmp_path / "kohya.safetensors")
    options = {"to": "diffusers", "family": family, "alpha": alpha, "run": SCRATCH}
    lorakit.convert(path, tmp_path / "lora", **options)
    state, *others = mixin.lora_state_dict(tmp_path / "lora", return_lora_metadata=True)
    getattr(mixin, load)(state, None, model, metadata=others[-1])
    wanted = expected(path, family)
    assert len(wanted) == sum(isinstance(m, torch.nn.Linear) for m in make().modules())
    check(injected(model), wanted)


@pytest.mark.parametrize("family", MODELS)
def test_peft_takes_every_module(tmp_path, family):
    make, _, _ = MODELS[family]
    model = make()
    path = kohya(family, model, tmp_path / "kohya.safetensors")
    lorakit.convert(path, tmp_path / "lora", to="peft", family=family, run=SCRATCH)
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
    check(injected(wrapped.base_model.model), expected(path, family))


@pytest.mark.parametrize("form", ["peft", "diffusers", "comfyui", "kohya"])
@pytest.mark.parametrize("family", MODELS)
def test_an_adapter_of_any_format_is_merged_into_the_model_on_disk(tmp_path, family, form):
    make, _, _ = MODELS[family]
    model = make()
    path = kohya(family, model, tmp_path / "kohya.safetensors")
    model.save_pretrained(tmp_path / "base")
    lora = tmp_path / ("peft" if form == "peft" else f"to-{form}.safetensors")
    lorakit.convert(path, lora, to=form, family=family, run=SCRATCH)
    lorakit.merge(tmp_path / "base", lora, tmp_path / "merged", run=SCRATCH)
    assert lorakit.verify(tmp_path / "merged", full=True).folded_tensors > 10
    merged = type(model).from_pretrained(tmp_path / "merged")
    before = dict(model.named_modules())
    after = dict(merged.named_modules())
    for module, delta in expected(path, family).items():
        gained = (after[module].weight - before[module].weight).detach().double().numpy()
        np.testing.assert_allclose(gained, delta, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", MODELS)
def test_a_merged_pipeline_loads_with_the_updates_in_it(tmp_path, family):
    make, *_ = MODELS[family]
    component, model = FAMILIES[family].component, make()
    model.save_pretrained(tmp_path / "pipe" / component)
    (tmp_path / "pipe/model_index.json").write_text("{}")
    path = kohya(family, model, tmp_path / "kohya.safetensors")
    lorakit.merge(tmp_path / "pipe", path, tmp_path / "out", run=SCRATCH)
    merged = type(model).from_pretrained(tmp_path / "out" / component)
    before, after = (dict(m.named_parameters()) for m in (model, merged))
    wanted = expected(path, family)
    for name, values in before.items():
        delta = wanted.pop(name.removesuffix(".weight"), 0.0)
        found = after[name].detach().double().numpy()
        np.testing.assert_allclose(found, values.detach().double().numpy() + delta, atol=1e-5)
    assert not wanted
