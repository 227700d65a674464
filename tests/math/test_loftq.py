"""What LoftQ leaves of a weight is what is told, less than plain quantisation, for any scaling."""

import ml_dtypes
import numpy as np
import pytest

from lorakit.errors import InputError, UsageError
from lorakit.math.loftq import Setting, split
from lorakit.math.lowrank import delta
from lorakit.quant.table import codec

SHAPE = (96, 128)
GRIDS = {
    "nf4": {},
    "fp4": {},
    "int8": {},
    "uniform": {"bits": 2},
    "normal-float": {"bits": 3},
}


def weight(seed=0, shape=SHAPE):
    rng = np.random.default_rng(seed)
    return (0.02 * rng.standard_t(6, shape)).astype("f4")


def left(w, found, grid, dtype="bfloat16"):
    """What codes and update leave of a weight, in float64."""
    values = np.asarray(grid.dequantise(found.quantised, dtype), "f8")
    return w - values - delta(found.low, "float64")


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("start", ["quant", "lowrank"])
@pytest.mark.parametrize("scaling", [0.25, 0.5, 1.0, 2.0])
def test_less_is_left_than_by_quantisation_alone_and_as_much_as_is_told(name, start, scaling):
    w, grid = weight(), codec(name, **GRIDS[name])
    found = split(w, grid, Setting(8, scaling=scaling, start=start))
    assert found.low.scaling == scaling
    assert np.linalg.norm(left(w, found, grid)) == pytest.approx(found.norm, rel=1e-4)
    plain = w - np.asarray(grid.dequantise(grid.quantise(w), "bfloat16"), "f8")
    assert found.plain == pytest.approx(np.linalg.norm(plain), rel=1e-5)
    assert found.norm < found.plain


def test_the_scaling_makes_no_difference_to_what_is_left():
    w, grid = weight(), codec("nf4")
    norms = [split(w, grid, Setting(8, scaling=s)).norm for s in (0.5, 1.0, 2.0)]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-9)


def test_one_iteration_has_the_codes_of_plain_quantisation():
    w, grid = weight(), codec("nf4")
    found = split(w, grid, Setting(8, iterations=1))
    for name, array in grid.quantise(w).arrays.items():
        np.testing.assert_array_equal(found.quantised.arrays[name], array)


def test_the_best_iteration_is_kept():
    w, grid = weight(), codec("uniform", bits=2)
    found = split(w, grid, Setting(8, iterations=12))
    assert len(found.norms) == 12
    assert found.norm == min(found.norms) == found.norms[found.best]


def test_more_iterations_leave_no_more():
    w, grid = weight(), codec("nf4")
    norms = [split(w, grid, Setting(8, iterations=t)).norm for t in (1, 2, 5)]
    assert norms == sorted(norms, reverse=True)


def test_a_search_leaves_what_full_decompositions_leave():
    w, grid = weight(0, (700, 900)), codec("nf4")
    quick, exact = (split(w, grid, Setting(16, exact=e)).norm for e in (False, True))
    assert quick == pytest.approx(exact, rel=5e-4)


@pytest.mark.parametrize("full", [False, True])
def test_with_moments_of_the_inputs_the_outputs_are_nearer(full):
    rng = np.random.default_rng(1)
    spread = np.exp(rng.standard_normal(SHAPE[1]))
    mix = np.linalg.qr(rng.standard_normal((SHAPE[1], SHAPE[1])))[0] if full else np.eye(SHAPE[1])
    root = mix * spread
    moments = root @ root.T if full else spread**2
    w, grid = weight(), codec("nf4")
    plain, told = (split(w, grid, Setting(8), moments=m) for m in (None, moments))
    before, after = (np.linalg.norm(left(w, x, grid) @ root) for x in (plain, told))
    assert after < before
    assert told.norm == pytest.approx(after, rel=1e-4)


def test_factors_are_balanced():
    found = split(weight(), codec("nf4"), Setting(8, scaling=2.0))
    lengths = np.linalg.norm(found.low.a, axis=1), np.linalg.norm(found.low.b, axis=0)
    np.testing.assert_allclose(*lengths, rtol=1e-4)


def test_narrow_factors_cost_next_to_nothing():
    w, grid = weight(), codec("nf4")
    found = split(w, grid, Setting(8))
    a, b = (x.astype(ml_dtypes.bfloat16).astype("f8") for x in (found.low.a, found.low.b))
    values = np.asarray(grid.dequantise(found.quantised, "bfloat16"), "f8")
    assert np.linalg.norm(w - values - b @ a) == pytest.approx(found.norm, rel=1e-3)


@pytest.mark.parametrize("moments", ["none", "of each", "full"])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
def test_what_is_left_with_rounded_factors_is_told(dtype, moments):
    """They are large beside what eight bits leave, if they have the leading part of a weight."""
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((96, 4)) @ rng.standard_normal((4, 128))).astype("f4") + weight()
    root = {"none": np.eye(128), "of each": np.diag(rng.uniform(0.1, 2, 128))}
    m = root.get(moments, rng.standard_normal((128, 128)))
    second = {"none": None, "of each": np.diag(m) ** 2}.get(moments, m @ m.T)
    grid = codec("int8")
    found = split(w, grid, Setting(8, scaling=0.5, start="lowrank"), moments=second)
    a, b = (x.astype(dtype) for x in (found.low.a, found.low.b))
    values = np.asarray(grid.dequantise(found.quantised, "bfloat16"), "f8")
    rest = w - values - 0.5 * b.astype("f8") @ a.astype("f8")
    assert found.norm_with(a, b) == pytest.approx(np.linalg.norm(rest @ m), rel=1e-3)


def test_of_a_weight_of_zeros_nothing_is_left():
    found = split(np.zeros(SHAPE, "f4"), codec("nf4"), Setting(4))
    assert (found.norm, found.plain) == (0.0, 0.0)


@pytest.mark.parametrize(
    "moments", [np.ones(5), np.ones((5, 5)), -np.ones(SHAPE[1]), np.full(SHAPE[1], np.nan)]
)
def test_moments_that_are_none_are_refused(moments):
    with pytest.raises(InputError, match="moments"):
        split(weight(), codec("nf4"), Setting(4), moments=moments)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 4, "iterations": 0}, "iterations"),
        ({"rank": 4, "start": "svd"}, "svd"),
        ({"rank": 4, "scaling": 0.0}, "scaling"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        Setting(**options)


def test_nan_is_refused():
    w = weight()
    w[3, 3] = np.nan
    with pytest.raises(InputError):
        split(w, codec("nf4"), Setting(4))
