"""llama.cpp's adapters: read by the gguf package, there and back with the same updates, queries and
keys in the order that llama.cpp has them.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import lorakit
from lorakit.adapter.files.gguf import read_gguf
from lorakit.errors import InputError, MisfitError, UsageError
from lorakit.verbs.reformat import config_of
from tests.files.gguf_scene import (
    DIM,
    HEADS,
    KV,
    NAMES,
    UP,
    WIDTH,
    K,
    Q,
    adapter,
    base,
    config,
    converted,
    gguf,
    up_factors,
)
from tests.verbs.adapters import pair, save, updates

__all__ = ["base"]

SCRATCH = lorakit.RunOptions(sync=False)
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"up_proj": 4}, "alpha_pattern": {"up_proj": 5}},
}


def test_an_alpha_of_nothing_is_no_scaling_of_one(tmp_path, base):
    """Which llama.cpp takes a 0 for: B is of zeros."""
    source = save(tmp_path / "peft", pair(Q, HEADS * DIM, WIDTH, 2), r=2, lora_alpha=0)
    converted(source, tmp_path / "out", "gguf", base)
    (delta,) = read_gguf(next((tmp_path / "out").iterdir()), config_of(base)).deltas
    assert delta.scaling
    assert not delta.tensors["b"].read().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_there_and_back_every_update_is_the_same(tmp_path, kind, model_type):
    base = config(tmp_path / "base", model_type)
    source = adapter(tmp_path / "peft", rank=4 if kind == "patterns" else 2, **KINDS[kind])
    converted(source, tmp_path / "out", "gguf", base)
    converted(tmp_path / "out", tmp_path / "back", "peft", base)
    one, back = (updates(tmp_path / p) for p in ("peft", "back"))
    assert set(one) == set(back) == set(NAMES)
    for module, delta in one.items():
        np.testing.assert_allclose(back[module], delta, rtol=1e-6, atol=1e-6)


def test_without_other_scalings_every_number_comes_back(tmp_path, base):
    source = adapter(tmp_path / "peft")
    done = converted(source, tmp_path / "out", "gguf", base)
    assert done.counts == {"swapped": 2, "renamed": 1}
    converted(tmp_path / "out", tmp_path / "back", "peft", base)
    before, after = (
        load_file(tmp_path / p / "adapter_model.safetensors") for p in ("peft", "back")
    )
    assert {n: t.tobytes() for n, t in before.items()} == {n: t.tobytes() for n, t in after.items()}


@pytest.mark.parametrize("layers", [None, 0, -1, 2.5, True, 10**30])
def test_a_base_must_say_how_many_layers_it_has(tmp_path, base, layers):
    text = json.loads((base / "config.json").read_text()) | {"num_hidden_layers": layers}
    (base / "config.json").write_text(json.dumps(text))
    with pytest.raises(InputError, match="num_hidden_layers"):
        converted(adapter(tmp_path / "peft"), tmp_path / "out", "gguf", base)


def test_heads_of_keys_that_are_null_are_those_of_queries(tmp_path, base):
    """As in the configs of the first models of Llama."""
    text = json.loads((base / "config.json").read_text()) | {"num_key_value_heads": None}
    (base / "config.json").write_text(json.dumps(text))
    shapes = pair(K, HEADS * DIM, WIDTH, 2)
    source = save(tmp_path / "peft", shapes, r=2, lora_alpha=3, target_modules=["k_proj"])
    converted(source, tmp_path / "a.gguf", "gguf", base)
    converted(tmp_path / "a.gguf", tmp_path / "back", "peft", base)
    one, back = (updates(tmp_path / p) for p in ("peft", "back"))
    np.testing.assert_array_equal(one[K], back[K])


def test_an_output_is_a_folder_or_the_file_itself(tmp_path, base):
    source = adapter(tmp_path / "peft")
    converted(source, tmp_path / "lora-1.5", "gguf", base)
    converted(source, tmp_path / "lora.gguf", "gguf", base)
    there = tmp_path / "lora-1.5/lora-1.5.gguf"
    assert there.read_bytes() == (tmp_path / "lora.gguf").read_bytes()


@pytest.mark.parametrize(
    ("to", "name", "said"),
    [
        ("gguf", "x.safetensors", r"a file in gguf ends in \.gguf"),
        ("peft", "x.gguf", "peft has a folder"),
        ("mlx", "x.gguf", "mlx has a folder"),
    ],
)
def test_no_format_gets_the_ending_of_another(tmp_path, base, to, name, said):
    source = adapter(tmp_path / "peft")
    with pytest.raises(UsageError, match=said):
        lorakit.convert(source, tmp_path / name, to=to, base=base, run=SCRATCH)
    assert not (tmp_path / name).exists()


def test_what_llama_cpp_reads(tmp_path, base):
    source = adapter(tmp_path / "peft")
    converted(source, tmp_path / "out", "gguf", base)
    reader = gguf.GGUFReader(tmp_path / "out/out.gguf")
    facts = {k: f.contents() for k, f in reader.fields.items()}
    assert facts["general.type"] == "adapter"
    assert facts["general.architecture"] == "llama"
    assert facts["adapter.type"] == "lora"
    assert facts["adapter.lora.alpha"] == 3
    there = {t.name: np.array(t.data) for t in reader.tensors}
    tensors = load_file(source / "adapter_model.safetensors")
    for module, name in NAMES.items():
        a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"] for x in "AB")
        np.testing.assert_array_equal(there[f"{name}.weight.lora_a"], a)
        got = there[f"{name}.weight.lora_b"]
        heads = {Q: HEADS, K: KV}.get(module)
        for row in range(len(b)):
            new = row
            if heads:  # row h d + j d / 2 + t of Hugging Face is row h d + 2 t + j
                head, inside = divmod(row, DIM)
                j, t = divmod(inside, DIM // 2)
                new = head * DIM + 2 * t + j
            np.testing.assert_array_equal(got[new], b[row])


def test_bfloat16_is_widened(tmp_path, base):
    import ml_dtypes

    source = adapter(tmp_path / "peft", dtype=ml_dtypes.bfloat16)
    converted(source, tmp_path / "out", "gguf", base)
    one = updates(source)
    there = updates(
        read_gguf(tmp_path / "out/out.gguf", json.loads((base / "config.json").read_text()))
    )
    for module, delta in one.items():
        np.testing.assert_array_equal(there[module], delta)


def test_what_has_no_place_is_refused(tmp_path, base):
    extra = {f"{Q}.lora_B.bias": (HEADS * DIM,)}
    source = adapter(tmp_path / "peft", extra=extra, lora_bias=True)
    with pytest.raises(lorakit.LorakitError, match="takes no bias"):
        converted(source, tmp_path / "out", "gguf", base)
    other = config(tmp_path / "other", "mamba")
    with pytest.raises(lorakit.LorakitError, match="of mamba"):
        converted(adapter(tmp_path / "b"), tmp_path / "out", "gguf", other)
    with pytest.raises(lorakit.LorakitError, match="--base"):
        lorakit.convert(tmp_path / "b", tmp_path / "out", to="gguf", run=SCRATCH)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_model_or_no_gguf_is_one_line(tmp_path, base):
    converted(adapter(tmp_path / "peft"), tmp_path / "out", "gguf", base)
    other = config(tmp_path / "other", "qwen3")
    with pytest.raises(lorakit.LorakitError, match="'qwen3'"):
        converted(tmp_path / "out", tmp_path / "back", "peft", other)
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(lorakit.LorakitError, match="GGUF"):
        converted(tmp_path / "bad.gguf", tmp_path / "back", "peft", base)


def test_a_base_that_does_not_say_how_many_heads_there_are_is_refused(tmp_path, base):
    source, text = adapter(tmp_path / "peft"), json.loads((base / "config.json").read_text())
    for heads in (None, 5):
        (base / "config.json").write_text(json.dumps({**text, "num_attention_heads": heads}))
        with pytest.raises(MisfitError, match="heads"):
            lorakit.convert(source, tmp_path / "out", to="gguf", base=base, run=SCRATCH)
        assert not list(tmp_path.glob("out*"))


def test_without_a_base_the_file_is_named_and_the_way_out(tmp_path, base):
    converted(adapter(tmp_path / "peft"), tmp_path / "out", "gguf", base)
    (file,) = (tmp_path / "out").iterdir()
    with pytest.raises(InputError, match="only the base tells") as caught:
        lorakit.convert(file, tmp_path / "back", to="peft", run=SCRATCH)
    assert caught.value.file == str(file)
    assert "--base" in caught.value.hint


def written(path, kind, tensors, alpha=3.0):
    """A file of llama.cpp's converter, of this dtype."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, values in tensors.items():
        dtype = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values, dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_every_dtype_of_the_converter_of_llama_cpp_is_read(tmp_path, base, kind):
    tensors = up_factors()
    written(tmp_path / "a.gguf", kind, tensors)
    dtype = gguf.GGMLQuantizationType[kind]
    a, b = (
        gguf.quants.dequantize(gguf.quants.quantize(t, dtype), dtype).astype("f8")
        for t in tensors.values()
    )
    (found,) = updates(read_gguf(tmp_path / "a.gguf", config_of(base))).values()
    np.testing.assert_array_equal(found, 3 / 32 * b @ a)
    converted(tmp_path / "a.gguf", tmp_path / "out", "peft", base)
    (back,) = updates(tmp_path / "out").values()
    np.testing.assert_array_equal(back, found)


