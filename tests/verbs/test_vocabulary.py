"""A vocabulary that an adapter resized, in tensors over it that no adapter has."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.errors import MisfitError
from tests.verbs.adapters import pair, save
from tests.verbs.conftest import SCRATCH

TOKENS, WIDTH = 64, 8
QUERY = "model.encoder.layers.0.self_attn.q_proj"
BIAS = "final_logits_bias"


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def bart(tmp_path: Path) -> Path:
    """A tied base of the kind of BART: one embedding, a query, and the bias of the logits."""
    folder = tmp_path / "bart"
    folder.mkdir()
    tensors = {
        BIAS: numbers(0, 1, TOKENS),
        "model.shared.weight": numbers(1, TOKENS, WIDTH),
        f"{QUERY}.weight": numbers(2, WIDTH, WIDTH),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {"model_type": "bart", "vocab_size": TOKENS, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=[TOKENS + 5, TOKENS - 3], ids=["longer", "shorter"])
def resized(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An adapter that saved both sides of the embedding in another size, as PEFT does unasked."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    table = numbers(3, request.param, WIDTH)
    tensors = {
        f"{QUERY}.lora_A.weight": numbers(4, 2, WIDTH),
        f"{QUERY}.lora_B.weight": numbers(5, WIDTH, 2),
        "model.shared.weight": table,
        "lm_head.weight": table.copy(),
    }
    named = {f"base_model.model.{n}": t for n, t in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_the_bias_of_the_logits_has_0_for_new_tokens(bart, resized, tmp_path, dtype):
    out = tmp_path / "out"
    report = lorakit.merge(bart, resized, out, dtype=dtype, link=True, run=SCRATCH)
    before, found = load_file(bart / "model.safetensors"), load_file(out / "model.safetensors")
    count = len(found["model.shared.weight"])
    kept = min(count, TOKENS)
    assert found[BIAS].shape == (1, count)
    bias = found[BIAS].astype(np.float32)
    np.testing.assert_allclose(bias[:, :kept], before[BIAS][:, :kept], rtol=2**-8)
    assert not bias[:, kept:].any()
    assert json.loads((out / "config.json").read_text())["vocab_size"] == count
    assert f"{BIAS!r} is cut, or filled up with 0, to {count} tokens." in report.notes
    assert lorakit.verify(out, full=True).differences == ()


def test_a_bias_that_is_in_memory_is_not_resized(bart, resized):
    state = load_file(bart / "model.safetensors")
    with pytest.raises(MisfitError, match=f"{BIAS!r} has {TOKENS} in the base"):
        lorakit.merge(state, resized)


@pytest.mark.parametrize("weights", [(2.0, 1.0), (-0.5, 1.0), (2.0, 0.5)])
@pytest.mark.parametrize("together", [False, True], ids=["apart", "together"])
def test_rows_of_tokens_take_no_step_towards_a_table_that_was_saved_unasked(
    tmp_path: Path, weights: tuple[float, float], together: bool
) -> None:
    """PEFT saves the whole table beside factors of an embedding."""
    name = "model.embed_tokens"
    table, rows = numbers(0, TOKENS, WIDTH), numbers(1, 2, WIDTH)
    saved = {f"{name}.base_layer.weight": table, **pair("q_proj", WIDTH, WIDTH, 2)}
    tokens = {f"{name}.token_adapter.trainable_tokens_delta": rows}
    indices = {"trainable_token_indices": [3, 9]}
    if together:
        adapters, weights = [save(tmp_path / "a", saved | tokens, **indices)], weights[1:]
    else:
        adapters = [save(tmp_path / "a", saved), save(tmp_path / "b", tokens, **indices)]
    base = {f"{name}.weight": table, "q_proj.weight": numbers(2, WIDTH, WIDTH)}
    base["lm_head.weight"] = numbers(3, TOKENS, WIDTH)
    found = lorakit.merge(base, adapters, weights=list(weights))[f"{name}.weight"]
    expected = table.copy()
    expected[[3, 9]] += weights[-1] * (rows - table[[3, 9]])
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
