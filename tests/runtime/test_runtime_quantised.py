"""Adapters on layers of bitsandbytes: beside the codes, into them, and out of them again."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from lorakit.errors import InputError
from lorakit.runtime import (
    attach,
    detach,
    load_pretrained,
    merge_adapter,
    merge_and_unload,
    unmerge_adapter,
)
from lorakit.runtime.quantised import dequantised
from tests.runtime import making
from tests.runtime.live import RELATIVE, answer, by_peft, far, no_hooks, same

KINDS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4-nested": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "int8": {"load_in_8bit": True},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
Load = Callable[[str], torch.nn.Module]


TARGETS = ["q_proj", "v_proj", "down_proj"]


@dataclass(frozen=True)
class Files:
    base: Path
    adapter: Path


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("quantised")
    base = making.llama(folder / "base")
    adapter = making.trained(making.load(base), folder / "adapter", target_modules=TARGETS)
    return Files(base, adapter)


@pytest.fixture
def load(live: Files) -> Load:
    from transformers import BitsAndBytesConfig

    def quantised(kind: str) -> torch.nn.Module:
        config = BitsAndBytesConfig(**KINDS[kind])
        options = {"quantization_config": config, "dtype": torch.float32}
        return load_pretrained(live.base, load=options).eval()

    return quantised


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    layers = {n: m for n, m in model.named_modules() if type(m).__name__.startswith("Linear")}
    return {n: dequantised(m).clone() for n, m in layers.items()}


@every_kind
def test_logits_are_those_of_peft(live: Files, load: Load, kind: str) -> None:
    model = load(kind)
    plain = answer(model)
    attach(model, live.adapter)
    ours = answer(model)
    assert far(ours, answer(by_peft(lambda: load(kind), live.adapter))) < RELATIVE
    assert far(plain, ours) > 0.01
    detach(model)
    assert torch.equal(answer(model), plain)


@every_kind
def test_unmerging_restores_codes_and_scales_to_the_bit(live: Files, load: Load, kind: str) -> None:
    model = load(kind)
    attach(model, live.adapter)
    ours = answer(model)  # which packs codes on some CPUs, and rounds their scales
    before, parameters = weights(model), dict(model.named_parameters())
    merged = merge_adapter(model)
    assert all(0.5 < share < 1.5 for share in merged.retained.values())
    assert set(merged.retained) == {n for n in parameters if _targeted(n)}
    changed = [n for n, w in weights(model).items() if not torch.equal(w, before[n])]
    assert {f"{n}.weight" for n in changed} == set(merged.retained)
    assert far(answer(model), ours) < 0.5
    unmerge_adapter(model)
    assert torch.equal(answer(model), ours)
    detach(model)
    fresh = load(kind)
    answer(fresh)
    after = dict(model.named_parameters())
    assert [n for n, p in fresh.named_parameters() if not same(p, after[n])] == []


@every_kind
def test_a_merge_for_good_requantises_or_leaves_plain_layers(
    live: Files, load: Load, kind: str
) -> None:
    model = load(kind)
    attach(model, live.adapter)
    ours = answer(model)
    assert merge_and_unload(model, quant="dequantize") is model
    assert no_hooks(model)
    layer = model.model.layers[0].self_attn
    assert type(layer.q_proj) is torch.nn.Linear
    assert type(layer.k_proj).__name__ in ("Linear4bit", "Linear8bitLt")
    assert far(answer(model), ours) < 0.05  # the kernels round weights or inputs
    again = load(kind)
    attach(again, live.adapter)
    merge_and_unload(again)
    assert type(again.model.layers[0].self_attn.q_proj).__name__ in ("Linear4bit", "Linear8bitLt")
    assert far(answer(again), ours) < 0.5


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("every", [False, True])
def test_what_was_dequantised_is_saved_as_what_it_is(
    live: Files, load: Load, tmp_path: Path, kind: str, every: bool
) -> None:
    from transformers import LlamaForCausalLM

    model, adapter = load(kind), live.adapter
    if every:
        leaves = {n.rpartition(".")[2] for n in weights(model)} - {"lm_head"}
        adapter = making.trained(making.load(live.base), tmp_path / "a", target_modules=leaves)
    attach(model, adapter)
    merge_and_unload(model, quant="dequantize").save_pretrained(tmp_path / "merged")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(answer(again), answer(model))
    kinds = {type(m).__name__ for m in again.modules()} & {"Linear4bit", "Linear8bitLt"}
    assert bool(kinds) is not every
    assert hasattr(again.config, "quantization_config") is not every


def test_codes_that_a_forward_packed_are_no_rows(live: Files, load: Load) -> None:
    model = load("nf4")
    sizes = {n: m.out_features for n, m in model.named_modules() if hasattr(m, "out_features")}
    attach(model, live.adapter)
    answer(model)  # some CPUs have codes in another shape from now on
    merge_adapter(model)
    assert all(model.get_submodule(n).out_features == size for n, size in sizes.items())
    assert model.config.vocab_size == len(model.get_input_embeddings().weight)


def test_what_needs_the_weight_itself_is_refused(live: Files, load: Load, tmp_path: Path) -> None:
    whole = making.trained(making.load(live.base), tmp_path, modules_to_save=["k_proj"])
    model = load("nf4")
    with pytest.raises(InputError, match=r"k_proj\.weight' is quantised"):
        attach(model, whole)
    assert no_hooks(model)


def _targeted(name: str) -> bool:
    return any(f".{leaf}.weight" in name for leaf in TARGETS)
