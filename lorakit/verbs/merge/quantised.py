"""A quantised base seen as the plain weights that its codes stand for: all of them, or only those
that a merge changes.

Law: a weight that is seen so has the values of its codes, computed in float32 and rounded once to
the dtype in which it is written; every other tensor is as it is on disk.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.pieces import square_transposed
from lorakit.configs import model_type
from lorakit.engine.layout import Output
from lorakit.errors import InputError
from lorakit.folder.facts import fact
from lorakit.quant.stored.table import stored_weights
from lorakit.quant.stored.weight import Written, turned
from lorakit.store.checkpoint import Checkpoint
from lorakit.tensors import CODES, NAMES
from lorakit.verbs.base.deciding import decided
from lorakit.verbs.base.planning import Result
from lorakit.verbs.base.skipping import CONFIG, plain_facts, quantised_module
from lorakit.verbs.base.sources import adapter_number
from lorakit.verbs.base.targets import Options
from lorakit.verbs.base.unpacked import Weights, unpacked

# Methods that take the Conv1D layers of transformers for linear ones, which lie otherwise.
TURNING = ("bitsandbytes", "gptq")
# Modules that servers join, so that all of a row are quantised or none; of experts, all of a layer.
JOINED = (
    *(("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3")),
    *(("q_a_proj", "kv_a_proj_with_mqa"), ("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a")),
)
NOT_QUANTISED = "the base is not quantised, so --quant changes nothing."


def plain_base(
    base: Checkpoint, adapters: Sequence[Adapter], options: Options, form: Result
) -> tuple[Checkpoint, Mapping[str, Any], list[str]]:
    """The base as a merge of these adapters reads it: with `form.quant` "dequantize" all of its
    weights as their values, with "keep-touched" those that change. With it the facts of its config
    that are no longer true, and a line on it.

    Raises:
        InputError: it is quantised in a way that is not known.
        MisfitError: an adapter does not fit it.
    """
    weights = weights_of(base, form.dtype)
    if not weights:
        return base, {}, [NOT_QUANTISED]
    found = unpacked(base, weights)
    infos, plain = found.infos, weights
    if form.quant == "keep-touched":
        outputs = decided(found, adapters, options, form.dtype).outputs
        plain = touched(weights, (o for outs in outputs.values() for o in outs))
        found = unpacked(base, plain, all_of_it=len(plain) == len(weights))
    if not plain:
        return base, {}, ["no quantised weight changes."]
    facts = plain_facts(base.config, infos, weights, plain)
    dtypes = " and ".join(sorted({NAMES[w.info.dtype] for w in plain.values()}))
    said = f"{len(plain)} of {len(weights)} quantised weights are written in {dtypes}."
    return found, facts, [said]


def weights_of(base: Checkpoint, dtype: str) -> dict[str, Written]:
    """The quantised weights of a base by their names, to be seen in `dtype`, a key of CODES, or for
    "keep" in that of the model.

    Raises:
        InputError: the config says that it is quantised, in a way that is not known; or what is
            there contradicts itself.
    """
    said = fact(base.config, CONFIG, default=None) or {}
    model = CODES.get(str(fact(base.config, "dtype") or fact(base.config, "torch_dtype")), "BF16")
    found: dict[str, Written] = {}
    weight: Any
    for weight in stored_weights(base, said):
        if said.get("quant_method") in TURNING and is_turned(base, weight.info.name):
            weight = turned(weight)
        code = (weight.info.dtype or model) if dtype == "keep" else CODES[dtype]
        found[weight.info.name] = replace(weight, info=weight.info.but(dtype=code))
    if said and not found:
        raise InputError(
            f"is quantised in a way that is not known ({said.get('quant_method')}).",
            hint="Take the 16-bit base.",
            file=base.located.path,
        )
    return found


def is_turned(base: Checkpoint, name: str) -> bool:
    """Whether a weight is that of a Conv1D of transformers, which is (in, out)."""
    module = name.removesuffix(".weight")
    return square_transposed(module, model_type(base.config), fan_in_fan_out=False)


def touched(weights: Weights, outputs: Iterable[Output]) -> dict[str, Written]:
    """Of the quantised weights, those that a merge changes, and whatever servers join with them."""
    new = (o.tensor.name for o in outputs if o.recipe or adapter_number(o.source) is not None)
    changed = {_joined(n) for n in new if n in weights}
    return {n: w for n, w in weights.items() if _joined(n) in changed}


def _joined(name: str) -> tuple[str, tuple[str, ...]]:
    """What all weights that are joined with this one have in common."""
    parent, _, leaf = quantised_module(name).rpartition(".")
    return parent, next((group for group in JOINED if leaf in group), (leaf,))
