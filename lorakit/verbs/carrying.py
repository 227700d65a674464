"""What an extraction carries whole, beside the factors that it makes.

Law: no tensor is carried whole and gets factors as well. What is carried lies where PEFT finds it:
in a module that is saved and has no factors inside, or as a bias that replaces the base's.

Source: huggingface/peft v0.21.2, src/peft/utils/other.py (ModulesToSaveWrapper) and
src/peft/utils/save_and_load.py.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lorakit.adapter.load import read_stored
from lorakit.adapter.saving import full_key
from lorakit.errors import MisfitError
from lorakit.store.checkpoint import Checkpoint
from lorakit.tensors import TensorInfo
from lorakit.verbs.differing import Weight, changed, check_finite, tensors_in
from lorakit.verbs.making import Array, Taken
from lorakit.verbs.tying import tie_of


@dataclass(frozen=True)
class Carried:
    """Tensors that are carried whole, by their names in the result; the modules that are saved; and
    the biases that replace the base's, by their names in the model.
    """

    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    modules: Sequence[str] = ()
    biases: Collection[str] = ()

    def holds(self, module: str) -> bool:
        """Whether a module is in one that is saved."""
        return any(_within(module, m) for m in self.modules)

    def wraps(self, module: str) -> bool:
        """Whether a bias of a module is named after the factors that the module has."""
        return any(_parent(b) == module for b in self.biases)

    def taken(self, tuned: Checkpoint) -> list[Taken]:
        """The tensors, to be read from the tuned model."""
        return [_taken(tuned, key, info) for key, info in self.tensors.items()]


def carried(
    base: Checkpoint,
    tuned: Checkpoint,
    rest: Sequence[str],
    beside: Collection[str],
    weights: Sequence[Weight],
) -> Carried:
    """What becomes of the tensors that differ and get no factors; `beside` are biases of layers.

    PEFT loads no bias beside the factors (lora_bias) where stacks of experts have some as well.

    Raises:
        MisfitError: a tensor lies in a module with factors inside, or is the table of a tied head.
    """
    _check_tie(tuned, rest)
    biases = [n for n in rest if _is_bias(n) and n in base.infos and _inside(_parent(n), weights)]
    there = tensors_in(tuned)
    modules = _saved({_parent(n) for n in rest if n not in biases}, there)
    for module in modules:
        _check_free(base, tuned, module, weights)
    if biases or any(not w.form.layer for w in weights):
        biases += beside
    biases = [n for n in biases if not any(_within(n, m) for m in modules)]
    left = [w for w in weights if not any(_within(w.form.module, m) for m in modules)]
    inside = [n for n in there if any(_within(n, m) for m in modules)]
    return Carried(
        {full_key(n, wrapped=False): there[n] for n in inside}
        | {full_key(_wrapped(n, left), wrapped=False): there[n] for n in biases},
        modules,
        biases,
    )


def _check_tie(tuned: Checkpoint, rest: Sequence[str]) -> None:
    tie = tie_of(tuned.infos, tuned.config, ())
    if tie.embedding in rest and not tie.head:
        raise MisfitError(
            f"{tie.embedding!r} differs, which this kind of model uses in several places: an "
            "adapter can replace it in one only.",
            hint="Pass --other drop to leave out what gets no factors.",
            file=tuned.located.path,
            tensor=tie.embedding,
        )


def _check_free(
    base: Checkpoint, tuned: Checkpoint, module: str, weights: Sequence[Weight]
) -> None:
    """Refuse to save a whole layer of a model, which would leave nothing to get factors, and what
    PEFT would save twice.
    """
    twice = not module or any(_within(p, module) for p in _meant(module, tuned.infos) - {module})
    layer = re.search(r"\.\d+(\.|$)", f".{module}")
    inner = changed(base, tuned, [w.tensor for w in _inside(module, weights)]) if layer else []
    hint = "--other drop leaves out what gets no factors."
    if inner:
        pattern = re.sub(r"\d+", r"\\d+", re.escape(module))
        hint = f"Pass --exclude-modules '^{pattern}' to carry such modules whole; {hint}"
    if inner or twice:
        some = f"{len(inner)} weights in it get some, such as {inner[0]!r}" if inner else ""
        why = some or "names of others end with its name"
        raise MisfitError(
            f"{module!r} has a tensor that gets no factors, and PEFT cannot save it whole: {why}.",
            hint=hint,
            file=tuned.located.path,
            tensor=inner[0] if inner else "",
        )


def _saved(modules: Collection[str], infos: Mapping[str, TensorInfo]) -> list[str]:
    """The outermost modules that PEFT saves when it is told these."""
    found: list[str] = []
    for module in sorted({p for m in modules for p in _meant(m, infos)}):
        if not any(_within(module, m) for m in found):
            found.append(module)
    return found


def _meant(module: str, infos: Iterable[str]) -> set[str]:
    """All modules whose names end with that of one: what PEFT takes `modules_to_save` for."""
    parents = {n[:i] for n in infos for i, c in enumerate(n) if c == "."}
    return {module} | {p for p in parents if module and p.endswith(module)}


def _wrapped(bias: str, weights: Sequence[Weight]) -> str:
    """The name of a bias in a module around which there are wrappers for its factors."""
    module, _, leaf = bias.rpartition(".")
    depth = sum(w.form.module == module for w in weights)
    return f"{module}{'.base_layer' * depth}.{leaf}"


def _inside(module: str, weights: Sequence[Weight]) -> list[Weight]:
    return [w for w in weights if _within(w.form.module, module)]


def _within(name: str, module: str) -> bool:
    return not module or f"{name}.".startswith(f"{module}.")


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _is_bias(name: str) -> bool:
    return "bias" in name.rpartition(".")[2]


def _taken(tuned: Checkpoint, key: str, info: TensorInfo) -> Taken:
    def values() -> Array:
        found: Array = read_stored(tuned, info)
        if info.dtype.startswith(("F", "BF")):
            largest = 0.0 if np.isfinite(found).all() else np.nan
            check_finite(info, largest, {"tuned": tuned.located.path})
        return found

    return Taken(TensorInfo(key, info.dtype, info.shape), values)
