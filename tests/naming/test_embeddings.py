"""Which tensors have something for each token."""

import pytest

from lorakit.naming.embeddings import over_vocabulary
from lorakit.tensors import TensorInfo


@pytest.mark.parametrize(
    ("name", "shape", "tokens"),
    [
        ("model.embed_tokens.weight", (99, 8), 99),
        ("lm_head.weight", (99, 8), 99),
        ("lm_head.bias", (99,), 99),
        ("lm_head.decoder.bias", (99,), 99),
        ("embed_out.weight", (99, 8), 99),
        ("final_logits_bias", (1, 99), 99),
        ("cls.predictions.bias", (99,), 99),
        ("model.layers.0.self_attn.q_proj.bias", (99,), 0),
        ("model.norm.weight", (99,), 0),
        ("bias", (), 0),
        ("lm_head.bias", (), 0),
    ],
)
def test_how_many_tokens_a_tensor_is_for(name, shape, tokens):
    assert over_vocabulary(TensorInfo(name, "F32", shape)) == tokens