def test_a_dtype_that_is_not_read_is_named(tmp_path, base):
    written(tmp_path / "a.gguf", "Q4_0", up_factors())
    with pytest.raises(MisfitError, match="is of Q4_0, and F32 and F16 and BF16 and Q8_0 are read"):
        read_gguf(tmp_path / "a.gguf", config_of(base))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number_is_refused(tmp_path, base, alpha):
    written(tmp_path / "a.gguf", "F32", up_factors(), alpha)
    with pytest.raises(InputError, match=r"adapter\.lora\.alpha"):
        read_gguf(tmp_path / "a.gguf", config_of(base))


def test_factors_that_are_no_pair_are_refused_as_they_are_read(tmp_path, base):
    tensors = up_factors() | {f"{NAMES[UP]}.weight.lora_b": np.ones((96, 64), "f4")}
    written(tmp_path / "a.gguf", "F32", tensors)
    with pytest.raises(MisfitError, match="no pair") as caught:
        read_gguf(tmp_path / "a.gguf", config_of(base))
    assert caught.value.file == str(tmp_path / "a.gguf")


@pytest.mark.parametrize("place", ["out", "out/out.gguf"])
def test_inspect_tells_of_an_adapter_without_its_base(tmp_path, base, place):
    source = adapter(tmp_path / "peft", rank=4, rank_pattern={"up_proj": 4})
    converted(source, tmp_path / "out", "gguf", base)
    found = lorakit.inspect(tmp_path / place)
    assert found.kind == "adapter"
    assert found.facts == {
        "format": "gguf",
        "model": "llama",
        "tensors": 6,
        "parameters": sum(t.size for t in load_file(source / "adapter_model.safetensors").values()),
        "modules": 3,
        "rank": {"2": 2, "4": 1},
        "alpha": 3,
    }
    assert found.dtypes == {"F32": 4 * found.facts["parameters"]}
    assert ("blk.*.ffn_up.weight.lora_b", 1, "40x4", "F32") in found.groups
    with pytest.raises(InputError, match="only the base tells"):
        lorakit.inspect(tmp_path / place, spectrum=True)


def test_inspect_of_a_broken_file_is_one_line(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(InputError, match="is no GGUF file"):
        lorakit.inspect(tmp_path / "a.gguf")
