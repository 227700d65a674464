"""Which family of models the modules of a file belong to, and which of its names these are.

Law: every module of the file is placed, or is among the unknown; of several families that know as
many of them, shapes decide, then the order of the table.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lorakit.formats.components import Prefix, are_models, component_of, kind_of, prefix_of
from lorakit.formats.evidence import AGAINST, EXACT, NOTHING, Extent, likely
from lorakit.formats.families import FAMILIES, families_of
from lorakit.formats.templates import (
    NAMESPACES,
    Found,
    Names,
    denoiser,
    encoder,
    numberless,
    open_clip,
)

LANGUAGE = "language"  # a model whose modules go by their own names
ANY = "language model"  # a text encoder that alone does not tell what it is beside
Split = dict[str, tuple[Prefix, str]]  # the prefix of each module, and its name after that
Shaped = dict[tuple[Prefix, str], dict[str, str]]  # of a prefix and a shape, the names by module
FLATTENED = ("lora_", "lycoris_")  # what only names without dots begin with


@dataclass(frozen=True)
class Placed:
    """Where a module of the file is: its component, and its place in the family's templates; None
    in a model that goes by its own names, which `module` has.
    """

    component: str
    found: Found | None
    module: str = ""


@dataclass(frozen=True)
class Recognised:
    """A file's family and namespace, each module's place, and what has none; `others` are families
    that have as many of its names, and other modules for them.
    """

    family: str
    namespace: str
    places: Mapping[str, Placed]
    unknown: tuple[str, ...]
    others: tuple[str, ...] = ()


def recognise(
    modules: Sequence[str], extents: Mapping[str, Extent], *, family: str = ""
) -> Recognised:
    """The family of these modules, by their names in the file; `extents` are the rows and inputs of
    their weights, 0 where nothing tells them.

    `family` leaves the choice to the user.
    """
    split = _split(modules)
    shaped = _shaped(split)
    names = [family] if family else [*families_of(modules), LANGUAGE]
    found = [one for name in names for one in _readings(name, split, shaped)]
    most = max(len(one.places) for one in found)
    best = [one for one in found if len(one.places) == most]
    said = [_likely(one, extents) for one in best]
    first = best[said.index(max(said))]
    least = EXACT if EXACT in said else min(NOTHING, max(said))
    fitting = [one for one, much in zip(best, said, strict=True) if much >= least]
    if first.family == LANGUAGE or not most:
        return first
    meant = _meaning(first)
    others = (one.family for one in fitting if _meaning(one) != meant)
    doubtful = dict.fromkeys(f for f in others if f not in (LANGUAGE, first.family))
    return replace(first, others=tuple(doubtful))


def _split(modules: Sequence[str]) -> Split:
    """The prefix of each module, and the rest of its name; in PEFT's files for a pipeline, that of
    the model.
    """
    split = {module: prefix_of(module) for module in modules}
    inner = {m: prefix_of(name) for m, (p, name) in split.items() if p.format == "peft"}
    return (
        inner
        if inner.keys() == split.keys() and are_models(p for p, _ in inner.values())
        else split
    )


def _shaped(split: Split) -> Shaped:
    """The modules with the same prefix, and names alike but for their numbers, together."""
    found: Shaped = defaultdict(dict)
    for module, (prefix, name) in split.items():
        found[prefix, numberless(name)][module] = name
    return found


def doubt(family: str, others: Sequence[str]) -> list[str]:
    """What to say of other families that have the same names; nothing where there are none."""
    if not others:
        return []
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    titles = ", ".join(FAMILIES[f].title for f in others[:3])
    taken = FAMILIES[family].title
    return [f"its names fit {titles}{more} too; {taken} is taken, or what --family says."]


def _meaning(one: Recognised) -> list[object]:
    """What modules become: by names of Diffusers those of the original code, and the other way."""
    found = [placed.found for placed in one.places.values() if placed.found]
    return [f.row.original if f.part is not None else (f.row.parts, f.row.swap) for f in found]


def _readings(family: str, split: Split, shaped: Shaped) -> list[Recognised]:
    if family == LANGUAGE:
        return [_language(split)]
    return [_reading(family, namespace, split, shaped) for namespace in NAMESPACES]


def _reading(family: str, namespace: str, split: Split, shaped: Shaped) -> Recognised:
    found: dict[str, Placed] = {}
    for (prefix, shape), members in shaped.items():
        ways = [w for w in _ways(family, namespace, prefix) if w.knows(shape, prefix)]
        for module, name in members.items() if ways else ():
            if placed := next(filter(None, (w.find(name, prefix) for w in ways)), None):
                found[module] = placed
    if {kind_of(p.component, family) for p in found.values()} == {ANY}:
        found = {}
    places = {m: found[m] for m in split if m in found}
    return Recognised(family, namespace, places, tuple(m for m in split if m not in found))


@dataclass(frozen=True)
class _Way:
    """Where a name may be looked up: a component, its modules, and which of their names."""

    component: str
    names: Names
    namespace: str

    def knows(self, shape: str, prefix: Prefix) -> bool:
        """Whether any name that is this but for its numbers is known."""
        return self.names.knows(shape, self.namespace, flat=prefix.flat)

    def find(self, name: str, prefix: Prefix) -> Placed | None:
        """The place of a name, None if it has none."""
        found = self.names.find(name, self.namespace, flat=prefix.flat)
        return Placed(self.component, found) if found else None


def _ways(family: str, namespace: str, prefix: Prefix) -> list[_Way]:
    """Where names after a prefix are looked up, in this order."""
    if not (component := component_of(prefix.slot, family)):
        return []
    kind = kind_of(component, family)
    if not kind:
        spaces = [n for n in (prefix.namespace, namespace) if n]
        return [_Way(component, denoiser(family, n), n) for n in spaces]
    if prefix.namespace == "open_clip":
        return [_Way(component, open_clip(), "original")]
    ways = [_Way(component, encoder(kind), n) for n in ("diffusers", "comfy")]
    if prefix.slot == "te2":  # T5 in the second place
        t5 = FAMILIES[family].of_kind("t5")
        ways += [_Way(other, encoder("t5"), "diffusers") for other in t5]
    return ways


def _language(split: Split) -> Recognised:
    """Modules that go by the names of their checkpoint; flattened ones cannot."""
    plain = {m: (p, n) for m, (p, n) in split.items() if p.format in ("peft", "bare")}
    plain = {m: both for m, both in plain.items() if not m.startswith(FLATTENED)}
    places = {m: Placed("", None, n) for m, (_, n) in plain.items()}
    return Recognised(LANGUAGE, "disk", places, tuple(m for m in split if m not in places))


def _likely(one: Recognised, extents: Mapping[str, Extent]) -> int:
    """What shapes say of a reading."""
    if (family := FAMILIES.get(one.family)) is None:
        return AGAINST
    places = {m: p for m, p in one.places.items() if p.component == family.component}
    return likely(family, {m: p.found for m, p in places.items() if p.found}, extents)
