"""Weights that a method, or its reader, cannot start an adapter for: refused before one is read."""

from collections.abc import Sequence
from difflib import get_close_matches

from lorakit.errors import MisfitError
from lorakit.math.initial import METHODS
from lorakit.store.checkpoint import Checkpoint
from lorakit.verbs.base.weights import Weight
from lorakit.verbs.init.weight import Wanted


def check_kinds(
    base: Checkpoint, weights: Sequence[Weight], wanted: Wanted, *, alone: bool = False
) -> None:
    """Refuse weights of a kind that the method, or its reader, cannot do.

    Raises:
        MisfitError: naming the first.
    """
    method = METHODS[wanted.method]
    for weight in weights:
        form, why = weight.form, ""
        if method.needs and (form.embedding or len(form.span) > 1):
            why = f"is no linear layer, and {wanted.method} is for these only"
        elif not form.layer and wanted.dora:
            why = "is a stack of experts, which cannot have DoRA"
        elif not form.layer and ("moments" in method.needs or wanted.method == "mica"):
            why = f"is a stack of experts, which {wanted.method} is not for"
        elif method.changes_base and alone and (weight.turned or not form.layer):
            why = f"is stored in a way that readers do not take {wanted.method} out of"
        if why:
            raise MisfitError(
                f"{weight.tensor!r} {why}.",
                hint="Leave it out with --exclude-modules"
                + (", or leave --adapter-only out." if "readers" in why else "."),
                file=base.located.path,
                tensor=weight.tensor,
            )


def check_ranks(base: Checkpoint, weights: Sequence[Weight], wanted: Wanted) -> None:
    """Refuse patterns that mean no weight, and ranks that are larger than the weights.

    Raises:
        MisfitError: naming the first.
    """
    for pattern in wanted.without_meaning([w.form for w in weights]):
        leaves = sorted({w.form.name.rpartition(".")[2] for w in weights})
        near = get_close_matches(pattern, leaves, n=1)
        raise MisfitError(
            f"no targeted module is meant by the pattern {pattern!r}.",
            hint=(f"Is it {near[0]!r}? " if near else "") + f"They end in {', '.join(leaves)}.",
            file=base.located.path,
        )
    for weight in weights:
        rank, least = wanted.rank_of(*weight.form.names), min(weight.form.shape)
        if rank > least:
            raise MisfitError(
                f"rank {rank} is more than {weight.tensor!r} has: it is "
                f"{list(base.infos[weight.tensor].shape)}.",
                hint=f"Take {least} or less, leave it out, or give it a rank with --rank-pattern.",
                file=base.located.path,
                tensor=weight.tensor,
            )
