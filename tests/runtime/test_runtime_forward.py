"""A layer sees changed weights while it is called, and its own again however that ends."""

from collections.abc import Callable
from pathlib import Path
from threading import Barrier, Event, Thread

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everywhere

from lorakit.runtime import attach, set_adapter, unload
from tests.verbs.adapters import pair, save


class Slow(nn.Linear):
    """A layer that does something before it reads its weight, and has a forward for that."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.first: Callable[[], object] = bool

    def forward(self, x: Tensor) -> Tensor:
        self.first()
        return F.linear(x, self.weight, self.bias)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return save(tmp_path / "adapter", pair("slow", 3, 4, 2))


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("then", [unload, lambda model: set_adapter(model, [])])
def test_an_interrupted_call_leaves_nothing_behind(adapter: Path, then: Callable[..., object]):
    x, model = torch.ones(2, 4), nn.ModuleDict({"slow": Slow()})
    plain = model.slow(x)
    attach(model, adapter)
    adapted = model.slow(x)
    model.slow.first = interrupt  # Ctrl-C, which calls no hooks
    with pytest.raises(KeyboardInterrupt):
        model.slow(x)
    model.slow.first = bool
    assert torch.equal(model.slow(x), adapted)
    model.slow.first = interrupt
    with pytest.raises(KeyboardInterrupt):
        model.slow(x)
    model.slow.first = bool
    then(model)
    assert model.slow.weight is model.slow._parameters["weight"]
    assert torch.equal(model.slow(x), plain)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("saved", [{}, {"slow.bias": (3,)}])
def test_a_model_is_traced_with_its_adapter(tmp_path: Path, saved: dict[str, tuple[int]]) -> None:
    x, model = torch.ones(2, 4), nn.Sequential()
    model.add_module("slow", nn.Linear(4, 3))
    attach(model, save(tmp_path / "adapter", {**pair("slow", 3, 4, 2), **saved}))
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        assert torch.equal(traced(2 * x), model(2 * x))


def test_a_thread_that_is_through_takes_no_weights_away_from_another(adapter: Path) -> None:
    x, model, found = torch.ones(2, 4), nn.ModuleDict({"slow": Slow()}), {}
    attach(model, adapter)
    adapted = model.slow(x)
    both, through = Barrier(2), Event()

    def call() -> None:
        if both.wait(60):  # the one of the two that gets a 1
            through.wait(60)

    def work() -> None:
        answer = model.slow(x)
        through.set()
        found[len(found)] = answer

    model.slow.first = call
    threads = [Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(found[i], adapted) for i in range(2))
    assert model.slow.weight is model.slow._parameters["weight"]
