"""The tables of families against the models of Diffusers, built without weights: every module has a
template, and every template a module; and names against Diffusers' own converters of LoRA files.

Source: huggingface/diffusers, src/diffusers/models/transformers and
src/diffusers/loaders/lora_conversion_utils.py
"""

import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from fixtures.models.building import MODELS, layers, read
from lorakit.adapter.files.reading import open_file
from lorakit.formats.families import FAMILIES
from lorakit.formats.recognise import recognise
from lorakit.formats.templates import denoiser, encoder

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from diffusers.loaders import lora_conversion_utils  # noqa: E402

LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
# Templates that are no layers: norms, what only some UNets have, FLUX' rows of XLabs.
NORMS = r"norm(\d|_\w+)?$"
BARE = {
    "wan": rf"{NORMS}|^vace_|^face_|^pose_|scale_shift_table$",
    **dict.fromkeys(("sd1", "sd2", "sdxl"), r"norm\d?$|_norm_out|conv_shortcut|add_embedding"),
    "flux": r"norm_\w+$|single_transformer_blocks\.#\.attn\.to_[qkv]$",
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", MODELS)
def test_the_layers_that_lie_in_the_fixtures_are_those_of_the_model(family):
    assert layers(family) == read(family)


@pytest.mark.parametrize("family", MODELS)
def test_every_module_has_a_template_and_every_template_of_a_layer_a_module(family):
    names, there = denoiser(family), list(read(family))
    found = [names.find(module, "diffusers") for module in there]
    assert [m for m, f in zip(there, found, strict=True) if f is None] == []
    assert [names.fill(f, "diffusers") for f in found] == there
    used = {(f.row, f.part) for f in found}
    unused = [t for t, row, part in names.templates("diffusers") if (row, part) not in used]
    assert [t for t in unused if not re.search(BARE.get(family, NORMS), t)] == []


def test_both_cogviews_go_by_one_table():
    with torch.device("meta"):
        model = diffusers.CogView3PlusTransformer2DModel()
    there = [n for n, m in model.named_modules() if isinstance(m, LAYERS)]
    assert [m for m in there if denoiser("cogview").find(m, "diffusers") is None] == []


# What lies beside the models of the fixtures; a name after the colon tells one from another.
BESIDE = {
    "wan:vace": lambda: diffusers.WanVACETransformer3DModel(vace_layers=[0, 5]),
    "wan:animate": diffusers.WanAnimateTransformer3DModel,
    "cosmos": lambda: diffusers.CosmosTransformer3DModel(extra_pos_embed_type=None),
    "conditioner": lambda: diffusers.AnimaTextConditioner(model_dim=16, target_dim=32),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_models_of_the_same_family_go_by_its_table(kind):
    with torch.device("meta"):
        model = BESIDE[kind]()
    kind = kind.partition(":")[0]
    names = denoiser(kind) if kind in FAMILIES else encoder(kind)
    there = [n for n, m in model.named_modules() if isinstance(m, LAYERS)]
    assert [m for m in there if names.find(m, "diffusers") is None] == []


CONVERTERS = {
    "ltx2": ("_convert_non_diffusers_ltx2_lora_to_diffusers", "diffusion_model."),
    "ideogram4": ("_convert_non_diffusers_ideogram4_lora_to_diffusers", "diffusion_model."),
    "ace_step": ("_convert_non_diffusers_ace_step_lora_to_diffusers", "base_model.model."),
    "minimax_h3": ("_convert_non_diffusers_minimax_h3_lora_to_diffusers", "diffusion_model."),
    "krea2": ("_convert_non_diffusers_krea2_lora_to_diffusers", "diffusion_model."),
    "hidream": ("_convert_non_diffusers_hidream_lora_to_diffusers", "diffusion_model."),
}
# What a converter does not read.
BLOCKS = {"ideogram4": "layers.", "ace_step": "layers."}


@pytest.mark.parametrize("family", CONVERTERS)
def test_diffusers_reads_a_lora_file_of_these_names_as_the_same_modules(family, tmp_path):
    names, (converter, front) = denoiser(family), CONVERTERS[family]
    tensors, rng = {}, np.random.default_rng(0)
    for row in names.rows:
        name = front + row.original.replace("#", "0")
        if row.original.startswith(BLOCKS.get(family, "")):
            height = 12 * len(row.parts)
            tensors[f"{name}.lora_A.weight"] = rng.standard_normal((2, 12)).astype("f4")
            tensors[f"{name}.lora_B.weight"] = rng.standard_normal((height, 2)).astype("f4")
    save_file(tensors, tmp_path / "a.safetensors")
    given = {n: torch.tensor(t) for n, t in tensors.items()}
    theirs = getattr(lora_conversion_utils, converter)(given)
    opened = open_file(tmp_path / "a.safetensors")
    assert (opened.family, opened.extras) == (family, {})
    ours = {
        f"transformer.{d.module}.lora_{x}.weight": d.tensors[x.lower()].read()
        for d in opened.deltas
        for x in "AB"
    }
    assert set(ours) == set(theirs)
    assert all(np.array_equal(theirs[n].numpy(), values) for n, values in ours.items())


def test_diffsynth_has_queries_keys_and_values_of_minimax_head_by_head(tmp_path):
    rng, name = np.random.default_rng(0), "blocks.0.attn.qkv_proj"
    a, b = (rng.standard_normal(s).astype("f4") for s in ((2, 12), (3 * 256, 2)))
    tensors = {f"{name}.lora_A.default.weight": a, f"{name}.lora_B.default.weight": b}
    save_file(tensors, tmp_path / "a.safetensors")
    theirs = lora_conversion_utils._convert_non_diffusers_minimax_h3_lora_to_diffusers(
        {n: torch.tensor(t) for n, t in tensors.items()}
    )
    opened = open_file(tmp_path / "a.safetensors", family="minimax_h3")
    assert len(opened.deltas) == 3
    for delta in opened.deltas:
        there = theirs[f"transformer.{delta.module}.lora_B.weight"].numpy()
        np.testing.assert_array_equal(delta.tensors["b"].read(), there)


def test_a_language_model_is_not_taken_for_a_model_of_sound():
    """Of an encoder without a head, whose names begin with its layers."""
    leaves = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    for front in ("base_model.model.", ""):
        known = recognise([f"{front}layers.{n}.{leaf}" for n in range(3) for leaf in leaves], {})
        assert known.family == "language"
    music = [f"base_model.model.layers.0.{x}_attn.q_proj" for x in ("self", "cross")]
    assert recognise(music, {}).family == "ace_step"


def test_every_family_has_a_title_of_its_own():
    assert len({f.title for f in FAMILIES.values()}) == len(FAMILIES)
