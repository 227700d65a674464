"""Blocks with a scale: the laws that hold of every codec, and what is refused."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import InputError, UsageError
from lorakit.quant.codec import CHUNK
from lorakit.quant.table import CODECS, codec

CASES = [(name, bits) for name, row in CODECS.items() for bits in row.bits]
SEARCHED = [("nf4", {}), ("fp4", {}), *(("normal-float", {"bits": b}) for b in (2, 3, 8))]
SEARCHED += [("uniform", {"bits": b, "symmetric": True}) for b in (2, 3, 4, 8)]
every_codec = pytest.mark.parametrize(("name", "bits"), CASES)


def weight(*shape, dtype="float32", seed=0):
    drawn = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return (drawn * np.float32(0.02)).astype(np.dtype(dtype))


def error(found, w):
    return np.linalg.norm(found.dequantise(found.quantise(w)).astype("f8") - w.astype("f8"))


@every_codec
@given(data=st.data())
def test_quantising_the_values_again_changes_next_to_nothing(name, bits, data):
    shape = data.draw(st.tuples(st.integers(1, 9), st.integers(1, 90)))
    found = codec(name, bits=bits)
    values = found.dequantise(found.quantise(weight(*shape, seed=shape[0])))
    again = found.dequantise(found.quantise(values))
    assert np.abs(again - values).max() <= 1e-5 * np.abs(values).max()


@every_codec
def test_each_value_is_within_half_the_widest_step_of_its_block(name, bits):
    w, found = weight(40, 64), codec(name, bits=bits)
    off = np.abs(found.dequantise(found.quantise(w)) - w)
    widest = {2: 0.67, 3: 0.3, 4: 0.17, 8: 0.04}[bits] * np.abs(w).max(1, keepdims=True)
    assert (off <= widest).all()


@every_codec
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_narrow_weight_is_quantised_as_its_float32_copy(name, bits, dtype):
    found = codec(name, bits=bits)
    w = weight(3, 700, dtype=dtype)
    narrow, wide = found.quantise(w), found.quantise(w.astype(np.float32))
    for key, array in narrow.arrays.items():
        assert np.array_equal(array, wide.arrays[key])


@every_codec
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_values_are_rounded_once_and_may_go_into_a_buffer(name, bits, dtype):
    found, w = codec(name, bits=bits), weight(5, 65)
    q = found.quantise(w)
    buffer = np.empty_like(w)
    rounded = found.dequantise(q, dtype, out=buffer)
    exact = found.dequantise(q)
    assert rounded.base is buffer or rounded is buffer
    assert np.array_equal(buffer, exact.astype(dtype).astype(np.float32))
    assert found.dequantise(q, dtype).dtype == np.dtype(dtype)


@every_codec
@pytest.mark.parametrize("size", [1, 2, 63, 65, CHUNK - 1, CHUNK, CHUNK + 33])
def test_chunks_do_not_show_in_the_result(name, bits, size):
    w, found = weight(1, size), codec(name, bits=bits)
    whole = found.dequantise(found.quantise(w))
    assert whole.shape == w.shape
    if name != "int8":  # one row is one block there
        cut = size - size % 64 if size < 128 else size // 2 // 64 * 64
        for part in filter(len, (w[0, :cut], w[0, cut:])):
            at = 0 if part is w[0, :cut] or part[0] == w[0, 0] else cut
            alone = found.dequantise(found.quantise(part[None]))[0]
            assert np.array_equal(alone, whole[0, at : at + part.size])


@every_codec
def test_zeros_stay_zeros(name, bits):
    w, found = weight(4, 128), codec(name, bits=bits)
    w[1], w[3] = 0, 0
    values = found.dequantise(found.quantise(w))
    assert (values[[1, 3]] == 0).all()


@every_codec
@pytest.mark.parametrize("scale", [1e-44, 1e-36, 1e-30, 1e4])
def test_tiny_and_large_weights_give_finite_values(name, bits, scale):
    found = codec(name, bits=bits)
    w = (np.linspace(-1, 1, 200)[None] * scale).astype(np.float32)
    values = found.dequantise(found.quantise(w))
    assert np.isfinite(values).all()
    assert np.abs(values).max() <= max(1.01 * np.abs(w).max(), 1e-38)


@every_codec
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 70, 199])
def test_a_weight_with_nan_or_inf_is_refused(name, bits, bad, place):
    w = weight(1, 200)
    w[0, place] = bad
    with pytest.raises(InputError, match="NaN"):
        codec(name, bits=bits).quantise(w)


@every_codec
@pytest.mark.parametrize("dtype", ["int8", "float64", "float8_e4m3fn"])
def test_other_dtypes_are_refused(name, bits, dtype):
    with pytest.raises(InputError, match="cannot be quantised"):
        codec(name, bits=bits).quantise(np.zeros((2, 64)).astype(np.dtype(dtype)))


@every_codec
def test_an_empty_weight_is_refused(name, bits):
    with pytest.raises(InputError, match="nothing"):
        codec(name, bits=bits).quantise(np.zeros((0, 64), np.float32))


@every_codec
def test_a_weight_that_is_not_contiguous_is_taken_in_its_own_order(name, bits):
    found, w = codec(name, bits=bits), weight(64, 48)
    turned = found.quantise(w.T)
    straight = found.quantise(np.ascontiguousarray(w.T))
    assert all(np.array_equal(turned.arrays[k], straight.arrays[k]) for k in turned.arrays)


@pytest.mark.parametrize(("name", "settings"), SEARCHED)
@given(shape=st.tuples(st.integers(1, 5), st.integers(1, 300)), seed=st.integers(0, 99))
def test_a_sought_scale_never_adds_to_the_error(name, settings, shape, seed):
    w = weight(*shape, seed=seed)
    plain, sought = codec(name, **settings), codec(name, search=True, **settings)
    assert error(sought, w) <= error(plain, w) * (1 + 1e-6) + 1e-6 * np.abs(w).max()


def test_a_sought_scale_takes_seven_percent_off_the_error_of_nf4_on_normal_weights():
    w = weight(512, 512)
    assert error(codec("nf4", search=True), w) < 0.935 * error(codec("nf4"), w)


def test_a_sought_scale_changes_neither_names_nor_sizes():
    w = weight(33, 77)
    plain, sought = codec("nf4").quantise(w), codec("nf4", search=True).quantise(w)
    sizes = [{k: (v.shape, v.dtype) for k, v in q.arrays.items()} for q in (plain, sought)]
    assert sizes[0] == sizes[1]
    assert (codec("nf4", search=True).dequantise(sought) != 0).any()


@pytest.mark.parametrize("block", [0, 16, 63, 65, 8192])
def test_only_blocks_that_bitsandbytes_has_can_be_chosen(block):
    with pytest.raises(UsageError, match="block"):
        codec("nf4", block=block or 1)


def test_bfloat16_is_that_of_ml_dtypes():
    assert np.dtype("bfloat16") == np.dtype(ml_dtypes.bfloat16)
