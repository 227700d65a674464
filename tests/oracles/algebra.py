"""What a merge must give: plain formulas in float64 on the tensors on disk, and one rounding.

The reference for every test of merging. It shares no line with lorakit, and it is slow, whole and
plain on purpose: adapters in PEFT's own spelling only, one small function for each kind of layer.

A weight multiplies the change that an adapter makes to a tensor (for DoRA: merged less base; for a
tensor or a row that it replaces: new less old). Every change is taken of the base after what was
replaced outright.
"""

import re
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from tests.oracles.reading import Array, read_json, read_tensors

Parts = dict[str, Array]  # role -> tensor, of one module

PREFIX = "base_model.model."
ROLES = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
    "token_adapter.trainable_tokens_delta",
)
# Read by training alone; and PEFT's second and third copy of a saved embedding.
IGNORED = (".lora_velora_", ".lora_monteclora_", ".modules_to_save.", ".original_module.")
# The layers of transformers that are Conv1D: stored (in, out).
CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
CONV1D_LEAVES = {"c_attn", "c_proj", "c_fc", "q_attn"}
HEAD, LABELS = "lm_head.weight", "score.weight"
# What models with tied embeddings call the one tensor.
EMBEDDINGS = ("embed_tokens.weight", "wte.weight")


def expected(
    base: Path, *adapters: Path, weights: Sequence[float] = (), untied_head: str = ""
) -> dict[str, Array]:
    """Every tensor of the merged checkpoint, float64, before it is rounded to a dtype on disk.

    Weights are one for each adapter; none at all means 1 for each. An untied head is one that the
    base shares with its embedding and the result does not.
    """
    conv1d = read_json(base / "config.json").get("model_type") in CONV1D_MODELS
    weighted = list(zip(adapters, weights or [1.0] * len(adapters), strict=True))
    tensors, steps = _replaced(base, weighted, untied_head)
    merged = dict(tensors)
    for name, step in steps:
        merged[name] = merged[name] + step
    for adapter, weight in weighted:
        for name, after in _merged_alone(tensors, adapter, conv1d).items():
            merged[name] = merged[name] + weight * (after - tensors[name])
    if LABELS in merged and LABELS not in read_tensors(base):
        merged.pop(HEAD, None)  # a model for a task has no head over the vocabulary
    return merged


def replaced(base: Path, *adapters: Path) -> dict[str, Array]:
    """The base with the tensors and rows that adapters replace, and nothing else of them."""
    return _replaced(base, [(adapter, 1.0) for adapter in adapters], "")[0]


# Parts of an adapter -----------------------------------------------------------------------------


def _modules(adapter: Path) -> dict[str, Parts]:
    """The tensors of an adapter that belong to a module, by module and role."""
    modules: dict[str, Parts] = {}
    for key, values in read_tensors(adapter).items():
        for role in ROLES:
            if key.endswith(f".{role}"):
                module = key.removeprefix(PREFIX).removesuffix(f".{role}")
                modules.setdefault(module, {})[role] = values
    return modules


def _replacements(adapter: Path) -> Parts:
    """The tensors of an adapter that stand for whole tensors of the base, by the name there."""
    return {
        key.removeprefix(PREFIX).replace(".base_layer.", "."): values
        for key, values in read_tensors(adapter).items()
        if not key.endswith(ROLES) and not any(part in key for part in IGNORED)
    }


def _on_disk(name: str, tensors: dict[str, Array]) -> str:
    """The tensor that a name means: itself, the one whose path ends like it, or a new one."""
    if name in tensors:
        return name
    near = [n for n in tensors if n.endswith(f".{name}") or name.endswith(f".{n}")]
    assert len(near) < 2, f"{name} could be any of {near}"
    return near[0] if near else name


# Replacing -------------------------------------------------------------------------------------


def _replaced(
    base: Path, weighted: Sequence[tuple[Path, float]], untied_head: str
) -> tuple[dict[str, Array], list[tuple[str, Array]]]:
    """The base with what is new in it, and the steps towards tensors that are only partly new."""
    tensors = read_tensors(base)
    if untied_head:
        (embedding,) = [n for n in tensors if n.endswith(EMBEDDINGS)]
        tensors[untied_head] = tensors[embedding]
    steps = []
    for adapter, weight in weighted:
        for key, values in _replacements(adapter).items():
            name = _on_disk(key, tensors)
            if weight == 1.0:
                tensors[name] = values
            else:
                steps.append((name, weight * (values - tensors[name])))
    for adapter, weight in weighted:
        for name, rows in _set_token_rows(tensors, adapter, weight):
            for step in (values for stepped, values in steps if stepped == name):
                step[rows] = 0.0
    return tensors, steps


