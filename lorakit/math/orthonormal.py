"""Orthonormal bases in float64, and what has to be known of arrays before: their scale and dtype.

Law: a basis is orthonormal, and with its `r` gives back `x`, to the rounding of float64, whatever
the rank of `x`.

Sources: CholeskyQR2, Yamamoto et al. 2015 ("Roundoff error analysis of the CholeskyQR2 algorithm");
Golub and Van Loan, "Matrix Computations", section 5.2.
"""

from dataclasses import dataclass
from math import frexp, isfinite, prod
from typing import Any

from lorakit.errors import InputError
from lorakit.math.namespace import Array, array_namespace

# The least ratio of the eigenvalues of a Gram matrix from which a basis is good to 1e-12, and from
# which it is good enough to be repaired.
_WELL, _FAIR = 1e-3, 1e-9


@dataclass(frozen=True)
class Basis:
    """Orthonormal columns `q`, (rows, k), kept as the product of `part` and a small `turn`.

    With `r`, (k, cols), `q @ r` is the matrix that it was made from.
    """

    part: Array
    turn: Array | None  # None: the identity
    r: Array

    def times(self, small: Array) -> Array:
        """`q @ small`."""
        return self.part @ (small if self.turn is None else self.turn @ small)

    @property
    def q(self) -> Array:
        """The columns themselves."""
        return self.part if self.turn is None else self.part @ self.turn


def basis(x: Array) -> Basis:
    """A basis of as many columns as `x`, (rows, cols) in float64, has on its smaller side.

    By Cholesky's way, with products only, where the columns of `x` are far from dependent (`r` is
    then no triangle); otherwise, zeros included, by Householder's.
    """
    found = _by_gram(x) if x.shape[0] > x.shape[1] > 0 else None
    if found is None:
        q, r = array_namespace(x).linalg.qr(x)
        return Basis(q, None, r)
    return found


def _by_gram(x: Array) -> Basis | None:
    """The basis from the Gram matrix of the columns at length 1, None if that would lose digits."""
    xp = array_namespace(x)
    gram = x.T @ x
    sizes = xp.sqrt(xp.linalg.diagonal(gram))
    if not float(xp.min(sizes)) > 0:
        return None
    values, vectors = xp.linalg.eigh(gram / (sizes[:, None] * sizes))
    least = float(values[0]) / float(values[-1])
    if not least > _FAIR:
        return None
    root = xp.sqrt(values)
    turn, r = vectors / (sizes[:, None] * root), root[:, None] * vectors.T * sizes
    return Basis(x, turn, r) if least > _WELL else _repaired(x @ turn, r)


def _repaired(part: Array, r: Array) -> Basis:
    """The basis of `part @ r` where the columns of `part` are nearly orthonormal."""
    xp = array_namespace(part)
    lower = xp.linalg.cholesky(part.T @ part)
    return Basis(part, xp.linalg.inv(lower).T, lower.T @ r)


def working(*arrays: Array) -> Any:
    """The dtype of results for these arrays: float64 if one of them is, else float32."""
    xp = array_namespace(*arrays)
    return xp.float64 if any(a.dtype == xp.float64 for a in arrays) else xp.float32


def exponent(*arrays: Array) -> int:
    """The power of two just above the largest magnitude in arrays, 0 if there is none.

    It is at least -1000, so that its inverse is a float.

    Raises:
        InputError: NaN or inf is among them.
    """
    largest = 0.0
    for x in arrays:
        if not prod(x.shape):
            continue
        xp = array_namespace(x)
        for bound in (float(xp.max(x)), -float(xp.min(x))):
            if not isfinite(bound):
                raise InputError("there are NaN or inf among the values")
            largest = max(largest, bound)
    return max(frexp(largest)[1], -1000)
