"""Where on disk the weight of a module lies, when the disk names or packs it otherwise.

A name on disk counts as it is. Else the canonical name does, which has to be one tensor's alone.
Else the weight is looked for in another packing: stacked experts as one tensor an expert or the
reverse, a projection of queries, keys and values (or of gate and up) as one tensor or as several.

Law: the places of a module cover each of its rows exactly once, or there are none.

Sources: those of lorakit.naming.families.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from lorakit.errors import InputError, MisfitError
from lorakit.naming.canonical import canonical, refused
from lorakit.naming.embeddings import shared_bias
from lorakit.naming.families import FUSED
from lorakit.tensors import TensorInfo

_expert = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.(weight|bias)")
_stacked = re.compile(r"(.*\.experts)\.([a-z_]+?)(_bias)?")
_leaf = re.compile(r"(?:(.*)\.)?([^.]+)\.([^.]+)")


@dataclass(frozen=True)
class Place:
    """Where (part of) the weight of a module lies.

    The module's weight is (out, in), or (experts, out, in) if it is stacked. Rows are counted in
    `out`, whichever dimension of the tensor that is on disk.
    """

    tensor: str  # on disk
    expert: int | None = None  # of a stacked weight: the one expert that this tensor holds
    rows: tuple[int, int] | None = None  # of the module: [start, stop) that lie here; None: all
    slot: int | None = None  # the tensor is stacked, the module is this expert of it
    at: int | None = None  # the row of the tensor (or slot) where they begin; None: they fill it
    turned: bool = False  # the tensor is (in, out), also where its shape does not tell


class Disk:
    """What is on disk, by its names and by its canonical names. Built once for a base."""

    def __init__(self, infos: Mapping[str, TensorInfo], model_type: str = "") -> None:
        self.infos = infos
        self.model_type = model_type
        self._names: dict[str, list[str]] = defaultdict(list)
        self._experts: dict[tuple[str, str], set[int]] = defaultdict(set)
        for name in infos:
            spelling = canonical(name, model_type)
            self._names[spelling].append(name)
            if match := _expert.fullmatch(spelling):
                prefix, number, leaf, parameter = match.groups()
                self._experts[prefix, f"{leaf}.{parameter}"].add(int(number))

    def find(self, spelling: str) -> str | None:
        """The one tensor of this canonical name, None if there is none.

        Raises:
            MisfitError: there are two.
        """
        names = self._names.get(spelling, ())
        if len(names) > 1:
            raise MisfitError(
                f"{names[0]!r} and {names[1]!r} on disk could both be meant by an adapter's "
                f"{spelling!r}.",
                hint="Say which with --key-map 'REGEX=REPLACEMENT'.",
                tensor=names[0],
            )
        return names[0] if names else None

    def all(self, spellings: Sequence[str]) -> list[str]:
        """The tensors of these canonical names, [] if one is missing."""
        names = [n for s in spellings if (n := self.find(s))]
        return names if len(names) == len(spellings) else []

    def experts(self, prefix: str, leaves: Sequence[str]) -> int:
        """How many experts have one tensor for each of these leaves; 0 unless all have all."""
        numbers = [self._experts.get((prefix, leaf), set()) for leaf in leaves]
        count = len(numbers[0])
        return count if all(n == set(range(count)) for n in numbers) else 0


def places(module: str, parameter: str, disk: Disk, out: int) -> list[Place]:
    """Where the parameter of a module lies on disk, [] if nowhere (or not all of it).

    `out` is the number of output rows of the module's own update. It says where keys and values
    begin in a fused projection; whether the shapes agree is for the caller to check.

    Raises:
        MisfitError: two tensors on disk could be meant.
        InputError: it is not on disk by its own name, and in this family more than a name stands
            between disk and model.
    """
    name = f"{module}.{parameter}".lstrip(".")
    if name in disk.infos:
        return [Place(name)]
    spelling = canonical(name, disk.model_type)
    _refuse(name, disk, refused(disk.model_type, spelling))
    if found := disk.find(spelling):
        return [Place(found)]
    if (shared := shared_bias(name)) in disk.infos:
        return [Place(shared)]
    ways = (_per_expert, _in_stack, _in_parts, _in_fused)
    elsewhere = next((p for way in ways if (p := way(spelling, disk, out))), [])
    if elsewhere:
        _refuse(name, disk, refused(disk.model_type, spelling, parts=True))
    return elsewhere


def _refuse(name: str, disk: Disk, reason: str) -> None:
    if reason:
        raise InputError(
            f"{name!r} cannot be placed: in {disk.model_type} models {reason}.",
            hint="Merge an adapter that has the names of the checkpoint.",
            tensor=name,
        )


def _per_expert(spelling: str, disk: Disk, out: int) -> list[Place]:
    """Stacked experts that are one tensor for each expert (and for gate and up) on disk."""
    if not (match := _stacked.fullmatch(spelling)):
        return []
    prefix, leaf, bias = match.groups()
    leaves = [f"{p}.{'bias' if bias else 'weight'}" for p in FUSED.get(leaf, (leaf,))]
    found: list[Place] = []
    for expert in range(disk.experts(prefix, leaves)):
        names = disk.all([f"{prefix}.{expert}.{p}" for p in leaves])
        found += (replace(p, expert=expert) for p in _consecutive(names, disk))
    return found


def _in_stack(spelling: str, disk: Disk, out: int) -> list[Place]:
    """One expert that is a slot of a stacked tensor, or of half the rows of one, on disk."""
    if not (match := _expert.fullmatch(spelling)):
        return []
    prefix, number, leaf, parameter = match.groups()
    bias = "_bias" if parameter == "bias" else ""
    slot = int(number)
    if name := disk.find(f"{prefix}.{leaf}{bias}"):
        found = Place(name, slot=slot)
    elif leaf in FUSED["gate_up_proj"] and (name := disk.find(f"{prefix}.gate_up_proj{bias}")):
        if 2 * out not in disk.infos[name].shape[1:]:
            return []
        found = Place(name, slot=slot, at=out if leaf == "up_proj" else 0)
    else:
        return []
    return [found] if slot < disk.infos[found.tensor].rows else []


def _in_parts(spelling: str, disk: Disk, out: int) -> list[Place]:
    """A fused projection, of a layer or of stacked experts, that is several tensors on disk."""
    for stem, leaf, tail in _split(spelling):
        if leaf in FUSED and (names := disk.all([f"{stem}{p}{tail}" for p in FUSED[leaf]])):
            return list(_consecutive(names, disk))
    return []


def _in_fused(spelling: str, disk: Disk, out: int) -> list[Place]:
    """A projection that is some rows of a fused tensor on disk."""
    for stem, leaf, tail in _split(spelling):
        for fused, parts in FUSED.items():
            if leaf in parts and (name := disk.find(f"{stem}{fused}{tail}")):
                begin = _begin(parts, parts.index(leaf), out, _rows(name, disk))
                return [] if begin is None else [Place(name, at=begin)]
    return []


def _split(spelling: str) -> Iterator[tuple[str, str, str]]:
    """Before the leaf, the leaf and after it: of a stacked weight, else of any other."""
    if match := _stacked.fullmatch(spelling):
        yield f"{match[1]}.", match[2], match[3] or ""
    elif match := _leaf.fullmatch(spelling):
        yield f"{match[1]}." if match[1] else "", match[2], f".{match[3]}"


def _begin(parts: Sequence[str], index: int, out: int, total: int) -> int | None:
    """The row where a part of this size begins; None if a part of such a tensor cannot be so large.

    The last two parts are of one size, those before them of another that is a multiple of it.
    """
    lead = len(parts) - 2
    if index >= lead:
        rest = total - 2 * out
        fits = rest > 0 and rest % (lead * out) == 0 if lead else rest == 0
        return total - out * (len(parts) - index) if fits else None
    rest = total - lead * out
    return index * out if rest > 0 and rest % 2 == 0 else None


def _consecutive(names: Sequence[str], disk: Disk) -> list[Place]:
    """Tensors as the rows of one module, one after the other."""
    if len(names) == 1:
        return [Place(names[0])]
    ends = [0]
    for name in names:
        ends.append(ends[-1] + _rows(name, disk))
    return [Place(n, rows=rows) for n, rows in zip(names, pairwise(ends), strict=True)]


def _rows(name: str, disk: Disk) -> int:
    """The output rows of a tensor; of stacked experts, those of one."""
    shape = disk.infos[name].shape
    stacked = len(shape) == 3 and bool(_stacked.fullmatch(canonical(name, disk.model_type)))
    return shape[1] if stacked else disk.infos[name].rows
