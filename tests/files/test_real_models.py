"""LoRA files of every module of the real models of every family, in every format: names and shapes,
no weights. Each is recognised as itself and as nothing else, and every name comes back.
"""

import re

import pytest

from fixtures.models.building import MODELS, read
from lorakit.formats.components import prefix_of
from lorakit.formats.families import FAMILIES
from lorakit.formats.recognise import recognise
from lorakit.formats.spelling import place_of
from lorakit.formats.templates import denoiser, filled

FORMATS = ("diffusers", "kohya", "comfyui")
every_family = pytest.mark.parametrize("family", FAMILIES)
every_format = pytest.mark.parametrize("to", FORMATS)


def test_every_family_has_a_model():
    assert set(MODELS) == set(FAMILIES)


def spelled(family, to):
    """The modules of a format's file, each with those of the model that it is made of."""
    component, found = FAMILIES[family].component, {}
    for module in read(family):
        place = place_of(to, family, component, module)
        assert place is not None, module
        found.setdefault(place.name, []).append(module)
    return found


def extents(names, shapes):
    """The rows and inputs of the weights of a file's modules."""
    rows = {n: sum(shapes[m][0] for m in modules) for n, modules in names.items()}
    return {n: (rows[n], shapes[modules[0]][1]) for n, modules in names.items()}


@every_family
@every_format
def test_a_file_of_all_modules_is_itself_and_nothing_else(family, to):
    names, shapes = spelled(family, to), read(family)
    known = recognise(list(names), extents(names, shapes))
    assert known.family == family
    assert known.unknown == ()
    assert not known.others


@every_family
@every_format
def test_every_module_comes_back_from_its_name(family, to):
    names = spelled(family, to)
    known = recognise(list(names), {}, family=family)
    for name, modules in names.items():
        found = known.places[name].found
        parts = found.row.parts if found.part is None else (found.row.parts[found.part],)
        assert {filled(p, found.numbers) for p in parts} >= set(modules)
    assert sum(map(len, names.values())) == len(read(family))


@every_family
def test_the_parts_of_every_fused_projection_have_the_rows_of_the_model(family):
    shapes, names, seen = read(family), denoiser(family), set()
    for module in shapes:
        found = names.find(module, "diffusers")
        parts = [filled(p, found.numbers) for p in found.row.parts]
        if len(parts) == 1 or parts[0] in seen or not set(parts) <= set(shapes):
            continue
        seen.add(parts[0])
        rows = [shapes[p][0] for p in parts]
        assert len({shapes[p][1] for p in parts}) == 1
        assert found.row.sizes(sum(rows), shapes[parts[0]][1]) == rows, parts[0]
    fused = [r.original for r in names.rows if len(r.parts) > 1]
    assert seen or all(name.startswith("face_adapter.") for name in fused)  # of another model


@every_family
def test_no_prefix_of_a_format_is_taken_for_another(family):
    for to in FORMATS:
        prefixes = {prefix_of(n)[0].format for n in spelled(family, to)}
        assert len(prefixes) == 1


ATTENTION = r"\.attn1?\.(to_[qkv]|to_out\.0)$"
# Files of some modules only, whose names other families have too: what is in them.
SOME = (
    ("flux", r"blocks.*(attn|proj)", "comfyui"),
    ("flux2", "blocks", "comfyui"),
    ("flux2", "blocks", "kohya"),
    ("flux2", r"\.ff(_context)?\.", "comfyui"),
    ("flux2", "single_.*to_out", "comfyui"),
    ("lumina2", r"\.attn\.to_[qkv]$", "comfyui"),
    ("z_image", r"\.attention\.", "comfyui"),
    *((f, ATTENTION, "diffusers") for f in ("sd3", "qwen_image", "hunyuan_video_15")),
    *((f, ATTENTION, "diffusers") for f in ("mochi", "sana", "cogvideox")),
)


@pytest.mark.parametrize(("family", "pattern", "to"), SOME)
def test_of_names_that_several_families_have_shapes_tell(family, pattern, to):
    shapes = read(family)
    names = {n: m for n, m in spelled(family, to).items() if re.search(pattern, m[0])}
    assert names
    known = recognise(list(names), extents(names, shapes))
    assert (known.family, known.unknown, known.others) == (family, (), ())
    assert recognise(list(names), {}).others


# What else trainers write before names of the original code: the prefix, and names after it.
FRONTS = {
    "transformer.": ("hunyuan_video", ["double_blocks.0.img_attn_qkv", "single_blocks.3.linear1"]),
    "lora_unet__": ("wan", ["blocks_0_self_attn_q", "blocks_3_ffn_0"]),
    "Hunyuan_video_I2V_lora_": ("hunyuan_video", ["double_blocks_0_img_mlp_fc1"]),
    "lycoris_": ("z_image", ["layers_0_attention_qkv", "layers_0_feed_forward_w1"]),
}


@pytest.mark.parametrize("front", FRONTS)
def test_names_of_the_original_code_are_read_behind_any_prefix(front):
    family, names = FRONTS[front]
    known = recognise([front + n for n in names], {})
    assert (known.family, known.unknown) == (family, ())
