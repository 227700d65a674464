"""What the input embeddings of language models are called, the same in every format.

Source: `_tied_weights_keys` of the models of huggingface/transformers v5.23.
"""

EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "shared.weight",
    "tok_embeddings.weight",
    "tokens_embed.weight",
    "backbone.embeddings.weight",
    "rwkv.embeddings.weight",
)
_NESTED = tuple(f".{name}" for name in EMBEDDINGS)


def is_embedding(module: str) -> bool:
    """Whether a module is an input embedding, whose weight is (vocabulary, dim)."""
    return f".{module}.weight".endswith(_NESTED)
