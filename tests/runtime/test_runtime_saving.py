"""What is saved or made of attached adapters means what it meant while they were attached."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.errors import UsageError
from lorakit.runtime import add_weighted_adapter, attach, save_adapter, set_adapter
from tests.runtime import making
from tests.runtime.live import RELATIVE, far


class Attention(nn.Module):
    """A MultiheadAttention, whose out_proj PEFT updates twice."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


def attention() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Attention().eval()


def experts() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {**making.SIZES, "intermediate_size": 24, "num_local_experts": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MixtralForCausalLM(MixtralConfig(**sizes)).eval()


def said(model: nn.Module) -> torch.Tensor:
    if isinstance(model, Attention):
        return model(torch.linspace(-1, 1, 160).reshape(2, 5, 16)).detach()
    return model(torch.tensor([[5, 23, 8, 41], [9, 9, 30, 2]])).logits.detach()


@dataclass(frozen=True)
class Way:
    """A model, what is adapted of it, and an option without which that would be read otherwise."""

    model: Callable[[], nn.Module]
    lora: dict[str, Any]
    option: dict[str, Any]


STACK = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
WAYS = {
    "packing": Way(experts, STACK, {"expert_packing": "unsloth"}),
    "attention": Way(attention, {"target_modules": ["attn"]}, {"mha_factor": 1}),
}


def adapters(way: Way, folder: Path) -> tuple[Path, Path]:
    one, other = (
        making.trained(way.model(), folder / name, seed, **way.lora)
        for seed, name in enumerate(("one", "other"))
    )
    return one, other


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("trainable", [False, True])
def test_what_was_read_by_an_option_is_saved_so_that_none_is_needed(
    tmp_path: Path, name: str, trainable: bool
) -> None:
    way = WAYS[name]
    model, again, without = way.model(), way.model(), way.model()
    adapter = adapters(way, tmp_path)[0]
    attach(model, adapter, trainable=trainable, **way.option)
    attach(again, save_adapter(model, tmp_path / "saved"))
    assert far(said(again), said(model)) < RELATIVE
    attach(without, adapter)
    assert far(said(without), said(model)) > 1e-3


@pytest.mark.parametrize("name", WAYS)
def test_a_combination_is_of_what_was_attached(tmp_path: Path, name: str) -> None:
    way = WAYS[name]
    model = way.model()
    weights = {"one": 0.7, "other": 0.3}
    for adapter in adapters(way, tmp_path):
        attach(model, adapter, adapter.name, **way.option)
    set_adapter(model, weights)
    ours = said(model)
    add_weighted_adapter(model, weights, "both")
    set_adapter(model, "both")
    assert far(said(model), ours) < RELATIVE


def test_a_combination_has_the_names_of_what_was_attached(tmp_path: Path) -> None:
    way = WAYS["attention"]
    inner, outer = way.model(), nn.ModuleDict({"tower": way.model()})
    options = {"key_map": ["^attn=tower.attn"], "allow_unmatched": "nowhere"}
    for adapter in adapters(way, tmp_path):
        attach(inner, adapter, adapter.name)
        attach(outer, adapter, adapter.name, **options)
    for model in (inner, outer):
        add_weighted_adapter(model, {"one": 0.7, "other": 0.3}, "both")
        set_adapter(model, "both")
    assert far(said(outer["tower"]), said(inner)) < RELATIVE


def test_adapters_that_were_attached_under_other_names_are_not_combined(tmp_path: Path) -> None:
    way = WAYS["attention"]
    outer = nn.ModuleDict({"one": way.model(), "other": way.model()})
    for adapter in adapters(way, tmp_path):
        attach(outer, adapter, adapter.name, key_map=[f"^attn={adapter.name}.attn"])
    with pytest.raises(UsageError, match="different key_map"):
        add_weighted_adapter(outer, {"one": 0.7, "other": 0.3}, "both")
