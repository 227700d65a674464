"""What an adapter_config.json means, and every kind that is refused by name."""

import json
from math import sqrt

import pytest

from lorakit.adapter.config import KNOWN, REFUSED, AdapterConfig, read_config
from lorakit.errors import InputError

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}


def config(**fields: object) -> AdapterConfig:
    return AdapterConfig({**PLAIN, **fields}, "adapter_config.json")


def test_a_plain_config_is_accepted():
    config().check()


@pytest.mark.parametrize("field", REFUSED)
def test_what_no_weight_can_hold_or_not_yet_is_refused_by_name(field):
    with pytest.raises(InputError, match=field) as error:
        config(**{field: {"some": "thing"}}).check()
    assert error.value.hint
    assert error.value.file == "adapter_config.json"


@pytest.mark.parametrize("field", sorted({*KNOWN, *REFUSED}))
@pytest.mark.parametrize("value", [None, False, [], {}])
def test_a_field_that_is_not_set_is_as_good_as_absent(field, value):
    if field not in ("peft_type", "lora_alpha", "r"):
        config(**{field: value}).check()


@pytest.mark.parametrize("value", [True, 1, "x", [1], {"a": 1}])
def test_an_unknown_field_that_is_set_is_refused(value):
    with pytest.raises(InputError, match="use_lora_of_tomorrow"):
        config(use_lora_of_tomorrow=value).check()


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_an_unknown_field_that_is_not_set_is_ignored(value):
    config(use_lora_of_tomorrow=value).check()


@pytest.mark.parametrize("kind", ["IA3", "LOHA", "VERA", "ADALORA", "PROMPT_TUNING", "lokr", None])
def test_another_kind_of_adapter_is_refused_by_name(kind):
    with pytest.raises(InputError, match=str(kind).upper()):
        config(peft_type=kind).check()


@pytest.mark.parametrize("kind", ["LORA", "lora", "TRAINABLE_TOKENS"])
def test_kinds_that_are_folded_are_accepted(kind):
    config(peft_type=kind).check()


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga", "loftq", "CorDA"])
def test_an_initialisation_that_changed_the_base_is_refused_without_that_base(init):
    with pytest.raises(InputError, match="--base-is-residual"):
        config(init_lora_weights=init).check()
    config(init_lora_weights=init).check(base_is_residual=True)


@pytest.mark.parametrize("init", ["pissa", "olora", "PiSSA", "OLoRA"])
def test_what_can_be_taken_out_of_the_base_again_is_accepted(init):
    config(init_lora_weights=init).check()
    assert config(init_lora_weights=init).residual == init.lower()


def test_the_adapter_before_training_helps_wherever_the_base_was_not_quantised():
    config(init_lora_weights="lora_ga").check(init_adapter=True)
    with pytest.raises(InputError, match="--base-is-residual"):
        config(init_lora_weights="loftq").check(init_adapter=True)


@pytest.mark.parametrize(
    ("exclude", "wanted", "module", "is_one"),
    [
        ([], ["w1"], "a.experts.0.w1", True),
        ([], ["w1"], "a.experts.0.w12", False),
        ([], ["experts.0.w1"], "a.experts.1.w1", False),
        ([], r".*\.experts\.[02]\.w1", "a.experts.2.w1", True),
        ([], r".*\.experts\.[02]\.w1", "a.experts.1.w1", False),
        (["experts.1.w1"], ["w1"], "a.experts.1.w1", False),
        ([], None, "anything", True),
        ([], "all-linear", "anything", True),
    ],
)
def test_targets_are_patterns_or_names_or_their_ends(exclude, wanted, module, is_one):
    found = config(target_modules=wanted, exclude_modules=exclude).targets(module)
    assert found is is_one


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "mica", "orthogonal", None])
def test_an_initialisation_that_left_the_base_alone_is_accepted(init):
    config(init_lora_weights=init).check()


@pytest.mark.parametrize(
    "alpha", [None, "16", True, [16], {}, float("inf"), -float("inf"), float("nan"), 10**400]
)
@pytest.mark.parametrize("place", ["lora_alpha", "alpha_pattern"])
def test_an_alpha_that_is_no_finite_number_is_refused(alpha, place):
    value = {"q_proj": alpha} if place == "alpha_pattern" else alpha
    with pytest.raises(InputError, match="no finite number"):
        config(**{place: value}).scaling("layers.0.q_proj", 8)


