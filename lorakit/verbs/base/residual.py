"""What an initialisation took out of the base, as updates that take it out again.

An adapter that was initialised by PiSSA or OLoRA was trained on `base - what its factors were`, a
KaSA adapter on a base without its smallest singular values. On the original base that is computed
anew from each weight; on the residual base (`--base-is-residual`) there is nothing to do.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorakit.errors import InputError
from lorakit.tensors import TensorInfo
from lorakit.verbs.base.placing import Landed

if TYPE_CHECKING:
    from lorakit.verbs.base.planning import Setting


def residuals(
    landed: Sequence[Landed], plain: Sequence[Mapping[str, Any]], setting: "Setting"
) -> list[dict[str, Any]]:
    """One more update for each that was initialised from the weight.

    Raises:
        InputError: the adapter shares that weight with others, so it cannot be computed.
    """
    found = []
    for here, spec in zip(landed, plain, strict=True):
        adapter, source = setting.contexts[here.piece.adapter].adapter, here.piece.source
        kind = adapter.config.residual if setting.residuals else ""
        if not kind or source is None or source.embedding:
            continue
        if "at" in spec or spec.get("rows") or "experts" in spec or spec.get("magnitude"):
            raise InputError(
                f"{here.piece.target!r} was initialised by {kind}, which cannot be computed again "
                "for a part of a weight, nor beside a DoRA magnitude.",
                hint="Merge into the residual base, with --base-is-residual.",
                file=adapter.path,
                tensor=source.a.name,
            )
        found.append(
            {
                "residual": kind,
                "rank": source.a.shape[0],
                "scaling": spec["scaling"],
                "weight": spec["weight"],
                "transposed": spec["transposed"],
            }
        )
    return found


def residual_memory(tensor: TensorInfo) -> int:
    """Bytes that it takes at most to compute one: the weight, two Gram matrices and a block."""
    smaller = min(tensor.matrix(1))
    return 8 * tensor.numel + 2 * 8 * smaller**2 + (64 << 20)
