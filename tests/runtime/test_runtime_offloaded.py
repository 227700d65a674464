"""Adapters on models whose weights accelerate keeps in memory or on disk until they are used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.errors import InputError, MisfitError, UsageError
from lorakit.runtime import attach, merge_adapter, unload
from tests.runtime import making
from tests.runtime.live import answer
from tests.verbs.adapters import pair, save

accelerate = pytest.importorskip("accelerate")

LORA: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["embed_tokens", "q_proj", "lm_head"]},
    "dora": {"use_dora": True, "target_modules": ["embed_tokens", "q_proj"]},
    "pissa": {"init_lora_weights": "pissa"},
    "bias": {"lora_bias": True},
}
Away = Callable[[nn.Module, Path], object]
AWAY: dict[str, Away] = {
    "memory": lambda model, _: accelerate.cpu_offload(model, execution_device="cpu"),
    "disk": lambda model, at: accelerate.disk_offload(model, at / "away", execution_device="cpu"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.llama(tmp_path_factory.mktemp("offloaded") / "base")


@pytest.mark.parametrize("kind", LORA)
@pytest.mark.parametrize("away", AWAY.values(), ids=AWAY)
def test_they_answer_as_those_that_are_whole(
    base: Path, tmp_path: Path, kind: str, away: Away
) -> None:
    adapter = making.trained(making.load(base), tmp_path / "adapter", **LORA[kind])
    whole, model = making.load(base), making.load(base)
    plain = answer(whole)
    attach(whole, adapter)
    away(model, tmp_path)
    attach(model, adapter)
    assert torch.equal(answer(model), answer(whole))
    with pytest.raises(MisfitError, match="is offloaded"):
        merge_adapter(model)
    assert torch.equal(answer(model), answer(whole))
    unload(model)
    assert torch.equal(answer(model), plain)


class Strange(nn.Linear):
    """A layer with a forward of its own, which is given another weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


class Experts(nn.Module):
    """A stack of experts, which has no weight of that name."""

    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.ones(2, 3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eoi->ebo", x, self.down_proj)


STACK = {"target_modules": [], "target_parameters": ["one.down_proj"]}


@pytest.mark.parametrize(
    ("make", "factors", "config"),
    [
        (lambda: Strange(4, 3), pair("one", 3, 4, 2), {}),
        (Experts, {"one.lora_A.weight": (4, 4), "one.lora_B.weight": (3, 4)}, STACK),
    ],
    ids=["layer", "experts"],
)
def test_a_layer_that_is_given_another_weight_is_as_if_it_were_whole(
    tmp_path: Path, make: Callable[[], nn.Module], factors: dict[str, Any], config: dict[str, Any]
) -> None:
    adapter, x = save(tmp_path / "adapter", factors, **config), torch.ones(2, 4)
    model = nn.ModuleDict({"one": make()})
    attach(model, adapter)
    whole = model.one(x)
    unload(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    attach(model, adapter)
    assert torch.equal(model.one(x), whole)


def test_a_weight_that_is_offloaded_is_not_replaced(base: Path, tmp_path: Path) -> None:
    lora = {"modules_to_save": ["lm_head"]}
    adapter = making.trained(making.load(base), tmp_path / "adapter", **lora)
    accelerate.cpu_offload(model := making.load(base), execution_device="cpu")
    with pytest.raises(InputError, match=r"'lm_head\.weight' is offloaded"):
        attach(model, adapter)


def test_factors_that_are_taken_away_with_the_weights_are_missed(
    base: Path, tmp_path: Path
) -> None:
    adapter = making.trained(making.load(base), tmp_path / "adapter")
    attach(model := making.load(base), adapter)
    whole = answer(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    with pytest.raises(UsageError, match="offloaded after an adapter was attached"):
        answer(model)
    unload(model)
    attach(model, adapter)
    assert torch.equal(answer(model), whole)
