"""Bytes of safetensors files, honest and hostile, made without the code under test."""

import json
from collections.abc import Mapping
from typing import Any


def framed(text: bytes, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A file whose header is this text, whatever it says."""
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(first: int, last: int, shape: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


def file(table: Mapping[str, Any], size: int = 0, **options: Any) -> bytes:
    """A file with this header and so many zero bytes of data."""
    return framed(json.dumps(table).encode(), bytes(size), **options)


def one(name: str = "a", **changes: Any) -> bytes:
    """A sound file of one F32, but for these changes to its entry."""
    return file({name: entry(0, 4, [1]) | changes}, 4)


def many(names: list[str]) -> bytes:
    """Text of entries of one byte each."""
    return b",".join(
        json.dumps(n).encode() + b":" + json.dumps(entry(i, i + 1, [1], "U8")).encode()
        for i, n in enumerate(names)
    )


TWICE = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":%s}'
DEEP = 100_000

# name: (bytes, what is said of them)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated"),
    "seven bytes": (bytes(7), "truncated"),
    "no header": (bytes(8), "not valid"),
    "length beyond the file": (file({}, 4, length=1000), "its header alone should have 1,000"),
    "length of 2^63": (file({}, 4, length=1 << 63), "its header alone"),
    "length of 2^64 - 1": (file({}, 4, length=(1 << 64) - 1), "its header alone"),
    "a list": (framed(b"[]"), "not a JSON object"),
    "a number": (framed(b"7"), "not a JSON object"),
    "two objects": (framed(b"{}{}"), "not valid"),
    "cut text": (framed(b'{"a":{"dtype":'), "not valid"),
    "byte order mark": (framed(b"\xef\xbb\xbf{}"), "not valid"),
    "UTF-16": (framed("{}".encode("utf-16")), "not valid"),
    "not UTF-8": (framed(b'{"a\xff":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'), "utf-8"),
    "nested lists": (framed(b'{"a":' + b"[" * DEEP + b"}"), "nested too deeply"),
    "nested objects": (framed(b'{"a":' * DEEP), "nested too deeply"),
    "nested metadata": (framed(b'{"__metadata__":' + b"[" * DEEP + b"}"), "nested too deeply"),
    "overlap": (file({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, 12), "'b' overlaps"),
    "alias": (file({"a": entry(0, 8, [2]), "b": entry(0, 8, [2])}, 8), "'b' overlaps"),
    "hole": (file({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, 12), "'b' leaves a hole"),
    "hole at the start": (file({"a": entry(4, 8, [1])}, 8), "'a' leaves a hole"),
    "trailing bytes": (file({"a": entry(0, 4, [1])}, 12), "bytes after the last tensor"),
    "trailing bytes alone": (file({}, 1), "bytes after the last tensor"),
    "truncated": (file({"a": entry(0, 400, [100])}, 12), "is truncated"),
    "turned offsets": (one(data_offsets=[4, 0]), "its shape needs 4"),
    "too few bytes": (one(shape=[2]), "has 4 bytes, its shape needs 8"),
    "too many bytes": (file({"a": entry(0, 8, [1])}, 8), "has 8 bytes, its shape needs 4"),
    "half a byte": (file({"a": entry(0, 2, [3], "F4")}, 2), "its shape needs 1.5"),
    "shape beyond 64 bits": (one(shape=[1 << 62, 1 << 62]), "the shape"),
    "empty beyond 64 bits": (one(shape=[1 << 62, 1 << 62, 0], data_offsets=[0, 0]), "the shape"),
    "dimension of 2^63": (one(shape=[1 << 63]), "is not dtype, shape and data_offsets"),
    "negative dimension": (one(shape=[-1]), "is not dtype"),
    "negative offset": (one(data_offsets=[-4, 0]), "is not dtype"),
    "minus zero": (framed(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}'), "number -0"),
    "fraction": (one(shape=[1.0]), "is not dtype"),
    "exponent": (framed(b'{"a":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}}', b"x"), "dtype"),
    "true for one": (one(shape=[True]), "is not dtype"),
    "NaN": (one(shape=[float("nan")]), "is not dtype"),
    "30 MB of digits": (framed(b'{"a":' + b"1" * 30_000_000 + b"}"), "not valid"),
    "shape is a text": (one(shape="1"), "is not dtype"),
    "shape is a number": (one(shape=1), "is not dtype"),
    "shape is an object": (one(shape={"1": 1}), "is not dtype"),
    "no shape": (file({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, 4), "is not dtype"),
    "too many dimensions": (one(shape=[1] * 17), "17 dimensions"),
    "three offsets": (one(data_offsets=[0, 4, 4]), "is not dtype"),
    "offsets are null": (one(data_offsets=None), "is not dtype"),
    "dtype is a list": (one(dtype=[]), "is not dtype"),
    "dtype is null": (one(dtype=None), "is not dtype"),
    "dtype unknown": (one(dtype="Q4_0"), "the dtype 'Q4_0'"),
    "dtype of a megabyte": (one(dtype="F" * 1_000_000), "the dtype 'FFFFF"),
    "one field more": (one(more=1), "is not dtype"),
    "entry is a text": (file({"a": "dtype"}, 4), "is not dtype"),
    "entry is a list": (file({"a": ["dtype", "shape"]}, 4), "is not dtype"),
    "entry is null": (file({"a": None}), "is not dtype"),
    "metadata is a list": (file({"__metadata__": []}), "__metadata__"),
    "metadata of numbers": (file({"__metadata__": {"a": 1}}), "__metadata__"),
    "half a surrogate": (framed(rb'{"__metadata__":{"a":"\ud800"}}'), "__metadata__"),
    "half a surrogate as a name": (one("\ud800"), "not printable"),
    "NUL in a name": (one("a\0b"), "not printable"),
    "escape in a name": (one("a\x1b[2Jb"), "not printable"),
    "line break in a name": (one("a\nb"), "not printable"),
    "name turned round": (one("a\u202eb"), "not printable"),
    "name of a megabyte": (one("a" * 1_000_000), "too long"),
    "name twice, same bytes": (
        framed(TWICE % b'{"dtype":"U8","shape":[4],"data_offsets":[0,4]}', bytes(4)),
        "'a' stands in it twice",
    ),
    "name twice, other bytes": (
        framed(TWICE % b'{"dtype":"F32","shape":[1],"data_offsets":[4,8]}', bytes(8)),
        "'a' stands in it twice",
    ),
    "metadata twice": (framed(b'{"__metadata__":{},"__metadata__":{}}'), "twice"),
    "metadata key twice": (framed(b'{"__metadata__":{"k":"1","k":"2"}}'), "'k' stands in it twice"),
    "field twice": (
        framed(b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"x"),
        "'dtype' stands in it twice",
    ),
    "the last of 50,000 names twice": (
        framed(b"{" + many([*map(str, range(50_000)), "49999"]) + b"}", bytes(50_001)),
        "'49999' stands in it twice",
    ),
    "a million empty names": (framed(b"{" + b'"":0,' * 1_000_000 + b'"":0}'), "twice"),
    "a million lists": (framed(b'{"a":[' + b"[]," * 1_000_000 + b"[]]}"), "is not dtype"),
}
