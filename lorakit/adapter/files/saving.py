"""The files of an adapter that was made of deltas: weights, metadata, what PEFT's config tells."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.adapter.delta import Delta, Values
from lorakit.adapter.files.parts import scaling_of
from lorakit.adapter.files.spelling import Tensors
from lorakit.adapter.files.values import computed
from lorakit.adapter.new_config import Saved, config_of
from lorakit.errors import MisfitError
from lorakit.formats.peft import saves
from lorakit.formats.spelling import NUMBER, Number
from lorakit.math.cast import bytes_of, storage
from lorakit.store.header import format_header
from lorakit.store.writing import write_tensors
from lorakit.tensors import BITS, TensorInfo

CLIP = "text_model."  # which the names of transformers 4 have and those of 5 have not
ROWS = ".trainable_tokens_delta."
HASHES = {"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"}
SOURCE = "lorakit.source"  # in the header: what a way back needs and the format has no place for


def write_values(
    path: Path,
    values: Mapping[str, Values],
    metadata: Mapping[str, str],
    *,
    sync: bool,
    report: Callable[[int], None],
) -> int:
    """Write a safetensors file of these, wider dtypes first and then by name; its bytes."""
    infos = _in_order(values)
    blocks = (bytes_of(values[i.name].read()) for i in infos)
    return write_tensors(path, infos, blocks, metadata, sync=sync, report=report)


def _in_order(values: Mapping[str, Values]) -> list[TensorInfo]:
    infos = (TensorInfo(n, v.dtype, v.shape) for n, v in values.items())
    return sorted(infos, key=lambda i: (-BITS[i.dtype], i.name))


def hashes(values: Mapping[str, Values], metadata: Mapping[str, str]) -> dict[str, str]:
    """The hashes by which kohya's tools and web interfaces know a file, of those that there were.

    Source: kohya-ss/sd-scripts, library/train_util.py (precalculate_safetensors_hashes).
    """
    infos = _in_order(values)
    kept = {k: v for k, v in metadata.items() if k.startswith("ss_")}
    blob = bytearray(format_header(infos, kept))
    start = len(blob)
    for info in infos:
        blob += np.ascontiguousarray(values[info.name].read()).tobytes()
    legacy = hashlib.sha256(blob[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    whole = hashlib.sha256(blob[start:]).hexdigest()
    found = {"sshs_model_hash": whole, "sshs_legacy_hash": legacy}
    found["modelspec.hash_sha256"] = f"0x{whole}"
    return {name: value for name, value in found.items() if name in metadata}


def saved_of(made: Sequence[Tensors]) -> list[Saved]:
    """The modules with factors, as a config of PEFT tells of them."""
    found = []
    for tensors in made:
        delta = tensors.delta
        assert delta is not None
        if delta.algo == "lora":
            found.append(Saved(delta.module, delta.rank, delta.scaling * delta.rank))
    return found


def said_of(raw: Mapping[str, Any], carried: Sequence[str]) -> dict[str, Any]:
    """What a config of PEFT says of tensors held whole, of those that are carried."""
    saved = raw.get("modules_to_save")
    there = [f".{name}." for name in carried]
    left = [n for n in saved if any(saves(n, c) for c in carried)] if saved else []
    found: dict[str, Any] = {"modules_to_save": left or None}
    if not any(name.endswith(".bias") for name in carried):
        found["bias"] = "none"
    if not any(ROWS in t for t in there):
        found |= {"trainable_token_indices": None} if "trainable_token_indices" in raw else {}
    return found


def with_biases(made: Sequence[Tensors], ending: str) -> list[Tensors]:
    """The modules with a bias of zeros where others of their component have one: readers build one
    for all of a model, and do not fill what a file has not.

    Raises:
        MisfitError: there are DoRA norms as well, and no reader builds both.
    """
    norms = {t.delta.component for t in made if t.delta and "magnitude" in t.delta.tensors}
    having = {t.delta.component for t in made if t.delta and "bias" in t.delta.tensors}
    if both := norms & having:
        raise MisfitError(
            f"the {min(both) or 'model'} has DoRA norms and biases, and PEFT takes one of them.",
            hint="Merge it, or write comfyui for images.",
        )
    return [_with_bias(t, ending) if t.delta and t.delta.component in having else t for t in made]


def _with_bias(tensors: Tensors, ending: str) -> Tensors:
    delta = tensors.delta
    if delta is None or delta.algo != "lora" or "bias" in delta.tensors:
        return tensors
    like = delta.tensors["b"]
    bias = computed(np.zeros(like.shape[0], storage(like.dtype)))
    return replace(
        tensors,
        values={**tensors.values, tensors.step.name + ending: bias},
        delta=replace(delta, tensors={**delta.tensors, "bias": bias}),
    )


def adapter_metadata(made: Sequence[Tensors]) -> dict[str, Any]:
    """What Diffusers takes ranks and alphas from, `<component>.<field>`."""
    found: dict[str, Any] = {}
    for component in dict.fromkeys(t.delta.component for t in made if t.delta):
        some = [t for t in made if t.delta and t.delta.component == component]
        saved = [replace(s, name=s.name.removeprefix(CLIP)) for s in saved_of(some)]
        config = config_of({}, saved, {}, version=None)
        for name in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules"):
            found[f"{component}.{name}"] = config[name]
        if any("magnitude" in t.delta.tensors for t in some if t.delta):
            found[f"{component}.use_dora"] = True
        if any("bias" in t.delta.tensors for t in some if t.delta):
            found[f"{component}.lora_bias"] = True
    return found


def folders_of(made: Sequence[Tensors], to: str) -> dict[str, list[Tensors]]:
    """The modules by the folder that they go to: PEFT has one for each component."""
    found: dict[str, list[Tensors]] = {}
    for tensors in made:
        component = tensors.delta.component if tensors.delta else ""
        found.setdefault(component if to == "peft" else "", []).append(tensors)
    return {"": next(iter(found.values()))} if len(found) == 1 else found


def source_of(deltas: Sequence[Delta], metadata: Mapping[str, str]) -> dict[str, str]:
    """What a format without alphas says of those that there were, so that they can come back."""
    kinds = {(d.alpha.dtype, d.alpha.shape) for d in deltas if isinstance(d.alpha, Values)}
    if len(kinds) == 1 and kinds != {NUMBER}:
        ((dtype, shape),) = kinds
        return {SOURCE: json.dumps({"alpha": [dtype, list(shape)]})}
    return {SOURCE: metadata[SOURCE]} if SOURCE in metadata else {}


def number_of(metadata: Mapping[str, str]) -> Number:
    """Dtype and shape of the alphas that there were, by what `source_of` said."""
    try:
        dtype, shape = json.loads(metadata.get(SOURCE, "{}")).get("alpha", NUMBER)
        known = dtype in ("F16", "BF16", "F32", "F64", "I64") and tuple(shape) in ((), (1,))
    except (ValueError, TypeError, AttributeError):
        return NUMBER
    return (dtype, tuple(shape)) if known else NUMBER


def is_scaled(tensors: Tensors) -> bool:
    """Whether a module is read with a scaling other than 1."""
    return tensors.delta is not None and scaling_of(tensors.delta) != 1.0
