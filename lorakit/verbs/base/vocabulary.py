"""A vocabulary that was resized has its new size in every tensor with something for each token."""

from collections.abc import Mapping, Sequence

from lorakit.engine.layout import Output
from lorakit.errors import MisfitError
from lorakit.naming.embeddings import over_vocabulary
from lorakit.tensors import TensorInfo
from lorakit.verbs.base.tying import Tie


def check_vocabulary(
    disk: Mapping[str, TensorInfo], outputs: Mapping[str, Sequence[Output]], tie: Tie
) -> None:
    """Refuse a result in which some tensors have the old number of tokens and some a new one; a
    head that is parted from its embedding by `tie` had the number of that.

    Raises:
        MisfitError: naming the first that the adapter left as it was.
    """
    if tie.untied:
        disk = {tie.head: disk[tie.embedding].but(name=tie.head), **disk}
    sizes = {
        o.tensor.name: (over_vocabulary(disk[o.tensor.name]), over_vocabulary(o.tensor))
        for outs in outputs.values()
        for o in outs
        if o.tensor.name in disk
    }
    resized = {old: (new, name) for name, (old, new) in sizes.items() if old != new}
    for name, (old, new) in sizes.items():
        if old == new and old in resized:
            count, other = resized[old]
            raise MisfitError(
                f"{other!r} has {count} tokens in the adapter, {name!r} has {old} in the base and "
                "is not in the adapter: a model of both does not load.",
                hint="Resize the base first, as the training did, or save the "
                "adapter with save_embedding_layers=True and that layer in modules_to_save.",
                tensor=name,
            )
