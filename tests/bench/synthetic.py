"""Makes a Llama-shaped base of a given size and an adapter for it: python -m tests.bench.synthetic
OUT GB.

Values are Gaussian with the spread of real weights, drawn once and repeated, so that gigabytes take
seconds.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from lorakit.store.header import format_header
from lorakit.tensors import BITS, TensorInfo

DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
TARGETS = {
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qv": ["q_proj", "v_proj"],
}


def layer(i: int, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one decoder layer."""
    p = f"model.layers.{i}"
    return {
        f"{p}.self_attn.q_proj.weight": (hidden, hidden),
        f"{p}.self_attn.k_proj.weight": (hidden // 4, hidden),
        f"{p}.self_attn.v_proj.weight": (hidden // 4, hidden),
        f"{p}.self_attn.o_proj.weight": (hidden, hidden),
        f"{p}.mlp.gate_proj.weight": (inner, hidden),
        f"{p}.mlp.up_proj.weight": (inner, hidden),
        f"{p}.mlp.down_proj.weight": (hidden, inner),
        f"{p}.input_layernorm.weight": (hidden,),
        f"{p}.post_attention_layernorm.weight": (hidden,),
    }


def shapes(gigabytes: float, hidden: int, bits: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a model of about this size."""
    vocabulary = 32000
    found = {"model.embed_tokens.weight": (vocabulary, hidden)}
    one = sum(int(np.prod(s)) for s in layer(0, hidden, hidden * 11 // 4).values()) * bits // 8
    count = max(1, round((gigabytes * 1e9 - 2 * vocabulary * hidden * bits / 8) / one))
    for i in range(count):
        found |= layer(i, hidden, hidden * 11 // 4)
    return {**found, "model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def blocks(nbytes: int, dtype: str, seed: int) -> Iterator[bytes]:
    """Bytes of Gaussian weights."""
    rng = np.random.default_rng(seed)
    pool = (rng.standard_normal(1 << 21, np.float32) * 0.02).astype(DTYPES[dtype]).tobytes()
    while nbytes > 0:
        yield pool[:nbytes]
        nbytes -= len(pool)


def write(path: Path, tensors: dict[str, tuple[int, ...]], dtype: str) -> None:
    """One safetensors file of these tensors."""
    infos = [TensorInfo(n, dtype, s) for n, s in tensors.items()]
    with path.open("wb") as f:
        f.write(format_header(infos, {"format": "pt"}))
        for number, info in enumerate(infos):
            for data in blocks(info.nbytes, dtype, number % 7):
                f.write(data)


def base(
    out: Path, gigabytes: float, dtype: str, hidden: int, shards: int
) -> dict[str, tuple[int, ...]]:
    """A sharded base folder."""
    out.mkdir(parents=True)
    tensors = shapes(gigabytes, hidden, BITS[dtype])
    names = list(tensors)
    cuts = [names[i * len(names) // shards : (i + 1) * len(names) // shards] for i in range(shards)]
    weight_map = {}
    for i, cut in enumerate(cuts):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        write(out / file, {n: tensors[n] for n in cut}, dtype)
        weight_map |= dict.fromkeys(cut, file)
    if shards > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    layers = sum(n.endswith("q_proj.weight") for n in names)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_hidden_layers": layers,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
        "torch_dtype": {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[dtype],
    }
    (out / "config.json").write_text(json.dumps(config, indent=2))
    return tensors


def adapter(out: Path, tensors: dict[str, tuple[int, ...]], targets: str, rank: int) -> None:
    """A PEFT adapter on these targets."""
    out.mkdir(parents=True)
    factors: dict[str, tuple[int, ...]] = {}
    for name, shape in tensors.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in TARGETS[targets]:
            factors[f"base_model.model.{module}.lora_A.weight"] = (rank, shape[1])
            factors[f"base_model.model.{module}.lora_B.weight"] = (shape[0], rank)
    write(out / "adapter_model.safetensors", factors, "F32")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": TARGETS[targets],
        "base_model_name_or_path": "synthetic",
        "task_type": "CAUSAL_LM",
    }
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2))


def main() -> None:
    """Write OUT/base, OUT/all and OUT/qv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("gigabytes", type=float)
    parser.add_argument("--dtype", default="BF16", choices=DTYPES)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    tensors = base(args.out / "base", args.gigabytes, args.dtype, args.hidden, args.shards)
    for targets in TARGETS:
        adapter(args.out / targets, tensors, targets, args.rank)


if __name__ == "__main__":
    main()
