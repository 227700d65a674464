"""Experts in MLX-LM's adapters: stacks that are read one by one, and written again."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.adapter.files.reading import open_file
from lorakit.errors import MisfitError
from tests.files.mlx_scene import Q, converted, mlx
from tests.verbs.adapters import pair, save, updates

SCRATCH = lorakit.RunOptions(sync=False)
LEAVES = {
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "block_sparse_moe": ("w1", "w3", "w2"),
}
EXPERTS, HIDDEN = 3, 12


def switched(block, old=False):
    """The stacks of a layer, as they are now and as they were in older files."""
    rng, found = np.random.default_rng(2), {}
    for leaf in LEAVES["mlp"]:
        out, inner = (8, HIDDEN) if leaf == "down_proj" else (HIDDEN, 8)
        a, b = (rng.standard_normal(s).astype("f4") for s in ((3, 2, inner), (3, out, 2)))
        name = f"model.layers.0.{block}.switch_mlp.{leaf}"
        found |= {f"{name}.lora_a": a.reshape(-1, inner) if old else a, f"{name}.lora_b": b}
    return found


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("block", LEAVES)
def test_experts_are_read_one_by_one_and_merged(tmp_path, block, old):
    folder, stacks = mlx(tmp_path / "mlx", **switched(block, old)), switched(block)
    base, rng = tmp_path / "base", np.random.default_rng(3)
    base.mkdir()
    kind = "qwen3_moe" if block == "mlp" else "mixtral"
    (base / "config.json").write_text(json.dumps({"model_type": kind, "num_experts": EXPERTS}))
    weights, wanted = {f"{Q}.weight": rng.standard_normal((8, 8)).astype("f4")}, {}
    for leaf, called in zip(LEAVES["mlp"], LEAVES[block], strict=True):
        name = f"model.layers.0.{block}.switch_mlp.{leaf}"
        for expert in range(EXPERTS):
            b, a = (stacks[f"{name}.lora_{x}"][expert].astype("f8") for x in "ba")
            module = f"model.layers.0.{block}.experts.{expert}.{called}"
            wanted[module] = 2.5 * b @ a
            weights[f"{module}.weight"] = rng.standard_normal(wanted[module].shape).astype("f4")
    save_file(weights, base / "model.safetensors")
    converted(folder, tmp_path / "peft", "peft")
    found = updates(tmp_path / "peft")
    assert found.keys() == {Q, *wanted}
    assert all(np.allclose(found[m], d, rtol=1e-12) for m, d in wanted.items())
    lorakit.merge(base, folder, tmp_path / "merged", run=SCRATCH)
    merged = load_file(tmp_path / "merged/model.safetensors")
    for module, delta in wanted.items():
        given = weights[f"{module}.weight"].astype("f8") + delta
        np.testing.assert_allclose(merged[f"{module}.weight"], given, rtol=1e-5, atol=1e-6)


def test_experts_load_in_mlx_and_can_be_left_out(tmp_path):
    folder = mlx(tmp_path / "mlx", **switched("mlp"))
    assert lorakit.inspect(folder).facts["rank"] == {"2": 4}
    assert lorakit.check(folder, "mlx").loads
    done = lorakit.convert(folder, tmp_path / "peft", to="peft", drop="experts", run=SCRATCH)
    assert len(done.steps) == 1
    assert len(done.dropped) == 3 * EXPERTS


@pytest.mark.parametrize("block", LEAVES)
def test_experts_come_back_to_the_byte(tmp_path, block):
    folder = mlx(tmp_path / "mlx", **switched(block))
    converted(folder, tmp_path / "peft", "peft")
    done = converted(tmp_path / "peft", tmp_path / "again", "mlx")
    assert done.counts == {"renamed": 1, "fused": 3}
    one, other = (load_file(tmp_path / p / "adapters.safetensors") for p in ("mlx", "again"))
    assert {n: t.tobytes() for n, t in one.items()} == {n: t.tobytes() for n, t in other.items()}
    config = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert config["lora_parameters"]["keys"] == [
        *(f"{block}.switch_mlp.{leaf}" for leaf in sorted(LEAVES["mlp"])),
        "self_attn.q_proj",
    ]


def experts(folder, numbers, ranks=(2, 2, 2, 2)):
    """An adapter of some experts, of ranks and alphas of their own."""
    names = [f"model.layers.0.mlp.experts.{n}.up_proj" for n in numbers]
    pairs = [pair(name, 12, 8, rank) for name, rank in zip(names, ranks, strict=False)]
    tensors = {n: shape for found in pairs for n, shape in found.items()}
    patterns = {
        "rank_pattern": dict(zip(names, ranks, strict=False)),
        "alpha_pattern": {name: 3 + n for n, name in enumerate(names)},
    }
    return save(folder, tensors, r=2, target_modules=["up_proj"], **patterns)


def test_experts_of_other_ranks_and_scalings_are_one_stack(tmp_path):
    source = experts(tmp_path / "peft", (0, 1, 2), (2, 1, 3))
    converted(source, tmp_path / "mlx", "mlx")
    there = load_file(tmp_path / "mlx/adapters.safetensors")
    assert there["model.layers.0.mlp.switch_mlp.up_proj.lora_a"].shape == (3, 3, 8)
    one, back = updates(source), updates(tmp_path / "mlx")
    assert one.keys() == back.keys()
    assert all(np.allclose(back[m], d, rtol=1e-6, atol=1e-7) for m, d in one.items())


def test_experts_that_are_missing_are_of_zeros_where_the_base_says_how_many(tmp_path):
    source = experts(tmp_path / "peft", (0, 2))
    with pytest.raises(MisfitError, match="only the base tells how many"):
        converted(source, tmp_path / "mlx", "mlx")
    base = tmp_path / "config.json"
    base.write_text('{"model_type": "qwen3_moe", "num_experts": 4}')
    lorakit.convert(source, tmp_path / "mlx", to="mlx", base=base, run=SCRATCH)
    found, one = updates(tmp_path / "mlx"), updates(source)
    assert len(found) == 4
    assert all(np.allclose(d, one.get(m, 0), rtol=1e-6, atol=1e-7) for m, d in found.items())
    base.write_text('{"model_type": "qwen3_moe", "num_experts": 2}')
    with pytest.raises(MisfitError, match="is one of 2 experts"):
        lorakit.convert(source, tmp_path / "again", to="mlx", base=base, run=SCRATCH)


@pytest.mark.parametrize("name", ["mlp.experts.0.w1", "block_sparse_moe.experts.0.up_proj"])
def test_experts_that_mlx_has_no_name_for_are_refused(tmp_path, name):
    source = save(tmp_path / "peft", pair(f"model.layers.0.{name}", 12, 8, 2))
    with pytest.raises(MisfitError, match="of a kind that is not known"):
        converted(source, tmp_path / "mlx", "mlx")


@pytest.mark.parametrize("shape", [(3, 3, 8), (2, 2, 8), (5, 8), (8,)])
def test_stacks_that_do_not_go_together_are_refused(tmp_path, shape):
    name = "model.layers.0.mlp.switch_mlp.up_proj"
    more = {f"{name}.lora_a": shape, f"{name}.lora_b": (3, 12, 2)}
    with pytest.raises(MisfitError, match="no stacks of pairs"):
        open_file(mlx(tmp_path / "mlx", **{n: np.ones(s, "f4") for n, s in more.items()}))


def test_stacks_of_other_names_can_be_left_out(tmp_path):
    name = "model.layers.0.feed_forward.experts.up_proj"
    more = {f"{name}.lora_a": (3, 2, 8), f"{name}.lora_b": (3, 12, 2)}
    folder = mlx(tmp_path / "mlx", **{n: np.ones(s, "f4") for n, s in more.items()})
    assert lorakit.check(folder, "mlx").loads
    with pytest.raises(MisfitError, match="2 tensors belong to no module"):
        converted(folder, tmp_path / "peft", "peft")
    done = lorakit.convert(folder, tmp_path / "peft", to="peft", drop=r"\.experts", run=SCRATCH)
    assert sorted(done.dropped) == sorted(more)
