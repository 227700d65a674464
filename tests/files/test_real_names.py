"""Names of real trainers' files: every one is known, and has its place in every other format."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.adapter.files.reading import open_file
from lorakit.formats.grouping import extents, format_of, grouped
from lorakit.formats.recognise import recognise
from lorakit.formats.spelling import SPELLINGS, place_of
from lorakit.formats.templates import filled
from lorakit.tensors import TensorInfo
from tests.files.making_loras import updates, weights

FOLDER = Path(__file__).parent.parent.parent / "fixtures/loras"
SCRATCH = lorakit.RunOptions(sync=False)
# File -> format, family, modules.
FILES = {
    "diffusers-flux": ("diffusers", "flux", 494),
    "kohya-anima": ("kohya", "cosmos", 11),
    "kohya-flux": ("kohya", "flux", 304),
    "kohya-qwen-image-lokr": ("kohya", "qwen_image", 8),
    "kohya-sd15": ("kohya", "sd1", 300),
    "kohya-sdxl": ("kohya", "sdxl", 986),
    "kohya-wan": ("kohya", "wan", 300),
    "onetrainer-flux-dora": ("onetrainer", "flux", 506),
    "xlabs-flux": ("xlabs", "flux", 12),
}
every_file = pytest.mark.parametrize("name", FILES)


def infos(name):
    shapes = json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))
    return [TensorInfo(n, "F16", tuple(s)) for n, s in shapes.items()]


def test_every_file_is_in_the_table():
    assert {p.name.removesuffix(".json.gz") for p in FOLDER.glob("*.gz")} == set(FILES)


@every_file
def test_it_is_recognised_and_no_name_is_left(name):
    form, family, modules = FILES[name]
    there = infos(name)
    groups, extras = grouped(there)
    known = recognise(list(groups), extents(groups))
    assert not extras
    assert not known.unknown
    assert known.family == family
    assert len(groups) == len(known.places) == modules
    names = [i.name for i in there]
    assert format_of(names, groups, known, peft=False) == form


@every_file
@pytest.mark.parametrize("to", SPELLINGS)
def test_every_module_has_a_name_of_its_own_in_every_format(name, to):
    groups, _ = grouped(infos(name))
    known = recognise(list(groups), extents(groups))
    modules = {
        (placed.component, filled(part, placed.found.numbers))
        for placed in known.places.values()
        for part in (
            [placed.found.row.parts[placed.found.part]]
            if placed.found.part is not None
            else placed.found.row.parts
        )
    }
    places = {key: place_of(to, known.family, *key) for key in modules}
    assert all(places.values())
    spelled = {}
    for (component, module), place in places.items():
        part = place.found.part if place.found else None
        where = (component if to == "peft" else "", place.name, part)
        assert spelled.setdefault(where, module) == module


def small(name, folder):
    """A file of these names whose weights are narrow."""
    rng, tensors = np.random.default_rng(0), {}
    for info in infos(name):
        shape = tuple(max(1, -(-s // 64)) if s > 64 else s for s in info.shape)
        tensors[info.name] = np.asarray(rng.standard_normal(shape) + 2, "f4")
    save_file(tensors, folder / "a.safetensors", metadata={"format": "pt"})
    return folder / "a.safetensors"


@pytest.mark.parametrize("name", ["kohya-wan", "kohya-qwen-image-lokr", "kohya-anima"])
@pytest.mark.parametrize("to", ["diffusers", "comfyui", "peft"])
def test_a_file_of_these_names_is_converted_whole(tmp_path, name, to):
    path = small(name, tmp_path)
    done = lorakit.convert(path, tmp_path / "out", to=to, run=SCRATCH)
    assert len(done.steps) == FILES[name][2]
    one = updates(path)
    family = "language" if to == "peft" else FILES[name][1]
    there = updates(tmp_path / "out", family=family)
    assert {m for _, m in one} == {m for _, m in there}
    by_module = {m: d for (_, m), d in there.items()}
    for (_, module), delta in one.items():
        scale = np.abs(delta).max()
        np.testing.assert_allclose(by_module[module], delta, rtol=1e-4, atol=1e-5 * scale)


def test_a_mixture_of_onetrainer_keeps_every_module(tmp_path):
    """Names of Diffusers, flattened: Diffusers' own reader keeps half of these."""
    modules = ["attn_to_q", "attn_to_out_0", "ff_net_0_proj", "ff_net_2", "norm1_linear"]
    rng, tensors = np.random.default_rng(0), {}
    for module in [f"transformer_blocks_0_{m}" for m in modules] + ["proj_out"]:
        for way, shape in (("down", (2, 8)), ("up", (8, 2))):
            name = f"lora_transformer_{module}.lora_{way}.weight"
            tensors[name] = rng.standard_normal(shape).astype("f4")
    save_file(tensors, tmp_path / "a.safetensors")
    opened = open_file(tmp_path / "a.safetensors")
    assert (opened.format, opened.family, len(opened.deltas)) == ("onetrainer", "flux", 6)
    lorakit.convert(tmp_path / "a.safetensors", tmp_path / "b", to="diffusers", run=SCRATCH)
    assert len(load_file(weights(tmp_path / "b"))) == 12
