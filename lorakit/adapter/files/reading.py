"""A LoRA file of any format, from its headers: every tensor in the module that it belongs to.

Law: every tensor of the file is in a delta, or among the extras.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.adapter.config import NAME, AdapterConfig, read_config
from lorakit.adapter.delta import Delta, Opened, Values
from lorakit.adapter.files.parts import parts_of
from lorakit.adapter.load import read_stored
from lorakit.errors import InputError, MisfitError
from lorakit.formats.components import prefix_of
from lorakit.formats.recognise import LANGUAGE, Recognised, recognise
from lorakit.formats.roles import parse_key
from lorakit.store.checkpoint import Part, open_part
from lorakit.store.safetensors import SafetensorsFile
from lorakit.tensors import TensorInfo

FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
METADATA = "lora_adapter_metadata"  # of Diffusers, in the header
HALVES = {"lora": ("a", "b")}  # roles that come in pairs


@dataclass
class Group:
    """The tensors of one module of the file."""

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    algos: set[str] = field(default_factory=set)

    @property
    def algo(self) -> str:
        """The algorithm; "full" for a module that has nothing but a bias."""
        return next(iter(self.algos), "full")

    @property
    def width(self) -> int:
        """The number of inputs, 0 where no role tells it."""
        down = next((self.tensors[r] for r in ("a", "w1_b") if r in self.tensors), None)
        return down.shape[1] if down is not None and len(down.shape) > 1 else 0


def weights_of(path: Path) -> Path:
    """The weight file of a folder, or the file itself.

    Raises:
        InputError: there is none.
    """
    if not path.is_dir():
        return path
    found = [path / name for name in FILES if (path / name).is_file()]
    found += sorted(path.glob("*.safetensors"))
    if not found:
        raise InputError("has no weight file of an adapter.", file=path)
    return found[0]


def open_file(path: str | Path, *, family: str = "", allow_pickle: bool = False) -> Opened:
    """The adapter in a file or folder of any format that is known.

    `family` is a key of `lorakit.formats.families.FAMILIES`, or "language", for names that several
    families have.

    Raises:
        InputError: it is not there, corrupt, or no adapter.
        MisfitError: a module lacks one of its factors, or has tensors of two algorithms.
    """
    place = weights_of(Path(path))
    part = open_part(place, allow_pickle=allow_pickle)
    groups, extras = _grouped(part, place)
    if not groups:
        raise InputError("has no tensors of an adapter.", file=place)
    known = recognise(list(groups), {m: g.width for m, g in groups.items()}, family=family)
    metadata = dict(part.metadata) if isinstance(part, SafetensorsFile) else {}
    config = read_config(place.parent) if (place.parent / NAME).is_file() else AdapterConfig()
    configs = {"": config, **_in_metadata(metadata, place)}
    deltas = tuple(
        delta
        for module, group in groups.items()
        if module in known.places
        for delta in _deltas(module, group, known, part, configs)
    )
    carried = {n: stored(part, i) for n, i in extras.items()}
    carried |= {i.name: stored(part, i) for m in known.unknown for i in groups[m].tensors.values()}
    return Opened(
        format_of(part, groups, known, config),
        known.family,
        known.namespace,
        deltas,
        carried,
        metadata,
        dict(config.raw),
    )


def stored(part: Part, info: TensorInfo) -> Values:
    """A tensor of the file, as it is."""

    def read() -> NDArray[Any]:
        return read_stored(part, info)

    return Values(info.dtype, info.shape, read, info.name)


def format_of(
    part: Part, groups: Mapping[str, Group], known: Recognised, config: AdapterConfig
) -> str:
    """What the format of a file is called, by most of its modules."""
    formats = [prefix_of(m)[0].format for m in groups]
    most = max(set(formats), key=formats.count)
    if most in ("peft", "bare") and config.raw.get("peft_type"):
        return "peft"
    if most == "bare":
        if any(".processor." in name for name in part.infos):
            return "xlabs"
        if any(name.endswith("_norm.scale") for name in part.infos):
            return "bfl-control"
        return "diffusers" if known.namespace == "diffusers" else "original"
    return most


def _grouped(part: Part, place: Path) -> tuple[dict[str, Group], dict[str, TensorInfo]]:
    groups: dict[str, Group] = {}
    extras: dict[str, TensorInfo] = {}
    for name, info in part.infos.items():
        key = parse_key(name)
        if key is None:
            extras[name] = info
            continue
        group = groups.setdefault(key.module, Group())
        if key.role in group.tensors:
            raise MisfitError(
                f"{name!r} and {group.tensors[key.role].name!r} are for the same place.",
                file=place,
                tensor=name,
            )
        group.tensors[key.role] = info
        if key.algo:
            group.algos.add(key.algo)
    for module, group in groups.items():
        _check(module, group, place)
    return groups, extras


def _check(module: str, group: Group, place: Path) -> None:
    if len(group.algos) > 1:
        raise MisfitError(
            f"{module!r} has tensors of {' and '.join(sorted(group.algos))}.", file=place
        )
    for half in HALVES.get(group.algo, ()):
        if half not in group.tensors:
            has = next(iter(group.tensors.values())).name
            raise MisfitError(
                f"{module!r} has {has!r} and not its other half.",
                hint="Fetch the file again, or train it anew.",
                file=place,
                tensor=has,
            )


def _deltas(
    module: str,
    group: Group,
    known: Recognised,
    part: Part,
    configs: Mapping[str, AdapterConfig],
) -> Iterator[Delta]:
    placed = known.places[module]
    tensors = {r: stored(part, i) for r, i in group.tensors.items() if r != "alpha"}
    config = configs.get(placed.component, configs[""])
    alpha: Values | float | None = None
    if "alpha" in group.tensors:
        alpha = stored(part, group.tensors["alpha"])
    elif config.raw and group.algo == "lora":
        name = prefix_of(module)[1]
        alpha = _alpha(placed.module or name, tensors["a"].shape[0], config)
    delta = Delta(placed.component, placed.module, group.algo, tensors, alpha, config.rslora)
    if placed.found is None or known.family == LANGUAGE:
        yield delta
    else:
        yield from parts_of(delta, placed.found, known.namespace)


def _in_metadata(metadata: Mapping[str, str], place: Path) -> dict[str, AdapterConfig]:
    """The configs that Diffusers puts into the header, by component."""
    try:
        plain = json.loads(metadata.get(METADATA, "{}"))
    except ValueError as error:
        raise InputError(f"has {METADATA} that is no JSON.", file=place) from error
    found: dict[str, dict[str, Any]] = {}
    for key, value in plain.items() if isinstance(plain, dict) else ():
        component, _, name = key.partition(".")
        found.setdefault(component, {})[name] = value
    return {c: AdapterConfig(raw, place) for c, raw in found.items()}


def _alpha(module: str, rank: int, config: AdapterConfig) -> float:
    """The alpha that PEFT reads a module with."""
    scaling = config.scaling(module, rank)
    return float(scaling * (np.sqrt(rank) if config.rslora else rank))
