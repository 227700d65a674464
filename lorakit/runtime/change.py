"""One change of one parameter, with the tensors that it is made of: beside the layer on its output,
or in the weight.

Law: both ways are the same function of the input, up to rounding. A layer takes the first where it
is plain enough, since factors are cheaper to apply than to multiply out; the second is that of a
merge (`lorakit.math`) and does for any layer and any update.

Arithmetic is that of the dtype of the factors (float32 unless asked otherwise), rounded once to the
dtype of the layer's output, as in huggingface/peft v0.21.2, src/peft/tuners/lora/layer.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everywhere

from lorakit.adapter.factors import factored
from lorakit.math.lowrank import LowRank
from lorakit.math.updates import Added, Update
from lorakit.runtime.fitting import Fitted
from lorakit.runtime.offloaded import is_offloaded, value_of
from lorakit.runtime.quantised import QUANTISED, dequantised

# Where there is any of these, the factors are not one plain pair for the whole weight.
CUT = ("experts", "at", "rows", "columns", "blocks", "enabled", "diag")
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
POINTWISE = (F.conv1d, F.conv2d, F.conv3d)


class Unsaved(nn.Module):  # type: ignore[misc]
    """A module whose tensors are no part of the model's state dict."""

    def state_dict(self, *args: Any, destination: Any = None, **options: Any) -> Any:
        """What was there before."""
        return destination if destination is not None else {}

    def _load_from_state_dict(self, *args: Any) -> None:
        pass


