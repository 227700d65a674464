"""Updates of LyCORIS as plain low-rank factors, exactly.

Law: `b @ a` is the delta that the tensors describe before their scaling: for LoHa of the rank
squared, for LoKr of the smaller of the two ways to take the Kronecker product apart, for a Tucker
LoRA of its own rank.

Sources: Hyeon-Woo et al. 2021 (FedPara, arXiv 2108.06098); Yeh et al. 2023 (LyCORIS, arXiv
2309.14859), sections 3 and B.
"""

from collections.abc import Mapping

import numpy as np

from lorakit.errors import MisfitError
from lorakit.math.cast import Array

Tensors = Mapping[str, Array]


def tucker(tensors: Tensors) -> tuple[Array, Array]:
    """a (rank, in, k, ...) and b (out, rank, 1, ...) of a LoRA with a core: a, mid and b."""
    a, mid, b = tensors["a"], tensors["mid"], tensors["b"]
    down = a.reshape(a.shape[0], -1)
    core = np.einsum("mn...,ni->mi...", mid.astype(np.float64), down.astype(np.float64))
    return core, b.astype(np.float64)


def loha(tensors: Tensors) -> tuple[Array, Array]:
    """a (rank squared, in) and b (out, rank squared) of `(w1_a w1_b) * (w2_a w2_b)`; of a kernel
    with cores t1 and t2, a is (rank squared, in, k, ...).

    Raises:
        MisfitError: tensors are missing.
    """
    one, two = ((_wide(tensors, f"w{n}_a"), _wide(tensors, f"w{n}_b")) for n in (1, 2))
    if "t1" in tensors:
        one, two = (
            (up.T, np.einsum("mn...,ni->mi...", _wide(tensors, t), down))
            for t, (up, down) in (("t1", one), ("t2", two))
        )
    (up1, down1), (up2, down2) = one, two
    b = np.einsum("op,oq->opq", up1, up2).reshape(len(up1), -1)
    a = np.einsum("p...,q...->pq...", down1, down2)
    return a.reshape(-1, *down1.shape[1:]), b


def lokr(tensors: Tensors) -> tuple[Array, Array]:
    """a (rank, in) and b (out, rank) of `kron(w1, w2)`, either of which may be low-rank itself; a
    kernel of w2 is flattened into the inputs.

    Raises:
        MisfitError: tensors are missing.
    """
    up1, down1 = _factors(tensors, "w1")
    up2, down2 = _factors(tensors, "w2")
    return np.kron(down1, down2), np.kron(up1, up2)


def sides(tensors: Tensors) -> tuple[Array, Array]:
    """The two matrices of a Kronecker product without a core; the kernel of the right one stays.

    Raises:
        MisfitError: tensors are missing.
    """
    left, right = (
        _wide(tensors, n) if n in tensors else _wide(tensors, f"{n}_a") @ _wide(tensors, f"{n}_b")
        for n in ("w1", "w2")
    )
    return left, right


def lokr_kernel(tensors: Tensors) -> tuple[int, ...]:
    """The kernel of what `lokr` flattens, () for a linear layer."""
    core = next(tensors[n] for n in ("t2", "w2", "w2_b") if n in tensors)
    return tuple(core.shape[2:])


def _factors(tensors: Tensors, name: str) -> tuple[Array, Array]:
    """A matrix as a product of two, the smaller way: its own factors, or it and an identity."""
    if name in tensors:
        whole = _wide(tensors, name)
        flat = whole.reshape(len(whole), -1)
        rows, columns = flat.shape
        return (np.eye(rows), flat) if rows <= columns else (flat, np.eye(columns))
    up, down = _wide(tensors, f"{name}_a"), _wide(tensors, f"{name}_b")
    if "t2" in tensors and name == "w2":
        core = np.einsum("mn...,ni->mi...", _wide(tensors, "t2"), down)
        return up.T, core.reshape(len(core), -1)
    return up, down.reshape(len(down), -1)


def _wide(tensors: Tensors, name: str) -> Array:
    if name not in tensors:
        raise MisfitError(f"{name} is missing.")
    return tensors[name].astype(np.float64)
