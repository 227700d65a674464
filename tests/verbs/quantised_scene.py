"""Small checkpoints of every layout of codes, packed here by hand, and their values."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lorakit.adapter.load import read_stored
from lorakit.quant.table import codec
from lorakit.store.checkpoint import open_checkpoint
from tests.verbs.adapters import drawn, save

BF16 = np.dtype(ml_dtypes.bfloat16)
LAYERS = ("model.layers.0", "model.layers.1")
SHAPES = {
    "self_attn.q_proj": (64, 128),
    "self_attn.k_proj": (32, 128),
    "self_attn.v_proj": (32, 128),
    "self_attn.o_proj": (128, 64),
    "mlp.gate_proj": (192, 128),
    "mlp.up_proj": (192, 128),
    "mlp.down_proj": (128, 192),
}
CHANGED = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
LISTS = ("llm_int8_skip_modules", "modules_to_not_convert", "ignore")
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": None}


def blocks_of(w):
    """fp8 in blocks of 128 by 128: codes, scales and values."""
    grid = tuple(-(-n // 128) for n in w.shape)
    scales = np.empty(grid, "f4")
    spread = np.empty(w.shape, "f4")
    for i, j in np.ndindex(grid):
        at = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
        spread[at] = scales[i, j] = np.abs(w[at]).max() / 448
    codes = (w / spread).astype(ml_dtypes.float8_e4m3fn)
    return codes, scales, codes.astype("f4") * spread


def bitsandbytes(kind, **settings):
    found = codec(kind, **settings)

    def quantised(name, w):
        q = found.quantise(w)
        return found.tensors(f"{name}.weight", q, dtype="bfloat16"), found.dequantise(q)

    return quantised


def fp8(scale="weight_scale_inv"):
    def quantised(name, w):
        codes, scales, values = blocks_of(w)
        return {f"{name}.weight": codes, f"{name}.{scale}": scales}, values

    return quantised


def grouped(w):
    """Four bits in groups of 64 inputs: codes and scales, and values, about a zero of 8."""
    groups = w.reshape(len(w), -1, 64)
    scales = (np.abs(groups).max(2) / 7).astype("f2")
    wide = scales.astype("f4")[:, :, None]
    codes = (np.rint(groups / wide) + 8).reshape(w.shape).astype("u1")
    values = (codes.reshape(groups.shape) - np.float32(8)) * wide
    return codes, scales, values.reshape(w.shape)


def words(codes):
    nibbles = codes.reshape(*codes.shape[:-1], -1, 8).astype("u4")
    return (nibbles << np.arange(0, 32, 4, dtype="u4")).sum(-1, dtype="u4").view("i4")


def gptq(name, w):
    codes, scales, values = grouped(w)
    zeros = np.full((scales.shape[1], w.shape[0] // 8), 0x77777777, "i4")
    tensors = {
        f"{name}.qweight": np.ascontiguousarray(words(codes).T),
        f"{name}.qzeros": zeros,
        f"{name}.scales": np.ascontiguousarray(scales.T),
    }
    return tensors, values


def awq(name, w):
    codes, scales, values = grouped(w)
    turned = codes.T.reshape(w.shape[1], -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
    zeros = np.full((scales.shape[1], w.shape[0] // 8), -0x77777778, "i4")
    tensors = {
        f"{name}.qweight": words(turned.reshape(w.shape[1], -1)),
        f"{name}.qzeros": zeros,
        f"{name}.scales": np.ascontiguousarray(scales.T),
    }
    return tensors, values


def packed_ints(name, w):
    codes, scales, values = grouped(w)
    tensors = {
        f"{name}.weight_packed": words(codes),
        f"{name}.weight_scale": scales,
        f"{name}.weight_shape": np.array(w.shape),
    }
    return tensors, values


LAYOUTS = {
    "nf4": (bitsandbytes("nf4"), BITSANDBYTES),
    "nf4 twice": (bitsandbytes("nf4", double=True), BITSANDBYTES),
    "int8": (bitsandbytes("int8"), {**BITSANDBYTES, "load_in_8bit": True, "load_in_4bit": False}),
    "fp8": (fp8(), {"quant_method": "fp8", "modules_to_not_convert": ["lm_head"]}),
    "compressed-tensors": (
        fp8("weight_scale"),
        {"quant_method": "compressed-tensors", "ignore": ["lm_head"]},
    ),
    "packed integers": (packed_ints, {"quant_method": "compressed-tensors", "ignore": ["lm_head"]}),
    "awq": (awq, {"quant_method": "awq", "version": "gemm", "modules_to_not_convert": ["lm_head"]}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4}),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def plain_tensors():
    return {
        "model.embed_tokens.weight": (drawn("embed", 48, 128) / 50).astype(BF16),
        "model.norm.weight": np.ones(128, BF16),
        "lm_head.weight": (drawn("head", 48, 128) / 50).astype(BF16),
    }


def checkpoint(folder, shards, config):
    folder.mkdir()
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, folder / name, metadata={"format": "pt"})
    index = {t: n for n, tensors in zip(names, shards, strict=True) for t in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def made(tmp_path):
    """Makes a quantised base, its values in bfloat16 as a base of their own, and an adapter."""

    def make(layout):
        quantised, said = LAYOUTS[layout]
        codes, beside, values = {}, {}, plain_tensors()
        for layer in LAYERS:
            for leaf, shape in SHAPES.items():
                name = f"{layer}.{leaf}"
                tensors, dense = quantised(name, drawn(name, *shape) / 50)
                values[f"{name}.weight"] = dense.astype(BF16)
                first = next(iter(tensors))
                codes[first] = tensors.pop(first)
                beside |= tensors
        config = {"model_type": "llama", "dtype": "bfloat16", "tie_word_embeddings": False}
        shards = [plain_tensors() | codes, beside]  # scales in another shard than their codes
        base = checkpoint(tmp_path / "base", shards, {**config, "quantization_config": said})
        plain = checkpoint(tmp_path / "plain", [values], config)
        shapes = {m: SHAPES[m.partition("s.")[2].partition(".")[2]] for m in CHANGED}
        pairs = {
            f"{m}.lora_{x}.weight": drawn(m + x, *((2, i) if x == "A" else (o, 2))) / 10
            for m, (o, i) in shapes.items()
            for x in "AB"
        }
        return base, plain, save(tmp_path / "adapter", pairs)

    return make


def tensors_of(place):
    held = open_checkpoint(str(place))
    return {n: read_stored(held, i) for n, i in held.infos.items()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def same(one, other):
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and one[n].tobytes() == other[n].tobytes() for n in one
    )


def experts(tmp_path):
    """gpt-oss's experts in blocks of four bits, and an adapter of both stacks."""
    rng = np.random.default_rng(0)
    front, count, hidden, inner = "model.layers.0.mlp.experts", 2, 64, 32
    shapes = {"gate_up_proj": (hidden, 2 * inner), "down_proj": (inner, hidden)}
    tensors = {"model.norm.weight": np.ones(hidden, BF16)}
    for name, (rows, cols) in shapes.items():
        grid = count, cols, rows // 32
        codes = rng.integers(0, 256, (*grid, 16)).astype("u1")
        tensors[f"{front}.{name}_blocks"] = codes
        tensors[f"{front}.{name}_scales"] = rng.integers(118, 123, grid).astype("u1")
    said = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    config = {"model_type": "gpt_oss", "dtype": "bfloat16", "quantization_config": said}
    base = checkpoint(tmp_path / "oss", [tensors], config)
    down = {
        f"{front}.lora_A.weight": drawn("a", count * 2, inner),
        f"{front}.lora_B.weight": drawn("b", hidden, count * 2),
    }
    chosen = {"target_parameters": ["mlp.experts.down_proj"], "target_modules": []}
    return base, save(tmp_path / "adapter", down, **chosen)
