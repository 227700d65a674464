"""What is extracted from a base and a model made of it brings the base back to that model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import lorakit
from lorakit.errors import InputError
from tests.oracles.case import Built
from tests.oracles.conftest import Build, Merge
from tests.oracles.merging import merge
from tests.oracles.test_combine import WHOLE_RANK, assert_same_change, config_of
from tests.oracles.test_loading import answer
from tests.oracles.training import load

SCRATCH = lorakit.RunOptions(sync=False)
IN_PEFT = [
    *("linear", "conv1d", "bert", "t5", "lora-bias", "head-saved", "embedding", "norms-saved"),
    *("tied-saved-together", "tied-tokens", "tied-saved-embedding"),
]
GROWN = ("vocab", "another-size", "head-new", "tied", "tokens")


def extract(case: Built, tuned: Path, output: Path) -> None:
    options = {"rank": WHOLE_RANK, "other": "save", "run": SCRATCH}
    lorakit.extract(case.base, tuned, output, **options)


def test_a_merge_of_the_extract_is_the_tuned_model(case: Built, tmp_path: Path) -> None:
    merge(case, tmp_path / "tuned", dtype="float32", untie=bool(case.case.untied_head))
    extract(case, tmp_path / "tuned", tmp_path / "lora")
    lorakit.merge(
        case.base, tmp_path / "lora", tmp_path / "found", dtype="float32", run=SCRATCH, untie=True
    )
    assert_same_change(case, tmp_path / "tuned", tmp_path / "found", share=1e-4)


def test_any_adapter_becomes_plain_lora_of_the_same_change(case: Built, tmp_path: Path) -> None:
    if case.case.key_map or config_of(case).raw.get("use_bdlora"):
        return
    options = {"rank": WHOLE_RANK, "adapter": case.adapter, "allow_pickle": True, "run": SCRATCH}
    try:
        lorakit.extract(case.base, output=tmp_path / "plain", **options)
    except InputError as error:
        assert "packing" in str(error)  # noqa: PT017
        return
    untie = bool(case.case.untied_head)
    merge(case, tmp_path / "expected", dtype="float32", untie=untie)
    lorakit.merge(
        case.base, tmp_path / "plain", tmp_path / "found", dtype="float32", run=SCRATCH, untie=untie
    )
    assert_same_change(case, tmp_path / "expected", tmp_path / "found", share=1e-4)


@pytest.mark.parametrize("name", IN_PEFT)
def test_peft_loads_it_and_answers_as_the_tuned_model(
    built: Build, merged: Merge, tmp_path: Path, name: str
) -> None:
    import torch
    from peft import PeftModel

    case = built(name)
    wide = replace(case.case, dtype="float32")
    merge(case, tmp_path / "tuned", dtype="float32", untie=bool(case.case.untied_head))
    extract(case, tmp_path / "tuned", tmp_path / "lora")
    expected = answer(load(wide, tmp_path / "tuned"))
    found = answer(PeftModel.from_pretrained(load(wide, case.base), tmp_path / "lora"))
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * scale)
    assert np.isfinite(scale)


def test_peft_loads_stacks_of_experts_with_all_biases_beside_them(tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 64}
    counts = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**sizes, **counts, num_local_experts=4)).eval()
    model.save_pretrained(tmp_path / "base")
    for name, weight in model.named_parameters():
        weight.data += 0.05 * torch.randn_like(weight) * ("sinks" not in name)
    model.save_pretrained(tmp_path / "tuned")
    options = {"rank": WHOLE_RANK, "other": "save", "run": SCRATCH}
    lorakit.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", **options)
    base = GptOssForCausalLM.from_pretrained(tmp_path / "base")
    found = answer(PeftModel.from_pretrained(base, tmp_path / "lora"))
    torch.testing.assert_close(found, answer(model), rtol=1e-3, atol=1e-5)
