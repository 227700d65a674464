"""Names that no table of families has: those of a base, and those that a user gives; and both
spellings of CLIP.
"""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.adapter.files.reading import open_file
from lorakit.cli import cli
from tests.files.making_loras import updates

SCRATCH = lorakit.RunOptions(sync=False)
WIDTH, RANK = 12, 2
LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
MODULES = [f"model.layers.{n}.{m}" for n in (0, 11) for m in LAYERS]


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype("f4")


def factors(modules, *, prefix="lora_unet_", alpha=1.0, rank=RANK, out=WIDTH):
    """A file of kohya's names, flattened, with factors and alphas of these modules."""
    tensors = {}
    for seed, module in enumerate(modules):
        name = prefix + module.replace(".", "_")
        tensors[f"{name}.lora_down.weight"] = drawn(seed, rank, WIDTH)
        tensors[f"{name}.lora_up.weight"] = drawn(seed + 99, out, rank)
        tensors[f"{name}.alpha"] = np.array(alpha, "f4")
    return tensors


def saved(path, tensors, **metadata):
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    return path


def base(folder, modules=MODULES, **more):
    weights = {f"{m}.weight": np.zeros((WIDTH, WIDTH), "f2") for m in modules}
    weights |= {"model.norm.weight": np.zeros(WIDTH, "f2"), **more}
    return saved(folder / "model.safetensors", weights).parent


def product(tensors, name):
    a, b = (tensors[f"{name}.lora_{x}.weight"].astype("f8") for x in ("down", "up"))
    return float(tensors[f"{name}.alpha"]) / len(a) * b @ a


@pytest.mark.parametrize("prefix", ["lora_unet_", "lora_te_", "lycoris_"])
@pytest.mark.parametrize("whole", [False, True])
def test_flattened_names_are_those_of_the_base(tmp_path, prefix, whole):
    tensors = factors(MODULES, prefix=prefix)
    path = saved(tmp_path / "a.safetensors", tensors)
    there = base(tmp_path / "base")
    named = there / "model.safetensors" if whole else there
    done = lorakit.convert(path, tmp_path / "out", to="peft", base=named, run=SCRATCH)
    assert (done.family, done.modules) == ("language", len(MODULES))
    found = updates(tmp_path / "out")
    assert {m for _, m in found} == set(MODULES)
    for module in MODULES:
        expected = product(tensors, prefix + module.replace(".", "_"))
        np.testing.assert_allclose(found["", module], expected, rtol=1e-6, atol=1e-7)
    lorakit.merge(there, tmp_path / "out", tmp_path / "merged", run=SCRATCH)
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert all(merged[f"{m}.weight"].any() for m in MODULES)


