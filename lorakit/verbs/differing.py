"""Two checkpoints of one model, weight by weight: which of their weights LoRA can tell apart, and
what else differs.

Law: every tensor is a weight that may get factors, or is compared number by number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lorakit.adapter.load import LazyRows
from lorakit.adapter.pieces import CONV1D_LEAVES, CONV1D_MODELS, known_by_looks
from lorakit.adapter.weights import Form
from lorakit.errors import InputError, MisfitError
from lorakit.formats.patterns import search
from lorakit.naming.linear import linear_layers
from lorakit.store.checkpoint import Checkpoint
from lorakit.store.equal import same_bytes
from lorakit.tensors import TensorInfo
from lorakit.verbs.landing import FLAGGED
from lorakit.verbs.targets import check_foldable

CHUNK = 1 << 22  # elements compared at a time


@dataclass(frozen=True)
class Weight:
    """A weight that may get factors; `turned` says that it lies (in, out) on disk."""

    form: Form
    tensor: str
    turned: bool = False
    bias: str = ""  # the tensor of the layer's bias, if it has one


def weights_in(base: Checkpoint, targets: str = "", exclude: str = "") -> list[Weight]:
    """The weights of linear layers, convolutions and stacked experts, by the names on disk.

    `targets` and `exclude` are patterns that a module's name is held against.
    """
    infos, config = base.infos, base.config
    model = str(config.get("model_type") or "") or known_by_looks(infos)
    linear = set(linear_layers(infos, config))
    found = []
    for name, info in infos.items():
        module, _, parameter = name.rpartition(".")
        if (targets and not search(targets, module)) or (exclude and search(exclude, module)):
            continue
        bias = f"{module}.bias" if f"{module}.bias" in infos else ""
        if module in linear and parameter == "weight":
            turned = model in CONV1D_MODELS and module.rpartition(".")[2] in CONV1D_LEAVES
            out, inner = reversed(info.shape) if turned else info.shape
            found.append(Weight(Form(module, parameter, (inner,), out), name, turned, bias))
        elif parameter == "weight" and len(info.shape) in (3, 4, 5) and _is_kernel(module):
            form = Form(module, parameter, tuple(info.shape[1:]), info.shape[0])
            found.append(Weight(form, name, False, bias))
        elif len(info.shape) == 3 and not name.endswith(".bias") and "experts" in module:
            found.append(_stack(module, parameter, info, turned=model in FLAGGED))
    return found


def _is_kernel(module: str) -> bool:
    """Whether a tensor of three dimensions or more is a kernel and not a stack of experts."""
    return "experts" not in module


def _stack(module: str, parameter: str, info: TensorInfo, *, turned: bool) -> Weight:
    count, rows, cols = info.shape
    out, inner = (cols, rows) if turned else (rows, cols)
    form = Form(module, parameter, (inner,), out, layer=False, experts=count)
    return Weight(form, info.name, turned)


def check_alike(base: Checkpoint, tuned: Checkpoint, weights: Sequence[Weight]) -> None:
    """Refuse two checkpoints that are not of one model.

    Raises:
        MisfitError: a tensor is in only one of them, or a weight has another shape.
        InputError: a weight is quantised.
    """
    for here, there, which in ((base, tuned, "base"), (tuned, base, "tuned model")):
        if alone := [n for n in here.infos if n not in there.infos]:
            raise MisfitError(
                f"{len(alone)} tensors of the {which} are not in the other; the first is "
                f"{alone[0]!r}.",
                hint="Are both of one model, and in the same names?",
                file=here.located.path,
                tensor=alone[0],
            )
    for weight in weights:
        one, other = base.infos[weight.tensor], tuned.infos[weight.tensor]
        check_foldable(one, base.infos)
        check_foldable(other, tuned.infos)
        if one.shape != other.shape:
            raise MisfitError(
                f"{weight.tensor!r} is {list(one.shape)} in the base, {list(other.shape)} in the "
                "tuned model.",
                hint="They are of different models: compare both with `lorakit inspect`.",
                file=tuned.located.path,
                tensor=weight.tensor,
            )


def changed(base: Checkpoint, tuned: Checkpoint, names: Sequence[str]) -> list[str]:
    """Those of the tensors whose numbers, or shapes, differ."""
    return [n for n in names if _differs(base, tuned, base.infos[n], tuned.infos[n])]


def _differs(base: Checkpoint, tuned: Checkpoint, one: TensorInfo, other: TensorInfo) -> bool:
    if (one.dtype, one.shape) == (other.dtype, other.shape):
        return not same_bytes(base, one, tuned, other)
    if one.shape != other.shape:
        return True
    left, right = (LazyRows(c, one.name, "float64") for c in (base, tuned))
    step = max(1, CHUNK // max(one.cols, 1))
    return any(
        not np.array_equal(left[i : i + step], right[i : i + step])
        for i in range(0, one.rows, step)
    )


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


def task_type(config: Mapping[str, Any]) -> str | None:
    """What PEFT calls the task of a model; of one for classes it would want the head as well."""
    named = [str(a) for a in config.get("architectures") or ()]
    return "CAUSAL_LM" if any(a.endswith("ForCausalLM") for a in named) else None
