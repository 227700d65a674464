"""The law of lorakit.math.cast, over every value of every small float and every midpoint.

The reference is `astype` of NumPy and ml_dtypes from float32, and from float64 an exact search
among all values of the dtype.
"""

from bisect import bisect_left

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lorakit.errors import InputError
from lorakit.math.cast import CHUNK, Scratch, code_of, narrow, storage, widen, working
from lorakit.tensors import BITS, FOLDABLE

SUB_BYTE = {"F4", "F6_E2M3", "F6_E3M2"}
SMALL = ["F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"]
SIGNED = [code for code in SMALL if code != "F8_E8M0"]

every_small_float = pytest.mark.parametrize("code", SMALL)


def bits_of(x):
    return x.view(f"u{x.dtype.itemsize}")


def every_value(code):
    dtype = storage(code)
    word = f"u{dtype.itemsize}"
    return np.arange(256**dtype.itemsize, dtype=word).view(dtype)


def finite_values(code):
    """Every finite value once, ascending, as float64."""
    wide = cast(every_value(code), np.float64)
    return np.unique(wide[np.isfinite(wide)])


def near_ties(code, dtype):
    """Every value, the midpoints of neighbours, and what lies one ulp of `dtype` beside each."""
    values = finite_values(code)
    step = values[-1] - values[-2]
    beyond = np.arange(1, 9) * step / 2
    points = np.concatenate(
        [values, (values[1:] + values[:-1]) / 2, values[-1] + beyond, values[0] - beyond]
    )
    with np.errstate(over="ignore"):
        points = np.concatenate([points, -points]).astype(dtype)
    infinity = dtype(np.inf)
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, -np.nan], dtype)
    up, down = np.nextafter(points, infinity), np.nextafter(points, -infinity)
    return np.concatenate([points, up, down, special])


def cast(x, dtype):
    with np.errstate(all="ignore"):
        return x.astype(dtype)


def narrowed(x, code, scratch=None):
    out = np.empty(x.shape, storage(code))
    narrow(x, out, scratch)
    return out


def widened(raw, dtype=np.float32, scratch=None):
    out = np.empty(raw.shape, dtype)
    widen(raw, out, scratch)
    return out


def assert_same(found, expected):
    """Bit for bit, but for the payload of a NaN."""
    missing = np.isnan(cast(expected, np.float64))
    assert np.array_equal(np.isnan(cast(found, np.float64)), missing)
    differ = (bits_of(found) != bits_of(expected)) & ~missing
    assert not differ.any(), f"{differ.sum()} differ, first at {np.flatnonzero(differ.ravel())[0]}"


@pytest.mark.parametrize("code", sorted(BITS.keys() - SUB_BYTE))
def test_every_code_of_whole_bytes_has_a_dtype_of_its_size_and_comes_back(code):
    assert storage(code).itemsize * 8 == BITS[code]
    assert code_of(storage(code)) == code


@pytest.mark.parametrize("code", [*sorted(SUB_BYTE), "F128", ""])
def test_a_code_without_a_dtype_is_refused(code):
    with pytest.raises(InputError, match=repr(code)):
        storage(code)


@pytest.mark.parametrize("dtype", [np.complex128, ml_dtypes.float8_e3m4, ">f4", "U3"])
def test_a_dtype_that_safetensors_lacks_is_refused(dtype):
    with pytest.raises(InputError):
        code_of(np.dtype(dtype))


def test_the_arithmetic_is_in_double_only_where_a_tensor_is():
    assert working() == working("BF16", "F32") == np.float32
    assert working("BF16", "F64") == np.float64


@every_small_float
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_widen_is_exact_for_every_value(code, dtype):
    raw = every_value(code)
    assert_same(widened(raw, dtype), cast(raw, dtype))


@pytest.mark.parametrize("sign", [0x0000, 0x8000])
def test_widen_is_exact_for_finite_halves_on_its_fast_path(sign):
    raw = (np.arange(0x7C00, dtype=np.uint16) | np.uint16(sign)).view(np.float16)
    assert_same(widened(raw), raw.astype(np.float32))


