"""extract: the closest update of each difference, what else differs, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.errors import InputError, MisfitError, ResourceError, UsageError
from tests.verbs.adapters import bytes_of, config_of, deltas, drawn, pair, save, tensors_of
from tests.verbs.conftest import SCRATCH

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 40}
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
SHAPES = {
    "model.embed_tokens.weight": (40, 12),
    f"{Q}.weight": (16, 12),
    f"{Q}.bias": (16,),
    f"{DOWN}.weight": (12, 20),
    "model.norm.weight": (12,),
    "lm_head.weight": (40, 12),
}


def checkpoint(folder, tensors, config=LLAMA):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def base(tmp_path):
    return checkpoint(tmp_path / "base", {n: drawn(n, *s) for n, s in SHAPES.items()})


def tuned(base, folder, **changes):
    """A model that differs from the base in these tensors, a dot in a name written `__`."""
    tensors = load_file(base / "model.safetensors")
    for name, values in changes.items():
        tensors[name.replace("__", ".")] = values
    return checkpoint(folder, tensors)


def moved(base, *names, by=0.1):
    """Tensors of the base with noise added."""
    tensors = load_file(base / "model.safetensors")
    return {
        n.replace(".", "__"): tensors[n] + by * drawn(n + "!", *tensors[n].shape) for n in names
    }


def extracted(base, model, out, **options):
    return lorakit.extract(base, model, out, run=SCRATCH, **{"rank": 4, **options})


def differences(base, other):
    one, two = (load_file(f / "model.safetensors") for f in (base, other))
    return {n: two[n].astype("f8") - one[n] for n in one if one[n].shape == two[n].shape}


@pytest.fixture
def finetune(base, tmp_path):
    return tuned(base, tmp_path / "tuned", **moved(base, f"{Q}.weight", f"{DOWN}.weight"))


def test_each_update_is_the_closest_of_its_rank(base, finetune, tmp_path):
    report = extracted(base, finetune, tmp_path / "out")
    found, exact = deltas(tmp_path / "out"), differences(base, finetune)
    rows = {r.name: r for r in report.rows}
    assert found.keys() == rows.keys() == {f"{Q}.weight", f"{DOWN}.weight"}
    for name, row in rows.items():
        s = np.linalg.svd(exact[name], compute_uv=False)
        tail = np.linalg.norm(s[4:])
        assert np.linalg.norm(found[name][0] - exact[name]) == pytest.approx(tail, rel=1e-4)
        assert row.residual == pytest.approx(tail, rel=1e-4)
        assert row.retained == pytest.approx(1 - (tail / np.linalg.norm(s)) ** 2, rel=1e-5)
        assert row.largest == pytest.approx(abs(exact[name]).max(), rel=1e-5)


def test_the_config_is_one_of_plain_lora_for_that_base(base, finetune, tmp_path):
    extracted(base, finetune, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["target_modules"] == [DOWN, Q]
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (4, 4, "CAUSAL_LM")
    assert config["base_model_name_or_path"] == str(base)


def test_an_energy_takes_no_rank_more_than_it_needs(base, finetune, tmp_path):
    report = extracted(base, finetune, tmp_path / "out", rank=64, energy=0.8)
    for row in report.rows:
        s = np.linalg.svd(differences(base, finetune)[row.name], compute_uv=False) ** 2
        assert s[: row.rank].sum() / s.sum() >= 0.8 > s[: row.rank - 1].sum() / s.sum()
        assert row.retained == pytest.approx(s[: row.rank].sum() / s.sum(), rel=1e-5)


def test_what_is_the_same_is_left_out(base, tmp_path):
    other = tuned(base, tmp_path / "tuned", **moved(base, f"{Q}.weight"))
    report = extracted(base, other, tmp_path / "out")
    assert ([r.name for r in report.rows], report.left_out) == ([f"{Q}.weight"], 1)


def test_small_differences_are_left_out_on_request(base, tmp_path):
    changes = {**moved(base, f"{Q}.weight"), **moved(base, f"{DOWN}.weight", by=1e-5)}
    other = tuned(base, tmp_path / "tuned", **changes)
    report = extracted(base, other, tmp_path / "out", min_diff=1e-3)
    assert [r.name for r in report.rows] == [f"{Q}.weight"]


def test_the_bias_of_a_layer_with_factors_goes_along(base, tmp_path):
    other = tuned(base, tmp_path / "tuned", **moved(base, f"{Q}.weight", f"{Q}.bias"))
    extracted(base, other, tmp_path / "out")
    found = tensors_of(tmp_path / "out")[f"{Q}.lora_B.bias"]
    np.testing.assert_allclose(found, differences(base, other)[f"{Q}.bias"], atol=1e-6)
    assert config_of(tmp_path / "out")["lora_bias"]


def test_what_gets_no_factors_is_a_question(base, tmp_path):
    changes = moved(base, f"{Q}.weight", "model.norm.weight", "lm_head.weight")
    other = tuned(base, tmp_path / "tuned", **changes)
    with pytest.raises(MisfitError, match=r"2 tensors differ .*'model\.norm\.weight'"):
        extracted(base, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    report = extracted(base, other, tmp_path / "left", other="drop")
    assert len(report.notes) == 1
    assert set(tensors_of(tmp_path / "left")) == {f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"}
    extracted(base, other, tmp_path / "out", other="save")
    saved, there = tensors_of(tmp_path / "out"), load_file(other / "model.safetensors")
    for name in ("model.norm.weight", "lm_head.weight"):
        np.testing.assert_array_equal(saved[name], there[name])
    assert config_of(tmp_path / "out")["modules_to_save"] == ["lm_head", "model.norm"]


def test_patterns_choose_the_modules(base, finetune, tmp_path):
    options = {"other": "drop"}
    report = extracted(base, finetune, tmp_path / "one", target_modules="q_proj", **options)
    assert [r.name for r in report.rows] == [f"{Q}.weight"]
    report = extracted(base, finetune, tmp_path / "two", exclude_modules="q_proj", **options)
    assert [r.name for r in report.rows] == [f"{DOWN}.weight"]
    for wrong in ({"target_modules": "q_porj"}, {"exclude_modules": "q_porj"}):
        with pytest.raises(MisfitError, match="no module is meant by 'q_porj'"):
            extracted(base, finetune, tmp_path / "out", **wrong, **options)


def test_weights_that_lie_turned_are_extracted_as_peft_has_them(tmp_path):
    name = "h.0.attn.c_attn.weight"
    config = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    base = checkpoint(tmp_path / "base", {name: drawn("x", 12, 36)}, config)
    other = checkpoint(tmp_path / "tuned", {name: drawn("y", 12, 36)}, config)
    extracted(base, other, tmp_path / "out", rank=12)
    found = deltas(tmp_path / "out")[name][0]
    np.testing.assert_allclose(found.T, differences(base, other)[name], atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 4, 3), (6, 4, 3, 3)])
def test_kernels_are_extracted(tmp_path, shape):
    base = checkpoint(tmp_path / "base", {"conv.weight": drawn("x", *shape)})
    other = checkpoint(tmp_path / "tuned", {"conv.weight": drawn("y", *shape)})
    extracted(base, other, tmp_path / "out", rank=6)
    expected = differences(base, other)["conv.weight"].reshape(6, -1)
    np.testing.assert_allclose(deltas(tmp_path / "out")["conv.weight"][0], expected, atol=1e-4)
    assert tensors_of(tmp_path / "out")["conv.lora_A.weight"].shape == (6, *shape[1:])


@pytest.mark.parametrize(("model", "turned"), [("qwen3_moe", False), ("gpt_oss", True)])
def test_stacked_experts_are_extracted_one_by_one(tmp_path, model, turned):
    name = "model.layers.0.mlp.experts.down_proj"
    config = {"model_type": model}
    base = checkpoint(tmp_path / "base", {name: drawn("x", 3, 6, 5)}, config)
    other = checkpoint(tmp_path / "tuned", {name: drawn("y", 3, 6, 5)}, config)
    extracted(base, other, tmp_path / "out", rank=5)
    expected = differences(base, other)[name]
    found = deltas(tmp_path / "out")[name]
    np.testing.assert_allclose(found.swapaxes(1, 2) if turned else found, expected, atol=1e-4)
    lorakit.merge(base, tmp_path / "out", tmp_path / "merged", run=SCRATCH)
    merged = load_file(tmp_path / "merged/model.safetensors")[name]
    there = load_file(other / "model.safetensors")[name]
    np.testing.assert_allclose(merged, there, atol=1e-4)


def test_the_number_of_workers_changes_no_byte(base, finetune, tmp_path):
    for jobs in (1, 4):
        run = lorakit.RunOptions(jobs=jobs, sync=False)
        lorakit.extract(base, finetune, tmp_path / f"{jobs}", rank=3, run=run)
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "4")


def test_clamping_cuts_off_the_largest_values(base, finetune, tmp_path):
    extracted(base, finetune, tmp_path / "free")
    extracted(base, finetune, tmp_path / "cut", clamp_quantile=0.9)
    free, cut = tensors_of(tmp_path / "free"), tensors_of(tmp_path / "cut")
    assert all(abs(cut[n]).max() < abs(t).max() for n, t in free.items())


@pytest.mark.parametrize("options", [{}, {"rank": 12, "energy": 0.9}], ids=str)
def test_what_clamping_costs_is_told(base, finetune, tmp_path, options):
    report = extracted(base, finetune, tmp_path / "out", clamp_quantile=0.9, **options)
    found, exact = deltas(tmp_path / "out"), differences(base, finetune)
    for row in report.rows:
        left = np.linalg.norm(found[row.name][0] - exact[row.name])
        assert row.residual == pytest.approx(left, rel=1e-4)
        share = 1 - (left / np.linalg.norm(exact[row.name])) ** 2
        assert row.retained == pytest.approx(share, rel=1e-4)


def test_small_differences_of_float64_models_keep_their_digits(base, tmp_path):
    before = {n: t.astype("f8") for n, t in load_file(base / "model.safetensors").items()}
    gain = 1e-9 * np.outer(np.arange(1.0, 17), np.arange(1.0, 13))
    after = before | {f"{Q}.weight": before[f"{Q}.weight"] + gain}
    for name, tensors in (("double", before), ("moved", after)):
        shutil.copytree(base, tmp_path / name)
        save_file(tensors, tmp_path / name / "model.safetensors")
    extracted(tmp_path / "double", tmp_path / "moved", tmp_path / "out", rank=1)
    found = deltas(tmp_path / "out")[f"{Q}.weight"][0]
    np.testing.assert_allclose(found, gain, rtol=1e-5)


def test_an_adapter_with_magnitudes_becomes_plain(base, tmp_path):
    tensors = {**pair(Q, 16, 12, 2), f"{Q}.lora_magnitude_vector": (16,)}
    dora = save(tmp_path / "dora", tensors, use_dora=True, target_modules=["q_proj"])
    lorakit.extract(base, output=tmp_path / "plain", adapter=dora, rank=16, run=SCRATCH)
    for name in ("dora", "plain"):
        lorakit.merge(base, tmp_path / name, tmp_path / f"with-{name}", run=SCRATCH)
    one, other = (
        load_file(tmp_path / f"with-{n}/model.safetensors")[f"{Q}.weight"]
        for n in ("dora", "plain")
    )
    np.testing.assert_allclose(other, one, atol=1e-4)
    assert not config_of(tmp_path / "plain")["use_dora"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "not 0"),
        ({"energy": 1.5}, "not 1.5"),
        ({"clamp_quantile": 0.2}, "clamp_quantile"),
        ({"min_diff": -1.0}, "min_diff"),
        ({"dtype": "int8"}, "int8"),
        ({"other": "merge"}, "merge"),
        ({"adapter": "style"}, "one of both"),
    ],
)
def test_an_option_that_makes_no_sense(base, finetune, tmp_path, options, said):
    with pytest.raises(UsageError, match=said):
        extracted(base, finetune, tmp_path / "out", **options)


def test_models_that_are_not_alike_are_refused(base, tmp_path):
    lacking = {n: t for n, t in load_file(base / "model.safetensors").items() if "norm" not in n}
    other = checkpoint(tmp_path / "lacking", lacking)
    with pytest.raises(MisfitError, match="1 tensors of the base are not in the other"):
        extracted(base, other, tmp_path / "out")
    wide = tuned(base, tmp_path / "wide", **{f"{Q}.weight".replace(".", "__"): drawn("x", 16, 13)})
    with pytest.raises(MisfitError, match=r"is \[16, 12\] in the base, \[16, 13\]"):
        extracted(base, wide, tmp_path / "out")
    with pytest.raises(MisfitError, match="nothing differs"):
        extracted(base, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nan_is_refused_by_name(base, tmp_path):
    bad = drawn("x", 16, 12)
    bad[3, 3] = np.nan
    other = tuned(base, tmp_path / "bad", **{f"{Q}.weight".replace(".", "__"): bad})
    with pytest.raises(InputError, match=r"q_proj\.weight' holds NaN"):
        extracted(base, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_quantised_model_is_refused(base, tmp_path):
    codes = np.zeros((16, 12), np.int8)
    other = tuned(base, tmp_path / "int8", **{f"{Q}.weight".replace(".", "__"): codes})
    with pytest.raises(InputError, match="quantised"):
        extracted(base, other, tmp_path / "out")


def test_too_little_memory_is_told_before_anything_is_written(base, finetune, tmp_path):
    run = lorakit.RunOptions(max_memory=1000)
    with pytest.raises(ResourceError, match="memory"):
        lorakit.extract(base, finetune, tmp_path / "out", rank=2, run=run)
    assert not (tmp_path / "out").exists()
