"""A quantised base seen as the plain weights that its codes stand for: all of them, or only those
that a merge changes.

Law: a weight that is seen so has the values of its codes, computed in float32 and rounded once to
the dtype in which it is written; every other tensor is as it is on disk.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.pieces import square_transposed
from lorakit.configs import model_type
from lorakit.engine.layout import Output
from lorakit.errors import InputError
from lorakit.folder.facts import fact
from lorakit.math.cast import narrow, storage
from lorakit.naming.quantised import MARKS
from lorakit.quant.stored.table import stored_weights
from lorakit.quant.stored.weight import Stored, turned
from lorakit.store.checkpoint import Checkpoint, Part
from lorakit.store.safetensors import SafetensorsFile
from lorakit.tensors import CODES, NAMES, Source, TensorInfo
from lorakit.verbs.base.deciding import decided
from lorakit.verbs.base.planning import Result
from lorakit.verbs.base.skipping import CONFIG, plain_facts, quantised_module
from lorakit.verbs.base.sources import adapter_number
from lorakit.verbs.base.targets import Options

# Methods that take the Conv1D layers of transformers for linear ones, which lie otherwise.
TURNING = ("bitsandbytes", "gptq")
# Modules that servers join, so that all of a row are quantised or none; of experts, all of a layer.
JOINED = (
    *(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3")),
    *(("q_a_proj", "kv_a_proj_with_mqa"), ("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a")),
)

Weights = Mapping[str, Stored]


def plain_base(
    base: Checkpoint, adapters: Sequence[Adapter], options: Options, form: Result
) -> tuple[Checkpoint, Mapping[str, Any], list[str]]:
    """The base as a merge of these adapters reads it: with `form.quant` "dequantize" all of its
    weights as their values, with "keep-touched" those that change. With it the facts of its config
    that are no longer true, and a line on it.

    Raises:
        InputError: it is quantised in a way that is not known.
        MisfitError: an adapter does not fit it.
    """
    weights = weights_of(base, form.dtype)
    if not weights:
        return base, {}, ["the base is not quantised, so --quant changes nothing."]
    found = unpacked(base, weights)
    infos, plain = found.infos, weights
    if form.quant == "keep-touched":
        outputs = decided(found, adapters, options, form.dtype).outputs
        plain = touched(weights, (o for outs in outputs.values() for o in outs))
        found = unpacked(base, plain, all_of_it=len(plain) == len(weights))
    if not plain:
        return base, {}, ["no quantised weight changes."]
    facts = plain_facts(base.config, infos, weights, plain)
    dtypes = " and ".join(sorted({NAMES[w.info.dtype] for w in plain.values()}))
    said = f"{len(plain)} of {len(weights)} quantised weights are written in {dtypes}."
    return found, facts, [said]


class Unpacked(SafetensorsFile):
    """A weight file in which `weights` are seen as their values; `source` has their tensors, which
    may lie in other files too. `hidden` are tensors that are not seen.
    """

    def __init__(
        self, file: SafetensorsFile, weights: Weights, hidden: Collection[str], source: Source
    ) -> None:
        super().__init__(file.path)
        self._weights, self._source = weights, source
        self._seen = dict(_seen(self.on_disk, weights, hidden))

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What every tensor is, a weight in the place of its codes."""
        return self._seen

    def read_rows(self, name: str, start: int, stop: int, into: Any, *, leading: int = 1) -> None:
        """Fill `into` with rows of a tensor; those of a weight are computed."""
        weight = self._weights.get(name)
        if weight is None:
            return super().read_rows(name, start, stop, into, leading=leading)
        info = self.infos[name]
        rows = np.frombuffer(into, storage(info.dtype)).reshape(-1, info.shape[-1])
        step = info.but(shape=info.shape[:-1]).matrix(leading)[1]
        found = rows if info.dtype == "F32" else np.empty(rows.shape, np.float32)
        weight.values(self._source, start * step, stop * step, found)
        if found is not rows:
            narrow(found, rows)
        return None


def _seen(
    disk: Mapping[str, TensorInfo], weights: Weights, hidden: Collection[str]
) -> Iterator[tuple[str, TensorInfo]]:
    codes = {w.tensors[0]: w.info for w in weights.values()}
    for name, info in disk.items():
        if name in codes:
            yield codes[name].name, codes[name]
        elif name not in hidden:
            yield name, info


def weights_of(base: Checkpoint, dtype: str) -> dict[str, Stored]:
    """The quantised weights of a base by their names, to be seen in `dtype`, a key of CODES, or for
    "keep" in that of the model.

    Raises:
        InputError: the config says that it is quantised, in a way that is not known; or what is
            there contradicts itself.
    """
    said = fact(base.config, CONFIG, default=None) or {}
    model = CODES.get(str(fact(base.config, "dtype") or fact(base.config, "torch_dtype")), "BF16")
    found: dict[str, Stored] = {}
    weight: Any
    for weight in stored_weights(base, said):
        if said.get("quant_method") in TURNING and is_turned(base, weight.info.name):
            weight = turned(weight)
        code = (weight.info.dtype or model) if dtype == "keep" else CODES[dtype]
        found[weight.info.name] = replace(weight, info=weight.info.but(dtype=code))
    if said and not found:
        raise InputError(
            f"is quantised in a way that is not known ({said.get('quant_method')}).",
            hint="Take the 16-bit base.",
            file=base.located.path,
        )
    return found


def is_turned(base: Checkpoint, name: str) -> bool:
    """Whether a weight is that of a Conv1D of transformers, which is (in, out)."""
    module = name.removesuffix(".weight")
    return square_transposed(module, model_type(base.config), fan_in_fan_out=False)


def unpacked(base: Checkpoint, weights: Weights, *, all_of_it: bool = True) -> Checkpoint:
    """The base with these weights of it seen as their values; `all_of_it` if it has no others.

    Raises:
        InputError: a weight file is no safetensors file.
    """
    hidden = {t for w in weights.values() for t in w.tensors} | (MARKS if all_of_it else set())
    return base.with_parts([_part(part, weights, hidden, base) for part in base.parts])


def _part(part: Part, weights: Weights, hidden: Collection[str], base: Checkpoint) -> Part:
    if not part.infos.keys() & hidden:
        return part
    if not isinstance(part, SafetensorsFile):
        raise InputError(
            "a quantised base is read from safetensors alone.",
            hint="Save it as safetensors, or take the 16-bit base.",
            file=base.located.path,
        )
    own = {n: w for n, w in weights.items() if w.tensors[0] in part.infos}
    return Unpacked(part, own, hidden, base)


def touched(weights: Weights, outputs: Iterable[Output]) -> dict[str, Stored]:
    """Of the quantised weights, those that a merge changes, and whatever servers join with them."""
    new = (o.tensor.name for o in outputs if o.recipe or adapter_number(o.source) is not None)
    changed = {_joined(n) for n in new if n in weights}
    return {n: w for n, w in weights.items() if _joined(n) in changed}


def _joined(name: str) -> tuple[str, tuple[str, ...]]:
    """What all weights that are joined with this one have in common."""
    parent, _, leaf = quantised_module(name).rpartition(".")
    return parent, next((group for group in JOINED if leaf in group), (leaf,))
