"""Modules that PEFT's files have no place for, as a merge takes them: differences, new values, what
a weight is multiplied with (IA3, GLoRA, OFT), products (LoHa, LoKr), and DoRA with the norms of
inputs. Their names are those of lorakit.formats.peft.

Source: KohakuBlueleaf/LyCORIS, lycoris/modules/{full,norms,ia3,glora,diag_oft,loha,lokr,locon}.py
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from lorakit.adapter.delta import Delta, Values
from lorakit.adapter.files.parts import by_inputs, scaling_of
from lorakit.adapter.files.spelling import Step, Tensors, spelled
from lorakit.adapter.files.values import computed, widened
from lorakit.errors import MisfitError
from lorakit.formats.peft import PREFIX
from lorakit.formats.recognise import LANGUAGE
from lorakit.formats.spelling import SPELLINGS
from lorakit.math.acting import rotations
from lorakit.math.lycoris import sides

# Role of an algorithm without factors -> what its tensor is called in memory.
DIRECT = {
    ("full", "diff"): "lora_difference",
    ("full", "bias"): "lora_bias_difference",
    ("norm", "weight"): "lora_difference",
    ("norm", "bias"): "lora_bias_difference",
    ("set", "value"): "weight",
    ("set", "bias"): "lora_bias_difference",
}
WHOLE = {*(algo for algo, _ in DIRECT), "ia3", "glora", "oft"}
PRODUCTS = {"loha": ("t1",), "lokr": ("t2",)}  # as plain factors, if they have a core
CUBE = 3  # dimensions

Beside = tuple[Delta, Mapping[str, Values]]  # plain factors, and tensors by their names in memory


def only_merged(delta: Delta) -> bool:
    """Whether a merge takes a module, and PEFT's files have no place for it."""
    return delta.algo in WHOLE or by_inputs(delta) or _is_product(delta)


def _is_product(delta: Delta) -> bool:
    return delta.algo in PRODUCTS and not any(c in delta.tensors for c in PRODUCTS[delta.algo])


def without_biases(deltas: Iterable[Delta]) -> Iterator[Delta]:
    """Modules with factors, and each of their biases on its own: a merge adds it as it is, where
    PEFT scales it with the rest, which would round it.
    """
    for delta in deltas:
        bias = delta.tensors.get("bias")
        if bias is None or (delta.algo, "bias") in DIRECT:
            yield delta
            continue
        if bias.product:  # reading has scaled it, in its own dtype
            stored, scaling = bias.product
            bias = computed(widened(stored) * widened(stored).dtype.type(scaling))
        yield replace(delta, tensors={r: v for r, v in delta.tensors.items() if r != "bias"})
        yield Delta(delta.component, delta.module, "full", {"bias": bias})


def direct(delta: Delta) -> Tensors:
    """What is done to a weight in other ways than by plain factors and norms of outputs, as a merge
    takes it.

    Raises:
        MisfitError: it is of BOFT, or has DoRA norms without factors.
    """
    if delta.algo in WHOLE and "magnitude" in delta.tensors:
        raise MisfitError(
            f"{delta.module!r} is of {delta.algo} and has DoRA norms, which no tool trains so.",
            hint="Save the adapter again; this file is damaged.",
            tensor=delta.tensors["magnitude"].key or delta.module,
        )
    if by_inputs(delta):
        return _by_inputs(delta)
    if delta.algo in BESIDE_FACTORS:
        low, named = BESIDE_FACTORS[delta.algo](delta)
        return _with_factors(low, named)
    named = ALONE.get(delta.algo, _added)(delta)
    return Tensors(Step(delta.module, (delta.module,)), _in_names(delta, named), delta)


def _with_factors(low: Delta, named: Mapping[str, Values]) -> Tensors:
    """Plain factors, and what lies beside them."""
    (made,) = spelled([low], SPELLINGS["peft"], LANGUAGE)
    return replace(made, values={**made.values, **_in_names(low, named)})


