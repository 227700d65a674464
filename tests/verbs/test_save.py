"""save_adapter: what was opened is what is written."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.adapter.files.reading import open_file
from lorakit.errors import LorakitError, OutputError, UsageError
from tests.verbs.adapters import pair, save, tensors_of

SCRATCH = lorakit.RunOptions(sync=False)
Q = "model.layers.0.self_attn.q_proj"
KINDS = {
    "plain": ({}, {}),
    "saved": ({"lm_head.weight": (12, 8)}, {"modules_to_save": ["lm_head"]}),
    "tokens": (
        {"model.embed_tokens.token_adapter.trainable_tokens_delta": (2, 8)},
        {"trainable_token_indices": [1, 5]},
    ),
    "invocation": ({}, {"alora_invocation_tokens": [1]}),
    "pissa": ({}, {"init_lora_weights": "pissa"}),
    "unknown": ({}, {"use_something_new": True}),
}
ENCODER = "text_model_encoder_layers_0_self_attn_q_proj"
UNET = "mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture
def pipeline(tmp_path):
    """A file of kohya for a UNet and its text encoder."""
    names = (f"lora_te_{ENCODER}", f"lora_unet_{UNET}")
    tensors = {f"{n}.lora_down.weight": np.ones((2, 8), "f4") for n in names}
    tensors |= {f"{n}.lora_up.weight": np.full((12, 2), i, "f4") for i, n in enumerate(names)}
    tensors |= {f"{n}.alpha": np.array(1, "f4") for n in names}
    save_file(tensors, tmp_path / "both.safetensors")
    return tmp_path / "both.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_wrote_is_written_to_the_byte(tmp_path, kind):
    more, config = KINDS[kind]
    path = save(tmp_path / "a", {**pair(Q, 12, 8, 2), **more}, **config)
    (path / "tokenizer.json").write_text("{}")
    done = lorakit.save_adapter(lorakit.open_adapter(path), tmp_path / "b", run=SCRATCH)
    assert (done.tensors, done.rounded) == (2 + len(more), 0)
    for name in ("adapter_model.safetensors", "tokenizer.json"):
        assert (tmp_path / "b" / name).read_bytes() == (path / name).read_bytes()
    one, other = (
        json.loads((f / "adapter_config.json").read_text()) for f in (path, tmp_path / "b")
    )
    assert one == other


def test_a_part_of_a_pipeline_is_written_alone(tmp_path, pipeline):
    part = lorakit.open_adapter(pipeline).parts["unet"]
    lorakit.save_adapter(part, tmp_path / "unet", run=SCRATCH)
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert tensors_of(tmp_path / "unet").keys() == set(pair(module, 12, 8, 2))
    again = lorakit.open_adapter(tmp_path / "unet")
    assert again.config.scaling(module, 2) == 0.5
    for write in (lorakit.convert, lorakit.save_adapter):
        named = {"to": "diffusers"} if write is lorakit.convert else {"format": "diffusers"}
        with pytest.raises(UsageError, match="for other models than the unet"):
            write(part, tmp_path / "unet.safetensors", run=SCRATCH, **named)
    assert not (tmp_path / "unet.safetensors").exists()


def test_a_part_of_a_pipeline_is_merged_and_verified_as_that(tmp_path, pipeline):
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    save_file({f"{module}.weight": np.ones((12, 8), "f4")}, base)
    part = lorakit.open_adapter(pipeline).parts["unet"]
    assert lorakit.merge(base, part, out, run=SCRATCH).folded == 1
    for adapters in ((), part, [pipeline], (p for p in [pipeline])):
        assert lorakit.verify(out, full=True, adapters=adapters).differences == ()
    for verb in (lorakit.inspect, lambda adapter: lorakit.check(adapter, "diffusers")):
        with pytest.raises(UsageError, match="for other models than the unet"):
            verb(part)


def test_an_open_adapter_is_inspected_and_checked(tmp_path):
    path = save(tmp_path / "a", pair(Q, 12, 8, 2), target_modules=["q_proj"])
    opened = lorakit.open_adapter(path)
    assert lorakit.inspect(opened).facts == lorakit.inspect(opened.path).facts
    assert lorakit.check(opened, "peft").modules == 1


def test_a_whole_file_is_written_in_any_format(tmp_path, pipeline):
    opened = lorakit.open_adapter(pipeline)
    lorakit.save_adapter(opened, tmp_path / "folders", run=SCRATCH)
    assert {p.name for p in (tmp_path / "folders").iterdir()} == {"unet", "text_encoder"}
    lorakit.save_adapter(opened, tmp_path / "d.safetensors", "diffusers", run=SCRATCH)
    assert {d.component for d in open_file(tmp_path / "d.safetensors").deltas} == set(opened.parts)


def test_no_output_takes_the_place_of_another_or_of_the_adapter(tmp_path):
    path = save(tmp_path / "a", pair(Q, 12, 8, 2))
    before = load_file(path / "adapter_model.safetensors")
    save(tmp_path / "b", pair(Q, 12, 8, 2))
    for output in (path, tmp_path / "b"):
        with pytest.raises(OutputError):
            lorakit.save_adapter(path, output, run=SCRATCH)
    with pytest.raises(LorakitError, match="onnx"):
        lorakit.save_adapter(path, tmp_path / "c", "onnx")
    after = load_file(path / "adapter_model.safetensors")
    assert all((after[n] == before[n]).all() for n in before)
    assert not (tmp_path / "c").exists()
