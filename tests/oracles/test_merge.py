"""A merge is the algebra in float64, rounded once, for every kind of adapter; and nothing else."""

import json
import re
import shutil
import sys
from math import sqrt
from pathlib import Path

import numpy as np
import pytest

from lorakit import RunOptions, plan_merge
from lorakit.errors import InputError, MisfitError
from tests.oracles.algebra import expected, replaced
from tests.oracles.case import CRASHES, Built
from tests.oracles.conftest import Build, Merge
from tests.oracles.merging import merge
from tests.oracles.reading import (
    Array,
    read_dtypes,
    read_files,
    read_json,
    read_tensors,
)
from tests.oracles.rounding import rounded, spacing
from tests.oracles.zoo import CASES, LINEAR, TRANSPOSED

pytest.importorskip("peft", minversion="0.21")
# A sum of ten products in float32 is off by a few of its units; this is four, of the largest.
SLACK = 2.0**-22
HALF = [case.name for case in CASES if case.dtype != "float32"]
RIGHT = [case.name for case in CASES if case.dtype != "float32" and not case.peft_fault]


def labels(count: int) -> dict[str, dict[str, object]]:
    names = {str(i): f"LABEL_{i}" for i in range(count)}
    return {"id2label": names, "label2id": {name: int(i) for i, name in names.items()}}


# What is no longer true in the config of the base; everything is, for the other cases.
NEW_HEAD = labels(5) | {"architectures": ["LlamaForSequenceClassification"]}
FACTS = {
    "head-of-another-size": labels(7),
    "head-new": NEW_HEAD,
    "names-raw-dump-saved": NEW_HEAD,
    "vocabulary-resized": {"vocab_size": 72},
    "vocabulary-resized-and-saved": {"vocab_size": 70},
    "vocabulary-resized-and-targeted": {"vocab_size": 72},
}


def assert_close(folder: Path, exact: dict[str, Array], *operands: dict[str, Array]) -> None:
    """Every number within half a unit in the last place and the error of float32 arithmetic."""
    codes, ours = read_dtypes(folder), read_tensors(folder)
    assert ours.keys() == exact.keys()
    for name, values in exact.items():
        largest = max(abs(part[name]).max() for part in (exact, *operands))
        allowed = spacing(values, codes[name]) / 2 + SLACK * largest
        assert (abs(ours[name] - values) <= allowed).all(), name


def wrong(tensors: dict[str, Array], case: Built) -> tuple[int, int]:
    """How many numbers are not the exact result, rightly rounded; and how many were changed."""
    base, codes = read_tensors(case.base), read_dtypes(case.base)
    exact = expected(case.base, case.plain)
    touched = [n for n in base if n in exact and not np.array_equal(exact[n], base[n])]
    right = {name: rounded(exact[name], codes[name]).astype(float) for name in touched}
    misses = sum(int((right[name] != tensors[name]).sum()) for name in touched)
    return misses, sum(right[name].size for name in touched)


def test_every_number_is_the_exact_one_rounded_once(case: Built, merged: Merge) -> None:
    exact, before = expected(case.base, case.plain), replaced(case.base, case.plain)
    delta = {name: exact[name] - before[name] for name in exact}
    assert_close(merged(case), exact, before, delta)


def test_next_to_no_number_is_rounded_the_wrong_way(built: Build, merged: Merge) -> None:
    counts = [wrong(read_tensors(merged(built(name))), built(name)) for name in HALF]
    misses, numbers = (sum(column) for column in zip(*counts, strict=True))
    sys.stdout.write(f"{misses} of {numbers} changed numbers are rounded the wrong way.\n")
    assert misses <= 1e-4 * numbers


def test_no_more_are_rounded_the_wrong_way_than_by_peft(built: Build, merged: Merge) -> None:
    counts = {True: [0, 0], False: [0, 0]}  # with DoRA and without: by lorakit, by PEFT
    for case in map(built, RIGHT):
        for i, tensors in enumerate((read_tensors(merged(case)), read_tensors(case.peft))):
            counts["use_dora" in case.case.lora][i] += wrong(tensors, case)[0]
    sys.stdout.write(f"By lorakit and by PEFT: {counts[False]}, and {counts[True]} with DoRA.\n")
    assert counts[False][0] <= counts[False][1]
    # The two take norms in another order: equal but for luck, of which this is three sigma.
    assert counts[True][0] <= counts[True][1] + 3 * sqrt(counts[True][1])


