"""Attached adapters as folders, and one made of several."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.adapter.config import NAME
from lorakit.adapter.saving import format_config
from lorakit.adapter.weight_file import PEFT
from lorakit.runtime.attached import attach
from lorakit.runtime.state import found_in
from lorakit.store.memory import NAMES
from lorakit.store.output import named
from lorakit.store.workspace import built
from lorakit.store.writing import write_file
from lorakit.verbs.combine import combine


def save_adapter(
    model: nn.Module, folder: str | Path, name: str = "default", *, overwrite: bool = False
) -> Path:
    """Write an attached adapter as a PEFT folder, under the names it was read by; its path.

    One that is trained is written in the dtype of its factors, any other in that of its file.

    Raises:
        UsageError: there is no such adapter.
        OutputError, ResourceError: see `lorakit.errors`.
    """
    from safetensors.torch import save_file

    loaded, output = found_in(model, name).adapters[name], named(folder)
    tensors = {}
    for key, value in loaded.tensors.items():
        dtype = value.dtype if loaded.trainable else getattr(torch, NAMES[loaded.dtypes[key]])
        tensors[key] = value.detach().to("cpu", dtype).contiguous()
    with built(output, {"save": name}, overwrite=overwrite) as workspace:
        save_file(tensors, workspace.folder / PEFT, metadata={"format": "pt"})
        write_file(workspace.folder / NAME, format_config(loaded.config), sync=True)
    return output


def add_weighted_adapter(
    model: nn.Module, weights: Mapping[str, float], name: str, **options: Any
) -> Any:
    """Attach the combination of attached adapters as one more; the report of `lorakit.combine`.

    `options` are those of `lorakit.combine`: method, rank, density …

    Raises:
        UsageError: there is no such adapter, or an option makes no sense.
        MisfitError, InputError: as `lorakit.combine` and `attach`.
    """
    found_in(model, *weights)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        saved = [save_adapter(model, root / str(i), n) for i, n in enumerate(weights)]
        done = combine(saved, root / "combined", weights=list(weights.values()), **options)
        attach(model, root / "combined", name)
    return done
