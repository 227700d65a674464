"""Experts of MLX-LM, which has those of a layer in one stack of factors; checkpoints have them one
by one.

Law: the update of every expert is that of its slice of the stack.

Source: ml-explore/mlx-lm, mlx_lm/tuner/lora.py (LoRASwitchLinear) and mlx_lm/models (sanitize)
"""

import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from lorakit.adapter.delta import Values
from lorakit.errors import MisfitError
from lorakit.math.cast import Array, storage
from lorakit.store.checkpoint import Part
from lorakit.tensors import TensorInfo

STACKED = 3  # dimensions of B
_STACK = re.compile(r"(.*\.(mlp|block_sparse_moe))\.switch_mlp\.(gate_proj|up_proj|down_proj)")
# Blocks whose checkpoints call the projections of an expert otherwise.
LEAVES = {"block_sparse_moe": {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}}


def is_stack(module: str, infos: Mapping[str, TensorInfo]) -> bool:
    """Whether the tensors of a module, by role, are the factors of all experts of a layer."""
    known = _STACK.fullmatch(module) is not None and infos.keys() == {"a", "b"}
    return known and len(infos["b"].shape) == STACKED


def stack_called(block: str, leaf: str) -> str:
    """What MLX calls the stack of a projection of experts, as checkpoints call that; "" if it has
    none.
    """
    kind = block.rpartition(".")[2]
    names = {called: name for name, called in LEAVES[kind].items()} if kind in LEAVES else {}
    found = f"{block}.switch_mlp.{names.get(leaf, leaf if kind == 'mlp' else '')}"
    return found if _STACK.fullmatch(found) else ""


def experts_of(
    module: str, infos: Mapping[str, TensorInfo], part: Part
) -> Iterator[tuple[str, dict[str, Values]]]:
    """The experts of a stack by the names that they have in checkpoints, each with its factors, a
    (rank, in) and b (out, rank).

    Older files have a as (experts * rank, in).

    Raises:
        MisfitError: the factors are of no such shapes.
    """
    match = _STACK.fullmatch(module)
    assert match is not None
    block, kind, leaf = match.groups()
    a, b = infos["a"], infos["b"]
    count, _, rank = b.shape
    if a.shape[:-1] not in ((count, rank), (count * rank,)) or not a.numel:
        raise MisfitError(
            f"{a.name} is {list(a.shape)}, {b.name} is {list(b.shape)}: no stacks of pairs.",
            hint="Save the adapter again; this file is damaged.",
            tensor=a.name,
        )
    leaf = LEAVES.get(kind, {}).get(leaf, leaf)
    for expert in range(count):
        first = Values(a.dtype, (rank, a.shape[-1]), _slice(part, a, expert, count))
        second = Values(b.dtype, b.shape[1:], _slice(part, b, expert, count))
        yield f"{block}.experts.{expert}.{leaf}", {"a": first, "b": second}


def _slice(part: Part, info: TensorInfo, expert: int, count: int) -> Callable[[], Array]:
    """What reads the rows of one of `count` experts, as a matrix."""

    def read() -> Array:
        rows = info.rows // count
        out = np.empty((info.numel // count // info.shape[-1], info.shape[-1]), storage(info.dtype))
        into = out.reshape(-1).view(np.uint8)
        part.read_rows(info.name, expert * rows, (expert + 1) * rows, into)
        return out

    return read
