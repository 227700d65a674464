"""Adapters of the rarer kinds, as PEFT trains and saves them, with what else it leaves behind.

The adapter as it was before training, the base as the initialisation left it, and what PEFT merges.
"""

import shutil
import warnings
import zlib
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.oracles.models import MODELS, TinyModel
from tests.oracles.reading import Array, read_tensors

Prepare = Callable[[Any, Any], None]  # of a model and a LoraConfig, before it is adapted

QWEN2 = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
    "use_sliding_window": True,
    "max_window_layers": 0,
    "sliding_window": 8,
    "tie_word_embeddings": False,
}
GEMMA = {
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 24,
    "tie_word_embeddings": False,
}
MODELS_HERE = {
    **MODELS,
    "qwen2": TinyModel("Qwen2ForCausalLM", "Qwen2Config", QWEN2),
    "gemma": TinyModel("GemmaForCausalLM", "GemmaConfig", GEMMA),
    "gemma2": TinyModel("Gemma2ForCausalLM", "Gemma2Config", GEMMA),
    "gemma3": TinyModel("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA),
}


@dataclass(frozen=True)
class Files:
    """Where the files of an adapter are."""

    model: str
    dtype: str
    base: Path
    adapter: Path
    initial: Path  # the adapter before training
    residual: Path  # the base that it was trained on, where the initialisation changed it

    def load(self, base: Path | None = None) -> Any:
        """The model of transformers in a folder, the base by default."""
        return MODELS_HERE[self.model].load(base or self.base, self.dtype)


@contextmanager
def quietly(name: str) -> Any:
    """Nothing printed, and random numbers of their own from torch's global generator."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(zlib.crc32(name.encode()))
        yield


def made(
    folder: Path,
    model: str,
    lora: Mapping[str, Any],
    *,
    dtype: str = "float32",
    prepare: Prepare = lambda _model, _config: None,
) -> Files:
    """A base and an adapter that PEFT trained (as it were) on it, in a folder that is there."""
    from peft import LoraConfig, get_peft_model

    files = Files(model, dtype, *(folder / n for n in ("base", "adapter", "initial", "residual")))
    with quietly(model):
        _save_base(files)
        config = LoraConfig(**{"r": 4, "lora_alpha": 6, **lora})
        trained = files.load()
        prepare(trained, config)
        trained = get_peft_model(trained, config)
        trained.save_pretrained(files.initial)
        if config.kasa_config or isinstance(config.init_lora_weights, str):
            deepcopy(trained).unload().save_pretrained(files.residual)
        _train(trained)
        trained.save_pretrained(files.adapter)
    return files


def merged_by_peft(files: Files, **options: Any) -> dict[str, Array]:
    """What PEFT makes of the base and the adapter, by the names on disk; `options` are of
    merge_and_unload.
    """
    from peft import PeftModel

    with quietly(files.model):
        model = PeftModel.from_pretrained(files.load(), files.adapter).merge_and_unload(**options)
        model.save_pretrained(files.base.parent / "peft")
    found = read_tensors(files.base.parent / "peft")
    shutil.rmtree(files.base.parent / "peft")
    return found


def _save_base(files: Files) -> None:
    import torch

    if files.base.exists():
        return
    weights = MODELS_HERE[files.model].make().to(getattr(torch, files.dtype))
    for values in weights.parameters():
        if values.ndim > 1:
            values.data *= 5  # deviations of 0.1, which training does not dwarf
        else:
            values.data += 0.1 * torch.randn_like(values)
    MODELS_HERE[files.model].save(weights, files.base, "60KB")


def _train(model: Any) -> None:
    """Move every trainable number from where the initialisation had it."""
    import torch

    generator = torch.Generator().manual_seed(7)
    for name, values in model.named_parameters():
        if values.requires_grad:
            size = 1.0 if "lora_diag" in name else 0.1
            values.data += size * torch.randn(values.shape, generator=generator).to(values.dtype)
