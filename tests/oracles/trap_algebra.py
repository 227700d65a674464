"""The algebra of the rarer kinds of adapters, in float64 on the tensors on disk.

It shares no line with lorakit: singular vectors are of the whole weight, columns of a whole QR.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from tests.oracles.algebra import scaling_of
from tests.oracles.reading import Array, read_json, read_tensors

PREFIX = "base_model.model."
Taken = Callable[[Array, int, float], Array]  # of a weight (out, in), the rank and the scaling


def principal(w: Array, rank: int, scaling: float) -> Array:
    """The part of the largest singular values: PiSSA's factors, multiplied, times the scaling."""
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    part: Array = (u[:, :rank] * s[:rank]) @ vh[:rank]
    return part


def first_columns(w: Array, rank: int, scaling: float) -> Array:
    """OLoRA's factors, multiplied, times the scaling, which it does not divide out."""
    q, r = np.linalg.qr(w)
    part: Array = scaling * (q[:, :rank] @ r[:rank])
    return part


def smallest(w: Array, rank: int, scaling: float) -> Array:
    """The part of the smallest singular values, without which KaSA trains."""
    u, s, vh = np.linalg.svd(w, full_matrices=False)
    part: Array = (u[:, -rank:] * s[-rank:]) @ vh[-rank:]
    return part


def nothing(w: Array, rank: int, scaling: float) -> Array:
    return np.zeros_like(w)


def expected(
    base: Mapping[str, Array],
    adapter: Path,
    *,
    weight: float = 1.0,
    taken: Taken = nothing,
    transposed: bool = False,
) -> dict[str, Array]:
    """`w + weight * (s B A - what was taken out of w)` for every adapted w, the others as they are.

    `transposed`: the adapted weights lie (in, out).
    """
    after = dict(base)
    for module, (change, rank, scaling) in changes(adapter, base, transposed=transposed).items():
        name = f"{module}.weight"
        w = base[name].T if transposed else base[name]
        new = w + weight * (change - taken(w, rank, scaling))
        after[name] = new.T if transposed else new
    return after


def changes(
    adapter: Path, base: Mapping[str, Array], *, transposed: bool = False
) -> dict[str, tuple[Array, int, float]]:
    """`s B A` (out, in), the rank and the scaling of every module of the adapter."""
    config, tensors, found = read_json(adapter / "adapter_config.json"), read_tensors(adapter), {}
    for key, a in tensors.items():
        module, found_a, _ = key.partition(".lora_A.weight")
        if not found_a:
            continue
        b = tensors[f"{module}.lora_B.weight"]
        if f"{module}.lora_diag" in tensors:
            b = b * tensors[f"{module}.lora_diag"]
        name, rank = module.removeprefix(PREFIX), len(a)
        out, inner = base[f"{name}.weight"].shape[:: -1 if transposed else 1]
        scaling = scaling_of(config, name, rank)
        found[name] = (scaling * (_whole(b, out, rank) @ _whole(a, rank, inner)), rank, scaling)
    return found


def _whole(x: Array, rows: int, columns: int) -> Array:
    """The block-diagonal matrix of blocks that lie one below the other, or the matrix itself."""
    blocks = columns // x.shape[1]
    whole = np.zeros((rows, columns))
    for i in range(rows):
        first = i // (rows // blocks) * x.shape[1]
        whole[i, first : first + x.shape[1]] = x[i]
    return whole
