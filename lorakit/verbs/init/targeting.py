"""Which weights of a base are to get factors: all linear layers, or modules by name or pattern."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import NoReturn

from lorakit.adapter.weights import Form
from lorakit.configs import model_type
from lorakit.errors import InputError, MisfitError, UsageError
from lorakit.formats.patterns import search
from lorakit.naming.embeddings import embeddings_in, is_head
from lorakit.naming.linear import TABLES, is_called, linear_layers
from lorakit.store.checkpoint import Checkpoint
from lorakit.verbs.base.targets import check_foldable
from lorakit.verbs.base.weights import Weight, is_grouped, weights_in

NAMES = re.compile(r"[\w.]+(,[\w.]+)*")
LAYERS = re.compile(r"\d+(-\d+)?(,\d+(-\d+)?)*")
ALL = "all-linear"


@dataclass(frozen=True)
class Targets:
    """What is asked for, as on the command line, or as lists of names and numbers.

    Raises:
        UsageError: layers that are no numbers, or a pattern that is none.
    """

    modules: str = ALL
    exclude: str = ""
    layers: str = ""
    experts: bool = False

    def __post_init__(self) -> None:
        for name in ("modules", "exclude", "layers"):
            given = getattr(self, name)
            listed = [given] if isinstance(given, str | int) else given
            object.__setattr__(self, name, ",".join(map(str, listed)))
        if self.layers and not LAYERS.fullmatch(self.layers):
            raise UsageError(f"layers {self.layers!r}: write numbers and ranges, such as 0-7,12.")
        for pattern in (self.modules, self.exclude):
            try:
                search(pattern, "")
            except InputError as error:
                raise UsageError(error.message, hint=error.hint) from error

    @property
    def each(self) -> "list[Targets]":
        """The same for each name alone; every one has to mean something."""
        return [replace(self, modules=name) for name in _names(self.modules)]

    def means(self, module: str) -> bool:
        """Whether a module is meant by its name; for `all-linear` any is."""
        return self._named(self.modules, module) or self.modules == ALL

    def excluding_nothing(self, modules: Collection[str]) -> list[str]:
        """What is excluded and is the name of none of these modules."""
        names = _names(self.exclude) if self.exclude else []
        return [n for n in names if not any(self._named(n, m) for m in modules)]

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
        MisfitError: there is none, or none of a name, or a name that is excluded is of no module.
        InputError: one is quantised.
    """
    _check_excluded(base, targets)
    found = _found(base, targets)
    for one in targets.each:
        if not any(one.means(w.form.name) for w in found):
            _refuse(base, one)
    for weight in found:
        check_foldable(base.infos[weight.tensor], base.infos)
    return sorted(found, key=lambda w: (w.form.name, w.form.key))


def _found(base: Checkpoint, targets: Targets) -> list[Weight]:
    linear = set(linear_layers(base.infos, base.config))
    if targets.modules == ALL:
        kind = model_type(base.config)
        linear = {module for module in linear if is_called(module, kind)}
    found = [w for w in weights_in(base) if _wanted(w, targets, linear)]
    if targets.modules != ALL:
        found += [w for w in _others(base, linear) if targets.means(w.form.module)]
    return [w for w in found if not targets.leaves_out(w.form.module)]


def _check_excluded(base: Checkpoint, targets: Targets) -> None:
    """Refuse to leave out what is not there, but for a head: where it is tied, it has no tensor."""
    modules = {_parent(name) for name in base.infos}
    modules.update(name for w in weights_in(base) for name in w.form.names)
    for name in targets.excluding_nothing(modules):
        if is_head(f"{name}.weight"):
            continue
        hint = "`lorakit inspect BASE -v` names all."
        if any(f".{name}." in f".{module}." for module in modules):
            hint = f"What lies within it is meant by the pattern '.*{re.escape(name)}.*'."
        elif near := get_close_matches(name, {m.rpartition(".")[2] for m in modules}, n=1):
            hint = f"Is it {near[0]!r}? {hint}"
        raise MisfitError(
            f"no module is meant by {name!r}, which is to be left out.",
            hint=hint,
            file=base.located.path,
        )


def _refuse(base: Checkpoint, targets: Targets) -> NoReturn:
    """Say what would have been meant."""
    said, hint = (
        f"no module is meant by {targets.modules!r}",
        "`lorakit inspect BASE -v` names all.",
    )
    if _found(base, replace(targets, experts=True)):
        hint = "Only experts are: pass --experts."
    elif _found(base, replace(targets, layers="", exclude="")):
        said += " in the layers asked for" if targets.layers else " that is not excluded"
    elif any(targets.means(_parent(n)) for n, i in base.infos.items() if is_grouped(i)):
        said += ": it is a convolution in groups, for which PEFT has no factors"
    else:
        leaves = sorted({w.form.module.rpartition(".")[2] for w in weights_in(base)})
        if near := get_close_matches(targets.modules.split(",")[0], leaves, n=1):
            hint = f"Is it {near[0]!r}? {hint}"
    raise MisfitError(f"{said}.", hint=hint, file=base.located.path)


def _names(said: str) -> list[str]:
    """The names in a list of them, or the one pattern."""
    return said.split(",") if NAMES.fullmatch(said) else [said]


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _wanted(weight: Weight, targets: Targets, linear: set[str]) -> bool:
    form = weight.form
    expert = bool(form.experts) or ".experts." in f".{form.module}."
    if expert and not targets.experts:
        return False
    if targets.modules == ALL:
        return form.module in linear or bool(form.experts)
    return targets.means(form.name)


def _others(base: Checkpoint, linear: Collection[str]) -> Iterator[Weight]:
    """What `all-linear` leaves out and a name may mean: embeddings, heads, routers."""
    tables = set(embeddings_in(base.infos))
    for name, info in base.infos.items():
        module, _, leaf = name.rpartition(".")
        if leaf != "weight" or len(info.shape) != 2 or module in linear:
            continue
        first, second = info.shape
        if not is_head(name) and (name in tables or TABLES.search(module)):
            yield Weight(Form(module, leaf, (first,), second, embedding=True), name, turned=True)
        else:
            yield Weight(Form(module, leaf, (second,), first), name)
