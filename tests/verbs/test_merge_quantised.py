"""Merging into a quantised base: what comes out is what a merge into its values gives."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

import lorakit
from lorakit.cli import main
from lorakit.errors import InputError, UsageError
from lorakit.quant.table import codec
from tests.verbs.adapters import drawn, save
from tests.verbs.quantised_scene import (
    BF16,
    CHANGED,
    LAYERS,
    LAYOUTS,
    LISTS,
    config_of,
    layouts,
    made,
    same,
    tensors_of,
)

__all__ = ["made"]

SCRATCH = lorakit.RunOptions(sync=False)
JOINED = {CHANGED[1], *(f"model.layers.0.self_attn.{n}_proj" for n in "qkv")}
mixed = pytest.mark.parametrize("layout", [n for n in LAYOUTS if n != "gptq"])


def one_scale(name, w):
    scale = np.array(np.abs(w).max() / 448, "f4")
    codes = (w / scale).astype(ml_dtypes.float8_e4m3fn)
    return {f"{name}.weight": codes, f"{name}.scale_weight": scale}, codes.astype("f4") * scale


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


@mixed
def test_a_new_head_is_listed_as_plain_with_the_rest(layout, made, tmp_path):
    base, _, _ = made(layout)
    factors = {f"{CHANGED[0]}.lora_A.weight": (2, 128), f"{CHANGED[0]}.lora_B.weight": (64, 2)}
    tensors = {n: drawn(n, *shape) for n, shape in factors.items()}
    tensors |= {"score.weight": drawn("score", 5, 128)}
    head = save(tmp_path / "head", tensors, task_type="SEQ_CLS")
    lorakit.merge(base, head, tmp_path / "out", quant="keep-touched", run=SCRATCH)
    said = config_of(tmp_path / "out")["quantization_config"]
    (name,) = [n for n in LISTS if n in said]
    assert "score" in said[name]
    assert lorakit.verify(tmp_path / "out", full=True).differences == ()


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
