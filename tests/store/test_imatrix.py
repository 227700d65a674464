"""Importance matrices in both formats of llama.cpp, whole and broken."""

import struct

import numpy as np
import pytest

from lorakit.errors import InputError
from lorakit.store.imatrix import read_imatrix

VALUES = {"blk.0.attn_q.weight": [4.0, 8.0, 12.0], "blk.1.ffn_down.weight": [2.0, 6.0]}
CALLS = 2


def plain(values=VALUES):
    raw = struct.pack("<i", len(values))
    for name, numbers in values.items():
        raw += struct.pack("<i", len(name)) + name.encode()
        raw += struct.pack("<ii", CALLS, len(numbers)) + np.array(numbers, "<f4").tobytes()
    return raw + struct.pack("<i", 7)  # what follows is of no use here


def expected():
    return {n: [v / CALLS for v in numbers] for n, numbers in VALUES.items()}


def test_the_older_format_has_sums_over_calls(tmp_path):
    (tmp_path / "imatrix.dat").write_bytes(plain())
    found = read_imatrix(tmp_path / "imatrix.dat")
    assert {n: list(v) for n, v in found.items()} == expected()


def test_gguf_has_sums_and_counts(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "imatrix.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.type", "imatrix")
    for name, numbers in VALUES.items():
        writer.add_tensor(f"{name}.in_sum2", np.array([numbers], np.float32))
        writer.add_tensor(f"{name}.counts", np.array([[CALLS]], np.float32))
    writer.add_tensor("blk.0.ffn_gate_exps.weight.in_sum2", np.ones((4, 3), np.float32))
    writer.add_tensor("blk.0.ffn_gate_exps.weight.counts", np.ones((4, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert {n: list(v) for n, v in read_imatrix(path).items()} == expected()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x01",
        plain()[:40],
        struct.pack("<i", -3),
        struct.pack("<ii", 1, 1 << 30),
        struct.pack("<i", 0),
        struct.pack("<ii", 1, 2) + b"\xff\xfe" + bytes(8),
    ],
    ids=range(7),
)
def test_what_is_broken_is_one_line(tmp_path, raw):
    (tmp_path / "imatrix.dat").write_bytes(raw)
    with pytest.raises(InputError, match=r"importance matrix|too early"):
        read_imatrix(tmp_path / "imatrix.dat")


def test_gguf_that_is_broken_is_one_line(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "imatrix.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 7)
    with pytest.raises(InputError, match="is no GGUF file"):
        read_imatrix(tmp_path / "imatrix.gguf")