def _set_token_rows(
    tensors: dict[str, Array], adapter: Path, weight: float
) -> list[tuple[str, list[int]]]:
    """`W[indices] = rows`, and which; a list of indices is about the input embedding."""
    found = []
    indices = read_json(adapter / "adapter_config.json").get("trainable_token_indices") or {}
    by_module = indices if isinstance(indices, dict) else {"embed_tokens": indices}
    for module, parts in _modules(adapter).items():
        if "token_adapter.trainable_tokens_delta" in parts:
            name = _on_disk(f"{module}.weight", tensors)
            (rows,) = [by_module[m] for m in by_module if f".{module}".endswith(f".{m}")]
            old, new = tensors[name][rows], parts["token_adapter.trainable_tokens_delta"]
            tensors[name] = tensors[name].copy()
            tensors[name][rows] = new if weight == 1.0 else old + weight * (new - old)
            found.append((name, rows))
    return found


# Changing --------------------------------------------------------------------------------------


def _merged_alone(tensors: dict[str, Array], adapter: Path, conv1d: bool) -> dict[str, Array]:
    """The tensors that the low-rank parts of one adapter change, as it would leave them."""
    config = read_json(adapter / "adapter_config.json")
    after = {}
    for module, parts in _modules(adapter).items():
        if "token_adapter.trainable_tokens_delta" in parts:
            continue
        name, times = _weight_of(module, tensors)
        scaling = _scaling(config, module, parts)
        transposed = conv1d and module.rpartition(".")[2] in CONV1D_LEAVES
        after[name] = _merged_weight(tensors[name], parts, times * scaling, transposed)
        if "lora_B.bias" in parts:
            bias = _on_disk(f"{module}.bias", tensors)
            after[bias] = tensors[bias] + scaling * parts["lora_B.bias"]
    return after


def _weight_of(module: str, tensors: dict[str, Array]) -> tuple[str, float]:
    """The tensor that a module's factors change, and how many times PEFT adds them to it.

    The output projection of torch's MultiheadAttention is named with `.base_layer` in the middle,
    and PEFT (to 0.21.2) adds its delta twice, in training as in merging.
    """
    if module.endswith(".base_layer.out_proj"):
        return _on_disk(module.replace(".base_layer.", ".") + ".weight", tensors), 2.0
    in_proj = _on_disk(f"{module}.in_proj_weight", tensors)
    if in_proj in tensors:
        return in_proj, 1.0
    return _on_disk(f"{module}.weight", tensors), 1.0


def _scaling(config: dict[str, Any], module: str, parts: Parts) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA; the rank is that of the tensors.

    Patterns are held against the name of the module that PEFT wrapped: for both projections of a
    MultiheadAttention, the attention itself.
    """
    module = module.removesuffix(".base_layer.out_proj")
    a = parts["lora_embedding_A"] if "lora_embedding_A" in parts else parts["lora_A.weight"]
    return scaling_of(config, module, a.shape[0])


def scaling_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA, with the first alpha pattern that matches."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
            break
    return float(alpha / (sqrt(rank) if config.get("use_rslora") else rank))


def _merged_weight(weight: Array, parts: Parts, scaling: float, transposed: bool) -> Array:
    if "lora_embedding_A" in parts:
        after = weight + scaling * _embedding_delta(parts)
        axis = 1  # the embedding dimension: norms run over the vocabulary
    elif weight.ndim > 2:
        after = weight + scaling * _conv_delta(parts)
        axis = 0
    elif transposed:
        after = weight + scaling * _linear_delta(parts).T
        axis = 1
    else:
        after = weight + scaling * _linear_delta(parts)
        axis = 0
    magnitude = parts.get("lora_magnitude_vector")
    return after if magnitude is None else _with_magnitude(after, magnitude.reshape(-1), axis)


def _linear_delta(parts: Parts) -> Array:
    """B A, (out, in)."""
    return parts["lora_B.weight"] @ parts["lora_A.weight"]


def _embedding_delta(parts: Parts) -> Array:
    """(B A) transposed, (vocabulary, dimension)."""
    return (parts["lora_embedding_B"] @ parts["lora_embedding_A"]).T


def _conv_delta(parts: Parts) -> Array:
    """The kernel of A followed by the pointwise kernel of B: sum over r of B[o, r] A[r, i, ...]."""
    b = parts["lora_B.weight"]
    delta: Array = np.einsum("or,ri...->oi...", b.reshape(b.shape[:2]), parts["lora_A.weight"])
    return delta


def _with_magnitude(values: Array, magnitude: Array, axis: int) -> Array:
    """Every slice along `axis` scaled to the norm that DoRA learnt for it."""
    after = np.empty_like(values)
    for i in range(values.shape[axis]):
        one = (slice(None),) * axis + (i,)
        after[one] = values[one] * (magnitude[i] / np.linalg.norm(values[one].ravel()))
    return after
