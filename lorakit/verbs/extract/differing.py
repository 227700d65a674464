"""Two checkpoints of one model, tensor by tensor: whether they are of one model at all, and what
differs beside the weights that may get factors.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from lorakit.adapter.load import LazyRows
from lorakit.errors import InputError, MisfitError
from lorakit.formats.patterns import search
from lorakit.math.rows import row_slices
from lorakit.naming.embeddings import is_bare, is_head
from lorakit.store.checkpoint import Checkpoint
from lorakit.store.equal import same_bytes
from lorakit.tensors import TensorInfo
from lorakit.verbs.base.targets import check_foldable
from lorakit.verbs.base.tying import tie_of
from lorakit.verbs.base.weights import Weight

# What a model computes when it is built; older files hold some of it.
BUFFERS = ("inv_freq", "original_inv_freq", "position_ids", "masked_bias")


def tensors_in(model: Checkpoint) -> dict[str, TensorInfo]:
    """All tensors of a model by name; an output head that is tied has those of its embedding."""
    tie = tie_of(model.infos, model.config, ())
    bare = is_bare(model.config.get("architectures") or ())
    tied = {tie.head: model.infos[tie.embedding]} if tie.head and not bare else {}
    return {**model.infos, **{n: i for n, i in tied.items() if n not in model.infos}}


def alone(here: Checkpoint, there: Checkpoint) -> list[str]:
    """The tensors on disk that the other model has not, but for buffers."""
    known = tensors_in(there)
    return [n for n, i in here.infos.items() if n not in known and not _is_buffer(i)]


def _is_buffer(info: TensorInfo) -> bool:
    leaf = info.name.rpartition(".")[2]
    return leaf in BUFFERS or (leaf == "bias" and len(info.shape) == 4)  # GPT-2's masks


def check_patterns(base: Checkpoint, tuned: Checkpoint, *patterns: str) -> None:
    """Refuse a pattern that is found in the name of no module.

    Raises:
        MisfitError: naming the first.
    """
    modules = {n.rpartition(".")[0] for model in (base, tuned) for n in tensors_in(model)}
    for pattern in filter(None, patterns):
        if not any(search(pattern, module) for module in modules):
            raise MisfitError(
                f"no module is meant by {pattern!r}.",
                hint="`lorakit inspect BASE -v` names all.",
                file=base.located.path,
            )


def check_alike(base: Checkpoint, tuned: Checkpoint, weights: Sequence[Weight], other: str) -> None:
    """Refuse two checkpoints that are not of one model; `other` is what becomes of the rest.

    Raises:
        MisfitError: a tensor is in only one of them and nothing says what becomes of it, or a
            weight has another shape.
        InputError: a weight is quantised.
    """
    gone, new = alone(base, tuned), alone(tuned, base)
    if any(n in tuned.infos for n in base.infos):
        gone = [] if other == "drop" else [n for n in gone if not (other and is_head(n))]
        new = [] if other else new
    for names, model, which in ((gone, base, "base"), (new, tuned, "tuned model")):
        if names:
            raise MisfitError(
                f"{len(names)} tensors of the {which} are not in the other; the first is "
                f"{names[0]!r}.",
                hint="Are both of one model, and in the same names? If they are, --other drop "
                "leaves them out" + (", --other save carries them." if names is new else "."),
                file=model.located.path,
                tensor=names[0],
            )
    for weight in (w for w in weights if w.tensor in tuned.infos):
        first, second = base.infos[weight.tensor], tuned.infos[weight.tensor]
        check_foldable(first, base.infos)
        check_foldable(second, tuned.infos)
        if first.shape != second.shape:
            raise MisfitError(
                f"{weight.tensor!r} is {list(first.shape)} in the base, {list(second.shape)} in "
                "the tuned model.",
                hint="They are of different models: compare both with `lorakit inspect`.",
                file=tuned.located.path,
                tensor=weight.tensor,
            )


def changed(base: Checkpoint, tuned: Checkpoint, names: Sequence[str]) -> list[str]:
    """Those of the tensors whose numbers, or shapes, differ."""
    before, after = tensors_in(base), tensors_in(tuned)
    return [n for n in names if _differs(base, tuned, before[n], after[n])]


def _differs(base: Checkpoint, tuned: Checkpoint, one: TensorInfo, other: TensorInfo) -> bool:
    if (one.dtype, one.shape) == (other.dtype, other.shape):
        return not same_bytes(base, one, tuned, other)
    if one.shape != other.shape:
        return True
    left = LazyRows(base, one.name, "float64")
    right = LazyRows(tuned, other.name, "float64")
    slices = row_slices(one.rows, one.cols)
    return any(not np.array_equal(left[rows], right[rows]) for rows in slices)


def check_finite(info: TensorInfo, largest: float, where: Mapping[str, object]) -> None:
    """Refuse a weight whose difference is no number.

    Raises:
        InputError: naming the tensor.
    """
    if not np.isfinite(largest):
        raise InputError(
            f"{info.name!r} holds NaN or Inf in one of both models.",
            hint="Fetch the file again, or use an earlier save.",
            file=where["tuned"],
            tensor=info.name,
        )