def test_linear_layers_are_those_of_peft_bit_for_bit(built: Build, merged: Merge) -> None:
    differing = numbers = 0
    for name in (c.name for c in (*LINEAR, *TRANSPOSED) if c.dtype != "float32"):
        ours, theirs = read_tensors(merged(built(name))), read_tensors(built(name).peft)
        differing += sum(int((ours[tensor] != theirs[tensor]).sum()) for tensor in theirs)
        numbers += sum(values.size for values in theirs.values())
    sys.stdout.write(f"{differing} of {numbers} numbers differ from those of PEFT.\n")
    assert differing <= 1e-5 * numbers


def test_whatever_peft_merges_rightly_is_within_a_unit_of_it(case: Built, merged: Merge) -> None:
    if case.case.peft_fault == CRASHES:
        pytest.skip("PEFT crashes when it merges this")
    ours, theirs = read_tensors(merged(case)), read_tensors(case.peft)
    codes, before = read_dtypes(case.peft), replaced(case.base, case.plain)
    for name, values in theirs.items():
        operand = np.maximum(abs(values), np.maximum(abs(before[name]), abs(values - before[name])))
        allowed = spacing(values, codes[name]) + 2 * SLACK * operand.max()
        if case.case.peft_fault:
            allowed += spacing(operand, codes[name])
        assert (abs(ours[name] - values) <= allowed).all(), name


def test_what_the_adapter_does_not_touch_keeps_its_bytes(case: Built, merged: Merge) -> None:
    base, exact = read_tensors(case.base), expected(case.base, case.plain)
    after = read_files(merged(case))
    for file, tensors in read_files(case.base).items():
        for name, stored in tensors.items():
            if name in exact and np.array_equal(base[name], exact[name]):
                assert after[file][name] == stored, name


def test_files_names_order_and_dtypes_are_the_bases(case: Built, merged: Merge) -> None:
    before, after = read_files(case.base), read_files(merged(case))
    exact = expected(case.base, case.plain)
    assert list(before) == list(after)
    heads = [name for name in exact if not any(name in tensors for tensors in before.values())]
    for file, there in before.items():
        tensors = {n: t for n, t in there.items() if n in exact}
        added = heads if file == list(before)[-1] else []
        assert list(after[file]) == [*tensors, *added]
        assert [after[file][n].dtype for n in tensors] == [t.dtype for t in tensors.values()]
        assert {n: t.shape for n, t in after[file].items()} == {
            n: exact[n].shape for n in after[file]
        }


def test_the_index_is_true(case: Built, merged: Merge) -> None:
    name = "model.safetensors.index.json"
    assert (merged(case) / name).exists() == (case.base / name).exists()
    if (case.base / name).exists():
        index, files = read_json(merged(case) / name), read_files(merged(case))
        assert index["weight_map"] == {n: file for file, there in files.items() for n in there}
        total = sum(len(t.data) for there in files.values() for t in there.values())
        assert index["metadata"]["total_size"] == total


def test_the_config_says_what_is_so_and_changes_in_nothing_else(case: Built, merged: Merge) -> None:
    facts = FACTS.get(case.case.name, {})
    before, after = case.base / "config.json", merged(case) / "config.json"
    assert read_json(after) == read_json(before) | facts
    assert facts or before.read_bytes() == after.read_bytes()


@pytest.mark.parametrize("weight", [-0.6, 0.0])
def test_a_weight_multiplies_the_whole_change(case: Built, tmp_path: Path, weight: float) -> None:
    base, once = read_tensors(case.base), expected(case.base, case.plain)
    if {n: v.shape for n, v in base.items()} != {n: v.shape for n, v in once.items()}:
        with pytest.raises(MisfitError, match=r"no weight but 1"):
            merge(case, tmp_path / "out", weights=[weight])
        assert not list(tmp_path.iterdir())
    else:
        merge(case, tmp_path / "out", weights=[weight])
        exact = expected(case.base, case.plain, weights=[weight])
        delta = {name: once[name] - base[name] for name in base}
        assert_close(tmp_path / "out", exact, base, delta)


