"""From the plain data of one update and its factors to the update of the weight as it lies on disk.

What is cut, stacked, turned or put in blocks are always the factors, which is exact.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lorakit.math.acting import Generalised, Rescaled, Rotated
from lorakit.math.cast import Array
from lorakit.math.decomposed import on_disk
from lorakit.math.lowrank import LowRank, flatten, in_columns, rows_of, transpose, ungroup
from lorakit.math.products import Hadamard, Kronecker, Multiplied, Product
from lorakit.math.stacked import Part, Stacked, expert_of
from lorakit.math.updates import Added, Dense, Update

Read = Callable[[int, str], Array]  # number of the adapter, name of its tensor


def factored(plain: Mapping[str, Any], read: Read) -> Update:
    """The update that an adapter's factors make."""
    if plain.get("dense"):
        return _dense(plain, read(plain["adapter"], plain["b"]))
    if "act" in plain:
        return _acting(plain, read)
    if "experts" in plain:
        return _of_experts(low_of(plain, read), plain)
    if plain.get("kron") or plain.get("times"):
        return _multiplied(_product(plain, read), plain, read)
    low = low_of(plain, read)
    if plain.get("rows"):
        low = rows_of(low, *plain["rows"])
    if plain.get("columns"):
        return _placed(Added(in_columns(transpose(low), *plain["columns"]), plain["weight"]), plain)
    if plain.get("through"):
        a, b = (read(plain["adapter"], n) for n in plain["through"])
        through = Generalised(low, LowRank(a, b), plain["weight"])
        return _placed(through, plain) if "at" in plain else through
    return _with_norms(low, plain, read)


def _with_norms(low: LowRank | Product, plain: Mapping[str, Any], read: Read) -> Update:
    """What factors or a product add, with DoRA's norms where there are some."""
    update = on_disk(
        low,
        _magnitude(plain, read),
        transposed=plain.get("transposed", False),
        weight=plain["weight"],
        inputs=plain.get("inputs", False),
    )
    return _placed(update, plain) if "at" in plain else update


def _multiplied(product: Product, plain: Mapping[str, Any], read: Read) -> Update:
    """What LoHa and LoKr add."""
    if plain.get("rows"):
        product = product.rows(*plain["rows"])
    if plain.get("columns"):
        assert isinstance(product, Hadamard)
        turned = product.turned()
        one, two = (in_columns(x, *plain["columns"]) for x in (turned.one, turned.two))
        return _placed(Multiplied(Hadamard(one, two), plain["weight"]), plain)
    return _with_norms(product, plain, read)


def _product(plain: Mapping[str, Any], read: Read) -> Product:
    number = plain["adapter"]
    if plain.get("kron"):
        left, right = read(number, plain["b"]), read(number, plain["a"])
        whole = Kronecker(left, right.reshape(len(right), -1))
        return whole.rows(*plain["cut"]) if plain["cut"] else whole
    a, b = (read(number, n) for n in plain["times"])
    return Hadamard(low_of(plain, read), flatten(a, b))


def _acting(plain: Mapping[str, Any], read: Read) -> Update:
    """What a weight is multiplied with."""
    values, weight = read(plain["adapter"], plain["b"]), plain["weight"]
    if plain["act"] == "ia3":
        return Rescaled(values.reshape(-1), plain["axis"], weight)
    rescale = plain["rescale"] and read(plain["adapter"], plain["rescale"]).reshape(-1)
    return Rotated(values, rescale if plain["rescale"] else None, weight)


def _dense(plain: Mapping[str, Any], values: Array) -> Update:
    """A difference that is added as it is, or some of its rows."""
    matrix = values.reshape(len(values), -1)
    cut = matrix[slice(*plain["rows"])] if plain.get("rows") else matrix
    update = Dense(cut, plain["weight"] * plain["scaling"])
    return _placed(update, plain) if "at" in plain else update


def residual(plain: Mapping[str, Any], weight: Any) -> Update:
    """What an initialisation took out of a weight, computed again from it (`weight[start:stop]`
    gives its rows), as the update that takes it out.

    Source: see `lorakit.math.residual`.
    """
    from lorakit.math import residual as parts

    rows = weight[:]
    w = rows.T if plain["transposed"] else rows
    if plain["residual"] == "pissa":
        low = parts.principal(w, plain["rank"]).low
    elif plain["residual"] == "olora":
        low = parts.olora(w, plain["rank"], scaling=plain["scaling"]).low
    else:
        low = parts.tail(w, plain["rank"]).low
    low = LowRank(low.a.astype(rows.dtype), low.b.astype(rows.dtype), low.scaling)
    return Added(transpose(low) if plain["transposed"] else low, -plain["weight"])


def low_of(plain: Mapping[str, Any], read: Read) -> LowRank:
    """The factors of an update as one matrix each, in the adapter's own orientation."""
    number = plain["adapter"]
    b = read(number, plain["b"])
    if plain["a"] is None:  # the bias of lora_B: one column
        return LowRank(np.ones((1, 1), b.dtype), b.reshape(-1, 1), plain["scaling"])
    a = read(number, plain["a"])
    if "diag" in plain:
        a = read(number, plain["diag"]).reshape(-1, 1) * a
    if "blocks" in plain:
        from lorakit.math.blocks import expand

        a, b = (expand(x, n) for x, n in zip((a, b), plain["blocks"], strict=True))
    low = flatten(a, b, plain["scaling"])
    return ungroup(low, plain["enabled"]) if plain.get("enabled") else low


def _magnitude(plain: Mapping[str, Any], read: Read) -> Array | None:
    if not plain.get("magnitude"):
        return None
    magnitude = read(plain["adapter"], plain["magnitude"]).reshape(-1)
    return magnitude[slice(*plain["rows"])] if plain.get("rows") else magnitude


def _placed(update: Update, plain: Mapping[str, Any]) -> Update:
    height = plain["height"]
    return Stacked((Part(plain["at"], plain["at"] + height, update),))


def _of_experts(low: LowRank, plain: Mapping[str, Any]) -> Update:
    """The updates of all experts in their stack, or that of one expert in a tensor of its own."""
    weight, chosen = plain["weight"], plain.get("expert")
    if chosen is not None:
        one = _expert(low, chosen, plain)
        return Added(rows_of(one, *plain["rows"]) if plain["rows"] else one, weight)
    if not plain["stacked"]:
        return Added(_expert(low, 0, plain), weight)
    height = plain["height"]
    lows = (_expert(low, e, plain) for e in range(plain["experts"]))
    parts = (Part(e * height, (e + 1) * height, Added(x, weight)) for e, x in enumerate(lows))
    return Stacked(tuple(parts))


def _expert(low: LowRank, number: int, plain: Mapping[str, Any]) -> LowRank:
    one = expert_of(low, number, plain["experts"], plain["packing"])
    return transpose(one) if plain["turned"] else one
