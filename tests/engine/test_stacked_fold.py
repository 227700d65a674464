"""Folds of stacked matrices: their rows are those of all experts, and blocks heed no border."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import lorakit
from lorakit.adapter.load import load_recipe
from lorakit.engine.fold import Slab, blocks_of, fold_block
from lorakit.engine.plan import Plan
from lorakit.engine.preflight import peak_memory
from lorakit.store.safetensors import SafetensorsFile
from tests.engine.cases import contents, gaussian, read, save

COUNT, OUT, INNER, RANK = 8, 700, 300, 2
EXPERTS = "model.layers.0.mlp.experts"
NAME = f"{EXPERTS}.down_proj"
Make = Callable[..., Path]


class StoppedError(Exception):
    pass


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda **options: scene(tmp_path, **options)


def scene(
    folder: Path,
    *,
    turned: bool = False,
    single: bool = False,
    dtype: Any = ml_dtypes.bfloat16,
    shape: tuple[int, int, int, int] = (COUNT, OUT, INNER, RANK),
) -> Path:
    """A base with one stack and an adapter: of all experts, or a pair of factors for each."""
    count, out, inner, rank = shape
    (folder / "base").mkdir()
    (folder / "adapter").mkdir()
    stack = gaussian(0, (count, inner, out) if turned else (count, out, inner)).astype(dtype)
    other = gaussian(1, (40, 40)).astype(dtype)
    save(folder / "base/model.safetensors", {"a.weight": other, NAME: stack, "z.weight": other})
    (folder / "base/config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    config: dict[str, Any] = {"peft_type": "LORA", "r": rank, "lora_alpha": 3}
    prefix = f"base_model.model.{EXPERTS}"
    if single:
        tensors = {}
        for e in range(count):
            tensors[f"{prefix}.{e}.down_proj.lora_A.weight"] = gaussian(2 + e, (rank, inner))
            tensors[f"{prefix}.{e}.down_proj.lora_B.weight"] = gaussian(99 + e, (out, rank))
    else:
        config |= {"target_parameters": ["experts.down_proj"], "target_modules": []}
        tensors = {
            f"{prefix}.lora_A.weight": gaussian(2, (rank * count, inner)),
            f"{prefix}.lora_B.weight": gaussian(3, (out, rank * count)),
        }
    save_file(tensors, folder / "adapter/adapter_model.safetensors")
    (folder / "adapter/adapter_config.json").write_text(json.dumps(config))
    return folder


def exact(folder: Path, *, turned: bool, single: bool) -> np.ndarray[Any, Any]:
    """The merged stack in float64."""
    base = read(folder / "base/model.safetensors")[NAME].astype(np.float64)
    tensors = read(folder / "adapter/adapter_model.safetensors")
    count, rank = len(base), json.loads((folder / "adapter/adapter_config.json").read_text())["r"]
    for e in range(count):
        if single:
            a, b = (
                next(t for k, t in tensors.items() if f".{e}.down_proj.lora_{x}" in k) for x in "AB"
            )
        else:
            a, b = (next(t for k, t in tensors.items() if f"lora_{x}" in k) for x in "AB")
            a, b = a[rank * e : rank * e + rank], b[:, e::count]
        step = 3 / rank * (b.astype(np.float64) @ a.astype(np.float64))
        base[e] += step.T if turned else step
    return base


def plan_of(folder: Path) -> Plan:
    plan: Plan = lorakit.plan_merge(folder / "base", folder / "adapter").plan
    return plan


def merge(folder: Path, out: str, **run: Any) -> Any:
    options = lorakit.RunOptions(sync=False, **run)
    return lorakit.merge(folder / "base", folder / "adapter", folder / out, run=options)


def weights(folder: Path, out: str) -> bytes:
    return contents(folder / out)["model.safetensors"]


kinds = pytest.mark.parametrize("single", [False, True], ids=["stacked", "single"])
ways = pytest.mark.parametrize("turned", [False, True], ids=["straight", "turned"])


@kinds
@ways
def test_blocks_that_cut_experts_give_the_algebra_rounded_once(
    make: Make, turned: bool, single: bool
) -> None:
    folder = make(turned=turned, single=single)
    (fold,) = plan_of(folder).folds
    height = fold.rows // COUNT
    borders = {start % height for start, _ in blocks_of(fold)}
    assert (fold.leading, fold.rows) == (2, COUNT * (INNER if turned else OUT))
    assert len(borders) > 2  # blocks begin within experts
    report = merge(folder, "out", jobs=2)
    right = exact(folder, turned=turned, single=single)
    got = read(folder / "out/model.safetensors")[NAME].astype(np.float64)
    unit = np.exp2(np.floor(np.log2(abs(right))) - 7)
    assert (abs(got - right) <= unit / 2 + 2.0**-21 * abs(right).max()).all()
    base = read(folder / "base/model.safetensors")[NAME].astype(np.float64)
    (figures,) = report.to_dict()["figures"].values()
    landed, delta = got - base, right - base
    assert figures["max_change"] == pytest.approx(abs(landed).max(), rel=1e-6)
    assert figures["retained"] == pytest.approx((landed * delta).sum() / (delta**2).sum(), rel=1e-5)
    assert not lorakit.verify(folder / "out", full=True).differences


@kinds
@ways
@pytest.mark.parametrize("jobs", [2, 5])
def test_the_number_of_workers_changes_no_byte_and_no_figure(
    make: Make, turned: bool, single: bool, jobs: int
) -> None:
    folder = make(turned=turned, single=single)
    one, many = merge(folder, "one", jobs=1), merge(folder, "many", jobs=jobs)
    assert weights(folder, "one") == weights(folder, "many")
    assert one.to_dict()["figures"] == many.to_dict()["figures"]


@kinds
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    make: Make, single: bool, share: float
) -> None:
    folder = make(single=single)
    whole = merge(folder, "whole", jobs=2)
    limit, seen = share * plan_of(folder).nbytes, 0

    def report(count: int) -> None:
        nonlocal seen
        seen += count
        if seen > limit:
            raise StoppedError

    with pytest.raises(StoppedError):
        merge(folder, "out", jobs=2, report=report)
    assert not (folder / "out").exists() or not (folder / "out/model.safetensors").exists()
    again = merge(folder, "out", jobs=1)
    assert weights(folder, "out") == weights(folder, "whole")
    assert again.to_dict()["figures"] == whole.to_dict()["figures"]


@kinds
@ways
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_the_memory_that_is_planned_is_enough(
    make: Make, turned: bool, single: bool, dtype: Any
) -> None:
    """What loading the factors and one worker allocate, where factors are most of it."""
    folder = make(turned=turned, single=single, dtype=dtype, shape=(64, 96, 128, 64))
    plan = plan_of(folder)
    (fold,) = plan.folds
    base = SafetensorsFile(folder / "base/model.safetensors")
    sources = [SafetensorsFile(folder / "adapter/adapter_model.safetensors")]
    load_recipe(fold.recipe, sources)  # what is made once and kept
    tracemalloc.start()
    recipe = load_recipe(fold.recipe, sources)
    _, loading = tracemalloc.get_traced_memory()
    slab = Slab()
    for rows in blocks_of(fold):
        fold_block(fold, recipe, base, rows, slab)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert loading <= fold.recipe["nbytes"]
    assert peak <= peak_memory(plan, 1) - peak_memory(Plan("test", [], {}, []), 1)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_limit_on_memory_changes_no_byte(make: Make, jobs: int) -> None:
    folder = make()
    limit = peak_memory(plan_of(folder), jobs)
    merge(folder, "tight", jobs=4, max_memory=limit)
    merge(folder, "wide", jobs=4)
    assert weights(folder, "tight") == weights(folder, "wide")
