"""Replicated layers: every copy a layer of its own in the result, with its own update."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorakit
from lorakit import RunOptions
from lorakit.errors import InputError, MisfitError
from tests.oracles.reading import Array, read_files, read_json, read_tensors
from tests.oracles.test_merge import assert_close
from tests.oracles.trap_algebra import expected
from tests.oracles.trap_files import Files, made, quietly

pytest.importorskip("peft", minversion="0.21")
SCRATCH = RunOptions(sync=False)
RANGES = [[0, 2], [1, 4], [3, 4]]  # of four layers
SOURCES = [0, 1, 1, 2, 3, 3]
TARGETS = ["q_proj", "down_proj"]
LAYER = re.compile(r"(model\.layers)\.(\d+)\.(.*)")


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    lora = {"target_modules": TARGETS, "layer_replication": RANGES}
    return made(tmp_path_factory.mktemp("layers"), "qwen2", lora, dtype=request.param)


@pytest.fixture
def merged(files: Files, tmp_path: Path) -> Path:
    lorakit.merge(files.base, files.adapter, tmp_path / "out", run=SCRATCH)
    return tmp_path / "out"


def by_source(tensors: Mapping[str, Any], sources: list[int]) -> dict[str, Any]:
    """The tensors of a stack rebuilt by hand."""
    found = {name: values for name, values in tensors.items() if not LAYER.fullmatch(name)}
    for new, old in enumerate(sources):
        for name, values in tensors.items():
            match = LAYER.fullmatch(name)
            if match and int(match[2]) == old:
                found[f"{match[1]}.{new}.{match[3]}"] = values
    return found


def logits(model: Any) -> Array:
    import torch

    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        found: Array = model.eval()(ids, use_cache=False).logits.double().numpy()
    return found


def test_every_copy_is_its_source_and_its_own_update(files: Files, merged: Path) -> None:
    rebuilt = by_source(read_tensors(files.base), SOURCES)
    exact = expected(rebuilt, files.adapter)
    first, copy = (exact[f"model.layers.{i}.mlp.down_proj.weight"] for i in (1, 2))
    assert not np.array_equal(first, copy)
    assert_close(merged, exact, rebuilt)
    assert not lorakit.verify(merged, full=True).differences


def test_what_is_not_adapted_has_the_bytes_of_its_source(files: Files, merged: Path) -> None:
    before = {n: t for there in read_files(files.base).values() for n, t in there.items()}
    after = {n: t for there in read_files(merged).values() for n, t in there.items()}
    rebuilt = by_source(before, SOURCES)
    assert after.keys() == rebuilt.keys()
    same = [n for n in after if after[n] == rebuilt[n]]
    assert sorted(set(after) - set(same)) == [
        n for n in sorted(after) if re.search("q_proj.w|down", n)
    ]


def test_the_config_and_the_index_tell_of_the_new_stack(files: Files, merged: Path) -> None:
    before, after = (read_json(folder / "config.json") for folder in (files.base, merged))
    kinds = [before["layer_types"][i] for i in SOURCES]
    assert after == before | {"num_hidden_layers": 6, "layer_types": kinds}
    index, there = read_json(merged / "model.safetensors.index.json"), read_files(merged)
    assert index["weight_map"] == {n: file for file, names in there.items() for n in names}
    sizes = [len(t.data) for names in there.values() for t in names.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert list(there) == list(read_files(files.base))


def test_the_merged_model_answers_as_the_adapted_one_which_peft_merges_wrongly(
    files: Files, merged: Path
) -> None:
    from peft import PeftModel

    if files.dtype != "float32":
        pytest.skip("compared in float32")
    with quietly("layers"):
        adapted = PeftModel.from_pretrained(files.load(), files.adapter)
        kinds = adapted.config.layer_types  # which PEFT leaves as it was, and so too short
        adapted.config.layer_types = [kinds[i] for i in SOURCES]
        exact = logits(adapted)
        with adapted.disable_adapter():
            effect = abs(exact - logits(adapted)).max()
        theirs = abs(logits(adapted.merge_and_unload()) - exact).max()
        ours = abs(logits(files.load(merged)) - exact).max()
    assert ours < 1e-4 * effect
    assert theirs > 0.1 * effect


def test_a_weight_and_a_second_adapter_of_the_same_stack(files: Files, tmp_path: Path) -> None:
    out, rebuilt = tmp_path / "out", by_source(read_tensors(files.base), SOURCES)
    lorakit.merge(files.base, [files.adapter] * 2, out, weights=[0.75, -0.5], run=SCRATCH)
    assert_close(out, expected(rebuilt, files.adapter, weight=0.25), rebuilt)


def test_new_shards_and_a_single_file_hold_the_same(files: Files, tmp_path: Path) -> None:
    exact = expected(by_source(read_tensors(files.base), SOURCES), files.adapter)
    lorakit.merge(files.base, files.adapter, tmp_path / "out", max_shard_size=30_000, run=SCRATCH)
    lorakit.merge(files.base, files.adapter, tmp_path / "one.safetensors", run=SCRATCH)
    assert_close(tmp_path / "out", exact)
    assert_close(tmp_path / "one.safetensors", exact)


def replicating(files: Files, folder: Path, ranges: Any) -> Path:
    shutil.copytree(files.adapter, folder)
    config = read_json(folder / "adapter_config.json") | {"layer_replication": ranges}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("other", [None, [[0, 4], [2, 4]]], ids=["none", "another"])
def test_adapters_of_two_stacks_are_refused(files: Files, tmp_path: Path, other: Any) -> None:
    second = replicating(files, tmp_path / "second", other)
    for pair in ([files.adapter, second], [second, files.adapter]):
        with pytest.raises(MisfitError, match="layer_replication"):
            lorakit.merge(files.base, pair, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "ranges", [[[0, 5]], [[2, 2]], [[-1, 3]], [[3, 1]], [[0]], [0, 4]], ids=str
)
def test_ranges_that_are_none_of_the_base_are_refused(
    files: Files, tmp_path: Path, ranges: Any
) -> None:
    adapter = replicating(files, tmp_path / "adapter", ranges)
    with pytest.raises(InputError, match="layer_replication") as error:
        lorakit.merge(files.base, adapter, tmp_path / "out")
    assert error.value.exit_code == 3
    assert not (tmp_path / "out").exists()


def test_an_update_of_a_layer_that_the_stack_lacks_is_refused(files: Files, tmp_path: Path) -> None:
    shorter = replicating(files, tmp_path / "adapter", [[0, 2], [1, 4]])
    with pytest.raises(MisfitError, match=r"layers\.5\."):
        lorakit.merge(files.base, shorter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
