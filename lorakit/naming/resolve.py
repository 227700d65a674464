"""Which tensor on disk an adapter's module means: by its exact name, else by one rewrite for all
the rest.

A rewrite takes leading segments off every name and puts others on (`model.` off, `language_model.`
on). Of all rewrites that lead every name to a tensor of the right shape, the one that changes the
fewest leading segments counts; two of the same length are ambiguous, and a rewrite never touches a
number, so that layer 3 can only become layer 3. Where some names are exact, a rewrite of the others
leads neither into the same stack of layers nor away from a module that is partly there: those are
names of another model.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from lorakit.errors import MisfitError, UsageError
from lorakit.formats.patterns import substitute
from lorakit.tensors import TensorInfo

Fits = Callable[[tuple[int, ...]], bool]
MAX_COMPARED = 5000  # names that a search for near misses looks at


@dataclass(frozen=True, slots=True)
class Wanted:
    """A place that an adapter asks for: `module.parameter` of the first parameter that is there."""

    module: str
    parameters: tuple[str, ...]
    fits: Fits

    def names(self, rewrite: "Rewrite | None" = None) -> list[str]:
        """The tensor names that would do."""
        module = rewrite(self.module) if rewrite else self.module
        if module is None:
            return []
        return [f"{module}.{p}".lstrip(".") for p in self.parameters]


@dataclass(frozen=True)
class Rewrite:
    """Take the segments `off` the front of a name and put the segments `on` in their place."""

    off: tuple[str, ...]
    on: tuple[str, ...]

    def __call__(self, module: str) -> str | None:
        """The rewritten name; None if the name does not begin with `off`."""
        segments = tuple(module.split("."))
        if segments[: len(self.off)] != self.off:
            return None
        return ".".join((*self.on, *segments[len(self.off) :]))

    def __str__(self) -> str:
        off, on = ".".join((*self.off, "")), ".".join((*self.on, ""))
        return f"{off!r} -> {on!r}"


@dataclass(frozen=True)
class Resolved:
    """The tensor for every place that was found, the rewrite that found some, and what is left."""

    tensors: Mapping[Wanted, str] = field(default_factory=dict)
    rewrite: Rewrite | None = None
    left: Sequence[Wanted] = ()


def resolve(wanted: Sequence[Wanted], disk: Mapping[str, TensorInfo]) -> Resolved:
    """Every place that can be found on disk, by exact name or by one rewrite.

    Raises:
        MisfitError: more than one rewrite would do.
    """
    found = {w: n for w in wanted if (n := _on_disk(w, disk, None))}
    rest = [w for w in wanted if w not in found]
    whole = {w.module for w in found}.isdisjoint(w.module for w in rest)
    rewrite = _rewrite(rest, disk, set(found.values())) if rest and whole else None
    if rewrite:
        found |= {w: n for w in rest if (n := _on_disk(w, disk, rewrite))}
        rest = []
    return Resolved(found, rewrite, rest)


def renamed(module: str, key_map: Sequence[str]) -> str:
    """A module's name after the user's `REGEX=REPLACEMENT` pairs, in their order.

    Raises:
        UsageError: a pair has no `=`.
    """
    for pair in key_map:
        pattern, equals, replacement = pair.partition("=")
        if not equals:
            raise UsageError(f"--key-map {pair!r} is not REGEX=REPLACEMENT.")
        module = substitute(pattern, replacement, module)
    return module


def nearest(name: str, disk: Mapping[str, TensorInfo]) -> list[str]:
    """Up to three names on disk that look like `name`, the most alike first."""
    leaf = name.split(".")[-2:]
    alike = [n for n in disk if n.split(".")[-2:] == leaf] or list(disk)
    return difflib.get_close_matches(name, alike[:MAX_COMPARED], n=3, cutoff=0.5)


def _on_disk(wanted: Wanted, disk: Mapping[str, TensorInfo], rewrite: Rewrite | None) -> str | None:
    """The first name that is there, exactly named ones whatever their shape."""
    for name in wanted.names(rewrite):
        if name in disk and (rewrite is None or wanted.fits(disk[name].shape)):
            return name
    return None


def _rewrite(
    rest: Sequence[Wanted], disk: Mapping[str, TensorInfo], taken: set[str]
) -> Rewrite | None:
    """The one rewrite that leads all of `rest` to tensors that are theirs alone."""
    candidates = sorted(_candidates(rest[0], disk), key=lambda r: (len(r.off), r.off, r.on))
    sound = [r for r in candidates if _leads(r, rest, disk, taken)]
    best = [r for r in sound if len(r.off) == len(sound[0].off)]
    if len(best) > 1:
        raise MisfitError(
            f"{rest[0].module!r} could be {best[0](rest[0].module)!r} or "
            f"{best[1](rest[0].module)!r}, and so could every other module.",
            hint="Say which with --key-map 'REGEX=REPLACEMENT'.",
        )
    return best[0] if best else None


def _candidates(wanted: Wanted, disk: Mapping[str, TensorInfo]) -> set[Rewrite]:
    """Every rewrite that leads this one place to a tensor of the right shape."""
    segments = wanted.module.split(".")
    found = set()
    for name, info in disk.items():
        module, _, parameter = name.rpartition(".")
        if parameter not in wanted.parameters or not wanted.fits(info.shape):
            continue
        there = module.split(".")
        same = _common_suffix(segments, there)
        if same and not segments[-same].isdigit():  # a stack of layers keeps its own name
            rewrite = Rewrite(tuple(segments[:-same]), tuple(there[:-same]))
            if not any(s.isdigit() for s in (*rewrite.off, *rewrite.on)):
                found.add(rewrite)
    return found


def _common_suffix(one: Sequence[str], other: Sequence[str]) -> int:
    same = 0
    while same < min(len(one), len(other)) and one[-1 - same] == other[-1 - same]:
        same += 1
    return same


def _leads(
    rewrite: Rewrite, rest: Sequence[Wanted], disk: Mapping[str, TensorInfo], taken: set[str]
) -> bool:
    names = [n for w in rest if (n := _on_disk(w, disk, rewrite))]
    modules = {w.module for w in rest}
    distinct = {n.rpartition(".")[0] for n in names}
    apart = {_stack(n) for n in names}.isdisjoint(_stack(n) for n in taken)
    return len(names) == len(rest) and len(distinct) == len(modules) and apart


def _stack(name: str) -> str:
    """The stack of layers that a tensor is in: what comes before its first number, or itself."""
    return ".".join(takewhile(lambda segment: not segment.isdigit(), name.split(".")))