@pytest.mark.parametrize("name", ["linear", "dora", "conv1d", "lora-bias", "tokens-dict", "t5"])
def test_a_wider_dtype_keeps_what_rounding_would_lose(
    built: Build, tmp_path: Path, name: str
) -> None:
    case = built(name)
    merge(case, tmp_path / "out", dtype="float32")
    assert set(read_dtypes(tmp_path / "out").values()) == {"F32"}
    assert_close(tmp_path / "out", expected(case.base, case.plain), read_tensors(case.base))


STRAYS = {
    "a module that is not there": ("model.layers.9.self_attn.q_proj.lora_A.weight", (4, 32)),
    "a tensor of no known kind": ("model.layers.0.self_attn.q_proj.gate", (4,)),
    "a bias the layer does not have": ("model.layers.0.self_attn.q_proj.lora_B.bias", (32,)),
}


def with_stray(case: Built, stray: str, folder: Path) -> tuple[Path, str]:
    """The adapter of a case with one thing more in it, and the module that the thing is of."""
    from safetensors.numpy import load_file, save_file

    name, shape = STRAYS[stray]
    shutil.copytree(case.adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[f"base_model.model.{name}"] = np.ones(shape, np.float32)
    if "lora_A" in name:
        tensors[f"base_model.model.{name}".replace("_A", "_B")] = np.ones(shape[::-1], np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder, name.rpartition(".lora")[0] or name


@pytest.mark.parametrize("stray", STRAYS)
def test_a_tensor_that_finds_no_place_stops_the_merge(
    built: Build, tmp_path: Path, stray: str
) -> None:
    adapter, module = with_stray(built("linear"), stray, tmp_path / "adapter")
    with pytest.raises(MisfitError) as error:
        plan_merge(built("linear").base, adapter)
    assert module in str(error.value)


@pytest.mark.parametrize("stray", STRAYS)
def test_what_may_be_left_out_is_left_out_and_named(
    built: Build, merged: Merge, tmp_path: Path, stray: str
) -> None:
    case = built("linear")
    adapter, module = with_stray(case, stray, tmp_path / "adapter")
    job = plan_merge(case.base, adapter, allow_unmatched=re.escape(module))
    assert [note for note in job.plan.notes if module in note]
    job.run(tmp_path / "out", RunOptions(sync=False))
    assert read_files(tmp_path / "out") == read_files(merged(case))


def test_what_has_a_place_is_never_left_out(built: Build, merged: Merge, tmp_path: Path) -> None:
    merge(built("linear"), tmp_path / "out", allow_unmatched=".*")
    assert read_files(tmp_path / "out") == read_files(merged(built("linear")))


@pytest.mark.parametrize("init", ["loftq", "pissa_niter_16"])
def test_an_adapter_of_a_residual_base_is_merged_into_that_on_request(
    built: Build, merged: Merge, tmp_path: Path, init: str
) -> None:
    case = built("linear")
    shutil.copytree(case.adapter, tmp_path / "adapter")
    config = read_json(case.adapter / "adapter_config.json") | {"init_lora_weights": init}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="--base-is-residual"):
        plan_merge(case.base, tmp_path / "adapter")
    job = plan_merge(case.base, tmp_path / "adapter", base_is_residual=True)
    job.run(tmp_path / "out", RunOptions(sync=False))
    assert read_files(tmp_path / "out") == read_files(merged(case))


def test_names_that_do_not_meet_are_an_error_without_a_key_map(
    built: Build, tmp_path: Path
) -> None:
    case = built("vit-of-transformers-5")
    shutil.copytree(case.base, tmp_path / "base")
    config = read_json(case.base / "config.json") | {"model_type": "vit_of_mine"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MisfitError, match="--key-map") as error:
        plan_merge(tmp_path / "base", case.adapter)
    assert "'vit.layers.0.attention" in str(error.value)
    assert "'vit.encoder.layer.0.attention" in str(error.value)


def test_names_of_another_release_of_a_known_family_need_no_key_map(
    built: Build, merged: Merge, tmp_path: Path
) -> None:
    case = built("vit-of-transformers-5")
    plan_merge(case.base, case.adapter).run(tmp_path / "out", RunOptions(sync=False))
    assert read_files(tmp_path / "out") == read_files(merged(case))
