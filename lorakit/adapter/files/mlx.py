"""The adapter folder of MLX-LM: factors transposed, one rank and one scale for all modules.

Law: what is written has the update of every module. Ranks are filled up with zeros, which is exact;
scalings that differ from the common one are multiplied into B, which is exact for powers of two.

Source: ml-explore/mlx-lm, mlx_lm/tuner/{lora,dora,utils}.py
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.adapter.config import LARGEST
from lorakit.adapter.config import NAME as CONFIG
from lorakit.adapter.delta import Delta, Opened, Values
from lorakit.adapter.files.joints import check_joints, check_norms
from lorakit.adapter.files.mlx_experts import experts_of, is_stack, stack_called
from lorakit.adapter.files.spelling import Step, Tensors
from lorakit.adapter.files.stacking import count_of, parted, stacked, uniform
from lorakit.adapter.files.values import common, moved, stored
from lorakit.errors import InputError, MisfitError, about
from lorakit.formats.embeddings import is_embedding
from lorakit.formats.llama_cpp import language_in
from lorakit.formats.mlx import ENDINGS, ROLES
from lorakit.formats.recognise import LANGUAGE
from lorakit.store.checkpoint import open_part
from lorakit.store.json_file import read_json
from lorakit.tensors import TensorInfo

Config = Mapping[str, Any]
LAYER = re.compile(r"(?:^|\.)layers\.\d+\.(.+)$")


def read_mlx(file: Path) -> Opened:
    """The adapter in a weight file with its config beside it, from its headers.

    Raises:
        InputError: it is corrupt, has no config, or that has no scale.
        MisfitError: a tensor does not go with the others of its module.
    """
    part, scale = open_part(file), _scale(file)
    groups: dict[str, dict[str, TensorInfo]] = {}
    extras: dict[str, TensorInfo] = {}  # of full fine-tunes
    for name, info in part.infos.items():
        module, _, ending = name.rpartition(".")
        if ending in ROLES:
            groups.setdefault(module, {})[ROLES[ending]] = info
        else:
            extras[name] = info
    deltas: list[Delta] = []
    with about(file):
        for module, infos in groups.items():
            if is_stack(module, infos):
                found = experts_of(module, infos, part)
                deltas += [_delta(name, tensors, scale) for name, tensors in found]
            elif any(len(i.shape) > 2 for i in infos.values()):
                extras |= {i.name: i for i in infos.values()}
            else:
                turned = {r: _turned(stored(part, i)) for r, i in infos.items()}
                deltas.append(_delta(module, turned, scale))
    carried = {n: stored(part, i) for n, i in extras.items()}
    return Opened("mlx", LANGUAGE, "disk", tuple(deltas), carried)


def _delta(module: str, tensors: Mapping[str, Values], scale: float) -> Delta:
    if not {"a", "b"} <= tensors.keys():
        raise MisfitError(f"{module!r} lacks one of its factors.")
    alpha = scale * tensors["a"].shape[0]
    delta = Delta("", module, "lora", tensors, alpha, embedding=is_embedding(module))
    check_joints(delta)
    return delta


def _scale(file: Path) -> float:
    """What all updates are multiplied with; the config has it and the weights have not."""
    beside = file.parent / CONFIG
    if not beside.is_file():
        raise InputError(
            f"has factors of MLX-LM, and no {CONFIG} beside it, which has their scale.",
            hint="Add the one that the training wrote.",
            file=file,
        )
    parameters = read_json(beside).get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not abs(scale) <= LARGEST:
        raise InputError("has no lora_parameters with a scale, a finite number.", file=beside)
    return float(scale)


def mlx_tensors(deltas: Sequence[Delta], config: Config) -> list[Tensors]:
    """The modules of an adapter as MLX has them: one rank, one scale. The config of the base tells
    how many experts there are.

    Raises:
        MisfitError: a module is none of a language model's, or has what MLX does not.
    """
    for delta in deltas:
        _check(delta)
    check_embeddings(deltas)
    check_norms(deltas, "mlx")
    rank = max(d.rank for d in deltas)
    scale = common(d.scaling for d in deltas)
    rest, stacks = parted(deltas)
    config = language_in(config)
    made = [_of_one(d, rank, scale) for d in rest]
    return made + [_of_experts(p, e, (rank, scale), config) for p, e in stacks.items()]


def mlx_config(made: Sequence[Tensors]) -> dict[str, Any]:
    """What lies beside them: kind, number of layers, rank, scale and the names within a layer.

    MLX counts layers from the last one, which an adapter does not tell: -1 means all of them.
    """
    deltas = [t.delta for t in made if t.delta is not None]
    names = [t.step.name for t in made]
    places = [LAYER.search(name) for name in names]
    keys = [p[1] if p else name for p, name in zip(places, names, strict=True)]
    first = deltas[0]
    return {
        "fine_tune_type": "dora" if "magnitude" in first.tensors else "lora",
        "num_layers": -1,
        "lora_parameters": {
            "rank": first.rank,
            "scale": first.scaling,
            "dropout": 0.0,
            "keys": sorted(set(keys)),
        },
    }


def check_embeddings(deltas: Iterable[Delta]) -> None:
    """Refuse DoRA on an embedding, whose norms MLX has for each token and PEFT for each column.

    Raises:
        MisfitError: naming it.
    """
    if found := next((d for d in deltas if d.embedding and "magnitude" in d.tensors), None):
        raise MisfitError(
            f"{found.module!r} is an embedding with DoRA norms, which MLX has of its rows and PEFT "
            "of its columns.",
            hint="Leave it out with --drop.",
            tensor=found.module,
        )


def _check(delta: Delta) -> None:
    strange = sorted(delta.tensors.keys() - ENDINGS.keys())
    if delta.component or delta.algo != "lora" or strange:
        what = f"has {strange[0]}" if strange else "is of no language model"
        raise MisfitError(f"{delta.module!r} {what}, which MLX has no place for.")
    if any(len(v.shape) > 2 for v in delta.tensors.values()):
        raise MisfitError(f"{delta.module!r} is no linear layer, and MLX adapts no others.")


def _of_one(delta: Delta, rank: int, scale: float) -> Tensors:
    made, error = uniform(delta, rank, scale)
    how = "folded" if delta.scaling != scale else "renamed"
    named = {f"{delta.module}.{ENDINGS[r]}": _turned(v) for r, v in made.tensors.items()}
    return Tensors(Step(delta.module, (delta.module,), how, error), named, made)


def _of_experts(
    place: tuple[str, str], experts: Mapping[int, Delta], form: tuple[int, float], config: Config
) -> Tensors:
    """The stack of a projection of experts, which are not transposed.

    Raises:
        MisfitError: MLX has none of this name, or not all experts are known.
    """
    first, name = next(iter(experts.values())), stack_called(*place)
    if not name or any("magnitude" in d.tensors for d in experts.values()):
        raise MisfitError(
            f"{first.module!r} is an expert "
            + ("with DoRA norms, which MLX has not." if name else "of a kind that is not known."),
            hint="Leave experts out with --drop, or merge the adapter.",
            tensor=first.module,
        )
    count = count_of(experts, config)
    made = {n: uniform(d, *form) for n, d in experts.items()}
    values = stacked({n: d for n, (d, _) in made.items()}, count)
    step = Step(
        name,
        tuple(d.module for d in experts.values()),
        "fused",
        max(error for _, error in made.values()),
    )
    return Tensors(step, {f"{name}.{ENDINGS[r]}": v for r, v in values.items()}, made[min(made)][0])


def _turned(old: Values) -> Values:
    if len(old.shape) < 2:
        return old
    return moved(old, np.transpose, old.shape[::-1])
