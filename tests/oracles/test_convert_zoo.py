"""Every kind of adapter under the names of the disk, and of transformers 5, merges as before."""

from pathlib import Path

import numpy as np
import pytest

import lorakit
from lorakit.errors import InputError
from tests.oracles.case import Built
from tests.oracles.conftest import Merge
from tests.oracles.reading import read_tensors

SCRATCH = lorakit.RunOptions(sync=False)


def convert(case: Built, output: Path, names: str) -> None:
    pickled = not case.case.save.get("safe_serialization", True)
    options = {"key_map": case.case.key_map, "allow_pickle": pickled}
    lorakit.convert(case.adapter, output, base=case.base, names=names, run=SCRATCH, **options)


@pytest.mark.parametrize("names", ["disk", "runtime-v5"])
def test_a_merge_of_the_result_is_a_merge_of_the_adapter(
    case: Built, merged: Merge, tmp_path: Path, names: str
) -> None:
    if names != "disk" and case.case.model.endswith("_block"):
        with pytest.raises(InputError, match="known to transformers alone"):
            convert(case, tmp_path / "other", names)
        return
    convert(case, tmp_path / "other", names)
    untie = bool(case.case.untied_head)
    lorakit.merge(case.base, tmp_path / "other", tmp_path / "out", untie=untie, run=SCRATCH)
    expected, found = read_tensors(merged(case)), read_tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert [n for n, t in expected.items() if not np.array_equal(found[n], t)] == []
