"""A merge in memory gives the bytes of a merge on files, for every kind of adapter."""

import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from lorakit import merge as lorakit_merge
from lorakit import open_adapter
from lorakit.errors import MisfitError
from tests.oracles.case import Built
from tests.oracles.conftest import Build, Merge
from tests.oracles.merging import merge
from tests.oracles.reading import read_files
from tests.oracles.zoo import CASES
from tests.oracles.zoo_tied import TIED

pytest.importorskip("peft", minversion="0.21")
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64}


def state_of(folder: Path) -> dict[str, Any]:
    return {
        name: np.frombuffer(stored.data, DTYPES[stored.dtype]).reshape(stored.shape)
        for tensors in read_files(folder).values()
        for name, stored in tensors.items()
    }


def in_memory(case: Built, base: dict[str, Any]) -> dict[str, Any]:
    pickled = not case.case.save.get("safe_serialization", True)
    adapter = open_adapter(str(case.adapter), allow_pickle=pickled)
    untie = bool(case.case.untied_head)
    return dict(lorakit_merge(base, adapter, key_map=case.case.key_map, untie=untie))


@pytest.mark.parametrize("name", [c.name for c in (*CASES, *TIED) if c.name != "tied-whisper"])
def test_a_merge_in_memory_has_the_bytes_of_one_on_files(
    built: Build, merged: Merge, name: str
) -> None:
    case = built(name)
    base = state_of(case.base)
    ours, files = in_memory(case, base), state_of(merged(case))
    old_head = {"lm_head.weight"} & (ours.keys() - files.keys())  # no config says it is none
    assert ours.keys() - old_head == files.keys()
    for tensor, values in files.items():
        assert ours[tensor].dtype == values.dtype
        assert ours[tensor].tobytes() == values.tobytes(), tensor


@pytest.mark.parametrize("name", ["conv1d-square-only", "embedding-bert", "tied-gpt2"])
def test_a_base_without_a_config_is_known_by_its_tensors(
    built: Build, merged: Merge, tmp_path: Path, name: str
) -> None:
    case = built(name)
    shutil.copytree(case.base, tmp_path / "base")
    (tmp_path / "base" / "config.json").unlink()
    silent = Built(case.case, tmp_path / "base", case.adapter, case.plain, case.peft)
    merge(silent, tmp_path / "out", untie=bool(case.case.untied_head))
    assert read_files(tmp_path / "out") == read_files(merged(case))


def test_a_head_is_not_given_a_name_by_guessing(built: Build) -> None:
    case = built("tied-whisper")
    with pytest.raises(MisfitError, match="cannot be untied"):
        in_memory(case, state_of(case.base))
