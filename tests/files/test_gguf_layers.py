"""Which layers llama.cpp has in an adapter and how: embedding and head, stacks of experts, models
that see.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import lorakit
from lorakit.adapter.files.gguf import read_gguf
from lorakit.adapter.files.reading import open_file
from lorakit.errors import MisfitError
from lorakit.formats.llama_cpp import ARCHITECTURES
from tests.files.gguf_scene import UP, WIDTH, adapter, base, config, converted, gguf, up_factors
from tests.verbs.adapters import pair, save, updates

__all__ = ["base"]

SCRATCH = lorakit.RunOptions(sync=False)


def test_names_of_every_architecture_are_known():
    from lorakit.adapter.files.gguf_names import names_of

    for kind in ARCHITECTURES:
        names = names_of({"model_type": kind, "num_hidden_layers": 2})
        assert len(names) >= 8, kind
        assert len(set(names.values())) == len(names), kind


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
    one = updates(source)
    there = {t.name: np.array(t.data) for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    block, leaves = LEAVES[kind]
    for leaf, called in leaves.items():
        a, b = (there[f"blk.1.ffn_{called}_exps.weight.lora_{x}"].astype("f8") for x in "ab")
        assert (a.shape, b.shape) == ((3, rank, WIDTH), (3, 40, rank))
        for n in range(3):
            wanted = one.get(f"model.layers.1.{block}.experts.{n}.{leaf}", np.zeros((40, WIDTH)))
            np.testing.assert_allclose(3 / rank * b[n] @ a[n], wanted, rtol=1e-6, atol=1e-6)
    converted(tmp_path / "a.gguf", tmp_path / "back", "peft", base)
    back = updates(tmp_path / "back")
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
