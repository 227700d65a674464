"""A checkpoint is opened whole, or refused with the file and the tensor that are wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lorakit.errors import InputError
from lorakit.store.checkpoint import open_checkpoint, weight_map
from lorakit.store.json_file import read_json

SHARDS = {
    "model-00001-of-00003.safetensors": ["a", "b"],
    "model-00002-of-00003.safetensors": ["c"],
    "model-00003-of-00003.safetensors": ["d", "e"],
}
INDEX = "model.safetensors.index.json"


def save(path: Path, names: list[str], value: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({n: np.full((2, 3), value + ord(n[0]), np.float32) for n in names}, path)


def save_index(folder: Path, weights: dict[str, str], name: str = INDEX) -> Path:
    path = folder / name
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weights}))
    return path


@pytest.fixture
def base(tmp_path):
    """A folder of three shards with their index."""
    folder = tmp_path / "base"
    for name, tensors in SHARDS.items():
        save(folder / name, tensors)
    save_index(folder, {t: name for name, tensors in SHARDS.items() for t in tensors})
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def refused(path: Path, words: str) -> InputError:
    with pytest.raises(InputError, match=words) as caught:
        open_checkpoint(str(path))
    assert caught.value.exit_code == 3
    return caught.value


def value(checkpoint, name: str) -> float:
    into = np.empty((1, 3), np.float32)
    checkpoint.read_rows(name, 1, 2, into)
    return float(into[0, 2])


def test_a_single_file_is_a_checkpoint_without_a_folder(tmp_path):
    save(tmp_path / "weights.safetensors", ["a", "b"])
    (tmp_path / "config.json").write_text("{}")
    found = open_checkpoint(str(tmp_path / "weights.safetensors"))
    assert list(found.infos) == ["a", "b"]
    assert (found.folder, found.index, found.config, found.left_out) == (None, None, {}, ())
    assert value(found, "b") == 99


def test_a_folder_with_one_file_is_a_checkpoint_whatever_its_name(tmp_path):
    save(tmp_path / "anything.safetensors", ["a"])
    found = open_checkpoint(str(tmp_path))
    assert [p.name for p in found.parts] == ["anything.safetensors"]
    assert found.folder == tmp_path


def test_shards_are_found_by_their_index(base):
    found = open_checkpoint(str(base))
    assert [p.name for p in found.parts] == list(SHARDS)
    assert list(found.infos) == list("abcde")
    assert {n: found.home(n).name for n in "ace"} == dict(zip("ace", SHARDS, strict=True))
    assert value(found, "e") == 102
    assert found.config == {"model_type": "llama"}
    assert found.index == base / INDEX
    assert found.left_out == ()


def test_the_index_itself_can_be_named(base):
    found = open_checkpoint(str(base / INDEX))
    assert (found.folder, found.index) == (base, base / INDEX)
    assert list(found.infos) == list("abcde")


def test_of_two_indexes_one_has_to_be_named(base):
    save(base / "model.fp16-00001-of-00001.safetensors", ["a"], 2.0)
    other = save_index(
        base, {"a": "model.fp16-00001-of-00001.safetensors"}, "model.fp16.safetensors.index.json"
    )
    assert "Name the one that is meant" in refused(base, "has 2 indexes").hint
    found = open_checkpoint(str(other))
    assert value(found, "a") == 99
    assert found.index == other
    assert found.left_out == tuple(SHARDS)


def test_what_macos_leaves_beside_files_is_no_weight_and_no_index(base):
    for name in (*SHARDS, INDEX):
        (base / f"._{name}").write_bytes(b"\0\5\x16\7")
    assert open_checkpoint(str(base)).left_out == ()


@pytest.mark.parametrize(
    "file",
    ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "..\\x", "C:\\x", "C:x", "\\\\h\\s\\x"],
)
def test_an_index_names_files_of_its_own_folder_only(base, file):
    save(base.parent / "x", ["a"])
    save_index(base, {"a": f"{file}.safetensors" if file.endswith("x") else file})
    error = refused(base, "is no plain file name")
    assert error.tensor == "a"
    assert error.file == str(base / INDEX)


def test_a_missing_shard_is_named(base):
    (base / "model-00002-of-00003.safetensors").unlink()
    refused(base, "1 of 3 shards are missing; the first is 'model-00002-of-00003.safetensors'")


def test_a_shard_that_leads_nowhere_is_missing(base):
    shard = base / "model-00002-of-00003.safetensors"
    shard.unlink()
    shard.symlink_to("../blobs/gone")
    refused(base, "1 of 3 shards are missing")


def test_a_truncated_shard_is_named(base):
    shard = base / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert refused(base, "is truncated").file == str(shard)


def test_a_stale_shard_contradicts_the_index(base):
    save(base / "model-00002-of-00003.safetensors", ["b"])
    error = refused(base, "contradicts the shards in 2 tensors; the first is 'b'")
    assert "in model-00001-of-00003.safetensors by the index" in str(error)
    assert "in model-00002-of-00003.safetensors in fact" in str(error)
    assert error.tensor == "b"


def test_a_tensor_that_no_index_names_contradicts_it(base):
    save(base / "model-00002-of-00003.safetensors", ["c", "stray"])
    assert "in none by the index" in str(refused(base, "contradicts .* 'stray'"))


def test_a_tensor_in_two_shards_is_refused_with_both(base):
    (base / INDEX).unlink()
    save(base / "model-00003-of-00003.safetensors", ["d", "a"])
    refused(base, "'a' is in both model-00001-of-00003.safetensors and model-00003-of-00003")


def test_a_stray_shard_is_left_out_and_named(base):
    save(base / "model-00004-of-00004.safetensors", ["z"])
    (base / "pytorch_model.bin").write_bytes(b"never opened")
    found = open_checkpoint(str(base))
    assert list(found.infos) == list("abcde")
    assert found.left_out == ("model-00004-of-00004.safetensors", "pytorch_model.bin")


def test_consolidated_weights_beside_shards_are_left_out_and_named(base):
    save(base / "consolidated.safetensors", ["a", "b", "c"])
    assert open_checkpoint(str(base)).left_out == ("consolidated.safetensors",)
    (base / INDEX).unlink()
    found = open_checkpoint(str(base))
    assert list(found.infos) == list("abcde")
    assert found.left_out == ("consolidated.safetensors",)


def test_an_adapter_beside_the_weights_is_none_of_them(base):
    save(base / "adapter_model.safetensors", ["z"])
    (base / "training_args.bin").write_bytes(b"never opened")
    assert open_checkpoint(str(base)).left_out == ()


def test_a_complete_set_of_shards_needs_no_index(base):
    (base / INDEX).unlink()
    found = open_checkpoint(str(base))
    assert [p.name for p in found.parts] == list(SHARDS)
    assert found.index is None


@pytest.mark.parametrize("missing", ["00001", "00003"])
def test_an_incomplete_set_of_shards_is_refused(base, missing):
    (base / INDEX).unlink()
    (base / f"model-{missing}-of-00003.safetensors").unlink()
    refused(base, f"1 of the 3 shards of 'model' are missing; the first is 'model-{missing}")


def test_a_set_with_a_shard_of_another_number_is_refused(base):
    (base / INDEX).unlink()
    shard = base / "model-00003-of-00003.safetensors"
    shard.rename(base / "model-00004-of-00003.safetensors")
    refused(base, "1 of the 3 shards of 'model' are missing")


def test_two_sets_of_shards_without_an_index_are_refused(base):
    (base / INDEX).unlink()
    save(base / "other-00001-of-00001.safetensors", ["z"])
    refused(base, "4 weight files .* and no index")


def test_files_of_which_none_is_the_model_are_refused(tmp_path):
    for name in ("one", "two"):
        save(tmp_path / f"{name}.safetensors", [name])
    refused(tmp_path, "2 weight files .* and no index")


def test_the_model_is_preferred_to_its_variants(tmp_path):
    save(tmp_path / "model.fp16.safetensors", ["a"], 2.0)
    save(tmp_path / "model.safetensors", ["a"])
    found = open_checkpoint(str(tmp_path))
    assert [p.name for p in found.parts] == ["model.safetensors"]
    assert found.left_out == ("model.fp16.safetensors",)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.non_ema.safetensors")
    refused(tmp_path, "2 weight files .* and no index")


def test_a_folder_without_weights_is_refused(tmp_path):
    refused(tmp_path, "no weight files are in it")


def test_the_cache_of_the_hub_is_followed_through_its_links(base, tmp_path):
    """snapshots/COMMIT/NAME -> ../../blobs/HASH, which may be a link into a shared store itself."""
    blobs, store = tmp_path / "cache" / "blobs", tmp_path / "store"
    snapshot = tmp_path / "cache" / "snapshots" / "commit"
    for folder in (blobs, store, snapshot):
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted(base.iterdir())):
        path.rename(store / f"xet{number}")
        (blobs / f"hash{number}").symlink_to(store / f"xet{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash{number}")
    for where in (snapshot, snapshot / INDEX):
        found = open_checkpoint(str(where))
        assert [p.name for p in found.parts] == list(SHARDS)
        assert found.folder == snapshot
        assert found.config == {"model_type": "llama"}
        assert value(found, "e") == 102


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not valid JSON"),
        ("[]", "is not a JSON object"),
        ("[" * 100_000, "is not valid JSON"),
        ("{}", "has no weight_map of file names"),
        ('{"weight_map": {}}', "has no weight_map of file names"),
        ('{"weight_map": []}', "has no weight_map of file names"),
        ('{"weight_map": {"a": 1}}', "has no weight_map of file names"),
        ('{"weight_map": {"a": null}}', "has no weight_map of file names"),
        ('{"weight_map": {"a": "x\\u0000y"}}', "are missing"),
        ('{"weight_map": {"a": "x\\ud800y"}}', "is not valid JSON"),
    ],
)
def test_an_index_that_is_none_is_refused(base, text, words):
    (base / INDEX).write_text(text)
    assert str(refused(base, words)).isprintable()


def test_an_index_that_is_huge_is_refused_unread(base):
    with (base / INDEX).open("wb") as f:
        f.truncate(1 << 40)
    refused(base, "has 1,099,511,627,776 bytes; refused")


def test_an_index_that_names_what_is_no_weight_file_is_refused(base):
    save_index(base, {"a": "config.json"})
    refused(base, "is JSON, not weights")


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", INDEX, "config.json"])
def test_what_git_left_in_the_place_of_a_file_is_told(base, name):
    (base / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(InputError, match="is a git-lfs pointer") as error:
        _ = open_checkpoint(str(base)).config
    assert error.value.hint == "Run: git lfs pull"


def test_an_index_that_names_a_pickle_needs_leave(base):
    (base / "pytorch_model.bin").write_bytes(b"never opened")
    save_index(base, {"a": "pytorch_model.bin"})
    assert "--allow-pickle" in refused(base, "is a pickle").hint


def test_a_config_that_is_none_is_refused_when_it_is_asked_for(base):
    (base / "config.json").write_text("{")
    found = open_checkpoint(str(base))
    with pytest.raises(InputError, match="is not valid JSON"):
        _ = found.config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"model_type": {"a": 1}}', "has model_type {'a': 1}, which is not a string"),
        ('{"architectures": "LlamaForCausalLM"}', "which is not a list of strings"),
        ('{"architectures": [1]}', "which is not a list of strings"),
        ('{"hidden_size": NaN}', "has hidden_size nan, which is not a size"),
        ('{"vocab_size": true}', "has vocab_size True, which is not a size"),
        ('{"text_config": {"vocab_size": -1}}', r"has text_config\.vocab_size -1"),
        ('{"vlm_config": {"text_config": {"vocab_size": "many"}}}', r"vlm_config\.text_config\.vo"),
        ('{"encoder": {"model_type": 1}}', r"has encoder\.model_type 1, which is not a string"),
        ('{"quantization_config": []}', "which is not an object"),
        ('{"num_hidden_layers": 1000000000}', "which is not a number of layers or experts"),
        ('{"note": "\\ud800"}', "is not valid JSON: .* surrogates"),
    ],
)
def test_a_config_whose_facts_are_no_facts_is_refused(base, text, words):
    (base / "config.json").write_text(text)
    with pytest.raises(InputError, match=words):
        _ = open_checkpoint(str(base)).config


def test_absent_facts_may_be_null(base):
    (base / "config.json").write_text('{"model_type": null, "text_config": null, "extra": {}}')
    assert open_checkpoint(str(base)).config["model_type"] is None


def test_json_and_the_map_of_an_index_are_read_as_they_are(base):
    assert read_json(base / "config.json") == {"model_type": "llama"}
    assert weight_map(base / INDEX)["e"] == "model-00003-of-00003.safetensors"
