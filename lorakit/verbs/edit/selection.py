"""What an edit keeps of an adapter, and under which names.

Law: what is neither dropped nor renamed keeps the very names of its tensors; every tensor of the
adapter belongs to exactly one `Held`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.parameters import parameters_of
from lorakit.errors import InputError, UsageError
from lorakit.formats.patterns import search, substitute
from lorakit.formats.peft import WRAPPERS, factor_key, levels, parse
from lorakit.tensors import TensorInfo

SHOWN = 3  # names that a message quotes


@dataclass(frozen=True)
class Held:
    """Something that an adapter has: the update of a weight, token rows, a tensor held whole, or
    one of use in training only.

    `kind` is "update", "rows", "whole" or "training"; `module` is the path of the module, of a
    MultiheadAttention's out_proj the path of the attention; `parameter` that of a bare parameter or
    of a whole tensor. `new` is what the module is called in the result.
    """

    kind: str
    module: str
    roles: dict[str, TensorInfo]
    parameter: str = ""
    leaf: str = ""  # of the out_proj in a MultiheadAttention
    key: str = ""  # of an update in `Adapter.modules`
    new: str = ""

    @property
    def name(self) -> str:
        """What patterns are held against, and people are told."""
        return _joined(self.module, self.leaf, self.parameter)

    @property
    def new_name(self) -> str:
        """The same in the result."""
        return _joined(self.new, self.leaf, self.parameter)


def held(adapter: Adapter) -> list[Held]:
    """All that an adapter has, in the order of its modules.

    Raises:
        InputError: it is no LoRA.
    """
    if adapter.config.peft_type not in ("LORA", "TRAINABLE_TOKENS"):
        raise InputError(
            f"is of type {adapter.config.peft_type}, not LoRA.",
            hint="Its tensors mean something else; use PEFT.",
            file=adapter.path,
        )
    bare = parameters_of(adapter)
    found = []
    for key, module in adapter.modules.items():
        roles = {r: i for r, i in module.roles.items() if r != "rows"}
        path = module.wrapped
        leaf = module.name.rpartition(".")[2] if module.inner else ""
        if roles:
            one = Held("update", path, roles, bare.get(key, ""), leaf, key)
            found.append(one)
        if rows := module.roles.get("rows"):
            found.append(Held("rows", path, {"rows": rows}, leaf=leaf))
    for name, info in adapter.full.items():
        path, _, parameter = name.rpartition(".")
        found.append(Held("whole", path, {"whole": info}, parameter))
    for name in adapter.unused:
        info = adapter.source.infos[name]
        found.append(Held("training", parse(name).module, {"training": info}))
    return [replace(one, new=one.module) for one in found]


def selected(
    things: Sequence[Held], keep: Sequence[str], drop: Sequence[str]
) -> tuple[list[Held], list[Held]]:
    """What stays and what goes: a pattern means what it is found in the name of.

    Raises:
        UsageError: a pattern is found nowhere, or nothing would be left.
    """
    for option, pattern in [*(("--keep", p) for p in keep), *(("--drop", p) for p in drop)]:
        if not any(_meant(pattern, one) for one in things):
            raise _found_nowhere(option, pattern, things)
    stays: list[Held] = []
    goes: list[Held] = []
    for one in things:
        wanted = not keep or any(_meant(p, one) for p in keep)
        dropped = not wanted or any(_meant(p, one) for p in drop)
        (goes if dropped else stays).append(one)
    if not any(one.kind != "training" for one in stays):
        raise UsageError("nothing of the adapter would be left.", hint="Keep some of its modules.")
    return stays, goes


def renamed(things: Sequence[Held], renames: Sequence[str]) -> list[Held]:
    """The same under new names: each REGEX=REPL in turn, on the paths of modules.

    Raises:
        UsageError: a pattern is found nowhere, or two things would have one name.
        InputError: it makes no name of a module.
    """
    for rename in renames:
        pattern, equals, replacement = rename.partition("=")
        if not equals:
            raise UsageError(f"--rename {rename!r} is not REGEX=REPLACEMENT.")
        if not any(search(pattern, one.new) for one in things):
            raise _found_nowhere("--rename", pattern, things)
        things = [replace(o, new=substitute(pattern, replacement, o.new)) for o in things]
    for one in things:
        if one.new != one.module and not all(one.new.split(".")):
            raise UsageError(f"--rename makes {one.new!r} of {one.module!r}, which is no name.")
    taken: dict[tuple[str, str], Held] = {}
    for one in (o for o in things if o.kind != "training"):
        other = taken.setdefault((one.kind, one.new_name), one)
        if other is not one:
            raise UsageError(
                f"--rename gives {other.name!r} and {one.name!r} one name, {one.new_name!r}."
            )
    return list(things)


def namer(before: Sequence[Held], after: Sequence[Held]) -> Callable[[Held, str], str]:
    """What gives the tensors of `after` their names, by role.

    Bare parameters are told apart by how deep their wrappers nest, which changes with what is
    dropped.
    """
    old, new = _depths(before), _depths(after)

    def name_of(one: Held, role: str) -> str:
        given = one.roles[role].name
        depth = new.get((one.module, one.parameter), 0)
        if one.kind == "update" and depth != old.get((one.module, one.parameter), 0):
            return factor_key(one.new, role, level=depth)
        return given if one.new == one.module else _respelled(given, one)

    return name_of


def _respelled(name: str, one: Held) -> str:
    """The name of a tensor with the path of its module replaced, all else as it was spelled."""
    segments = name.split(".")
    for spelling in (segments, [s for s in segments if s not in WRAPPERS]):
        for found in _replacements(spelling, one.module.split("."), one.new.split(".")):
            key = parse(found)
            if key.module == _joined(one.new, one.leaf) or (
                one.kind == "whole" and _joined(key.module, key.parameter) == one.new_name
            ):
                return found
    raise InputError(
        f"{name!r} is spelled so that the module in it cannot be renamed.",
        hint="Convert it first: lorakit convert ADAPTER -o OUT --names disk --base BASE.",
        tensor=name,
    )


def _replacements(name: Sequence[str], old: Sequence[str], new: Sequence[str]) -> Iterator[str]:
    for at in range(len(name) - len(old), -1, -1):
        if name[at : at + len(old)] == old:
            yield ".".join([*name[:at], *new, *name[at + len(old) :]])


def _depths(things: Sequence[Held]) -> dict[tuple[str, str], int]:
    updates = [one for one in things if one.kind == "update" and one.parameter]
    return levels((one.module, one.parameter) for one in updates)


def _meant(pattern: str, one: Held) -> bool:
    return search(pattern, one.name) or search(pattern, _joined(one.module, one.leaf))


def _found_nowhere(option: str, pattern: str, things: Sequence[Held]) -> UsageError:
    names = list(dict.fromkeys(one.name for one in things))
    more = " …" if len(names) > SHOWN else ""
    return UsageError(
        f"{option} {pattern!r} is found in no name of the adapter.",
        hint=f"It has {', '.join(names[:SHOWN])}{more}",
    )


def _joined(*parts: str) -> str:
    return ".".join(p for p in parts if p)
