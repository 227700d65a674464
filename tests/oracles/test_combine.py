"""Every kind of adapter, combined alone and with another, changes its base as merging says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorakit
from lorakit.adapter.adapter import open_adapter
from lorakit.adapter.config import AdapterConfig
from lorakit.errors import InputError
from tests.oracles.case import Built
from tests.oracles.conftest import Build
from tests.oracles.merging import merge
from tests.oracles.reading import read_tensors
from tests.oracles.test_loading import answer
from tests.oracles.training import load

SCRATCH = lorakit.RunOptions(sync=False)
TOGETHER = [
    (["linear", "rslora"], [0.7, -0.4]),
    (["linear", "linear-all", "patterns"], [1.5, -2.0, 0.25]),
    (["linear", "dora"], [0.5, 1.0]),
    (["dora", "adapter-bfloat16-dora", "linear"], [1.0, -0.5, 2.0]),
    (["embedding", "dora-embedding"], [1.0, 0.3]),
    (["conv1d", "conv1d-dora"], [1.0, 0.6]),
    (["conv2d", "lora-bias-conv2d"], [1.0, -0.6]),
    (["attention", "attention-patterns"], [2.0, -1.0]),
    (["linear-float16", "adapter-bfloat16"], [0.9, -0.8]),
]
IN_PEFT = [
    *("linear", "patterns", "rslora", "bert", "t5", "conv1d", "embedding"),
    *("lora-bias", "dora", "conv1d-dora", "lm-head", "head-saved", "bias-all", "adapter-bfloat16"),
    *("tokens-dict", "norms-saved"),
]
WHOLE_RANK = 4096  # as much as any of these weights has


def combine(cases: list[Built], output: Path, **options: Any) -> None:
    pickled = any(not c.case.save.get("safe_serialization", True) for c in cases)
    options = {"allow_pickle": pickled, "base": cases[0].base, "dtype": "float32", **options}
    if any(config_of(c).raw.get("use_dora") for c in cases):
        options["rank"] = WHOLE_RANK  # for DoRA changes a weight in all of its ranks
    lorakit.combine([c.adapter for c in cases], output, run=SCRATCH, **options)


def config_of(case: Built) -> AdapterConfig:
    return open_adapter(str(case.adapter), allow_pickle=True).config


def assert_same_change(case: Built, expected: Path, found: Path, share: float = 1e-5) -> None:
    base, one, other = (read_tensors(p) for p in (case.base, expected, found))
    gone = base.keys() - one.keys()  # a head that a merge leaves out where it is told the task
    assert one.keys() == other.keys() - gone
    for name, values in one.items():
        here = base.get(name)
        same = here is not None and here.shape == values.shape
        before = here.astype("float64") if same else 0.0
        change, got = values.astype("float64") - before, other[name].astype("float64") - before
        assert np.linalg.norm(got - change) <= share * np.linalg.norm(change) + 1e-6, name


def test_an_adapter_combined_alone_changes_its_base_as_it_did(case: Built, tmp_path: Path) -> None:
    untie = bool(case.case.untied_head)
    if config_of(case).raw.get("use_bdlora"):
        with pytest.raises(InputError, match="BD-LoRA"):
            combine([case], tmp_path / "alone")
        return
    combine([case], tmp_path / "alone")
    merge(case, tmp_path / "expected", dtype="float32", untie=untie)
    options = {"dtype": "float32", "untie": untie, "key_map": case.case.key_map, "run": SCRATCH}
    lorakit.merge(case.base, tmp_path / "alone", tmp_path / "found", **options)
    assert_same_change(case, tmp_path / "expected", tmp_path / "found", share=3e-5)


@pytest.mark.parametrize(("names", "weights"), TOGETHER, ids=lambda v: "+".join(map(str, v)))
def test_a_merge_of_the_sum_is_a_merge_of_all(
    built: Build, tmp_path: Path, names: list[str], weights: list[float]
) -> None:
    cases = [built(name) for name in names]
    combine(cases, tmp_path / "sum", weights=weights)
    merge(cases[0], tmp_path / "expected", *cases[1:], weights=weights, dtype="float32")
    lorakit.merge(cases[0].base, tmp_path / "sum", tmp_path / "found", dtype="float32", run=SCRATCH)
    assert_same_change(cases[0], tmp_path / "expected", tmp_path / "found", share=1e-4)


@pytest.mark.parametrize("name", IN_PEFT)
def test_peft_loads_a_combined_adapter_and_answers_as_it_should(
    built: Build, tmp_path: Path, name: str
) -> None:
    import torch
    from peft import PeftModel

    case = built(name)
    wide = replace(case.case, dtype="float32")
    combine([case], tmp_path / "alone")
    expected = answer(PeftModel.from_pretrained(load(wide, case.base), case.plain))
    found = answer(PeftModel.from_pretrained(load(wide, case.base), tmp_path / "alone"))
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * scale)
