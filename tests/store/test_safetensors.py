"""A file that is cut, shrinks, vanishes or is replaced is an error that names it, never a crash."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lorakit.errors import InputError
from lorakit.store.equal import same_bytes
from lorakit.store.header import format_header
from lorakit.store.safetensors import SafetensorsFile, read_exactly
from lorakit.tensors import TensorInfo

INFOS = [
    TensorInfo("a", "F32", (100, 10)),
    TensorInfo("b", "BF16", (7,)),
    TensorInfo("s", "U8", ()),
]
HEADER = format_header(INFOS, {"format": "pt"})
DATA = np.random.default_rng(0).bytes(4000 + 14 + 1)
WHOLE = HEADER + DATA
CUTS = {
    "nothing": 0,
    "seven bytes": 7,
    "the length alone": 8,
    "the header but one byte": len(HEADER) - 1,
    "the header": len(HEADER),
    "half the data": len(HEADER) + 2000,
    "all but one byte": len(WHOLE) - 1,
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(WHOLE)
    return path


@pytest.mark.parametrize("cut", CUTS)
def test_a_file_cut_short_anywhere_is_refused_when_it_is_opened(path, cut):
    os.truncate(path, CUTS[cut])
    with pytest.raises(InputError, match="truncated") as caught:
        SafetensorsFile(path)
    assert caught.value.file == str(path)
    assert f"{CUTS[cut]:,} bytes" in str(caught.value)


def test_one_byte_more_is_refused_too(path):
    path.write_bytes(WHOLE + b"x")
    with pytest.raises(InputError, match="bytes after the last tensor"):
        SafetensorsFile(path)


def test_rows_are_read_from_where_they_lie(path):
    source = SafetensorsFile(path)
    into = np.empty((3, 10), np.float32)
    source.read_rows("a", 97, 100, into)
    assert into.tobytes() == DATA[97 * 40 : 4000]
    last = bytearray(1)
    source.read_rows("s", 0, 1, last)
    assert last == DATA[-1:]


def test_no_rows_and_no_columns_are_nothing_to_read(path):
    source = SafetensorsFile(path)
    source.read_rows("a", 5, 5, np.empty((0, 10), np.float32))
    read_exactly(source.fd, np.empty((4, 0), np.uint8), 0, path)


def test_opening_a_file_takes_no_descriptor_and_closing_gives_it_back(path):
    before = len(os.listdir("/proc/self/fd"))
    sources = [SafetensorsFile(path) for _ in range(50)]
    assert len(os.listdir("/proc/self/fd")) == before
    sources[0].read_rows("s", 0, 1, bytearray(1))
    assert len(os.listdir("/proc/self/fd")) == before + 1
    sources[0].close()
    assert len(os.listdir("/proc/self/fd")) == before
    sources[0].read_rows("s", 0, 1, bytearray(1))


def test_many_threads_share_one_descriptor(path):
    source = SafetensorsFile(path)

    def row(i):
        into = bytearray(40)
        source.read_rows("a", i, i + 1, into)
        return bytes(into)

    with ThreadPoolExecutor(8) as pool:
        assert b"".join(pool.map(row, range(100))) == DATA[:4000]


def test_a_file_that_shrinks_while_it_is_read_is_refused(path):
    source = SafetensorsFile(path)
    source.read_rows("a", 0, 1, bytearray(40))
    os.truncate(path, len(HEADER) + 400)
    source.read_rows("a", 9, 10, bytearray(40))
    with pytest.raises(InputError, match="ended at byte") as caught:
        source.read_rows("a", 9, 11, bytearray(80))
    assert caught.value.file == str(path)


def test_a_file_that_shrinks_before_it_is_read_is_refused(path):
    source = SafetensorsFile(path)
    os.truncate(path, len(WHOLE) - 1)
    with pytest.raises(InputError, match="changed while it was being read"):
        source.read_rows("a", 0, 1, bytearray(40))


def test_another_file_of_the_same_size_and_name_is_not_taken_for_the_first(path, tmp_path):
    source = SafetensorsFile(path)
    other = tmp_path / "other"
    other.write_bytes(HEADER + DATA[::-1])
    other.rename(path)
    with pytest.raises(InputError, match="changed while it was being read"):
        source.read_rows("a", 0, 1, bytearray(40))


def test_a_file_that_vanishes_is_refused(path):
    source = SafetensorsFile(path)
    path.unlink()
    with pytest.raises(InputError, match="cannot be read: No such file"):
        source.read_rows("a", 0, 1, bytearray(40))


def test_what_is_open_is_read_to_the_end_though_its_name_is_gone(path):
    source = SafetensorsFile(path)
    source.read_rows("a", 0, 1, bytearray(40))
    path.unlink()
    into = bytearray(4000)
    source.read_rows("a", 0, 100, into)
    assert into == DATA[:4000]


def test_a_folder_or_nothing_in_place_of_the_file_is_refused(tmp_path):
    for place, words in ((tmp_path, "Is a directory"), (tmp_path / "x", "No such file")):
        with pytest.raises(InputError, match=words):
            SafetensorsFile(place)


def written(path, infos, data):
    path.write_bytes(format_header(infos, {}) + data)
    return SafetensorsFile(path)


@pytest.mark.parametrize(
    "info",
    [
        TensorInfo("w", "F4", (4, 3)),  # a row of a byte and a half
        TensorInfo("w", "F6_E2M3", (4, 3)),
        TensorInfo("w", "U8", (3 << 20, 1)),  # more than one block
        TensorInfo("w", "F64", ()),
        TensorInfo("w", "U8", (1, 5)),
    ],
    ids=str,
)
def test_same_bytes_sees_a_difference_in_any_place(tmp_path, info):
    data = bytearray(np.random.default_rng(1).bytes(info.nbytes))
    one = written(tmp_path / "one", [info], bytes(data))
    twin = written(tmp_path / "twin", [info], bytes(data))
    assert same_bytes(one, one.infos["w"], twin, twin.infos["w"])
    for place in {0, info.nbytes // 2, info.nbytes - 1}:
        changed = data.copy()
        changed[place] ^= 1
        other = written(tmp_path / f"other{place}", [info], bytes(changed))
        assert not same_bytes(one, one.infos["w"], other, other.infos["w"])


def test_same_bytes_wants_the_same_dtype_and_shape(tmp_path):
    one = written(tmp_path / "one", [TensorInfo("w", "F32", (2, 2))], bytes(16))
    for info in (TensorInfo("w", "I32", (2, 2)), TensorInfo("w", "F32", (4, 1))):
        other = written(tmp_path / "other", [info], bytes(16))
        assert not same_bytes(one, one.infos["w"], other, other.infos["w"])
    none = written(tmp_path / "none", [TensorInfo("w", "F32", (0, 2))], b"")
    assert same_bytes(none, none.infos["w"], none, none.infos["w"])


def test_the_header_is_read_anew_and_only_of_the_same_file(path):
    file = SafetensorsFile(path)
    assert file.header == HEADER
    other = path.with_name("other.safetensors")
    other.write_bytes(WHOLE)
    other.replace(path)
    with pytest.raises(InputError, match="changed while it was being read"):
        file.header  # noqa: B018
