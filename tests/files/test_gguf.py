"""llama.cpp's adapters: read by the gguf package, there and back with the same updates, queries and
keys in the order that llama.cpp has them.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import lorakit
from lorakit.adapter.files.gguf import read_gguf
from lorakit.adapter.files.reading import open_file
from lorakit.errors import InputError, MisfitError, UsageError
from lorakit.formats.llama_cpp import ARCHITECTURES
from lorakit.verbs.reformat import config_of
from tests.verbs.adapters import pair, save

gguf = pytest.importorskip("gguf")

SCRATCH = lorakit.RunOptions(sync=False)
HEADS, KV, DIM, WIDTH = 4, 2, 6, 24
Q, K, UP = (
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.k_proj",
    "model.layers.1.mlp.up_proj",
)
NAMES = {Q: "blk.0.attn_q", K: "blk.0.attn_k", UP: "blk.1.ffn_up"}
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"up_proj": 4}, "alpha_pattern": {"up_proj": 5}},
}


@pytest.fixture
def base(tmp_path):
    return config(tmp_path / "base", "llama")


def config(folder, model_type):
    folder.mkdir()
    text = {
        "model_type": model_type,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
    }
    (folder / "config.json").write_text(json.dumps(text))
    return folder


def adapter(folder, *, rank=2, dtype="f4", extra=None, **options):
    shapes = {**pair(Q, HEADS * DIM, WIDTH, 2), **pair(K, KV * DIM, WIDTH, 2)}
    shapes |= {**pair(UP, 40, WIDTH, rank), **(extra or {})}
    rng = np.random.default_rng(0)
    tensors = {n: rng.standard_normal(s).astype(dtype) for n, s in shapes.items()}
    modules = ["q_proj", "k_proj", "up_proj"]
    return save(folder, tensors, r=2, lora_alpha=3, target_modules=modules, **options)


def updates(opened):
    found = {}
    for delta in opened.deltas:
        a, b = (delta.tensors[r].read().astype("f8") for r in "ab")
        found[delta.module] = delta.scaling * b @ a
    return found


def converted(source, out, to, base):
    return lorakit.convert(source, out, to=to, base=base, run=SCRATCH)


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
    one, back = (updates(open_file(tmp_path / p)) for p in ("peft", "back"))
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
    one = updates(open_file(source))
    there = updates(
        read_gguf(tmp_path / "out/out.gguf", json.loads((base / "config.json").read_text()))
    )
    for module, delta in one.items():
        np.testing.assert_array_equal(there[module], delta)


def test_names_of_every_architecture_are_known():
    from lorakit.adapter.files.gguf import _names

    for kind in ARCHITECTURES:
        names = _names({"model_type": kind, "num_hidden_layers": 2})
        assert len(names) >= 8, kind
        assert len(set(names.values())) == len(names), kind


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


def test_a_dtype_that_is_not_read_is_named(tmp_path, base):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    for x in "ab":
        raw = np.zeros((2, WIDTH), np.uint16)
        name = f"{NAMES[Q]}.weight.lora_{x}"
        writer.add_tensor(name, raw.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(MisfitError, match="is of BF16, and F32 and F16 are read"):
        read_gguf(tmp_path / "a.gguf", config_of(base))
