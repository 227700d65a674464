"""What input embeddings and output heads are called on disk, and where a tied head would be stored.

Source: `_tied_weights_keys` of the models of huggingface/transformers v5.23.
"""

from collections.abc import Mapping, Sequence

from lorakit.formats.embeddings import EMBEDDINGS
from lorakit.tensors import TensorInfo

HEADS = ("lm_head.weight", "lm_head.decoder.weight", "cls.predictions.decoder.weight")
TOP_HEADS = {
    "decoder.weight",
    "embed_out.weight",
    "head.weight",
    "proj_out.weight",
    "vocab_projector.weight",
}
# Heads over labels: one layer, or the last of a few.
CLASSIFIERS = (
    ".score.weight",
    ".classifier.weight",
    ".classifier.1.weight",
    ".classifier.out_proj.weight",
    ".classification_head.out_proj.weight",
)
# Heads that transformers puts on a model by the task alone; PEFT saves them unasked.
TASK_HEADS = {
    "SEQ_CLS": ("score", "classifier"),
    "TOKEN_CLS": ("score", "classifier"),
    "QUESTION_ANS": ("qa_outputs",),
}
# Biases over the vocabulary that lie apart from a head of their name; the first is no parameter.
BUFFER = ".final_logits_bias"
VOCABULARY_BIASES = (BUFFER, ".predictions.bias")
# Biases that a model has under two names, and its checkpoint under the second.
SHARED_BIASES = {
    "predictions.decoder.bias": "predictions.bias",
    "lm_head.decoder.bias": "lm_head.bias",
}
# Where the head of a tied model would be stored, by model type; elsewhere it is `lm_head.weight`.
HEAD_OF = {
    **dict.fromkeys(("biogpt", "trocr"), "output_projection.weight"),
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


def is_table(name: str) -> bool:
    """Whether a tensor is an input embedding or an output head."""
    return is_head(name) or f".{name}".endswith(_NESTED_EMBEDDINGS)


def is_classifier(name: str) -> bool:
    """Whether a tensor is the output head of a model of labels."""
    return f".{name}".endswith(CLASSIFIERS)


def over_vocabulary(info: TensorInfo) -> int:
    """How many tokens a tensor has something for: an embedding, an output head or the bias of one;
    0 for any other.
    """
    name = info.name
    if is_table(name):
        return info.rows
    of_head = name.endswith(".bias") and is_head(name.removesuffix("bias") + "weight")
    bias = of_head or f".{name}".endswith(VOCABULARY_BIASES)
    return info.shape[-1] if bias and info.shape else 0


def is_buffer(name: str) -> bool:
    """Whether a tensor over the vocabulary is never trained, so that no adapter has it."""
    return f".{name}".endswith(BUFFER)


def is_span_head(name: str) -> bool:
    """Whether a tensor is the output head of a model that finds answers in a text."""
    return f".{name}".endswith(".qa_outputs.weight")


def shared_bias(name: str) -> str:
    """The name on disk of a bias that its model has under this one too, "" for any other."""
    own = next((o for o in SHARED_BIASES if f".{name}".endswith(f".{o}")), "")
    return name.removesuffix(own) + SHARED_BIASES[own] if own else ""


def headless(disk: Mapping[str, TensorInfo], embedding: str, architectures: Sequence[str]) -> bool:
    """Whether a model with this embedding and no head on disk has none that it could be tied to."""
    if architectures and all(a.endswith(HEADLESS) for a in architectures):
        return True
    beside = (f".{n}" for n in disk)
    bert = ".embeddings." in embedding and not embedding.startswith(("backbone.", "rwkv."))
    return bert and not any(f".{part}" in n for n in beside for part in BESIDE_HEAD)


def is_bare(architectures: Sequence[str]) -> bool:
    """Whether these classes are models without a head, such as Qwen3Model; not GPT2LMHeadModel."""
    bare = (a.endswith("Model") and "Head" not in a for a in architectures)
    return bool(architectures) and all(bare)


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
