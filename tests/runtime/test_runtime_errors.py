"""What makes no sense is refused in one clear line, and the model is left as it was."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorakit import runtime
from lorakit.errors import InputError, LorakitError, MisfitError, UsageError
from tests.runtime import making
from tests.runtime.live import RELATIVE, answer, far, no_hooks, unchanged

Act = Callable[[Any, Path], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("errors")
    base = making.llama(path / "base")
    making.trained(making.load(base), path / "one")
    making.trained(making.load(base), path / "two", r=2)
    making.trained(making.load(base), path / "pissa", init_lora_weights="pissa")
    making.trained(making.load(base), path / "head", modules_to_save=["lm_head"])
    making.trained(making.load(base), path / "head-too", modules_to_save=["lm_head"])
    making.trained(making.load(making.llama(path / "wide", hidden_size=128)), path / "wider")
    spoil(path / "one", path / "broken", lambda x: x.fill_(float("nan")))
    return path


def spoil(source: Path, target: Path, change: Callable[[Any], Any]) -> None:
    shutil.copytree(source, target)
    tensors = load_file(source / "adapter_model.safetensors")
    change(next(iter(tensors.values())))
    save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})


def twice(model: Any, at: Path) -> None:
    runtime.merge_adapter(model)
    runtime.merge_adapter(model)


def while_merged(then: Act) -> Act:
    def act(model: Any, at: Path) -> None:
        runtime.merge_adapter(model)
        then(model, at)

    return act


def two_heads(model: Any, at: Path) -> None:
    runtime.attach(model, at / "head", "head")
    runtime.attach(model, at / "head-too", "head-too")
    runtime.set_adapter(model, ["head", "head-too"])


def head_in_a_batch(model: Any, at: Path) -> None:
    runtime.attach(model, at / "head", "head")
    with runtime.mixed_batch(model, ["head", "default"]):
        answer(model)


def around(model: Any) -> torch.nn.Module:
    return torch.nn.ModuleDict({"part": model})


def rows(model: Any, at: Path) -> None:
    with runtime.mixed_batch(model, ["default"] * 3):
        answer(model)


def meanwhile(within: Callable[[Any], Any], then: Callable[[Any], Any]) -> Act:
    def act(model: Any, at: Path) -> None:
        with within(model):
            then(model)

    return act


def loaded_under_pissa(model: Any, at: Path) -> None:
    runtime.attach(model, at / "pissa", "pissa")
    model.load_state_dict(model.state_dict())


REFUSED: dict[str, tuple[type[LorakitError], str, Act]] = {
    "unknown to set": (UsageError, "no adapter 'x'", lambda m, _: runtime.set_adapter(m, "x")),
    "unknown to delete": (
        *(UsageError, "no adapter 'x'; attached: 'default'"),
        lambda m, _: runtime.delete_adapter(m, "x"),
    ),
    "unknown to save": (
        *(UsageError, "no adapter 'x'"),
        lambda m, at: runtime.save_adapter(m, at / "saved", "x"),
    ),
    "unknown to combine": (
        *(UsageError, "no adapter 'x'"),
        lambda m, _: runtime.add_weighted_adapter(m, {"default": 1.0, "x": 1.0}, "new"),
    ),
    "unknown to swap": (
        *(UsageError, "no adapter 'x'"),
        lambda m, at: runtime.swap_adapter(m, at / "one", "x"),
    ),
    "a weight that is no number": (
        *(UsageError, "a weight is nan"),
        lambda m, _: runtime.set_adapter(m, {"default": float("nan")}),
    ),
    "attached twice": (
        *(UsageError, "an adapter 'default' already"),
        lambda m, at: runtime.attach(m, at / "two"),
    ),
    "combined under a name that is taken": (
        *(UsageError, "an adapter 'default' already"),
        lambda m, _: runtime.add_weighted_adapter(m, {"default": 1.0}, "default"),
    ),
    "the name of no adapter": (
        *(UsageError, "'__base__'"),
        lambda m, at: runtime.attach(m, at / "two", "__base__"),
    ),
    "delete the active one": (
        *(UsageError, "'default' is active"),
        lambda m, _: runtime.delete_adapter(m, "default"),
    ),
    "merged twice": (UsageError, "merged already: 'default'", twice),
    "attach while merged": (
        *(UsageError, "merged: 'default'"),
        while_merged(lambda m, at: runtime.attach(m, at / "two", "two")),
    ),
    "switch while merged": (
        *(UsageError, "merged: 'default'"),
        while_merged(lambda m, _: runtime.set_adapter(m, "default")),
    ),
    "unmerged when not merged": (
        *(UsageError, "no adapter is merged"),
        lambda m, _: runtime.unmerge_adapter(m),
    ),
    "a way to quantise that there is not": (
        *(UsageError, "quant is 'no'"),
        lambda m, _: runtime.merge_and_unload(m, quant="no"),
    ),
    "attached around a part that has one": (
        *(UsageError, "attached to a part of this model, or to one"),
        lambda m, at: runtime.attach(around(m), at / "two", "two"),
    ),
    "of another shape": (
        *(MisfitError, "self_attn.q_proj"),
        lambda m, at: runtime.attach(m, at / "wider", "wider"),
    ),
    "of another architecture": (
        *(MisfitError, "lm_head"),
        lambda m, at: runtime.attach(making.load(at / "base").model, at / "head"),
    ),
    "attached to a part of the model": (
        *(UsageError, "attached to a part of this model, or to one"),
        lambda m, at: runtime.attach(m.model, at / "two", "two"),
    ),
    "factors in a dtype that there is not": (
        *(UsageError, "dtype is 'bfloat16', not one of float32, float64"),
        lambda m, at: runtime.attach(m, at / "two", "two", dtype="bfloat16"),
    ),
    "merged in a mixed batch": (
        *(UsageError, "for a while only"),
        meanwhile(lambda m: runtime.mixed_batch(m, ["default", "__base__"]), runtime.merge_adapter),
    ),
    "merged while disabled": (
        *(UsageError, "for a while only"),
        meanwhile(runtime.disable_adapter, runtime.merge_and_unload),
    ),
    "deleted while disabled": (
        *(UsageError, "for a while only"),
        meanwhile(runtime.disable_adapter, lambda m: runtime.delete_adapter(m, "default")),
    ),
    "other weights while merged": (
        *(UsageError, "adapters are merged. Call unmerge_adapter, then load again"),
        while_merged(lambda m, _: m.load_state_dict(m.state_dict())),
    ),
    "other weights under what was taken out": (
        *(UsageError, "what the initialisation of 'pissa' took out"),
        loaded_under_pissa,
    ),
    "nan": (MisfitError, "NaN", lambda m, at: runtime.attach(m, at / "broken", "broken")),
    "not there": (
        *(InputError, "no such file or folder"),
        lambda m, at: runtime.attach(m, at / "nowhere", "nowhere"),
    ),
    "swapped for another rank": (
        *(MisfitError, "not those of 'default'"),
        lambda m, at: runtime.swap_adapter(m, at / "two"),
    ),
    "two heads at once": (MisfitError, "both replace 'lm_head.weight'", two_heads),
    "a head in a mixed batch": (UsageError, "cannot differ within a batch", head_in_a_batch),
    "names for other rows": (UsageError, "named for 3 rows, the batch has 2", rows),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_a_clear_line_and_nothing_is_left_of_it(folder: Path, name: str) -> None:
    error, message, act = REFUSED[name]
    model = making.load(folder / "base")
    with unchanged(model):
        runtime.attach(model, folder / "one")
        ours = answer(model)
        with pytest.raises(error) as refused:
            act(model, folder)
        assert message in str(refused.value)
        assert "\n" not in str(refused.value)
        if runtime.active_adapters(model) and name not in ("merged twice",):
            assert torch.allclose(answer(model), ours, atol=1e-5)
        runtime.unload(model)
    assert no_hooks(model)


def test_nothing_to_merge_or_switch_is_an_error(folder: Path) -> None:
    model = making.load(folder / "base")
    for act in (runtime.merge_adapter, runtime.merge_and_unload):
        with pytest.raises(UsageError, match="no adapter is active"):
            act(model)
    with pytest.raises(UsageError, match="attached: none"):
        runtime.set_adapter(model, "default")
    assert runtime.unload(model) is model


def test_a_model_without_data_is_refused(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder / "base"))
    with pytest.raises(InputError, match="has no data"):
        runtime.attach(model, folder / "one")
    assert no_hooks(model)


def test_an_original_that_cannot_be_restored_does_not_happen_when_a_merge_fails(
    folder: Path,
) -> None:
    """A merge that stops half way takes out what it put in."""
    model = making.load(folder / "base")
    with unchanged(model):
        runtime.attach(model, folder / "one")
        ours = answer(model)
        layer = model.model.layers[1].self_attn.v_proj
        factor = layer.lorakit.changes[0][1]._parameters.pop("a")
        with pytest.raises(KeyError):
            runtime.merge_adapter(model)
        layer.lorakit.changes[0][1]._parameters["a"] = factor
        assert torch.equal(answer(model), ours)
        runtime.unload(model)


def test_a_merge_for_good_that_stops_half_way_goes_on_where_it_stopped(folder: Path) -> None:
    ends, model = making.load(folder / "base"), making.load(folder / "base")
    runtime.attach(ends, folder / "one")
    runtime.attach(model, folder / "one")
    ours = answer(model)
    seat = model.model.layers[1].self_attn.v_proj.lorakit
    factor = seat.changes[0][1]._parameters.pop("a")
    with pytest.raises(KeyError):
        runtime.merge_and_unload(model)
    seat.changes[0][1]._parameters["a"] = factor
    assert far(answer(model), ours) < RELATIVE
    for call in (runtime.unload, runtime.merge_adapter, lambda m: runtime.set_adapter(m, [])):
        with pytest.raises(UsageError, match="3 weights have the adapters in them"):
            call(model)
    runtime.merge_and_unload(model)
    runtime.merge_and_unload(ends)
    assert no_hooks(model)
    assert all(torch.equal(v, ends.state_dict()[n]) for n, v in model.state_dict().items())


def test_weights_of_another_kind_of_adapter_are_not_swapped_in(
    folder: Path, tmp_path: Path
) -> None:
    model = making.load(folder / "base")
    runtime.attach(model, folder / "one")
    other = making.trained(making.load(folder / "base"), tmp_path / "dora", use_dora=True)
    with pytest.raises(MisfitError, match="of its tensors are not those of 'default'"):
        runtime.swap_adapter(model, other)


def test_what_is_no_model_is_told(folder: Path) -> None:
    for thing in (None, "model", [torch.nn.Linear(2, 2)]):
        with pytest.raises(UsageError, match=r"where a torch\.nn\.Module is"):
            runtime.attach(thing, folder / "one")
