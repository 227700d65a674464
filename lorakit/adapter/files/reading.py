"""A LoRA file of any format, from its headers: every tensor in the module that it belongs to.

Law: every tensor of the file is in a delta, or among the extras.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.adapter.config import NAME, AdapterConfig, read_config
from lorakit.adapter.delta import Delta, Opened
from lorakit.adapter.files.joints import check_joints
from lorakit.adapter.files.mlx import read_mlx
from lorakit.adapter.files.named import Naming, named_by_base, renamed_groups
from lorakit.adapter.files.parts import parts_of
from lorakit.adapter.files.torchtune import Recipe, read_torchtune
from lorakit.adapter.files.tuned import scaled
from lorakit.adapter.files.values import stored, times
from lorakit.adapter.tuners import TUNERS, as_lora_config
from lorakit.adapter.weight_file import is_mlx, weight_file
from lorakit.errors import InputError, MisfitError, about
from lorakit.formats.components import prefix_of
from lorakit.formats.families import FAMILIES
from lorakit.formats.grouping import Group, extents, format_of, grouped
from lorakit.formats.mlx import in_mlx_names
from lorakit.formats.peft import PREFIX
from lorakit.formats.recognise import LANGUAGE, Placed, Recognised, recognise
from lorakit.formats.templates import filled
from lorakit.formats.torchtune import is_torchtune
from lorakit.store.checkpoint import Part, open_part
from lorakit.store.safetensors import SafetensorsFile

SCALED_BIAS = ".lora_B.bias"  # which PEFT multiplies with the rest
EMBEDDING = ".lora_embedding_"
METADATA = "lora_adapter_metadata"  # of Diffusers, in the header


def open_file(
    path: str | Path,
    *,
    family: str = "",
    allow_pickle: bool = False,
    recipe: Recipe | None = None,
    naming: Naming | None = None,
) -> Opened:
    """The adapter in a file or folder of any format that is known.

    `family` is a key of `lorakit.formats.families.FAMILIES`, or "language", for names that several
    families have. `recipe` is what a file of torchtune does not say, `naming` tells of names that
    no family has.

    Raises:
        InputError: it is not there, corrupt, or no adapter.
        MisfitError: a module lacks one of its factors, or has tensors of two algorithms, or
            two are for one place.
    """
    place = weight_file(Path(path))
    if is_mlx(place):
        return read_mlx(place)
    part = open_part(place, allow_pickle=allow_pickle)
    if in_mlx_names(part.infos):
        return read_mlx(place)
    if is_torchtune(part.infos):
        return read_torchtune(place, part, recipe or Recipe())
    groups, extras = grouped(part.infos.values(), place)
    if not groups:
        raise InputError("has no tensors of an adapter.", file=place)
    spelled = list(groups)
    groups = renamed_groups(groups, naming, place) if naming else groups
    groups = _in_component(groups, place.parent, family)
    known = recognise(list(groups), extents(groups), family=family)
    if naming and known.unknown and str(naming.base) and family in ("", LANGUAGE):
        known = named_by_base(known, groups, naming.base, place)
    metadata = dict(part.metadata) if isinstance(part, SafetensorsFile) else {}
    config = _beside(place)
    form = format_of(part.infos, spelled, known, peft=bool(config.raw.get("peft_type")))
    configs = {"": config, **(_in_metadata(metadata, place) if form != "peft" else {})}
    placed = {module: group for module, group in groups.items() if module in known.places}
    with about(place):
        _check_places(known)
        deltas = tuple(d for m, g in placed.items() for d in _deltas(m, g, known, part, configs))
    carried = {n: stored(part, i) for n, i in extras.items()}
    carried |= {i.name: stored(part, i) for m in known.unknown for i in groups[m].tensors.values()}
    names = (form, known.family, known.namespace)
    tuner = config.peft_type if config.peft_type in TUNERS else ""
    said = as_lora_config(config) if tuner else dict(config.raw)
    return Opened(*names, deltas, carried, metadata, said, known.others, tuner)


def _in_component(groups: dict[str, Group], folder: Path, family: str) -> dict[str, Group]:
    """The modules of a folder of PEFT's that is called as a text encoder of the family: it is for
    that, as what is called as nothing is for the denoiser.
    """
    known = family in FAMILIES and FAMILIES[family].encoder(folder.name)
    if not known or not (folder / NAME).is_file():
        return groups
    return {f"{folder.name}.{m.removeprefix(PREFIX)}": g for m, g in groups.items()}


def _beside(place: Path) -> AdapterConfig:
    """The config beside a weight file; an empty one where there is none.

    Raises:
        InputError: it is of factors that are not one pair a module.
    """
    if not (place.parent / NAME).is_file():
        return AdapterConfig()
    config = read_config(place.parent)
    if any(config.enable_lora):
        raise InputError(
            "is of PEFT before 0.3, with factors of parts of a fused projection (enable_lora).",
            hint=f"lorakit extract BASE --adapter {place} -o OUT --rank R makes a plain one.",
            file=config.file,
        )
    return config


def _check_places(known: Recognised) -> None:
    """Refuse two modules of a file for one of the model, of which the last would count alone.

    Raises:
        MisfitError: naming both.
    """
    taken: dict[tuple[str, str], str] = {}
    for name, placed in known.places.items():
        for module in _meant(placed):
            other = taken.setdefault((placed.component, module), name)
            if other != name:
                raise MisfitError(
                    f"{other!r} and {name!r} are both for {module!r}.",
                    hint="Save the file again with one of them; two would have to be one update.",
                    tensor=name,
                )


def _meant(placed: Placed) -> tuple[str, ...]:
    """The modules that one of the file is for; a fused projection is for all of its parts."""
    if placed.found is None:
        return (placed.module,)
    row, numbers, part = placed.found.row, placed.found.numbers, placed.found.part
    return tuple(filled(p, numbers) for p in (row.parts if part is None else row.parts[part:][:1]))


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
    alpha = stored(part, group.tensors["alpha"]) if "alpha" in group.tensors else None
    delta = Delta(placed.component, placed.module, group.algo, tensors, alpha, config.rslora)
    name = placed.module or prefix_of(module)[1]
    if config.peft_type in TUNERS:
        delta = scaled(delta, config, name)
    elif "diag" in tensors:
        raise MisfitError(
            f"{tensors['diag'].key!r} belongs to AdaLoRA, whose scaling no config beside it says.",
            hint=f"Add the {NAME} that the training wrote.",
            tensor=tensors["diag"].key,
        )
    check_joints(delta)
    if delta.alpha is None and config.raw and group.algo == "lora":
        delta = replace(delta, alpha=_alpha(name, tensors["a"].shape[0], config))
    if group.algo == "lora" and EMBEDDING in group.tensors["a"].name:
        delta = replace(delta, embedding=True)
    if placed.found:
        delta = replace(delta, kernel=placed.found.row.kernel)
    if (bias := tensors.get("bias")) and bias.key.endswith(SCALED_BIAS) and group.algo == "lora":
        applied, _ = times(bias, delta.scaling)
        delta = replace(delta, tensors={**tensors, "bias": applied})
    if placed.found is None or known.family == LANGUAGE:
        yield delta
    else:
        yield from parts_of(delta, placed.found)


def check_header(opened: Opened, place: Path) -> None:
    """Refuse a file whose header says of its factors what they do not say themselves.

    Raises:
        InputError: naming it, and the way out.
    """
    told = _in_metadata(opened.metadata, place) if opened.format != "peft" else {}
    for config in told.values():
        config.check(base_is_residual=True)
        if config.mutation:
            raise InputError(
                f"was trained on a base that {config.mutation!r} changed, by its header.",
                hint="Save it with PEFT (save_pretrained), whose config is read for that.",
                file=place,
            )


def _in_metadata(metadata: Mapping[str, str], place: Path) -> dict[str, AdapterConfig]:
    """The configs that Diffusers puts into the header, by component: that of a lone model, whose
    fields have no component before them, under "".
    """
    try:
        plain = json.loads(metadata.get(METADATA, "{}"))
    except ValueError as error:
        raise InputError(f"has {METADATA} that is no JSON.", file=place) from error
    found: dict[str, dict[str, Any]] = {}
    for key, value in plain.items() if isinstance(plain, dict) else ():
        component, _, name = key.rpartition(".")
        found.setdefault(component, {})[name] = value
    return {c: AdapterConfig(raw, place) for c, raw in found.items()}


def _alpha(module: str, rank: int, config: AdapterConfig) -> float:
    """The alpha that PEFT reads a module with."""
    scaling = config.scaling(module, rank)
    return float(scaling * (np.sqrt(rank) if config.rslora else rank))
