"""What an extraction carries whole, beside the factors that it makes.

Law: no tensor is carried whole and gets factors as well. What is carried lies where PEFT finds it:
in a module that is saved and has no factors inside, or as a bias that replaces the base's.

Source: huggingface/peft v0.21.2, src/peft/utils/other.py (ModulesToSaveWrapper) and
src/peft/utils/save_and_load.py.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lorakit.adapter.load import stored_pieces
from lorakit.errors import MisfitError
from lorakit.formats.peft import full_key
from lorakit.math.cast import Array
from lorakit.store.checkpoint import Checkpoint
from lorakit.tensors import TensorInfo
from lorakit.verbs.base.tying import tie_of
from lorakit.verbs.base.weights import Weight
from lorakit.verbs.extract.differing import changed, check_finite, tensors_in
from lorakit.verbs.making import Taken


@dataclass(frozen=True)
class Carried:
    """Tensors that are carried whole, by their names in the result; the modules that are saved; and
    the biases that replace the base's, by their names in the model.
    """

    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    modules: Collection[str] = ()
    biases: Collection[str] = ()

    def holds(self, module: str) -> bool:
        """Whether a module is in one that is saved."""
        return _within(module, self.modules)

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
    there, inside = tensors_in(tuned), _by_module(weights)
    biases = {n for n in rest if _is_bias(n) and n in base.infos and _parent(n) in inside}
    names = {m for n in there for m in _around(_parent(n))}
    modules = _saved({_parent(n) for n in rest if n not in biases}, names)
    for module in modules:
        _check_free(base, tuned, module, inside.get(module, []), names)
    if biases or any(not w.form.layer for w in weights):
        biases |= {*beside}
    biases = {n for n in biases if not _within(n, modules)}
    depths = Counter(w.form.module for w in weights)
    return Carried(
        {full_key(n, wrapped=False): i for n, i in there.items() if _within(n, modules)}
        | {full_key(_wrapped(n, depths), wrapped=False): there[n] for n in sorted(biases)},
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
    base: Checkpoint,
    tuned: Checkpoint,
    module: str,
    inside: Sequence[Weight],
    names: Collection[str],
) -> None:
    """Refuse to save a whole layer of a model, which would leave nothing to get factors, and what
    PEFT would save twice.
    """
    twice = any(_within(n, [module]) for n in _meant(module, names) - {module})
    layer = inside and re.search(r"\.\d+(\.|$)", f".{module}")
    inner = changed(base, tuned, [w.tensor for w in inside]) if layer else []
    hint = "--other drop leaves out what gets no factors."
    if inner:
        pattern = re.sub(r"\d+", r"\\d+", re.escape(module))
        hint = f"Pass --exclude-modules '^{pattern}' to carry such modules whole; {hint}"
    if inner or twice:
        some = f"{len(inner)} weights in it get some, such as {inner[0]!r}" if inner else ""
        why = some or "names of others end with its name"
        raise MisfitError(
            f"{module or 'the model'!r} has a tensor that gets no factors, and PEFT cannot save it "
            f"whole: {why}.",
            hint=hint,
            file=tuned.located.path,
            tensor=inner[0] if inner else "",
        )


def _saved(modules: Collection[str], names: Collection[str]) -> Collection[str]:
    """The outermost modules that PEFT saves when it is told these, in order."""
    found: dict[str, None] = {}
    for module in sorted({n for m in modules for n in _meant(m, names)}):
        if not _within(module, found):
            found[module] = None
    return found


def _meant(module: str, names: Collection[str]) -> set[str]:
    """All modules whose names end with that of one: what PEFT takes `modules_to_save` for."""
    return {module} | {n for n in names if n.endswith(module)}


def _by_module(weights: Sequence[Weight]) -> dict[str, list[Weight]]:
    """The weights in each module, however deep."""
    found: dict[str, list[Weight]] = {}
    for weight in weights:
        for module in _around(weight.form.module):
            found.setdefault(module, []).append(weight)
    return found


def _wrapped(bias: str, depths: Mapping[str, int]) -> str:
    """The name of a bias in a module around which there are wrappers for its factors."""
    module, _, leaf = bias.rpartition(".")
    return f"{module}{'.base_layer' * depths.get(module, 0)}.{leaf}"


def _within(name: str, modules: Collection[str]) -> bool:
    """Whether something is one of these modules, or lies in one."""
    return any(n in modules for n in _around(name))


def _around(name: str) -> Iterator[str]:
    """A name, and all modules that it lies in; the model itself is one."""
    yield name
    yield from (name[:i] for i, c in enumerate(name) if c == ".")
    yield ""


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _is_bias(name: str) -> bool:
    return "bias" in name.rpartition(".")[2]


def _taken(tuned: Checkpoint, key: str, info: TensorInfo) -> Taken:
    def values() -> Iterator[Array]:
        for found in stored_pieces(tuned, info):
            if info.dtype.startswith(("F", "BF")):
                largest = 0.0 if np.isfinite(found).all() else np.nan
                check_finite(info, largest, {"tuned": tuned.located.path})
            yield found

    return Taken(TensorInfo(key, info.dtype, info.shape), values)
