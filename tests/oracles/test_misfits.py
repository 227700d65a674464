"""An adapter that is not wholly the base's is refused, on every architecture."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit.errors import MisfitError
from tests.oracles.architectures.case import Built
from tests.oracles.architectures.cases import CASES
from tests.oracles.architectures.keys import EXPERTS, PREFIX, target
from tests.oracles.architectures.workshop import Workshop, merge
from tests.oracles.reading import Array, read_json, read_tensors

pytest.importorskip("peft", minversion="0.21")
Tensors = dict[str, Array]
Config = Mapping[str, Any]

# One adapter of each spelling on each model.
PLAIN = [c.name for c in CASES if c.variant == "plain" and not c.untied_head]
PER_EXPERT = [c.name for c in CASES if c.name in PLAIN and c.by_hand]
STACKED = [c.name for c in CASES if c.name in PLAIN and c.lora.get("target_parameters")]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("misfits"))


def one_module_renamed(tensors: Tensors, config: Config) -> Tensors:
    """A projection of the attention, called something else."""
    module = _owner(sorted(key for key in tensors if ".self_attn." in key)[0])
    return {key.replace(f"{module}.", f"{module}_projection."): t for key, t in tensors.items()}


def experts_renamed(tensors: Tensors, config: Config) -> Tensors:
    """All experts of a layer, called something else."""
    stacks = ("experts.", "input_linear.", "output_linear.")
    layer = _layer_of(next(key for key in sorted(tensors) if any(s in key for s in stacks)))
    found = {}
    for key, values in tensors.items():
        name = key
        for stack in stacks:
            name = name.replace(f".{stack}", f".other_{stack}") if f"{layer}." in key else name
        found[name] = values
    return found


def one_expert_missing(tensors: Tensors, config: Config) -> Tensors:
    """The last expert of a layer that has any: its modules, or its part of the stacked factors."""
    layer = _layer_of(next(key for key in sorted(tensors) if ".experts." in key))
    lost = f"{layer}.", f".experts.{EXPERTS - 1}."
    return {key: t for key, t in tensors.items() if not all(part in key for part in lost)}


def one_expert_fewer(tensors: Tensors, config: Config) -> Tensors:
    """Factors of a stack that are those of one expert less."""
    key = next(k for k in sorted(tensors) if ".lora_A." in k and _is_stack(k, config))
    other = key.replace(".lora_A.", ".lora_B.")
    a, b = tensors[key], tensors[other]
    keep = len(a) // EXPERTS * (EXPERTS - 1)
    return tensors | {key: a[:keep], other: b[:, :keep]}


def one_pair_too_many(tensors: Tensors, config: Config) -> Tensors:
    """Factors for a module that the base does not have."""
    extra = f"{_owner(sorted(key for key in tensors if '.self_attn.' in key)[0])}_too"
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((4, 32)), rng.standard_normal((32, 4))
    return tensors | {f"{extra}.lora_A.weight": a, f"{extra}.lora_B.weight": b}


def one_expert_too_many(tensors: Tensors, config: Config) -> Tensors:
    """Factors for an expert after the last."""
    last = {k: t for k, t in tensors.items() if f".experts.{EXPERTS - 1}." in k}
    new = {k.replace(f".{EXPERTS - 1}.", f".{EXPERTS}."): t for k, t in last.items()}
    assert new
    return tensors | new


def one_tensor_too_many(tensors: Tensors, config: Config) -> Tensors:
    """A tensor that is no factor and that the base does not have."""
    extra = f"{_owner(sorted(key for key in tensors if '.self_attn.' in key)[0])}_too"
    return tensors | {f"{extra}.weight": np.ones((32, 32))}


def _owner(key: str) -> str:
    return key.partition(".lora_")[0]


def _layer_of(key: str) -> str:
    before, _, after = key.partition(".layers.")
    return f"{before}.layers.{after.partition('.')[0]}"


def _is_stack(key: str, config: Config) -> bool:
    return target(_owner(key).removeprefix(PREFIX), config).stacked


# What a refusal must say: the module or the tensor at fault.
NAMED = {
    one_module_renamed: "projection",
    one_pair_too_many: "_too",
    one_tensor_too_many: "_too",
    experts_renamed: "other_",
    one_expert_missing: rf"experts.*\b{EXPERTS - 1}\b",
    one_expert_too_many: rf"experts\.{EXPERTS}\.",
    one_expert_fewer: "experts|_linear",
}
FAULTS = [one_module_renamed, one_pair_too_many, one_tensor_too_many]
CASES_OF = [
    *((fault, name) for fault in FAULTS for name in PLAIN),
    *((experts_renamed, name) for name in (*PER_EXPERT, *STACKED)),
    *((fault, name) for fault in (one_expert_missing, one_expert_too_many) for name in PER_EXPERT),
    *((one_expert_fewer, name) for name in STACKED),
]


@pytest.mark.parametrize(
    ("fault", "name"), [pytest.param(f, n, id=f"{f.__name__}-{n}") for f, n in CASES_OF]
)
def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_written(
    workshop: Workshop,
    tmp_path: Path,
    fault: Callable[[Tensors, Config], Tensors],
    name: str,
) -> None:
    built = _with(workshop.built(name), fault, tmp_path)
    with pytest.raises(MisfitError, match=NAMED[fault]) as refusal:
        merge(built, tmp_path / "out")
    assert refusal.value.exit_code == 4
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def _with(built: Built, fault: Callable[[Tensors, Config], Tensors], folder: Path) -> Built:
    """The files of a case with a fault in its adapter."""
    from safetensors.numpy import save_file

    adapter = folder / "adapter"
    shutil.copytree(built.adapter, adapter)
    config, before = read_json(adapter / "adapter_config.json"), read_tensors(adapter)
    after = fault(before, config)
    assert after.keys() != before.keys() or fault is one_expert_fewer
    arrays = {key: np.ascontiguousarray(t, dtype=np.float32) for key, t in after.items()}
    save_file(arrays, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return replace(built, adapter=adapter)
