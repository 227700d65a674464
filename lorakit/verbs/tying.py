"""Input embeddings and output heads that share one tensor on disk.

A tied model stores the embedding only; an update of one side alone cannot be written without giving
the other side a tensor of its own. Silently changing both is the field's classic fault, so it is
refused unless `--untie` asks for the second tensor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.errors import MisfitError
from lorakit.folder.facts import fact
from lorakit.store.equal import same_bytes
from lorakit.tensors import TensorInfo
from lorakit.verbs.targets import Target

EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "shared.weight",
    "tok_embeddings.weight",
)
HEADS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight")


@dataclass(frozen=True)
class Tie:
    """The embedding on disk, the head that shares it, and whether both get their own tensor now."""

    embedding: str = ""
    head: str = ""
    untied: bool = False


def tie_of(disk: Mapping[str, TensorInfo], config: Mapping[str, Any], asked: Sequence[str]) -> Tie:
    """The tie of a base: by its config; where that is silent, by whether a head is on disk.

    `asked` are the tensors that adapters ask for; a head among them that is not on disk is the tied
    one.
    """
    says = fact(config, "tie_word_embeddings")
    present = [n for n in disk if n.endswith(HEADS)]
    embeddings = [n for n in disk if f".{n}".endswith(tuple(f".{e}" for e in EMBEDDINGS))]
    if len(embeddings) != 1 or says is False or (says is None and present):
        return Tie()
    head = next((n for n in (*present, *asked) if n.endswith(HEADS)), "lm_head.weight")
    return Tie(embeddings[0], head)


def settle_tie(
    tie: Tie, targets: dict[str, Target], adapters: Sequence[Adapter], *, untie: bool
) -> Tie:
    """The tie after these targets. Two sides that get the very same are reduced to the embedding's.

    Raises:
        MisfitError: the two sides part, and `untie` does not allow it.
    """
    embedding, head = targets.get(tie.embedding), targets.get(tie.head)
    if not tie.head or (embedding is None and head is None):
        return tie
    if embedding and head and _same(embedding, head, adapters):
        del targets[tie.head]
        return tie
    if head is None and embedding and not embedding.full and not embedding.updates:
        return tie  # new token rows, which both sides share
    if not untie:
        side = tie.embedding if head is None else tie.head
        raise MisfitError(
            f"changes {side!r}, which the base shares between its embedding and its output head.",
            hint="Pass --untie to write both (tie_word_embeddings becomes false).",
            file=adapters[(embedding or head or Target("")).pieces[0].adapter].path,
            tensor=side,
        )
    return Tie(tie.embedding, tie.head, untied=True)


def _same(one: Target, other: Target, adapters: Sequence[Adapter]) -> bool:
    """Whether two targets are one full tensor each, with the same bytes, or the same token rows."""
    pairs = list(zip(one.pieces, other.pieces, strict=False))
    if len(one.pieces) != len(other.pieces) or one.updates or other.updates:
        return False
    return all(
        a.action == b.action
        and a.spec.get("indices") == b.spec.get("indices")
        and same_bytes(
            adapters[a.adapter].source, a.tensors[0], adapters[b.adapter].source, b.tensors[0]
        )
        for a, b in pairs
    )
