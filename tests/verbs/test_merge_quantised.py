"""Merging into a quantised base: what comes out is what a merge into its values gives."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import lorakit
from lorakit.adapter.load import read_stored
from lorakit.cli import main
from lorakit.errors import InputError, UsageError
from lorakit.quant.table import codec
from lorakit.store.checkpoint import open_checkpoint
from tests.verbs.adapters import drawn, save

SCRATCH = lorakit.RunOptions(sync=False)
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
JOINED = {CHANGED[1], *(f"model.layers.0.self_attn.{n}_proj" for n in "qkv")}
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


def one_scale(name, w):
    scale = np.array(np.abs(w).max() / 448, "f4")
    codes = (w / scale).astype(ml_dtypes.float8_e4m3fn)
    return {f"{name}.weight": codes, f"{name}.scale_weight": scale}, codes.astype("f4") * scale


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
LISTS = ("llm_int8_skip_modules", "modules_to_not_convert", "ignore")
layouts = pytest.mark.parametrize("layout", LAYOUTS)
mixed = pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "gptq"])


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


def same(one, other):
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and one[n].tobytes() == other[n].tobytes() for n in one
    )


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


@layouts
def test_dequantized_is_a_merge_into_the_values(layout, made, tmp_path):
    base, plain, adapter = made(layout)
    lorakit.merge(base, adapter, tmp_path / "out", quant="dequantize", run=SCRATCH)
    lorakit.merge(plain, adapter, tmp_path / "expected", run=SCRATCH)
    assert same(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "expected"))
    assert config_of(tmp_path / "out") == config_of(plain)
    assert lorakit.verify(tmp_path / "out", full=True).differences == ()


@mixed
def test_kept_touched_changes_what_an_adapter_does_and_what_is_joined_with_it(
    layout, made, tmp_path
):
    base, plain, adapter = made(layout)
    lorakit.merge(base, adapter, tmp_path / "out", quant="keep-touched", run=SCRATCH)
    lorakit.merge(plain, adapter, tmp_path / "expected", run=SCRATCH)
    found, before = tensors_of(tmp_path / "out"), tensors_of(base)
    expected = tensors_of(tmp_path / "expected")
    theirs = {n for n in before if any(n.startswith(f"{m}.") for m in JOINED)}
    ours = {f"{m}.weight" for m in JOINED}
    assert found.keys() == (before.keys() - theirs) | ours
    assert same({n: found[n] for n in ours}, {n: expected[n] for n in ours})
    assert same(
        {n: t for n, t in found.items() if n not in ours},
        {n: t for n, t in before.items() if n not in theirs},
    )
    assert lorakit.verify(tmp_path / "out", full=True).differences == ()


@mixed
def test_a_config_lists_what_is_plain_now_and_keeps_the_rest(layout, made, tmp_path):
    base, _, adapter = made(layout)
    lorakit.merge(base, adapter, tmp_path / "out", quant="keep-touched", run=SCRATCH)
    before, after = config_of(base), config_of(tmp_path / "out")
    (name,) = [n for n in LISTS if n in before["quantization_config"]]
    listed = after["quantization_config"].pop(name)
    del before["quantization_config"][name]
    assert after == before
    assert set(listed) >= JOINED | {"lm_head"}
    assert not any("o_proj" in n for n in listed)


def test_weights_that_a_config_cannot_list_are_plain_as_a_whole_or_not_at_all(made):
    base, _, adapter = made("gptq")
    with pytest.raises(InputError, match=r"how gptq is told.*--quant dequantize"):
        lorakit.plan_merge(base, adapter, quant="keep-touched")


def test_what_a_file_beside_the_weights_says_of_them_goes_too(made, tmp_path):
    base, plain, adapter = made("gptq")
    (base / "quantize_config.json").write_text("{}")
    (base / "config.json").write_bytes((plain / "config.json").read_bytes())  # as the first were
    lorakit.merge(base, adapter, tmp_path / "out", quant="dequantize", run=SCRATCH)
    assert not (tmp_path / "out/quantize_config.json").exists()
    assert lorakit.verify(tmp_path / "out", full=True).differences == ()


def test_what_stays_of_a_file_may_be_a_link(made, tmp_path):
    base, _, adapter = made("fp8")
    lorakit.merge(base, adapter, tmp_path / "out", quant="keep-touched", link=True, run=SCRATCH)
    assert lorakit.verify(tmp_path / "out").differences == ()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype_is_that_of_the_values_too(dtype, made, tmp_path):
    base, _, adapter = made("nf4")
    lorakit.merge(base, adapter, tmp_path / "out", quant="dequantize", dtype=dtype, run=SCRATCH)
    name = f"{LAYERS[0]}.self_attn.o_proj"
    expected = codec("nf4")
    values = expected.dequantise(expected.quantise(drawn(name, 128, 64) / 50), dtype)
    found = tensors_of(tmp_path / "out")
    assert found[f"{name}.weight"].tobytes() == values.tobytes()
    assert {str(t.dtype) for t in found.values()} == {dtype}
    assert config_of(tmp_path / "out")["dtype"] == dtype


@pytest.mark.parametrize("layout", ["nf4 twice", "fp8"])
def test_scales_of_what_stays_quantised_keep_their_dtype(layout, made, tmp_path):
    base, _, adapter = made(layout)
    options = {"quant": "keep-touched", "dtype": "float16"}
    lorakit.merge(base, adapter, tmp_path / "out", run=SCRATCH, **options)
    found, before = tensors_of(tmp_path / "out"), tensors_of(base)
    stays = [n for n in found if ".o_proj." in n]
    assert stays
    assert same({n: found[n] for n in stays}, {n: before[n] for n in stays})
    assert found["model.norm.weight"].dtype == np.float16


def test_shards_of_a_size_and_one_file_hold_the_same(made, tmp_path):
    base, _, adapter = made("nf4 twice")
    lorakit.merge(base, adapter, tmp_path / "out", quant="dequantize", run=SCRATCH)
    shards = {"max_shard_size": 40_000, "quant": "dequantize"}
    lorakit.merge(base, adapter, tmp_path / "cut", run=SCRATCH, **shards)
    lorakit.merge(base, adapter, tmp_path / "one.safetensors", quant="dequantize", run=SCRATCH)
    assert same(tensors_of(tmp_path / "cut"), tensors_of(tmp_path / "out"))
    assert same(tensors_of(tmp_path / "one.safetensors"), tensors_of(tmp_path / "out"))


def test_a_file_of_comfyui_loses_its_mark_with_its_scales(tmp_path):
    name = "blocks.0.attn.q_proj"
    tensors, values = one_scale(name, drawn(name, 64, 64) / 50)
    tensors["scaled_fp8"] = np.zeros(2, ml_dtypes.float8_e4m3fn)
    save_file(tensors, tmp_path / "base.safetensors")
    save_file({f"{name}.weight": values.astype(BF16)}, tmp_path / "plain.safetensors")
    adapter = save(
        tmp_path / "adapter",
        {f"{name}.lora_A.weight": (2, 64), f"{name}.lora_B.weight": (64, 2)},
    )
    out, expected = tmp_path / "out.safetensors", tmp_path / "expected.safetensors"
    lorakit.merge(tmp_path / "base.safetensors", adapter, out, quant="dequantize", run=SCRATCH)
    lorakit.merge(tmp_path / "plain.safetensors", adapter, expected, run=SCRATCH)
    assert same(tensors_of(out), tensors_of(expected))


def test_a_file_without_a_config_is_plain_as_a_whole_or_not_at_all(tmp_path):
    tensors = {}
    for name in ("blocks.0.attn.q_proj", "blocks.0.attn.o_proj"):
        tensors |= one_scale(name, drawn(name, 64, 64) / 50)[0]
    save_file(tensors, tmp_path / "base.safetensors")
    pair = {f"blocks.0.attn.q_proj.lora_{x}.weight": s for x, s in (("A", (2, 64)), ("B", (64, 2)))}
    adapter = save(tmp_path / "adapter", pair)
    with pytest.raises(InputError, match=r"a model without a config.*--quant dequantize"):
        lorakit.plan_merge(tmp_path / "base.safetensors", adapter, quant="keep-touched")


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


def test_experts_of_four_bits_become_the_parameters_of_the_model(tmp_path):
    base, adapter = experts(tmp_path)
    with pytest.raises(InputError, match=r"quantised .*down_proj_blocks.*--quant dequantize"):
        lorakit.plan_merge(base, adapter)
    lorakit.merge(base, adapter, tmp_path / "out", quant="dequantize", run=SCRATCH)
    plain = open_checkpoint(str(tmp_path / "out"))
    assert {n.rpartition(".")[2]: i.shape for n, i in plain.infos.items()} == {
        "weight": (64,),
        "gate_up_proj": (2, 64, 64),
        "down_proj": (2, 32, 64),
    }
    assert lorakit.verify(tmp_path / "out", full=True).differences == ()
    lorakit.merge(tmp_path / "out", adapter, tmp_path / "twice", run=SCRATCH)
    once, twice = (tensors_of(tmp_path / n) for n in ("out", "twice"))
    for name, change in (("gate_up_proj", 0), ("down_proj", 1)):
        full = f"model.layers.0.mlp.experts.{name}"
        moved = twice[full].astype("f4") - once[full].astype("f4")
        assert (np.abs(moved).max() > 0) == bool(change)


def test_experts_stay_together(tmp_path):
    base, adapter = experts(tmp_path)
    lorakit.merge(base, adapter, tmp_path / "out", quant="keep-touched", run=SCRATCH)
    said = config_of(tmp_path / "out")
    assert "_blocks" not in "".join(tensors_of(tmp_path / "out"))
    assert "quantization_config" not in said  # they were all that is quantised


def test_a_base_that_is_not_quantised_is_merged_with_a_note(made, tmp_path):
    _, plain, adapter = made("nf4")
    job = lorakit.plan_merge(plain, adapter, quant="dequantize")
    assert "not quantised" in job.plan.notes[0]


def test_a_way_of_quantising_that_is_not_known_is_refused(made):
    base, _, adapter = made("fp8")
    said = config_of(base)
    config = base / "config.json"
    said["quantization_config"]["quant_method"] = "quark"
    config.write_text(json.dumps(said))
    with pytest.raises(InputError, match=r"how quark is told.*--quant dequantize"):
        lorakit.plan_merge(base, adapter, quant="keep-touched")
    (base / "model.safetensors.index.json").unlink()
    for path in base.glob("model-0000*"):
        path.unlink()
    save_file({"q.qweight": np.ones((8, 8), "i4")}, base / "model.safetensors")
    with pytest.raises(InputError, match=r"in a way that is not known \(quark\)"):
        lorakit.plan_merge(base, adapter, quant="dequantize")


def test_without_the_option_the_way_out_is_said(made):
    base, _, adapter = made("int8")
    with pytest.raises(InputError, match=r"is quantised .I8, with SCB.*--quant dequantize"):
        lorakit.plan_merge(base, adapter)
    with pytest.raises(UsageError, match="quant 'requant' is none of"):
        lorakit.plan_merge(base, adapter, quant="requant")


def test_scales_of_experts_in_a_stack_are_seen(tmp_path):
    name = "model.layers.0.mlp.experts.down_proj"
    codes = np.ones((2, 32, 64), ml_dtypes.float8_e4m3fn)
    tensors = {name: codes, f"{name}_scale_inv": np.ones((2, 1, 1), "f4")}
    base = checkpoint(tmp_path / "base", [tensors], {"model_type": "qwen3_moe"})
    front = name.rpartition(".")[0]
    pair = {f"{front}.lora_A.weight": (4, 64), f"{front}.lora_B.weight": (32, 4)}
    chosen = {"target_parameters": ["mlp.experts.down_proj"], "target_modules": []}
    adapter = save(tmp_path / "adapter", pair, **chosen)
    with pytest.raises(InputError, match=r"quantised .F8_E4M3, with down_proj_scale_inv"):
        lorakit.plan_merge(base, adapter)


def test_what_loftq_wrote_and_its_adapter_are_the_base_again(made, tmp_path):
    _, plain, _ = made("nf4")
    lorakit.loftq(plain, tmp_path / "loftq", rank=8, run=SCRATCH)
    parts = [tmp_path / "loftq" / n for n in ("base", "adapter")]
    options = {"quant": "dequantize", "base_is_residual": True, "dtype": "float32"}
    lorakit.merge(*parts, tmp_path / "out", run=SCRATCH, **options)
    found, wanted = tensors_of(tmp_path / "out"), tensors_of(plain)
    name = f"{CHANGED[0]}.weight"
    quant = codec("nf4")
    dense = wanted[name].astype("f4")
    alone = quant.dequantise(quant.quantise(dense)) - dense
    assert np.linalg.norm(found[name] - dense) < 0.95 * np.linalg.norm(alone)


def test_the_command_says_what_it_writes(made, tmp_path, capsys):
    base, _, adapter = made("nf4")
    out = tmp_path / "out"
    asked = ["merge", str(base), str(adapter), "-o", str(out), "--quant", "keep-touched"]
    with pytest.raises(SystemExit) as ended:
        main(asked)
    assert ended.value.code in (0, None)
    said = capsys.readouterr()
    assert "2 of 47 tensors changed" in said.out
    assert "4 of 14 quantised weights are written in bfloat16." in said.err
    assert json.loads((out / "lorakit.json").read_text())["options"]["quant"] == "keep-touched"
