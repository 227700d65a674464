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


def test_heads_of_keys_that_are_null_are_those_of_queries(tmp_path, base):
    """As in the configs of the first models of Llama."""
    text = json.loads((base / "config.json").read_text()) | {"num_key_value_heads": None}
    (base / "config.json").write_text(json.dumps(text))
    shapes = pair(K, HEADS * DIM, WIDTH, 2)
    source = save(tmp_path / "peft", shapes, r=2, lora_alpha=3, target_modules=["k_proj"])
    converted(source, tmp_path / "a.gguf", "gguf", base)
    converted(tmp_path / "a.gguf", tmp_path / "back", "peft", base)
    one, back = (updates(open_file(tmp_path / p)) for p in ("peft", "back"))
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
    one = updates(open_file(source))
    there = updates(
        read_gguf(tmp_path / "out/out.gguf", json.loads((base / "config.json").read_text()))
    )
    for module, delta in one.items():
        np.testing.assert_array_equal(there[module], delta)


def test_names_of_every_architecture_are_known():
    from lorakit.adapter.files.gguf_names import names_of

    for kind in ARCHITECTURES:
        names = names_of({"model_type": kind, "num_hidden_layers": 2})
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


def up_factors(rank=32):
    rng = np.random.default_rng(0)
    shapes = {"a": (rank, 64), "b": (96, rank)}
    name = f"{NAMES[UP]}.weight.lora_"
    return {name + x: rng.standard_normal(s).astype("f4") for x, s in shapes.items()}


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
    (back,) = updates(open_file(tmp_path / "out")).values()
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


BESIDE = {
    "model.embed_tokens.lora_embedding_A": (2, 50),
    "model.embed_tokens.lora_embedding_B": (WIDTH, 2),
    **pair("lm_head", 50, WIDTH, 2),
}


