"""resize: each update is the closest of its rank, ranks are what was asked for, the rest stays."""

import numpy as np
import pytest

import lorakit
from lorakit.errors import InputError, MisfitError, UsageError
from tests.verbs.adapters import bytes_of, config_of, deltas, drawn, pair, save, tensors_of
from tests.verbs.conftest import SCRATCH


@pytest.fixture
def adapter(tmp_path):
    tensors = {**pair("q", 9, 7, 5), **pair("conv", 6, 4, 5)}
    tensors["conv.lora_A.weight"] = (5, 4, 3, 3)
    tensors["conv.lora_B.weight"] = (6, 5, 1, 1)
    return save(tmp_path / "adapter", tensors, r=5, target_modules=["q", "conv"])


def resized(adapter, out, **options):
    return lorakit.resize(adapter, out, run=SCRATCH, **options)


def test_each_update_is_the_closest_of_its_rank(adapter, tmp_path):
    report = resized(adapter, tmp_path / "out", rank=2)
    rows = {r.name: r for r in report.rows}
    before, after = deltas(adapter), deltas(tmp_path / "out")
    for key, values in before.items():
        s = np.linalg.svd(values[0], compute_uv=False)
        tail = np.linalg.norm(s[2:])
        assert np.linalg.norm(values - after[key]) == pytest.approx(tail, rel=1e-4)
        assert rows[key].retained == pytest.approx(1 - (tail / np.linalg.norm(s)) ** 2, rel=1e-6)
        assert (rows[key].rank_before, rows[key].rank) == (5, 2)


def test_in_its_own_rank_it_stays_what_it_is(adapter, tmp_path):
    resized(adapter, tmp_path / "out", rank=64)
    for key, values in deltas(adapter).items():
        np.testing.assert_allclose(deltas(tmp_path / "out")[key], values, atol=1e-5)


def test_an_energy_is_reached_with_no_rank_more_than_it_takes(adapter, tmp_path):
    report = resized(adapter, tmp_path / "out", energy=0.8)
    for row in report.rows:
        s = np.linalg.svd(deltas(adapter)[row.name][0], compute_uv=False) ** 2
        assert s[: row.rank].sum() / s.sum() >= 0.8 > s[: row.rank - 1].sum() / s.sum()
    config = config_of(tmp_path / "out")
    ranks = {m: config["rank_pattern"].get(m, config["r"]) for m in ("q", "conv")}
    assert ranks == {r.name.removesuffix(".weight"): r.rank for r in report.rows}


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_factors_of_eight_bits_are_not_rounded_to_eight_bits_again(tmp_path, kind):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    folder = save(tmp_path / "adapter", pair("q", 9, 7, 5), r=5)
    exact = {n: torch.from_numpy(t) * 0.05 for n, t in tensors_of(folder).items()}
    narrow = {f"base_model.model.{n}": t.to(getattr(torch, kind)) for n, t in exact.items()}
    save_file(narrow, folder / "adapter_model.safetensors")
    resized(folder, tmp_path / "resized", rank=5)
    lorakit.combine([folder], tmp_path / "combined", rank=5, run=SCRATCH)
    for out in ("resized", "combined"):
        found = deltas(tmp_path / out)["q.weight"]
        np.testing.assert_allclose(found, deltas(folder)["q.weight"], rtol=0, atol=2e-5)


def test_kohyas_ranks_are_one_more(adapter, tmp_path):
    ours = resized(adapter, tmp_path / "ours", sv_fro=0.8)
    theirs = resized(adapter, tmp_path / "theirs", sv_fro=0.8, kohya_compat=True)
    assert [r.rank + 1 for r in ours.rows] == [r.rank for r in theirs.rows]


def test_uniform_means_one_rank_for_all(adapter, tmp_path):
    found = resized(adapter, tmp_path / "each", energy=0.8)
    report = resized(adapter, tmp_path / "out", energy=0.8, uniform=True)
    assert {r.rank for r in report.rows} == {max(r.rank for r in found.rows)}
    assert config_of(tmp_path / "out")["rank_pattern"] == {}


