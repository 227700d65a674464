"""Wrong inputs, made out of the demo's files: each function spoils something in the folder that it
is run in, and returns the command that must refuse it.

`WRONG` has them under the words of docs/reference/exit-codes.md.
"""

import contextlib
import fcntl
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.cli import main
from lorakit.store.header import format_header, parse_header
from lorakit.tensors import TensorInfo

SHARD = Path("base/model-00002-of-00003.safetensors")
LAST = Path("base/model-00003-of-00003.safetensors")
INDEX = Path("base/model.safetensors.index.json")
WEIGHTS = Path("style/adapter_model.safetensors")
CONFIG = Path("style/adapter_config.json")
MERGE = ["merge", "base", "style", "-o", "merged"]
LAYER = "model.layers.0.self_attn.q_proj"
Tensors = dict[str, tuple[TensorInfo, bytes]]


def read(path: Path) -> Tensors:
    raw = path.read_bytes()
    infos, _ = parse_header(raw[8 : 8 + int.from_bytes(raw[:8], "little")], len(raw), path)
    return {n: (i, raw[i.extent[0] : i.extent[1]]) for n, i in infos.items()}


def write(path: Path, tensors: Tensors) -> None:
    infos = [TensorInfo(n, i.dtype, i.shape) for n, (i, _) in tensors.items()]
    path.write_bytes(format_header(infos, {}) + b"".join(d for _, d in tensors.values()))


def tensor(shape: tuple[int, ...], dtype: str = "F32") -> tuple[TensorInfo, bytes]:
    info = TensorInfo("", dtype, shape)
    return info, bytes(info.nbytes)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def put(path: Path, tensors: Tensors) -> None:
    """Put more tensors into a weight file; None takes one out."""
    both = {**read(path), **tensors}
    write(path, {n: t for n, t in both.items() if t})


