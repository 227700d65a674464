"""A vocabulary that was resized has its new size in every tensor with something for each token.

The logits' bias of BART and its kin is a buffer, which PEFT does not save: new tokens have 0 there,
as in transformers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lorakit.engine.layout import Output
from lorakit.errors import MisfitError
from lorakit.naming.embeddings import is_buffer, over_vocabulary
from lorakit.store.checkpoint import Checkpoint
from lorakit.store.padded import can_pad
from lorakit.tensors import TensorInfo
from lorakit.verbs.base.tying import Tie

Outputs = Mapping[str, Sequence[Output]]


def check_vocabulary(disk: Mapping[str, TensorInfo], outputs: Outputs, tie: Tie) -> None:
    """Refuse a result in which some tensors have the old number of tokens and some a new one.

    Raises:
        MisfitError: naming the first that the adapter left as it was.
    """
    resized, stale = _sizes(disk, outputs, tie)
    for name, old in stale.items():
        count, other = resized[old]
        raise MisfitError(
            f"{other!r} has {count} tokens in the adapter, {name!r} has {old} in the base and "
            "is not in the adapter: a model of both does not load.",
            hint="Resize the base first, as the training did, or save the "
            "adapter with save_embedding_layers=True and that layer in modules_to_save.",
            tensor=name,
        )


def with_buffers(
    base: Checkpoint, outputs: Outputs, tie: Tie
) -> tuple[dict[str, list[Output]], list[TensorInfo]]:
    """The outputs, with buffers over a resized vocabulary in its new size; and what those are seen
    as in the base.
    """
    resized, stale = _sizes(base.infos, outputs, tie)
    seen = {
        name: replace(base.infos[name], shape=(1, resized[old][0]), start=0)
        for name, old in stale.items()
        if is_buffer(name) and can_pad(base.home(name), name)
    }

    def fitted(out: Output) -> Output:
        info = seen.get(out.tensor.name)
        placed = out.tensor.but(shape=info.shape) if info else out.tensor
        return replace(out, tensor=placed, origin=info) if info else out

    return {f: [fitted(o) for o in outs] for f, outs in outputs.items()}, list(seen.values())


def _sizes(
    disk: Mapping[str, TensorInfo], outputs: Outputs, tie: Tie
) -> tuple[dict[int, tuple[int, str]], dict[str, int]]:
    """Of every number of tokens that was changed, the new one and the first tensor with it; and
    the tensors that still have the old one. A head that is parted from its embedding by `tie` had
    the number of that.
    """
    if tie.untied:
        disk = {tie.head: disk[tie.embedding].but(name=tie.head), **disk}
    sizes = {
        o.tensor.name: (over_vocabulary(disk[o.tensor.name]), over_vocabulary(o.tensor))
        for outs in outputs.values()
        for o in outs
        if o.tensor.name in disk
    }
    resized: dict[int, tuple[int, str]] = {}
    for name, (old, new) in sizes.items():
        if old != new:
            resized[old] = new, name
    return resized, {n: old for n, (old, new) in sizes.items() if old == new and old in resized}
