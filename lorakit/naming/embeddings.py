"""What input embeddings and output heads are called on disk, and where a tied head would be stored.

Source: `_tied_weights_keys` of the models of huggingface/transformers v5.23.
"""

from collections.abc import Mapping, Sequence

from lorakit.tensors import TensorInfo

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
HEADS = ("lm_head.weight", "lm_head.decoder.weight", "cls.predictions.decoder.weight")
TOP_HEADS = {"embed_out.weight", "head.weight", "proj_out.weight", "vocab_projector.weight"}
# Where the head of a tied model would be stored, by model type; elsewhere it is `lm_head.weight`.
HEAD_OF = {
    "distilbert": "vocab_projector.weight",
    "gpt_neox": "embed_out.weight",
    "rwkv": "head.weight",
    "whisper": "proj_out.weight",
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), "lm_head.weight"),
}
# Architectures for the tasks of these endings have no head over the vocabulary.
HEADLESS = ("Classification", "ForQuestionAnswering", "ForMultipleChoice")
_NESTED_EMBEDDINGS = tuple(f".{e}" for e in EMBEDDINGS)
_NESTED_HEADS = tuple(f".{h}" for h in HEADS)
# What BERT and its kin have beside a tied head: without any of these there is no head.
BESIDE_HEAD = ("predictions.", "lm_head.", "vocab_", "generator_", "head.", "pred_layer.")


def embeddings_in(disk: Mapping[str, TensorInfo]) -> list[str]:
    """The input embeddings among the tensors on disk."""
    return [n for n in disk if n.endswith(EMBEDDINGS) and f".{n}".endswith(_NESTED_EMBEDDINGS)]


def is_head(name: str) -> bool:
    """Whether a tensor is the output head of a language model."""
    return name in TOP_HEADS or (name.endswith(HEADS) and f".{name}".endswith(_NESTED_HEADS))


def headless(disk: Mapping[str, TensorInfo], embedding: str, architectures: Sequence[str]) -> bool:
    """Whether a model with this embedding and no head on disk has none that it could be tied to."""
    bare = [a for a in architectures if a.endswith(HEADLESS) or _is_bare(a, embedding)]
    if architectures and len(bare) == len(architectures):
        return True
    beside = (f".{n}" for n in disk)
    bert = ".embeddings." in embedding and not embedding.startswith(("backbone.", "rwkv."))
    return bert and not any(f".{part}" in n for n in beside for part in BESIDE_HEAD)


def _is_bare(architecture: str, embedding: str) -> bool:
    """Whether a class is a model that uses its embedding once, such as Qwen3Model; GPT2LMHeadModel
    has a head, and T5Model two stacks.
    """
    shared = embedding.endswith("shared.weight") or "Head" in architecture
    return architecture.endswith("Model") and not shared


def head_of(embedding: str, model_type: str) -> str:
    """The name of the tensor that a head of its own would be, "" where that takes more than a name.

    Encoder-decoder models share one embedding thrice and scale what a tied head gives; BERT and its
    kin share the bias of the head as well.
    """
    if model_type in HEAD_OF:
        return HEAD_OF[model_type]
    known = embedding.endswith(EMBEDDINGS) and not embedding.endswith("shared.weight")
    untold = not model_type and "decoder." in embedding  # OPT and Whisper call it otherwise
    if not known or untold or ".embeddings." in embedding:
        return ""
    nested = "language_model." if embedding.startswith("language_model.model.") else ""
    return f"{nested}lm_head.weight"
