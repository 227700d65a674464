"""A plan is decided from headers, and its hash stands for the bytes of its output."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lorakit
from lorakit.engine.plan import BLOCK, STEP, Copy, Fold
from lorakit.store.header import format_header
from lorakit.tensors import TensorInfo
from tests.engine.cases import gaussian, save
from tests.store.test_checkpoint import save_index

MODULES = [f"model.layers.{i}.q_proj" for i in range(3)]


@pytest.fixture
def inputs(tmp_path):
    """A base of two shards and a PEFT adapter for it."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    shards = {"model-00001-of-00002.safetensors": [0, 1], "model-00002-of-00002.safetensors": [2]}
    for file, layers in shards.items():
        save(base / file, {f"{MODULES[i]}.weight": gaussian(i, (24, 16)) for i in layers})
    save_index(base, {f"{MODULES[i]}.weight": f for f, layers in shards.items() for i in layers})
    (base / "config.json").write_text('{"model_type": "llama"}')
    save_adapter(adapter)
    return tmp_path


def save_adapter(folder, seed=7):
    factors = {}
    for i, module in enumerate(MODULES[1:]):
        factors[f"base_model.model.{module}.lora_A.weight"] = gaussian(seed + i, (2, 16))
        factors[f"base_model.model.{module}.lora_B.weight"] = gaussian(seed - i, (24, 2))
    save(folder / "adapter_model.safetensors", factors)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def planned(inputs, **options):
    return lorakit.plan_merge(inputs / "base", inputs / "adapter", **options).plan


def test_the_same_inputs_and_options_give_the_same_plan_and_hash(inputs):
    first, second = planned(inputs), planned(inputs)
    assert first.to_dict() == second.to_dict()
    assert first.hash == second.hash


def test_copies_of_the_inputs_elsewhere_give_the_same_hash(inputs):
    shutil.copytree(inputs, inputs / "copy", ignore=shutil.ignore_patterns("copy"))
    assert planned(inputs / "copy").hash == planned(inputs).hash


def test_a_plan_is_plain_data(inputs):
    data = planned(inputs).to_dict()
    assert json.loads(json.dumps(data)) == data


@pytest.mark.parametrize(
    "options",
    [
        {"weights": [0.5]},
        {"weights": [-1]},
        {"dtype": "float16"},
        {"max_shard_size": 2000},
        {"alone": "model.safetensors"},
        {"link": True},
    ],
    ids=str,
)
def test_every_option_that_changes_the_output_changes_the_hash(inputs, options):
    assert planned(inputs, **options).hash != planned(inputs).hash


def test_other_adapter_bytes_change_the_hash_though_no_header_does(inputs):
    before = planned(inputs)
    save_adapter(inputs / "adapter", seed=8)
    after = planned(inputs)
    assert before.files == after.files
    assert before.hash != after.hash


def test_another_header_of_the_base_changes_the_hash(inputs):
    before = planned(inputs).hash
    path = inputs / "base" / "model-00001-of-00002.safetensors"
    tensors = {f"{MODULES[i]}.weight": gaussian(i, (24, 16)) for i in (0, 1)}
    save(path, tensors, note="trained a little longer")
    assert planned(inputs).hash != before


def test_workers_memory_and_place_of_the_output_are_no_part_of_the_plan(inputs):
    before = planned(inputs).hash
    runs = [lorakit.RunOptions(jobs=1), lorakit.RunOptions(jobs=3, max_memory=1 << 31, sync=False)]
    reports = [
        lorakit.merge(inputs / "base", inputs / "adapter", inputs / f"out{i}", run=run)
        for i, run in enumerate(runs)
    ]
    assert {r.plan for r in reports} == {before}


def bytes_read() -> int:
    """By this process since it began."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_planning_reads_no_weight_of_the_base(inputs):
    (inputs / "base" / "model.safetensors.index.json").unlink()
    for path in (inputs / "base").glob("*.safetensors"):
        path.unlink()
    infos = [TensorInfo(f"{m}.weight", "BF16", (24, 16)) for m in MODULES]
    infos.append(TensorInfo("model.embed_tokens.weight", "BF16", (1 << 16, 1 << 11)))
    header = format_header(infos, {})
    with (inputs / "base" / "model.safetensors").open("wb") as f:
        f.write(header)
        f.truncate(len(header) + sum(i.nbytes for i in infos))  # 256 MiB of nothing
    before = bytes_read()
    plan = planned(inputs)
    assert bytes_read() - before < 1 << 20
    assert [type(s) for f in plan.files for s in f.steps] == [Copy, Fold, Fold, Copy]


@pytest.mark.parametrize("cols", [1, 700, STEP, BLOCK, 3 * BLOCK])
def test_blocks_and_steps_are_whole_rows_of_a_bounded_size(cols):
    info = TensorInfo("w", "BF16", (1000, cols))
    fold = Fold(info, "base", info)
    assert fold.block_rows >= 1
    assert fold.block_rows * cols <= max(BLOCK, cols)
    assert fold.step_rows * cols <= max(STEP, cols)
    assert (fold.block_rows + 1) * cols > BLOCK


def test_a_plan_knows_what_it_writes(inputs):
    plan = planned(inputs)
    report = lorakit.merge(inputs / "base", inputs / "adapter", inputs / "out")
    sizes = {f.name: (inputs / "out" / f.name).stat().st_size for f in plan.files}
    assert sizes == {f.name: f.size for f in plan.files}
    assert plan.nbytes == sum(sizes.values()) == report.written
    assert [f.tensor.name for f in plan.folds] == [f"{m}.weight" for m in MODULES[1:]]
    assert np.isfinite(report.retained)


def test_the_parts_of_a_plan_pass_between_processes_as_they_are():
    info = TensorInfo("w", "BF16", (3, 4, 5), 8)
    fold = Fold(replace(info, dtype="F32"), "base", info, {"of": ["w"]}, whole=True, leading=2)
    assert pickle.loads(pickle.dumps((info, fold))) == (info, fold)
