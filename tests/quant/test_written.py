"""New values in the layouts of a checkpoint: nothing changes where nothing does, and no value is
off by more than half a step of its grid.
"""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.errors import InputError
from lorakit.quant.nested import nest, unnest
from lorakit.quant.packing import fields, words
from lorakit.quant.spanning import stored
from lorakit.quant.stored.tensor import StoredTensor
from lorakit.quant.table import codec
from tests.quant.test_stored import CASES, awq, drawn, gptq, only, packed_ints, scaled, values

cases = pytest.mark.parametrize("tensors", CASES.values(), ids=CASES)


def runs(length, span, step):
    """The steps of each span, as an executor has them."""
    for begin in range(0, length, span or length):
        end = min(length, begin + (span or length))
        yield from ((s, min(s + step, end)) for s in range(begin, end, step))


def written(tensors, change, *, units=1, config=None):
    """The tensors with the values of their weight changed, `units` of it at a time."""
    source, weight = only(tensors, config)
    w = values(source, weight)
    new = w + np.asarray(change, np.float32)
    parts = [StoredTensor(weight, source, n, len(weight.info.shape) - 1) for n in weight.remade]
    steps = list(runs(len(w), parts[0].span, units * parts[0].unit))
    result = dict(tensors)
    whole = [parts[0].survey(w[slice(*s)], new[slice(*s)], s[0]) for s in steps]
    for part in parts[1:]:
        found = part.settled(whole).beside()
        result[part.name] = found.reshape(tensors[part.name].shape)
    codes, out = parts[0], np.empty(tensors[parts[0].name].nbytes, np.uint8)
    for (start, stop), seen in zip(steps, whole, strict=True):
        known = codes.settled(whole) if codes.coupled else codes.settled([seen], start)
        held = known.encode(new[start:stop], start, out, start)
        assert np.abs(held - new[start:stop]).max() <= np.abs(new).max()
    theirs = tensors[codes.name]
    result[codes.name] = out.view(theirs.dtype).reshape(theirs.shape)
    return result, w, new


