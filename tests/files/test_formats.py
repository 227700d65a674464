"""Every format and family: recognised as itself, converted, and back to the same bytes; the update
of every module against the algebra in float64.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.adapter.files.reading import open_file
from lorakit.formats.families import FAMILIES
from lorakit.formats.templates import NAMESPACES, denoiser, encoder
from tests.files.making_loras import (
    RANK,
    SHARED,
    diffusers_file,
    kohya,
    modules,
    pairs,
    updates,
    weights,
)

SCRATCH = lorakit.RunOptions(sync=False)
every_family = pytest.mark.parametrize("family", FAMILIES)
# What a file of these formats is read as, for UNets whose files ComfyUI has in kohya's names.
UNETS = ("sd1", "sd2", "sdxl")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of every family in the names of Diffusers, and converted to every other format."""
    folder = tmp_path_factory.mktemp("formats")
    made = {}
    for family in FAMILIES:
        path = folder / f"{family}.safetensors"
        save_file(diffusers_file(family), path, metadata={"format": "pt"})
        made[family, "diffusers"] = path
        for to in ("kohya", "comfyui"):
            out = folder / f"{family}-{to}.safetensors"
            lorakit.convert(path, out, to=to, family=family, run=SCRATCH)
            made[family, to] = out
    return made


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("start", ["diffusers", "comfyui"])
@pytest.mark.parametrize("family", ["flux", "sana", "chroma"])
def test_scalings_of_a_config_beside_go_along_with_a_file(files, tmp_path, family, start, rslora):
    path, out = tmp_path / "a/x.safetensors", tmp_path / "b.safetensors"
    path.parent.mkdir()
    tensors = load_file(files[family, start])
    save_file({n: v for n, v in tensors.items() if not n.endswith(".alpha")}, path)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 3 * RANK, "use_rslora": rslora}
    (path.parent / "adapter_config.json").write_text(json.dumps(config))
    lorakit.convert(path, out, to="diffusers", family=family, run=SCRATCH)
    one, other = updates(path, family=family), updates(out, family=family)
    assert one.keys() == other.keys()
    assert all(np.allclose(one[n], other[n], rtol=1e-6, atol=0) for n in one)


def test_of_two_configs_the_one_beside_counts_for_peft_as_it_does_there(files, tmp_path):
    lorakit.convert(files["qwen_image", "diffusers"], tmp_path / "a", to="peft", run=SCRATCH)
    told = updates(tmp_path / "a")
    path = tmp_path / "a/adapter_model.safetensors"
    metadata = {"lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 9}'}
    save_file(load_file(path), path, metadata=metadata)
    again = updates(tmp_path / "a")
    assert all((again[n] == told[n]).all() for n in told)
    lorakit.convert(tmp_path / "a", tmp_path / "b", to="peft", run=SCRATCH)
    assert len(updates(tmp_path / "b")) == len(told)


@every_family
@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("flat", [False, True])
def test_every_name_is_filled_from_what_is_found_in_it(family, namespace, flat):
    for names in (denoiser(family), encoder("clip"), encoder("t5")):
        seen = set()
        for template, row, part in names.templates(namespace):
            name = template.replace("#", "7").replace(".", "_" if flat else ".")
            found = names.find(name, namespace, flat=flat)
            assert found is not None, name
            assert names.fill(found, namespace, flat=flat) == name
            if name not in seen:
                assert (found.row, found.part) == (row, part)
            seen.add(name)


@every_family
def test_no_two_modules_have_one_flattened_name(family):
    for namespace in NAMESPACES:
        spelled = {}
        for template, _, _ in denoiser(family).templates(namespace):
            assert spelled.setdefault(template.replace(".", "_"), template) == template


@every_family
@pytest.mark.parametrize("to", ["diffusers", "kohya", "comfyui"])
def test_every_file_is_recognised_as_itself_and_nothing_else(files, family, to):
    opened = open_file(files[family, to])
    assert opened.family == family
    assert not opened.extras
    assert opened.format == ("kohya" if family in UNETS and to == "comfyui" else to)
    assert {(d.component, d.module) for d in opened.deltas} == set(modules(family))


@every_family
@pytest.mark.parametrize("to", ["kohya", "comfyui"])
def test_the_way_there_and_back_ends_at_the_same_tensors(files, tmp_path, family, to):
    lorakit.convert(
        files[family, to], tmp_path / "back", to="diffusers", family=family, run=SCRATCH
    )
    again = load_file(weights(tmp_path / "back"))
    before = load_file(files[family, "diffusers"])
    assert set(again) == set(before)
    assert all(again[n].tobytes() == before[n].tobytes() for n in before)
    lorakit.convert(
        weights(tmp_path / "back"), tmp_path / "x.safetensors", to=to, family=family, run=SCRATCH
    )
    assert (tmp_path / "x.safetensors").read_bytes() == files[family, to].read_bytes()


@every_family
def test_updates_are_those_of_the_factors_in_every_format(files, tmp_path, family):
    expected = {k: b.astype("f8") @ a.astype("f8") for k, (a, b) in pairs(family).items()}
    for to in ("kohya", "comfyui"):
        found = updates(files[family, to], family=family)
        assert set(found) == set(expected)
        for key, delta in expected.items():
            np.testing.assert_allclose(found[key], delta, rtol=1e-6, atol=1e-6)
    lorakit.convert(
        files[family, "kohya"], tmp_path / "peft", to="peft", family=family, run=SCRATCH
    )
    parts = sorted((tmp_path / "peft").rglob("*.safetensors"))
    there = {
        (p.parent.name if len(parts) > 1 else FAMILIES[family].component, module): delta
        for p in parts
        for (_, module), delta in updates(p.parent, family="language").items()
    }
    assert set(there) == set(expected)
    for key, delta in expected.items():
        np.testing.assert_allclose(there[key], delta, rtol=1e-6, atol=1e-6)


def test_a_file_in_the_format_asked_for_is_copied_to_the_byte(files, tmp_path):
    for (family, to), path in files.items():
        if family in UNETS and to == "comfyui":
            continue
        out = tmp_path / f"{family}{to}.safetensors"
        lorakit.convert(path, out, to=to, family=family, run=SCRATCH)
        assert out.read_bytes() == path.read_bytes()


FLUX = "transformer.transformer_blocks.0.attn.to_q"


def test_every_family_is_in_the_how_to():
    text = Path(__file__).parents[2].joinpath("docs/howto/convert-a-lora.md").read_text()
    assert [f for f in FAMILIES if f"`{f}`" not in text] == []


@every_family
@pytest.mark.parametrize("to", ["diffusers", "kohya", "comfyui"])
def test_inspect_says_what_it_is(files, family, to):
    found = lorakit.inspect(files[family, to])
    assert found.kind == "adapter"
    assert found.facts["family"] == FAMILIES[family].title
    assert found.facts["modules"] > 10
    assert not found.notes


def test_a_file_for_several_models_is_not_merged_into_one(tmp_path, files):
    (tmp_path / "base").mkdir()
    save_file({"x.weight": np.ones((2, 2), "f4")}, tmp_path / "base/model.safetensors")
    with pytest.raises(lorakit.LorakitError, match="text_encoder"):
        lorakit.merge(tmp_path / "base", files["sdxl", "kohya"], tmp_path / "out", run=SCRATCH)
    path = kohya(tmp_path / "a.safetensors", SHARED, bundle=np.ones(3, "f4"))
    with pytest.raises(lorakit.LorakitError, match="'bundle'"):
        lorakit.merge(tmp_path / "base", path, tmp_path / "out", run=SCRATCH)
