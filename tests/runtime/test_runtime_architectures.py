"""Adapters in the names and layouts of many releases on live models: experts in stacks, towers."""

from pathlib import Path

import pytest
import torch

from lorakit.runtime import attach, detach, merge_adapter, unmerge_adapter
from tests.oracles.architectures.answers import answer, answer_of
from tests.oracles.architectures.workshop import Workshop, merge
from tests.runtime.live import RELATIVE, by_peft, far, no_hooks, unchanged

BY_PEFT = [
    *("mixtral-v4-plain", "mixtral-v5-plain", "qwen3-moe-v5-patterns", "qwen3-moe-v4-plain"),
    *("phimoe-v5-plain", "deepseek-v3-v5-plain", "gpt-oss-v5-rsLoRA", "llama4-v5-plain"),
    *("granitemoe-v5-plain", "jamba-v5-plain", "gemma3-v5-plain", "qwen2.5-vl-v5-plain"),
    *("llava-v5-plain", "gemma3-text-any-embed_tokens-plain", "llama-tied-any-both-sides-plain"),
]
# What PEFT refuses, drops or scales otherwise: docs/reference/architectures.md.
NOT_BY_PEFT = [
    *("mixtral-v4-rsLoRA", "mixtral-Unsloth-plain", "qwen2-moe-v4-plain", "phimoe-v4-plain"),
    *("qwen3-moe-v4-patterns", "llama4-PEFT-0.18.0-plain", "granitemoe-v4-plain"),
    *("deepseek-v3-v4-plain", "qwen2.5-vl-v4-plain", "llava-v4-plain"),
]


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return Workshop(tmp_path_factory.mktemp("live"))


@pytest.mark.parametrize("name", BY_PEFT)
def test_logits_are_those_of_peft(workshop: Workshop, name: str) -> None:
    built = workshop.built(name)
    model = built.kind.load(built.base)
    with unchanged(model):
        attach(model, built.adapter)
        ours = answer(model, built.kind.seen)
        theirs = by_peft(lambda: built.kind.load(built.base), built.adapter)
        assert far(ours, answer(theirs, built.kind.seen)) < RELATIVE
        assert far(workshop.base_answer(built.case.model), ours) > 0.1
        merge_adapter(model)
        assert far(answer(model, built.kind.seen), ours) < RELATIVE
        unmerge_adapter(model)
        assert torch.equal(answer(model, built.kind.seen), ours)
        detach(model)
    assert no_hooks(model)


@pytest.mark.parametrize("name", NOT_BY_PEFT)
def test_logits_are_those_of_the_merged_files(
    workshop: Workshop, tmp_path: Path, name: str
) -> None:
    built = workshop.built(name)
    merge(built, tmp_path / "merged", dtype="float32")
    model = built.kind.load(built.base)
    attach(model, built.adapter, **built.case.options)
    ours = answer(model, built.kind.seen)
    assert far(ours, answer_of(built.kind, tmp_path / "merged")) < RELATIVE
