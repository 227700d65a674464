"""Configs that PEFT, and lorakit, read as they were meant."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.adapter.config import AdapterConfig
from lorakit.adapter.new_config import Saved, config_of
from lorakit.formats.patterns import lookup
from lorakit.formats.peft import factor_key, full_key, levels, parse, rows_key

RAW = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
names = st.lists(
    st.lists(st.sampled_from(["a", "b", "0", "q_proj", "mlp"]), min_size=1, max_size=3).map(
        ".".join
    ),
    min_size=1,
    max_size=8,
    unique=True,
)
numbers = st.lists(st.integers(1, 3), min_size=8, max_size=8)


@given(names, numbers, numbers, st.booleans())
def test_every_module_gets_its_own_rank_and_scaling_by_one_pattern(found, ranks, alphas, rslora):
    modules = [Saved(n, r, a) for n, r, a in zip(found, ranks, alphas, strict=False)]
    raw = config_of({**RAW, "use_rslora": rslora}, modules, {}, version=None)
    config = AdapterConfig(raw)
    for module in modules:
        assert config.rank(module.name) == module.rank
        expected = module.alpha / (module.rank**0.5 if rslora else module.rank)
        assert config.scaling(module.name, module.rank) == expected
        assert len(lookup(raw["rank_pattern"], module.name)) <= 1
        assert len(lookup(raw["alpha_pattern"], module.name)) <= 1


def test_targets_are_full_names_and_what_narrows_them_is_taken_out():
    raw = {**RAW, "exclude_modules": "x", "layers_to_transform": [1], "layers_pattern": "h"}
    modules = [Saved("m.q", 4, 8), Saved("m.experts.down_proj", 4, 8, layer=False)]
    config = config_of({**raw, "lora_dropout": 0.1, "kept": 1}, modules, {}, version="0.21.2")
    assert config["target_modules"] == ["m.q"]
    assert config["target_parameters"] == ["m.experts.down_proj"]
    assert [config[n] for n in ("exclude_modules", "layers_to_transform")] == [None, None]
    assert (config["lora_dropout"], config["kept"], config["peft_version"]) == (0.0, 1, "0.21.2")


def test_modules_to_save_are_renamed_where_their_names_no_longer_mean_them():
    raw = {**RAW, "modules_to_save": ["lm_head", "tower.head"]}
    renames = {"language_model.lm_head": "lm_head", "tower.head": "model.tower_head"}
    config = config_of(raw, [], renames, version=None)
    assert config["modules_to_save"] == ["lm_head", "model.tower_head"]


def test_token_rows_follow_their_embedding():
    raw = {**RAW, "trainable_token_indices": {"wte": [1, 2], "embed_tokens": [3]}}
    renames = {"h.wte": "h.embeddings", "model.embed_tokens": "embed_tokens"}
    config = config_of(raw, [], renames, version=None)
    assert config["trainable_token_indices"] == {"h.embeddings": [1, 2], "embed_tokens": [3]}


def test_the_parameter_that_is_registered_last_has_no_wrapper_around_it():
    names = [("mlp", "down_proj"), ("mlp", "gate_up_proj"), ("other", "down_proj")]
    assert levels(names) == {names[0]: 0, names[1]: 1, names[2]: 0}


@pytest.mark.parametrize("role", ["a", "b", "bias", "embedding_a", "magnitude", "diag"])
@pytest.mark.parametrize("level", [0, 1])
def test_a_name_is_read_as_what_it_was_written_for(role, level):
    key = parse(factor_key("m.layers.0.q", role, level=level))
    assert (key.module, key.role, key.levels) == ("m.layers.0.q", role, level)


def test_other_names_are_read_as_what_they_were_written_for():
    inner = parse(factor_key("m.attn.out_proj", "a", inner=True))
    assert (inner.module, inner.inner) == ("m.attn.out_proj", True)
    for alone in (True, False):
        key = parse(rows_key("m.embed_tokens", alone=alone))
        assert (key.module, key.role) == ("m.embed_tokens", "rows")
    for wrapped in (True, False):
        key = parse(full_key("m.head.weight", wrapped=wrapped))
        assert (key.module, key.role, key.parameter) == ("m.head", "full", "weight")
