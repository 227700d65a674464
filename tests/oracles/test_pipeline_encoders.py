"""Text encoders of a pipeline as the installed transformers saves them, with or without its
`text_model.`: each takes what is for it, and loads again.
"""

import numpy as np
import pytest
from safetensors.numpy import save_file

import lorakit

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SCRATCH = lorakit.RunOptions(sync=False)
IDS = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, **IDS}
T5 = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
# Module in the file -> encoder, module as PEFT sees it, outputs, inputs.
MODULES = {
    "lora_te1_text_model_encoder_layers_1_self_attn_q_proj": (0, "layers.1.self_attn.q_proj", 32),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (0, "layers.0.mlp.fc1", 64),
    "lora_te3_encoder_block_1_layer_1_DenseReluDense_wi_0": (1, "DenseReluDense.wi_0", 64),
    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": (1, "SelfAttention.q", 32),
}
FLUX = "lora_unet_double_blocks_0_img_attn_proj"


def test_text_encoders_as_transformers_saves_them_take_theirs(tmp_path):
    pipe, rng, lora = tmp_path / "pipe", np.random.default_rng(0), {}
    config = transformers.CLIPTextConfig(num_hidden_layers=2, **CLIP)
    clip = transformers.CLIPTextModel(config)
    t5 = transformers.T5EncoderModel(transformers.T5Config(num_layers=2, vocab_size=50, **T5))
    encoders = {"text_encoder": clip, "text_encoder_2": t5}
    for folder, model in encoders.items():
        model.save_pretrained(pipe / folder)
    (pipe / "transformer").mkdir()
    block = {"transformer_blocks.0.attn.to_out.0.weight": np.zeros((8, 8), "f4")}
    save_file(block, pipe / "transformer/diffusion_pytorch_model.safetensors")
    (pipe / "model_index.json").write_text("{}")
    for name, (_, _, out) in {**MODULES, FLUX: (2, "", 8)}.items():
        inner = 8 if name == FLUX else 32
        lora[f"{name}.lora_down.weight"] = rng.standard_normal((2, inner)).astype("f4")
        lora[f"{name}.lora_up.weight"] = rng.standard_normal((out, 2)).astype("f4")
    save_file(lora, tmp_path / "lora.safetensors")
    report = lorakit.merge(pipe, tmp_path / "lora.safetensors", tmp_path / "out", run=SCRATCH)
    assert report.folded == len(MODULES) + 1
    for number, (folder, model) in enumerate(encoders.items()):
        merged = type(model).from_pretrained(tmp_path / "out" / folder)
        wanted = {m: n for n, (e, m, _) in MODULES.items() if e == number}
        for name, values in merged.state_dict().items():
            moved = (values - model.state_dict()[name]).double().numpy()
            (module,) = [m for m in wanted if f"{m}.weight" in name] or [""]
            if not module or not moved.any():
                assert not moved.any()
                continue
            key = wanted.pop(module)
            delta = lora[f"{key}.lora_up.weight"].astype("f8") @ lora[f"{key}.lora_down.weight"]
            np.testing.assert_allclose(moved, delta, atol=1e-5)
        assert not wanted