def test_names_are_those_of_the_index_of_a_base_in_shards(tmp_path):
    folder = tmp_path / "base"
    names = {}
    for number, some in enumerate((MODULES[:3], MODULES[3:]), 1):
        weights = {f"{m}.weight": np.zeros((WIDTH, WIDTH), "f2") for m in some}
        file = saved(folder / f"model-0000{number}-of-00002.safetensors", weights)
        names |= dict.fromkeys(weights, file.name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    path = saved(tmp_path / "a.safetensors", factors(MODULES))
    for number, named in enumerate((folder, index)):
        out = tmp_path / f"out{number}"
        lorakit.convert(path, out, to="peft", base=named, run=SCRATCH)
        assert {m for _, m in updates(out)} == set(MODULES)


def test_without_a_base_flattened_names_of_no_family_are_refused(tmp_path):
    path = saved(tmp_path / "a.safetensors", factors(MODULES))
    with pytest.raises(lorakit.LorakitError, match="no family that is known") as caught:
        lorakit.convert(path, tmp_path / "out", to="peft", run=SCRATCH)
    assert caught.value.exit_code == 4


def test_a_name_that_is_two_of_the_base_is_refused_with_both(tmp_path):
    there = base(tmp_path / "base", [*MODULES, "model.layers.0.self_attn_q.proj"])
    path = saved(tmp_path / "a.safetensors", factors(MODULES))
    with pytest.raises(lorakit.LorakitError) as caught:
        lorakit.convert(path, tmp_path / "out", to="peft", base=there, run=SCRATCH)
    assert caught.value.exit_code == 4
    said = str(caught.value)
    assert "'model.layers.0.self_attn.q_proj'" in said
    assert "'model.layers.0.self_attn_q.proj'" in said


def test_modules_that_the_base_has_not_are_among_the_unknown(tmp_path):
    there = base(tmp_path / "base")
    path = saved(tmp_path / "a.safetensors", factors([*MODULES, "model.layers.99.mlp.down_proj"]))
    with pytest.raises(lorakit.LorakitError, match="3 tensors belong to no module") as caught:
        lorakit.convert(path, tmp_path / "out", to="peft", base=there, run=SCRATCH)
    assert caught.value.exit_code == 4
    assert "lora_unet_model_layers_99_mlp_down_proj" in str(caught.value)
    done = lorakit.convert(
        path, tmp_path / "out", to="peft", base=there, drop="layers_99", run=SCRATCH
    )
    assert done.modules == len(MODULES)
    assert len(done.dropped) == 3


def test_a_base_of_other_shapes_is_refused(tmp_path):
    there = base(tmp_path / "base")
    path = saved(tmp_path / "a.safetensors", factors(MODULES, out=WIDTH + 1))
    with pytest.raises(lorakit.LorakitError, match="13 outputs and 12 inputs"):
        lorakit.convert(path, tmp_path / "out", to="peft", base=there, run=SCRATCH)


def test_a_family_that_knows_the_names_stays(tmp_path):
    """A base is asked only for what no table knows."""
    path = saved(tmp_path / "a.safetensors", factors(["double_blocks.0.img_attn.proj"]))
    there = base(tmp_path / "base", ["double.blocks_0.img.attn_proj"])
    done = lorakit.convert(path, tmp_path / "out", to="diffusers", base=there, run=SCRATCH)
    assert done.family == "flux"


MAPPED = {
    "lora_unet_blk0_query": "transformer.transformer_blocks.0.attn.to_q",
    "lora_unet_blk0_feed": "lora_unet_double_blocks_0_img_mlp_0",
}


def test_a_key_map_file_gives_names_that_nothing_knows(tmp_path):
    tensors = factors([n.removeprefix("lora_unet_") for n in MAPPED])
    tensors |= factors(["double_blocks.0.img_mod.lin"])
    path = saved(tmp_path / "a.safetensors", tensors)
    table = tmp_path / "names.json"
    table.write_text(json.dumps(MAPPED))
    options = {"family": "flux", "key_map_file": table, "run": SCRATCH}
    lorakit.convert(path, tmp_path / "out", to="diffusers", **options)
    found = updates(tmp_path / "out")
    there = {
        "lora_unet_blk0_query": "transformer_blocks.0.attn.to_q",
        "lora_unet_blk0_feed": "transformer_blocks.0.ff.net.0.proj",
        "lora_unet_double_blocks_0_img_mod_lin": "transformer_blocks.0.norm1.linear",
    }
    assert {m for _, m in found} == set(there.values())
    for name, module in there.items():
        np.testing.assert_allclose(
            found["transformer", module], product(tensors, name), rtol=1e-6, atol=1e-7
        )
    lorakit.convert(path, tmp_path / "x.safetensors", to="kohya", **options)  # not a copy
    assert "lora_unet_double_blocks_0_img_mlp_0.alpha" in load_file(tmp_path / "x.safetensors")


def test_a_key_map_of_patterns_renames_modules_of_the_file(tmp_path):
    path = saved(tmp_path / "a.safetensors", factors(["dit.double_blocks.0.img_attn.proj"]))
    done = lorakit.convert(
        path, tmp_path / "out", to="diffusers", key_map=["_dit_=_"], family="flux", run=SCRATCH
    )
    assert done.steps[0].name == "transformer.transformer_blocks.0.attn.to_out.0"


@pytest.mark.parametrize(
    ("table", "said", "code"),
    [
        ({"lora_unet_nothing": "x"}, "no module 'lora_unet_nothing'", 4),
        (dict.fromkeys(MAPPED, "lora_unet_img_in"), "two of its modules", 4),
        ({"lora_unet_blk0_query": 3}, "no name for", 2),
        (["lora_unet_blk0_query"], "not a JSON object", 3),
    ],
)
def test_a_key_map_file_that_does_not_fit_is_refused(tmp_path, table, said, code):
    path = saved(
        tmp_path / "a.safetensors", factors([n.removeprefix("lora_unet_") for n in MAPPED])
    )
    (tmp_path / "names.json").write_text(json.dumps(table))
    with pytest.raises(lorakit.LorakitError, match=said) as caught:
        lorakit.convert(
            path,
            tmp_path / "out",
            to="diffusers",
            key_map_file=tmp_path / "names.json",
            run=SCRATCH,
        )
    assert caught.value.exit_code == code


def test_a_key_map_that_would_not_be_heard_is_refused(tmp_path):
    path = saved(tmp_path / "a.safetensors", factors(MODULES))
    options = {"base": base(tmp_path / "base"), "run": SCRATCH}
    lorakit.convert(path, tmp_path / "mlx", to="mlx", **options)
    with pytest.raises(lorakit.LorakitError, match="not for mlx") as caught:
        lorakit.convert(tmp_path / "mlx", tmp_path / "out", to="peft", key_map=["a=b"], run=SCRATCH)
    assert caught.value.exit_code == 2


LAYER = "text_model.encoder.layers.3.mlp.fc1"
FLAT = LAYER.removeprefix("text_model.")
SPELLED = {
    "kohya": "lora_te1_{}.lora_down.weight",
    "comfyui": "text_encoders.clip_l.transformer.{}.lora_A.weight",
    "diffusers": "text_encoder.{}.lora_A.weight",
    "peft": "base_model.model.{}.lora_A.weight",
}


@pytest.mark.parametrize("clip", ["text_model", "flat"])
@pytest.mark.parametrize("to", SPELLED)
def test_clip_is_spelled_as_asked_for(tmp_path, to, clip):
    tensors = factors([LAYER], prefix="lora_te1_") | factors([LAYER], prefix="lora_te2_")
    tensors |= factors(["input_blocks.4.1.proj_in"])
    path = saved(tmp_path / "a.safetensors", tensors)
    options = {"family": "sdxl", "to": to, "clip_prefix": clip, "run": SCRATCH}
    done = lorakit.convert(path, tmp_path / "out", **options)
    assert [s.modules for s in done.steps] == [(d.module,) for d in open_file(path).deltas]
    found = {n for p in (tmp_path / "out").rglob("*.safetensors") for n in load_file(p)}
    name = FLAT if clip == "flat" else LAYER
    assert SPELLED[to].format(name.replace(".", "_") if to == "kohya" else name) in found
    if to == "kohya":  # a CLIPTextModelWithProjection
        assert SPELLED[to].format(LAYER.replace(".", "_")).replace("te1", "te2") in found
    if to == "peft":
        config = (tmp_path / "out/text_encoder/adapter_config.json").read_text()
        assert ("text_model" in config) == (clip == "text_model")
        return
    one, other = updates(path), updates(tmp_path / "out")
    assert set(one) == set(other)
    assert all(np.allclose(one[k], other[k], rtol=1e-6) for k in one)


def test_a_file_in_the_format_asked_for_is_spelled_anew_for_flat(tmp_path):
    path = saved(tmp_path / "a.safetensors", factors([LAYER], prefix="lora_te_"))
    out = tmp_path / "b.safetensors"
    lorakit.convert(path, out, to="kohya", family="sd1", clip_prefix="flat", run=SCRATCH)
    assert set(load_file(out)) == set(factors([FLAT], prefix="lora_te_"))
    lorakit.convert(out, tmp_path / "c.safetensors", to="comfyui", family="sd1", run=SCRATCH)
    lorakit.convert(
        tmp_path / "c.safetensors",
        tmp_path / "d.safetensors",
        to="kohya",
        family="sd1",
        run=SCRATCH,
    )
    again = load_file(tmp_path / "d.safetensors")
    assert {n: t.tobytes() for n, t in again.items()} == {
        n: t.tobytes() for n, t in load_file(path).items()
    }


def invoked(*arguments):
    return CliRunner().invoke(cli, ["convert", *map(str, arguments), "--no-fsync"])


def test_the_command_takes_names_from_a_base_and_from_files(tmp_path):
    path = saved(tmp_path / "a.safetensors", factors(MODULES))
    there = base(tmp_path / "base")
    done = invoked(path, "-o", tmp_path / "out", "--to", "peft", "--base", there)
    assert done.exit_code == 0, done.output
    assert {m for _, m in updates(tmp_path / "out")} == set(MODULES)
    table = {"lora_unet_" + m.replace(".", "_"): m for m in MODULES}
    (tmp_path / "names.json").write_text(json.dumps(table))
    for option in ("--key-map-file", "--keymap"):
        out = tmp_path / option.strip("-")
        done = invoked(path, "-o", out, option, tmp_path / "names.json")
        assert done.exit_code == 0, done.output
        assert {m for _, m in updates(out)} == set(MODULES)


def test_the_command_takes_the_spelling_of_clip(tmp_path):
    path = saved(tmp_path / "a.safetensors", factors([LAYER], prefix="lora_te_"))
    out = tmp_path / "b.safetensors"
    options = ("--to", "kohya", "--family", "sd1", "--clip-prefix", "flat")
    assert invoked(path, "-o", out, *options).exit_code == 0
    assert set(load_file(out)) == set(factors([FLAT], prefix="lora_te_"))


def test_what_is_for_other_formats_does_not_go_with_other_names(tmp_path):
    path = saved(tmp_path / "a.safetensors", factors(MODULES))
    there = base(tmp_path / "base")
    options = ("--names", "disk", "--base", there, "--clip-prefix", "flat")
    done = invoked(path, "-o", tmp_path / "out", *options)
    assert done.exit_code == 2
    assert "--clip-prefix" in done.output


@pytest.mark.parametrize("to", ["kohya", "diffusers", "comfyui"])
def test_a_folder_of_peft_that_is_called_as_a_text_encoder_is_for_that(tmp_path, to):
    """As `convert --to peft` writes them, and PEFT's own examples."""
    module = "text_model.encoder.layers.0.self_attn.q_proj"
    name = f"lora_te2_{module.replace('.', '_')}"
    unet = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    tensors = factors([module], prefix="lora_te2_")
    tensors |= {n.replace(name, unet): v for n, v in tensors.items()}
    path = saved(tmp_path / "a.safetensors", tensors)
    lorakit.convert(path, tmp_path / "peft", to="peft", family="sdxl", run=SCRATCH)
    encoder, out = tmp_path / "peft/text_encoder_2", tmp_path / "b.safetensors"
    lorakit.convert(encoder, out, to=to, family="sdxl", run=SCRATCH)
    (delta,) = open_file(out, family="sdxl").deltas
    assert (delta.component, delta.module) == ("text_encoder_2", module)
    a, b = (delta.tensors[x].read().astype("f8") for x in "ab")
    np.testing.assert_allclose(delta.scaling * b @ a, product(tensors, name), atol=1e-6)
    if to == "kohya":
        assert load_file(out).keys() == {n for n in tensors if n.startswith(name)}
