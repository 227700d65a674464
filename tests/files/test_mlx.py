"""MLX-LM's adapters: there and back with the same updates, whatever ranks and scalings differ."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.adapter.files.reading import open_file
from tests.verbs.adapters import pair, save

SCRATCH = lorakit.RunOptions(sync=False)
Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.3.mlp.up_proj"
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"up_proj": 4}, "alpha_pattern": {"up_proj": 5}},
}


def updates(path):
    found = {}
    for delta in open_file(path).deltas:
        a, b = (delta.tensors[r].read().astype("f8") for r in "ab")
        found[delta.module] = delta.scaling * b @ a
    return found


def converted(source, out, to):
    return lorakit.convert(source, out, to=to, run=SCRATCH)


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


def test_what_mlx_reads(tmp_path):
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
