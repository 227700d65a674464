"""How an update lands in one tensor on disk: which experts, rows and orientation, as plain data.

The factors are cut, stacked or turned, never the weight. Shapes decide wherever they can; where a
stacked weight is square, the release of PEFT that saved the adapter does, or the user.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.pieces import Piece, fits, inner_of, square_transposed, transposed
from lorakit.errors import MisfitError
from lorakit.naming.places import Place
from lorakit.tensors import TensorInfo

# Models whose stacked experts are (in, out) on disk; or either, by who wrote the checkpoint.
TURNED_ON_DISK = {"gpt_oss", "openai_privacy_filter", "aria", "aria_text", "llama4", "llama4_text"}
EITHER_ON_DISK = {"qwen3_vl_moe", "qwen3_vl_moe_text"}
# Models whose stacked experts are (in, out), and say so to PEFT (`is_transposed`).
FLAGGED = {"gpt_oss", "openai_privacy_filter", "aria", "aria_text"}
SPANS_ROWS_UNTIL = (0, 18, 999)  # of PEFT: A of a stacked parameter spans its second dimension
INVERTED = (0, 19, 0)  # the one release that took the flag the wrong way round


@dataclass(frozen=True)
class Context:
    """What decides where shapes do not: the base's model type, the adapter and the user's word."""

    model_type: str
    adapter: Adapter
    packing: str = "peft"
    orientation: str = "auto"


def landing(
    piece: Piece, place: Place, info: TensorInfo, height: int, context: Context
) -> dict[str, Any] | None:
    """The plain data of an update in the tensor `info`, None if it does not fit there.

    `height` is the number of output rows of the whole weight, where places are cut from it.

    Raises:
        MisfitError: nothing says which way round a square stacked weight is.
    """
    if piece.spec.get("inputs") and (place.rows or place.slot is not None):
        _refuse_norms(piece, place)
    if "experts" in piece.spec:
        return _of_experts(piece, place, info, height, context)
    if "act" in piece.spec:  # on a tensor of its own only
        return piece.spec if place == Place(place.tensor) and fits(piece, info.shape) else None
    if place.slot is not None:
        return _in_slot(piece, place, info, context)
    if place.rows is not None:
        return _cut(piece, place, info, height)
    if piece.action == "update" and place.at is not None:
        return _in_rows(piece, place.at, info)
    if _in_blocks(piece, context) or not fits(piece, info.shape):
        return _blocks(piece, info)
    if piece.source is None:
        return None if place.turned else piece.spec
    flag = context.adapter.config.fan_in_fan_out
    square = place.turned or square_transposed(piece.module, context.model_type, flag)
    turned = transposed(piece.source, info.shape, square=square, enabled=piece.spec["enabled"])
    return {**piece.spec, "transposed": bool(turned)}


def _refuse_norms(piece: Piece, place: Place) -> None:
    raise MisfitError(
        f"{piece.target!r} has DoRA norms of its inputs, which run over all of its rows, and the "
        f"base has not all of them, or in another order, in {place.tensor!r}.",
        hint="Merge it into the base as it was trained on, in one file or in Diffusers' folder.",
        tensor=piece.tensors[0].name,
    )


def height_of(places: Sequence[Place], infos: Sequence[TensorInfo]) -> int:
    """The output rows of the weight that lies at these places."""
    ends = [p.rows[1] for p in places if p.rows]
    return max(ends) if ends else infos[0].shape[-2] if len(infos[0].shape) > 1 else infos[0].rows


def _of_experts(
    piece: Piece, place: Place, info: TensorInfo, height: int, context: Context
) -> dict[str, Any] | None:
    """An update of stacked experts: of all in one tensor, or of one expert in a tensor of its own.

    A bare parameter of two dimensions is a plain matrix with one "expert".
    """
    count = piece.spec["experts"]
    stacked = len(info.shape) == 3
    if stacked and place.rows:
        return None  # parts that are stacked one by one: no family has them for adapters
    if len(info.shape) not in (2, 3) or (stacked and info.shape[0] != count):
        return None
    if not stacked and place.expert is None and count != 1:
        return None
    (out, down), (across, wide) = _matrix(piece), info.shape[-2:]
    if place.expert is not None:
        across = height
    straight, turned = (out, down) == (across, wide), (down, out) == (across, wide)
    if not (straight or turned):
        return None
    if straight and turned:
        straight = not _square_turned(piece, info, context, plain=count == 1 and not stacked)
    spec = {**piece.spec, "packing": context.packing, "turned": not straight}
    if place.expert is None:
        return {**spec, "height": across, "stacked": stacked}
    return {**spec, "expert": place.expert, "rows": list(place.rows) if place.rows else None}


def _matrix(piece: Piece) -> tuple[int, int]:
    """The output and input rows of one expert's update."""
    assert piece.source is not None
    return piece.source.out, piece.source.span[0]


