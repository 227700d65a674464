"""The table of codecs: every file in it, every setting checked."""

from pathlib import Path

import numpy as np
import pytest

import lorakit.quant
from lorakit.errors import UsageError
from lorakit.quant.table import CODECS, codec

# What the codecs are made of.
PARTS = {
    "__init__",
    "blockwise",
    "bnb",
    "codebook",
    "codec",
    "fourbit",
    "nested",
    "packing",
    "spanning",
    "table",
}


def test_every_file_is_a_codec_of_the_table_or_a_part():
    files = {path.stem for path in Path(lorakit.quant.__path__[0]).glob("*.py")}
    assert files - PARTS == {name.replace("-", "_") for name in CODECS}


@pytest.mark.parametrize("name", CODECS)
def test_the_codec_has_the_name_of_its_row_and_one_of_its_bits(name):
    row = CODECS[name]
    assert row.codec.name == name
    assert row.codec.bits in row.bits
    assert row.packed == hasattr(row.codec, "tensors")


def test_settings_are_taken_and_those_left_out_stay():
    found = codec("nf4", block=128, double=True, search=False)
    assert (found.block, found.double, found.search) == (128, True, False)
    assert codec("uniform", bits=3).bits == 3


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("nf5", {}, "unknown quantisation 'nf5'. Did you mean 'nf4'"),
        ("gptq-marlin", {}, "There are nf4, fp4"),
        ("nf4", {"bits": 3}, "nf4 has 4 bits, not 3. Leave --bits out, or --quant uniform or "),
        ("uniform", {"bits": 5}, "2 or 3 or 4 or 8"),
        ("int8", {"double": True}, "int8 has no setting double. Leave --double-quant out"),
        ("nf4", {"block": 0}, "no blocks of 0 elements. Pass --block 32, "),
        ("int8", {"block": 0}, "no setting block. Leave --block out"),
        ("nf4", {"levels": (1.0,)}, "no setting levels"),
        ("uniform", {"search": True}, "symmetric"),
    ],
)
def test_what_does_not_exist_is_said(name, settings, words):
    with pytest.raises(UsageError) as caught:
        codec(name, **settings)
    assert words in str(caught.value)


def test_the_normal_float_of_four_bits_has_the_levels_of_nf4():
    w = np.random.default_rng(0).standard_normal((8, 640), dtype=np.float32)
    one, other = (c.dequantise(c.quantise(w)) for c in (codec("normal-float"), codec("nf4")))
    assert np.abs(one - other).max() < 1e-5


def test_two_bits_of_normal_float_are_minus_one_zero_and_two_above():
    w = np.linspace(-1, 1, 64, dtype=np.float32)[None]
    found = codec("normal-float", bits=2)
    levels = np.unique(found.dequantise(found.quantise(w)))
    assert np.allclose(levels, [-1, 0, 0.33791524, 1], atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_uniform_levels_are_at_equal_distances_from_end_to_end(bits):
    w = np.linspace(-0.5, 1, 4096, dtype=np.float32)[None]
    found = codec("uniform", bits=bits, block=4096)
    levels = np.unique(found.dequantise(found.quantise(w)))
    assert np.allclose(levels, np.linspace(-0.5, 1, 2**bits), atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_levels_have_zero_among_them(bits):
    w = np.linspace(-0.5, 1, 4096, dtype=np.float32)[None]
    found = codec("uniform", bits=bits, block=4096, symmetric=True)
    levels = np.unique(found.dequantise(found.quantise(w)))
    step = 1 / (2 ** (bits - 1) - 1)
    assert 0 in levels
    assert np.allclose(levels / step, np.round(levels / step), atol=1e-5)
