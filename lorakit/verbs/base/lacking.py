"""What the config of an adapter says that it has, and its file has not: whoever saved it may have
lost something. None of it can be known for certain, so these are notes. And what a base need not
have.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.pieces import Piece
from lorakit.folder.facts import fact
from lorakit.formats.peft import saves
from lorakit.naming.embeddings import TASK_HEADS, is_table
from lorakit.verbs.base.placing import Base, Placed

_layer = re.compile(r"(.*?)\.(\d+)\.(.+)\.[^.]+")  # stack, number, module within, parameter


def lacking(adapter: Adapter, found: Placed, base: Base) -> Iterator[str]:
    """Lines on saved modules, token rows and whole layers that are not in the file."""
    name, raw = adapter.name, adapter.config.raw
    if absent := _unsaved(adapter):
        yield (
            f"{name}: its config saves {absent[0]!r} as a whole, and the file has nothing of it: "
            "what the base has stays."
        )
    rows = raw.get("trainable_token_indices") or raw.get("token_indices")
    if rows and not any("rows" in m.roles for m in adapter.modules.values()):
        yield f"{name}: its config has token indices, and the file has no rows for them."
    if layers := _untouched(adapter, found, base):
        stack, number = layers[0]
        yield (
            f"{name}: its config targets modules of all layers, and the file has nothing for "
            f"{len(layers)} of them, first '{stack}.{number}': was all of it saved?"
        )


def _unsaved(adapter: Adapter) -> list[str]:
    """Modules to save of which the file has no tensor. Of the heads that PEFT names for a task a
    model has but one, and of a tied embedding one side may be saved for both.
    """
    raw = adapter.config.raw
    names = raw.get("modules_to_save") or []
    absent = [n for n in names if not any(saves(n, k) for k in adapter.full)]
    heads, tables = TASK_HEADS.get(str(raw.get("task_type")), ()), any(map(is_table, adapter.full))
    return [
        n
        for n in absent
        if not (n in heads and set(heads) & set(names) - set(absent))
        and not (tables and is_table(f"{n}.weight"))
    ]


def _untouched(adapter: Adapter, found: Placed, base: Base) -> list[tuple[str, int]]:
    """Layers of a stack with updates that have none, though modules of theirs are targeted."""
    raw = adapter.config.raw
    wanted, without = raw.get("target_modules"), raw.get("exclude_modules")
    if not isinstance(wanted, list) or isinstance(without, str):
        return []  # patterns are for the names of the model, not for those on disk
    if raw.get("layers_to_transform") is not None:
        return []
    updated = _numbers(h.place.tensor for h in found.landed if h.piece.action == "update")
    count = fact(base.config, "num_hidden_layers")
    missing: dict[tuple[str, int], None] = {}
    for name in base.infos:
        if not (match := _layer.fullmatch(name)) or match[1] not in updated:
            continue
        number = int(match[2])
        beyond = isinstance(count, int) and number >= count  # predicts more tokens, in training
        if number in updated[match[1]] or beyond or (match[1], number) in missing:
            continue
        if adapter.config.targets(name.rpartition(".")[0]):
            missing[match[1], number] = None
    return list(missing)


def _numbers(tensors: Iterator[str]) -> Mapping[str, set[int]]:
    """The numbers of the layers in which tensors are, by the stack of those."""
    found: dict[str, set[int]] = defaultdict(set)
    for name in tensors:
        if match := _layer.fullmatch(name):
            found[match[1]].add(int(match[2]))
    return found


def is_idle(piece: Piece, adapter: Adapter) -> bool:
    """Whether a piece adds zeros to a bias: files have such for layers without one, where others of
    their model have some.
    """
    if piece.action != "update" or piece.parameters != ("bias",):
        return False
    from lorakit.adapter.load import read_array

    return not read_array(adapter.source, piece.tensors[0].name, "float32").any()
