"""Edits of strength and dtype: every delta is multiplied as told, and rounded once."""

import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from lorakit.adapter.adapter import open_adapter
from lorakit.adapter.weights import adapted
from lorakit.errors import InputError, MisfitError
from tests.verbs.adapters import config_of, drawn, tensors_of
from tests.verbs.edit_scene import (
    CONFIG,
    EMBEDDING,
    EVERYTHING,
    E,
    H,
    Q,
    R,
    adapter,
    deltas,
    edited,
    folder,
    pair,
    same_bytes,
)

__all__ = ["folder"]

SLOW = settings(
    deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SLOW
@given(scale=st.floats(-8, 8, allow_subnormal=False), rslora=st.booleans())
def test_scale_multiplies_every_delta_and_no_byte_of_a_factor(folder, scale, rslora):
    for old in ("adapter", "out"):
        shutil.rmtree(folder / old, ignore_errors=True)
    adapter(folder, EVERYTHING, **CONFIG, use_rslora=rslora)
    done = edited(folder, scale=scale)
    assert done.rounded == 0
    assert same_bytes(folder / "adapter", folder / "out")
    before, after = deltas(folder / "adapter"), deltas(folder / "out")
    for name, found in after.items():
        np.testing.assert_allclose(found, scale * before[name], rtol=1e-14, atol=1e-300)
    assert config_of(folder / "out")["target_modules"] == CONFIG["target_modules"]


KEEPING = [
    {"bake": True},
    {"flatten": True},
    {"flatten": True, "bake": True},
    {"alpha": 16.0},
    {"flatten": True, "alpha": 5.5},
]


@pytest.mark.parametrize("options", KEEPING)
@pytest.mark.parametrize("rslora", [False, True])
def test_scalings_told_in_another_way_keep_every_delta(tmp_path, options, rslora):
    adapter(tmp_path, EVERYTHING, **CONFIG, use_rslora=rslora)
    done = edited(tmp_path, **options)
    before, after = deltas(tmp_path / "adapter"), deltas(tmp_path / "out")
    assert done.rounded > 0
    assert before.keys() == after.keys()
    for name, found in after.items():
        limit = 2.0**-22 * np.abs(before[name]).max()
        np.testing.assert_allclose(found, before[name], rtol=0, atol=limit)
    bias = [
        one[f"{Q}.weight"].bias("float64")
        for one in (adapted(open_adapter(str(tmp_path / n))) for n in ("adapter", "out"))
    ]
    np.testing.assert_allclose(bias[1], bias[0], rtol=2.0**-22)


def test_a_baked_adapter_has_scalings_of_one(folder):
    done = edited(folder, bake=True)
    assert {c.scaling for c in done.changes if c.kind == "update"} == {1.0}
    config = config_of(folder / "out")
    assert (config["r"], config["lora_alpha"]) == (2, 2)
    assert not config.get("use_rslora")
    longer = {"model.layers.1.self_attn.q_proj": 4}
    assert config["rank_pattern"] == config["alpha_pattern"] == longer


def test_a_flattened_adapter_has_one_rank_and_one_alpha_and_no_patterns(folder):
    done = edited(folder, flatten=True)
    updates = [c for c in done.changes if c.kind == "update"]
    assert {(c.rank, c.scaling) for c in updates} == {(4, 1.5)}  # what most had
    assert sum(c.factor == 1.0 for c in updates) == 5
    config = config_of(folder / "out")
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    shapes = {n: t.shape for n, t in tensors_of(folder / "out").items()}
    assert shapes["model.conv.lora_A.weight"] == (4, 4, 3)
    assert shapes["model.conv.lora_B.weight"] == (5, 4, 1)
    assert shapes["model.mlp.experts.lora_A.weight"] == (E * 4, 4)
    assert shapes[f"{EMBEDDING}.lora_embedding_B"] == (H, 4)


def test_patterns_that_say_the_same_of_all_weights_go_when_flattened(tmp_path):
    """Readers of the rank alone would take it for the scaling."""
    adapter(tmp_path, pair(Q, rank=7), r=2, rank_pattern={"q_proj": 7}, alpha_pattern={"q_proj": 5})
    edited(tmp_path, flatten=True)
    assert same_bytes(tmp_path / "adapter", tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert (config["r"], config["lora_alpha"]) == (7, 5)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    before, after = (deltas(tmp_path / n)[f"{Q}.weight"] for n in ("adapter", "out"))
    np.testing.assert_array_equal(after, before)


def test_stacks_of_the_other_packing_are_padded_in_it(folder):
    edited(folder, flatten=True, expert_packing="unsloth")
    before, after = (deltas(folder / n, packing="unsloth") for n in ("adapter", "out"))
    for name, found in after.items():
        np.testing.assert_allclose(found, before[name], atol=1e-5)


@pytest.mark.parametrize("alpha", [1, 8, 64])
def test_powers_of_two_round_nothing(tmp_path, alpha):
    adapter(tmp_path, pair(Q, rank=4), lora_alpha=16, r=4)
    assert edited(tmp_path, bake=True).rounded == 0
    assert edited(tmp_path, "other", alpha=alpha).rounded == 0
    before = deltas(tmp_path / "adapter")
    for name in ("out", "other"):
        np.testing.assert_array_equal(deltas(tmp_path / name)[f"{Q}.weight"], before[f"{Q}.weight"])


def test_an_alpha_that_leaves_the_factors_changes_the_strength_and_says_so(folder):
    done = edited(folder, alpha=6.0, keep_factors=True)
    assert same_bytes(folder / "adapter", folder / "out")
    assert done.notes == ("8 updates change their strength, as asked.",)
    before, after = deltas(folder / "adapter"), deltas(folder / "out")
    conv = "model.conv.weight"
    np.testing.assert_allclose(after[conv], 6 / 5 * before[conv])


def test_another_dtype_is_rounded_once_and_counted(folder):
    import ml_dtypes

    done = edited(folder, dtype="bfloat16")
    before, after = (
        load_file(folder / n / "adapter_model.safetensors") for n in ("adapter", "out")
    )
    rounded = {n: t.astype(ml_dtypes.bfloat16) for n, t in before.items()}
    assert all(after[n].tobytes() == t.tobytes() for n, t in rounded.items())
    assert done.rounded == sum(int((rounded[n] != t).sum()) for n, t in before.items())
    assert edited(folder, "wide", "out", dtype="float32").rounded == 0


def test_a_scaling_and_a_dtype_together_round_once(tmp_path):
    adapter(tmp_path, pair(Q))
    edited(tmp_path, bake=True, dtype="float16")
    found = tensors_of(tmp_path / "out")[f"{Q}.lora_B.weight"]
    expected = (drawn(f"{Q}.lora_B.weight", H, R).astype("f8") * 1.5).astype("f2")
    np.testing.assert_array_equal(found, expected)


def test_a_number_that_the_dtype_cannot_hold_is_refused_and_nothing_is_left(tmp_path):
    adapter(tmp_path, pair(Q), lora_alpha=1e6)
    with pytest.raises(MisfitError, match="does not fit float16"):
        edited(tmp_path, bake=True, dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_a_strength_leaves_what_replaces_the_base_and_says_so(folder):
    done = edited(folder, scale=2.0)
    (note,) = done.notes
    assert "5 tensors that replace" in note


DORA = {**pair(Q), f"{Q}.lora_magnitude_vector": np.abs(drawn("m", H)) + 1}


def test_dora_is_baked_but_not_scaled(tmp_path):
    adapter(tmp_path, DORA, use_dora=True)
    edited(tmp_path, bake=True)
    found = tensors_of(tmp_path / "out")
    np.testing.assert_array_equal(
        found[f"{Q}.lora_magnitude_vector"], DORA[f"{Q}.lora_magnitude_vector"]
    )
    with pytest.raises(InputError, match="DoRA"):
        edited(tmp_path, "other", scale=0.5)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"init_lora_weights": "pissa"}, {"bake": True}),
        ({"init_lora_weights": "olora"}, {"flatten": True}),
        ({"init_lora_weights": "corda"}, {"scale": 2.0}),
        ({"init_lora_weights": "loftq"}, {"scale": 2.0}),
    ],
)
def test_what_is_half_of_a_delta_keeps_its_strength(tmp_path, config, options):
    adapter(tmp_path, pair(Q), **config)
    with pytest.raises(InputError, match="base"):
        edited(tmp_path, **options)
    edited(tmp_path, rename=["self_attn=attn"], dtype="bfloat16")
