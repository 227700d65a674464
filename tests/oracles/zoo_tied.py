"""Cases for bases that store one tensor for their input embedding and their output head."""

from typing import Any

from tests.oracles.case import TIES, Case
from tests.oracles.zoo import PLAIN, targets


def _tied(name: str, lora: dict[str, Any], **options: Any) -> Case:
    return Case(f"tied-{name}", options.pop("model", "llama_tied"), lora, **options)


LM_HEAD: dict[str, Any] = {"untied_head": "lm_head.weight"}
WRONG: dict[str, Any] = LM_HEAD | {"peft_fault": TIES}
TIED = [
    _tied("elsewhere", PLAIN),
    _tied("embedding", targets("embed_tokens", "q_proj"), **WRONG),
    _tied("head", targets("lm_head", "q_proj"), **WRONG),
    _tied("both", targets("embed_tokens", "lm_head"), **WRONG),
    _tied("both-dora", targets("embed_tokens", "lm_head", use_dora=True), **WRONG),
    _tied(
        "together",
        targets("embed_tokens", "lm_head", ensure_weight_tying=True),
        dtype="float32",  # PEFT casts the two sides apart otherwise
        peft_fault=TIES,
    ),
    _tied(
        "together-by-factors-alone",
        targets("embed_tokens", "lm_head", ensure_weight_tying=True, alpha_pattern={"lm_head": 9}),
        dtype="float32",
        **WRONG,
    ),
    _tied("saved", PLAIN | {"modules_to_save": ["embed_tokens", "lm_head"]}, **LM_HEAD),
    _tied("saved-embedding", PLAIN | {"modules_to_save": ["embed_tokens"]}, **LM_HEAD),
    _tied("saved-head", PLAIN | {"modules_to_save": ["lm_head"]}, **LM_HEAD),
    _tied(
        "saved-together", PLAIN | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    ),
    _tied("resized", PLAIN, vocab_size=72, also_trained=r"embed_tokens\.weight"),
    _tied("tokens", PLAIN | {"trainable_token_indices": [3, 0, 61]}),
    _tied(
        "tokens-together",
        PLAIN | {"trainable_token_indices": {"embed_tokens": [5, 2], "lm_head": [5, 2]}},
    ),
    _tied(
        "tokens-apart",
        PLAIN | {"trainable_token_indices": {"embed_tokens": [5, 2], "lm_head": [7, 2]}},
        **LM_HEAD,
    ),
    _tied("tokens-head", PLAIN | {"trainable_token_indices": {"lm_head": [3]}}, **LM_HEAD),
    _tied("gpt2", targets("wte", "c_attn"), model="gpt2", **WRONG),
    _tied(
        "whisper",
        targets("embed_tokens", "q_proj"),
        model="whisper",
        untied_head="proj_out.weight",
        peft_fault=TIES,
    ),
]
# Models that share more than a weight between embedding and head, so that the two cannot part.
INSEPARABLE = [
    Case("shared-thrice", "t5", targets("shared", "q"), peft_fault=TIES),
    Case("shared-with-bias", "bert_masked", targets("word_embeddings"), peft_fault=TIES),
    Case("shared-with-bias-head", "bert_masked", targets("decoder"), peft_fault=TIES),
]