def _in_names(delta: Delta, named: Mapping[str, Values]) -> dict[str, Values]:
    return {f"{PREFIX}{delta.module}.{n}": v for n, v in named.items()}


def _added(delta: Delta) -> dict[str, Values]:
    """Differences and new values, as they are."""
    return {DIRECT[delta.algo, role]: v for role, v in delta.tensors.items()}


def _ia3(delta: Delta) -> dict[str, Values]:
    inputs = bool(delta.tensors["on_input"].read().any())
    return {"lora_ia3_inputs" if inputs else "lora_ia3_rows": delta.tensors["weight"]}


def _oft(delta: Delta) -> dict[str, Values]:
    """The rotations, whose constraint is by the number of rows."""
    blocks = delta.tensors["blocks"]
    if len(blocks.shape) != CUBE:
        raise MisfitError(
            f"{delta.module!r} is of BOFT, which is not computed.",
            hint="Merge it with what trained it.",
            tensor=delta.module,
        )
    constraint = (delta.alpha_value or 0.0) * blocks.shape[0] * blocks.shape[1]
    found = {"lora_oft": computed(rotations(widened(blocks), constraint))}
    if "rescale" in delta.tensors:
        found["lora_oft_rescale"] = delta.tensors["rescale"]
    return found


def _glora(delta: Delta) -> Beside:
    """Its plain half as factors, and those of the half that goes through the weight.

    Older files have each pair the other way round: the first is the one with few rows.
    """
    t = delta.tensors
    ranks = {t["a1"].shape[1], t["a2"].shape[0], t["b1"].shape[1], t["b2"].shape[0]}
    (up, down), (b, a) = (("a1", "a2"), ("b1", "b2"))
    if len(ranks) > 1:
        (up, down), (b, a) = (("a2", "a1"), ("b2", "b1"))
    through = {"lora_through_A": _flat(t[down]), "lora_through_B": _flat(t[up])}
    plain = {"a": t[a], "b": t[b], **({"mid": t["bm"]} if "bm" in t else {})}
    return replace(delta, algo="lora", tensors=plain), through


def _hadamard(delta: Delta) -> Beside:
    """One of its pairs as factors, and the other beside them."""
    t = delta.tensors
    pair = {"a": t["w1_b"], "b": t["w1_a"]}
    beside = {r: v for r, v in t.items() if r in ("bias", "magnitude")}
    rank = pair["a"].shape[0]
    low = replace(delta, algo="lora", tensors=pair | beside, alpha=scaling_of(delta) * rank)
    return low, {"lora_times_A": t["w2_b"], "lora_times_B": t["w2_a"]}


def _kronecker(delta: Delta) -> dict[str, Values]:
    """Its two matrices, the left one with the scaling in it."""
    left, right = sides({r: widened(v).astype(np.float64) for r, v in delta.tensors.items()})
    named = {
        "lora_kron": computed((left * scaling_of(delta)).astype(np.float32)),
        "lora_A.weight": computed(right.astype(np.float32)),
    }
    if "magnitude" in delta.tensors:
        named["lora_magnitude_vector"] = delta.tensors["magnitude"]
    return named


def _by_inputs(delta: Delta) -> Tensors:
    """Plain factors, and the norms of inputs; a fused projection has the name that it has whole."""
    rest = {r: v for r, v in delta.tensors.items() if r != "magnitude"}
    norms = {"lora_magnitude_inputs": delta.tensors["magnitude"]}
    return _with_factors(replace(delta, tensors=rest), norms)


def _flat(values: Values) -> Values:
    """A convolution of one pixel as the matrix that it is."""
    return replace(
        values, shape=values.shape[:2], read=lambda: values.read().reshape(values.shape[:2])
    )


# What an algorithm is in memory: plain factors and tensors beside them, or these alone.
BESIDE_FACTORS: Mapping[str, Callable[[Delta], Beside]] = {"glora": _glora, "loha": _hadamard}
ALONE: Mapping[str, Callable[[Delta], dict[str, Values]]] = {
    "lokr": _kronecker,
    "ia3": _ia3,
    "oft": _oft,
}
