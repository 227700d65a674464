"""Which family of models the modules of a file belong to, and which of its names these are.

Law: every module of the file is placed, or is among the unknown; of several families that know as
many of them, shapes decide, then the order of the table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lorakit.formats.components import Prefix, are_models, component_of, kind_of, prefix_of
from lorakit.formats.evidence import AGAINST, EXACT, NOTHING, Extent, likely
from lorakit.formats.families import FAMILIES, families_of
from lorakit.formats.templates import NAMESPACES, Found, Names, denoiser, encoder, open_clip

LANGUAGE = "language"  # a model whose modules go by their own names
ANY = "language model"  # a text encoder that alone does not tell what it is beside
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
    names = [family] if family else [*families_of(modules), LANGUAGE]
    found = [one for name in names for one in _readings(name, split)]
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


def _split(modules: Sequence[str]) -> dict[str, tuple[Prefix, str]]:
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


def _readings(family: str, split: Mapping[str, tuple[Prefix, str]]) -> list[Recognised]:
    if family == LANGUAGE:
        return [_language(split)]
    return [_reading(family, namespace, split) for namespace in NAMESPACES]


def _reading(family: str, namespace: str, split: Mapping[str, tuple[Prefix, str]]) -> Recognised:
    places = {}
    for module, (prefix, name) in split.items():
        component = component_of(prefix.slot, family)
        placed = component and _place(family, component, namespace, prefix, name)
        if placed:
            places[module] = placed
    if {kind_of(p.component, family) for p in places.values()} == {ANY}:
        places = {}
    unknown = tuple(m for m in split if m not in places)
    return Recognised(family, namespace, places, unknown)


def _place(family: str, component: str, namespace: str, prefix: Prefix, name: str) -> Placed | None:
    kind = kind_of(component, family)
    if not kind:
        names = denoiser(family)
        told = prefix.namespace and _find(names, name, prefix.namespace, prefix)
        found = told or _find(names, name, namespace, prefix)
        return Placed(component, found) if found else None
    if prefix.namespace == "open_clip":
        found = _find(open_clip(), name, "original", prefix)
        return Placed(component, found) if found else None
    known = encoder(kind)
    found = _find(known, name, "diffusers", prefix) or _find(known, name, "comfy", prefix)
    if found is None and prefix.slot == "te2":  # T5 in the second place
        for other in FAMILIES[family].of_kind("t5"):
            if found := _find(encoder("t5"), name, "diffusers", prefix):
                return Placed(other, found)
    return Placed(component, found) if found else None


def _find(names: Names, name: str, namespace: str, prefix: Prefix) -> Found | None:
    return names.find(name, namespace, flat=prefix.flat)


def _language(split: Mapping[str, tuple[Prefix, str]]) -> Recognised:
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