@pytest.mark.parametrize("options", [{"rank": 4}, {"energy": 0.9}, {"rank": 99}])
def test_uniform_fills_up_what_has_fewer_ranks(tmp_path, options):
    tensors = {**pair("q", 9, 7, 2), **pair("v", 9, 7, 6)}
    one = save(tmp_path / "one", tensors, rank_pattern={"v": 6})
    report = resized(one, tmp_path / "out", uniform=True, **options)
    (rank,) = {r.rank for r in report.rows}
    config = config_of(tmp_path / "out")
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (rank, {}, {})
    assert tensors_of(tmp_path / "out")["q.lora_A.weight"].shape == (rank, 7)
    found, expected = deltas(tmp_path / "out"), deltas(one)
    np.testing.assert_allclose(found["q.weight"], expected["q.weight"], atol=1e-5)


def test_kohyas_least_singular_value_is_that_without_the_scaling(tmp_path):
    tensors = {n: drawn(n, *s) for n, s in pair("q", 9, 7, 5).items()}
    tensors["q.lora_B.weight"] *= np.float32(1e-5)
    one = save(tmp_path / "one", tensors, r=5, lora_alpha=5e-3)
    report = resized(one, tmp_path / "out", rank=5, sv_fro=0.99, kohya_compat=True)
    assert report.rows[0].rank > 1


def test_a_rank_caps_what_a_rule_asks_for(adapter, tmp_path):
    report = resized(adapter, tmp_path / "out", energy=0.999, rank=3)
    assert {r.rank for r in report.rows} == {3}


def test_magnitudes_biases_and_whole_tensors_stay(tmp_path):
    tensors = {
        **pair("q", 9, 7, 5),
        "q.lora_magnitude_vector": (9,),
        "q.lora_B.bias": (9,),
        "score.weight": (2, 7),
    }
    options = {"use_dora": True, "lora_bias": True, "modules_to_save": ["score"], "r": 5}
    adapter = save(tmp_path / "adapter", tensors, **options)
    report = resized(adapter, tmp_path / "out", rank=2)
    before, after = tensors_of(adapter), tensors_of(tmp_path / "out")
    for name in ("q.lora_magnitude_vector", "score.weight"):
        np.testing.assert_array_equal(before[name], after[name])
    np.testing.assert_allclose(after["q.lora_B.bias"], 0.6 * before["q.lora_B.bias"], rtol=1e-6)
    config = config_of(tmp_path / "out")
    assert (config["use_dora"], config["modules_to_save"]) == (True, ["score"])
    assert any("magnitudes" in note for note in report.notes)


def test_token_rows_alone_pass_through(tmp_path):
    name = "embed.trainable_tokens_delta"
    config = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [1, 4]}
    adapter = save(tmp_path / "adapter", {name: (2, 7)}, **config)
    resized(adapter, tmp_path / "out", rank=2)
    np.testing.assert_array_equal(tensors_of(adapter)[name], tensors_of(tmp_path / "out")[name])


def test_the_number_of_workers_changes_no_byte(adapter, tmp_path):
    for jobs in (1, 4):
        run = lorakit.RunOptions(jobs=jobs, sync=False)
        lorakit.resize(adapter, tmp_path / f"{jobs}", rank=2, run=run)
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "4")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "--rank"),
        ({"energy": 0.9, "sv_fro": 0.9}, "--energy and --sv-fro: choose one"),
        ({"energy": 0.0}, "energy"),
        ({"energy": 1.5}, "energy"),
        ({"sv_ratio": 0.5}, "sv_ratio"),
        ({"rank": 0}, "rank"),
        ({"rank": 2, "dtype": "int8"}, "int8"),
    ],
)
def test_an_option_that_makes_no_sense(adapter, tmp_path, options, said):
    with pytest.raises(UsageError, match=said):
        resized(adapter, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_began_with_its_base_is_refused(tmp_path):
    adapter = save(tmp_path / "adapter", pair("q", 9, 7, 5), init_lora_weights="olora")
    with pytest.raises(InputError, match="olora"):
        resized(adapter, tmp_path / "out", rank=2)
    resized(adapter, tmp_path / "out", rank=2, base_is_residual=True)
    assert config_of(tmp_path / "out")["init_lora_weights"] is True


def test_infinity_is_refused_by_name(tmp_path):
    bad = drawn("x", 9, 5)
    bad[0, 0] = np.inf
    adapter = save(tmp_path / "adapter", {**pair("q", 9, 7, 5), "q.lora_B.weight": bad})
    for options in ({"rank": 2}, {"energy": 0.9, "uniform": True}):
        with pytest.raises(MisfitError, match=r"q\.lora_B\.weight"):
            resized(adapter, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
