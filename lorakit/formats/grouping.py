"""The tensors of a file by the module that they adapt, and what its format is called."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from lorakit.errors import MisfitError
from lorakit.formats.components import prefix_of
from lorakit.formats.extents import inputs_of, rows_of
from lorakit.formats.recognise import Recognised
from lorakit.formats.roles import BESIDE, parse_key, parse_norm
from lorakit.formats.torchtune import is_torchtune
from lorakit.tensors import TensorInfo

HALVES = {"lora": ("a", "b")}  # roles that come in pairs


@dataclass
class Group:
    """The tensors of one module of the file."""

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    algos: set[str] = field(default_factory=set)

    @property
    def algo(self) -> str:
        """The algorithm; "full" for a module that has nothing but a bias."""
        return next(iter(self.algos), "full")

    @property
    def extent(self) -> tuple[int, int]:
        """The rows and the inputs of the weight, 0 where no role tells them."""
        shapes = {role: info.shape for role, info in self.tensors.items()}
        return rows_of(self.algo, shapes), inputs_of(self.algo, shapes)


def grouped(
    infos: Iterable[TensorInfo], file: object = ""
) -> tuple[dict[str, Group], dict[str, TensorInfo]]:
    """The modules of a file by their spelling there, and tensors that are part of none.

    Raises:
        MisfitError: a module lacks one of its factors, has tensors of two algorithms, or two of
            one role.
    """
    groups: dict[str, Group] = {}
    extras: dict[str, TensorInfo] = {}
    for info in infos:
        key = parse_key(info.name)
        if key is None:
            extras[info.name] = info
            continue
        group = groups.setdefault(key.module, Group())
        if key.role in group.tensors:
            raise MisfitError(
                f"{info.name!r} and {group.tensors[key.role].name!r} are for the same place.",
                file=file,
                tensor=info.name,
            )
        group.tensors[key.role] = info
        if key.algo:
            group.algos.add(key.algo)
    for name in [n for n in extras if groups and parse_norm(n)]:
        norm = parse_norm(name)
        assert norm is not None
        groups[norm.module] = Group({norm.role: extras.pop(name)}, {norm.algo})
    for module, group in groups.items():
        for (algo, role), ending in BESIDE.items():
            if group.algo == algo and module + ending in extras:
                group.tensors[role] = extras.pop(module + ending)
        _check(module, group, file)
    return groups, extras


def format_of(
    names: Collection[str], modules: Collection[str], known: Recognised, *, peft: bool
) -> str:
    """What the format of a file is called, by most of its modules; `peft`: PEFT's config is there.

    `names` are those of its tensors.
    """
    formats = [prefix_of(m)[0].format for m in modules]
    most = max(dict.fromkeys(formats), key=formats.count)
    if {"comfyui", "diffusers"} <= set(formats):  # ComfyUI takes both kinds of names
        most = "comfyui"
    if most in ("peft", "bare") and peft:
        return "peft"
    if most != "bare":
        return most
    if is_torchtune(names):
        return "torchtune"
    if any(".processor." in name for name in names):
        return "xlabs"
    if any(name.endswith("_norm.scale") for name in names):
        return "bfl-control"
    return "diffusers" if known.namespace == "diffusers" else "original"


def extents(groups: Mapping[str, Group]) -> dict[str, tuple[int, int]]:
    """The rows and inputs of the modules."""
    return {m: g.extent for m, g in groups.items()}


def _check(module: str, group: Group, file: object) -> None:
    if len(group.algos) > 1:
        raise MisfitError(
            f"{module!r} has tensors of {' and '.join(sorted(group.algos))}.", file=file
        )
    for half in HALVES.get(group.algo, ()):
        if half not in group.tensors:
            has = next(iter(group.tensors.values())).name
            raise MisfitError(
                f"{module!r} has {has!r} and not its other half.",
                hint="Fetch the file again, or train it anew.",
                file=file,
                tensor=has,
            )
