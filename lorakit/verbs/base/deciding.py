"""What becomes of every tensor of a base, on disk or in memory: layers, places, ties, updates."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.pieces import Piece
from lorakit.engine.layout import Output
from lorakit.store.checkpoint import Checkpoint
from lorakit.store.equal import same_bytes
from lorakit.tensors import Source, TensorInfo
from lorakit.verbs.base.layers import Layers, layers_of
from lorakit.verbs.base.placing import base_of
from lorakit.verbs.base.planning import Setting, outputs
from lorakit.verbs.base.targets import Options, Target, context_of, match
from lorakit.verbs.base.tying import Tie, settle_tie, tie_of
from lorakit.verbs.base.vocabulary import check_vocabulary, with_buffers


@dataclass(frozen=True)
class Decided:
    """The outputs by the base file in whose place they come, and how they came about.

    `padded` are tensors that the base is read as having, in a length of which it has another.
    """

    outputs: Mapping[str, list[Output]]
    tie: Tie
    layers: Layers
    notes: Sequence[str]
    padded: Sequence[TensorInfo] = ()


def decided(base: Checkpoint, adapters: Sequence[Adapter], options: Options, dtype: str) -> Decided:
    """What a merge makes of each tensor.

    Raises:
        MisfitError: an adapter does not fit the base.
        InputError: an adapter is of a kind that is refused, or a target is quantised.
    """
    layers = layers_of(base.infos, adapters)
    known = base_of(layers.infos(base.infos), base.config)
    matched = match(known, adapters, options)
    _leave_copies(base, adapters, matched.targets)
    tie = tie_of(known.infos, base.config, list(matched.targets), partial(_equal, base))
    tie = settle_tie(tie, matched.targets, adapters, known.infos, untie=options.untie)
    contexts = [context_of(known, a, options) for a in adapters]
    setting = Setting(base, contexts, dtype, options.residuals, layers)
    by_file, buffers = with_buffers(base, outputs(setting, matched, tie), tie)
    check_vocabulary(known.infos, by_file, tie)
    notes = [*matched.notes, *layers.notes(base.infos), *map(_buffer_note, buffers)]
    return Decided(by_file, tie, layers, notes, buffers)


def _buffer_note(info: TensorInfo) -> str:
    return f"{info.name!r} is cut, or filled up with 0, to {info.shape[-1]} tokens."


def _leave_copies(
    base: Checkpoint, adapters: Sequence[Adapter], targets: Mapping[str, Target]
) -> None:
    """Where a tensor is replaced more than once, leave out what is the base's very own, since PEFT
    saves an embedding along with its update; and what an adapter has twice, under two names.
    """

    def stored(piece: Piece) -> tuple[Source, TensorInfo]:
        return adapters[piece.adapter].source, piece.tensors[0]

    for name, target in targets.items():
        if len(target.full) < 2 or name not in base.infos:
            continue
        kept: list[Piece] = []
        for piece in target.full:
            before = [stored(k) for k in kept if k.adapter == piece.adapter]
            known = [(base, base.infos[name]), *before]
            if not any(same_bytes(*stored(piece), *other) for other in known):
                kept.append(piece)
        target.full = kept


def _equal(base: Checkpoint, one: str, other: str) -> bool:
    return same_bytes(base, base.infos[one], base, base.infos[other])
