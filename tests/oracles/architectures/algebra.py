"""What a merge must give: W + scaling B A for every target, in float64, from the tensors on disk.

It knows nothing of lorakit. Factors become changes of parameters under the adapter's own names,
and `Architecture.on_disk` says where those lie.
"""

import json
import re
import shutil
from collections.abc import Mapping
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from tests.oracles.architectures.case import Built
from tests.oracles.architectures.keys import EXPERTS, Parts, Target, modules, target
from tests.oracles.reading import Array, read_json, read_tensors
from tests.oracles.rounding import rounded


def expected(built: Built) -> dict[str, Array]:
    """Every tensor of the merged checkpoint, before it is rounded to a dtype on disk."""
    merged = with_head(built)
    for name, delta in on_disk(built).items():
        merged[name] = merged[name] + delta
    return merged


def with_head(built: Built) -> dict[str, Array]:
    """Every tensor of the base, and the head that the merge gives a tensor of its own."""
    tensors = read_tensors(built.base)
    if built.case.untied_head:
        (embedding,) = [n for n in tensors if n.endswith("embed_tokens.weight")]
        tensors[built.case.untied_head] = tensors[embedding]
    return tensors


def on_disk(built: Built) -> dict[str, Array]:
    """The change of every tensor on disk that the adapter changes."""
    return built.kind.on_disk(deltas(built))


def deltas(built: Built) -> dict[str, Array]:
    """The change of every parameter that the adapter changes, by the adapter's own names."""
    config, found = read_json(built.adapter / "adapter_config.json"), {}
    for module, parts in modules(built.adapter).items():
        what = target(module, config)
        found[what.parameter] = _delta(built, what, parts, config)
    return found


def _delta(built: Built, what: Target, parts: Parts, config: Mapping[str, Any]) -> Array:
    """scaling B A in the layout of the parameter."""
    case = built.case
    if "lora_embedding_A" in parts:
        a, b = parts["lora_embedding_A"], parts["lora_embedding_B"]
        return case.embedding_times * _scaling(config, what.called, rank=len(a)) * (b @ a).T
    a, b = parts["lora_A.weight"], parts["lora_B.weight"]
    if not what.stacked:
        return _scaling(config, what.called, rank=len(a)) * (b @ a)
    stack = _stacked(a, b, case.packing, in_first=built.in_first)
    return _scaling(config, what.called, rank=len(a) // EXPERTS) * stack


def _stacked(a: Array, b: Array, packing: str, *, in_first: bool) -> Array:
    """The deltas of all experts, one on another; unscaled.

    Row e r + i of A is row i of expert e. Column i E + e of B is column i of expert e as PEFT packs
    it, column e r + i as Unsloth did.
    """
    rank = len(a) // EXPERTS
    found = []
    for e in range(EXPERTS):
        down = a[e * rank : (e + 1) * rank]
        up = b[:, e::EXPERTS] if packing == "peft" else b[:, e * rank : (e + 1) * rank]
        found.append((up @ down).T if in_first else up @ down)
    return np.stack(found)


def _scaling(config: Mapping[str, Any], named: str, *, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", named):
            alpha = value
            break
    return float(alpha / (sqrt(rank) if config.get("use_rslora") else rank))


def save_expected(built: Built, folder: Path, *, dtypes: Mapping[str, str] | None = None) -> None:
    """Write the reference as a checkpoint: in float32, or in dtypes by the names of tensors."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    shutil.copy(built.base / "config.json", folder)
    if built.case.untied_head:
        _untie(folder / "config.json")
    codes = dtypes or {}
    tensors = {
        name: rounded(values, codes.get(name, "F32")).astype(np.float32)
        for name, values in expected(built).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _untie(config: Path) -> None:
    config.write_text(json.dumps(read_json(config) | {"tie_word_embeddings": False}))
