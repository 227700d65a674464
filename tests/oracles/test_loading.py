"""transformers loads a merged folder as any other, and it answers as the adapter did unmerged."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.oracles.case import Built
from tests.oracles.conftest import Build
from tests.oracles.merging import merge
from tests.oracles.models import MODELS
from tests.oracles.training import load
from tests.oracles.zoo_tied import TIED

pytest.importorskip("peft", minversion="0.21")
NAMES = [
    *("linear-all", "patterns", "lm-head", "dora", "embedding", "embedding-saved-and-moved"),
    *("conv1d", "conv1d-dora", "conv1d-hub-names", "patterns-rslora", "dora-rslora-float16"),
    *(
        "t5",
        "bias-all-and-lora-bias",
        "vit-patches",
        "vit-of-transformers-5",
        "lora-bias",
        "bias-all",
    ),
    *("head-saved", "head-of-another-size", "head-new", "norms-saved", "names-of-backbone"),
    *("vocabulary-resized", "vocabulary-resized-and-targeted", "tokens-list", "tokens-dict"),
    *(case.name for case in TIED),
]


def inputs(model: Any) -> dict[str, Any]:
    """What a model of this kind is given; the same for any two of a kind."""
    import torch

    generator = torch.Generator().manual_seed(5)
    config = model.config
    ids = torch.randint(3, 64, (2, 9), generator=generator)
    ids[0, :8] = torch.tensor([0, 2, 3, 5, 7, 61, 62, 63])  # those whose rows adapters replace
    if config.model_type == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    if config.model_type == "whisper":
        sound = torch.randn(2, config.num_mel_bins, 32, generator=generator)
        return {"input_features": sound, "decoder_input_ids": ids}
    if config.model_type == "t5":
        return {"input_ids": ids, "decoder_input_ids": ids.flip(0)}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def answer(model: Any) -> Any:
    import torch

    with torch.no_grad():
        given = inputs(model)
        return model.eval()(**given)[0]


def unmerged(case: Built) -> Any:
    from peft import PeftModel

    wide = replace(case.case, dtype="float32")
    return answer(PeftModel.from_pretrained(load(wide, case.base), case.adapter))


@pytest.mark.parametrize("name", NAMES)
def test_a_merged_model_answers_as_the_adapter(built: Build, tmp_path: Path, name: str) -> None:
    import torch

    case = built(name)
    merge(case, tmp_path / "out", dtype="float32", untie=bool(case.case.untied_head))
    model = MODELS[case.case.model].load(tmp_path / "out", "float32")
    theirs, ours = unmerged(case), answer(model)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    base = answer(load(replace(case.case, dtype="float32"), case.base))
    assert not torch.allclose(ours, base, rtol=1e-2)


def test_every_tensor_of_a_merged_folder_is_loaded(built: Build, tmp_path: Path) -> None:
    import transformers

    merge(built("tied-both"), tmp_path / "out", untie=True)
    _, info = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values())
