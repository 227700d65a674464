"""Models that are compiled, saved and loaded while adapters are on them."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit.runtime import (
    attach,
    merge_adapter,
    save_adapter,
    set_adapter,
    swap_adapter,
    unload,
    unmerge_adapter,
)
from tests.oracles.reading import read_files
from tests.runtime import making
from tests.runtime.live import RELATIVE, answer, far, shown, unchanged

WEIGHTS = "adapter_model.safetensors"
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled")
    base = making.llama(path / "base")
    for seed, name in enumerate(("one", "two")):
        lora = {"target_modules": TARGETS, "lora_alpha": 8 * (seed + 1)}
        making.trained(making.load(base), path / name, seed, **lora)
        making.trained(making.load(base), path / f"{name}-dora", seed, **lora, use_dora=True)
    return path


@pytest.mark.parametrize("kind", ["", "-dora"])
def test_weights_are_swapped_in_a_compiled_model_without_compiling_again(
    folder: Path, kind: str
) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    count = CompileCounter()
    model = making.load(folder / "base")
    attach(model, folder / f"one{kind}")
    compiled = torch.compile(model, backend=count)
    inputs = shown(model)
    first = answer(compiled, **inputs)
    graphs = count.frame_count
    assert graphs > 0
    swap_adapter(compiled, folder / f"two{kind}")
    second = answer(compiled, **inputs)
    assert count.frame_count == graphs
    for name, ours in (("one", first), ("two", second)):
        other = making.load(folder / "base")
        attach(other, folder / f"{name}{kind}")
        assert far(ours, answer(other, **inputs)) < RELATIVE


def test_a_compiled_model_is_switched_merged_and_unmerged(folder: Path) -> None:
    torch._dynamo.reset()
    model = making.load(folder / "base")
    attach(model, folder / "one", "one")
    attach(model, folder / "two", "two")
    compiled = torch.compile(model, backend="eager")
    for weights in ({"one": 1.0}, {"two": 1.0}, {"one": 0.5, "two": 0.5}):
        set_adapter(compiled, weights)
        ours = answer(compiled)
        other = making.load(folder / "base")
        for name in weights:
            attach(other, folder / name, name)
        set_adapter(other, weights)
        assert far(ours, answer(other)) < RELATIVE
        merge_adapter(compiled)
        assert far(answer(compiled), ours) < RELATIVE
        unmerge_adapter(compiled)
        assert torch.equal(answer(compiled), ours)


def test_what_is_attached_to_a_compiled_model_or_taken_off_is_seen(folder: Path) -> None:
    """Guards do not look at hooks: without a word the old graphs would run on."""
    torch._dynamo.reset()
    model = making.load(folder / "base")
    compiled = torch.compile(model, backend="eager")
    plain = answer(compiled)
    attach(model, folder / "one-dora")
    other = making.load(folder / "base")
    attach(other, folder / "one-dora")
    assert far(answer(compiled), answer(other)) < RELATIVE
    unload(compiled)
    assert torch.equal(answer(compiled), plain)


def test_layers_that_were_compiled_one_by_one_have_adapters_like_any(folder: Path) -> None:
    torch._dynamo.reset()
    lora = {"target_modules": TARGETS, "modules_to_save": ["lm_head", "input_layernorm"]}
    making.trained(making.load(folder / "base"), folder / "saved", **lora)
    for name in ("one", "saved"):
        model, other = making.load(folder / "base"), making.load(folder / "base")
        for number, layer in enumerate(model.model.layers):
            model.model.layers[number] = torch.compile(layer, backend="eager")
        with unchanged(model):
            attach(model, folder / name)
            attach(other, folder / name)
            assert far(answer(model), answer(other)) < RELATIVE
            merge_adapter(model)
            assert far(answer(model), answer(other)) < RELATIVE
            unload(model)


def test_what_is_saved_while_an_adapter_is_attached_is_the_base(
    folder: Path, tmp_path: Path
) -> None:
    model = making.load(folder / "base")
    model.save_pretrained(tmp_path / "before", max_shard_size="60KB")
    with torch.no_grad():
        keys = list(model.state_dict())
    attach(model, folder / "one-dora")
    assert list(model.state_dict()) == keys
    model.save_pretrained(tmp_path / "during", max_shard_size="60KB")
    assert read_files(tmp_path / "during") == read_files(tmp_path / "before")
    config = "config.json"
    assert (tmp_path / "during" / config).read_text() == (tmp_path / "before" / config).read_text()


@pytest.mark.parametrize("name", ["one", "one-dora"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_state_dict_is_loaded_past_an_adapter(folder: Path, name: str, compiled: bool) -> None:
    model, other = making.load(folder / "base"), making.load(making.llama(folder / "b", seed=5))
    attach(model, folder / name)
    asked = torch.compile(model, backend="eager") if compiled else model
    answer(asked, **shown(model))
    found = model.load_state_dict(other.state_dict())
    assert not found.missing_keys
    assert not found.unexpected_keys
    attach(other, folder / name)
    assert far(answer(asked, **shown(model)), answer(other)) < RELATIVE


def test_norms_are_those_of_a_weight_that_was_changed_in_place(folder: Path) -> None:
    model, other = making.load(folder / "base"), making.load(folder / "base")
    attach(model, folder / "one-dora")
    for one in (model, other):
        with torch.no_grad():
            one.model.layers[1].self_attn.q_proj.weight.mul_(2.0)
    attach(other, folder / "one-dora")
    assert torch.equal(answer(model), answer(other))


def test_a_dtype_of_the_model_leaves_no_trace_in_what_it_answers(folder: Path) -> None:
    """Moved to another dtype and back, the adapter goes along with the model."""
    model = making.load(folder / "base")
    attach(model, folder / "one")
    ours = answer(model)
    model.double()
    assert far(answer(model), ours) < RELATIVE
    model.float()
    assert far(answer(model), ours) < RELATIVE


def test_a_model_that_is_cast_while_merged_is_unmerged_in_that_dtype(folder: Path) -> None:
    model, other = making.load(folder / "base"), making.load(folder / "base")
    attach(model, folder / "one")
    merge_adapter(model)
    model.bfloat16()
    unmerge_adapter(model)
    unload(model)
    assert torch.equal(answer(model), answer(other.bfloat16()))


def test_what_was_swapped_is_saved_in_its_own_dtype(folder: Path, tmp_path: Path) -> None:
    coarse = {n: v.bfloat16() for n, v in load_file(folder / "one" / WEIGHTS).items()}
    shutil.copytree(folder / "one", tmp_path / "coarse")
    save_file(coarse, tmp_path / "coarse" / WEIGHTS, metadata={"format": "pt"})
    model, other = making.load(folder / "base"), making.load(folder / "base")
    attach(model, tmp_path / "coarse")
    swap_adapter(model, folder / "two")
    attach(other, save_adapter(model, tmp_path / "saved"))
    assert torch.equal(answer(model), answer(other))


def test_what_pissa_took_out_is_swapped_with_its_factors(folder: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        lora = {"init_lora_weights": "pissa", "lora_alpha": 4 * (seed + 1)}
        making.trained(making.load(folder / "base"), tmp_path / name, seed, **lora)
    model, other = making.load(folder / "base"), making.load(folder / "base")
    attach(model, tmp_path / "one")
    swap_adapter(model, tmp_path / "two")
    attach(other, tmp_path / "two")
    assert far(answer(model), answer(other)) < RELATIVE


def test_swapped_weights_of_a_plain_model_are_those_of_a_fresh_one(folder: Path) -> None:
    model, other = making.load(folder / "base"), making.load(folder / "base")
    with unchanged(other):
        pass
    attach(model, folder / "one-dora")
    swap_adapter(model, folder / "two-dora")
    attach(other, folder / "two-dora")
    assert far(answer(model), answer(other)) < RELATIVE
