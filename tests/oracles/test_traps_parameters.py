"""Adapters of bare parameters: scalings of their own for each, and wrappers lost or too many."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorakit
from lorakit import RunOptions
from lorakit.errors import MisfitError
from tests.oracles.architectures.adapters import build
from tests.oracles.architectures.algebra import expected, on_disk
from tests.oracles.architectures.case import Built, Case
from tests.oracles.architectures.models import MODELS_BY_NAME
from tests.oracles.architectures.workshop import Workshop
from tests.oracles.reading import Array, read_tensors
from tests.oracles.test_merge import assert_close

pytest.importorskip("peft", minversion="0.21")
SCRATCH = RunOptions(sync=False)
STACKS = ["experts.gate_up_proj", "experts.down_proj"]
BIASES = ["experts.gate_up_proj_bias", "experts.down_proj_bias"]
EVERYWHERE: dict[str, Any] = {
    "use_rslora": True,
    "rank_pattern": {"gate_up_proj": 2, "down_proj": 3, "mlp.gate.weight": 5, "q_proj": 1},
    "alpha_pattern": {r"layers\.1\..*gate_up_proj": 10, "down_proj": 3.5, "mlp.gate.weight": 2},
}
BY_EXPERT: dict[str, Any] = {
    "use_rslora": True,
    "rank_pattern": {"{gate}": 2, r"experts\.[01]\.{down}": 3},
    "alpha_pattern": {r"layers\.1\..*{up}": 10, r"experts\.2\.{gate}": 1.5},
}
BIASED: dict[str, Any] = {
    "use_rslora": True,
    "rank_pattern": {"gate_up_proj": 2, "gate_up_proj_bias": 3, "down_proj_bias": 1},
    "alpha_pattern": {"gate_up_proj_bias": 9, "down_proj": 3.5, "down_proj_bias": 0.5},
}


def by_expert(gate: str, up: str, down: str) -> dict[str, Any]:
    def filled(patterns: dict[str, Any]) -> dict[str, Any]:
        named = (("{gate}", gate), ("{up}", up), ("{down}", down))
        for short, leaf in named:
            patterns = {p.replace(short, leaf): v for p, v in patterns.items()}
        return patterns

    lora = {k: v if v is True else filled(v) for k, v in BY_EXPERT.items()}
    return {"target_modules": [gate, up, down], **lora}


def _case(model: str, names: str, lora: dict[str, Any], **options: Any) -> Case:
    return Case(model, names, "every scaling", lora, **options)


STACKED = [
    _case(m, "v5", {"target_modules": ["q_proj"], "target_parameters": targets, **EVERYWHERE})
    for m, targets in (
        ("qwen3-moe", [*STACKS, "mlp.gate.weight"]),
        ("mixtral", [*STACKS, "mlp.gate.weight"]),
        ("gpt-oss", STACKS),
        ("llama4", STACKS),
    )
]
ALONE = [
    _case(model, "v4", by_expert(*leaves), by_hand=rf".*\.experts\.\d\.({'|'.join(leaves)})")
    for model, leaves in (
        ("qwen3-moe", ("gate_proj", "up_proj", "down_proj")),
        ("mixtral", ("w1", "w3", "w2")),
    )
]
OSS = _case(
    "gpt-oss", "biases", {"target_modules": [], "target_parameters": [*STACKS, *BIASES], **BIASED}
)
ROUTER = _case(
    "qwen3-moe", "router", {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}
)
# PEFT names the experts by mere leaves then, and the router by its module; it sets the rank and the
# alpha of the fused ones itself.
LINEAR: dict[str, Any] = {
    "use_rslora": True,
    "rank_pattern": {"down_proj": 3, "mlp.gate.weight": 5, "q_proj": 1},
    "alpha_pattern": {"down_proj": 3.5, "mlp.gate.weight": 2},
}
ALL_LINEAR = [
    _case(m, "all-linear", {"target_modules": "all-linear", **LINEAR})
    for m in ("qwen3-moe", "mixtral")
]
MADE = (*STACKED, *ALONE, OSS, ROUTER, *ALL_LINEAR)
CASES = {f"{case.model}-{case.names}": case for case in MADE}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    workshop = Workshop(tmp_path_factory.mktemp("parameters"))
    done: dict[str, Built] = {}

    def once(name: str) -> Built:
        if name not in done:
            case = CASES[name]
            base, kind = workshop.base(case.model), MODELS_BY_NAME[case.model]
            done[name] = Built(case, kind, base, build(case, kind, base, workshop.root / name))
        return done[name]

    return once


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_has_its_own_rank_alpha_and_root(
    built: Callable[[str], Built], tmp_path: Path, name: str
) -> None:
    files, out = built(name), tmp_path / "out"
    lorakit.merge(files.base, files.adapter, out, run=SCRATCH)
    base, steps = read_tensors(files.base), on_disk(files)
    assert_close(out, expected(files), base, {n: steps.get(n, w) for n, w in base.items()})
    assert not lorakit.verify(out, full=True).differences


def test_four_parameters_of_one_module_lie_behind_three_wrappers_to_none(
    built: Callable[[str], Built],
) -> None:
    levels = {k.count("base_layer") for k in read_tensors(built("gpt-oss-biases").adapter)}
    assert levels == {0, 1, 2, 3}


def without_level(level: int) -> Callable[[dict[str, Array]], dict[str, Array]]:
    def fault(tensors: dict[str, Array]) -> dict[str, Array]:
        lost = f"layers.0.mlp.experts{'.base_layer' * level}.lora_"
        return {k: t for k, t in tensors.items() if lost not in k}

    return fault


def one_level_more(tensors: dict[str, Array]) -> dict[str, Array]:
    deepest = "layers.0.mlp.experts" + ".base_layer" * 3
    new = {k.replace(deepest, deepest + ".base_layer"): t for k, t in tensors.items()}
    return tensors | new


def two_levels_swapped(tensors: dict[str, Array]) -> dict[str, Array]:
    deep, flat = (f"layers.0.mlp.experts{'.base_layer' * n}.lora_" for n in (3, 1))
    swap = {deep: flat, flat: deep}
    return {
        next((k.replace(x, y) for x, y in swap.items() if x in k), k): t for k, t in tensors.items()
    }


def an_extra_key(tensors: dict[str, Array]) -> dict[str, Array]:
    a, b = np.ones((4, 32)), np.ones((32, 4))
    extra = "base_model.model.model.layers.0.mlp.other.lora_{}.weight"
    return tensors | {extra.format("A"): a, extra.format("B"): b}


FAULTS = {
    **{f"level {n} lost": without_level(n) for n in range(4)},
    "a level more": one_level_more,
    "two swapped": two_levels_swapped,
    "an extra key": an_extra_key,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrapper_that_is_lost_or_too_many_is_a_misfit(
    built: Callable[[str], Built], tmp_path: Path, fault: str
) -> None:
    from safetensors.numpy import save_file

    files = built("gpt-oss-biases")
    adapter = shutil.copytree(files.adapter, tmp_path / "adapter")
    before = read_tensors(adapter)
    after = FAULTS[fault](before)
    arrays = {k: np.ascontiguousarray(t, np.float32) for k, t in after.items()}
    save_file(arrays, adapter / "adapter_model.safetensors")
    with pytest.raises(MisfitError, match=r"layers\.0\.mlp") as error:
        lorakit.merge(files.base, adapter, tmp_path / "out")
    assert error.value.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_scalings_of_experts_that_patterns_disagree_on_are_told(
    built: Callable[[str], Built], tmp_path: Path
) -> None:
    """PEFT puts its own pattern for the fused experts before one that the user gave."""
    files = built("qwen3-moe-all-linear")
    adapter = shutil.copytree(files.adapter, tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["alpha_pattern"]["experts.gate_up_proj"] = 7
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    notes = lorakit.plan_merge(files.base, adapter).notes
    told = [n for n in notes if "disagree on 'model.layers.0.mlp.experts.gate_up_proj'" in n]
    assert len(told) == 1
