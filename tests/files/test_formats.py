"""Every format and family: recognised as itself, converted, and back to the same bytes; the update
of every module against the algebra in float64.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.adapter.files.reading import open_file
from lorakit.errors import MisfitError
from lorakit.formats.components import prefix_of
from lorakit.formats.families import FAMILIES
from lorakit.formats.recognise import recognise
from lorakit.formats.templates import NAMESPACES, denoiser, encoder
from lorakit.verbs.reformat.projecting import as_plain
from tests.files.making_loras import RANK, diffusers_file, modules, pairs

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


def dense(delta):
    delta = as_plain(delta)
    a, b = (delta.tensors[r].read().astype("f8") for r in "ab")
    return delta.scaling * b.reshape(len(b), -1) @ a.reshape(len(a), -1)


def updates(path, **options):
    return {(d.component, d.module): dense(d) for d in open_file(path, **options).deltas}


def weights(out):
    return out if out.suffix else next(out.glob("*.safetensors"))


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


DENSE = ["flux", "sd3", "hunyuan_video", "lumina2", "z_image", "mochi", "pixart", "minimax_h3"]


@pytest.mark.parametrize("family", DENSE)
def test_a_dense_fused_projection_is_cut_and_joined_bit_for_bit(tmp_path, family):
    """As trainers write it: one A for all parts, and a B without zeros."""
    rng = np.random.default_rng(0)
    tensors, width = {}, 12
    for row in denoiser(family).rows:
        if len(row.parts) > 1 and "_qkv" not in row.original.rpartition(".")[2]:
            name = "lora_unet_" + row.original.replace("#", "0").replace(".", "_")
            rows = {3: 2 * width if family == "lumina2" else 3 * width, 4: 7 * width}
            height = 20 * len(row.parts) if row.even else rows[len(row.parts)]
            tensors[f"{name}.lora_down.weight"] = rng.standard_normal((2, width)).astype("f2")
            tensors[f"{name}.lora_up.weight"] = rng.standard_normal((height, 2)).astype("f2")
            tensors[f"{name}.alpha"] = np.array(1, "f2")
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    done = lorakit.convert(
        tmp_path / "a.safetensors", tmp_path / "b", to="diffusers", family=family, run=SCRATCH
    )
    assert done.counts == {"split": len(done.steps)}
    lorakit.convert(
        weights(tmp_path / "b"), tmp_path / "c.safetensors", to="kohya", family=family, run=SCRATCH
    )
    again = load_file(tmp_path / "c.safetensors")
    assert set(again) == set(tensors)
    for name, values in tensors.items():
        assert (again[name].dtype, again[name].shape) == (values.dtype, values.shape)
        assert again[name].tobytes() == values.tobytes(), name
    one, other = (updates(tmp_path / p, family=family) for p in ("a.safetensors", "c.safetensors"))
    assert all(np.array_equal(one[k], other[k]) for k in one)


def test_a_file_in_the_format_asked_for_is_copied_to_the_byte(files, tmp_path):
    for (family, to), path in files.items():
        if family in UNETS and to == "comfyui":
            continue
        out = tmp_path / f"{family}{to}.safetensors"
        lorakit.convert(path, out, to=to, family=family, run=SCRATCH)
        assert out.read_bytes() == path.read_bytes()


FLUX = "transformer.transformer_blocks.0.attn.to_q"
SHARED = {
    "lora_unet_img_in.lora_down.weight": (RANK, 8),
    "lora_unet_img_in.lora_up.weight": (8, RANK),
}


def kohya(path, tensors, alpha=1.0, **more):
    rng = np.random.default_rng(1)
    made = {n: rng.standard_normal(s).astype("f4") for n, s in tensors.items()}
    modules = dict.fromkeys(n.partition(".")[0] for n in tensors)
    made |= {f"{m}.alpha": np.array(alpha, "f4") for m in modules}
    save_file({**made, **more}, path, metadata={"ss_network_module": "networks.lora"})
    return path


def test_scalings_are_carried_or_folded(tmp_path):
    path = kohya(tmp_path / "a.safetensors", SHARED, alpha=0.5)
    expected = updates(path, family="flux")
    for alpha in ("keep", "fold"):
        done = lorakit.convert(
            path, tmp_path / alpha, to="diffusers", family="flux", alpha=alpha, run=SCRATCH
        )
        assert done.counts == ({"renamed": 1} if alpha == "keep" else {"folded": 1})
        found = updates(weights(tmp_path / alpha))
        for key, delta in expected.items():
            np.testing.assert_allclose(found[key], delta, rtol=1e-6)
    kept, folded = (load_file(weights(tmp_path / a)) for a in ("keep", "fold"))
    name = "transformer.x_embedder.lora_A.weight"
    assert kept[name].tobytes() == load_file(path)["lora_unet_img_in.lora_down.weight"].tobytes()
    np.testing.assert_array_equal(folded[name], kept[name] / 2)  # a power of two: exact
    lorakit.convert(weights(tmp_path / "keep"), tmp_path / "x.safetensors", to="kohya", run=SCRATCH)
    again, before = load_file(tmp_path / "x.safetensors"), load_file(path)
    assert {n: t.tobytes() for n, t in again.items()} == {n: t.tobytes() for n, t in before.items()}


def test_folding_says_by_how_much_it_rounds(tmp_path):
    path = kohya(tmp_path / "a.safetensors", SHARED, alpha=0.6)
    tensors = {n: t.astype("f2") if t.ndim else t for n, t in load_file(path).items()}
    save_file(tensors, path)
    done = lorakit.convert(
        path, tmp_path / "out", to="diffusers", family="flux", alpha="fold", run=SCRATCH
    )
    assert 1e-5 < done.error < 1e-3


def test_metadata_of_kohya_is_kept_and_its_hash_is_of_the_new_file(tmp_path):
    path = kohya(tmp_path / "a.safetensors", SHARED)
    metadata = {"ss_network_dim": "2", "sshs_model_hash": "stale", "modelspec.title": "x"}
    metadata["modelspec.hash_sha256"] = "stale"
    save_file(load_file(path), path, metadata=metadata)
    before = path
    for to in ("comfyui", "diffusers", "kohya"):
        after = tmp_path / f"{to}.safetensors"
        lorakit.convert(before, after, to=to, family="flux", run=SCRATCH)
        found = open_file(after).metadata
        assert (found["ss_network_dim"], found["modelspec.title"]) == ("2", "x")
        start = int.from_bytes(after.read_bytes()[:8], "little") + 8
        whole = hashlib.sha256(after.read_bytes()[start:]).hexdigest()
        assert found["sshs_model_hash"] == whole
        assert found["modelspec.hash_sha256"] == f"0x{whole}"
        before = after


@pytest.mark.parametrize("algo", ["loha", "lokr", "tucker"])
def test_other_algorithms_become_plain_factors_exactly(tmp_path, algo):
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    shapes = {
        "loha": {f"hada_w{n}_{x}": s for n in (1, 2) for x, s in (("a", (8, 3)), ("b", (3, 4)))},
        "lokr": {"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (2, 2)},
        "tucker": {
            "lora_down.weight": (3, 4, 1, 1),
            "lora_mid.weight": (3, 3, 3, 3),
            "lora_up.weight": (8, 3, 1, 1),
        },
    }[algo]
    path = kohya(tmp_path / "a.safetensors", {f"{name}.{k}": s for k, s in shapes.items()}, alpha=2)
    expected = updates(path, family="sd1")
    done = lorakit.convert(path, tmp_path / "out", to="diffusers", family="sd1", run=SCRATCH)
    assert done.counts == {"computed": 1}
    found = updates(weights(tmp_path / "out"), family="sd1")
    for key, delta in expected.items():
        np.testing.assert_allclose(found[key], delta, rtol=1e-5, atol=1e-6)
    done = lorakit.convert(
        path, tmp_path / "c.safetensors", to="comfyui", family="sd1", run=SCRATCH
    )
    assert done.counts == {"renamed": 1}


def test_without_an_alpha_a_loha_stays_without(tmp_path):
    name, rng = "lora_unet_img_in", np.random.default_rng(0)
    shapes = {f"hada_w{n}_{x}": s for n in (1, 2) for x, s in (("a", (8, 3)), ("b", (3, 4)))}
    tensors = {f"{name}.{k}": rng.standard_normal(s).astype("f4") for k, s in shapes.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    options = {"to": "comfyui", "family": "flux", "run": SCRATCH}
    lorakit.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **options)
    assert not any(n.endswith(".alpha") for n in load_file(tmp_path / "b.safetensors"))
    one, other = (updates(tmp_path / f"{n}.safetensors", family="flux") for n in "ab")
    assert all(np.array_equal(one[k], other[k]) for k in one)


def test_dora_goes_where_there_is_a_place_for_it(tmp_path):
    tensors = {
        "lora_unet_img_in.lora_down.weight": (RANK, 8),
        "lora_unet_img_in.lora_up.weight": (6, RANK),
        "lora_unet_img_in.dora_scale": (6, 1),
    }
    path = kohya(tmp_path / "a.safetensors", tensors, alpha=RANK)
    lorakit.convert(path, tmp_path / "b", to="diffusers", family="flux", run=SCRATCH)
    found = load_file(weights(tmp_path / "b"))["transformer.x_embedder.lora_magnitude_vector"]
    assert found.shape == (6,)
    lorakit.convert(
        weights(tmp_path / "b"),
        tmp_path / "c.safetensors",
        to="comfyui",
        family="flux",
        run=SCRATCH,
    )
    again = load_file(tmp_path / "c.safetensors")["diffusion_model.img_in.dora_scale"]
    assert again.tobytes() == load_file(path)["lora_unet_img_in.dora_scale"].tobytes()
    assert again.shape == (6, 1)
    by_inputs = {**tensors, "lora_unet_img_in.dora_scale": (1, 8)}
    path = kohya(tmp_path / "d.safetensors", by_inputs)
    with pytest.raises(lorakit.LorakitError, match="norms of its inputs"):
        lorakit.convert(path, tmp_path / "e", to="diffusers", family="flux", run=SCRATCH)
    assert not (tmp_path / "e").exists()


ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
CLIP = "text_encoder.text_model.encoder.layers.0"
OLD = {
    f"{module}{way}.weight": shape
    for module in (
        f"{ATTENTION}.processor.to_q_lora.",
        f"{ATTENTION}.processor.to_out_lora.",
        f"{CLIP}.self_attn.to_q_lora.",
        f"{CLIP}.mlp.fc1.lora_linear_layer.",
    )
    for way, shape in (("down", (2, 8)), ("up", (8, 2)))
}


def test_older_spellings_of_diffusers_are_read(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal(s).astype("f4") for n, s in OLD.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    opened = open_file(tmp_path / "a.safetensors")
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert [(d.component, d.module) for d in opened.deltas] == [
        ("text_encoder", "text_model.encoder.layers.0.mlp.fc1"),
        ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj"),
        ("unet", f"{block}.to_out.0"),
        ("unet", f"{block}.to_q"),
    ]


def test_text_encoders_of_transformers_5_are_read(tmp_path):
    names = ["lora_te1_encoder_layers_3_mlp_fc1", "lora_te2_encoder_layers_3_self_attn_q_proj"]
    shapes = {
        f"{n}.lora_{x}.weight": s for n in names for x, s in (("down", (2, 8)), ("up", (8, 2)))
    }
    path = kohya(tmp_path / "a.safetensors", shapes)
    found = [(d.component, d.module) for d in open_file(path, family="sdxl").deltas]
    assert found == [
        ("text_encoder", "text_model.encoder.layers.3.mlp.fc1"),
        ("text_encoder_2", "text_model.encoder.layers.3.self_attn.q_proj"),
    ]


def test_what_is_unknown_is_named_and_dropped_or_kept_on_request(tmp_path):
    path = kohya(tmp_path / "a.safetensors", SHARED, bundle=np.ones(3, "f4"))
    with pytest.raises(lorakit.LorakitError, match="'bundle'") as caught:
        lorakit.convert(path, tmp_path / "b", to="comfyui", family="flux", run=SCRATCH)
    assert caught.value.exit_code == 4
    done = lorakit.convert(
        path, tmp_path / "b", to="comfyui", family="flux", drop="bundle", run=SCRATCH
    )
    assert list(done.dropped) == ["bundle"]
    done = lorakit.convert(
        path, tmp_path / "c", to="comfyui", family="flux", keep_unknown=True, run=SCRATCH
    )
    assert load_file(weights(tmp_path / "c"))["bundle"].tolist() == [1, 1, 1]


def test_half_a_pair_and_two_algorithms_are_refused(tmp_path):
    half = {"lora_unet_img_in.lora_down.weight": (2, 8)}
    both = {**SHARED, "lora_unet_img_in.hada_w1_a": (8, 2)}
    for number, (tensors, said) in enumerate(((half, "other half"), (both, "tensors of"))):
        path = kohya(tmp_path / f"{number}.safetensors", tensors)
        with pytest.raises(lorakit.LorakitError, match=said):
            open_file(path)


CONV = "lora_unet_down_blocks_0_resnets_0_conv1"


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"lora_down.weight": (2, 8), "lora_up.weight": (8, 4)}, r"is \[8, 4\], .*: no pair"),
        ({"lora_down.weight": (16,), "lora_up.weight": (8, 2)}, r"is \[16\]: no pair"),
        ({"lora_down.weight": (2, 8), "lora_up.weight": (8, 2, 3, 3)}, "no pair"),
        ({"lora_down.weight": (2, 8), "lora_up.weight": (8, 2), "alpha": (2,)}, r"\[2\], not one"),
        ({"lora_down.weight": (2, 4), "lora_up.weight": (8, 2), "dora_scale": (4,)}, "8 outputs"),
        ({"lora_down.weight": (), "lora_up.weight": (8, 2)}, "no pair"),
        (
            {
                "lora_down.weight": (3, 4, 1, 1),
                "lora_mid.weight": (3, 2, 3, 3),
                "lora_up.weight": (8, 3, 1, 1),
            },
            "no pair",
        ),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (3, 2)}, "no pair"),
        ({"lokr_w1": (2, 2), "lokr_w2_a": (4, 2, 1), "lokr_w2_b": (2, 2)}, "no pair"),
        (
            {f"hada_w{n}_{x}": s for n in (1, 2) for x, s in (("a", (8, 3)), ("b", (n, 4)))},
            r"hada_w1_a is \[8, 3\], .*hada_w1_b is \[1, 4\]: no pair",
        ),
    ],
)
def test_factors_without_a_product_are_refused(tmp_path, shapes, said):
    tensors = {f"{CONV}.{k}": np.ones(s, "f4") for k, s in shapes.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(MisfitError, match=said):
        open_file(tmp_path / "a.safetensors", family="sd1")
    assert lorakit.inspect(tmp_path / "a.safetensors").kind  # which looks at names alone


def test_every_family_is_in_the_how_to():
    text = Path(__file__).parents[2].joinpath("docs/howto/convert-a-lora.md").read_text()
    assert [f for f in FAMILIES if f"`{f}`" not in text] == []


def test_names_of_no_family_are_said_to_be_so(tmp_path):
    tensors = {f"lora_unet_nothing.lora_{x}.weight": (2, 2) for x in ("down", "up")}
    path = kohya(tmp_path / "a.safetensors", tensors)
    with pytest.raises(lorakit.LorakitError, match="no family that is known"):
        lorakit.convert(path, tmp_path / "b", to="diffusers", run=SCRATCH)


def test_the_longest_prefix_is_taken():
    assert prefix_of("unet.base_model.model.conv_in")[1] == "conv_in"
    assert prefix_of("lora_te1_x")[0].slot == "te1"
    assert recognise(["x_embedder"], {}).places


@every_family
@pytest.mark.parametrize("to", ["diffusers", "kohya", "comfyui"])
def test_inspect_says_what_it_is(files, family, to):
    found = lorakit.inspect(files[family, to])
    assert found.kind == "adapter"
    assert found.facts["family"] == FAMILIES[family].title
    assert found.facts["modules"] > 10
    assert not found.notes


def test_what_several_families_are_called_is_said(tmp_path):
    names = [
        f"transformer.transformer_blocks.0.attn.to_{x}.lora_{y}.weight" for x in "qk" for y in "AB"
    ]
    tensors = {n: np.ones((4, 4), "f4") for n in names}
    save_file(tensors, tmp_path / "a.safetensors")
    options = {"to": "kohya", "run": SCRATCH}
    done = lorakit.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", **options)
    assert done.notes[0].startswith("its names fit Stable Diffusion 3, Qwen-Image, HunyuanVideo")
    assert "FLUX.1 is taken, or what --family" in done.notes[0]
    assert "FLUX.1 is taken" in lorakit.inspect(tmp_path / "a.safetensors").notes[0]
    done = lorakit.convert(
        tmp_path / "a.safetensors", tmp_path / "c.safetensors", family="sd3", **options
    )
    assert not done.notes


def test_inspect_says_what_is_wrong(tmp_path):
    path = kohya(tmp_path / "a.safetensors", {"lora_unet_img_in.lora_down.weight": (2, 8)})
    assert "other half" in lorakit.inspect(path).notes[0]
    path = kohya(tmp_path / "b.safetensors", SHARED, bundle=np.ones(3, "f4"))
    assert "'bundle'" in lorakit.inspect(path).notes[0]


def test_a_plain_checkpoint_is_no_adapter(tmp_path):
    save_file({"model.norm.weight": np.ones(3, "f4")}, tmp_path / "model.safetensors")
    assert lorakit.inspect(tmp_path / "model.safetensors").kind != "adapter"


def test_a_file_for_several_models_is_not_merged_into_one(tmp_path, files):
    (tmp_path / "base").mkdir()
    save_file({"x.weight": np.ones((2, 2), "f4")}, tmp_path / "base/model.safetensors")
    with pytest.raises(lorakit.LorakitError, match="text_encoder"):
        lorakit.merge(tmp_path / "base", files["sdxl", "kohya"], tmp_path / "out", run=SCRATCH)
    path = kohya(tmp_path / "a.safetensors", SHARED, bundle=np.ones(3, "f4"))
    with pytest.raises(lorakit.LorakitError, match="'bundle'"):
        lorakit.merge(tmp_path / "base", path, tmp_path / "out", run=SCRATCH)


def test_parts_with_as_many_rows_are_cut_evenly_whatever_the_inputs(tmp_path):
    """As Mochi has them, whose text is narrower than its heads."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 4)).astype("f4"), rng.standard_normal((30, 2)).astype("f4")
    name = "diffusion_model.blocks.0.attn.qkv_y"
    save_file({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, tmp_path / "a.safetensors")
    found = updates(tmp_path / "a.safetensors", family="mochi")
    for number, part in enumerate("qkv"):
        there = found["transformer", f"transformer_blocks.0.attn1.add_{part}_proj"]
        np.testing.assert_array_equal(there, (b[10 * number :][:10].astype("f8") @ a))


@pytest.mark.parametrize("parts", ["q", "qk", "qv", "v"])
@pytest.mark.parametrize("to", ["comfyui", "kohya"])
def test_parts_of_a_fused_projection_that_were_not_trained_are_zeros(tmp_path, parts, to):
    rng = np.random.default_rng(0)
    tensors = {}
    for part in parts:
        name = f"transformer.transformer_blocks.0.attn.to_{part}"
        tensors[f"{name}.lora_A.weight"] = rng.standard_normal((2, 4)).astype("f4")
        tensors[f"{name}.lora_B.weight"] = rng.standard_normal((4, 2)).astype("f4")
    save_file(tensors, tmp_path / "a.safetensors")
    out = tmp_path / "b.safetensors"
    lorakit.convert(tmp_path / "a.safetensors", out, to=to, family="flux", run=SCRATCH)
    before, after = (updates(p, family="flux") for p in (tmp_path / "a.safetensors", out))
    assert len(after) == 3
    for place, delta in after.items():
        np.testing.assert_array_equal(delta, before.get(place, np.zeros((4, 4))))


def test_a_part_that_was_not_trained_has_as_many_rows_as_the_others(tmp_path):
    rng = np.random.default_rng(0)
    name = "transformer.transformer_blocks.0.attn2.to_k"
    tensors = {
        f"{name}.lora_A.weight": rng.standard_normal((2, 4)).astype("f4"),
        f"{name}.lora_B.weight": rng.standard_normal((10, 2)).astype("f4"),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    out = tmp_path / "b.safetensors"
    lorakit.convert(tmp_path / "a.safetensors", out, to="comfyui", family="pixart", run=SCRATCH)
    up = next(t for n, t in load_file(out).items() if "cross_attn.kv_linear.lora_B" in n)
    assert up.shape == (20, 2)
    assert not up[10:].any()


def test_a_bias_of_peft_comes_back_to_the_byte_and_is_applied_as_peft_does(tmp_path):
    """PEFT scales the bias of lora_B with the rest; what others call diff_b is added as it is."""
    rng, module = np.random.default_rng(0), "blocks.0.attn1.to_q"
    front = f"base_model.model.{module}"
    tensors = {
        f"{front}.lora_A.weight": rng.standard_normal((3, 8)).astype("f2"),
        f"{front}.lora_B.weight": rng.standard_normal((8, 3)).astype("f2"),
        f"{front}.lora_B.bias": rng.standard_normal(8).astype("f2"),
    }
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 1, "lora_bias": True}
    (tmp_path / "peft").mkdir()
    save_file(tensors, tmp_path / "peft/adapter_model.safetensors")
    text = json.dumps({**config, "target_modules": ["to_q"]})
    (tmp_path / "peft/adapter_config.json").write_text(text)
    options = {"family": "wan", "run": SCRATCH}
    lorakit.convert(tmp_path / "peft", tmp_path / "diffusers", to="diffusers", **options)
    held = load_file(tmp_path / "diffusers/pytorch_lora_weights.safetensors")
    for name, values in tensors.items():
        there = name.replace("base_model.model.", "transformer.")
        assert held[there].tobytes() == values.tobytes()
    lorakit.convert(tmp_path / "peft", tmp_path / "k.safetensors", to="kohya", **options)
    bias = load_file(tmp_path / "k.safetensors")["lora_unet_blocks_0_self_attn_q.diff_b"]
    np.testing.assert_allclose(bias, tensors[f"{front}.lora_B.bias"].astype("f8") / 3, rtol=1e-3)
