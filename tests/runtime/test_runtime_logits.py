"""An adapter on a live model gives the logits that PEFT gives, and leaves nothing when it goes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lorakit import merge
from lorakit.errors import MisfitError
from lorakit.runtime import attach, detach, merge_adapter, merge_and_unload, unmerge_adapter
from tests.oracles.case import Case
from tests.runtime import making
from tests.runtime.conftest import Live, Make
from tests.runtime.live import RELATIVE, answer, by_peft, far, no_hooks, same, unchanged

Zoo = Callable[[str], Live]
LINEAR = ["linear-all", "lm-head", "rslora", "patterns", "patterns-rslora", "t5", "names-compiled"]
TRANSPOSED = ["conv1d", "conv1d-square-only", "conv1d-dora", "conv1d-hub-names"]
DORA = ["dora", "dora-rslora-float16", "dora-embedding", "dora-conv2d", "dora-conv1d"]
DORA += ["dora-conv3d"]
LAYERS = ["embedding-saved-and-moved", "embedding-bert", "conv2d", "conv-float32", "conv3d"]
LAYERS += ["conv3d-pointwise", "vit-patches", "attention-patterns"]
BIASES = ["lora-bias", "lora-bias-conv1d", "lora-bias-conv2d", "bias-all-attention"]
BIASES += ["bias-all-and-lora-bias"]
SAVED = ["head-of-another-size", "head-new", "norms-saved", "vocabulary-resized-and-targeted"]
SAVED += ["tokens-list", "tokens-dict"]
FILES = ["adapter-bfloat16", "velora", "monteclora", "mica", "names-of-backbone"]
TIED = ["tied-embedding", "tied-both-dora", "tied-saved-head", "tied-tokens-apart"]
TIED += ["tied-tokens", "shared-thrice", "shared-with-bias-head"]
KINDS = [*LINEAR, *TRANSPOSED, *DORA, *LAYERS, *BIASES, *SAVED, *FILES, *TIED]
every_kind = pytest.mark.parametrize("name", KINDS)


@every_kind
def test_logits_are_those_of_peft_and_of_the_merged_weights(zoo: Zoo, name: str) -> None:
    live = zoo(name)
    model = live.model()
    plain = answer(model)
    attach(model, live.adapter)
    ours = answer(model)
    assert far(ours, answer(by_peft(live.model, live.plain))) < RELATIVE
    assert plain.shape != ours.shape or far(plain, ours) > 0.01
    merge_adapter(model)
    assert far(answer(model), ours) < RELATIVE
    unmerge_adapter(model)
    assert torch.equal(answer(model), ours)


@every_kind
def test_in_bfloat16_it_goes_as_it_came_to_the_bit(zoo: Zoo, name: str) -> None:
    live = zoo(name)
    model = live.model("bfloat16")
    plain = answer(model)
    with unchanged(model):
        attach(model, live.adapter)
        ours = answer(model)
        merge_adapter(model)
        unmerge_adapter(model)
        assert torch.equal(answer(model), ours)
        merge_adapter(model)
        detach(model)
    assert no_hooks(model)
    assert torch.equal(answer(model), plain)


def test_convolutions_of_whisper_that_peft_hides_the_stride_of(zoo: Zoo) -> None:
    """Its encoder looks at them, so that PEFT's wrapper fails; its merge does not."""
    from peft import PeftModel

    live = zoo("whisper")
    model = live.model()
    attach(model, live.adapter)
    merged = PeftModel.from_pretrained(live.model(), live.adapter).merge_and_unload()
    assert far(answer(model), answer(merged)) < RELATIVE


@pytest.mark.parametrize("name", ["linear-all", "dora", "tokens-dict", "embedding", "t5", "conv1d"])
def test_generation_is_that_of_peft_token_by_token(zoo: Zoo, name: str) -> None:
    live = zoo(name)
    ids = torch.tensor([[5, 9, 23], [7, 7, 40]])
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 2, "pad_token_id": 0}
    options |= {"decoder_start_token_id": 1} if name == "t5" else {}
    model = live.model()
    attach(model, live.adapter)
    ours = model.generate(ids, **options)
    assert torch.equal(ours, by_peft(live.model, live.plain).generate(ids, **options))
    assert not torch.equal(ours, live.model().generate(ids, **options))


@pytest.mark.parametrize("name", ["linear-all", "dora", "head-new", "tied-tokens-apart"])
def test_a_merged_model_has_the_weights_that_a_merge_of_files_has(zoo: Zoo, name: str) -> None:
    live = zoo(name)
    model = live.model("bfloat16")
    attach(model, live.adapter)
    assert merge_and_unload(model) is model
    assert no_hooks(model)
    files = merge(live.model("bfloat16").state_dict(), live.adapter, **_untied(name))
    ours = model.state_dict()
    assert [n for n, values in files.items() if not same(ours[n], values)] == []


def test_norms_of_dora_are_those_of_an_embedding_that_moved(make: Make) -> None:
    lora = {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}
    moved = r"embed_tokens\.base_layer\.weight"
    live = make(Case("moved-dora", "llama", lora, also_trained=moved))
    model = live.model()
    attach(model, live.adapter)
    assert far(answer(model), answer(by_peft(live.model, live.plain))) < RELATIVE


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_an_initialisation_took_out_is_merged_with_its_factors(make: Make, start: str) -> None:
    live = make(Case(f"taken-{start}", "llama", {"r": 4, "init_lora_weights": start}))
    model = live.model("bfloat16")
    files = merge(live.model("bfloat16").state_dict(), live.adapter)
    with unchanged(model):
        attach(model, live.adapter)
        merge_adapter(model)
        ours = model.state_dict()
        assert [n for n, values in files.items() if not same(ours[n], values)] == []
        detach(model)


def test_a_layer_without_a_bias_takes_one_beside_it(tmp_path: Path) -> None:
    base = making.llama(tmp_path / "base")
    adapter = making.trained(making.load(base), tmp_path / "adapter", lora_bias=True)
    model = making.load(base)
    with unchanged(model):
        attach(model, adapter)
        theirs = by_peft(lambda: making.load(base), adapter)
        assert far(answer(model), answer(theirs)) < RELATIVE
        for merged in (merge_adapter, merge_and_unload):  # as PEFT refuses it
            with pytest.raises(MisfitError, match="its layer has no bias"):
                merged(model)
        detach(model)


def _untied(name: str) -> dict[str, bool]:
    return {"untie": True} if name.startswith("tied") else {}
