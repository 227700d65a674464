"""Which weights of a base are to get factors: all linear layers, or modules by name or pattern."""

import re
from dataclasses import dataclass

from lorakit.adapter.weights import Form
from lorakit.errors import MisfitError, UsageError
from lorakit.formats.patterns import search
from lorakit.naming.embeddings import embeddings_in
from lorakit.naming.linear import linear_layers
from lorakit.naming.resolve import nearest
from lorakit.store.checkpoint import Checkpoint
from lorakit.verbs.differing import Weight, weights_in
from lorakit.verbs.targets import check_foldable

NAMES = re.compile(r"[\w.]+(,[\w.]+)*")
LAYERS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
ALL = "all-linear"


@dataclass(frozen=True)
class Targets:
    """What is asked for, as on the command line.

    Raises:
        UsageError: layers that are no numbers.
    """

    modules: str = ALL
    exclude: str = ""
    layers: str = ""
    experts: bool = False

    def __post_init__(self) -> None:
        if self.layers and not LAYERS.fullmatch(self.layers):
            raise UsageError(f"--layers {self.layers}: write numbers and ranges, such as 0-7,12.")

    def means(self, module: str) -> bool:
        """Whether a module is meant by its name; for `all-linear` any is."""
        return self._named(self.modules, module) or self.modules == ALL

    def leaves_out(self, module: str) -> bool:
        """Whether a module is excluded, or lies in a layer that is not asked for."""
        if self.exclude and self._named(self.exclude, module):
            return True
        if not self.layers:
            return False
        numbers = [int(s) for s in module.split(".") if s.isdecimal()]
        return not numbers or numbers[0] not in self._numbers()

    def _numbers(self) -> set[int]:
        ends = [part.partition("-") for part in self.layers.split(",")]
        return {n for a, dash, b in ends for n in range(int(a), int(b if dash else a) + 1)}

    def _named(self, wanted: str, module: str) -> bool:
        if NAMES.fullmatch(wanted):
            return any(f".{module}".endswith(f".{name}") for name in wanted.split(","))
        return search(rf"^(?:{wanted})$", module)


def targeted(base: Checkpoint, targets: Targets) -> list[Weight]:
    """The weights that are meant, in the order of the checkpoint's names.

    Raises:
        MisfitError: there is none.
        InputError: one is quantised.
    """
    linear = set(linear_layers(base.infos, base.config))
    found = [w for w in weights_in(base) if _wanted(w, targets, linear)]
    if targets.modules != ALL:
        found += [w for w in _embeddings(base) if targets.means(w.form.module)]
    found = [w for w in found if not targets.leaves_out(w.form.module)]
    if not found:
        near = nearest(targets.modules.split(",")[0], base.infos)[:2]
        raise MisfitError(
            f"no module is meant by {targets.modules!r}"
            + (f", there is {' and '.join(map(repr, near))}." if near else "."),
            hint="`lorakit inspect BASE -v` names what there is.",
            file=base.located.path,
        )
    for weight in found:
        check_foldable(base.infos[weight.tensor], base.infos)
    return sorted(found, key=lambda w: (w.form.name, w.form.key))


def _wanted(weight: Weight, targets: Targets, linear: set[str]) -> bool:
    form = weight.form
    expert = bool(form.experts) or ".experts." in f".{form.module}."
    if expert and not targets.experts:
        return False
    if targets.modules == ALL:
        return form.module in linear or bool(form.experts)
    return targets.means(form.name)


def _embeddings(base: Checkpoint) -> list[Weight]:
    found = []
    for name in embeddings_in(base.infos):
        vocabulary, width = base.infos[name].shape
        form = Form(name.removesuffix(".weight"), "weight", (vocabulary,), width, embedding=True)
        found.append(Weight(form, name, turned=True))
    return found