@pytest.mark.parametrize("word", [0x7C00, 0xFC00, 0x7C01, 0xFFFF, 0x7E00])
def test_one_inf_or_nan_among_finite_halves_stays_what_it_is(word):
    raw = np.arange(0x7C00, dtype=np.uint16)
    raw[500] = word
    assert_same(widened(raw.view(np.float16)), cast(raw.view(np.float16), np.float32))


def test_widen_keeps_subnormal_halves_where_the_processor_flushes_them():
    torch = pytest.importorskip("torch")
    raw = np.arange(0x7C00, dtype=np.uint16).view(np.float16)
    expected = raw.astype(np.float32)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        found = widened(raw)
    finally:
        torch.set_flush_denormal(False)
    assert_same(found, expected)


@pytest.mark.parametrize("code", ["BOOL", "U8", "I8", "I16", "U16", "F32"])
def test_widen_takes_integers_that_single_holds(code):
    raw = np.array([0, 1, 100], storage(code))
    assert np.array_equal(widened(raw), raw.astype(np.float32))


@pytest.mark.parametrize("code", ["I32", "U32", "I64", "F64", "C64"])
def test_widen_refuses_what_single_does_not_hold(code):
    with pytest.raises(InputError, match="float32"):
        widened(np.ones(2, storage(code)))


@every_small_float
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_narrow_of_widen_is_the_identity(code, dtype):
    raw = every_value(code)
    assert_same(narrowed(widened(raw, dtype), code), raw)


@every_small_float
def test_narrow_from_single_is_astype_at_every_value_and_every_tie(code):
    x = near_ties(code, np.float32)
    assert_same(narrowed(x, code), cast(x, storage(code)))


@every_small_float
def test_narrow_from_single_is_astype_on_random_bits(code):
    rng = np.random.default_rng(20240607)
    x = rng.integers(0, 1 << 32, 1 << 21, dtype=np.uint32).view(np.float32)
    assert_same(narrowed(x, code), cast(x, storage(code)))


@every_small_float
@pytest.mark.parametrize("std", [1e-8, 1e-5, 0.02, 300.0])
def test_narrow_from_single_is_astype_on_weights(code, std):
    x = np.random.default_rng(7).normal(0, std, 300_000).astype(np.float32)
    assert_same(narrowed(x, code), cast(x, storage(code)))


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf, 65519.996, 65520.0, -65536.0, 1e30])
def test_one_odd_value_among_ordinary_halves_disturbs_no_other(value):
    x = np.random.default_rng(8).normal(0, 0.02, 1000).astype(np.float32)
    x[500] = value
    assert_same(narrowed(x, "F16"), cast(x, np.float16))


@pytest.mark.parametrize("code", SIGNED)
def test_narrow_from_double_rounds_once_near_every_tie(code):
    x = near_ties(code, np.float64)
    values = finite_values(code)
    x = x[(np.abs(x) <= values[-1])]
    found = narrowed(x, code).astype(np.float64)
    above = np.searchsorted(values, x).clip(1, len(values) - 1)
    low, high = values[above - 1], values[above]
    # Neighbours differ by few bits, so both distances are exact in float64.
    assert np.array_equal(np.abs(found - x), np.minimum(np.abs(x - low), np.abs(high - x)))
    tied = np.abs(x - low) == np.abs(high - x)
    even = (bits_of(found[tied].astype(storage(code))) & 1) == 0
    assert tied.sum() >= len(values) - 1
    assert even.all()


def test_narrow_from_double_agrees_with_numpy_where_numpy_rounds_once():
    rng = np.random.default_rng(9)
    x = rng.integers(0, 1 << 64, 1 << 20, dtype=np.uint64).view(np.float64)
    spread = rng.normal(0, 1, 1 << 19) * np.exp2(rng.uniform(-30, 17, 1 << 19))
    for case in (x, spread, near_ties("F16", np.float64)):
        assert_same(narrowed(case, "F16"), cast(case, np.float16))


# Not F8_E8M0, which has no zero: there 0 is NaN but 1e-300 is its smallest value.
@pytest.mark.parametrize("code", SIGNED)
@pytest.mark.parametrize("x", [np.inf, -np.inf, np.nan, 1e300, -1e300, 1e-300, -1e-300, 0.0, -0.0])
def test_narrow_from_double_does_with_extremes_what_single_does(code, x):
    single = cast(np.array([x]), np.float32)
    assert_same(narrowed(np.array([x]), code), cast(single, storage(code)))


