"""What a program has set around it changes no bit of a merged weight, and is as it was after."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from lorakit.errors import UsageError
from lorakit.runtime import (
    active_adapters,
    attach,
    disable_adapter,
    load_pretrained,
    merge_adapter,
    mixed_batch,
    parameters,
    set_adapter,
    unmerge_adapter,
)
from tests.runtime import making
from tests.runtime.live import answer, same

LORA = {
    "dora": {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
    "rows": {"trainable_token_indices": [5, 9]},
}


@contextmanager
def placed(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "device": lambda: placed("meta"),  # as another than that of the model
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.llama(tmp_path_factory.mktemp("surroundings") / "base")


@pytest.mark.parametrize("kind", LORA)
@pytest.mark.parametrize("around", SURROUNDINGS)
def test_weights_are_the_same_bits(base: Path, tmp_path: Path, kind: str, around: str) -> None:
    adapter = making.trained(making.load(base), tmp_path / "adapter", **LORA[kind])
    models = making.load(base), making.load(base)
    attach(models[0], adapter)
    merge_adapter(models[0])
    with SURROUNDINGS[around]():
        attach(models[1], adapter)
        merge_adapter(models[1])
    pairs = zip(*(m.parameters() for m in models), strict=True)
    assert all(same(one, other) for one, other in pairs)
    for model in models:
        unmerge_adapter(model)
    assert torch.equal(*map(answer, models))


class Seen(TorchFunctionMode):
    """How precise products are, whenever one is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.matmul, torch.Tensor.__matmul__, torch.Tensor.matmul):
            self.found.add(torch.backends.cuda.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


def test_products_of_a_merge_are_no_tf32(base: Path, tmp_path: Path) -> None:
    attach(model := making.load(base), making.trained(making.load(base), tmp_path / "adapter"))
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        with Seen() as seen:
            merge_adapter(model)
        assert (seen.found, matmul.fp32_precision) == ({"ieee"}, "tf32")
    finally:
        matmul.fp32_precision = before


def test_what_would_last_is_refused_where_others_are_active_for_a_while(
    base: Path, tmp_path: Path
) -> None:
    adapter = making.trained(making.load(base), tmp_path / "adapter")
    attach(model := making.load(base), adapter)
    for meanwhile in (disable_adapter(model), mixed_batch(model, ["default"])):
        with meanwhile:
            for call in (
                lambda: set_adapter(model, []),
                lambda: attach(model, adapter, "more"),
            ):
                with pytest.raises(UsageError, match="this would last"):
                    call()
    assert active_adapters(model) == {"default": 1.0}


def test_parameters_are_those_of_one_adapter_or_of_all(base: Path, tmp_path: Path) -> None:
    adapter = making.trained(making.load(base), tmp_path / "adapter")
    model = making.load(base)
    for name in ("a", "b"):
        attach(model, adapter, name, trainable=True)
    one, other, both = list(parameters(model, "a")), list(parameters(model, "b")), parameters(model)
    assert [id(p) for p in both] == [id(p) for p in (*one, *other)]
    with pytest.raises(UsageError, match="no adapter 'c'"):
        list(parameters(model, "c"))


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_model_is_loaded_in_the_dtype_that_is_asked_for(base: Path, name: str) -> None:
    assert load_pretrained(base, load={name: torch.bfloat16}).dtype == torch.bfloat16


def test_several_adapters_are_merged_and_not_attached_at_once(base: Path, tmp_path: Path) -> None:
    adapters = [making.trained(making.load(base), tmp_path / n) for n in ("a", "b")]
    assert active_adapters(load_pretrained(base, adapters, merge=True)) == {}
    with pytest.raises(UsageError, match="attached one by one"):
        load_pretrained(base, adapters)