def test_an_alpha_that_is_missing_is_refused():
    with pytest.raises(InputError, match="lora_alpha"):
        AdapterConfig({"peft_type": "LORA", "r": 8}).scaling("q_proj", 8)


@pytest.mark.parametrize("alpha", [16, 5.3, 0, -4])
def test_the_scaling_is_alpha_over_the_rank_of_the_tensors(alpha):
    assert config(lora_alpha=alpha).scaling("q_proj", 5) == alpha / 5
    assert config(lora_alpha=alpha, use_rslora=True).scaling("q_proj", 5) == alpha / sqrt(5)


def test_the_first_pattern_that_applies_gives_the_alpha():
    chosen = config(alpha_pattern={"v_proj": 1, r"layers\.0\..*": 2, "q_proj": 3})
    assert chosen.scaling("layers.0.q_proj", 1) == 2
    assert chosen.scaling("layers.1.q_proj", 1) == 3
    assert chosen.scaling("layers.1.k_proj", 1) == PLAIN["lora_alpha"]


def test_patterns_that_disagree_are_named():
    chosen = config(alpha_pattern={"q_proj": 2, "v_proj": 5, r"layers\.0\..*": 3, ".*q_proj": 2})
    assert chosen.overlapping("layers.0.q_proj") == ["q_proj", r"layers\.0\..*", ".*q_proj"]
    assert chosen.overlapping("layers.1.q_proj") == []
    assert config(alpha_pattern={"q": [1], ".*q": [2]}).overlapping("q") == ["q", ".*q"]


def test_patterns_that_are_no_object_are_refused():
    with pytest.raises(InputError, match="alpha_pattern"):
        config(alpha_pattern=["q_proj", 4]).scaling("q_proj", 8)
    with pytest.raises(InputError, match="rank_pattern"):
        config(rank_pattern="q_proj").rank("q_proj")


def test_the_rank_of_the_config_is_by_pattern_too():
    chosen = config(rank_pattern={"q_proj": 2})
    assert (chosen.rank("layers.0.q_proj"), chosen.rank("layers.0.v_proj")) == (2, 8)


@pytest.mark.parametrize(
    ("fields", "module", "rows"),
    [
        ({"trainable_token_indices": [3, 1]}, "model.embed_tokens", [3, 1]),
        ({"trainable_token_indices": {"embed_tokens": [3]}}, "model.embed_tokens", [3]),
        ({"trainable_token_indices": {"tokens": [3]}}, "model.embed_tokens", None),
        ({"trainable_token_indices": {"lm_head": [3]}}, "lm_head", [3]),
        ({"trainable_token_indices": {"wte": [3]}}, "lm_head", [3]),
        ({"trainable_token_indices": {"wte": [3], "lm_head": [4]}}, "lm_head", [4]),
        ({"trainable_token_indices": {"wte": [3], "shared": [4]}}, "lm_head", None),
        ({"token_indices": [5]}, "embed_tokens", [5]),
        ({}, "embed_tokens", None),
    ],
)
def test_token_rows_are_those_of_the_module(fields, module, rows):
    assert config(**fields).token_rows(module) == rows


@pytest.mark.parametrize("indices", ["35", 3, [1, "2"], [1.0], [True], {"embed_tokens": 3}])
def test_token_rows_that_are_no_integers_are_refused(indices):
    with pytest.raises(InputError, match="token indices"):
        config(trainable_token_indices=indices).token_rows("embed_tokens")


@pytest.mark.parametrize("enabled", ["yes", [1, 0], True])
def test_groups_that_are_no_booleans_are_refused(enabled):
    with pytest.raises(InputError, match="enable_lora"):
        _ = config(enable_lora=enabled).enable_lora


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("0.21.2", (0, 21, 2)),
        ("0.21.1.dev0@4f3b2a1", (0, 21, 1)),
        ("1.0", (1, 0)),
        (None, (0,)),
        ("unknown", ()),
    ],
)
def test_the_version_of_peft_is_read_as_numbers(said, version):
    assert config(peft_version=said).version == version


def test_a_folder_without_a_config_says_that_alpha_is_missing(tmp_path):
    with pytest.raises(InputError, match="alpha"):
        read_config(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '"LORA"', "{", "\xff", "null"])
def test_a_config_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError):
        read_config(tmp_path)


def test_a_config_is_kept_whole(tmp_path):
    fields = {**PLAIN, "target_modules": ["q_proj"], "use_lora_of_tomorrow": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    assert read_config(tmp_path).raw == fields
