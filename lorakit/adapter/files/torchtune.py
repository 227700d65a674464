"""The adapter checkpoint of torchtune, whose queries and keys are in Meta's order of rows.

Law: every update, and every DoRA norm, is that of the module of the same place in the checkpoint of
Hugging Face, its rows in the order that they have there.

Source: pytorch/torchtune, torchtune/models/convert_weights.py and torchtune/modules/peft
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.adapter.config import NAME
from lorakit.adapter.delta import Delta, Opened
from lorakit.adapter.files.values import moved, stored
from lorakit.configs import model_type
from lorakit.errors import InputError, MisfitError
from lorakit.formats.llama_cpp import HEADS, heads_of
from lorakit.formats.recognise import LANGUAGE
from lorakit.formats.torchtune import ARCHITECTURES, place_of
from lorakit.math.surgery import halved
from lorakit.store.checkpoint import Part
from lorakit.store.json_file import read_json
from lorakit.store.model_config import read_model_config
from lorakit.tensors import TensorInfo

BASE = "config.json"  # of the base, which torchtune copies beside what it writes
ROWS = ("b", "magnitude")


@dataclass(frozen=True)
class Recipe:
    """What a file of torchtune does not say: the config of the base, and the alpha of the training.

    What is not here is taken from the files beside it.
    """

    base: Mapping[str, Any] = field(default_factory=dict)
    alpha: float | None = None


def read_torchtune(path: Path, part: Part, recipe: Recipe) -> Opened:
    """The adapter in such a file, in the names of Hugging Face, from its headers.

    Raises:
        InputError: the alpha or the heads of the base are not known.
        MisfitError: a tensor is no part of a linear layer's update, or lacks its other half.
    """
    modules: dict[str, dict[str, TensorInfo]] = {}
    for info in part.infos.values():
        place = place_of(info.name)
        if place is None:
            raise MisfitError(
                f"{info.name!r} is no update of a linear layer of torchtune that is known.",
                hint="Of its models those that are decoders of text are converted.",
                file=path,
                tensor=info.name,
            )
        modules.setdefault(place[0], {})[place[1]] = info
    alpha, base = _alpha(path, recipe), _base(path, recipe)
    deltas = []
    for module, infos in modules.items():
        _check(module, infos, path)
        heads = _heads(module, infos["b"].shape[0], base, path)
        tensors = {r: stored(part, i) for r, i in infos.items()}
        if heads:
            reorder = partial(halved, heads=heads)
            tensors |= {r: moved(tensors[r], reorder) for r in ROWS if r in tensors}
        deltas.append(Delta("", module, "lora", tensors, alpha))
    return Opened("torchtune", LANGUAGE, "disk", tuple(deltas))


def _check(module: str, infos: Mapping[str, TensorInfo], path: Path) -> None:
    a, b = infos.get("a"), infos.get("b")
    if a is None or b is None:
        raise MisfitError(f"{module!r} lacks one of its factors.", file=path)
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise MisfitError(
            f"the factors of {module!r} are {list(a.shape)} and {list(b.shape)}.",
            file=path,
            tensor=b.name,
        )


def _alpha(path: Path, recipe: Recipe) -> float:
    """What was told to the training; torchtune keeps it in its recipe, and in PEFT's config where
    it writes one.
    """
    beside = path.parent / NAME
    alpha: Any = recipe.alpha
    if alpha is None and beside.is_file():
        alpha = read_json(beside).get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not np.isfinite(alpha):
        raise InputError(
            "is of torchtune, which keeps alpha in its recipe, and no config beside it says any.",
            hint=f"lorakit convert {path} -o OUT --lora-alpha A, the lora_alpha of the recipe.",
            file=path,
        )
    return float(alpha)


def _base(path: Path, recipe: Recipe) -> Mapping[str, Any]:
    beside = path.parent / BASE
    return recipe.base or (read_model_config(beside) if beside.is_file() else {})


def _heads(module: str, rows: int, base: Mapping[str, Any], path: Path) -> int:
    """The number of heads whose rows are in Meta's order; 0 where none are."""
    if module.rpartition(".")[2] not in HEADS:
        return 0
    kind = model_type(base)
    if kind not in ARCHITECTURES:
        known = f"Known are {', '.join(ARCHITECTURES)}. "
        raise InputError(
            f"is of torchtune, whose order of queries and keys in {kind!r} is not known."
            if kind
            else "is of torchtune, and the order of its queries and keys depends on the base.",
            hint=f"{known if kind else ''}lorakit convert {path} -o OUT --base BASE, its folder.",
            file=path,
        )
    if not ARCHITECTURES[kind].permuted:
        return 0
    heads = heads_of(module, base, ARCHITECTURES[kind])
    if heads < 1 or rows % (2 * heads) or rows != heads * _width(base, heads, rows):
        raise InputError(
            f"{module!r} has {rows} rows, and the config of the base says {heads or 'no'} heads.",
            hint="Name the folder of the base that was trained with --base.",
            file=path,
        )
    return heads


def _width(base: Mapping[str, Any], heads: int, rows: int) -> int:
    """The rows of one head, as the base's config has them; by the rows where it does not say."""
    size, count = base.get("hidden_size"), base.get("num_attention_heads")
    if isinstance(width := base.get("head_dim"), int):
        return width
    if isinstance(size, int) and isinstance(count, int) and count:
        return size // count
    return rows // heads
