"""Bases and adapters that are wrong: each function spoils one in the folder that it is run in, and
returns the command that must refuse it.
"""

import io
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np

from tests.cli.spoil import (
    CONFIG,
    INDEX,
    LAST,
    LAYER,
    MERGE,
    SHARD,
    WEIGHTS,
    declare,
    edit,
    entry,
    put,
    read,
    tensor,
    write,
)


def cut_shard() -> list[str]:
    os.truncate(SHARD, SHARD.stat().st_size - 1000)
    return MERGE


def cut_header() -> list[str]:
    os.truncate(SHARD, 100)
    return MERGE


def empty_shard() -> list[str]:
    os.truncate(SHARD, 0)
    return MERGE


def pointer() -> list[str]:
    Path(SHARD).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return MERGE


def unreadable_companion() -> list[str]:
    Path("base/tokenizer.json").symlink_to("/proc/self/mem")  # whose first byte is an I/O error
    return MERGE


def pipe() -> list[str]:
    os.mkfifo("pipe.safetensors")
    return ["merge", "pipe.safetensors", "style", "-o", "merged"]


def missing_shard() -> list[str]:
    SHARD.unlink()
    return MERGE


def missing_shard_no_index() -> list[str]:
    SHARD.unlink()
    INDEX.unlink()
    return MERGE


def stale_shard() -> list[str]:
    shutil.copy(LAST, SHARD)
    return MERGE


def no_weight_map() -> list[str]:
    INDEX.write_text("{}")
    return MERGE


def index_is_no_json() -> list[str]:
    INDEX.write_text('{"weight_map": {')
    return MERGE


def index_leads_out() -> list[str]:
    index = json.loads(INDEX.read_text())
    index["weight_map"]["lm_head.weight"] = "../secret.safetensors"
    INDEX.write_text(json.dumps(index))
    return MERGE


def header_bomb() -> list[str]:
    with Path("bad.safetensors").open("wb") as f:
        f.write((1 << 30).to_bytes(8, "little"))
        f.truncate((1 << 30) + 8)
    return ["merge", "bad.safetensors", "style", "-o", "merged"]


def deep_header() -> list[str]:
    text = b"[" * 1_000_000
    Path("bad.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    return ["merge", "bad.safetensors", "style", "-o", "merged"]


def twice_in_header() -> list[str]:
    text = b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"w":0}'
    Path("bad.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0")
    return ["merge", "bad.safetensors", "style", "-o", "merged"]


def quantised() -> list[str]:
    put(Path("base/model-00001-of-00003.safetensors"), {f"{LAYER}.weight": tensor((64, 64), "I8")})
    return MERGE


def packed() -> list[str]:
    write(
        Path("packed.safetensors"),
        {f"{LAYER}.qweight": tensor((8, 64), "I32"), f"{LAYER}.scales": tensor((1, 64), "F16")},
    )
    return ["merge", "packed.safetensors", "style", "-o", "merged"]


def lone_adapter() -> list[str]:
    CONFIG.unlink()
    return MERGE


def two_adapters() -> list[str]:
    Path("both").mkdir()
    shutil.copytree("style", "both/style")
    shutil.copytree("detail", "both/detail")
    return ["merge", "base", "both", "-o", "merged"]


def pickled() -> list[str]:
    WEIGHTS.with_suffix(".bin").write_bytes(pickle.dumps({}))
    WEIGHTS.unlink()
    return MERGE


class Code:
    def __reduce__(self):
        return os.system, ("echo pwned",)


def running_pickle() -> list[str]:
    buffer = io.BytesIO()
    pickle.dump({"weight": Code()}, buffer, protocol=2)
    WEIGHTS.with_suffix(".bin").write_bytes(buffer.getvalue())
    WEIGHTS.unlink()
    return [*MERGE, "--allow-pickle"]


def half_pair() -> list[str]:
    put(WEIGHTS, {f"base_model.model.{LAYER}.lora_B.weight": None})
    return MERGE


def unknown_key() -> list[str]:
    put(WEIGHTS, {"base_model.model.model.layers.0.self_attn.q_norm.weight": tensor((64,))})
    return MERGE


def other_names() -> list[str]:
    renamed = {n.replace("model.layers", "transformer.h"): t for n, t in read(WEIGHTS).items()}
    write(WEIGHTS, {n.replace("q_proj", "query"): t for n, t in renamed.items()})
    return MERGE


def other_shape() -> list[str]:
    module = f"base_model.model.{LAYER}"
    put(WEIGHTS, {f"{module}.lora_A.weight": tensor((4, 128))})
    return MERGE


def not_finite() -> list[str]:
    name = f"base_model.model.{LAYER}.lora_B.weight"
    info, data = read(WEIGHTS)[name]
    values = np.frombuffer(data, "f4").copy()
    values[:3] = np.nan
    put(WEIGHTS, {name: (info, values.tobytes())})
    return MERGE


def tied() -> list[str]:
    edit(Path("base/config.json"), tie_word_embeddings=True)
    put(LAST, {"lm_head.weight": None})
    INDEX.unlink()
    head = "base_model.model.lm_head.lora_{}.weight".format
    put(WEIGHTS, {head("A"): tensor((4, 64)), head("B"): tensor((512, 4))})
    return MERGE


def both_replace() -> list[str]:
    for path in (WEIGHTS, Path("detail/adapter_model.safetensors")):
        put(path, {"base_model.model.lm_head.weight": tensor((512, 64))})
    return ["merge", "base", "style", "detail", "-o", "merged"]


def odd_pattern() -> list[str]:
    edit(CONFIG, alpha_pattern={"(": 3})
    return MERGE


def odd_fact() -> list[str]:
    edit(Path("base/config.json"), model_type={"llama": 1})
    return MERGE


def long_pattern() -> list[str]:
    edit(CONFIG, alpha_pattern={"q_proj|" * 300: 3})
    return MERGE


def wrong_size_of_tensor() -> list[str]:
    return declare({"w": entry(0, 8, [4])}, 8)


def overlapping() -> list[str]:
    return declare({"v": entry(0, 8, [2]), "w": entry(4, 12, [2])}, 12)


def outside() -> list[str]:
    return declare({"w": entry(0, 1 << 40, [1 << 38])}, 8)


def tokens() -> list[str]:
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    put(WEIGHTS, {name: tensor((2, 64))})
    edit(CONFIG, trainable_token_indices=[5])
    return MERGE


def float8_with_scale() -> list[str]:
    put(
        Path("base/model-00001-of-00003.safetensors"),
        {
            f"{LAYER}.weight": tensor((64, 64), "F8_E4M3"),
            f"{LAYER}.weight_scale_inv": tensor((1, 1)),
        },
    )
    INDEX.unlink()
    return MERGE


def fused_experts() -> list[str]:
    module = "base_model.model.model.layers.0.mlp.experts.base_layer"
    put(WEIGHTS, {f"{module}.lora_A.weight": tensor((8, 64))})
    put(WEIGHTS, {f"{module}.lora_B.weight": tensor((64, 8))})
    return MERGE


def adalora() -> list[str]:
    put(WEIGHTS, {f"base_model.model.{LAYER}.lora_E": tensor((4, 1))})
    return MERGE
