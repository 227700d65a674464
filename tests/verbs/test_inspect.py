"""inspect names what it is given, from headers alone."""

import json
import shutil

import pytest

import lorakit
from lorakit.errors import InputError


def test_a_base_an_adapter_and_a_result_are_told_apart(made, merged):
    kinds = [lorakit.inspect(p).kind for p in (made / "base", made / "detail", merged)]
    assert kinds == ["base", "adapter", "result"]


def test_an_adapter_is_described_by_its_modules_rank_and_scaling(made):
    found = lorakit.inspect(made / "detail")
    assert found.facts["modules"] == 14
    assert found.facts["rank"] == {"8": 14}
    assert found.facts["scaling"] == {"2": 14}
    assert found.facts["targets"][:2] == ["down_proj", "gate_proj"]
    assert found.dtypes == {"F32": 78_848}


def test_names_are_grouped_and_json_ready(made):
    found = lorakit.inspect(made / "base")
    assert ("model.layers.*.mlp.up_proj.weight", 2, "176x64", "BF16") in found.groups
    assert json.loads(json.dumps(found.to_dict()))["facts"]["tensors"] == 21


def test_an_index_without_its_shards_is_read_by_itself(made, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes((made / "base" / index.name).read_bytes())
    found = lorakit.inspect(index)
    assert found.kind == "index"
    assert found.facts == {"tensors": 21, "files": 3, "files here": 0}


def test_what_a_merge_would_refuse_is_said(made, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in (made / "style").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    config["alora_invocation_tokens"] = [1, 2]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert "alora_invocation_tokens" in lorakit.inspect(folder).notes[0]


def test_an_adapter_file_without_a_config_says_what_is_missing(made, tmp_path):
    alone = tmp_path / "lora.safetensors"
    alone.write_bytes((made / "style" / "adapter_model.safetensors").read_bytes())
    found = lorakit.inspect(alone)
    assert found.kind == "adapter"
    assert "alpha" in found.notes[0]


def test_an_adapter_file_of_another_name_is_described_with_its_config(made, tmp_path):
    shutil.copytree(made / "style", tmp_path / "a")
    told = lorakit.inspect(tmp_path / "a").facts
    (tmp_path / "a/adapter_model.safetensors").rename(tmp_path / "a/own.safetensors")
    assert lorakit.inspect(tmp_path / "a").facts == told
    assert lorakit.inspect(tmp_path / "a/own.safetensors").facts == told


def test_an_adapter_of_mlx_is_described_in_its_own_orientation(made, tmp_path):
    lorakit.convert(made / "style", tmp_path / "mlx", to="mlx")
    saved = tmp_path / "mlx/0000100_adapters.safetensors"  # which a training of MLX leaves there
    shutil.copy(tmp_path / "mlx/adapters.safetensors", saved)
    for path in (tmp_path / "mlx", tmp_path / "mlx/adapters.safetensors"):
        facts = lorakit.inspect(path).facts
        assert (facts["format"], facts["rank"], facts["modules"]) == ("mlx", {"4": 4}, 4)


def test_a_pickle_is_named_and_not_read(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"anything")
    assert lorakit.inspect(tmp_path / "model.bin").kind == "pickle"


def test_nothing_and_nonsense_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        lorakit.inspect(tmp_path / "none")
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(InputError):
        lorakit.inspect(tmp_path / "x.safetensors")
