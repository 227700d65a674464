"""Alphas of files that were trained with `split_qkv`, as the training read them.

sd-scripts trains a LoRA of rank r for each part of a fused projection, and saves them as one with
blocks on the diagonal of B: of rank 3r or 4r, with the alpha of the parts. Whoever reads the file
divides by 3r or 4r.

Law: the scaling of every such module is times the number of its parts; all else stays.

Source: kohya-ss/sd-scripts, networks/lora_flux.py (LoRAModule, split_dims)
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from lorakit.adapter.delta import Delta, Opened, Values
from lorakit.adapter.files.values import computed
from lorakit.errors import MisfitError
from lorakit.formats.spelling import place_of
from lorakit.formats.templates import Found

ARGUMENTS = "ss_network_args"
FLAG = "split_qkv"
Part = tuple[Delta, Found]


def with_split_alphas(opened: Opened, file: Path) -> Opened:
    """The adapter with these alphas multiplied, and metadata that no longer asks for it.

    Raises:
        MisfitError: the metadata does not say that it was trained so, or no module is of this form.
    """
    arguments = _arguments(opened.metadata)
    if str(arguments.get(FLAG)).lower() != "true":
        raise MisfitError(
            f"the metadata does not say {FLAG}, so that alphas are taken as they are.",
            hint="Leave out --fix-split-qkv-alpha.",
            file=file,
        )
    alphas = {
        id(part): alpha
        for parts in _fused(opened).values()
        if _on_the_diagonal(parts) and (alpha := _times(parts)) is not None
        for part, _ in parts
    }
    if not alphas:
        raise MisfitError(
            "no fused projection has blocks on the diagonal of its B, and an alpha.",
            hint="Leave out --fix-split-qkv-alpha.",
            file=file,
        )
    deltas = tuple(replace(d, alpha=alphas.get(id(d), d.alpha)) for d in opened.deltas)
    said = json.dumps({**arguments, FLAG: "False"})
    return replace(opened, deltas=deltas, metadata={**opened.metadata, ARGUMENTS: said})


def _arguments(metadata: Mapping[str, str]) -> dict[str, object]:
    try:
        found = json.loads(metadata.get(ARGUMENTS, "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _fused(opened: Opened) -> dict[str, list[Part]]:
    """The parts that each fused projection was cut into, by its name."""
    found: dict[str, list[Part]] = {}
    for delta in opened.deltas:
        if delta.how == "split" and delta.algo == "lora":
            place = place_of("comfyui", opened.family, delta.component, delta.module)
            if place and place.found:
                found.setdefault(place.name, []).append((delta, place.found))
    return found


def _on_the_diagonal(parts: Sequence[Part]) -> bool:
    """Whether the rows of each part have its block of ranks only."""
    size, rest = divmod(parts[0][0].rank, len(parts))
    if rest:
        return False
    for delta, found in parts:
        columns = np.flatnonzero((delta.tensors["b"].read() != 0).any(axis=0))
        if any(columns // size != found.part):
            return False
    return True


def _times(parts: Sequence[Part]) -> Values | float | None:
    """The alpha of the parts times their number, in its dtype where that has it."""
    alpha = parts[0][0].alpha
    if not isinstance(alpha, Values):
        return alpha if alpha is None else alpha * len(parts)
    old = alpha.read()
    exact = old.astype(np.float64) * len(parts)
    new = exact.astype(old.dtype)
    return computed(new if (new.astype(np.float64) == exact).all() else exact.astype(np.float32))
