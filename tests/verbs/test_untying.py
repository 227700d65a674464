"""What the two sides of a tied embedding have in common before they part."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.errors import MisfitError
from tests.verbs.adapters import drawn, save
from tests.verbs.conftest import SCRATCH

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
TABLE = drawn("table", 12, 8)
GROWN = drawn("grown", 14, 8)
SCALING = 3 / 2


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    save_file({f"{EMBEDDING}.weight": TABLE}, tmp_path / "base" / "model.safetensors")
    config = {"model_type": "llama", "tie_word_embeddings": True, "vocab_size": 12}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    return tmp_path / "base"


def update(module, rows):
    """Factors of one side by name, and what they add to its table."""
    down, up = ("lora_A.weight", "lora_B.weight")
    shapes = ((2, 8), (rows, 2))
    if module == EMBEDDING:
        down, up, shapes = "lora_embedding_A", "lora_embedding_B", ((2, rows), (8, 2))
    a, b = drawn("a", *shapes[0]), drawn("b", *shapes[1])
    change = SCALING * (b @ a)
    return {f"{module}.{down}": a, f"{module}.{up}": b}, change.T if module == EMBEDDING else change


def merged(base, tensors, **config):
    adapter = save(base.parent / "adapter", tensors, **config)
    lorakit.merge(base, adapter, base.parent / "out", untie=True, run=SCRATCH)
    found = load_file(base.parent / "out" / "model.safetensors")
    return found[f"{EMBEDDING}.weight"], found[f"{HEAD}.weight"]


def test_token_rows_are_those_of_both_sides_whatever_else_the_head_gets(base):
    factors, change = update(HEAD, 12)
    rows = {f"{EMBEDDING}.token_adapter.trainable_tokens_delta": drawn("rows", 2, 8)}
    new = TABLE.copy()
    new[[3, 5]] = drawn("rows", 2, 8)
    embedding, head = merged(base, factors | rows, trainable_token_indices=[3, 5])
    np.testing.assert_array_equal(embedding, new)
    np.testing.assert_allclose(head, new + change, rtol=1e-5, atol=1e-6)


def test_token_rows_of_the_head_are_its_own(base):
    rows = {f"{HEAD}.token_adapter.trainable_tokens_delta": drawn("rows", 2, 8)}
    embedding, head = merged(base, rows, trainable_token_indices={"lm_head": [3, 5]})
    np.testing.assert_array_equal(embedding, TABLE)
    np.testing.assert_array_equal(head[[3, 5]], drawn("rows", 2, 8))


@pytest.mark.parametrize("of_head", [True, False], ids=["rows of both", "rows of the embedding"])
@pytest.mark.parametrize("indices", [[3, 13], {"embed_tokens": [3, 13]}], ids=["list", "dict"])
def test_new_tokens_with_rows_of_their_own_are_those_of_both_sides(base, indices, of_head):
    """PEFT saves the table and the rows under both names where the vocabulary was resized."""
    rows, tensors = drawn("rows", 2, 8), {}
    for module in (EMBEDDING, HEAD):
        wrapped = f"{module}.token_adapter.base_layer.weight"
        tensors[wrapped if module == EMBEDDING or of_head else f"{module}.weight"] = GROWN.copy()
        if module == EMBEDDING or of_head:
            tensors[f"{module}.token_adapter.trainable_tokens_delta"] = rows.copy()
    adapter = save(base.parent / "adapter", tensors, trainable_token_indices=indices)
    lorakit.merge(base, adapter, base.parent / "out", run=SCRATCH)
    found = load_file(base.parent / "out" / "model.safetensors")
    expected = GROWN.copy()
    expected[[3, 13]] = rows
    assert list(found) == [f"{EMBEDDING}.weight"]
    np.testing.assert_array_equal(found[f"{EMBEDDING}.weight"], expected)
    assert json.loads((base.parent / "out/config.json").read_text())["vocab_size"] == 14


@pytest.mark.parametrize("side", [EMBEDDING, HEAD])
def test_a_resized_table_that_was_saved_unasked_is_that_of_both_sides(base, side):
    factors, change = update(side, 14)
    found = merged(base, factors | {f"{side}.base_layer.weight": GROWN})
    sides = dict(zip((EMBEDDING, HEAD), found, strict=True))
    np.testing.assert_allclose(sides.pop(side), GROWN + change, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(*sides.values(), GROWN)


def test_a_resized_table_that_learnt_is_that_of_its_side(base):
    with pytest.raises(MisfitError, match="a model of both does not load"):
        merged(base, {f"{EMBEDDING}.weight": GROWN}, modules_to_save=["embed_tokens"])


def of_mlx(folder):
    """An adapter of MLX-LM for the embedding, and what it adds to the table."""
    folder.mkdir()
    a, b = drawn("a", 12, 2), drawn("b", 2, 8)
    save_file({f"{EMBEDDING}.lora_a": a, f"{EMBEDDING}.lora_b": b}, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text('{"lora_parameters": {"scale": 0.5}}')
    return folder, 0.5 * (a @ b)


def test_an_embedding_of_mlx_is_that_of_a_head_that_shares_it(base, tmp_path):
    adapter, change = of_mlx(tmp_path / "mlx")
    lorakit.merge(base, adapter, tmp_path / "out", run=SCRATCH)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == {f"{EMBEDDING}.weight"}
    np.testing.assert_allclose(found[f"{EMBEDDING}.weight"], TABLE + change, rtol=1e-5, atol=1e-6)
    lorakit.verify(tmp_path / "out")
    done = lorakit.resize(adapter, tmp_path / "peft", rank=1, run=SCRATCH)
    assert any("whose head is its embedding" in note for note in done.notes)


def test_an_embedding_of_mlx_goes_to_both_sides_that_another_adapter_parts(base, tmp_path):
    adapter, change = of_mlx(tmp_path / "mlx")
    tensors, more = update(HEAD, 12)
    other = save(tmp_path / "adapter", tensors)
    with pytest.raises(MisfitError, match="shares between its embedding and its output head"):
        lorakit.merge(base, [adapter, other], tmp_path / "out", run=SCRATCH)
    lorakit.merge(base, [adapter, other], tmp_path / "out", untie=True, run=SCRATCH)
    found = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_allclose(found[f"{EMBEDDING}.weight"], TABLE + change, rtol=1e-5, atol=1e-6)
    both = TABLE + change + more
    np.testing.assert_allclose(found[f"{HEAD}.weight"], both, rtol=1e-5, atol=1e-6)
