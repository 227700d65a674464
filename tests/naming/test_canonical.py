"""Canonical names: two spellings of one thing are one, two things never are."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.naming.canonical import canonical, refused
from lorakit.naming.families import GENERIC, REFUSED, REFUSED_PARTS, RULES
from tests.naming.indexes import INDEXES

TYPES = ["", *(t for types in RULES for t in types.split())]
WRAPPING = ["model", "language_model", "llm", "thinker", "transformer"]

TEXT = "layers.3.self_attn.q_proj.weight"
# Model type, the canonical name, and spellings of it on the hub, in v4 models and in v5 models.
SPELLINGS = [
    *(
        ("gemma3", TEXT, f"{front}{TEXT}")
        for front in (
            *("", "model.", "language_model.", "language_model.model.", "model.language_model."),
            *("model.language_model.model.", "model.model.", "thinker.model.", "llm.model."),
        )
    ),
    ("llava", "lm_head.weight", "language_model.lm_head.weight"),
    ("gpt_neox", "lm_head.weight", "embed_out.weight"),
    *(
        ("gemma3", "vision_tower.encoder.layers.0.mlp.fc1", f"{front}encoder.layers.0.mlp.fc1")
        for front in (
            *("vision_tower.", "vision_tower.vision_model.", "model.vision_tower."),
            "model.vision_tower.vision_model.",
        )
    ),
    ("qwen2_vl", "visual.blocks.0.attn.qkv_proj.weight", "visual.blocks.0.attn.qkv.weight"),
    ("qwen2_vl", "visual.blocks.0.attn.qkv_proj.weight", "model.visual.blocks.0.attn.qkv.weight"),
    ("llava", "multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
    ("emu3", TEXT, f"text_model.model.{TEXT}"),
    ("mllama", TEXT, f"language_model.model.{TEXT}"),
    ("nemotron_h", "layers.0.mixer.in_proj.weight", "backbone.layers.0.mixer.in_proj.weight"),
    *(
        ("mixtral", f"layers.0.mlp.experts.7.{new}_proj.weight", f"{front}7.{old}.weight")
        for old, new in (("w1", "gate"), ("w3", "up"), ("w2", "down"), ("up_proj", "up"))
        for front in ("model.layers.0.block_sparse_moe.experts.", "layers.0.mlp.experts.")
    ),
    ("phimoe", "layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"),
    ("phimoe", "layers.0.mlp.gate.weight", "model.layers.0.mlp.router.weight"),
    *(
        ("granitemoe", f"layers.0.mlp.experts.{new}", f"model.layers.0.block_sparse_moe.{old}")
        for old, new in (
            ("input_linear.weight", "gate_up_proj"),
            ("experts.gate_up_proj", "gate_up_proj"),
            ("output_linear", "down_proj"),
        )
    ),
    ("granitemoe", "layers.0.mlp.gate.weight", "layers.0.block_sparse_moe.router.layer.weight"),
    ("aria", "layers.0.mlp.experts.down_proj", "layers.0.mlp.experts.fc2.weight"),
    ("lfm2_moe", "layers.0.feed_forward.experts.0.up_proj", "layers.0.feed_forward.experts.0.w3"),
    *(
        ("vit", f"layers.0.{new}.weight", f"vit.encoder.layer.0.{old}.weight")
        for old, new in (
            ("attention.attention.query", "attention.q_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        )
    ),
    ("vit", "layers.0.mlp.fc2.weight", "vit.layers.0.mlp.fc2.weight"),
]
# Things that look alike and are not the same, by model type.
DISTINCT = {
    "llava": ["vision_tower.encoder.layers.0.mlp.fc1", "encoder.layers.0.mlp.fc1"],
    "qwen2_vl": ["model.layers.0.mlp.gate_proj", "model.visual.layers.0.mlp.gate_proj"],
    "clip": ["text_model.encoder.layers.0.mlp.fc1", "vision_model.encoder.layers.0.mlp.fc1"],
    "qwen2_5_omni": ["thinker.model.layers.0.mlp.up_proj", "talker.model.layers.0.mlp.up_proj"],
    "qwen2_moe": [
        *(f"layers.0.mlp.{m}.gate_proj" for m in ("experts.0", "experts.1", "shared_expert")),
        *("layers.0.mlp.gate", "layers.0.mlp.shared_expert_gate", "layers.0.mlp.gate_proj"),
        *("layers.0.mlp.experts.gate_up_proj", "layers.1.mlp.experts.gate_up_proj"),
    ],
    "granitemoeshared": [
        "layers.0.shared_mlp.input_linear",
        "layers.0.block_sparse_moe.input_linear",
    ],
    "bert": ["bert.encoder.layer.0.output.dense", "bert.encoder.layer.0.attention.output.dense"],
}


@pytest.mark.parametrize(("model_type", "expected", "spelling"), SPELLINGS)
def test_every_spelling_of_one_thing_is_one(model_type, expected, spelling):
    assert canonical(spelling, model_type) == expected


@pytest.mark.parametrize("model_type", DISTINCT)
def test_what_is_not_the_same_keeps_its_own_name(model_type):
    found = {canonical(name, model_type) for name in DISTINCT[model_type]}
    assert len(found) == len(DISTINCT[model_type])


@pytest.mark.parametrize("model_type", ["", "mixtral", "qwen2_vl", "llama"])
@pytest.mark.parametrize("index", INDEXES)
def test_no_two_tensors_of_a_real_index_have_the_same_canonical_name(index, model_type):
    found = {canonical(name, model_type) for name in INDEXES[index]}
    assert len(found) == len(INDEXES[index])


@given(st.lists(st.sampled_from(["0", "1", "q_proj", "mlp", "experts", "w1"]), max_size=4))
def test_a_name_of_an_unknown_family_only_loses_what_wraps_it(segments):
    name = ".".join(["layers", *segments])
    assert canonical(f"model.language_model.{name}", "unheard_of") == canonical(name, "unheard_of")


@pytest.mark.parametrize("model_type", ["", "mixtral", "qwen2_vl", "llama"])
@pytest.mark.parametrize("index", INDEXES)
def test_a_canonical_name_is_its_own(index, model_type):
    found = [canonical(name, model_type) for name in INDEXES[index]]
    assert [canonical(name, model_type) for name in found] == found


@given(st.lists(st.sampled_from(WRAPPING), max_size=5))
def test_however_the_text_model_is_wrapped_its_layers_are_the_same(wrapping):
    assert canonical(".".join([*wrapping, TEXT])) == TEXT


@given(st.sampled_from(TYPES), st.integers(0, 99), st.sampled_from(["q_proj", "k_proj", "o_proj"]))
def test_a_number_is_never_changed(model_type, layer, leaf):
    found = canonical(f"model.layers.{layer}.self_attn.{leaf}.weight", model_type)
    assert re.findall(r"\d+", found) == [str(layer)]


@pytest.mark.parametrize("index", INDEXES)
def test_a_real_index_takes_well_under_a_tenth_of_a_second(index):
    canonical("once", index)
    start = time.perf_counter()
    for name in INDEXES[index]:
        canonical(name, "mixtral")
    assert time.perf_counter() - start < 0.5  # measured 0.02; the machine may be busy


def test_every_rule_has_at_most_one_number_and_changes_something():
    for rules in (GENERIC, *RULES.values()):
        for rule in rules.split():
            old, arrow, new = rule.partition(">")
            assert arrow
            assert old != new, rule
            assert old.count("#") == new.count("#") <= 1, rule


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_refusal_says_why(model_type):
    names = ("vision_tower.layers.0.q_proj.weight", "vision_model.layers.0.self_attn.q_proj.weight")
    experts = ("layers.0.mlp.text_moe.experts.gate_up_proj",)
    assert any(refused(model_type, name) for name in (*names, *experts))


def test_a_refusal_is_only_for_what_is_meant():
    assert refused("kimi_k25", "layers.0.self_attn.q_proj.weight") == ""
    assert refused("llama", "layers.0.self_attn.q_proj.weight") == ""
    assert refused("gpt_oss", "layers.0.mlp.experts.gate_up_proj") == ""
    assert "alternate" in refused("gpt_oss", "layers.0.mlp.experts.gate_up_proj", parts=True)
    assert set(REFUSED_PARTS) == {"gpt_oss", "openai_privacy_filter", "codegen"}
