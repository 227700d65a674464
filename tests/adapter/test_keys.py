"""A key says the same whatever program left it behind, and in whatever wrapper."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.formats.peft import ROLES, WRAPPERS, Key, parse
from tests.oracles import spellings

LAYER = "model.layers.0.self_attn.q_proj"
# As PEFT's save_pretrained writes them, less `base_model.model.`
KEYS = {
    f"{LAYER}.lora_A.weight": Key(LAYER, "a"),
    f"{LAYER}.lora_B.weight": Key(LAYER, "b"),
    f"{LAYER}.lora_B.bias": Key(LAYER, "bias"),
    f"{LAYER}.lora_magnitude_vector": Key(LAYER, "magnitude"),
    f"{LAYER}.base_layer.bias": Key(LAYER, "full", "bias", levels=1),
    f"{LAYER}.bias": Key(LAYER, "full", "bias"),
    "model.embed_tokens.lora_embedding_A": Key("model.embed_tokens", "embedding_a"),
    "model.embed_tokens.lora_embedding_B": Key("model.embed_tokens", "embedding_b"),
    "model.embed_tokens.base_layer.weight": Key("model.embed_tokens", "full", "weight", levels=1),
    "model.embed_tokens.token_adapter.trainable_tokens_delta": Key("model.embed_tokens", "rows"),
    "model.embed_tokens.trainable_tokens_delta": Key("model.embed_tokens", "rows"),
    "score.weight": Key("score", "full", "weight"),
    "lm_head.weight": Key("lm_head", "full", "weight"),
    "attn.lora_A.weight": Key("attn", "a"),
    "attn.base_layer.out_proj.lora_B.weight": Key("attn.out_proj", "b", inner=True),
    "mlp.experts.base_layer.lora_A.weight": Key("mlp.experts", "a", levels=1),
    "module.proj.lora_A.weight": Key("module.proj", "a"),
    f"{LAYER}.lora_velora_embed": Key(LAYER, "training"),
    f"{LAYER}.lora_monteclora_sampler.std_prior": Key(LAYER, "training"),
    f"{LAYER}.lora_diag": Key(LAYER, "diag"),
    f"{LAYER}.lora_E": Key(LAYER, "adalora"),
}
every_key = pytest.mark.parametrize("key", KEYS)
WHOLE = [
    spellings.raw_dump,
    spellings.other_adapter_name,
    spellings.magnitude_weight,
    spellings.compiled,
    spellings.compiled_layers,
    spellings.data_parallel,
    spellings.fully_sharded,
    spellings.everything_at_once,
]


@every_key
def test_the_key_of_save_pretrained_is_read(key):
    assert parse(f"base_model.model.{key}") == KEYS[key]


@every_key
@pytest.mark.parametrize("spelling", WHOLE, ids=lambda spelling: spelling.__name__)
def test_every_spelling_means_the_same(key, spelling):
    assert parse(spelling(f"base_model.model.{key}")) == KEYS[key]


@every_key
def test_no_prefix_at_all_means_the_same(key):
    if not key.startswith("module."):
        assert parse(key) == KEYS[key]


@pytest.mark.parametrize(
    ("key", "meaning"),
    [
        ("score.modules_to_save.default.weight", Key("score", "full", "weight")),
        ("score.modules_to_save.weight", Key("score", "full", "weight")),
        ("head.modules_to_save.mine.dense.bias", Key("head.dense", "full", "bias")),
        ("score.original_module.weight", Key("score", "original")),
        ("embed.token_adapter.trainable_tokens_original.default", Key("embed", "original")),
        ("embed.token_adapter.trainable_tokens_delta.default", Key("embed", "rows")),
        ("embed.token_adapter.base_layer.weight", Key("embed", "full", "weight", levels=1)),
        ("weight", Key("", "full", "weight")),
        ("prompt_embeddings", Key("", "full", "prompt_embeddings")),
    ],
)
def test_what_only_raw_dumps_have_is_read_too(key, meaning):
    assert parse(f"base_model.model.{key}") == meaning


@given(st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=3), st.integers(0, 6))
def test_wrappers_mean_nothing_wherever_they_stand(wrappers, at):
    segments = f"base_model.model.{LAYER}.lora_A.weight".split(".")
    segments[at:at] = wrappers
    assert parse(".".join(segments)) == Key(LAYER, "a")


@given(st.text(max_size=40))
def test_any_text_is_read_as_some_key(name):
    assert parse(name).role in {*ROLES.values(), "bias"}
