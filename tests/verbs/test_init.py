"""init: which weights get factors, and what is written."""

import ml_dtypes  # noqa: F401  (bfloat16 for NumPy)
import numpy as np
import pytest
from safetensors.numpy import load_file

import lorakit
from lorakit.errors import MisfitError, OutputError
from lorakit.math.initial import METHODS
from tests.verbs.adapters import bytes_of, config_of, deltas, tensors_of
from tests.verbs.conftest import SCRATCH
from tests.verbs.init_scene import (
    CHANGING,
    DOWN0,
    DOWN1,
    Q0,
    Q1,
    assert_together_are,
    base,
    begun,
    checkpoint,
    options_of,
    stats,
    wide,
)

__all__ = ["base", "stats"]

EXPERTS = {
    "model.layers.0.mlp.gate.weight": (4, 12),
    **{f"model.layers.0.mlp.experts.{i}.up_proj.weight": (8, 12) for i in range(4)},
    f"{Q0}.weight": (16, 12),
}


def modules(out):
    return {n.rpartition(".lora_")[0] for n in tensors_of(out)}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {Q0, Q1, DOWN0, DOWN1}),
        ({"target_modules": "q_proj"}, {Q0, Q1}),
        ({"target_modules": "q_proj,mlp.down_proj"}, {Q0, Q1, DOWN0, DOWN1}),
        ({"target_modules": Q1}, {Q1}),
        ({"target_modules": r".*\.(q|k)_proj"}, {Q0, Q1}),
        ({"target_modules": "q_proj,lm_head"}, {Q0, Q1, "lm_head"}),
        ({"target_modules": "embed_tokens"}, {"model.embed_tokens"}),
        ({"exclude_modules": "down_proj"}, {Q0, Q1}),
        ({"exclude_modules": r".*\.1\..*"}, {Q0, DOWN0}),
        ({"exclude_modules": "down_proj,lm_head,embed_tokens"}, {Q0, Q1}),
        ({"layers": "1"}, {Q1, DOWN1}),
        ({"layers": "0-1", "target_modules": "q_proj"}, {Q0, Q1}),
        ({"layers": "0,7-9"}, {Q0, DOWN0}),
    ],
)
def test_names_layers_and_patterns_choose_the_modules(base, tmp_path, options, expected):
    begun(base, tmp_path / "out", **options)
    assert modules(tmp_path / "out") == expected
    assert config_of(tmp_path / "out")["target_modules"] == sorted(expected)


def test_experts_are_a_choice(tmp_path):
    base = checkpoint(tmp_path / "base", EXPERTS, {"model_type": "qwen3_moe"})
    begun(base, tmp_path / "dense")
    assert modules(tmp_path / "dense") == {Q0}
    begun(base, tmp_path / "all", experts=True)
    assert len(modules(tmp_path / "all")) == 5
    with pytest.raises(MisfitError, match="no module is meant by 'up_proj'") as caught:
        begun(base, tmp_path / "out", target_modules="up_proj")
    assert "--experts" in caught.value.hint


def test_names_that_are_others_in_the_model_of_transformers_are_told(base, tmp_path):
    names = ("language_model.model.layers.0.self_attn.q_proj", "vision_tower.layers.0.fc1")
    shapes = {f"{n}.weight": (8, 8) for n in names}
    llava = checkpoint(tmp_path / "llava", shapes, {"model_type": "llava"})
    done = begun(llava, tmp_path / "out")
    assert "2 modules have other names in transformers 5" in done.notes[-1]
    assert "'model.language_model.layers.0.self_attn.q_proj'" in done.notes[-1]
    assert not begun(base, tmp_path / "same").notes


def test_ranks_and_alphas_are_those_asked_for(base, tmp_path):
    report = begun(
        base,
        tmp_path / "out",
        rank=4,
        alpha=16,
        rank_pattern=((r"layers\.1\..*q_proj", 2), ("down_proj", 8)),
        alpha_pattern=(("down_proj", 4.0),),
    )
    found = {r.name.removesuffix(".weight"): (r.rank, r.scaling) for r in report.rows}
    assert found == {Q0: (4, 4.0), Q1: (2, 8.0), DOWN0: (8, 0.5), DOWN1: (8, 0.5)}
    opened = lorakit.open_adapter(tmp_path / "out")
    for module, (rank, scaling) in found.items():
        a, b = opened.modules[module].a, opened.modules[module].b
        assert (a.shape[0], b.shape[1]) == (rank, rank)
        assert opened.config.scaling(module, rank) == scaling


def test_a_plain_pattern_means_whole_segments_of_a_name(tmp_path):
    layers = [f"encoder.block.{n}.layer.0.SelfAttention" for n in (1, 10)]
    shapes = {f"{layer}.{leaf}.weight": (8, 8) for layer in layers for leaf in ("q", "v", "kv")}
    base = checkpoint(tmp_path / "base", shapes)
    patterns = {"rank_pattern": {"v": 2, "block.1": 3}, "alpha_pattern": {"k|q": 5.0}}
    report = begun(base, tmp_path / "out", rank=4, target_modules="q,v,kv", **patterns)
    found = {r.name.removesuffix(".weight"): (r.rank, r.rank * r.scaling) for r in report.rows}
    for layer, rank in zip(layers, (3, 4), strict=True):
        assert found[f"{layer}.v"] == (2, 5.0)  # by the "k" of "block"
        assert found[f"{layer}.q"] == found[f"{layer}.kv"] == (rank, 5.0)


