"""What an adapter's config says that it has and its file has not is told before a merge."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

import lorakit
from tests.verbs.adapters import pair, save

LAYER = "model.layers.{}.self_attn.{}_proj"


@pytest.fixture
def base(tmp_path):
    """Four layers, the last of which predicts more tokens, and a head."""
    names = [LAYER.format(i, x) for i in range(4) for x in "qv"]
    weights = {f"{n}.weight": np.ones((8, 8), "f4") for n in [*names, "lm_head"]}
    (tmp_path / "base").mkdir()
    save_file(weights, tmp_path / "base" / "model.safetensors")
    config = {"model_type": "llama", "num_hidden_layers": 3}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    return tmp_path / "base"


def notes(base, layers, tensors=(), **config):
    """The notes of the plan of a merge of an adapter of `q_proj` in these layers."""
    factors = [pair(LAYER.format(i, "q"), 8, 8, 2) for i in layers]
    whole = dict.fromkeys(tensors, (8, 8))
    config = {"target_modules": ["q_proj"], **config}
    adapter = save(
        base.parent / "adapter", {k: v for f in factors for k, v in f.items()} | whole, **config
    )
    return " ".join(lorakit.plan_merge(base, adapter).notes)


def test_an_adapter_that_has_all_that_its_config_says_gets_no_note(base):
    head = {"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"}
    assert "the file" not in notes(base, range(3), ["score.weight"], **head)


def test_layers_that_are_targeted_and_have_nothing_are_told(base):
    found = notes(base, [0])
    assert "nothing for 2 of them, first 'model.layers.1'" in found


@pytest.mark.parametrize(
    "config",
    [
        {"layers_to_transform": [0]},
        {"target_modules": r".*\.0\..*q_proj"},
        {"target_modules": ["layers.0.self_attn.q_proj"]},
        {"exclude_modules": ["layers.1.self_attn.q_proj", "layers.2.self_attn.q_proj"]},
    ],
)
def test_layers_that_are_left_out_on_purpose_are_not(base, config):
    assert "the file" not in notes(base, [0], **config)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"modules_to_save": ["lm_head"]}, "saves 'lm_head' as a whole"),
        ({"modules_to_save": ["classifier", "score"], "task_type": "SEQ_CLS"}, "'classifier'"),
        ({"trainable_token_indices": [3, 4]}, "no rows for them"),
    ],
)
def test_whole_tensors_and_rows_that_are_gone_are_told(base, config, line):
    assert line in notes(base, range(3), **config)
