"""Which tensor a base shares between its input embedding and its output head, if any."""

import pytest

from lorakit.tensors import TensorInfo
from lorakit.verbs.base.tying import Tie, tie_of

TIED, SAYS_NOT = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
LLAMA = ["model.embed_tokens.weight", "model.norm.weight"]
BERT = ["bert.embeddings.word_embeddings.weight", "bert.pooler.dense.weight"]
MASKED = [*BERT, "cls.predictions.bias", "cls.predictions.transform.dense.weight"]


def tie(names, config, asked=(), *, equal=False):
    disk = {n: TensorInfo(n, "F32", (16, 8)) for n in names}
    return tie_of(disk, config, list(asked), lambda one, other: equal)


@pytest.mark.parametrize(
    ("names", "config", "head"),
    [
        (LLAMA, TIED, "lm_head.weight"),
        (LLAMA, {}, "lm_head.weight"),
        (LLAMA, {"text_config": TIED}, "lm_head.weight"),
        (["transformer.wte.weight"], {}, "lm_head.weight"),
        (["transformer.wte.weight"], {"architectures": ["GPT2LMHeadModel"]}, "lm_head.weight"),
        (["wte.weight"], {"model_type": "gpt2"}, "lm_head.weight"),
        (["transformer.word_embeddings.weight"], {"model_type": "bloom"}, "lm_head.weight"),
        (["gpt_neox.embed_in.weight"], TIED | {"model_type": "gpt_neox"}, "embed_out.weight"),
        (["model.decoder.embed_tokens.weight"], {"model_type": "whisper"}, "proj_out.weight"),
        (["model.decoder.embed_tokens.weight"], {"model_type": "opt"}, "lm_head.weight"),
        (["language_model.model.embed_tokens.weight"], TIED, "language_model.lm_head.weight"),
        (["backbone.embeddings.weight"], {"model_type": "mamba"}, "lm_head.weight"),
    ],
)
def test_a_shared_embedding_and_the_name_of_a_head_of_its_own(names, config, head):
    assert tie(names, config) == Tie(names[0], head, separable=True)


@pytest.mark.parametrize(
    ("names", "config"),
    [
        (LLAMA, SAYS_NOT),
        (LLAMA, {"text_config": SAYS_NOT}),
        ([*LLAMA, "lm_head.weight"], {}),
        (LLAMA, TIED | {"architectures": ["LlamaForSequenceClassification"]}),
        (MASKED, TIED | {"architectures": ["BertForTokenClassification"]}),
        (BERT, TIED | {"architectures": ["BertModel"]}),
        (BERT, {}),
        (["conv_in.weight"], {}),
        (["vit.embeddings.patch_embeddings.projection.weight"], TIED),
    ],
)
def test_a_base_that_shares_nothing(names, config):
    assert tie(names, config, names) == Tie()


@pytest.mark.parametrize(
    ("names", "config"),
    [
        (["shared.weight"], {"model_type": "t5"}),
        (["model.shared.weight"], {"model_type": "bart"}),
        (["model.decoder.embed_tokens.weight"], {}),
        (MASKED, {}),
        (MASKED, TIED | {"architectures": ["BertForMaskedLM"], "model_type": "bert"}),
        (["shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"], TIED),
        (["model.tokens.weight"], TIED | {"vocab_size": 16}),
    ],
)
def test_what_is_shared_in_a_way_that_cannot_be_undone(names, config):
    found = tie(names, config, names)
    assert (found.embedding, found.separable) == (names[0], False)


@pytest.mark.parametrize(("config", "equal"), [(TIED, False), ({}, True)])
def test_a_head_on_disk_that_is_the_embedding_once_more(config, equal):
    names = [*LLAMA, "lm_head.weight"]
    found = tie(names, config, [LLAMA[0]], equal=equal)
    assert found == Tie(LLAMA[0], "lm_head.weight", separable=True, copies=("lm_head.weight",))


def test_the_head_that_an_adapter_asks_for_is_the_shared_one():
    assert tie(LLAMA, TIED, ["lm_head.weight"]).head == "lm_head.weight"
    assert tie(MASKED, {}, ["cls.predictions.decoder.weight"]) == Tie(
        MASKED[0], "cls.predictions.decoder.weight"
    )
