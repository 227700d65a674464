"""Weights that another module reads than their own are changed for it too, and what a model says of
its weights goes along with them.
"""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import lorakit
from lorakit.errors import MisfitError
from lorakit.runtime import (
    attach,
    load_pretrained,
    merge_adapter,
    merge_and_unload,
    unload,
    unmerge_adapter,
)
from tests.runtime import making
from tests.runtime.conftest import Live
from tests.runtime.live import RELATIVE, answer, by_peft, far, no_hooks, unchanged

JAMBA = {
    "intermediate_size": 24,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 2,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}


def jamba(folder: Path) -> Path:
    from transformers import JambaConfig, JambaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        JambaForCausalLM(JambaConfig(**{**making.SIZES, **JAMBA})).save_pretrained(folder)
    return folder


def deberta() -> nn.Module:
    from transformers import DebertaV2Config, DebertaV2ForMaskedLM

    positions = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    positions |= {"position_buckets": 4, "max_relative_positions": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = DebertaV2Config(**making.SIZES, **positions)
        return DebertaV2ForMaskedLM(config).eval()


def test_a_layer_whose_weight_is_read_around_it_has_what_was_taken_out_of_it(
    tmp_path: Path,
) -> None:
    """Jamba multiplies with the weight of dt_proj itself."""
    base = jamba(tmp_path / "base")
    plain = answer(load_pretrained(base).eval())
    lorakit.init(base, tmp_path / "out", rank=2, method="pissa", target_modules="dt_proj,in_proj")
    for merge in (False, True):
        found = answer(load_pretrained(tmp_path / "out", merge=merge).eval())
        assert far(found, plain) < 10 * RELATIVE
    model = load_pretrained(tmp_path / "out").eval()
    merge_adapter(model)
    assert far(answer(model), plain) < 10 * RELATIVE
    unload(model)
    assert far(answer(model), plain) > 0.01
    assert no_hooks(model)


def test_a_table_that_was_saved_whole_is_read_around_it(tmp_path: Path) -> None:
    lora = {"target_modules": ["query_proj"], "modules_to_save": ["rel_embeddings"]}
    adapter = making.trained(deberta(), tmp_path / "adapter", **lora)
    model = deberta()
    with unchanged(model):
        attach(model, adapter)
        ours = answer(model)
        assert torch.equal(ours, answer(by_peft(deberta, adapter)))
        merge_adapter(model)
        assert far(answer(model), ours) < RELATIVE
        unload(model)


class Outer(nn.Module):
    """Calls the layer of a part without calling the part, and the part."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part[1](x) + self.part(x)


def test_a_layer_that_was_saved_whole_is_so_wherever_it_is_called(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model, x = Outer(), torch.ones(2, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(
            Outer(), LoraConfig(r=2, target_modules=["part.0"], modules_to_save=["part.1"])
        )
    theirs.save_pretrained(tmp_path / "adapter")
    attach(model, tmp_path / "adapter")
    ours = model(x).detach()
    merge_adapter(model)
    assert far(ours, model(x).detach()) < RELATIVE
    unmerge_adapter(model)
    assert torch.equal(model(x), ours)


@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_that_changed_is_told_by_the_merged_model(tmp_path: Path, tied: bool) -> None:
    from transformers import LlamaForCausalLM

    base = making.llama(tmp_path / "base", tie_word_embeddings=tied)
    larger = making.load(base)
    larger.resize_token_embeddings(70)
    trained = making.trained(larger, tmp_path / "adapter", target_modules=["q_proj"])
    model = making.load(base)
    attach(model, trained)
    ours = answer(model)
    assert ours.shape[-1] == 70
    for _ in range(2):
        merge_adapter(model)
        inputs = model.get_input_embeddings()
        assert (model.config.vocab_size, inputs.num_embeddings, len(inputs.weight)) == (70, 70, 70)
        assert (model.get_output_embeddings().weight is inputs.weight) is tied
        assert torch.isfinite(model(torch.tensor([[5, 9]]), labels=torch.tensor([[5, 69]])).loss)
        unmerge_adapter(model)
        assert (model.config.vocab_size, inputs.num_embeddings, len(inputs.weight)) == (64, 64, 64)
        assert (model.get_output_embeddings().weight is inputs.weight) is tied
    merge_and_unload(model).save_pretrained(tmp_path / "merged")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(answer(again), answer(model))


def test_a_merged_model_tells_the_labels_of_its_new_head(tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    def load(folder: Path, **more: int) -> LlamaForSequenceClassification:
        return LlamaForSequenceClassification.from_pretrained(folder, **more).eval()

    base = making.llama(tmp_path / "base")
    wide = load(base, num_labels=5)
    adapter = making.trained(wide, tmp_path / "adapter", task_type="SEQ_CLS")
    attach(model := load(base), adapter)
    shown = {"input_ids": torch.tensor([[5, 9, 3]])}
    ours = answer(model, **shown)
    merge_adapter(model)
    assert (model.config.num_labels, model.num_labels, model.score.out_features) == (5, 5, 5)
    unmerge_adapter(model)
    assert (model.config.num_labels, model.num_labels, model.score.out_features) == (2, 2, 2)
    merge_and_unload(model).save_pretrained(tmp_path / "merged")
    assert far(answer(load(tmp_path / "merged"), **shown), ours) < RELATIVE


def test_a_model_that_scales_what_a_tied_head_gives_does_so_while_parted(tmp_path: Path) -> None:
    from transformers import UMT5Config, UMT5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = UMT5Config(vocab_size=64, **sizes)

    def load() -> UMT5ForConditionalGeneration:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return UMT5ForConditionalGeneration(config).eval()

    attach(model := load(), making.trained(load(), tmp_path / "a", target_modules=["lm_head"]))
    ids = torch.tensor([[5, 9, 3]])
    shown = {"input_ids": ids, "decoder_input_ids": ids}
    ours = answer(model, **shown)
    merge_adapter(model)
    assert model.lm_head.weight is not model.shared.weight
    assert far(answer(model, **shown), ours) < RELATIVE
    unmerge_adapter(model)
    assert torch.equal(answer(model, **shown), ours)


@pytest.mark.parametrize("name", ["shared-thrice", "shared-with-bias-head"])
@pytest.mark.parametrize("first", [False, True])
def test_weights_that_a_kind_of_model_always_shares_do_not_part_for_good(
    zoo: Callable[[str], Live], name: str, first: bool
) -> None:
    live = zoo(name)
    model = live.model()
    with unchanged(model):
        attach(model, live.adapter)
        ours = answer(model)
        if first:
            merge_adapter(model)
        with pytest.raises(MisfitError, match="shares again when it is loaded"):
            merge_and_unload(model)
        assert far(answer(model), ours) < RELATIVE
        unload(model)