def flip(path: Path, byte: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[byte] ^= 1
    path.write_bytes(raw)


def declare(header: dict[str, Any], data: int) -> list[str]:
    """A base of one file with this header and so many bytes of data."""
    text = json.dumps(header).encode()
    Path("bad.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return ["merge", "bad.safetensors", "style", "-o", "merged"]


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def configured(**changes: Any) -> Callable[[], list[str]]:
    """The demo's adapter with other fields in its config."""

    def spoil() -> list[str]:
        edit(CONFIG, **changes)
        return MERGE

    return spoil


def plain(*command: str) -> Callable[[], list[str]]:
    """A command that is wrong by itself."""
    return lambda: list(command)


def merged() -> None:
    """Leave the result of a merge in the folder."""
    with contextlib.suppress(SystemExit):
        main([*MERGE, "--quiet"])
    assert Path("merged").is_dir()


def cut_shard() -> list[str]:
    os.truncate(SHARD, SHARD.stat().st_size - 1000)
    return MERGE


def cut_header() -> list[str]:
    os.truncate(SHARD, 100)
    return MERGE


def empty_shard() -> list[str]:
    os.truncate(SHARD, 0)
    return MERGE


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


def no_disk() -> list[str]:
    free = shutil.disk_usage(".").free
    info = TensorInfo(f"{LAYER}.weight", "BF16", (64, 64))
    ballast = TensorInfo("ballast", "U8", (free + (1 << 30),))
    header = format_header([info, ballast], {})
    with Path("huge.safetensors").open("wb") as f:
        f.write(header)
        f.truncate(len(header) + info.nbytes + ballast.nbytes)  # sparse: takes no space
    one = {n: t for n, t in read(WEIGHTS).items() if LAYER in n}
    write(WEIGHTS, one)
    return ["merge", "huge.safetensors", "style", "-o", "merged"]


def exists() -> list[str]:
    merged()
    return MERGE


HELD: list[int] = []  # locks that are held until the process ends


def two_writers() -> list[str]:
    Path("merged.partial").mkdir()
    HELD.append(os.open("merged.partial", os.O_RDONLY))
    fcntl.flock(HELD[-1], fcntl.LOCK_EX)
    return MERGE


def unfinished() -> list[str]:
    Path("merged.partial").mkdir()
    Path("merged.partial/.lorakit-journal").write_text('{"plan":"of something else"}\n')
    Path("merged.partial/model.safetensors.partial").write_text("half done")
    return MERGE


def no_folder() -> list[str]:
    Path("file").write_text("")
    return ["merge", "base", "style", "-o", "file/merged"]


def replaced_layers() -> list[str]:
    put(WEIGHTS, {"base_model.model.lm_head.weight": tensor((512, 64))})
    return ["unmerge", "base", "style", "-o", "back"]


def dora() -> list[str]:
    put(WEIGHTS, {f"base_model.model.{LAYER}.lora_magnitude_vector": tensor((64,))})
    edit(CONFIG, use_dora=True)
    return ["unmerge", "base", "style", "-o", "back"]


def both_replace() -> list[str]:
    for path in (WEIGHTS, Path("detail/adapter_model.safetensors")):
        put(path, {"base_model.model.lm_head.weight": tensor((512, 64))})
    return ["merge", "base", "style", "detail", "-o", "merged"]


def changed_number() -> list[str]:
    merged()
    path = Path("merged/model-00001-of-00003.safetensors")
    info, _ = read(path)[f"{LAYER}.weight"]
    flip(path, info.extent[1] - 1)
    return ["verify", "merged"]


def changed_copy() -> list[str]:
    merged()
    path = Path("merged/model-00003-of-00003.safetensors")
    flip(path, path.stat().st_size - 1)
    return ["verify", "merged"]


def lost_file() -> list[str]:
    merged()
    Path("merged/model-00003-of-00003.safetensors").unlink()
    return ["verify", "merged"]


def stray_file() -> list[str]:
    merged()
    shutil.copy(LAST, "merged/model.safetensors")
    return ["verify", "merged"]


def other_index() -> list[str]:
    merged()
    index = json.loads(INDEX.read_text())
    index["weight_map"]["lm_head.weight"] = SHARD.name
    Path("merged", INDEX.name).write_text(json.dumps(index))
    return ["verify", "merged"]


def other_fact() -> list[str]:
    with contextlib.suppress(SystemExit):
        main([*MERGE, "--dtype", "float32", "--quiet"])
    edit(Path("merged/config.json"), torch_dtype="bfloat16")
    return ["verify", "merged"]


def strange_manifest() -> list[str]:
    merged()
    edit(Path("merged/lorakit.json"), inputs=[{"path": 3}])
    return ["verify", "merged"]


def other_adapter() -> list[str]:
    merged()
    return ["verify", "merged", "--adapter", "detail"]


def base_gone() -> list[str]:
    merged()
    Path("base").rename("moved")
    return ["verify", "merged"]


def odd_pattern() -> list[str]:
    edit(CONFIG, alpha_pattern={"(": 3})
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
    edit(CONFIG, peft_type="ADALORA")
    return MERGE


# The commands that go with the words of docs/reference/exit-codes.md.
WRONG: dict[str, Callable[[], list[str]]] = {
    # 2
    "a command that is not there": plain("merg", "base", "style", "-o", "merged"),
    "an option that is not there": plain(*MERGE, "--overwrit"),
    "no output": plain("merge", "base", "style"),
    "more weights than adapters": plain(*MERGE, "--weight", "1", "--weight", "0.5"),
    "a weight that is not finite": plain(*MERGE, "--weight", "inf"),
    "a size that is none": plain(*MERGE, "--max-memory", "much"),
    "a dtype that is none": plain(*MERGE, "--dtype", "int4"),
    "a key map without `=`": plain(*MERGE, "--key-map", "model"),
    "a pattern that is no regular expression": plain(*MERGE, "--allow-unmatched", "("),
    # 3
    "a path that is not there": plain("merge", "bass", "style", "-o", "merged"),
    "a shard is cut short": cut_shard,
    "a shard is cut within its header": cut_header,
    "a shard is missing": missing_shard,
    "a shard is missing, and so is the index": missing_shard_no_index,
    "a shard is stale: it has other tensors than the index says": stale_shard,
    "the index leads out of its folder (`../`)": index_leads_out,
    "the index is no JSON": index_is_no_json,
    "the index has no weight map": no_weight_map,
    "a header bomb: a length of 1 GiB": header_bomb,
    "a header bomb: a million open brackets": deep_header,
    "a name stands twice in a header": twice_in_header,
    "two tensors overlap": overlapping,
    "a tensor has other bytes than its shape needs": wrong_size_of_tensor,
    "a tensor lies beyond the end of the file": outside,
    "the base is quantised: int8": quantised,
    "the base is quantised: float8 with scales": float8_with_scale,
    "the base is quantised: packed (GPTQ, AWQ)": packed,
    "an adapter without its config": lone_adapter,
    "a folder with several adapters": two_adapters,
    "an unknown alpha": configured(lora_alpha=None),
    "an infinite alpha": configured(lora_alpha=float("inf")),
    "a field that this version does not know": configured(use_superlora=True),
    "a pattern in the config that is no regular expression": odd_pattern,
    "a pattern in the config of two thousand characters": long_pattern,
    "a pickle without --allow-pickle": pickled,
    "a pickle that runs code": running_pickle,
    "an activated LoRA (aLoRA)": configured(alora_invocation_tokens=[1, 2]),
    "Arrow": configured(arrow_config={"top_k": 2}),
    "QA-LoRA": configured(use_qalora=True),
    "KaSA": configured(kasa_config={"beta": 1e-4}),
    "BD-LoRA": configured(use_bdlora=True),
    "AdaLoRA": adalora,
    "IA3, LoHa, OFT, prompts … (any type but LoRA)": configured(peft_type="IA3"),
    "replicated layers": configured(layer_replication=[[0, 2], [1, 2]]),
    "layers of Megatron": configured(megatron_config={"tensor_parallel": 2}),
    "bare parameters (fused experts), by the config": configured(target_parameters=["experts.up"]),
    "bare parameters (fused experts), by the tensors": fused_experts,
    "PiSSA, OLoRA, CorDA, LoRA-GA or LoftQ without --base-is-residual": configured(
        init_lora_weights="pissa_niter_16"
    ),
    "unmerge of DoRA": dora,
    "unmerge of a layer that was replaced": replaced_layers,
    "verify of something else": plain("verify", "base"),
    "verify by a manifest that is not of this form": strange_manifest,
    "verify after the base was moved": base_gone,
    "verify with another adapter": other_adapter,
    # 4
    "half a pair: A without B": half_pair,
    "a key that the base does not have": unknown_key,
    "the adapter of another model, by its names": other_names,
    "the adapter of another model, by its shapes": other_shape,
    "NaN in the adapter": not_finite,
    "one side of tied embeddings without --untie": tied,
    "two adapters that replace the same layer": both_replace,
    "more token rows than indices": tokens,
    # 5
    "not enough disk": no_disk,
    "not enough memory (`--max-memory 1MB`)": plain(*MERGE, "--max-memory", "1MB"),
    # 6
    "a hub id that is not in the cache, offline": plain("merge", "org/m", "style", "-o", "merged"),
    # 7
    "the output exists": exists,
    "two writers": two_writers,
    "an unfinished run with other options is there": unfinished,
    "the output lies inside an input": plain("merge", "base", "style", "-o", "base/merged"),
    "the output is an input": plain("merge", "base", "style", "-o", "base", "--overwrite"),
    "the output has a file for a folder": no_folder,
    "demo into a folder that is not empty": plain("demo", "--keep", "base"),
    # 8
    "a number of a merged tensor was changed": changed_number,
    "a byte of an untouched tensor was changed": changed_copy,
    "a file of the result is gone": lost_file,
    "a weight file that is not of the result lies in it": stray_file,
    "the index of the result was changed": other_index,
    "a fact in its config was changed that the merge had set": other_fact,
}
