"""Names of modules that no table of templates has: a base tells them, or the user does.

Law: a flattened name is that of the one module of the base that flattens to it as a whole; what has
none stays among the unknown.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from lorakit.errors import MisfitError
from lorakit.formats.components import prefix_of
from lorakit.formats.grouping import Group
from lorakit.formats.recognise import LANGUAGE, Placed, Recognised
from lorakit.store.checkpoint import open_checkpoint
from lorakit.tensors import TensorInfo

WHOLE = ("F64", "F32", "F16", "BF16")  # of weights whose shape is that of the layer
WEIGHT = ".weight"


@dataclass(frozen=True)
class Naming:
    """What a user says of names: a base that has them; those of the file under which others are to
    be read; and what to do with every name after that.
    """

    base: str | Path = ""
    table: Mapping[str, str] = field(default_factory=dict)
    rename: Callable[[str], str] | None = None


def renamed_groups(groups: Mapping[str, Group], naming: Naming, file: Path) -> dict[str, Group]:
    """The modules of a file under the names that the user gives them.

    Raises:
        MisfitError: the file has no module of such a name, or two get one name.
    """
    if strange := [name for name in naming.table if name not in groups]:
        raise MisfitError(
            f"has no module {strange[0]!r}, which the key map names.",
            hint=f"Its modules are called as {next(iter(groups))!r} is.",
            file=file,
            tensor=strange[0],
        )
    found: dict[str, Group] = {}
    for module, group in groups.items():
        name = naming.table.get(module, module)
        name = naming.rename(name) if naming.rename else name
        if name in found:
            raise MisfitError(
                f"two of its modules are called {name!r} by the key map.", file=file, tensor=module
            )
        found[name] = group
    return found


def named_by_base(
    known: Recognised, groups: Mapping[str, Group], base: str | Path, file: Path
) -> Recognised:
    """The modules of a file in the names of its base, where that knows more of them than `known`.

    Raises:
        InputError: the base is not there, or corrupt.
        MisfitError: a flattened name is that of two modules, or of one of another shape.
    """
    flat: dict[str, list[str]] = {}
    infos = open_checkpoint(str(base)).infos
    for name in infos:
        if name.endswith(WEIGHT):
            module = name.removesuffix(WEIGHT)
            flat.setdefault(module.replace(".", "_"), []).append(module)
    places = {}
    for module, group in groups.items():
        prefix, rest = prefix_of(module)
        there = flat.get(rest, []) if prefix.flat else [rest] * (f"{rest}{WEIGHT}" in infos)
        if len(there) > 1:
            raise MisfitError(
                f"{module!r} could be {there[0]!r} or {there[1]!r} of the base.",
                hint="Say which with --key-map 'REGEX=REPLACEMENT'.",
                file=file,
                tensor=module,
            )
        if there:
            _check_shape(module, group, infos[there[0] + WEIGHT], file)
            places[module] = Placed("", None, there[0])
    if len(places) <= len(known.places):
        return known
    unknown = tuple(m for m in groups if m not in places)
    return Recognised(LANGUAGE, "disk", places, unknown)


def _check_shape(module: str, group: Group, info: TensorInfo, file: Path) -> None:
    """Refuse factors of another layer; Conv1D and embeddings have theirs the other way round."""
    if group.algo != "lora" or info.dtype not in WHOLE:
        return
    a, b = (group.tensors[r].shape for r in "ab")
    if prod(a[1:]) * b[0] != prod(info.shape):
        raise MisfitError(
            f"{module!r} is for {b[0]} outputs and {prod(a[1:])} inputs, and the base has "
            f"{info.name!r} of {list(info.shape)}.",
            hint="Take the base that it was trained on.",
            file=file,
            tensor=module,
        )
