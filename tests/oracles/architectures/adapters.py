"""How the adapter of a case comes to be: trained (as it were) by PEFT, or written tensor by tensor.

Older layouts of a stack of experts are permutations of what PEFT writes today, so each is the same
adapter in other words.
"""

import json
import re
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.oracles.architectures.architecture import Architecture, renamed
from tests.oracles.architectures.case import Case
from tests.oracles.architectures.keys import EXPERTS, PREFIX, target
from tests.oracles.reading import Array, read_json, read_tensors

ABSENT = "absent"  # of a field that a config does not have
DEFAULTS: Mapping[str, Any] = {"r": 4, "lora_alpha": 6}
WRITTEN = {
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
}


def build(case: Case, kind: Architecture, base: Path, folder: Path) -> Path:
    """The folder with the adapter of a case; the same tensors every time."""
    made = folder / "made"
    if case.by_hand:
        _write_by_hand(case, base, made)
    else:
        _train(case, kind, base, made)
    config = read_json(made / "adapter_config.json")
    turned = case.in_first not in (None, kind.in_first)
    tensors = {
        PREFIX + renamed(key.removeprefix(PREFIX), case.spelling): values
        for key, values in _laid_out(case, read_tensors(made), config, turned=turned).items()
    }
    config |= {"init_lora_weights": True, **case.config}  # as of any training
    _save(tensors, {k: v for k, v in config.items() if v != ABSENT}, folder / "adapter")
    return folder / "adapter"


def _train(case: Case, kind: Architecture, base: Path, folder: Path) -> None:
    """What PEFT saves of an adapter whose every number has moved."""
    import peft
    import torch

    config = peft.LoraConfig(**DEFAULTS | dict(case.lora), init_lora_weights=False)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(kind.load(base), config)
        rng = _generator(case)
        for name, values in model.named_parameters():
            if values.requires_grad:
                values.data = torch.tensor(_drawn(rng, name, tuple(values.shape)))
        model.save_pretrained(folder, save_embedding_layers=False)


def _write_by_hand(case: Case, base: Path, folder: Path) -> None:
    """Factors for every matrix on disk whose module matches, named as on disk."""
    rng, config = _generator(case), DEFAULTS | WRITTEN | dict(case.lora)
    tensors = {}
    for name, weight in sorted(read_tensors(base).items()):
        module = name.removesuffix(".weight")
        if not re.fullmatch(case.by_hand, module):
            continue
        ranks = config.get("rank_pattern") or {}
        found = [r for p, r in ranks.items() if re.match(rf"(.*\.)?({p})$", module)]
        rank, (out, inner) = (found or [config["r"]])[0], weight.shape
        a, b = ("lora_A.weight", "lora_B.weight")
        if module.endswith("embed_tokens"):
            a, b, out, inner = "lora_embedding_A", "lora_embedding_B", inner, out
        tensors[f"{PREFIX}{module}.{a}"] = _drawn(rng, a, (rank, inner))
        tensors[f"{PREFIX}{module}.{b}"] = _drawn(rng, b, (out, rank))
    _save(tensors, config, folder)


def _laid_out(
    case: Case, tensors: Mapping[str, Array], config: Mapping[str, Any], *, turned: bool
) -> dict[str, Array]:
    """The factors of stacks of experts as the case has them, from those that PEFT writes today."""
    laid = dict(tensors)
    for key, a in tensors.items():
        module, found, role = key.rpartition(".lora_A.")
        if not found or not target(module.removeprefix(PREFIX), config).stacked:
            continue
        b = tensors[f"{module}.lora_B.{role}"]
        if turned:
            a, b = _turned(a, b)
        if case.packing == "unsloth":
            b = b.reshape(len(b), -1, EXPERTS).transpose(0, 2, 1).reshape(b.shape)
        laid |= {key: a, f"{module}.lora_B.{role}": b}
    return laid


def _turned(a: Array, b: Array) -> tuple[Array, Array]:
    """Factors of the transposed deltas: each of the two takes the place of the other."""
    downs, ups = a.reshape(EXPERTS, -1, a.shape[1]), b.reshape(len(b), -1, EXPERTS)
    return (
        ups.transpose(2, 1, 0).reshape(-1, len(b)),
        downs.transpose(2, 1, 0).reshape(a.shape[1], -1),
    )


def _generator(case: Case) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(case.model.encode()))


def _drawn(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> Any:
    size = 0.05 if "lora_B" in name or "embedding_B" in name else 0.3
    return (size * rng.standard_normal(shape)).astype(np.float32)


def _save(tensors: Mapping[str, Any], config: Mapping[str, Any], folder: Path) -> None:
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    arrays = {key: np.ascontiguousarray(t, dtype=np.float32) for key, t in tensors.items()}
    save_file(arrays, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / "adapter_config.json").write_text(text)
