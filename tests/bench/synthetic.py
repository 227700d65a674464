"""Makes a Llama-shaped base of a given size and adapters for it.

Run: python -m tests.bench.synthetic OUT GB. Writes OUT/base, and the adapters OUT/all (every linear
layer), OUT/qv (attention only) and OUT/embed (every linear layer and the embedding). Values are
Gaussian with the spread of real weights, drawn once and repeated, so that gigabytes take seconds;
transformers loads the base.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from lorakit.store.header import format_header
from lorakit.tensors import BITS, TensorInfo

DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
TARGETS = {"all": LINEAR, "qv": ["q_proj", "v_proj"], "embed": [*LINEAR, "embed_tokens"]}
HEADS, KV_HEADS = 16, 4
POOL = 1 << 21  # Gaussian numbers drawn for one tensor, and repeated from varying places

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Model:
    """What base to make; `hidden` is a multiple of 32. Without a head it is a bare LlamaModel."""

    gigabytes: float
    dtype: str = "BF16"
    hidden: int = 2048
    vocabulary: int = 32000
    head: bool = True
    layers: int | None = None  # None: as many as the size asks for

    @property
    def inner(self) -> int:
        """The width of the MLP."""
        return self.hidden * 11 // 4

    @property
    def depth(self) -> int:
        """The number of decoder layers."""
        if self.layers is not None:
            return self.layers
        elements = self.gigabytes * 1e9 * 8 / BITS[self.dtype]
        ends = (1 + self.head) * self.vocabulary * self.hidden
        return max(1, round((elements - ends) / sum(map(math.prod, self.layer(0).values()))))

    def layer(self, i: int) -> Shapes:
        """The tensors of one decoder layer."""
        p, hidden, narrow = f"model.layers.{i}", self.hidden, self.hidden * KV_HEADS // HEADS
        return {
            f"{p}.self_attn.q_proj.weight": (hidden, hidden),
            f"{p}.self_attn.k_proj.weight": (narrow, hidden),
            f"{p}.self_attn.v_proj.weight": (narrow, hidden),
            f"{p}.self_attn.o_proj.weight": (hidden, hidden),
            f"{p}.mlp.gate_proj.weight": (self.inner, hidden),
            f"{p}.mlp.up_proj.weight": (self.inner, hidden),
            f"{p}.mlp.down_proj.weight": (hidden, self.inner),
            f"{p}.input_layernorm.weight": (hidden,),
            f"{p}.post_attention_layernorm.weight": (hidden,),
        }

    @property
    def shapes(self) -> Shapes:
        """Every tensor, in the order in which it is written."""
        end = (self.vocabulary, self.hidden)
        found: Shapes = {"model.embed_tokens.weight": end}
        for i in range(self.depth):
            found |= self.layer(i)
        found["model.norm.weight"] = (self.hidden,)
        return found | ({"lm_head.weight": end} if self.head else {})

    @property
    def config(self) -> dict[str, object]:
        """The config.json of LlamaForCausalLM for these shapes."""
        return {
            "architectures": ["LlamaForCausalLM" if self.head else "LlamaModel"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": self.hidden // HEADS,
            "num_hidden_layers": self.depth,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "torch_dtype": TORCH_NAMES[self.dtype],
        }


def blocks(count: int, dtype: str, seed: int) -> Iterator[bytes]:
    """The bytes of `count` Gaussian weights."""
    rng = np.random.default_rng(seed)
    pool = (rng.standard_normal(POOL, np.float32) * 0.02).astype(DTYPES[dtype])
    while count > 0:
        start = int(rng.integers(POOL // 2))
        yield pool[start : start + count].tobytes()
        count -= POOL - start


def write(path: Path, tensors: Mapping[str, tuple[int, ...]], dtype: str) -> None:
    """One safetensors file of these tensors."""
    infos = [TensorInfo(n, dtype, s) for n, s in tensors.items()]
    with path.open("wb") as f:
        f.write(format_header(infos, {"format": "pt"}))
        for seed, info in enumerate(infos):
            for data in blocks(info.numel, dtype, seed):
                f.write(data)


def cut(tensors: Shapes, shards: int) -> list[Shapes]:
    """The tensors in their order, in so many parts of about the same size."""
    whole, before = sum(map(math.prod, tensors.values())), 0
    parts: list[Shapes] = [{} for _ in range(shards)]
    for name, shape in tensors.items():
        parts[before * shards // whole][name] = shape
        before += math.prod(shape)
    return [p for p in parts if p]


def base(out: Path, model: Model, shards: int) -> Shapes:
    """Write a base folder; its tensors."""
    out.mkdir(parents=True)
    tensors = model.shapes
    parts = cut(tensors, shards)
    weight_map: dict[str, str] = {}
    for i, part in enumerate(parts):
        end = f"-{i + 1:05}-of-{len(parts):05}" if len(parts) > 1 else ""
        write(out / f"model{end}.safetensors", part, model.dtype)
        weight_map |= dict.fromkeys(part, f"model{end}.safetensors")
    if len(parts) > 1:
        total = sum(map(math.prod, tensors.values())) * BITS[model.dtype] // 8
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (out / "config.json").write_text(json.dumps(model.config, indent=2))
    return tensors


def factors(module: str, shape: tuple[int, ...], rank: int) -> Shapes:
    """The two factors of a module's update, as PEFT names them."""
    start = f"base_model.model.{module}"
    if module.endswith("embed_tokens"):
        return {
            f"{start}.lora_embedding_A": (rank, shape[0]),
            f"{start}.lora_embedding_B": (shape[1], rank),
        }
    return {
        f"{start}.lora_A.weight": (rank, shape[1]),
        f"{start}.lora_B.weight": (shape[0], rank),
    }


def adapter(out: Path, tensors: Shapes, targets: str, rank: int) -> None:
    """A PEFT adapter on these targets."""
    out.mkdir(parents=True)
    found: Shapes = {}
    for name, shape in tensors.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in TARGETS[targets]:
            found |= factors(module, shape, rank)
    write(out / "adapter_model.safetensors", found, "F32")
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
    """Write OUT/base and the adapters."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("gigabytes", type=float)
    parser.add_argument("--dtype", default="BF16", choices=DTYPES)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--layers", type=int, help="so many, whatever the size becomes")
    parser.add_argument("--no-head", action="store_true", help="leave lm_head out")
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    model = Model(
        args.gigabytes, args.dtype, args.hidden, args.vocabulary, not args.no_head, args.layers
    )
    tensors = base(args.out / "base", model, args.shards)
    for targets in TARGETS:
        adapter(args.out / targets, tensors, targets, args.rank)


if __name__ == "__main__":
    main()
