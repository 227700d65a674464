"""A merge into a quantised base whose changed weights are quantised again, as they were.

Law: the result has the base's tensors, by name, dtype and shape, and so its headers, its size and
its config; what belongs to weights that do not change has the base's bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.engine.layout import Output
from lorakit.errors import InputError
from lorakit.quant.stored.tensor import StoredTensor
from lorakit.quant.stored.weight import Turned, Written
from lorakit.store.checkpoint import Checkpoint, Part
from lorakit.store.safetensors import SafetensorsFile
from lorakit.tensors import TensorInfo
from lorakit.verbs.base.deciding import Decided, decided
from lorakit.verbs.base.sources import adapter_number, base_key
from lorakit.verbs.base.targets import Options
from lorakit.verbs.base.unpacked import Weights, unpacked
from lorakit.verbs.merge.quantised import NOT_QUANTISED, weights_of

SURVEYED = 40  # bytes for each scale, of what it follows from
HINT = "Merge with --quant keep-touched or dequantize."

Files = Mapping[str, list[Output]]


def requantised(
    base: Checkpoint, adapters: Sequence[Adapter], options: Options, dtype: str
) -> tuple[Checkpoint, Decided, Files, list[str]]:
    """The base as such a merge reads it, what becomes of each weight, of each tensor by its file,
    and a line on it.

    Raises:
        InputError: it is quantised in a way that is not known, or a weight cannot be written again.
        MisfitError: an adapter does not fit it.
    """
    weights = weights_of(base, "keep")
    found = decided(unpacked(base, weights), adapters, options, dtype)
    if not weights:
        return base, found, found.outputs, [NOT_QUANTISED]
    if found.layers.ranges:
        raise InputError("copies of layers (layer_replication) stay plain.", hint=HINT)
    new = {n: o for outs in found.outputs.values() for o in outs if (n := _changed(o, weights))}
    read: Any = {n: weights[n] for n in new}
    changed = {n: replace(w, info=w.info.but(dtype="F32")) for n, w in read.items()}
    remade = _Remade(base, changed, new, {t for w in weights.values() for t in w.tensors})
    files = {p.name: list(remade.file(p, found.outputs[p.name], weights)) for p in base.parts}
    said = f"{len(new)} of {len(weights)} quantised weights are quantised again, as they were."
    return unpacked(base, changed, all_of_it=False), found, files, [said]


def _changed(out: Output, weights: Weights) -> str:
    """The name of a quantised weight that changes, "" of any other tensor.

    Raises:
        InputError: it is replaced, or a tensor that is not in the base is made of it.
    """
    name = out.tensor.name
    of_adapter = adapter_number(out.source) is not None
    if not of_adapter and name not in weights and out.origin.name in weights:
        raise InputError(f"{name!r} is made of a quantised weight.", hint=HINT, tensor=name)
    if name in weights and of_adapter:
        raise InputError(f"{name!r} is replaced as a whole.", hint=HINT, tensor=name)
    return name if name in weights and out.recipe else ""


@dataclass(frozen=True)
class _Remade:
    """What becomes of the tensors on disk: `changed` weights, and their folds, by their names;
    `hidden` are the tensors of all that are quantised.
    """

    base: Checkpoint
    changed: Weights
    folds: Mapping[str, Output]
    hidden: set[str]

    def file(self, part: Part, outs: Sequence[Output], weights: Weights) -> Iterator[Output]:
        """Those of a file, in its order, then what is new."""
        plain = {o.tensor.name: o for o in outs}
        owners = {t: n for n, w in self.changed.items() for t in w.remade}
        disk = part.on_disk if isinstance(part, SafetensorsFile) else part.infos
        for name, info in disk.items():
            if name in owners:
                yield self._remade(owners[name], info)
            elif name in self.hidden or name not in plain:
                yield Output(info, base_key(part), info)
            else:
                yield plain[name]
        yield from (o for n, o in plain.items() if n not in disk and n not in weights)

    def _remade(self, name: str, info: TensorInfo) -> Output:
        """One tensor of a weight that changes."""
        weight, fold = self.changed[name], self.folds[name]
        grid = StoredTensor(weight, self.base, info.name, fold.leading)
        rows = weight.info.matrix(fold.leading)[0]
        recipe = dict(fold.recipe)
        recipe["nbytes"] = recipe.get("nbytes", 0) + self._memory(weight)
        return Output(
            info,
            base_key(self.base.home(weight.tensors[0])),
            weight.info,
            recipe,
            whole=fold.whole or grid.coupled,
            leading=fold.leading,
            unit=grid.unit,
            span=grid.span if grid.codes else grid.span or rows,
        )

    def _memory(self, weight: Written) -> int:
        """Bytes that reading and writing a weight takes beside its blocks."""
        infos = [self.base.infos[t] for t in weight.tensors]
        scales = sum(self.base.infos[t].numel for t in weight.remade[1:])
        kept = sum(i.nbytes for i in infos) * weight.span // max(1, weight.info.numel)
        kept *= weight.info.shape[-1]  # of as many rows as lie together
        turned = 4 * weight.info.numel if isinstance(weight, Turned) else 0
        return SURVEYED * scales + kept + turned
