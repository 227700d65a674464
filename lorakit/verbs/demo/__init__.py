"""demo: a tiny base and two adapters, made here from nothing, to try every command on.

The base has the names and shapes of a two-layer Llama in three bfloat16 shards; values are drawn
from a generator seeded by the tensor's name, so that every machine makes the same files.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorakit.adapter.weight_file import PEFT
from lorakit.errors import OutputError
from lorakit.formats.peft import factor_key
from lorakit.store.writing import make_folder, reporting, write_file, write_tensors
from lorakit.tensors import TensorInfo

HIDDEN, INNER, VOCABULARY, LAYERS, SHARDS = 64, 176, 512, 2, 3
TARGETS = {
    "style": ("q_proj", "v_proj"),
    "detail": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
SPREAD = 0.02


def demo(folder: str | Path) -> Path:
    """A folder that now holds `base`, `style` and `detail`: a checkpoint and two adapters for it.

    Raises:
        OutputError: the folder exists and is not empty.
    """
    folder = Path(folder)
    with reporting(folder):
        taken = folder.exists() and any(folder.iterdir())
    if taken:
        raise OutputError("is not empty.", hint="Name a new folder.", file=folder)
    shapes = _base_shapes()
    _write_base(folder / "base", shapes)
    for number, (name, targets) in enumerate(TARGETS.items()):
        _write_adapter(folder / name, shapes, targets, rank=4 * (number + 1))
    return folder


def _base_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        path = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{path}.self_attn.{name}.weight"] = (HIDDEN, HIDDEN)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{path}.mlp.{name}.weight"] = (INNER, HIDDEN)
        shapes[f"{path}.mlp.down_proj.weight"] = (HIDDEN, INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{path}.{name}.weight"] = (HIDDEN,)
    return {**shapes, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def _write_base(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    make_folder(folder, sync=False)
    names = list(shapes)
    weight_map: dict[str, str] = {}
    total = 0
    for i in range(SHARDS):
        file = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        cut = names[i * len(names) // SHARDS : (i + 1) * len(names) // SHARDS]
        total += _write_tensors(folder / file, {n: shapes[n] for n in cut}, "BF16")
        weight_map |= dict.fromkeys(cut, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCABULARY,
    }
    _write_json(folder / "config.json", config)


def _write_adapter(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], targets: tuple[str, ...], rank: int
) -> None:
    make_folder(folder, sync=False)
    factors = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets:
            factors[factor_key(module, "a")] = (rank, shape[-1])
            factors[factor_key(module, "b")] = (shape[0], rank)
    _write_tensors(folder / PEFT, factors, "F32", seed=folder.name)
    config = {
        "base_model_name_or_path": "base",
        "lora_alpha": 2 * rank,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
    }
    _write_json(folder / "adapter_config.json", config)


def _write_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, *, seed: str = ""
) -> int:
    """Write Gaussian tensors of these shapes; the bytes of all of them."""
    import numpy as np

    from lorakit.math.cast import storage

    def values(info: TensorInfo) -> bytes:
        rng = np.random.default_rng(zlib.crc32(f"{seed}{info.name}".encode()))
        return (rng.standard_normal(info.shape) * SPREAD).astype(storage(dtype)).tobytes()

    infos = [TensorInfo(n, dtype, s) for n, s in shapes.items()]
    write_tensors(path, infos, map(values, infos), sync=False)
    return sum(i.nbytes for i in infos)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_file(path, json.dumps(content, indent=2).encode() + b"\n", sync=False)
