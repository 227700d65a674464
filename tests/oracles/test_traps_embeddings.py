"""Embeddings that scale their output, and the rows of the table of ties that the zoo lacks."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lorakit
from lorakit import RunOptions
from lorakit.errors import MisfitError
from tests.oracles.reading import Array, read_dtypes, read_json, read_tensors
from tests.oracles.test_merge import assert_close
from tests.oracles.trap_files import Files, made, quietly

pytest.importorskip("peft", minversion="0.21")
SCRATCH = RunOptions(sync=False)
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    done: dict[str, Files] = {}

    def once(model: str) -> Files:
        if model not in done:
            lora = {"target_modules": ["embed_tokens", "q_proj"], "init_lora_weights": False}
            done[model] = made(tmp_path_factory.mktemp(model), model, lora)
        return done[model]

    return once


def change(adapter: Path) -> Array:
    """alpha / rank times (B A) transposed, of the embedding."""
    parts = {key.rpartition(".")[2]: t for key, t in read_tensors(adapter).items()}
    a, b = parts["lora_embedding_A"], parts["lora_embedding_B"]
    found: Array = 6 / 4 * (b @ a).T
    return found


def of_version(files: Files, folder: Path, version: str) -> Path:
    """The adapter as a release of PEFT would have signed it; "": none."""
    shutil.copytree(files.adapter, folder)
    config = read_json(folder / "adapter_config.json")
    config.pop("peft_version")
    config |= {"peft_version": version} if version else {}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("model", "version", "times"),
    [
        ("gemma3", "0.17.1", 0.25),
        ("gemma3", "", 0.25),
        ("gemma3", "0.18.0", 1),
        ("gemma3", "0.18.0.dev0@abc", 1),
        ("gemma3", "0.21.2", 1),
        *((m, v, 1) for m in ("gemma", "gemma2", "llama") for v in ("0.17.1", "", "0.21.2")),
    ],
)
def test_the_scale_of_an_embedding_is_taken_out_where_training_left_it_out(
    files: Any, tmp_path: Path, model: str, version: str, times: float
) -> None:
    """hidden_size is 16, so that Gemma 3 scales by 4."""
    adapter = of_version(files(model), tmp_path / "adapter", version)
    job = lorakit.plan_merge(files(model).base, adapter)
    told = [note for note in job.plan.notes if "divided by the scale" in note]
    assert len(told) == (times != 1)
    assert all(("so it is older" in note) == (not version) for note in told)
    job.run(tmp_path / "out", SCRATCH)
    base, ours = read_tensors(files(model).base), read_tensors(tmp_path / "out")
    exact = base[EMBEDDING] + times * change(files(model).adapter)
    assert abs(ours[EMBEDDING] - exact).max() < 2.0**-21 * abs(exact).max()
    assert not lorakit.verify(tmp_path / "out", full=True).differences


@pytest.mark.parametrize("model", ["gemma", "gemma2", "gemma3"])
def test_the_merged_model_answers_as_todays_peft(files: Any, tmp_path: Path, model: str) -> None:
    import torch
    from peft import PeftModel

    lorakit.merge(files(model).base, files(model).adapter, tmp_path / "out", run=SCRATCH)
    ids = torch.arange(24).reshape(2, 12)
    with quietly(model), torch.no_grad():
        adapted = PeftModel.from_pretrained(files(model).load(), files(model).adapter).eval()
        exact = adapted(ids).logits
        with adapted.disable_adapter():
            effect = float((exact - adapted(ids).logits).abs().max())
        ours = files(model).load(tmp_path / "out").eval()(ids).logits
    assert float((ours - exact).abs().max()) < 1e-4 * effect


# Rows of the table of ties that the zoo lacks ---------------------------------------------------


def tied(folder: Path, **lora: Any) -> Files:
    options = {"target_modules": ["q_proj"], "init_lora_weights": False, **lora}
    return made(folder, "llama_tied", options)


def saved(files: Files, **changes: Any) -> Path:
    """The adapter with other values for some tensors, by what their names contain."""
    from safetensors.numpy import load_file, save_file

    weights = files.adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    for part, value in changes.items():
        (key,) = [k for k in tensors if part in k]
        tensors[key] = np.ascontiguousarray(value(tensors))
    save_file(tensors, weights, metadata={"format": "pt"})
    return files.adapter


def embedding_in(tensors: dict[str, Array]) -> Array:
    (found,) = [t for k, t in tensors.items() if "embed_tokens" in k]
    return found


def test_both_sides_saved_alike_stay_one(tmp_path: Path) -> None:
    files = tied(tmp_path, modules_to_save=["embed_tokens", "lm_head"])
    adapter = saved(files, lm_head=embedding_in)
    lorakit.merge(files.base, adapter, tmp_path / "out", run=SCRATCH)
    ours = read_tensors(tmp_path / "out")
    np.testing.assert_array_equal(ours[EMBEDDING], embedding_in(read_tensors(adapter)))
    assert read_dtypes(tmp_path / "out") == read_dtypes(files.base)
    assert read_json(tmp_path / "out/config.json") == read_json(files.base / "config.json")


def test_both_sides_saved_apart_become_two(tmp_path: Path) -> None:
    files = tied(tmp_path, modules_to_save=["embed_tokens", "lm_head"])
    adapter = saved(files, lm_head=lambda tensors: 2 * embedding_in(tensors))
    with pytest.raises(MisfitError, match="Pass --untie"):
        lorakit.merge(files.base, adapter, tmp_path / "out")
    lorakit.merge(files.base, adapter, tmp_path / "out", untie=True, run=SCRATCH)
    ours, new = read_tensors(tmp_path / "out"), embedding_in(read_tensors(adapter))
    np.testing.assert_array_equal(ours[EMBEDDING], new)
    np.testing.assert_array_equal(ours["lm_head.weight"], 2 * new)
    assert read_json(tmp_path / "out/config.json")["tie_word_embeddings"] is False


def test_an_update_of_both_sides_that_is_the_same_is_added_once(tmp_path: Path) -> None:
    """PEFT 0.21.2 adds it twice to the one tensor (ensure_weight_tying)."""
    from peft import PeftModel

    lora = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    files = tied(tmp_path, **lora)
    lorakit.merge(files.base, files.adapter, tmp_path / "out", run=SCRATCH)
    base = read_tensors(files.base)
    exact = base | {EMBEDDING: base[EMBEDDING] + change(files.adapter)}
    assert_close(tmp_path / "out", exact, base)
    with quietly("tied"):
        merged = PeftModel.from_pretrained(files.load(), files.adapter).merge_and_unload()
    theirs = merged.get_input_embeddings().weight.detach().double().numpy()
    assert abs(theirs - base[EMBEDDING] - 2 * change(files.adapter)).max() < 1e-5


def test_an_update_of_both_sides_that_is_the_same_but_for_the_last_bit_is_two(
    tmp_path: Path,
) -> None:
    lora = {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}
    files = tied(tmp_path, **lora)

    def nudged(tensors: dict[str, Any]) -> Any:
        (key,) = [k for k in tensors if "lm_head.lora_A" in k]
        other = tensors[key].copy()
        other[0, 0] = np.nextafter(other[0, 0], np.float32(9))
        return other

    adapter = saved(files, **{"lm_head.lora_A": nudged})
    with pytest.raises(MisfitError, match="Pass --untie"):
        lorakit.merge(files.base, adapter, tmp_path / "out")
    lorakit.merge(files.base, adapter, tmp_path / "out", untie=True, run=SCRATCH)
    base, ours = read_tensors(files.base)[EMBEDDING], read_tensors(tmp_path / "out")
    for side in (EMBEDDING, "lm_head.weight"):
        exact = base + change(files.adapter)
        assert abs(ours[side] - exact).max() < 2.0**-21 * abs(exact).max()


def test_rows_of_two_indices_for_the_two_sides_become_two(tmp_path: Path) -> None:
    indices = {"embed_tokens": [5, 2], "lm_head": [7, 2]}
    files = tied(tmp_path, trainable_token_indices=indices)
    with pytest.raises(MisfitError, match="Pass --untie"):
        lorakit.merge(files.base, files.adapter, tmp_path / "out")
    lorakit.merge(files.base, files.adapter, tmp_path / "out", untie=True, run=SCRATCH)
    base, ours = read_tensors(files.base)[EMBEDDING], read_tensors(tmp_path / "out")
    rows = {k.split(".token_adapter")[0]: t for k, t in read_tensors(files.adapter).items()}
    for side, module in ((EMBEDDING, "model.embed_tokens"), ("lm_head.weight", "lm_head")):
        new = rows[f"base_model.model.{module}"]
        exact = base.copy()
        exact[indices[module.rpartition(".")[2]]] = new
        np.testing.assert_array_equal(ours[side], exact)
