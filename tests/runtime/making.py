"""Tiny models of transformers in folders, and adapters that PEFT makes for them."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}


def llama(folder: Path, seed: int = 1, **sizes: Any) -> Path:
    """Write a Llama whose layers bitsandbytes can pack; its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes}))
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


def load(folder: Path, dtype: str = "float32") -> Any:
    """The Llama in a folder."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()


def trained(model: nn.Module, folder: Path, seed: int = 1, **lora: Any) -> Path:
    """Write the adapter of a LoraConfig for a model, none of its tensors where it began."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **lora})
    generator = torch.Generator().manual_seed(seed)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)  # which PEFT draws from
        adapted = get_peft_model(model, config)
        for values in adapted.parameters():
            if values.requires_grad:
                values.data += 0.1 * torch.randn(values.shape, generator=generator).to(values.dtype)
        adapted.save_pretrained(folder)
    return folder