def _square_turned(piece: Piece, info: TensorInfo, context: Context, *, plain: bool) -> bool:
    """Whether A spans the first dimension of a square expert, by what trained the adapter."""
    if plain:
        return False
    if context.orientation != "auto":
        return context.orientation == "in-out"
    ways = spans_rows(context.adapter.config.version)
    if ways and (context.model_type or len(set(ways)) == 1):
        return ways[context.model_type in FLAGGED]
    silent = "base does not say of which type of model it is (config.json)"
    if ways is None:
        silent = "adapter does not say with which PEFT it was trained"
    raise MisfitError(
        f"the experts of {piece.target!r} are square, and the {silent}, so it is open which way "
        "round they are.",
        hint="Pass --expert-orientation in-out (PEFT before 0.19; gpt-oss with any) or out-in.",
        file=context.adapter.path,
        tensor=piece.tensors[0].name,
    )


def spans_rows(version: tuple[int, ...]) -> tuple[bool, bool] | None:
    """Whether A of a stack spans the first dimension of an expert, as this release of PEFT has it:
    in models that are not FLAGGED, and in those that are; None of an unknown release.
    """
    if version == (0,):
        return None
    if version[:3] == INVERTED:
        return True, False
    return version <= SPANS_ROWS_UNTIL, True


def _in_slot(
    piece: Piece, place: Place, info: TensorInfo, context: Context
) -> dict[str, Any] | None:
    """One expert's own update in the tensor of all experts, of which it fills all or half."""
    if len(info.shape) != 3 or piece.source is None or piece.action != "update":
        return None
    (out, down), (_, across, wide) = _matrix(piece), info.shape
    first, begin = (place.slot or 0) * across, place.at or 0
    height = out if place.at is None else 2 * out
    straight, turned = (height, down) == (across, wide), (down, height) == (across, wide)
    if straight and turned:
        turned = _turned_on_disk(piece, context)
    if turned and not piece.spec["magnitude"] and not piece.spec.get("kron"):
        spec = {**piece.spec, "transposed": True, "columns": [begin, wide]}
        return {**spec, "at": first, "height": across}
    if straight:
        return {**piece.spec, "transposed": False, "at": first + begin, "height": out}
    return None


def _turned_on_disk(piece: Piece, context: Context) -> bool:
    """Whether the stacked experts of a family, where square, are (in, out) on disk.

    Raises:
        MisfitError: its checkpoints are of both kinds.
    """
    if context.model_type in EITHER_ON_DISK:
        raise MisfitError(
            f"{piece.target!r} is one expert of a square stack, and checkpoints of "
            f"{context.model_type} have these either way round.",
            hint="Convert the adapter to fused experts where it was trained.",
            file=context.adapter.path,
            tensor=piece.tensors[0].name,
        )
    return context.model_type in TURNED_ON_DISK


def _cut(piece: Piece, place: Place, info: TensorInfo, height: int) -> dict[str, Any] | None:
    """Some output rows of the update of a fused projection, in a tensor of their own."""
    assert place.rows is not None
    start, stop = place.rows
    out, inner = _extent(piece, info)
    if place.at is not None and piece.action == "update":
        if info.shape[1:] != inner or out != height or place.at + stop - start > info.rows:
            return None
        spec = {**piece.spec, "transposed": False, "rows": [start, stop]}
        return {**spec, "at": place.at, "height": stop - start}
    if piece.action != "update" or info.shape != (stop - start, *inner) or out != height:
        return None
    return {**piece.spec, "transposed": False, "rows": [start, stop]}


def _in_rows(piece: Piece, at: int, info: TensorInfo) -> dict[str, Any] | None:
    """An update of some output rows of a fused projection."""
    out, inner = _extent(piece, info)
    if info.shape[1:] != inner or at + out > info.rows or piece.spec.get("enabled"):
        return None
    return {**piece.spec, "transposed": False, "at": at, "height": out}


def _extent(piece: Piece, info: TensorInfo) -> tuple[int, tuple[int, ...]]:
    """The output rows of an update, and the shape of each in a tensor; a bias has scalars."""
    if piece.source is None:
        return piece.tensors[0].shape[0], piece.tensors[0].shape[1:]
    return piece.source.out, inner_of(piece.source, info.shape)


def _in_blocks(piece: Piece, context: Context) -> bool:
    """Whether the ranks of the factors differ, because B is stored as its blocks."""
    if piece.source is None or piece.action != "update":
        return False
    a, b = piece.tensors[:2]
    return bool(context.adapter.config.raw.get("use_bdlora")) and a.shape[0] != b.shape[1]


def _blocks(piece: Piece, info: TensorInfo) -> dict[str, Any] | None:
    """Factors of BD-LoRA, one of them stored as its blocks."""
    if piece.source is None or piece.action != "update" or len(info.shape) != 2:
        return None
    from lorakit.math.blocks import blocks_of

    a, b = piece.tensors[:2]
    if len(a.shape) != 2 or len(b.shape) != 2:
        return None
    try:
        found = blocks_of(a.shape, b.shape, info.shape)
    except MisfitError:
        return None
    return {**piece.spec, "transposed": False, "blocks": list(found)}
