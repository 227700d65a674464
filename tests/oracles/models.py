"""Tiny models: one of each architecture the tests fold adapters into, made from a seed.

Every model is written as its own library writes it: `save_pretrained` (in shards, where a shard
size is given) for those of transformers, one `model.safetensors` for the plain torch modules.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LLAMA = TOKENS | HEADS | {"hidden_size": 32, "num_key_value_heads": 2, "vocab_size": 64}
GPT2 = TOKENS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32}
BERT = {"pad_token_id": 0, "hidden_size": 32, "vocab_size": 64, "max_position_embeddings": 32}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64}
VIT = {"hidden_size": 32, "image_size": 8, "patch_size": 4, "num_labels": 3}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 64,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "decoder_start_token_id": 1,
    "begin_suppress_tokens": None,
}


@dataclass(frozen=True)
class TinyModel:
    """An architecture of transformers by the names of its classes, and sizes that make it tiny."""

    architecture: str
    config: str
    sizes: Mapping[str, Any] = field(default_factory=dict)

    def make(self) -> Any:
        """The model with weights drawn from torch's global generator, float32."""
        import transformers

        return getattr(transformers, self.architecture)(
            getattr(transformers, self.config)(**self.sizes)
        )

    def save(self, model: Any, folder: Path, shard_size: str) -> None:
        """Write the model as `save_pretrained` does."""
        model.save_pretrained(folder, max_shard_size=shard_size or "1GB")

    def load(self, folder: Path, dtype: str, **options: Any) -> Any:
        """The model in a folder, which another architecture of its family may have written."""
        import torch
        import transformers

        kind = getattr(transformers, self.architecture)
        return kind.from_pretrained(folder, dtype=getattr(torch, dtype), **options)


@dataclass(frozen=True)
class TorchModule:
    """A plain torch module: no class of transformers, one file and the least of a config."""

    parts: str  # a function of this file

    def make(self) -> Any:
        """The module with weights drawn from torch's global generator, float32."""
        import torch

        return torch.nn.ModuleDict(globals()[self.parts]())

    def save(self, model: Any, folder: Path, shard_size: str) -> None:
        """Write the state dict as one safetensors file, a minimal config.json beside it."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True)
        save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": self.parts}))

    def load(self, folder: Path, dtype: str, **options: Any) -> Any:
        """The module in a folder, in the dtype it was saved in."""
        import torch
        from safetensors.torch import load_file

        model = self.make().to(getattr(torch, dtype))
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model


def conv_block() -> dict[str, Any]:
    """The convolutions of a UNet block: every dimension, pointwise ones, and a projection."""
    from torch import nn

    return {
        "conv_in": nn.Conv2d(4, 8, 3, padding=1),
        "norm": nn.GroupNorm(2, 8),
        "conv_shortcut": nn.Conv2d(8, 16, 1),
        "conv_down": nn.Conv2d(8, 8, (3, 5), stride=2, bias=False),
        "conv_time": nn.Conv1d(8, 12, 3),
        "conv_gate": nn.Conv1d(12, 12, 1),
        "conv_video": nn.Conv3d(4, 8, (2, 3, 3)),
        "conv_frames": nn.Conv3d(8, 8, (3, 1, 1)),
        "conv_voxel": nn.Conv3d(8, 4, 1),
        "proj": nn.Linear(16, 24),
    }


def attention_block() -> dict[str, Any]:
    """torch's own attention, whose three input projections are one bare parameter."""
    from torch import nn

    return {
        "attn": nn.MultiheadAttention(32, 4, batch_first=True),
        "norm": nn.LayerNorm(32),
        "mlp": nn.Linear(32, 64),
    }


def nested_block() -> dict[str, Any]:
    """A module whose name is what data parallelism puts before every name."""
    from torch import nn

    inside = nn.ModuleDict({"proj": nn.Linear(32, 32), "out": nn.Linear(32, 16, bias=False)})
    return {"module": inside, "norm": nn.LayerNorm(16)}


MODELS: Mapping[str, TinyModel | TorchModule] = {
    "llama": TinyModel("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama_tied": TinyModel(
        "LlamaForCausalLM", "LlamaConfig", LLAMA | {"tie_word_embeddings": True}
    ),
    "llama_backbone": TinyModel("LlamaModel", "LlamaConfig", LLAMA),
    "llama_classifier": TinyModel("LlamaForSequenceClassification", "LlamaConfig", LLAMA),
    "gpt2": TinyModel("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2_backbone": TinyModel("GPT2Model", "GPT2Config", GPT2),
    "bert": TinyModel(
        "BertForSequenceClassification", "BertConfig", HEADS | BERT | {"num_labels": 3}
    ),
    "bert_masked": TinyModel("BertForMaskedLM", "BertConfig", HEADS | BERT),
    "t5": TinyModel("T5ForConditionalGeneration", "T5Config", T5),
    "whisper": TinyModel("WhisperForConditionalGeneration", "WhisperConfig", TOKENS | WHISPER),
    "vit": TinyModel("ViTForImageClassification", "ViTConfig", HEADS | VIT),
    "conv_block": TorchModule("conv_block"),
    "attention_block": TorchModule("attention_block"),
    "nested_block": TorchModule("nested_block"),
}
