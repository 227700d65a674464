"""Input embeddings and output heads that share one tensor on disk.

A tied model stores the embedding, and where torch has saved it, the same bytes once more for the
head: then both get what the embedding gets. An update of one side alone cannot be written without
giving the other side a tensor of its own. Silently changing both is the field's classic fault, so
it is refused unless `--untie` asks for the second tensor.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.pieces import Piece
from lorakit.configs import model_type
from lorakit.errors import MisfitError
from lorakit.folder.facts import fact
from lorakit.naming.embeddings import embeddings_in, head_of, headless, is_head
from lorakit.naming.places import Place
from lorakit.store.equal import same_bytes
from lorakit.tensors import Source, TensorInfo
from lorakit.verbs.base.placing import Landed
from lorakit.verbs.base.targets import Target


@dataclass(frozen=True)
class Tie:
    """The embedding on disk, the head that shares it, and whether both get their own tensor now.

    `separable` says whether a model with a tensor for each would work. `copies` are the tensors on
    disk that are the embedding once more.
    """

    embedding: str = ""
    head: str = ""
    separable: bool = False
    untied: bool = False
    copies: tuple[str, ...] = ()


def tie_of(
    disk: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    asked: Sequence[str],
    equal: Callable[[str, str], bool] = lambda one, other: False,
) -> Tie:
    """The tie of a base: by its config; where that is silent, by whether a head is on disk that is
    another than the embedding.

    `asked` are the tensors that adapters ask for; a head among them that is not on disk is the tied
    one. `equal` says whether two tensors on disk have the same bytes; nothing is asked of it where
    nothing is asked for.
    """
    says = fact(config, "tie_word_embeddings")
    present = [n for n in disk if is_head(n)]
    embedding, alone = _shared(disk, config, asked)
    if not embedding or says is False:
        return Tie()
    others = [n for n in (*embeddings_in(disk), *present) if n != embedding]
    looked = any(n == embedding or n in others or is_head(n) for n in asked)
    copies = [n for n in others if (says and n in present) or (looked and equal(embedding, n))]
    if any(n not in copies for n in present):
        return Tie()
    head = next((n for n in (*present, *asked) if is_head(n)), "")
    built = [str(a) for a in config.get("architectures") or ()]
    if not head and headless(disk, embedding, built):
        return Tie()
    own = head_of(embedding, model_type(config)) if alone else ""
    return Tie(embedding, head or own, separable=bool(own), copies=tuple(copies))


def _shared(
    disk: Mapping[str, TensorInfo], config: Mapping[str, Any], asked: Sequence[str]
) -> tuple[str, bool]:
    """The input embedding, and whether it is the only one.

    Among several, the one that adapters ask for; with none of a known name, what they ask for that
    has a row for each token.
    """
    known = embeddings_in(disk)
    if len(known) == 1:
        return known[0], True
    tokens = fact(config, "vocab_size")
    candidates = known or [n for n, i in disk.items() if len(i.shape) == 2 and i.rows == tokens]
    return next((n for n in asked if n in candidates and not is_head(n)), ""), False


def settle_tie(
    tie: Tie,
    targets: dict[str, Target],
    adapters: Sequence[Adapter],
    disk: Mapping[str, TensorInfo],
    *,
    untie: bool,
) -> Tie:
    """The tie after these targets. Two sides that get the very same get the embedding's, in every
    tensor on disk that is it.

    Raises:
        MisfitError: the two sides part, and `untie` does not allow it, or cannot be done.
    """
    embedding, head = targets.get(tie.embedding), targets.get(tie.head)
    if not tie.embedding or (embedding is None and head is None):
        return tie
    common = head is None and embedding and _is_common(embedding, adapters)
    if embedding and (common or (head and _same(embedding, head, adapters))):
        targets.pop(tie.head, None)
        targets |= {name: replace(embedding, name=name) for name in tie.copies}
        return tie
    if not (untie and tie.separable):
        side = tie.embedding if head is None else tie.head
        raise MisfitError(
            f"changes {side!r}, which the base shares between its embedding and its output head.",
            hint="Pass --untie to write both (tie_word_embeddings becomes false)."
            if tie.separable
            else "This kind of model cannot be untied by lorakit; use the adapter unmerged.",
            file=adapters[(embedding or head or Target("")).pieces[0].adapter].path,
            tensor=side,
        )
    shape = disk[tie.embedding].shape
    for one, other in ((tie.embedding, tie.head), (tie.head, tie.embedding)):
        shared = _shared_of(targets.get(one), shape, adapters, rows=one == tie.embedding)
        there = targets.get(other, Target(other))
        own = {p.adapter for p in (*there.rows, *there.full)}
        for piece in (p for p in shared if p.adapter not in own):
            targets.setdefault(other, there).add(Landed(piece, Place(other)))
    if embedding:
        moved = (replace(h, place=replace(h.place, tensor=tie.head)) for h in embedding.updates)
        for here in (h for h in moved if adapters[h.piece.adapter].both_sides):
            targets.setdefault(tie.head, Target(tie.head)).add(here)
    return replace(tie, untied=True)


def _is_common(embedding: Target, adapters: Sequence[Adapter]) -> bool:
    """Whether all that an embedding gets is meant for a head that shares it as well: new token
    rows are, and updates of some formats.
    """
    updates = (adapters[here.piece.adapter].both_sides for here in embedding.updates)
    return not embedding.full and all(updates)


def _shared_of(
    target: Target | None, shape: tuple[int, ...], adapters: Sequence[Adapter], *, rows: bool
) -> list[Piece]:
    """What one side has for both as long as they are tied: the `rows` of an embedding, and the
    resized table that PEFT saved beside an update of either side.
    """
    if target is None:
        return []
    resized = (p for p in target.full if p.tensors[0].shape != shape)
    full = [p for p in resized if not adapters[p.adapter].saves(p.target)]
    return [*full, *(target.rows if rows else ())]


def _same(one: Target, other: Target, adapters: Sequence[Adapter]) -> bool:
    """Whether an embedding and its head get the very same: full tensor, token rows and updates.
    Rows of the embedding alone are those of both.
    """
    one = one if other.rows else replace(one, rows=[])
    pairs = list(zip(one.pieces, other.pieces, strict=False))
    if len(one.pieces) != len(other.pieces):
        return False
    return all(
        (a.action, a.adapter, a.spec.get("indices")) == (b.action, b.adapter, b.spec.get("indices"))
        and (_same_update if a.action == "update" else _same_tensor)(a, b, adapters[a.adapter])
        for a, b in pairs
    )


def _same_tensor(a: Piece, b: Piece, adapter: Adapter) -> bool:
    return same_bytes(adapter.source, a.tensors[0], adapter.source, b.tensors[0])


def _same_update(a: Piece, b: Piece, adapter: Adapter) -> bool:
    """Whether a head's factors are an embedding's transposed, as `ensure_weight_tying` has them."""
    if a.spec.get("magnitude") or b.spec.get("magnitude") or not (a.spec["a"] and b.spec["a"]):
        return False
    crossed = [(a.spec["a"], b.spec["b"]), (a.spec["b"], b.spec["a"])]
    same = all(_transposed(adapter.source, x, y) for x, y in crossed)
    return same and a.spec["scaling"] == b.spec["scaling"]


def _transposed(source: Source, one: str, other: str) -> bool:
    from lorakit.adapter.load import read_array

    x, y = read_array(source, one), read_array(source, other).T
    return x.shape == y.shape and bool((x == y).all())