@given(st.floats(-500, 500), st.sampled_from(["F8_E4M3", "F8_E5M2"]))
def test_narrow_from_double_is_the_nearest_value(x, code):
    values = finite_values(code)
    x = float(np.clip(x, values[0], values[-1]))
    at = bisect_left(values, x)
    nearest = min(abs(x - v) for v in values[max(at - 1, 0) : at + 2])
    assert abs(float(narrowed(np.array([x]), code)[0]) - x) == nearest


def test_narrow_to_single_and_double_is_astype_without_a_warning():
    x = np.array([1 + 2**-30, 1e300, np.nan, -1e-320])
    assert_same(narrowed(x, "F32"), cast(x, np.float32))
    assert_same(narrowed(x, "F64"), x)
    assert_same(narrowed(cast(x, np.float32), "F64"), cast(cast(x, np.float32), np.float64))


@pytest.mark.parametrize("code", ["I8", "BOOL", "C64"])
def test_narrow_refuses_what_is_not_a_float(code):
    with pytest.raises(InputError, match="no rounding"):
        narrowed(np.ones(2, np.float32), code)


def test_narrow_refuses_input_that_is_not_wide():
    with pytest.raises(InputError, match="float16"):
        narrowed(np.ones(2, np.float16), "BF16")


def test_shapes_that_differ_are_an_error_in_both_directions():
    with pytest.raises(ValueError, match="shapes"):
        narrow(np.ones((2, 3), np.float32), np.empty((3, 2), np.float16))
    with pytest.raises(ValueError, match="shapes"):
        widen(np.ones(3, np.float16), np.empty(4, np.float32))


def dense(n):
    return slice(n)


def every_other(n):
    return slice(0, 2 * n, 2)


def backwards(n):
    return slice(-1, -n - 1, -1)


@st.composite
def laid_out(draw, shape, dtype):
    """An array of small weights, in some order and with some strides."""
    step = draw(st.sampled_from([dense, every_other, backwards]))
    room = shape if step is dense else tuple(2 * n for n in shape)
    weights = np.random.default_rng(draw(st.integers(0, 99))).normal(0, 0.02, room)
    whole = np.array(weights.astype(np.float32).astype(dtype), order=draw(st.sampled_from("CF")))
    return whole[(..., *map(step, shape))]


@given(
    st.data(),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=7),
    st.sampled_from(SMALL),
    st.sampled_from([np.float32, np.float64]),
)
def test_any_shape_and_any_strides_give_what_astype_gives(data, shape, code, dtype):
    x, out, back = (data.draw(laid_out(shape, d)) for d in (dtype, storage(code), dtype))
    narrow(x, out)
    assert_same(np.array(out), cast(np.array(x), storage(code)))
    widen(out, back)
    assert_same(np.array(back), cast(np.array(out), dtype))


@every_small_float
@pytest.mark.parametrize("size", [CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_one_scratch_serves_blocks_of_every_size(code, size):
    scratch = Scratch()
    rng = np.random.default_rng(size)
    for n in (size, 3, size):
        x = rng.normal(0, 0.02, n).astype(np.float32)
        expected = cast(x, storage(code))
        found = narrowed(x, code, scratch)
        assert_same(found, expected)
        assert_same(widened(found, scratch=scratch), expected.astype(np.float32))


@pytest.mark.parametrize("code", [*SMALL, "F32"])
def test_the_input_is_left_as_it_was(code):
    x = near_ties("F8_E5M2", np.float32)
    before = x.tobytes()
    narrowed(x, code)
    assert x.tobytes() == before
    raw = every_value("F8_E5M2")
    before = raw.tobytes()
    widened(raw)
    assert raw.tobytes() == before


def test_everything_that_can_be_folded_can_be_widened_and_narrowed():
    for code in FOLDABLE:
        one = np.ones(3, working(code))
        assert_same(widened(narrowed(one, code), one.dtype), one)
