"""What a tensor on disk is: its name, dtype and shape; and what can be asked of a place that has
some.

Plain Python: this is the vocabulary that planning, inspecting and `--dry-run` need, without NumPy.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

from lorakit.errors import UsageError

# Every dtype that safetensors 0.8 knows, by its code there (safetensors/src/tensor.rs): its bits,
# and what NumPy, ml_dtypes and torch (after "torch.") call it; "" where elements share bytes, which
# none of the three can view in place.
DTYPES = {
    "BOOL": (8, "bool"),
    "F4": (4, ""),
    "F6_E2M3": (6, ""),
    "F6_E3M2": (6, ""),
    "U8": (8, "uint8"),
    "I8": (8, "int8"),
    "F8_E5M2": (8, "float8_e5m2"),
    "F8_E4M3": (8, "float8_e4m3fn"),
    "F8_E8M0": (8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (8, "float8_e5m2fnuz"),
    "I16": (16, "int16"),
    "U16": (16, "uint16"),
    "F16": (16, "float16"),
    "BF16": (16, "bfloat16"),
    "I32": (32, "int32"),
    "U32": (32, "uint32"),
    "F32": (32, "float32"),
    "C64": (64, "complex64"),
    "F64": (64, "float64"),
    "I64": (64, "int64"),
    "U64": (64, "uint64"),
}
BITS = {code: bits for code, (bits, _) in DTYPES.items()}
NAMES = {code: name for code, (_, name) in DTYPES.items() if name}

# Into which a delta can be folded: floating point, at least a byte wide, with sign and mantissa.
FOLDABLE = frozenset(
    {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"}
)
# Of codes of one byte, which mean numbers where something beside them scales them.
ONE_BYTE = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8")
# What people call the dtypes that `--dtype` can write.
CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor.

    `start` is the offset of its first byte in the file that holds it; 0 where there is no file.
    """

    name: str
    dtype: str  # a key of BITS
    shape: tuple[int, ...]
    start: int = 0

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle: by its fields, which it would look up, in half as long again and with memory
        that Python keeps.
        """
        return TensorInfo, (self.name, self.dtype, self.shape, self.start)

    def but(self, **changes: Any) -> "TensorInfo":
        """The same with other fields; itself if they are none, since a plan has thousands."""
        if all(getattr(self, name) == value for name, value in changes.items()):
            return self
        return replace(self, **changes)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.numel * BITS[self.dtype] // 8

    @property
    def extent(self) -> tuple[int, int]:
        """Its half-open range of bytes in the file that holds it."""
        return self.start, self.start + self.nbytes

    @property
    def rows(self) -> int:
        """The length of the first dimension; 1 for a scalar."""
        return self.shape[0] if self.shape else 1

    @property
    def cols(self) -> int:
        """The number of elements in one row: the product of the other dimensions."""
        return prod(self.shape[1:])

    def matrix(self, leading: int) -> tuple[int, int]:
        """Rows and columns where the first `leading` dimensions make the rows."""
        return prod(self.shape[:leading]), prod(self.shape[leading:])


# What the units of a size stand for.
UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
UNITS |= {f"{u}i": 1024**n for n, u in enumerate("kmgt", 1)}


def size(nbytes: float) -> str:
    """A number of bytes for people: 1.5 GB, 640 MB."""
    for unit in ("B", "kB", "MB"):
        if abs(nbytes) < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.2f} GB" if nbytes < 100 else f"{nbytes:.0f} GB"


def bytes_in(value: int | str) -> int:
    """A number of bytes as people write it: 500MB, 2GB, 1.5GiB, 100000.

    Raises:
        UsageError: it is none.
    """
    if isinstance(value, int) and value >= 0:
        return value
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", str(value).strip().lower())
    if not found or not float(found[1]):
        raise UsageError(f"{value!r} is no size. Write 500MB, 2GB or 1.5GiB.")
    return int(float(found[1]) * UNITS[found[2] or ""])


class Source(Protocol):
    """A place that has tensors: names, dtypes and shapes at once, rows on demand."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What every tensor is, by name, in the order of the file."""
        ...

    def read_rows(self, name: str, start: int, stop: int, into: Any, *, leading: int = 1) -> None:
        """Fill `into`, a writable buffer of bytes, with rows `start` to `stop` of a tensor.

        The first `leading` dimensions make the rows: 2 for stacked matrices.

        Raises:
            InputError: the bytes are not there (the file is truncated, or shrank meanwhile).
        """
        ...
