"""A file whose tensors come one after the other is whole in the end, or is not there."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from lorakit.errors import InputError
from lorakit.store.growing import GrowingFile
from lorakit.store.safetensors import SafetensorsFile
from lorakit.tensors import TensorInfo


def added(out, name, values):
    out.add(TensorInfo(name, "F32", values.shape), [values.reshape(-1).view(np.uint8)])


@given(
    st.dictionaries(
        st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=90),
        st.lists(st.integers(0, 3), max_size=5),
        min_size=1,
        max_size=70,
    )
)
def test_whatever_is_added_is_read_back(tmp_path_factory, shapes):
    path = tmp_path_factory.mktemp("growing") / "x.safetensors"
    tensors = {n: np.random.default_rng(0).random(s, "float32") for n, s in shapes.items()}
    tensors = {n: np.asarray(t, "float32") for n, t in tensors.items()}
    with GrowingFile(path, tensors) as out:
        for name, values in tensors.items():
            added(out, name, values)
        out.commit(sync=False)
        assert out.size == path.stat().st_size
    assert list(SafetensorsFile(path).infos) == list(tensors)
    for name, values in load_file(path).items():
        np.testing.assert_array_equal(values, tensors[name])


def test_without_a_commit_there_is_no_file(tmp_path):
    with GrowingFile(tmp_path / "x.safetensors", ["a"]) as out:
        added(out, "a", np.ones(3, "float32"))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors.partial"]


def test_a_name_is_added_once(tmp_path):
    with GrowingFile(tmp_path / "x.safetensors", ["a", "a"]) as out:
        added(out, "a", np.ones(3, "float32"))
        added(out, "a", np.ones(3, "float32"))
        with pytest.raises(InputError, match="two tensors 'a'"):
            out.commit(sync=False)
    assert not (tmp_path / "x.safetensors").exists()
