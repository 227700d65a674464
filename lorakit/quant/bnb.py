"""The tensors in which transformers and bitsandbytes store a weight of four bits.

Law: names, dtypes, shapes and bytes are what `save_pretrained` writes of the same arrays. With
double quantisation the JSON holds a number whose length is known only when the weight is; it may
be padded with spaces, which JSON permits, so that headers can be written first.

Source: bitsandbytes 0.50, bitsandbytes/functional.py (QuantState.as_dict, from_dict).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

import numpy as np

from lorakit.errors import InputError
from lorakit.math.cast import storage
from lorakit.quant.codec import Array, Quantised
from lorakit.quant.nested import BLOCK as NESTED
from lorakit.tensors import BITS, CODES, TensorInfo

STORAGE = {"uint8": "U8", **CODES}  # dtypes under which packed bytes are stored
_LONGEST = len(repr(-1.1754943508222875e-38))  # of the numbers of float32


@dataclass(frozen=True)
class Form:
    """What is common to all weights of a checkpoint."""

    kind: str  # nf4 or fp4
    levels: tuple[float, ...]
    block: int
    double: bool
    dtype: str  # of the model
    storage: str


def tensors(name: str, q: Quantised, form: Form, *, padded: bool = False) -> dict[str, Array]:
    """The tensors of a quantised weight, in the order in which bitsandbytes gives them."""
    stored = storage(STORAGE[form.storage])
    found = {
        name: q.arrays["packed"].view(stored)[:, None],
        f"{name}.absmax": q.arrays["absmax"],
        f"{name}.quant_map": np.array(form.levels, np.float32),
    }
    if form.double:
        for part in ("nested_absmax", "nested_quant_map"):
            found[f"{name}.{part}"] = q.arrays[part]
    state = _state(q.shape, form, q.meta.get("offset", 0.0))
    if padded:
        state = state.ljust(_length(q.shape, form))
    found[_state_name(name, form.kind)] = np.frombuffer(state, np.uint8)
    return found


def infos(name: str, shape: tuple[int, ...], form: Form) -> list[TensorInfo]:
    """What `tensors` will give for a weight of this shape, padded, in its order."""
    code = STORAGE[form.storage]
    itemsize = BITS[code] // 8
    blocks = -(-prod(shape) // form.block)
    packed = -(-prod(shape) // 2)
    if packed % itemsize:
        raise InputError(f"{packed} bytes are no whole number of {form.storage}", tensor=name)
    rows = [
        (name, code, (packed // itemsize, 1)),
        (f"{name}.absmax", "U8" if form.double else "F32", (blocks,)),
        (f"{name}.quant_map", "F32", (len(form.levels),)),
    ]
    if form.double:
        rows.append((f"{name}.nested_absmax", "F32", (-(-blocks // NESTED),)))
        rows.append((f"{name}.nested_quant_map", "F32", (256,)))
    rows.append((_state_name(name, form.kind), "U8", (_length(shape, form),)))
    return [TensorInfo(*row) for row in rows]


def from_tensors(name: str, found: Mapping[str, Array], form: Form) -> Quantised:
    """The quantised weight that these tensors hold.

    Raises:
        InputError: a tensor is missing, or they contradict each other.
    """
    state = read_state(name, _part(found, _state_name(name, form.kind)))
    shape, block = tuple(state["shape"]), state["blocksize"]
    size = prod(shape)
    packed = np.ascontiguousarray(_part(found, name)).reshape(-1).view(np.uint8)
    absmax = _part(found, f"{name}.absmax").reshape(-1)
    if packed.size != -(-size // 2) or absmax.size != -(-size // block):
        raise InputError(f"its sizes are not those of a weight of shape {shape}", tensor=name)
    levels = _part(found, f"{name}.quant_map")
    if not np.allclose(levels, form.levels, rtol=0, atol=1e-6):
        raise InputError(f"its levels are not those of {form.kind}", tensor=name)
    arrays, meta = {"packed": packed, "absmax": absmax}, {"block": block, "dtype": state["dtype"]}
    if "nested_offset" in state:
        for part in ("nested_absmax", "nested_quant_map"):
            arrays[part] = _part(found, f"{name}.{part}").reshape(-1)
        meta["offset"] = state["nested_offset"]
        if arrays["nested_absmax"].size != -(-absmax.size // NESTED):
            raise InputError("its nested scales are too few or too many", tensor=name)
    return Quantised(shape, arrays, meta)


def _state_name(name: str, kind: str) -> str:
    return f"{name}.quant_state.bitsandbytes__{kind}"


def _state(shape: tuple[int, ...], form: Form, offset: float) -> bytes:
    """The JSON of what is no tensor, its keys in the order of bitsandbytes."""
    facts: dict[str, Any] = {
        "quant_type": form.kind,
        "blocksize": form.block,
        "dtype": form.dtype,
        "shape": list(shape),
    }
    if form.double:
        nested = {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": offset}
        facts |= nested
    return json.dumps(facts).encode()


def _length(shape: tuple[int, ...], form: Form) -> int:
    """How long the JSON can be."""
    shortest = len(_state(shape, form, 0.0))
    return shortest - len("0.0") + _LONGEST if form.double else shortest


def _part(found: Mapping[str, Array], name: str) -> Array:
    if name not in found:
        raise InputError("a tensor of a pre-quantised weight is missing", tensor=name)
    return found[name]


def read_state(name: str, raw: Array) -> dict[str, Any]:
    """What is no tensor of a weight: `shape`, `blocksize`, `dtype` of the model, and with double
    quantisation `nested_offset`.

    Raises:
        InputError: the bytes are no such JSON, or it makes no sense.
    """
    try:
        state = json.loads(raw.tobytes())
        numbers = [state["blocksize"], *state["shape"]]
        sane = all(isinstance(n, int) and 0 < n < 2**40 for n in numbers)
        sane = sane and isfinite(state.get("nested_offset", 0.0))
        sane = sane and state.get("nested_blocksize", NESTED) == NESTED
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError("its quantisation state is no such JSON", tensor=name) from error
    if not sane:
        raise InputError("its quantisation state makes no sense", tensor=name)
    found: dict[str, Any] = {"dtype": "float32", **state}
    return found
