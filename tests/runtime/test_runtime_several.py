"""Several adapters on one model: which are active and how much, for a batch and row by row."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import lorakit
from lorakit.errors import UsageError
from lorakit.runtime import (
    active_adapters,
    add_weighted_adapter,
    attach,
    delete_adapter,
    disable_adapter,
    merge_adapter,
    mixed_batch,
    set_adapter,
    unload,
    unmerge_adapter,
)
from tests.runtime import making
from tests.runtime.live import RELATIVE, answer, far, no_hooks, shown, unchanged
from tests.verbs.adapters import pair, save

LORA = {
    "a": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "b": {"target_modules": "all-linear", "r": 2, "use_rslora": True},
    "c": {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True},
    "d": {"trainable_token_indices": [5, 9]},
}


@dataclass(frozen=True)
class Files:
    base: Path
    adapters: dict[str, Path]

    def model(self, *names: str) -> torch.nn.Module:
        """The base with these adapters, the first of them active."""
        model = making.load(self.base)
        for name in names:
            attach(model, self.adapters[name], name)
        return model

    def alone(self, name: str) -> torch.Tensor:
        """What the model with this one adapter answers."""
        return answer(self.model(name))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("several")
    base = making.llama(folder / "base")
    adapters = {
        name: making.trained(making.load(base), folder / name, seed, **lora)
        for seed, (name, lora) in enumerate(LORA.items())
    }
    return Files(base, adapters)


def test_the_first_adapter_is_active_and_another_is_chosen_by_name(files: Files) -> None:
    model = files.model("a", "b", "c", "d")
    assert active_adapters(model) == {"a": 1.0}
    assert torch.equal(answer(model), files.alone("a"))
    for name in ("b", "c", "d", "a"):
        set_adapter(model, name)
        assert active_adapters(model) == {name: 1.0}
        assert torch.equal(answer(model), files.alone(name))


def test_several_that_are_active_are_those_of_peft(files: Files) -> None:
    from peft import PeftModel

    theirs = PeftModel.from_pretrained(making.load(files.base), files.adapters["a"], "a").eval()
    theirs.load_adapter(files.adapters["b"], "b")
    theirs.base_model.set_adapter(["a", "b"])
    model = files.model("a", "b")
    set_adapter(model, ["a", "b"])
    assert far(answer(model), answer(theirs.base_model.model)) < RELATIVE


@pytest.mark.parametrize("weights", [{"a": 0.7, "b": 0.3}, {"a": -1.0, "b": 2.0, "c": 0.5}])
def test_weights_are_those_of_a_merge_of_files(
    files: Files, tmp_path: Path, weights: dict[str, float]
) -> None:
    model = files.model(*weights)
    set_adapter(model, weights)
    assert active_adapters(model) == weights
    ours = answer(model)
    adapters = [files.adapters[name] for name in weights]
    lorakit.merge(files.base, adapters, tmp_path / "out", weights=list(weights.values()))
    assert far(ours, answer(making.load(tmp_path / "out"))) < RELATIVE
    with unchanged(model):
        assert merge_adapter(model).weights == weights
        assert far(answer(model), ours) < RELATIVE
        assert active_adapters(model) == weights
        unmerge_adapter(model)
    assert torch.equal(answer(model), ours)


def test_a_disabled_model_is_the_base_until_the_block_ends(files: Files) -> None:
    model = files.model("a", "c")
    set_adapter(model, {"a": 0.5, "c": 1.0})
    ours = answer(model)
    with disable_adapter(model):
        assert torch.equal(answer(model), answer(making.load(files.base)))
    assert torch.equal(answer(model), ours)


def test_no_adapter_may_be_active(files: Files) -> None:
    model = files.model("a")
    set_adapter(model, [])
    assert active_adapters(model) == {}
    attach(model, files.adapters["b"], "b")  # which is not the first
    assert active_adapters(model) == {}
    assert torch.equal(answer(model), answer(making.load(files.base)))


def test_each_row_of_a_batch_goes_through_the_adapter_named_for_it(files: Files) -> None:
    model = files.model("a", "b", "c", "d")
    names = ["b", "__base__", "a", "c", "b", "d"]
    inputs = shown(model, rows=len(names))
    plain = answer(making.load(files.base), **inputs)
    alone = {name: answer(files.model(name), **inputs) for name in LORA} | {"__base__": plain}
    with mixed_batch(model, adapter_names=names):
        mixed = answer(model, **inputs)
    for row, name in enumerate(names):
        assert far(mixed[row], alone[name][row]) < RELATIVE
    assert active_adapters(model) == {"a": 1.0}


@pytest.mark.parametrize(
    ("kind", "module"), [("xlnet", "layer.0.ff"), ("switch", "mlp.experts.expert_1.wi")]
)
def test_layers_that_get_no_rows_one_after_another_are_refused(
    tmp_path: Path, kind: str, module: str
) -> None:
    model: torch.nn.Module = torch.nn.Linear(4, 4)
    for name in reversed(module.split(".")):
        model = torch.nn.ModuleDict({name: model})
    model.config = {"model_type": kind}
    attach(model, save(tmp_path / "adapter", pair(module, 4, 4, 2)))
    with (
        pytest.raises(UsageError, match="is not given the rows of a batch one after another"),
        mixed_batch(model, ["default", "__base__"]),
    ):
        pass


def test_a_bias_of_the_head_that_peft_saved_unasked_is_in_nobodys_way(tmp_path: Path) -> None:
    from transformers import PhiConfig, PhiForCausalLM

    def load() -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return PhiForCausalLM(PhiConfig(**making.SIZES)).eval()

    adapter = making.trained(load(), tmp_path / "adapter", target_modules=["lm_head"])
    attach(model := load(), adapter)
    ours = answer(model)
    with mixed_batch(model, ["default", "__base__"]):
        mixed = answer(model)
    assert torch.equal(mixed[1], answer(load())[1])
    assert far(mixed[0], ours[0]) < RELATIVE


def test_each_row_that_is_generated_goes_through_its_adapter_with_beams_too(files: Files) -> None:
    model = files.model("a", "b")
    ids = shown(model, rows=3)["input_ids"]
    options = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    with mixed_batch(model, adapter_names=["b", "__base__", "a"]):
        mixed = model.generate(ids, **options)
    for row, name in enumerate(["b", None, "a"]):
        one = files.model(*([name] if name else [])).generate(ids[row : row + 1], **options)
        assert torch.equal(mixed[row : row + 1], one)


def test_one_that_is_not_active_is_deleted_and_leaves_no_trace(files: Files) -> None:
    model = files.model("a", "b")
    delete_adapter(model, "b")
    assert torch.equal(answer(model), files.alone("a"))
    attach(model, files.adapters["c"], "b")
    set_adapter(model, "b")
    delete_adapter(model, "a")
    assert torch.equal(answer(model), files.alone("c"))
    unload(model)
    assert no_hooks(model)


def test_unloading_takes_all_of_them_off_merged_ones_too(files: Files) -> None:
    model = making.load(files.base, "bfloat16")
    with unchanged(model):
        for name in LORA:
            attach(model, files.adapters[name], name)
        set_adapter(model, {"a": 0.7, "c": 0.3, "d": 1.0})
        merge_adapter(model)
        assert unload(model) is model
    assert no_hooks(model)


@pytest.mark.parametrize("method", ["cat", "svd", "linear", "ties"])
def test_a_weighted_combination_is_one_adapter_more(
    files: Files, tmp_path: Path, method: str
) -> None:
    model = files.model("a", "b")
    options = {"method": method, "rank": None if method == "cat" else 4}
    options |= {"density": 0.5} if method == "ties" else {}
    if method == "linear":
        attach(model, files.adapters["a"], "a2")
    names = ["a", "a2" if method == "linear" else "b"]
    report = add_weighted_adapter(model, dict(zip(names, [0.7, 0.3], strict=True)), "ab", **options)
    assert len(report.rows) >= 6
    set_adapter(model, "ab")
    folders = [files.adapters[name[0]] for name in names]
    lorakit.combine(folders, tmp_path / "ab", weights=[0.7, 0.3], **options)
    other = making.load(files.base)
    attach(other, tmp_path / "ab")
    assert far(answer(model), answer(other)) < RELATIVE
    if method == "cat":
        set_adapter(model, {"a": 0.7, "b": 0.3})
        assert far(answer(other), answer(model)) < RELATIVE


def test_a_copy_of_a_model_has_adapters_of_its_own(files: Files) -> None:
    from copy import deepcopy

    model = files.model("a", "b")
    other = deepcopy(model)
    set_adapter(other, "b")
    assert torch.equal(answer(model), files.alone("a"))
    assert torch.equal(answer(other), files.alone("b"))
    unload(other)
    assert torch.equal(answer(model), files.alone("a"))
    assert torch.equal(answer(other), answer(making.load(files.base)))