class Change(Unsaved):
    """What an adapter does to a parameter of a layer.

    `gain(layer, x, plain)` of an update is what it adds to an output that was `plain`, but for
    `scale` and the user's weight; that of rows is what they make of the output. It is None where
    the layer has to be given another weight.
    """

    def __init__(self, fitted: Fitted, tensors: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for role, name in fitted.names.items():
            self.register_parameter(role, tensors[name])
        self.names = fitted.names
        self.spec = {**fitted.spec, **{role: role for role in fitted.names}}
        self.place, self.parameter, self.inside = fitted.tensor, fitted.parameter, fitted.inside
        self.action, self.leading = fitted.action, fitted.leading
        self.scaling: float = self.spec.get("scaling", 1.0)
        self.dropout = 0.0
        self.ratio: Tensor | None
        self.seen: tuple[int, ...] = ()  # which weight the ratio is of
        self.index: Any
        self.register_buffer("ratio", None, persistent=False)
        self.register_buffer("index", None, persistent=False)
        self.path = _path(fitted)
        self.scale = self.spec["weight"] * (1.0 if self.path is _decomposed else self.scaling)
        if self.action == "rows":
            self.index = _index(fitted).to(self.values.device)

    @property
    def values(self) -> Tensor:
        """The tensor of a change that is no update."""
        found: Tensor = self.tensor  # an AttributeError of others, which torch.jit.trace asks too
        return found

    def update(self, weight: float) -> Update:
        """The update of the weight as it lies, `weight` times."""
        spec = {**self.spec, "weight": self.spec["weight"] * weight}
        if spec["a"] is None:  # the bias of lora_B
            one = self.b.new_ones((1, 1))
            return Added(LowRank(one, self.b.reshape(-1, 1), spec["scaling"]), spec["weight"])
        return factored(spec, lambda _, role: self._parameters[role])

    @property
    def has_norms(self) -> bool:
        """Whether it depends on the norms of the weight."""
        return bool(self.spec.get("magnitude"))

    @property
    def key(self) -> tuple[Any, ...]:
        """What another change has in common with this that can take its place."""
        shapes = [(role, tuple(self._parameters[role].shape)) for role in self.names]
        facts = (str(self.spec.get("indices")), "taken" in self.spec, self.scaling == 0.0)
        return (self.place, self.action, *shapes, *facts)

    def become(self, other: "Change") -> None:
        """Take over the tensors of a change of the same key."""
        mine, others = (c.scaling * c.spec["weight"] for c in (self, other))
        ratio = 1.0 if others == mine else others / mine
        for role, values in other._parameters.items():
            self._parameters[role].copy_(values * ratio if role == "b" else values)

    def refresh(self, layer: nn.Module) -> None:
        """Compute again what is kept of a weight: the ratio of magnitude and norm of DoRA."""
        if self.path is _decomposed and not self.magnitude.requires_grad:
            with torch.no_grad():
                ratio, self.seen = _ratio(self, layer), _version(layer)
                self.ratio = ratio if self.ratio is None else self.ratio.copy_(ratio)


Changes = Sequence[tuple[Change, float]]  # each with how many times it is applied


def kind_of(layer: nn.Module) -> str:
    """What a layer computes: "linear", "embedding" or "conv"; "" if it is not known to be these."""
    forward, name = type(layer).forward, type(layer).__name__
    if name in (*QUANTISED, "Conv1D") or forward is nn.Linear.forward:
        return "linear"
    if isinstance(layer, nn.Embedding):
        plain = forward is nn.Embedding.forward or _scale(layer) is not None
        return "embedding" if plain else ""
    return "conv" if forward in [c.forward for c in CONVOLUTIONS] else ""


def _scale(layer: nn.Module) -> Any:
    """By what an embedding multiplies its own output, None where it does not."""
    return getattr(layer, "embed_scale", None)


Path = Callable[[Change, nn.Module, Tensor, Tensor], Tensor]


def changed(layer: nn.Module, x: Tensor, output: Tensor, changes: Changes) -> Tensor:
    """An output of a layer with changes in it, each so many times; rows come first."""
    plain, value, x = output, output, x.to(output.device)  # accelerate moves inputs further in
    for change, times in changes:
        assert change.path is not None
        found = change.path(change, layer, x, plain)
        if change.action == "rows":
            plain = value = found if times == 1.0 else plain + times * (found - plain)
        else:
            value = torch.add(value, found, alpha=change.scale * times)
    return value.to(output.dtype)


def _path(fitted: Fitted) -> Path | None:
    kind, spec = kind_of(fitted.owner), fitted.spec
    if fitted.inside or not kind:
        return None
    if fitted.action == "rows":
        return {"embedding": _rows_of_table, "linear": _rows_of_head}.get(kind)
    if fitted.action != "update" or any(spec.get(c) is not None for c in CUT):
        return None
    if spec["a"] is None:
        return _bias if kind != "embedding" and fitted.parameter == "bias" else None
    turned = kind == "embedding" or type(fitted.owner).__name__ == "Conv1D"
    if fitted.parameter != "weight" or bool(spec["transposed"]) != turned:
        return None
    return _decomposed if spec.get("magnitude") else _low_rank


def _delta(change: Change, layer: nn.Module, x: Tensor) -> Tensor:
    """`b @ a` applied to an input."""
    a, b = change.a, change.b
    if isinstance(layer, nn.Embedding):
        return _scaled(layer, F.embedding(x, a.T) @ b.T)
    x = x.to(a.dtype)
    if change.dropout and layer.training:
        x = F.dropout(x, change.dropout)
    if a.ndim == 2:
        return F.linear(F.linear(x, a), b)
    return POINTWISE[a.ndim - 3](layer._conv_forward(x, a, None), b)


def _low_rank(change: Change, layer: nn.Module, x: Tensor, plain: Tensor) -> Tensor:
    return _delta(change, layer, x)


def _decomposed(change: Change, layer: nn.Module, x: Tensor, plain: Tensor) -> Tensor:
    """DoRA: `ratio * (w + scaling * b @ a) - w` for `w`, the norm in the ratio held constant.

    Source: Liu et al. 2024 (DoRA, arXiv 2402.09353), section 4.3.
    """
    ratio = _by_unit(layer, _current(change, layer))
    bias = value_of(layer, "bias") if is_offloaded(layer, "bias") else getattr(layer, "bias", None)
    without = plain if bias is None else plain - _by_unit(layer, bias)
    return (ratio - 1) * without + ratio * change.scaling * _delta(change, layer, x)


def _current(change: Change, layer: nn.Module) -> Tensor:
    """The ratio of the weight as it is now; compiled, that of the one that was loaded last."""
    if change.ratio is None:
        return _ratio(change, layer)
    if not torch.compiler.is_compiling() and change.seen != _version(layer):
        change.refresh(layer)
    return change.ratio


def _version(layer: nn.Module) -> tuple[int, ...]:
    """What is another number after a weight was changed in place."""
    weight = layer._parameters["weight"]
    return () if weight.is_inference() or weight.is_meta else (id(weight), weight._version)


def _ratio(change: Change, layer: nn.Module) -> Tensor:
    """Magnitude over norm, by output unit."""
    update: Any = change.update(1.0)
    with torch.no_grad(), torch.autocast(change.b.device.type, enabled=False):
        w = dequantised(layer).to(change.b.dtype)
        w = w.reshape(len(w), -1)
        directed = w + Added(update.low).change(w, 0, len(w))
        norm = torch.linalg.vector_norm(directed, dim=1 - update.axis, dtype=torch.float64)
    return update.magnitude / norm.to(update.magnitude.dtype)


def _bias(change: Change, layer: nn.Module, x: Tensor, plain: Tensor) -> Tensor:
    return _by_unit(layer, change.b)


def _rows_of_table(change: Change, layer: nn.Module, x: Tensor, plain: Tensor) -> Tensor:
    """New rows of an embedding in the place of what it found."""
    at = change.index[x]
    new = _scaled(layer, change.values[at.clamp(min=0)])
    return torch.where((at >= 0).unsqueeze(-1), new.to(plain.dtype), plain)


def _rows_of_head(change: Change, layer: nn.Module, x: Tensor, plain: Tensor) -> Tensor:
    """What new rows of a linear layer give, in the place of what the old ones gave."""
    rows, bias = change.values, getattr(layer, "bias", None)
    new = F.linear(x.to(rows.dtype), rows, None if bias is None else bias[change.index])
    return plain.index_copy(-1, change.index, new.to(plain.dtype))


def _index(fitted: Fitted) -> Tensor:
    """Of an embedding: for each of its rows the number of the new one, or -1; else which rows."""
    rows = torch.tensor(fitted.spec["indices"], device="cpu")
    if kind_of(fitted.owner) != "embedding":
        return rows
    none = torch.full((fitted.owner.num_embeddings,), -1, device="cpu")
    return none.index_copy(0, rows, torch.arange(len(rows), device="cpu"))


def _scaled(layer: nn.Module, found: Tensor) -> Tensor:
    """What an embedding makes of the rows that it found."""
    scale = _scale(layer)
    if scale is None:
        return found
    return found * (scale.to(found.dtype) if isinstance(scale, Tensor) else scale)


def _by_unit(layer: nn.Module, units: Tensor) -> Tensor:
    """One number for each output unit, shaped to meet an output of the layer."""
    if not isinstance(layer, CONVOLUTIONS):
        return units
    return units.reshape(-1, *[1] * (layer.weight.ndim - 2))