def nudges(w, share, seed=5):
    """Changes of about this share of the weight's size."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(w.shape).astype("f4") * np.float32(share) * w.std()


@cases
def test_nothing_changes_where_nothing_does(tensors):
    found, w, _ = written(tensors, 0)
    source, weight = only(found)
    assert np.array_equal(values(source, weight), w)
    same = [n for n in tensors if found[n].tobytes() == tensors[n].tobytes()]
    zeros = {n for n in tensors if n.endswith(("_blocks", "m.weight"))}  # of which -0 becomes 0
    assert set(tensors) - set(same) <= zeros


@cases
@given(units=st.integers(1, 40), share=st.sampled_from([0.01, 0.5, 30.0]))
@settings(max_examples=10)
def test_bytes_do_not_depend_on_the_steps(tensors, units, share):
    w = values(*only(tensors))
    expected, _, _ = written(tensors, nudges(w, share))
    found, _, _ = written(tensors, nudges(w, share), units=units)
    assert all(found[n].tobytes() == expected[n].tobytes() for n in tensors)


@cases
def test_what_is_written_once_stays_when_it_is_written_again(tensors):
    once, _, _ = written(tensors, nudges(values(*only(tensors)), 3.0))
    twice, w, _ = written(once, 0)
    assert np.array_equal(values(*only(twice)), w)


def steps_of(tensors):
    """The largest distance of two codes next to each other, for every element."""
    source, weight = only(tensors)
    ones = np.ones(weight.info.shape, np.float32).reshape(-1, weight.info.shape[-1])
    limit, found = weight.remade[0], dict(tensors)
    codes = tensors[limit]
    if codes.dtype.name.startswith("float8") or codes.dtype == np.int8:
        found[limit] = np.ones(codes.shape).astype(codes.dtype)
        scale = values(*only(found))
        w = np.abs(values(source, weight)) / scale
        exponents = np.floor(np.log2(np.maximum(w, 2.0**-6)))
        return scale * (1 if codes.dtype == np.int8 else np.exp2(exponents - 3)) * ones
    if limit.endswith("_blocks"):
        found[limit] = np.full(codes.shape, 0x22, np.uint8)
        scale = values(*only(found))
        w = np.abs(values(source, weight)) / scale
        return scale * np.where(w < 2, 0.5, np.where(w < 4, 1, 2))
    one, none = (dict(tensors, **{limit: np.full(codes.shape, c, "i4")}) for c in (0x11111111, 0))
    return values(*only(one)) - values(*only(none))


def sideless(tensors):
    """Where a zero is at the end of the codes, and one side has none."""
    source, weight = only(tensors)
    none = np.zeros(values(source, weight).shape, bool)
    if "m.qzeros" not in tensors:
        return none
    least, most = (
        values(*only(dict(tensors, **{weight.remade[0]: np.full_like(tensors["m.qweight"], c)})))
        for c in (0, -1)
    )
    return (least >= 0) | (most <= 0)


GRIDS = [n for n in CASES if "nf4" not in n and "fp4" not in n and n != "int8" and "eight" not in n]


@pytest.mark.parametrize("case", [*GRIDS, "mxfp4"])
@pytest.mark.parametrize("share", [0.02, 0.3, 4.0])
def test_no_value_is_off_by_more_than_half_a_step(case, share):
    tensors = CASES[case]
    found, _, new = written(tensors, nudges(values(*only(tensors)), share))
    error = np.abs(values(*only(found)).astype("f8") - new)
    bound = steps_of(found) / 2 * (1 + 2.0**-7)  # a scale of few digits may be that much too small
    outside = error > bound
    assert not outside[~sideless(tensors)].any()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("shape", [(6, 64), (64, 192), (7, 34)])
def test_bytes_are_those_that_bitsandbytes_makes_of_the_new_values(kind, shape):
    found = codec(kind)
    tensors = found.tensors("m.weight", found.quantise(drawn(*shape)))
    result, _, new = written(tensors, drawn(*shape, seed=9))
    expected = found.tensors("m.weight", found.quantise(new))
    assert {n: t.tobytes() for n, t in result.items()} == {
        n: t.tobytes() for n, t in expected.items()
    }


def test_scales_of_scales_keep_their_offset():
    tensors = CASES["nf4 twice"]
    found, _, new = written(tensors, drawn(64, 600, seed=9))
    state = next(n for n in tensors if "quant_state" in n)
    offset = json.loads(tensors[state].tobytes())["nested_offset"]
    absmax = np.abs(new).reshape(-1, 64).max(1)
    expected = nest(absmax, offset, tensors["m.weight.nested_absmax"])
    assert np.array_equal(found["m.weight.absmax"], expected.codes)
    assert np.abs(unnest(expected) - absmax).max() < 0.02 * absmax.max()
    assert found[state].tobytes() == tensors[state].tobytes()


def test_a_scale_stays_until_the_values_have_outgrown_its_grid():
    tensors = scaled((4, 8), (4, 1), scale="weight_scale", codes="i1")
    tensors["m.weight"] = np.full((4, 8), 100, "i1")
    tensors["m.weight_scale"][:] = 1
    change = np.zeros((4, 8), "f4")
    change[0, 0], change[1, 0], change[2], change[3] = 27, 28, -60, -100
    found, _, _ = written(tensors, change)
    assert found["m.weight_scale"].ravel().tolist() == pytest.approx([1, 128 / 127, 40 / 127, 1])
    assert found["m.weight"][:, 0].tolist() == [127, 127, 127, 0]


def test_a_block_of_nothing_gets_a_scale_of_its_own():
    tensors = scaled((1, 4), (1, 1), scale="weight_scale")
    tensors["m.weight"] = np.zeros_like(tensors["m.weight"])
    tensors["m.weight_scale"][:] = 1
    found, _, new = written(tensors, np.full((1, 4), 1e-6))
    assert np.allclose(values(*only(found)), new, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "given", "expected"),
    [
        ("U8", 0.75, 1.0),
        ("U8", 0.5, 0.5),
        ("F8_E8M0", 0.5001, 1.0),
        ("F16", 1e-12, 2.0**-24),
        ("F16", 1e9, 65504.0),
        ("BF16", 0.0, 0.0),
        ("F32", 0.1, float(np.float32(0.1))),
    ],
)
def test_a_scale_is_what_its_dtype_can_hold(dtype, given, expected):
    assert stored(np.array([given], np.float32), dtype).tolist() == [expected]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@cases
def test_what_is_not_finite_is_refused(tensors, value):
    change = np.zeros_like(values(*only(tensors)))
    change[-1, -1] = value
    with pytest.raises(InputError, match="NaN"):
        written(tensors, change)


def test_an_outlier_costs_its_own_group_only():
    for tensors in (packed_ints(), gptq(), awq()):
        change = np.zeros((24, 64), "f4")
        change[3, 5] = 1e4
        found, w, new = written(tensors, change)
        held = values(*only(found))
        assert abs(held[3, 5] / new[3, 5] - 1) < 0.01
        there = np.ones(w.shape, bool)
        there[3, :16] = False
        assert np.array_equal(held[there], w[there])


@pytest.mark.parametrize("bits", [2, 4, 8])
@given(rows=st.integers(1, 4), columns=st.integers(1, 40))
def test_words_are_the_inverse_of_fields(bits, rows, columns):
    codes = np.random.default_rng(columns).integers(0, 2**bits, (rows, columns)).astype("u1")
    assert np.array_equal(fields(words(codes, bits), bits)[:, :columns], codes)
