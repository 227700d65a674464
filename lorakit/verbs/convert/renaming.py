"""From the tensors on disk that an adapter changes to the modules that the converted one has.

Names of the disk are those of the base's own tensors; names of runtime-v5 are those of the model of
transformers v5 (lorakit.naming.runtime). Experts are one by one or in a stack as these have them,
unless the user says otherwise.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from lorakit.errors import InputError
from lorakit.naming.canonical import canonical, refused
from lorakit.naming.embeddings import embeddings_in, is_head
from lorakit.naming.families import FUSED
from lorakit.naming.places import Place, places
from lorakit.naming.runtime import Runtime, runtime_of
from lorakit.tensors import TensorInfo
from lorakit.verbs.base.landing import FLAGGED, TURNED_ON_DISK
from lorakit.verbs.base.placing import Base
from lorakit.verbs.convert.goals import Goal, is_stack, split, stack_windows, windows_of

_own_expert = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
LAYER = ("weight", "in_proj_weight")
STACKED = {"gate_up_proj"}  # of what parts of an expert lie in one tensor
# PEFT 0.21 takes modules with these leaves, in models whose experts transformers v5 stacks, for
# experts of old, and renames them; as bare parameters it leaves them alone.
TAKEN = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


@dataclass(frozen=True)
class Renaming:
    """The names that are wanted, for a base. `experts` is "auto", "fused" or "split"."""

    base: Base
    names: str
    experts: str = "auto"
    _goals: dict[str, Sequence[Goal]] = field(default_factory=dict)
    _stacks: dict[str, Sequence[Place]] = field(default_factory=dict)

    @cached_property
    def runtime(self) -> Runtime:
        """What transformers v5 calls the base's tensors."""
        return runtime_of(self.base.config, self.base.disk)

    def info(self, tensor: str) -> TensorInfo:
        """A tensor of the base, or the embedding for a head that shares its tensor."""
        infos = self.base.infos
        return infos[tensor] if tensor in infos else infos[embeddings_in(infos)[0]]

    def resized(self, shapes: Mapping[str, tuple[int, ...]]) -> "Renaming":
        """The same for a base in which some tensors have other shapes."""
        infos = {n: replace(self.info(n), name=n, shape=s) for n, s in shapes.items()}
        base = replace(self.base, infos={**self.base.infos, **infos})
        return Renaming(base, self.names, self.experts)

    def goals(self, tensor: str) -> list[Goal]:
        """The modules in which a matrix (or stack) on disk lies.

        Raises:
            InputError: the wanted names have none for it, or in this family experts cannot be
                split or stacked.
        """
        return [g for g in self._all(tensor) if any(w.tensor == tensor for w in g.windows)]

    def one_name(self, tensor: str) -> str | None:
        """The wanted name of a tensor that is a whole parameter; None for one that is not.

        What the base does not have, as a head that the training put on it, keeps its name.
        """
        if self.names == "disk" or (tensor not in self.base.infos and not is_head(tensor)):
            return tensor
        names = self.runtime.of(tensor)
        there = self.runtime.places.get(names[0], [Place(tensor)])
        return names[0] if len(names) == 1 and list(there) == [Place(tensor)] else None

    def _all(self, tensor: str) -> Iterator[Goal]:
        on_disk = self.names == "disk"
        names = [self._name_on_disk(tensor)] if on_disk else self.runtime.of(tensor)
        for name in names:
            if name not in self._goals:
                self._goals[name] = tuple(self._made(name, tensor))
            yield from self._goals[name]

    def _made(self, name: str, tensor: str) -> Iterator[Goal]:
        places_of = self._stacks if self.names == "disk" else self.runtime.places
        goal = self._goal(name, places_of.get(name) or [Place(tensor)])
        if self.experts != "split" or not goal.experts:
            yield goal
            return
        spelling = canonical(f"{goal.module}.{goal.parameter}", self.base.model_type)
        if reason := refused(self.base.model_type, spelling, parts=True):
            raise _inseparable(goal, self.base.model_type, reason)
        leaf = spelling.rpartition(".")[2]
        in_first = self._in_first(goal, leaf)
        if goal.shape[0] == goal.shape[1] and in_first != self._turned:
            reason = "they are square, and lie the other way round than its family's"
            raise _inseparable(goal, self.base.model_type, reason)
        yield from split(goal, leaf, in_first=in_first)

    def _name_on_disk(self, tensor: str) -> str:
        """The tensor's own name, or that of the stack of experts that it is wanted in."""
        match = _own_expert.fullmatch(canonical(tensor, self.base.model_type))
        if self.experts != "fused" or not match:
            return tensor
        module = tensor[: tensor.rindex(f".experts.{match[2]}.")] + ".experts"
        leaves = [f for f, parts in FUSED.items() if match[3] in parts and f in STACKED]
        for name in (f"{module}.{leaf}" for leaf in (*leaves, match[3])):
            if name not in self._stacks:
                leaf = name.rpartition(".")[2]
                self._stacks[name] = places(module, leaf, self.base.disk, 0)
            if self._stacks[name]:
                return name
        raise InputError(
            f"the experts beside {tensor!r} are not all there, so there is no stack of them.",
            hint="Leave out --experts fused.",
            tensor=tensor,
        )

    def _goal(self, name: str, there: Sequence[Place]) -> Goal:
        module, _, parameter = name.rpartition(".")
        infos = [self.info(p.tensor) for p in there]
        spelling = canonical(name, self.base.model_type)
        experts = [p.expert for p in there if p.expert is not None]
        if experts or is_stack(infos[0], spelling):
            windows = list(stack_windows(there, infos))
            count = 1 + max(w.expert or 0 for w in windows)
            one = [w for w in windows if w.expert == 0]
            shape = (max(w.at + w.span[1] - w.span[0] for w in one), infos[0].shape[-1])
            turned = self.base.model_type in FLAGGED
            return Goal(module, parameter, shape, windows, False, count, turned)
        rows = 0 if there[0].at is None else self.runtime.shapes.get(name, (0,))[0]
        flat = list(windows_of(there, infos, rows))
        height = max(w.at + w.span[1] - w.span[0] for w in flat)
        return Goal(module, parameter, (height, infos[0].cols), flat, self._is_layer(name))

    def _is_layer(self, name: str) -> bool:
        *_, leaf, parameter = ("", *name.split("."))
        if parameter not in LAYER:
            return False
        if self.names == "disk":
            return True
        taken = self.runtime.stacks and self.experts != "split" and leaf in TAKEN
        return name not in self.runtime.others and not taken

    def _in_first(self, goal: Goal, leaf: str) -> bool:
        """Whether the matrices of a stack on disk are (in, out): by those of gate and up beside
        those of down, which cannot fit both ways.
        """
        if goal.windows[0].slot is None:
            return False
        prefix = canonical(f"{goal.module}.{goal.parameter}", self.base.model_type)
        stem = prefix.removesuffix(leaf)
        names = [self.base.disk.find(stem + n) for n in ("gate_up_proj", "down_proj")]
        shapes = [self.base.infos[n].shape[1:] for n in names if n]
        if len(shapes) == 2:
            (x, y), (u, v) = shapes
            return (y, x) == (2 * u, v)
        return self._turned

    @property
    def _turned(self) -> bool:
        """Whether stacks of this family are (in, out) on disk, as readers take square ones."""
        return self.base.model_type in TURNED_ON_DISK


def _inseparable(goal: Goal, model_type: str, reason: str) -> InputError:
    return InputError(
        f"{goal.name!r} cannot be split into experts: in this {model_type} model {reason}.",
        hint="Leave out --experts split.",
        tensor=goal.windows[0].tensor,
    )
