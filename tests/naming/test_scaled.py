"""The scale of an embedding told from the config, against the modules of transformers."""

import json
import math
import re
from pathlib import Path

import pytest

from lorakit.errors import InputError
from lorakit.naming.scaled import FAMILIES, embed_scale, scale_left_out

BART = {
    **{"vocab_size": 32, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1},
    **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
    **{"encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "max_position_embeddings": 64},
}
GEMMA = {
    **{"vocab_size": 32, "hidden_size": 24, "intermediate_size": 8, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8},
}
PER_LAYER = {"vocab_size_per_layer_input": 32, "hidden_size_per_layer_input": 6}
SEAMLESS = {
    **{"vocab_size": 32, "t2u_vocab_size": 32, "hidden_size": 32, "encoder_layers": 1},
    **{"decoder_layers": 1, "speech_encoder_layers": 1, "t2u_encoder_layers": 1},
    **{"t2u_decoder_layers": 1, "max_position_embeddings": 64},
}
MODELS = [
    ("bart", {**BART, "scale_embedding": True}),
    ("bart", {**BART, "scale_embedding": False}),
    *((f, BART) for f in ("bart", "bigbird_pegasus", "blenderbot", "m2m_100", "nllb-moe")),
    *((f, BART) for f in ("mbart", "pegasus", "pegasus_x", "plbart")),
    ("mbart", {**BART, "scale_embedding": True}),
    ("xglm", {"vocab_size": 32, "d_model": 24, "num_layers": 1, "attention_heads": 2}),
    ("biogpt", {**GEMMA, "num_key_value_heads": None}),
    *((f, GEMMA) for f in ("gemma", "gemma2", "gemma3_text", "vaultgemma", "llama")),
    ("gemma3", {"text_config": {"model_type": "gemma3_text", **GEMMA}}),
    ("gemma3n_text", {**GEMMA, **PER_LAYER, "num_kv_shared_layers": 0}),
    ("gemma4_text", {**GEMMA, **PER_LAYER, "num_kv_shared_layers": 0}),
    ("paligemma", {"text_config": {"model_type": "gemma", **GEMMA}}),
    ("minicpm3", {**GEMMA, "num_key_value_heads": 2, "scale_emb": 7}),
    ("seamless_m4t", SEAMLESS),
    ("seamless_m4t_v2", {**SEAMLESS, "char_vocab_size": 32}),
]


def built(family, options):
    """The embeddings of a model on the meta device, by name, and its config as it is written."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    config = transformers.CONFIG_MAPPING[family](**options)
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config)
    found = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    return found, json.loads(config.to_json_string(use_diff=False))


def scale_of(module):
    if hasattr(module, "scalar_embed_scale"):
        return float(module.scalar_embed_scale)
    return float(getattr(module, "embed_scale", 1.0))


@pytest.mark.parametrize(("family", "options"), MODELS, ids=[f for f, _ in MODELS])
def test_every_embedding_scales_as_its_config_tells(family, options):
    modules, config = built(family, options)
    assert modules
    expected = {name: pytest.approx(scale_of(m), rel=1e-12) for name, m in modules.items()}
    assert {name: embed_scale(config, name) for name in modules} == expected


def test_every_family_of_transformers_with_a_scaled_embedding_is_in_the_table():
    transformers = pytest.importorskip("transformers")
    scaled = re.compile(
        r"^class \w+\(nn\.Embedding\):(?:\n(?!class ).*)*?\.forward\(.*\) \* ", re.M
    )
    models = Path(transformers.__file__).parent / "models"
    families = {
        p.parent.name for p in models.glob("*/modeling_*.py") if scaled.search(p.read_text())
    }
    known = {family.replace("-", "_") for family in FAMILIES}
    assert "gemma3" in families
    assert families - known == set()


def test_one_side_of_a_composite_model_is_told_by_its_own_config():
    config = {
        "model_type": "vision-encoder-decoder",
        "encoder": {"model_type": "bart", "d_model": 4, "scale_embedding": True},
        "decoder": {"model_type": "trocr", "d_model": 16, "scale_embedding": True},
    }
    assert embed_scale(config, "decoder.model.decoder.embed_tokens") == 4
    assert embed_scale(config, "encoder.shared") == 2
    assert embed_scale({**config, "decoder": {"model_type": "gpt2"}}, "decoder.embed_tokens") == 1


def test_a_nested_config_without_a_family_is_of_the_family_around_it():
    config = {"model_type": "gemma3", "text_config": {"hidden_size": 64}}
    assert embed_scale(config, "language_model.model.embed_tokens") == 8


@pytest.mark.parametrize(
    "module", ["model.layers.0.self_attn.q_proj", "lm_head", "embed_positions"]
)
@pytest.mark.parametrize("family", ["gemma3_text", "m2m_100", "minicpm3", "seamless_m4t"])
def test_what_is_no_scaled_embedding_has_no_scale(family, module):
    assert embed_scale({"model_type": family, "hidden_size": 4, "d_model": 4}, module) == 1


@pytest.mark.parametrize("config", [{}, {"model_type": "llama"}, {"text_config": None}])
def test_a_family_that_does_not_scale_needs_no_facts(config):
    assert embed_scale(config, "model.embed_tokens") == 1


def test_a_config_that_does_not_say_the_size_is_refused():
    with pytest.raises(InputError, match="gemma3_text does not say hidden_size"):
        embed_scale({"model_type": "gemma3_text"}, "model.embed_tokens")


@pytest.mark.parametrize(
    ("version", "left_out"),
    [
        *((v, True) for v in (None, "", "0.17.1", "0.17.2.dev0", "0.9.0")),
        *((v, False) for v in ("0.18.0", "0.18.2.dev0@abc", "0.21.2", "1.0.0")),
    ],
)
def test_the_scale_is_left_out_up_to_peft_0_17(version, left_out):
    config = {"model_type": "gemma3_text", "hidden_size": 64}
    expected = 8 if left_out else 1
    assert scale_left_out(config, "model.embed_tokens", version) == expected


@pytest.mark.parametrize("family", ["gemma", "gemma2", "minicpm3", "gemma4_text"])
def test_what_did_not_scale_in_transformers_4_had_nothing_left_out(family):
    config = {"model_type": family, "hidden_size": 64}
    assert scale_left_out(config, "model.embed_tokens", None) == 1


def test_peft_of_today_scales_the_path_of_an_adapter():
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    layer = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    scale = math.sqrt(64)
    base = torch.nn.ModuleDict(
        {"embed_tokens": layer.Gemma3TextScaledWordEmbedding(10, 6, 0, embed_scale=scale)}
    )
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["embed_tokens"])
    config.init_lora_weights = False
    module = peft.get_peft_model(base, config).base_model.model["embed_tokens"]
    a, b = (f["default"].detach() for f in (module.lora_embedding_A, module.lora_embedding_B))
    ids = torch.arange(1, 10)
    change = module(ids) - module.base_layer(ids)
    torch.testing.assert_close(change, scale * (b @ a).T[ids], rtol=1e-5, atol=1e-5)
