"""PEFT loads an edited adapter, every tensor of it, and its model answers as it should."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lorakit
from tests.oracles.architectures import answers
from tests.oracles.architectures.workshop import Workshop
from tests.oracles.case import Built
from tests.oracles.conftest import Build
from tests.oracles.models import MODELS
from tests.oracles.test_loading import answer
from tests.oracles.training import load

pytest.importorskip("peft", minversion="0.21")
SCRATCH = lorakit.RunOptions(sync=False)
NAMES = [
    *(
        "linear",
        "patterns",
        "patterns-rslora",
        "linear-float-alpha",
        "bias-all-and-lora-bias",
        "lm-head",
    ),
    *("dora", "dora-rslora-float16", "embedding", "embedding-saved", "lora-bias", "bias-all"),
    *("norms-saved", "head-saved", "tokens-list", "tokens-dict", "conv1d"),
]
STACKED = ["qwen3-moe-v5-patterns", "gpt-oss-v5-patterns"]
TOLD_OTHERWISE = [{"bake": True}, {"flatten": True}, {"alpha": 10.0}]


def answer_of(case: Built, adapter: Path) -> Any:
    """What the model says with an adapter, all of whose tensors PEFT found a place for."""
    from peft import PeftModel

    wide = replace(case.case, dtype="float32")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        return answer(PeftModel.from_pretrained(load(wide, case.base), adapter))


def edited(case: Built, output: Path, **options: Any) -> Path:
    lorakit.edit(case.adapter, output, run=SCRATCH, **options)
    return output


@pytest.mark.parametrize("options", TOLD_OTHERWISE, ids=lambda o: next(iter(o)))
@pytest.mark.parametrize("name", NAMES)
def test_scalings_told_in_another_way_answer_the_same(
    built: Build, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    import torch

    case = built(name)
    theirs = answer_of(case, case.adapter)
    ours = answer_of(case, edited(case, tmp_path / "out", **options))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", ["linear", "patterns", "patterns-rslora", "conv1d", "lora-bias"])
def test_a_scaled_adapter_answers_as_a_merge_with_that_weight(
    built: Build, tmp_path: Path, name: str
) -> None:
    import torch

    case = built(name)
    ours = answer_of(case, edited(case, tmp_path / "out", scale=-0.7))
    options = {"dtype": "float32", "run": SCRATCH}
    lorakit.merge(case.base, case.adapter, tmp_path / "merged", weights=[-0.7], **options)
    theirs = answer(MODELS[case.case.model].load(tmp_path / "merged", "float32"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        ("linear", "v_proj"),
        ("patterns", r"layers\.0"),
        ("embedding-saved", "embed_tokens|q_proj"),
        ("norms-saved", "q_proj|lm_head"),
        ("tokens-list", "embed_tokens|q_proj"),
        ("tokens-dict", "q_proj|lm_head"),
        ("norms-saved", "layernorm"),
        ("tokens-list", "embed_tokens"),
    ],
)
def test_what_is_kept_answers_as_a_merge_of_it_alone(
    built: Build, tmp_path: Path, name: str, keep: str
) -> None:
    import torch

    case = built(name)
    ours = answer_of(case, edited(case, tmp_path / "out", keep=[keep]))
    options = {"dtype": "float32", "run": SCRATCH, "untie": bool(case.case.untied_head)}
    lorakit.merge(case.base, tmp_path / "out", tmp_path / "merged", **options)
    theirs = answer(MODELS[case.case.model].load(tmp_path / "merged", "float32"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    assert not torch.allclose(ours, answer_of(case, case.adapter), rtol=1e-3)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("stacks"))


@pytest.mark.parametrize("options", TOLD_OTHERWISE, ids=lambda o: next(iter(o)))
@pytest.mark.parametrize("name", STACKED)
def test_stacks_of_experts_answer_the_same(
    workshop: Workshop, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    import torch
    from peft import PeftModel

    built = workshop.built(name)
    lorakit.edit(built.adapter, tmp_path / "out", run=SCRATCH, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says of patterns of parameters that it ignores them
        theirs, ours = (
            answers.answer(PeftModel.from_pretrained(built.kind.load(built.base), a).eval(), 0)
            for a in (built.adapter, tmp_path / "out")
        )
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
