"""A source over tensors that are in memory already: NumPy arrays or torch tensors, by name.

Law: the bytes are those that the tensor would have in a safetensors file (C order, little endian).
Nothing is copied before its rows are asked for, and then only those rows: a strided view is made
contiguous, and a CUDA tensor brought to the CPU, row block by row block. torch is never imported;
a tensor of it is known by its looks, and then torch is there.
"""

import sys
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from lorakit.errors import InputError
from lorakit.tensors import NAMES, TensorInfo

_CODES = {name: code for code, name in NAMES.items()}
# Any dtype of a width can be viewed as these, and NumPy knows them, unlike torch.bfloat16.
_TORCH_INTEGERS = {1: "uint8", 2: "int16", 4: "int32", 8: "int64"}


@cache
def numpy_dtype(code: str) -> np.dtype[Any]:
    """The NumPy dtype that stores elements of a dtype code (a key of `lorakit.tensors.BITS`).

    Raises:
        InputError: there is none (a dtype narrower than a byte, or no dtype at all).
    """
    if code not in NAMES:
        raise InputError(f"no NumPy dtype stores {code!r}.", hint=f"Known: {', '.join(NAMES)}.")
    name = NAMES[code]
    return np.dtype(getattr(ml_dtypes, name, name))


class MemorySource:
    """The `Source` over a mapping of names to NumPy arrays or torch tensors, in its order.

    `name` is the file that the tensors came from, if they came from one.

    Raises:
        InputError: a key is no name; a value is no tensor, has no data (meta), is sparse, or has a
            dtype that safetensors does not know.
    """

    def __init__(self, tensors: Mapping[str, Any], *, name: str = "") -> None:
        self.name = name
        names: Iterable[object] = tensors
        if strange := [n for n in names if not isinstance(n, str)]:
            raise InputError(f"has {strange[0]!r} where the name of a tensor is.", file=name)
        self._tensors = dict(tensors)
        self._infos = {
            n: TensorInfo(n, _code(t, n, name), tuple(int(d) for d in t.shape))
            for n, t in self._tensors.items()
        }

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What every tensor is, by name, in the order of the mapping."""
        return self._infos

    def read_rows(self, name: str, start: int, stop: int, into: Any, *, leading: int = 1) -> None:
        """Fill `into`, a writable buffer of bytes, with rows `start` to `stop` of a tensor.

        Raises:
            InputError: the tensor has other rows than these, or they do not fill the buffer.
        """
        rows = self._rows(name, start, stop, leading)
        target = np.frombuffer(memoryview(into), np.uint8)
        if len(rows) != stop - start or rows.nbytes != target.nbytes:
            raise InputError(
                f"rows {start} to {stop} have {rows.nbytes:,} bytes, {target.nbytes:,} were asked.",
                file=self.name,
                tensor=name,
            )
        target[:] = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)

    def array(self, name: str) -> NDArray[Any]:
        """A whole tensor in its storage dtype (BF16 as `ml_dtypes.bfloat16`), in C order.

        It shares the memory of the tensor where that is contiguous: not to be written to.
        """
        info = self._infos[name]
        return np.ascontiguousarray(self._rows(name, 0, info.rows, 1)).reshape(info.shape)

    def _rows(self, name: str, start: int, stop: int, leading: int) -> NDArray[Any]:
        # Sliced before it is moved or copied: the rest of the tensor stays where it is.
        tensor, info = self._tensors[name], self._infos[name]
        if leading > 1:
            tensor = tensor.reshape(info.matrix(leading))
        rows = (tensor if info.shape else tensor.reshape(1))[start:stop]
        try:
            return _as_numpy(rows).view(numpy_dtype(info.dtype))
        except (RuntimeError, TypeError) as e:
            reason = str(e).partition("\n")[0]
            raise InputError(
                f"tensor {name!r} cannot be read as plain memory: {reason}",
                file=self.name,
                tensor=name,
            ) from e


def like(pattern: Any, array: NDArray[Any], code: str) -> Any:
    """`array`, in the storage dtype of `code`, as a tensor of the library and device of `pattern`.

    A torch tensor shares the memory of a writable, contiguous array, unless it goes to a device.
    """
    if not _is_torch(pattern):
        return array.view(numpy_dtype(code))
    torch = sys.modules["torch"]
    integers = torch.from_numpy(array.view(_TORCH_INTEGERS[array.itemsize]))
    return integers.view(getattr(torch, NAMES[code])).to(pattern.device)


def _code(tensor: Any, name: str, file: str) -> str:
    """The dtype code of a tensor that can be read; anything else is refused by what it is."""
    if not (isinstance(tensor, np.ndarray | np.generic) or _is_torch(tensor)):
        raise InputError(
            f"{name!r} is no tensor but a {type(tensor).__name__}.", file=file, tensor=name
        )
    dtype = getattr(tensor.dtype, "name", None) or str(tensor.dtype).removeprefix("torch.")
    layout = str(getattr(tensor, "layout", "torch.strided"))
    if dtype not in _CODES or layout != "torch.strided":
        what = layout.removeprefix("torch.") if dtype in _CODES else dtype
        raise InputError(f"tensor {name!r} is {what}; refused.", file=file, tensor=name)
    if str(getattr(tensor, "device", "")) == "meta":
        raise InputError(f"tensor {name!r} has no data (device meta).", file=file, tensor=name)
    return _CODES[dtype]


def _is_torch(value: Any) -> bool:
    return hasattr(value, "detach") and str(getattr(value, "dtype", "")).startswith("torch.")


def _as_numpy(tensor: Any) -> NDArray[Any]:
    """The memory of a tensor under any dtype of the right width, without a copy on the CPU."""
    if _is_torch(tensor):
        integer = getattr(sys.modules["torch"], _TORCH_INTEGERS[tensor.element_size()])
        viewed: NDArray[Any] = tensor.detach().cpu().view(integer).numpy()
        return viewed
    array = np.asarray(tensor)
    return array.astype(array.dtype.newbyteorder("<"), copy=False)
