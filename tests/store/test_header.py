"""A header is accepted only if it describes its file exactly, and safetensors accepts it too."""

import json
import time

import ml_dtypes
import numpy as np
import pytest
import safetensors
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from lorakit.errors import InputError
from lorakit.store.header import MAX_HEADER, MAX_TENSORS, PAGE, format_header, parse_header
from lorakit.store.safetensors import SafetensorsFile
from lorakit.tensors import BITS, TensorInfo
from tests.store.crafted import HOSTILE, entry, file, framed, many, one


def parsed(raw: bytes):
    """What the header of a file, given whole, is taken for."""
    length = int.from_bytes(raw[:8], "little")
    return parse_header(raw[8 : 8 + length], len(raw), "crafted.safetensors")


def described(raw: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor as safetensors itself reads it."""
    return {
        name: (t["dtype"], tuple(t["shape"]), bytes(t["data"]))
        for name, t in safetensors.deserialize(raw)
    }


def as_described(raw: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    infos, _ = parsed(raw)
    return {n: (i.dtype, i.shape, raw[slice(*i.extent)]) for n, i in infos.items()}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_refused_in_one_clear_line(name, tmp_path):
    raw, words = HOSTILE[name]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(raw)
    with pytest.raises(InputError) as caught:
        SafetensorsFile(path)
    said = str(caught.value)
    assert caught.value.exit_code == 3
    assert words in said
    assert said.startswith(str(path))
    assert len(said) < len(str(path)) + 300
    assert said.isprintable()


def test_a_header_longer_than_the_limit_is_refused_without_being_read(tmp_path):
    path = tmp_path / "bomb.safetensors"
    with path.open("wb") as f:
        f.write((MAX_HEADER + 1).to_bytes(8, "little"))
        f.truncate(MAX_HEADER * 4)
    with pytest.raises(InputError, match=r"header of 33,554,433 bytes; more than 33,554,432"):
        SafetensorsFile(path)


def test_the_limit_of_the_header_can_be_raised_and_lowered(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(one())
    with pytest.raises(InputError, match="more than 10 are refused"):
        SafetensorsFile(path, max_header=10)
    path.write_bytes(framed(b"{}" + b" " * MAX_HEADER))
    assert dict(SafetensorsFile(path, max_header=2 * MAX_HEADER).infos) == {}


def test_more_than_a_million_tensors_are_refused():
    text = b"{" + b",".join(b'"%x":0' % i for i in range(MAX_TENSORS + 1)) + b"}"
    with pytest.raises(InputError, match="declares 1,000,001 tensors"):
        parsed(framed(text))


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_of_safetensors_is_read_as_it_says(dtype):
    raw = file({"w": entry(0, BITS[dtype], [2, 4], dtype)}, BITS[dtype])
    infos, metadata = parsed(raw)
    assert infos["w"].dtype == dtype
    assert infos["w"].nbytes == BITS[dtype]
    assert metadata == {}
    assert as_described(raw) == described(raw)


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_is_written_so_that_safetensors_reads_it(dtype):
    infos = [
        TensorInfo("b", dtype, (8, 1)),
        TensorInfo("a", dtype, ()),
        TensorInfo("c", "U8", (0,)),
    ]
    if BITS[dtype] < 8:
        infos[1] = TensorInfo("a", dtype, (2, 4))
    data = bytes(range(sum(i.nbytes for i in infos)))
    raw = format_header(infos, {"format": "pt"}) + data
    assert described(raw) == as_described(raw)
    assert [(i.name, i.dtype, i.shape) for i in parsed(raw)[0].values()] == [
        (i.name, i.dtype, i.shape) for i in infos
    ]


def test_a_file_of_safetensors_is_read_as_it_was_saved(tmp_path):
    tensors = {
        "half": np.arange(6, dtype=np.float16).reshape(2, 3),
        "brain": np.arange(5, dtype=ml_dtypes.bfloat16),
        "scalar": np.array(1.5),
        "none": np.zeros((0, 7), np.int64),
        "α.weight/ü": np.ones(3, bool),
    }
    path = tmp_path / "saved.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": "é \u2028"})
    source = SafetensorsFile(path)
    assert source.metadata == {"format": "pt", "note": "é \u2028"}
    assert {n: i.shape for n, i in source.infos.items()} == {n: a.shape for n, a in tensors.items()}
    for name, array in tensors.items():
        into = bytearray(array.nbytes)
        source.read_rows(name, 0, source.infos[name].rows, into)
        assert into == array.tobytes()


names = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=5)
shapes = st.lists(st.integers(0, 3), max_size=3)
infos = st.builds(TensorInfo, names, st.sampled_from([d for d in BITS if BITS[d] >= 8]), shapes)
metadata = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), st.just("x"))


@given(st.lists(infos, unique_by=lambda i: i.name), metadata, st.none() | st.integers(0, 99999))
def test_a_written_header_is_read_back_by_both(tensors, notes, start):
    tensors = [TensorInfo(i.name, i.dtype, tuple(i.shape)) for i in tensors]
    header = format_header(tensors, notes, start=start)
    raw = header + bytes(sum(i.nbytes for i in tensors))
    assert described(raw) == as_described(raw)
    assert parsed(raw)[1] == notes
    assert [(i.name, i.dtype, i.shape) for i in parsed(raw)[0].values()] == [
        (i.name, i.dtype, i.shape) for i in tensors
    ]
    assert (len(header) - start) % PAGE == 0 if start is not None else len(header) % 8 == 0


@pytest.mark.parametrize("name", ["a\0b", "a" * 2000, "__metadata__", "w"])
def test_a_name_that_could_not_be_read_back_is_not_written(name):
    tensors = [TensorInfo("w", "F32", (1,)), TensorInfo(name, "F32", (1,))]
    with pytest.raises(InputError):
        format_header(tensors, {"format": "pt"})


# What a random edit may put into a header: numbers and texts that two JSON readers may see apart.
FRAGMENTS = [
    *("-0", "-", "0", "1", "00", "1.0", "e0", "E1", ".0", "18446744073709551616", "9" * 19),
    *("{", "}", "[", "]", ",", ":", '"', " ", "\n", "\t", "\r", "\x0b", "\x00", "\x7f", "\xa0"),
    *("\\ud800", "\\udc00", "\\u0000", "\\", "\\/", "\\x", "\ufeff", "\u2028", "é", "'", "//"),
    *("null", "true", "NaN", "Infinity", "-Infinity", '"a":', '"__metadata__":{},', '"U8"'),
    *('"dtype":"U8",', '"shape":[1],', '"data_offsets":[0,1],', '"x":null,', "[0]", ",0"),
]


@st.composite
def edited_files(draw):
    """A sound file whose header, or length, was then changed in a few places."""
    tensors = draw(st.lists(infos, unique_by=lambda i: i.name, max_size=3))
    tensors = [TensorInfo(i.name, i.dtype, tuple(i.shape)) for i in tensors]
    raw = format_header(tensors, draw(metadata))
    text = raw[8:].decode()
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        skipped = draw(st.sampled_from([0, 0, 1, 2, 8]))
        text = text[:at] + draw(st.sampled_from(["", *FRAGMENTS])) + text[at + skipped :]
    size = sum(i.nbytes for i in tensors) + draw(st.sampled_from([0, 0, 0, 0, 1, -1, 4]))
    return framed(text.encode("utf-8", "surrogatepass"), bytes(max(0, size)))


@settings(max_examples=400)
@given(edited_files())
@example(framed(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'))
@example(framed(rb'{"__metadata__":{"a":"\ud800"}}'))
@example(file({"a": entry(0, 0, [1 << 62, 1 << 62, 0])}))
@example(file({"a": entry(0, 0, [(1 << 63) - 1, 0])}))
def test_whatever_is_accepted_safetensors_accepts_and_reads_alike(raw):
    try:
        ours = as_described(raw)
    except InputError:
        return
    assert ours == described(raw)


@settings(max_examples=400)
@given(st.data())
def test_no_edit_of_the_bytes_makes_a_file_that_only_we_accept(data):
    raw = bytearray(file({"__metadata__": {"k": "v"}, "a.b": entry(0, 8, [2, 1])}, 8))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        ours = as_described(bytes(raw))
    except InputError:
        return
    assert ours == described(bytes(raw))


def test_what_is_accepted_is_opened_by_safe_open_with_the_same_dtypes_and_shapes(tmp_path):
    path = tmp_path / "all.safetensors"
    tensors = [TensorInfo(d, d, (2, 4)) for d in BITS]
    path.write_bytes(format_header(tensors, {}) + bytes(sum(i.nbytes for i in tensors)))
    ours = SafetensorsFile(path).infos
    with safetensors.safe_open(path, framework="numpy") as theirs:
        assert set(theirs.keys()) == set(ours)
        slices = {name: theirs.get_slice(name) for name in ours}
        assert {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()} == {
            n: (i.dtype, i.shape) for n, i in ours.items()
        }


def test_tensors_come_in_the_order_of_their_bytes_whatever_that_of_their_names():
    raw = file({"a": entry(4, 8, [1]), "b": entry(0, 4, [1]), "c": entry(8, 8, [0])}, 8)
    assert list(parsed(raw)[0]) == ["b", "a", "c"]


def test_many_tensors_are_read_in_time_that_grows_with_their_number():
    raw = framed(
        b"{" + many([f"model.layers.{i}.weight" for i in range(20_000)]) + b"}", bytes(20_000)
    )
    start = time.perf_counter()
    assert len(parsed(raw)[0]) == 20_000
    assert time.perf_counter() - start < 30  # it ends, is all


def test_the_new_header_of_a_file_keeps_its_data_on_the_same_place_in_a_page():
    old = format_header([TensorInfo("w", "BF16", (4, 4))], {})
    new = format_header(
        [TensorInfo("w", "F32", (4, 4)), TensorInfo("v", "F32", (1,))], {}, start=len(old)
    )
    assert len(new) % PAGE == len(old) % PAGE
    assert json.loads(new[8:])["v"] == entry(64, 68, [1])


def test_metadata_of_null_is_none_as_mlx_writes_it(tmp_path):
    path = tmp_path / "a.safetensors"
    text = b'{"__metadata__":null,"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"\x07")
    assert SafetensorsFile(path).metadata == {}
