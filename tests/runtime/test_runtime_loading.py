"""Models from folders: plain, with an adapter, and with one folded in as the weights are read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lorakit
from lorakit.errors import HubError, InputError, MisfitError, UsageError
from lorakit.runtime import (
    active_adapters,
    attach,
    load_pretrained,
    parameters,
    swap_adapter,
    unload,
)
from tests.oracles.architectures.answers import answer as shown_to
from tests.oracles.architectures.workshop import Workshop, merge
from tests.runtime import making
from tests.runtime.live import RELATIVE, answer, far, no_hooks, same

SEVERAL = ["q_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("loading")
    base = making.llama(path / "base")
    making.llama(path / "tied", tie_word_embeddings=True)
    making.trained(making.load(base), path / "one", target_modules=SEVERAL)
    making.trained(making.load(base), path / "two", use_dora=True, r=2)
    making.trained(making.load(path / "tied"), path / "head", target_modules=["lm_head"])
    return path


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("loaded"))


def differing(ours: Any, theirs: Any) -> list[str]:
    """The parameters that are not the same bit for bit."""
    there = theirs.state_dict()
    assert ours.state_dict().keys() == there.keys()
    return [n for n, values in ours.state_dict().items() if not same(values, there[n])]


def test_a_base_is_loaded_as_transformers_loads_it(folder: Path) -> None:
    model = load_pretrained(folder / "base")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not differing(model, making.load(folder / "base"))
    assert active_adapters(model) == {}


def test_an_adapter_is_attached_and_may_be_trained(folder: Path) -> None:
    model = load_pretrained(folder / "base", folder / "one", trainable=True, name="mine").eval()
    assert active_adapters(model) == {"mine": 1.0}
    assert len(list(parameters(model))) == 8
    other = making.load(folder / "base")
    attach(other, folder / "one")
    assert torch.equal(answer(model), answer(other))
    unload(model)
    assert not differing(model, making.load(folder / "base"))


def test_an_adapter_inside_the_folder_of_its_base_is_found(folder: Path, tmp_path: Path) -> None:
    base = making.llama(tmp_path / "base")
    making.trained(making.load(base), base / "adapter", target_modules=SEVERAL)
    model, other = load_pretrained(base), making.load(base)
    attach(other, base / "adapter")
    assert torch.equal(answer(model.eval()), answer(other))
    making.trained(making.load(base), base / "another")
    with pytest.raises(InputError, match=r"holds 2 adapters \(adapter, another\)"):
        load_pretrained(base)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_merged_while_it_is_read_has_the_bits_of_merged_files(
    folder: Path, tmp_path: Path, dtype: str
) -> None:
    base = tmp_path / "base"
    making.load(folder / "base", dtype).save_pretrained(base, max_shard_size="30KB")
    adapters, weights = [folder / "one", folder / "two"], [0.7, -0.3]
    lorakit.merge(base, adapters, tmp_path / "merged", weights=weights)
    model = load_pretrained(base, adapters, merge=True, weights=weights)
    assert no_hooks(model)
    assert model.dtype == getattr(torch, dtype)
    assert not differing(model, making.load(tmp_path / "merged", dtype))
    assert model.config.name_or_path == str(base)
    ids = torch.tensor([[5, 9]])
    options = {"max_new_tokens": 5, "do_sample": False}
    other = making.load(tmp_path / "merged", dtype)
    assert torch.equal(model.eval().generate(ids, **options), other.generate(ids, **options))


def test_a_tie_that_the_adapter_unties_is_untied_in_the_model(folder: Path, tmp_path: Path) -> None:
    lorakit.merge(folder / "tied", folder / "head", tmp_path / "merged", untie=True)
    model = load_pretrained(folder / "tied", folder / "head", merge=True, untie=True)
    assert model.config.tie_word_embeddings is False
    assert not differing(model, making.load(tmp_path / "merged"))


@pytest.mark.parametrize("name", ["mixtral-v4-plain", "qwen3-moe-v5-rsLoRA", "llava-v4-plain"])
def test_weights_that_transformers_converts_are_folded_before(
    workshop: Workshop, tmp_path: Path, name: str
) -> None:
    built = workshop.built(name)
    merge(built, tmp_path / "merged")
    model = load_pretrained(built.base, built.adapter, merge=True, **built.case.options).eval()
    other = load_pretrained(tmp_path / "merged").eval()
    assert not differing(model, other)
    plain = shown_to(load_pretrained(built.base).eval().float(), built.kind.seen)
    assert far(plain, shown_to(model.float(), built.kind.seen)) > 0.1


def test_the_class_may_be_another_than_the_config_names(folder: Path) -> None:
    from transformers import LlamaModel

    model = load_pretrained(folder / "base", load={"kind": LlamaModel, "dtype": torch.float64})
    assert type(model) is LlamaModel
    assert model.dtype == torch.float64


def test_what_does_not_fit_stops_before_a_weight_is_read(folder: Path, tmp_path: Path) -> None:
    making.llama(tmp_path / "wide", hidden_size=128)
    for merge_it in (True, False):
        with pytest.raises(MisfitError, match="q_proj"):
            load_pretrained(tmp_path / "wide", folder / "one", merge=merge_it)


def test_a_config_that_names_no_class_asks_for_one(folder: Path, tmp_path: Path) -> None:
    making.llama(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["architectures"] = ["NoSuchModel"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    model = load_pretrained(tmp_path / "base")  # the type tells
    assert far(answer(model.eval()), answer(making.load(folder / "base"))) < RELATIVE


def test_a_folder_that_is_not_there_or_has_no_adapter_is_said(folder: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder"):
        load_pretrained("./nowhere", folder / "one")
    with pytest.raises(HubError, match="no path here"):
        load_pretrained("nowhere/at", folder / "one")
    with pytest.raises(UsageError, match="no adapter in"):
        load_pretrained(folder / "base", merge=True)


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("adapter_config.json", "{}", "holds an adapter, not a base"),
        ("config.json", '{"model_type": "none"}', "transformers does not load it"),
    ],
)
def test_what_is_no_model_of_transformers_is_said(
    tmp_path: Path, name: str, text: str, told: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=told):
        load_pretrained(tmp_path)


def test_a_part_of_a_file_for_several_models_is_attached_and_swapped(tmp_path: Path) -> None:
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = CLIPTextModel(CLIPTextConfig(**sizes, num_hidden_layers=2, vocab_size=64)).eval()
    layer = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    other = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    for seed, name in enumerate(("one", "two")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for module in (layer, other):
            tensors[f"{module}.lora_down.weight"] = torch.randn(4, 32, generator=generator)
            tensors[f"{module}.lora_up.weight"] = torch.randn(32, 4, generator=generator)
            tensors[f"{module}.alpha"] = torch.tensor(4.0)
        save_file(tensors, tmp_path / f"{name}.safetensors")
    done = attach(model, tmp_path / "one.safetensors", component="text_encoder")
    assert len(done.tensors) == 1
    one = answer(model)
    swap_adapter(model, tmp_path / "two.safetensors", component="text_encoder")
    assert far(answer(model), one) > 1e-3
    with pytest.raises(UsageError, match="no option 'packing'"):
        swap_adapter(model, tmp_path / "two.safetensors", component="text_encoder", packing="x")