def test_a_pattern_may_name_one_stack_of_experts_as_targets_do(tmp_path):
    experts = "model.layers.0.mlp.experts"
    shapes = {f"{experts}.down_proj": (3, 8, 12), f"{experts}.gate_up_proj": (3, 12, 8)}
    base = checkpoint(tmp_path / "base", shapes)
    patterns = {"rank_pattern": (("experts.down_proj", 2),), "alpha_pattern": ((r"experts$", 3),)}
    begun(base, tmp_path / "out", experts=True, **patterns)
    rows = {n: t.shape for n, t in tensors_of(tmp_path / "out").items() if "lora_A" in n}
    assert sorted(s[0] for s in rows.values()) == [3 * 2, 3 * 4]
    assert config_of(tmp_path / "out")["lora_alpha"] == 3


def test_orthogonal_factors_of_sixteen_bits_are_told_to_change_a_little(base, tmp_path):
    for dtype, notes in (("float32", 0), ("bfloat16", 1)):
        report = begun(base, tmp_path / dtype, method="orthogonal", dtype=dtype)
        assert len(report.notes) == notes


def test_rank_stabilised_scaling_is_over_the_root(base, tmp_path):
    report = begun(base, tmp_path / "out", rank=4, alpha=16, rslora=True)
    assert {r.scaling for r in report.rows} == {8.0}
    opened = lorakit.open_adapter(tmp_path / "out")
    assert opened.config.scaling(Q0, 4) == 8.0


def test_alpha_is_the_rank_unless_it_is_given(base, tmp_path):
    begun(base, tmp_path / "out", rank=6)
    config = config_of(tmp_path / "out")
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (6, 6, True)
    assert (config["task_type"], config["inference_mode"]) == ("CAUSAL_LM", False)
    assert config["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize("method", ["kaiming", "random"])
def test_magnitudes_of_dora_are_the_norms_of_the_weight_with_its_update(base, tmp_path, method):
    begun(base, tmp_path / "out", dora=True, method=method)
    found, update = tensors_of(tmp_path / "out"), deltas(tmp_path / "out")
    for module in (Q0, DOWN1):
        w = wide(base, f"{module}.weight") + update[f"{module}.weight"][0]
        norms = found[f"{module}.lora_magnitude_vector"]
        np.testing.assert_allclose(norms, np.linalg.norm(w, axis=1), rtol=1e-6)
    assert config_of(tmp_path / "out")["use_dora"]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bytes_on_any_number_of_jobs(base, stats, tmp_path, method):
    options = {"method": method, **options_of(method, stats)}
    outs = []
    for name, jobs in (("one", 1), ("two", 1), ("four", 4)):
        begun(base, tmp_path / name, run=lorakit.RunOptions(jobs=jobs, sync=False), **options)
        pair = (tmp_path / name / "base").exists()
        parts = ("adapter", "base") if pair else (".",)
        folders = [bytes_of(tmp_path / name / part) for part in parts]
        outs.append([f[n] for f in folders for n in sorted(f) if n.endswith("tensors")])
    assert outs[0] == outs[1] == outs[2]
    begun(base, tmp_path / "other", seed=1, **options)
    drawn_from_it = not METHODS[method].needs
    folder = tmp_path / "other" / (parts[0])
    other = (folder / "adapter_model.safetensors").read_bytes()
    assert (other == outs[0][0]) != drawn_from_it


def test_weights_of_one_shape_begin_differently(base, tmp_path):
    begun(base, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert not np.array_equal(found[f"{Q0}.lora_A.weight"], found[f"{Q1}.lora_A.weight"])


@pytest.mark.parametrize("method", [n for n in METHODS if n not in (*CHANGING, "random")])
def test_these_leave_the_model_as_it_is(base, stats, tmp_path, method):
    begun(base, tmp_path / "out", method=method, **options_of(method, stats))
    lorakit.merge(base, tmp_path / "out", tmp_path / "merged", run=SCRATCH)
    one, other = (load_file(f / "model.safetensors") for f in (base, tmp_path / "merged"))
    assert all(np.array_equal(one[n], other[n]) for n in one)


def test_a_preview_computes_nothing(base, tmp_path):
    job = lorakit.plan_init(base, rank=4, method="pissa")
    (base / "model.safetensors").write_bytes(b"")  # nothing of it is read any more
    report = job.preview()
    assert [(r.rank, r.scaling) for r in report.rows] == [(4, 1.0)] * 4
    assert report.written == 0


def test_what_is_there_is_kept_unless_it_may_be_replaced(base, tmp_path):
    begun(base, tmp_path / "out", method="pissa")
    with pytest.raises(OutputError, match="exists"):
        begun(base, tmp_path / "out", method="olora")
    begun(base, tmp_path / "out", method="olora", run=lorakit.RunOptions(overwrite=True))
    assert_together_are(base, tmp_path / "out")
    with pytest.raises(OutputError, match="input"):
        begun(base, base / "out", method="olora")


@pytest.mark.parametrize(
    ("model_type", "left"), [("mamba", {"in_proj"}), ("jamba", {"in_proj", "out_proj"})]
)
def test_all_linear_layers_are_those_that_an_adapter_acts_on(tmp_path, model_type, left):
    """PEFT refuses out_proj of Mamba; the weight of dt_proj is read around it."""
    mixer = "backbone.layers.0.mixer"
    shapes = {f"{mixer}.{leaf}.weight": (8, 12) for leaf in ("in_proj", "dt_proj", "out_proj")}
    base = checkpoint(tmp_path / "base", shapes, {"model_type": model_type})
    for plan in (lorakit.plan_init, lorakit.plan_loftq):
        found = plan(base, rank=2)
        names = [w.form.key for w in found.weights] if plan is lorakit.plan_loftq else []
        names = names or [row.name for row in found.rows]
        assert {name.split(".")[-2] for name in names} == left
    (asked,) = lorakit.plan_init(base, rank=2, target_modules="dt_proj").rows
    assert asked.name == f"{mixer}.dt_proj.weight"
