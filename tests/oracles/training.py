"""How the files of a case come to be: a base, an adapter trained (as it were) on it, PEFT's merge.

Nothing in an adapter is left where it began, so that a merge that forgets a tensor shows.
"""

import re
import shutil
import warnings
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tests.oracles.case import CRASHES, Built, Case
from tests.oracles.models import MODELS
from tests.oracles.reading import read_dtypes
from tests.oracles.spellings import Spelling

SUB_CONFIGS = {"velora_config": "VeloraConfig", "monteclora_config": "MontecloraConfig"}


def build(case: Case, folder: Path) -> Built:
    """The files of a case, in an empty folder; the same tensors every time."""
    import torch

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        _quiet()
        _save_base(case, folder / "base")
        saved = _save_adapter(case, folder)
        if case.peft_fault != CRASHES:
            _save_merged(case, saved, folder)
        built = _layout(case, folder)
        for path, spelling in ((built.adapter, case.spelling), (built.plain, case.disk_names)):
            if spelling:
                _rewrite(saved, path, spelling)
    return built


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _layout(case: Case, folder: Path) -> Built:
    inside = "" if case.adapter_name == "default" else case.adapter_name
    saved = folder / "saved" / inside
    return Built(
        case=case,
        base=folder / "base",
        adapter=folder / "adapter" if case.spelling else saved,
        plain=folder / "plain" if case.disk_names else saved,
        peft=folder / "peft.safetensors",
    )


def _save_base(case: Case, folder: Path) -> None:
    import torch

    torch.manual_seed(zlib.crc32(case.model.encode()))
    model = MODELS[case.on_disk or case.model]
    weights = model.make().to(getattr(torch, case.dtype))
    for values in weights.parameters():
        if values.ndim == 1:  # norms and biases begin at one and at zero
            values.data += 0.1 * torch.randn_like(values)
    model.save(weights, folder, case.shard_size)


def load(case: Case, base: Path) -> Any:
    """The model that an adapter is trained on, from the base in a folder."""
    model = MODELS[case.model].load(base, case.dtype, **case.load)
    if case.vocab_size:
        model.resize_token_embeddings(case.vocab_size)
    return model


def _save_adapter(case: Case, folder: Path) -> Path:
    """Where PEFT wrote the adapter that it trained (as it were) on the base in `folder`."""
    import peft

    name = case.adapter_name
    model = peft.get_peft_model(load(case, folder / "base"), _config(case), adapter_name=name)
    _train(model, case.also_trained)
    model.save_pretrained(folder / "saved", **case.save)
    saved = folder / "saved" / ("" if name == "default" else name)
    if case.adapter_dtype:
        _rewrite(saved, saved, dtype=case.adapter_dtype)
    return saved


def _config(case: Case) -> Any:
    from peft import LoraConfig
    from peft.tuners.lora import config

    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **case.lora}
    for name in SUB_CONFIGS.keys() & options.keys():
        options[name] = getattr(config, SUB_CONFIGS[name])(**options[name])
    return LoraConfig(**options)


def _train(model: Any, also: str) -> None:
    """Move every trainable parameter from where it began; the draws do not depend on the base."""
    import torch

    generator = torch.Generator().manual_seed(7)
    for name, values in model.named_parameters():
        if values.requires_grad or (also and re.search(also, name)):
            draws = torch.randn(values.shape, generator=generator).to(values.dtype)
            values.data.copy_(_step(name, values.data, draws))  # in place: some share memory


def _step(name: str, values: Any, draws: Any) -> Any:
    if "lora_magnitude_vector" in name:
        return values * (1 + 0.2 * draws)
    if "lora_" in name:
        return 0.1 * draws
    return values + 0.05 * draws


def _rewrite(source: Path, target: Path, spelling: Spelling = str, dtype: str = "") -> None:
    """Write an adapter again with other keys, or in another dtype."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "adapter_model.safetensors")
    if dtype:
        tensors = {name: values.to(getattr(torch, dtype)) for name, values in tensors.items()}
    if source != target:
        target.mkdir()
        shutil.copy(source / "adapter_config.json", target)
    renamed = {spelling(name): values for name, values in tensors.items()}
    save_file(renamed, target / "adapter_model.safetensors", metadata={"format": "pt"})


def _save_merged(case: Case, adapter: Path, folder: Path) -> None:
    """What PEFT makes of the two, in one file, under the names of the base on disk."""
    from peft import PeftModel
    from safetensors.torch import load_file, save_file

    merged = PeftModel.from_pretrained(load(case, folder / "base"), adapter).merge_and_unload()
    MODELS[case.model].save(merged, folder / "merged", "")
    tensors = load_file(folder / "merged" / "model.safetensors")
    names = read_dtypes(folder / "base").keys()
    renamed = {_on_disk(name, names): values for name, values in tensors.items()}
    save_file(renamed, folder / "peft.safetensors")
    shutil.rmtree(folder / "merged")


def _on_disk(name: str, names: Collection[str]) -> str:
    """A base may be the backbone of the model trained, or the other way round: one prefix apart."""
    near = [n for n in names if f".{n}".endswith(f".{name}") or f".{name}".endswith(f".{n}")]
    return near[0] if len(near) == 1 else name
