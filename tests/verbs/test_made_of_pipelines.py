"""Adapters made of files for several models of a pipeline: they go wherever those could."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.adapter.adapter import open_adapter
from lorakit.errors import MisfitError
from tests.verbs.adapters import config_of, deltas
from tests.verbs.test_merge_pipeline import SCRATCH, SHAPES, delta, lora, made, moved, pipe

__all__ = ["lora", "pipe"]
KEYS = {component: f"{component}.{module}.weight" for component, (module, *_) in SHAPES.items()}


@pytest.fixture
def half(lora, tmp_path):
    """The file at half its strength."""
    lorakit.combine([lora], tmp_path / "half", weights=[0.5], run=SCRATCH)
    return tmp_path / "half"


@pytest.fixture
def uneven(lora, tmp_path):
    """The sum with a file of other ranks for two of the models."""
    other = made(tmp_path / "other.safetensors", ["unet", "text_encoder"], seed=2)
    lorakit.combine([lora, other], tmp_path / "uneven", run=SCRATCH)
    assert len(config_of(tmp_path / "uneven")["rank_pattern"]) in (1, 2)
    return tmp_path / "uneven"


def test_they_merge_into_the_pipeline(pipe, lora, half, tmp_path):
    lorakit.merge(pipe, half, tmp_path / "out", run=SCRATCH)
    for component in SHAPES:
        expected = 0.5 * delta(lora, component)
        np.testing.assert_allclose(moved(pipe, tmp_path / "out", component), expected, atol=1e-6)


def test_ranks_and_alphas_stay_those_of_their_model(pipe, uneven, tmp_path):
    config = config_of(uneven)
    lorakit.edit(uneven, tmp_path / "edited", alpha=3.0, run=SCRATCH)
    for number, adapter in enumerate((uneven, tmp_path / "edited")):
        lorakit.merge(pipe, adapter, tmp_path / f"out{number}", run=SCRATCH)
        for component, key in KEYS.items():
            found = moved(pipe, tmp_path / f"out{number}", component)
            np.testing.assert_allclose(found, deltas(uneven)[key][0], atol=1e-5)
    assert config["rank_pattern"] == config["alpha_pattern"]


def test_one_of_their_models_can_be_had_alone(pipe, lora, half, tmp_path):
    with pytest.raises(MisfitError, match="the base is only one of them"):
        lorakit.merge(pipe / "unet", half, tmp_path / "out", run=SCRATCH)
    lorakit.merge(pipe / "unet", half, tmp_path / "out/unet", component="unet", run=SCRATCH)
    expected = 0.5 * delta(lora, "unet")
    np.testing.assert_allclose(moved(pipe, tmp_path / "out", "unet"), expected, atol=1e-6)


@pytest.mark.parametrize("to", ["kohya", "diffusers", "comfyui"])
def test_they_convert_to_what_the_files_were(half, uneven, tmp_path, to):
    for adapter in (half, uneven):
        out = tmp_path / f"{adapter.name}.safetensors"
        lorakit.convert(adapter, out, to=to, run=SCRATCH)
        assert lorakit.compare(adapter, out, tolerance=1e-6).common == len(SHAPES)
        assert set(open_adapter(str(out)).parts) == set(SHAPES)


def test_to_peft_they_are_one_folder_a_model(half, tmp_path):
    lorakit.convert(half, tmp_path / "out", to="peft", run=SCRATCH)
    for component, key in KEYS.items():
        found = deltas(tmp_path / "out" / component)
        np.testing.assert_allclose(
            found[key.removeprefix(f"{component}.")], deltas(half)[key], atol=1e-6
        )


def test_files_for_some_models_combine_with_files_for_others(pipe, lora, tmp_path):
    unet = made(tmp_path / "unet.safetensors", ["unet"], seed=2)
    clip = made(tmp_path / "clip.safetensors", ["text_encoder"], seed=3)
    for number, files in enumerate([(lora, unet), (clip, lora), (unet, clip), (unet, clip, lora)]):
        out = tmp_path / f"{number}"
        weights = [0.5, -1.0, 2.0][: len(files)]
        lorakit.combine(files, out, weights=weights, run=SCRATCH)
        lorakit.merge(pipe, out, tmp_path / f"pipe{number}", run=SCRATCH)
        lorakit.merge(pipe, files, tmp_path / f"all{number}", weights=weights, run=SCRATCH)
        for component in SHAPES:
            found, expected = (
                moved(pipe, tmp_path / f"{n}{number}", component) for n in ("pipe", "all")
            )
            np.testing.assert_allclose(found, expected, atol=1e-5)
    assert lorakit.compare(lora, unet).common == 1


def test_files_for_models_of_other_pipelines_do_not(lora, tmp_path):
    name = "transformer.transformer_blocks.0.attn.to_q"
    tensors = {
        f"{name}.lora_A.weight": np.ones((2, 8), "f4"),
        f"{name}.lora_B.weight": np.ones((8, 2), "f4"),
    }
    save_file(tensors, tmp_path / "flux.safetensors")
    unet = made(tmp_path / "unet.safetensors", ["unet"])
    for file in (lora, unet):
        with pytest.raises(MisfitError, match="no other adapter has any of its"):
            lorakit.combine([file, tmp_path / "flux.safetensors"], tmp_path / "out", run=SCRATCH)


UNET_FRONT = "model.diffusion_model."
PACKED = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_"
SINGLE = {
    "sd1": {
        f"{UNET_FRONT}input_blocks.1.0.in_layers.2": (6, 6, 3, 3),
        f"{UNET_FRONT}input_blocks.1.1.transformer_blocks.0.attn2.to_k": (6, 768),
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj": (6, 6),
    },
    "sdxl": {
        f"{UNET_FRONT}output_blocks.0.1.proj_in": (6, 6),
        f"{UNET_FRONT}input_blocks.4.1.transformer_blocks.0.attn2.to_k": (6, 2048),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1": (9, 6),
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc": (8, 5),
    },
    "flux": {
        f"{UNET_FRONT}double_blocks.0.img_attn.qkv": (18, 6),
        f"{UNET_FRONT}single_blocks.0.linear1": (42, 6),
    },
}


@pytest.mark.parametrize("family", SINGLE)
@pytest.mark.parametrize("to", ["kohya", "diffusers", "comfyui"])
def test_what_is_extracted_from_models_in_one_file_converts_too(tmp_path, family, to):
    rng = np.random.default_rng(0)
    base = {f"{n}.weight": rng.standard_normal(s).astype("f4") for n, s in SINGLE[family].items()}
    if family == "sdxl":  # a parameter of its attention and no layer
        base |= {f"{PACKED}weight": rng.standard_normal((15, 5)).astype("f4")}
        base |= {f"{PACKED}bias": rng.standard_normal(15).astype("f4")}
    tuned = {n: w + rng.standard_normal(w.shape).astype("f4") for n, w in base.items()}
    for name, tensors in (("base", base), ("tuned", tuned)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in ("base", "tuned")]
    lorakit.extract(*paths, tmp_path / "lora", rank=64, run=SCRATCH)
    lorakit.merge(paths[0], tmp_path / "lora", tmp_path / "own.safetensors", run=SCRATCH)
    lorakit.convert(tmp_path / "lora", tmp_path / "lora.safetensors", to=to, run=SCRATCH)
    lorakit.merge(
        paths[0], tmp_path / "lora.safetensors", tmp_path / "out.safetensors", run=SCRATCH
    )
    for file in ("own", "out"):
        for name, values in load_file(tmp_path / f"{file}.safetensors").items():
            np.testing.assert_allclose(values, tuned[name], atol=1e-4, err_msg=f"{file} {name}")