def test_embedding_and_head_are_as_llama_cpp_has_them_and_come_back(tmp_path, base):
    """Of the embedding it gets a row of A for each token."""
    source = adapter(tmp_path / "peft", extra=BESIDE)
    converted(source, tmp_path / "a.gguf", "gguf", base)
    given = load_file(source / "adapter_model.safetensors")
    there = {t.name: np.array(t.data) for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    front = "base_model.model.model.embed_tokens.lora_embedding_"
    np.testing.assert_array_equal(there["token_embd.weight.lora_a"], given[f"{front}A"].T)
    np.testing.assert_array_equal(there["token_embd.weight.lora_b"], given[f"{front}B"])
    head = "base_model.model.lm_head.lora_A.weight"
    np.testing.assert_array_equal(there["output.weight.lora_a"], given[head])
    converted(tmp_path / "a.gguf", tmp_path / "back", "peft", base)
    back = load_file(tmp_path / "back/adapter_model.safetensors")
    assert {n: t.tobytes() for n, t in back.items()} == {n: t.tobytes() for n, t in given.items()}


@pytest.mark.parametrize("said", [True, None])
def test_where_head_and_embedding_are_one_neither_has_a_place(tmp_path, said):
    """llama.cpp would take the factors of the one for those of the other."""
    base = config(tmp_path / "base", "llama" if said else "gemma")
    text = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": said}
    (base / "config.json").write_text(json.dumps(text))
    source = adapter(tmp_path / "peft", extra=BESIDE)
    with pytest.raises(MisfitError, match="where embedding and head are one"):
        converted(source, tmp_path / "a.gguf", "gguf", base)
    lorakit.convert(
        source,
        tmp_path / "a.gguf",
        to="gguf",
        base=base,
        drop="lm_head|embed_tokens",
        run=SCRATCH,
    )


def test_what_is_no_factor_is_not_said_to_be_taken_along(tmp_path, base):
    source = adapter(tmp_path / "peft", extra={"lm_head.weight": (50, WIDTH)})
    with pytest.raises(MisfitError, match=r"lm_head\.weight") as caught:
        lorakit.convert(
            source, tmp_path / "a.gguf", to="gguf", base=base, keep_unknown=True, run=SCRATCH
        )
    assert "lorakit merge BASE" in caught.value.hint


SEEING = {
    "gemma3": "language_model.model.layers",
    "qwen2_5_vl": "model.layers",
    "qwen3_vl": "model.language_model.layers",
}


@pytest.mark.parametrize("spelled", ["model.layers", *SEEING.values()])
@pytest.mark.parametrize("kind", SEEING)
def test_of_a_model_that_sees_the_language_model_is_there_and_comes_back_as_on_disk(
    tmp_path, kind, spelled
):
    base, tensors = tmp_path / "base", up_factors()
    base.mkdir()
    text = {"model_type": kind, "text_config": {"num_hidden_layers": 2, "model_type": "text"}}
    (base / "config.json").write_text(json.dumps(text))
    up = UP.replace("model.layers", spelled)
    named = {
        f"{up}.lora_{x.upper()}.weight": t for x, t in zip("ab", tensors.values(), strict=True)
    }
    source = save(tmp_path / "peft", named, r=32, lora_alpha=3, target_modules=["up_proj"])
    converted(source, tmp_path / "a.gguf", "gguf", base)
    names = {t.name for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert names == tensors.keys()
    converted(tmp_path / "a.gguf", tmp_path / "back", "peft", base)
    (found,) = open_file(tmp_path / "back").deltas
    assert found.module == UP.replace("model.layers", SEEING[kind])
    seeing = {**named, **pair("model.visual.blocks.0.mlp.up_proj", 8, 8, 2)}
    with pytest.raises(MisfitError, match=r"visual.*has no place in llama\.cpp"):
        converted(save(tmp_path / "sees", seeing), tmp_path / "b.gguf", "gguf", base)


LEAVES = {
    "qwen3_moe": ("mlp", {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}),
    "mixtral": ("block_sparse_moe", {"w1": "gate", "w3": "up", "w2": "down"}),
}


def experts(folder, kind, numbers=(0, 2), rank=2):
    """An adapter of some experts, the last of another rank; and the config of its base, with three
    of them.
    """
    block, leaves = LEAVES[kind]
    tensors = pair(UP.replace("mlp.up_proj", "self_attn.v_proj"), 12, WIDTH, 2)
    tensors |= pair(UP.replace("mlp.up_proj", f"{block}.gate"), 3, WIDTH, 2)
    for leaf in leaves:
        for n in numbers:
            module = f"model.layers.1.{block}.experts.{n}.{leaf}"
            tensors |= pair(module, 40, WIDTH, rank if n == numbers[-1] else 2)
    base = config(folder.with_name("base"), kind)
    text = json.loads((base / "config.json").read_text()) | {"num_experts": 3}
    (base / "config.json").write_text(json.dumps(text))
    patterns = {"rank_pattern": {rf".*experts\.{numbers[-1]}\..*": rank}}
    return save(folder, tensors, r=2, lora_alpha=3, target_modules=[*leaves], **patterns), base


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("kind", LEAVES)
def test_experts_are_stacks_as_llama_cpp_has_them_and_come_back(tmp_path, kind, rank):
    """One that the adapter does not have is of zeros."""
    source, base = experts(tmp_path / "peft", kind, rank=rank)
    done = converted(source, tmp_path / "a.gguf", "gguf", base)
    assert done.counts["fused"] == 3
    assert any("blk.1.ffn_gate_inp" in s.name for s in done.steps)
    one = updates(open_file(source))
    there = {t.name: np.array(t.data) for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    block, leaves = LEAVES[kind]
    for leaf, called in leaves.items():
        a, b = (there[f"blk.1.ffn_{called}_exps.weight.lora_{x}"].astype("f8") for x in "ab")
        assert (a.shape, b.shape) == ((3, rank, WIDTH), (3, 40, rank))
        for n in range(3):
            wanted = one.get(f"model.layers.1.{block}.experts.{n}.{leaf}", np.zeros((40, WIDTH)))
            np.testing.assert_allclose(3 / rank * b[n] @ a[n], wanted, rtol=1e-6, atol=1e-6)
    converted(tmp_path / "a.gguf", tmp_path / "back", "peft", base)
    back = updates(open_file(tmp_path / "back"))
    assert back.keys() >= one.keys()
    for module, delta in back.items():
        np.testing.assert_allclose(delta, one.get(module, 0 * delta), rtol=1e-6, atol=1e-6)


def test_an_expert_beyond_those_of_the_base_is_refused(tmp_path):
    source, base = experts(tmp_path / "peft", "qwen3_moe", numbers=(0, 7))
    with pytest.raises(MisfitError, match="is one of 3 experts"):
        converted(source, tmp_path / "a.gguf", "gguf", base)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_stacks_of_every_dtype_are_read(tmp_path, kind):
    _, base = experts(tmp_path / "peft", "qwen3_moe")
    text = json.loads((base / "config.json").read_text())
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen3moe")
    writer.add_type("adapter")
    rng, dtype = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]
    given = {}
    for x, shape in (("a", (3, 32, 64)), ("b", (3, 96, 32))):
        raw = gguf.quants.quantize(rng.standard_normal(shape).astype("f4"), dtype)
        given[x] = gguf.quants.dequantize(raw, dtype).astype("f8")
        writer.add_tensor(f"blk.0.ffn_up_exps.weight.lora_{x}", raw, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = updates(read_gguf(tmp_path / "a.gguf", text))
    for n in range(3):
        delta = found[f"model.layers.0.mlp.experts.{n}.up_proj"]
        np.testing.assert_allclose(delta, given["b"][n] @ given["a"][n], rtol=1e-12)


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
