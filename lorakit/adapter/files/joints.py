"""Whether the tensors of a module fit together, before anything is computed with them."""

from collections.abc import Iterable, Iterator, Mapping
from math import prod

from lorakit.adapter.delta import Delta, Values
from lorakit.errors import MisfitError

HINT = "Save the adapter again; this file is damaged."
# By algorithm: left factors, right factors and the cores that may lie between them.
FACTORS = {
    "lora": (("b", "a", "mid"),),
    "loha": (("w1_a", "w1_b", "t1"), ("w2_a", "w2_b", "t2")),
    "lokr": (("w1_a", "w1_b", ""), ("w2_a", "w2_b", "t2")),
}


def check_joints(delta: Delta) -> None:
    """Refuse factors that have no product, and an alpha that is not one number.

    Raises:
        MisfitError: saying which, of what shapes.
    """
    have = delta.tensors
    _check_halves(delta)
    for one, axis, other, along in _joints(delta.algo, have):
        matrix, tensor = have[one].shape, have[other].shape
        if (
            not _flat(matrix, delta.algo)
            or len(tensor) < 2
            or not 0 < matrix[axis] == tensor[along]
        ):
            raise MisfitError(
                f"{_called(delta, one)} is {list(matrix)}, {_called(delta, other)} is "
                f"{list(tensor)}: no pair.",
                hint=HINT,
                tensor=have[other].key or delta.module,
            )
    _check_beside(delta)
    if isinstance(alpha := delta.alpha, Values) and prod(alpha.shape) != 1:
        raise MisfitError(
            f"{alpha.key} is {list(alpha.shape)}, not one number.", hint=HINT, tensor=alpha.key
        )


def _called(delta: Delta, role: str) -> str:
    """A tensor by its name in the file; by its role, where it is not as it was there."""
    return delta.tensors[role].key or f"{role.upper()} of {delta.module!r}"


def _check_beside(delta: Delta) -> None:
    """Refuse norms and biases that are not those of the factors' outputs (norms, or inputs)."""
    if delta.algo != "lora":
        return
    a, b = (delta.tensors[r].shape for r in "ab")
    for role in ("magnitude", "bias"):
        found = delta.tensors.get(role)
        rows = found is not None and role == "magnitude" and len(found.shape) > 1
        # Norms of inputs have one row; those of an embedding in MLX are one for each token.
        sizes = (b[0], a[1]) if rows or delta.embedding else (b[0],)
        if found is not None and prod(found.shape) not in sizes:
            raise MisfitError(
                f"{_called(delta, role)} is {list(found.shape)}, and its module has {b[0]} "
                "outputs.",
                hint=HINT,
                tensor=found.key or delta.module,
            )


def check_norms(deltas: Iterable[Delta], to: str) -> None:
    """Refuse DoRA on some modules of a model only, which `to` takes to be on all.

    Raises:
        MisfitError: naming one of each.
    """
    seen: dict[tuple[str, bool], Delta] = {}
    for delta in (d for d in deltas if d.algo == "lora"):
        norms = "magnitude" in delta.tensors
        seen[delta.component, norms] = delta
        if other := seen.get((delta.component, not norms)):
            one, none = (delta, other) if norms else (other, delta)
            raise MisfitError(
                f"{one.module!r} has DoRA norms, {none.module!r} has none; {to} has all or none.",
                hint="Merge it, leave one kind out with --drop, or write comfyui for images.",
                tensor=one.module,
            )


def _check_halves(delta: Delta) -> None:
    """Refuse a Hadamard or Kronecker product without one of its two sides, or with one twice."""
    have = delta.tensors
    for side, core in (("w1", "t1"), ("w2", "t2")) if delta.algo in ("loha", "lokr") else ():
        whole = delta.algo == "lokr" and side in have
        halves = [f"{side}_{x}" for x in "ab"]
        if delta.algo == "loha" and {"t1", "t2"} & have.keys():
            halves.append(core)
        left = [] if whole else [h for h in halves if h not in have]
        spare = [r for r in (*halves, core) if whole and r in have]
        if left or spare:
            first = next(iter(have.values())).key
            raise MisfitError(
                f"the module of {first!r} is of {delta.algo} and "
                + (f"has no {left[0]}." if left else f"has {side} and {spare[0]} too."),
                hint=HINT,
                tensor=first,
            )


def _flat(shape: tuple[int, ...], algo: str) -> bool:
    """Whether it is a matrix; in a LoRA one may have a kernel of a single place."""
    return len(shape) == 2 or (algo == "lora" and len(shape) > 2 and prod(shape[2:]) == 1)


def _joints(algo: str, have: Mapping[str, Values]) -> Iterator[tuple[str, int, str, int]]:
    """Matrices and axes that are as long as an axis of another tensor.

    Left factors are (out, rank), right ones (rank, in, ...); LyCORIS has (rank, out) beside a core.
    """
    for left, right, core in FACTORS.get(algo, ()):
        if not {left, right} <= have.keys():
            continue
        if core in have:
            yield left, 1 if algo == "lora" else 0, core, 0
            yield right, 0, core, 1
        else:
            yield left, 1, right, 0
