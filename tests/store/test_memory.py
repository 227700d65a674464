"""MemorySource gives the bytes that a safetensors file of the same tensors would hold."""

import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import InputError
from lorakit.store.memory import MemorySource, like, numpy_dtype
from lorakit.tensors import BITS, NAMES


def saved(source: MemorySource, name: str, *, step: int = 2) -> bytes:
    """A tensor read a few rows at a time."""
    info = source.infos[name]
    row = info.nbytes // max(info.rows, 1)
    parts = []
    for start in range(0, info.rows, step):
        stop = min(start + step, info.rows)
        parts.append(bytearray((stop - start) * row))
        source.read_rows(name, start, stop, parts[-1])
    return b"".join(parts)


def torch_dtypes():
    torch = pytest.importorskip("torch")
    return {code: getattr(torch, name) for code, name in NAMES.items()}


@pytest.mark.parametrize("code", NAMES)
def test_a_numpy_array_of_every_dtype_is_read_as_its_own_bytes(code):
    raw = np.random.default_rng(0).integers(0, 2, 3 * 4 * BITS[code] // 8, dtype=np.uint8)
    array = raw.view(numpy_dtype(code)).reshape(3, 4)
    source = MemorySource({"w": array})
    assert (source.infos["w"].dtype, source.infos["w"].shape) == (code, (3, 4))
    assert saved(source, "w") == raw.tobytes()
    assert np.shares_memory(source.array("w"), array)


@pytest.mark.parametrize("code", NAMES)
def test_a_torch_tensor_of_every_dtype_is_read_as_its_own_bytes(code):
    torch = pytest.importorskip("torch")
    raw = torch.randint(0, 2, (3 * 4 * BITS[code] // 8,), dtype=torch.uint8)
    tensor = raw.view(torch_dtypes()[code]).reshape(3, 4)
    source = MemorySource({"w": tensor})
    assert (source.infos["w"].dtype, source.infos["w"].shape) == (code, (3, 4))
    assert source.array("w").dtype == numpy_dtype(code)
    assert saved(source, "w") == raw.numpy().tobytes()
    assert source.array("w").ctypes.data == tensor.data_ptr()


def test_bytes_equal_those_of_a_safetensors_file():
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch")
    made = {
        c: torch.randint(0, 2, (2, 8, 3)).to(d)
        for c, d in torch_dtypes().items()
        if c not in {"U16", "U32", "U64", "C64", "F8_E8M0"}
    }
    file = safetensors.save(made)
    size = int.from_bytes(file[:8], "little")
    header = json.loads(file[8 : 8 + size])
    source = MemorySource(made)
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        assert source.infos[name].dtype == entry["dtype"]
        assert saved(source, name) == file[8 + size :][start:stop]


@pytest.mark.parametrize("code", NAMES)
def test_an_array_becomes_a_tensor_like_another_and_back(code):
    torch = pytest.importorskip("torch")
    array = np.random.default_rng(1).integers(0, 2, (2, 4 * BITS[code] // 8), dtype=np.uint8)
    array = array.view(numpy_dtype(code))
    assert like(np.zeros(1), array, code).dtype == array.dtype
    tensor = like(torch.zeros(1), array, code)
    assert tensor.dtype == torch_dtypes()[code]
    assert saved(MemorySource({"w": tensor}), "w") == array.tobytes()
    scalar = like(torch.zeros(1), array.reshape(-1)[:1].reshape(()), code)
    assert scalar.shape == ()


def slices(length: int):
    steps = st.sampled_from([-2, -1, 1, 2])
    return st.builds(slice, st.none() | st.integers(0, length), st.none(), steps)


@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    order=st.permutations(range(3)),
    data=st.data(),
    step=st.integers(1, 4),
)
def test_any_view_is_read_as_its_contiguous_copy(shape, order, data, step):
    array = np.arange(np.prod(shape, dtype=int), dtype=ml_dtypes.bfloat16).reshape(shape)
    view = array.transpose([axis for axis in order if axis < array.ndim])
    view = view[tuple(data.draw(slices(n)) for n in view.shape)]
    source = MemorySource({"w": view})
    assert saved(source, "w", step=step) == view.tobytes()
    assert source.array("w").tobytes() == view.tobytes()
    assert source.array("w").shape == view.shape


def test_a_scalar_has_one_row():
    torch = pytest.importorskip("torch")
    scalars = {"t": torch.tensor(1.5, dtype=torch.bfloat16), "n": np.array(1.5), "g": np.float32(2)}
    source = MemorySource(scalars)
    assert [source.infos[n].shape for n in "tng"] == [()] * 3
    assert saved(source, "t") == np.array(1.5, ml_dtypes.bfloat16).tobytes()
    assert saved(source, "n") == np.array(1.5).tobytes()
    assert source.array("g") == np.float32(2)


def test_big_endian_arrays_are_turned_round():
    array = np.arange(6, dtype=">f4").reshape(2, 3)
    source = MemorySource({"w": array})
    assert saved(source, "w") == array.astype("<f4").tobytes()
    assert np.array_equal(source.array("w"), array)


def test_parameters_transposed_and_tied_torch_tensors_are_read_as_they_look():
    torch = pytest.importorskip("torch")
    weight = torch.nn.Parameter(torch.randn(6, 4, dtype=torch.bfloat16))
    source = MemorySource({"w": weight, "turned": weight.T, "tied": weight[1:3]})
    expected = weight.detach().view(torch.int16).numpy()
    assert saved(source, "w") == expected.tobytes()
    assert saved(source, "turned") == expected.T.tobytes()
    assert saved(source, "tied") == expected[1:3].tobytes()


@pytest.mark.cuda
def test_cuda_tensors_are_brought_to_the_cpu():
    torch = pytest.importorskip("torch")
    tensor = torch.randn(5, 4, dtype=torch.bfloat16, device="cuda")
    expected = tensor.cpu().view(torch.int16).numpy()
    assert saved(MemorySource({"w": tensor}), "w") == expected.tobytes()


def test_the_order_is_that_of_the_mapping():
    source = MemorySource({n: np.zeros(1) for n in "zab"}, name="m.bin")
    assert [*source.infos] == ["z", "a", "b"]
    assert source.name == "m.bin"


@pytest.mark.parametrize(("start", "stop", "size"), [(0, 2, 15), (0, 2, 17), (3, 5, 16), (0, 2, 1)])
def test_a_buffer_of_another_size_is_never_half_filled(start, stop, size):
    source = MemorySource({"w": np.ones((4, 1))})
    into = bytearray(size)
    with pytest.raises(InputError, match="rows"):
        source.read_rows("w", start, stop, into)
    assert into == bytes(size)


@pytest.mark.parametrize(
    "value", [1.0, [1.0], None, np.array(["a"]), np.array([None]), np.zeros(2, "longdouble")]
)
def test_what_safetensors_cannot_hold_is_refused_by_name(value):
    with pytest.raises(InputError, match="'odd'"):
        MemorySource({"fine": np.zeros(2), "odd": value})


def test_torch_tensors_without_plain_memory_are_refused_by_name():
    torch = pytest.importorskip("torch")
    for tensor in (torch.zeros(2, 2).to_sparse(), torch.zeros(2, device="meta")):
        with pytest.raises(InputError, match="'odd'"):
            MemorySource({"odd": tensor})


def test_a_dtype_narrower_than_a_byte_has_no_numpy_dtype():
    with pytest.raises(InputError, match="'F4'"):
        numpy_dtype("F4")


def test_importing_it_does_not_import_torch():
    code = "import sys, lorakit.store.memory; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == 0


def test_a_key_that_is_no_name_is_refused():
    with pytest.raises(InputError, match="has 1 where the name of a tensor is"):
        MemorySource({"w": np.ones(2, "f4"), 1: np.ones(2, "f4")})
