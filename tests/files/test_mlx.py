"""MLX-LM's adapters: there and back with the same updates, whatever ranks and scalings differ."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.adapter.files.reading import open_file
from lorakit.errors import InputError, MisfitError
from tests.files.mlx_scene import UP, Q, converted, mlx
from tests.verbs.adapters import pair, save, updates

SCRATCH = lorakit.RunOptions(sync=False)
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"up_proj": 4}, "alpha_pattern": {"up_proj": 5}},
}


def adapter(folder, *, ranks=(2, 2), extra=None, **config):
    tensors = {**pair(Q, 12, 8, ranks[0]), **pair(UP, 20, 12, ranks[1]), **(extra or {})}
    modules = ["q_proj", "up_proj"]
    return save(folder, tensors, r=2, lora_alpha=3, target_modules=modules, **config)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_every_update_is_the_same(tmp_path, kind):
    ranks = (2, 4) if kind == "patterns" else (2, 2)
    source = adapter(tmp_path / "peft", ranks=ranks, **KINDS[kind])
    converted(source, tmp_path / "mlx", "mlx")
    converted(tmp_path / "mlx", tmp_path / "back", "peft")
    one, there, back = (updates(tmp_path / p) for p in ("peft", "mlx", "back"))
    assert set(one) == set(there) == set(back) == {Q, UP}
    for module, delta in one.items():
        np.testing.assert_allclose(there[module], delta, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(back[module], delta, rtol=1e-6, atol=1e-7)


def test_names_shapes_and_config_are_those_that_mlx_reads(tmp_path):
    source = adapter(tmp_path / "peft", ranks=(2, 4), **KINDS["patterns"])
    done = converted(source, tmp_path / "mlx", "mlx")
    tensors = load_file(tmp_path / "mlx/adapters.safetensors")
    assert {n: t.shape for n, t in tensors.items()} == {
        f"{Q}.lora_a": (8, 4),
        f"{Q}.lora_b": (4, 12),
        f"{UP}.lora_a": (12, 4),
        f"{UP}.lora_b": (4, 20),
    }
    config = json.loads((tmp_path / "mlx/adapter_config.json").read_text())
    assert config["num_layers"] == -1  # all; MLX counts from the last
    assert config["lora_parameters"]["rank"] == 4
    assert config["lora_parameters"]["keys"] == ["mlp.up_proj", "self_attn.q_proj"]
    assert done.counts == {"renamed": 1, "folded": 1}
    scale = config["lora_parameters"]["scale"]
    for module, delta in updates(tmp_path / "peft").items():
        a, b = (tensors[f"{module}.lora_{x}"].astype("f8") for x in "ab")
        np.testing.assert_allclose(scale * (a @ b).T, delta, rtol=1e-6, atol=1e-6)


def test_dora_keeps_its_norms(tmp_path):
    extra = {f"{m}.lora_magnitude_vector": (n,) for m, n in ((Q, 12), (UP, 20))}
    source = adapter(tmp_path / "peft", extra=extra, use_dora=True)
    converted(source, tmp_path / "mlx", "mlx")
    converted(tmp_path / "mlx", tmp_path / "back", "peft")
    before, after = (
        load_file(tmp_path / p / "adapter_model.safetensors") for p in ("peft", "back")
    )
    assert set(before) == set(after)
    assert all(before[n].tobytes() == after[n].tobytes() for n in before)
    config = json.loads((tmp_path / "mlx/adapter_config.json").read_text())
    assert config["fine_tune_type"] == "dora"


def test_a_copy_is_to_the_byte(tmp_path):
    converted(adapter(tmp_path / "peft"), tmp_path / "mlx", "mlx")
    converted(tmp_path / "mlx", tmp_path / "again", "mlx")
    for name in ("adapters.safetensors", "adapter_config.json"):
        assert (tmp_path / "mlx" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_what_has_no_place_is_refused(tmp_path):
    source = adapter(tmp_path / "peft", extra={f"{Q}.lora_B.bias": (12,)}, lora_bias=True)
    with pytest.raises(lorakit.LorakitError, match="has bias"):
        converted(source, tmp_path / "mlx", "mlx")
    path = tmp_path / "flux.safetensors"
    tensors = {f"transformer.x_embedder.lora_{x}.weight": np.ones((2, 2), "f4") for x in "AB"}
    save_file(tensors, path)
    with pytest.raises(lorakit.LorakitError, match="language models"):
        converted(path, tmp_path / "mlx", "mlx")
    with pytest.raises(lorakit.LorakitError, match="folder"):
        converted(adapter(tmp_path / "x"), tmp_path / "mlx.safetensors", "mlx")


def test_a_folder_that_is_broken_is_one_line(tmp_path):
    converted(adapter(tmp_path / "peft"), tmp_path / "mlx", "mlx")
    (tmp_path / "mlx/adapter_config.json").write_text("{}")
    with pytest.raises(lorakit.LorakitError, match="scale"):
        open_file(tmp_path / "mlx")
    (tmp_path / "mlx/adapter_config.json").write_text('{"lora_parameters": {"scale": 1}}')
    save_file({f"{Q}.lora_a": np.ones((8, 2), "f4")}, tmp_path / "mlx/adapters.safetensors")
    with pytest.raises(lorakit.LorakitError, match="lacks one"):
        open_file(tmp_path / "mlx")


def test_a_merge_takes_it_as_it_is(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "base").mkdir()
    shapes = {f"{Q}.weight": (12, 8), f"{UP}.weight": (20, 12)}
    weights = {n: rng.standard_normal(s).astype("f4") for n, s in shapes.items()}
    save_file(weights, tmp_path / "base/model.safetensors")
    converted(adapter(tmp_path / "peft"), tmp_path / "mlx", "mlx")
    for name in ("peft", "mlx"):
        lorakit.merge(tmp_path / "base", tmp_path / name, tmp_path / f"m-{name}", run=SCRATCH)
    one, other = (load_file(tmp_path / f"m-{n}/model.safetensors") for n in ("peft", "mlx"))
    for name in shapes:
        np.testing.assert_allclose(one[name], other[name], rtol=1e-6)


def test_beside_a_file_of_peft_it_is_passed_over_by_every_command(tmp_path):
    converted(adapter(tmp_path / "peft"), tmp_path / "mlx", "mlx")
    shutil.copy(tmp_path / "mlx/adapters.safetensors", tmp_path / "peft")
    assert open_file(tmp_path / "peft").format == "peft"
    assert lorakit.open_adapter(str(tmp_path / "peft")).path.name == "adapter_model.safetensors"
    assert lorakit.inspect(tmp_path / "peft").facts["format"].startswith("PEFT")


@pytest.mark.parametrize("place", ["mlx", "mlx/adapters.safetensors"])
def test_the_folder_and_its_file_open_as_the_same_adapter(tmp_path, place):
    converted(adapter(tmp_path / "peft"), tmp_path / "mlx", "mlx")
    found = lorakit.open_adapter(str(tmp_path / place))
    assert found.name == "mlx"
    assert found.modules.keys() == lorakit.open_adapter(str(tmp_path / "peft")).modules.keys()


TOKENS = "model.embed_tokens"
EMBEDDED = {f"{TOKENS}.lora_embedding_A": (2, 40), f"{TOKENS}.lora_embedding_B": (8, 2)}


def test_an_embedding_comes_back_in_the_form_that_peft_has_for_it(tmp_path):
    source = adapter(tmp_path / "peft", extra=EMBEDDED)
    converted(source, tmp_path / "mlx", "mlx")
    there = load_file(tmp_path / "mlx/adapters.safetensors")
    assert there[f"{TOKENS}.lora_a"].shape == (40, 2)
    assert there[f"{TOKENS}.lora_b"].shape == (2, 8)
    config = json.loads((tmp_path / "mlx/adapter_config.json").read_text())
    assert TOKENS in config["lora_parameters"]["keys"]
    done = converted(tmp_path / "mlx", tmp_path / "back", "peft")
    assert any("whose head is its embedding" in note for note in done.notes)
    before, after = (
        load_file(tmp_path / p / "adapter_model.safetensors") for p in ("peft", "back")
    )
    assert {n: t.tobytes() for n, t in before.items()} == {n: t.tobytes() for n, t in after.items()}
    config = json.loads((tmp_path / "back/adapter_config.json").read_text())
    assert TOKENS in config["target_modules"]


def test_an_embedding_of_as_many_tokens_as_columns_is_merged_along_its_rows(tmp_path):
    """Shapes do not tell which way round it is."""
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal(s).astype("f4") for s in ((8, 2), (2, 8)))
    folder = mlx(tmp_path / "mlx", **{f"{TOKENS}.lora_a": a, f"{TOKENS}.lora_b": b})
    weights = {
        f"{m}.weight": rng.standard_normal((8, 8)).astype("f4") for m in (TOKENS, Q, "lm_head")
    }
    save_file(weights, tmp_path / "base.safetensors")
    lorakit.merge(tmp_path / "base.safetensors", folder, tmp_path / "m.safetensors", run=SCRATCH)
    found = load_file(tmp_path / "m.safetensors")[f"{TOKENS}.weight"]
    wanted = weights[f"{TOKENS}.weight"].astype("f8") + 2.5 * a.astype("f8") @ b
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    lorakit.edit(folder, tmp_path / "edited", scale=2, run=SCRATCH)
    names = set(load_file(tmp_path / "edited/adapter_model.safetensors"))
    assert f"base_model.model.{TOKENS}.lora_embedding_A" in names


def test_norms_of_an_embedding_are_along_another_axis_than_those_of_peft(tmp_path):
    more = {f"{TOKENS}.lora_a": (40, 2), f"{TOKENS}.lora_b": (2, 8), f"{TOKENS}.m": (40,)}
    more |= {f"{Q}.m": (8,)}
    folder = mlx(tmp_path / "mlx", **{n: np.ones(s, "f4") for n, s in more.items()})
    with pytest.raises(MisfitError, match="of its rows and PEFT of its columns"):
        converted(folder, tmp_path / "peft", "peft")
    with pytest.raises(MisfitError, match="of its rows and PEFT of its columns"):
        lorakit.open_adapter(str(folder))
    done = lorakit.convert(folder, tmp_path / "p", to="peft", drop="embed_tokens", run=SCRATCH)
    assert len(done.steps) == 1


def test_an_earlier_save_of_a_training_is_read_as_the_last_is(tmp_path):
    folder = mlx(tmp_path / "mlx", name="0000100_adapters.safetensors")
    (one,) = updates(folder / "0000100_adapters.safetensors").values()
    shutil.copytree(folder, tmp_path / "last")
    (tmp_path / "last/0000100_adapters.safetensors").rename(tmp_path / "last/adapters.safetensors")
    (last,) = updates(tmp_path / "last").values()
    np.testing.assert_array_equal(one, last)
    path = folder / "0000100_adapters.safetensors"
    assert lorakit.open_adapter(str(path)).modules.keys() == {Q}
    facts = lorakit.inspect(path).facts
    assert (facts["format"], facts["rank"]) == ("mlx", {"2": 1})


def test_without_its_config_its_factors_are_not_taken_for_those_of_another_format(tmp_path):
    folder = mlx(tmp_path / "mlx")
    (folder / "adapter_config.json").unlink()
    for run in (
        lambda: converted(folder, tmp_path / "peft", "peft"),
        lambda: lorakit.open_adapter(str(folder)),
    ):
        with pytest.raises(InputError, match=r"no adapter_config\.json beside it"):
            run()


@pytest.mark.parametrize("scale", ["NaN", "Infinity", "1e40", "true", '"2"', "null"])
def test_a_scale_that_is_no_number_is_refused(tmp_path, scale):
    with pytest.raises(InputError, match="scale, a finite number"):
        open_file(mlx(tmp_path / "mlx", scale=scale))


@pytest.mark.parametrize(
    ("ending", "shape", "said"),
    [("lora_b", (3, 8), "no pair"), ("lora_b", (8,), "no pair"), ("m", (7,), "8 outputs")],
)
def test_tensors_that_do_not_go_together_are_refused_as_they_are_read(
    tmp_path, ending, shape, said
):
    folder = mlx(tmp_path / "mlx", **{f"{Q}.{ending}": np.ones(shape, "f4")})
    with pytest.raises(MisfitError, match=said) as caught:
        lorakit.check(folder, "mlx")
    assert caught.value.file == str(folder / "adapters.safetensors")


def test_what_is_no_factor_is_not_taken_along(tmp_path):
    source = adapter(tmp_path / "peft", extra={"lm_head.weight": (40, 8)})
    with pytest.raises(MisfitError, match=r"lm_head\.weight"):
        lorakit.convert(source, tmp_path / "mlx", to="mlx", keep_unknown=True, run=SCRATCH)
    assert not list(tmp_path.glob("mlx*"))


def test_inspect_knows_the_norms_of_dora(tmp_path):
    found = lorakit.inspect(mlx(tmp_path / "mlx", **{f"{Q}.m": np.ones(8, "f4")}))
    assert found.facts["kinds"] == {"lora with DoRA": 1}
    assert not found.notes
