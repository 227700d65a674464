"""unmerge comes back to the base within the bound that it states."""

import json

import numpy as np
import pytest

import lorakit
from lorakit.adapter.load import read_array
from lorakit.errors import InputError
from lorakit.store.checkpoint import open_checkpoint
from lorakit.verbs.unmerge import plan_unmerge
from tests.verbs.adapters import save
from tests.verbs.conftest import SCRATCH


def test_no_number_is_further_from_the_base_than_the_report_says(made, merged, tmp_path):
    both = [made / "style", made / "detail"]
    report = lorakit.unmerge(merged, both, tmp_path / "back", weights=[1, 0.5], run=SCRATCH)
    base, back = open_checkpoint(str(made / "base")), open_checkpoint(str(tmp_path / "back"))
    assert list(base.infos) == list(back.infos)
    far = max(
        np.abs(read_array(base, n, "float64") - read_array(back, n, "float64")).max()
        for n in base.infos
    )
    assert 0 < far <= report.undo_error


def test_in_float32_the_base_comes_back_almost_exactly(made, tmp_path):
    wide, back = tmp_path / "wide", tmp_path / "back"
    lorakit.merge(made / "base", made / "style", wide, dtype="float32", run=SCRATCH)
    lorakit.unmerge(wide, made / "style", back, dtype="bfloat16", run=SCRATCH)
    base, there = open_checkpoint(str(made / "base")), open_checkpoint(str(back))
    for name in base.infos:
        np.testing.assert_array_equal(read_array(base, name), read_array(there, name))


@pytest.mark.parametrize("dtype", ["keep", "float16"])
def test_a_merge_that_wrote_another_dtype_is_told(made, tmp_path, dtype):
    out = tmp_path / "out"
    lorakit.merge(made / "base", made / "style", out, dtype=dtype, run=SCRATCH)
    notes = " ".join(plan_unmerge(out, made / "style").notes)
    assert ("the merge wrote float16" in notes) == (dtype == "float16")


def test_a_wider_dtype_does_not_bring_back_what_the_merge_rounded(made, merged, tmp_path):
    both = [made / "style", made / "detail"]
    options = {"weights": [1, 0.5], "dtype": "float32", "run": SCRATCH}
    report = lorakit.unmerge(merged, both, tmp_path / "back", **options)
    base, back = open_checkpoint(str(made / "base")), open_checkpoint(str(tmp_path / "back"))
    far = max(
        np.abs(read_array(base, n, "float64") - read_array(back, n, "float64")).max()
        for n in base.infos
    )
    assert 1e-5 < far <= report.undo_error


@pytest.mark.parametrize("change", ["full", "magnitude", "rows"])
def test_what_cannot_be_taken_out_is_refused_by_name(made, tmp_path, change):
    from lorakit.verbs.demo import _write_tensors

    module = "base_model.model.model.layers.0.self_attn.q_proj"
    shapes = {f"{module}.lora_A.weight": (2, 64), f"{module}.lora_B.weight": (64, 2)}
    shapes |= {
        "full": {"base_model.model.lm_head.weight": (512, 64)},
        "magnitude": {f"{module}.lora_magnitude_vector": (64,)},
        "rows": {
            "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": (1, 64)
        },
    }[change]
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    _write_tensors(adapter / "adapter_model.safetensors", shapes, "F32")
    config = {"peft_type": "LORA", "lora_alpha": 4, "r": 2, "trainable_token_indices": [3]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merged = tmp_path / "merged"
    lorakit.merge(made / "base", adapter, merged, run=SCRATCH)
    with pytest.raises(InputError, match="cannot be taken out"):
        lorakit.unmerge(merged, adapter, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.fixture
def embedded(made, tmp_path):
    """An adapter of the embedding, with both sides of the vocabulary saved whole, as PEFT does."""
    base = open_checkpoint(str(made / "base"))
    rng, embedding = np.random.default_rng(1), "model.embed_tokens"
    tensors = {
        f"{embedding}.lora_embedding_A": rng.standard_normal((2, 512)).astype("f4"),
        f"{embedding}.lora_embedding_B": rng.standard_normal((64, 2)).astype("f4"),
        f"{embedding}.base_layer.weight": read_array(base, f"{embedding}.weight"),
        "lm_head.weight": read_array(base, "lm_head.weight"),
    }
    return save(tmp_path / "embedded", tensors, target_modules=["embed_tokens"])


def test_an_embedding_that_peft_saved_beside_its_update_is_no_replacement(made, embedded, tmp_path):
    lorakit.merge(made / "base", embedded, tmp_path / "merged", run=SCRATCH)
    report = lorakit.unmerge(tmp_path / "merged", embedded, tmp_path / "back", run=SCRATCH)
    base, back = open_checkpoint(str(made / "base")), open_checkpoint(str(tmp_path / "back"))
    for name in base.infos:
        one, other = (read_array(c, name, "float64") for c in (base, back))
        assert np.abs(one - other).max() <= report.undo_error * ("embed" in name)
    assert lorakit.verify(tmp_path / "back", full=True)


def test_an_embedding_that_was_to_be_saved_is_a_replacement(made, embedded, tmp_path):
    config = embedded / "adapter_config.json"
    asked = json.loads(config.read_text()) | {"modules_to_save": ["lm_head"]}
    config.write_text(json.dumps(asked))
    with pytest.raises(InputError, match=r"replaced 'lm_head.weight' as a whole"):
        lorakit.unmerge(made / "base", embedded, tmp_path / "back", run=SCRATCH)
