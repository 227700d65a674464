"""Attached adapters as folders, and one made of several.

Law: what is written is read, without options, as the adapter was when it was attached.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapter.config import NAME, AdapterConfig
from lorakit.adapter.new_config import format_config
from lorakit.adapter.pieces import out_proj_factor
from lorakit.adapter.weight_file import PEFT
from lorakit.errors import UsageError
from lorakit.math.stacked import by_expert
from lorakit.runtime.attached import attach
from lorakit.runtime.change import Change
from lorakit.runtime.seat import seats_in
from lorakit.runtime.state import Loaded, found_in
from lorakit.store.output import named
from lorakit.store.workspace import built
from lorakit.store.writing import write_file
from lorakit.tensors import NAMES
from lorakit.verbs.combine import combine


def save_adapter(
    model: nn.Module, folder: str | Path, name: str = "default", *, overwrite: bool = False
) -> Path:
    """Write an attached adapter as a PEFT folder, under the names it was read by; its path.

    One that is trained is written in the dtype of its factors, any other in that of its file.
    Factors that were read with `expert_packing` or `mha_factor` are written as PEFT has them.

    Raises:
        UsageError: there is no such adapter.
        OutputError, ResourceError: see `lorakit.errors`.
    """
    from safetensors.torch import save_file

    loaded, output = found_in(model, name).adapters[name], named(folder)
    tensors = {}
    for key, value in _plain(model, name, loaded).items():
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

    `options` are those of `lorakit.combine`: method, rank, density … It is attached as they were.

    Raises:
        UsageError: there is no such adapter, an option makes no sense, or they were attached with
            other names or another orientation.
        MisfitError, InputError: as `lorakit.combine` and `attach`.
    """
    state = found_in(model, *weights)
    way = _way([state.adapters[n] for n in weights])
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        saved = [save_adapter(model, root / str(i), n) for i, n in enumerate(weights)]
        done = combine(saved, root / "combined", weights=list(weights.values()), **options)
        attach(model, root / "combined", name, **way)
    return done


def _plain(model: nn.Module, name: str, loaded: Loaded) -> dict[str, Tensor]:
    """The tensors of an adapter by name, as they mean what they mean without options."""
    found: dict[str, Tensor] = {key: value.detach() for key, value in loaded.tensors.items()}
    for layer, seat in seats_in(model):
        for key, change in ((c.names.get("b"), c) for n, c in seat.changes if n == name):
            if key in found and change.spec.get("packing", "peft") != "peft":
                ups = by_expert(loaded.tensors[key].detach(), change.spec["experts"], "unsloth")
                found[key] = ups.permute(1, 2, 0).reshape(loaded.tensors[key].shape)
            elif key in found and _inner(layer, change):
                applied = out_proj_factor(AdapterConfig(loaded.config), None)
                found[key] = loaded.tensors[key].detach() * (change.spec["weight"] / applied)
    return found


def _inner(layer: nn.Module, change: Change) -> bool:
    """Whether it is of the out_proj of a MultiheadAttention, which PEFT applies twice."""
    return isinstance(layer, nn.MultiheadAttention) and change.inside == "out_proj"


def _way(sources: Sequence[Loaded]) -> dict[str, Any]:
    """The options to attach a combination with."""
    asked = [s.options for s in sources]
    if len({(tuple(o.key_map), o.expert_orientation) for o in asked}) > 1:
        raise UsageError(
            "these adapters were attached with different key_map or expert_orientation.",
            hint="Attach them with the same, or combine their files with lorakit.combine.",
        )
    unmatched = dict.fromkeys(o.allow_unmatched for o in asked if o.allow_unmatched)
    way = {name: getattr(o, name) for o in asked for name in ("key_map", "expert_orientation")}
    return way | {"allow_unmatched": "|".join(f"(?:{pattern})" for pattern in unmatched)}
