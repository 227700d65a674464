"""fold on one weight is the arithmetic of merge, for NumPy and torch."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given

import lorakit
from lorakit.errors import MisfitError
from lorakit.math.lowrank import delta
from tests.strategies import updates


@given(updates(count=2))
def test_a_float64_weight_gets_the_exact_weighted_sum(parts):
    w = np.random.default_rng(0).standard_normal(parts[0].shape)
    expected = w + delta(parts[0], "float64") - 0.5 * delta(parts[1], "float64")
    np.testing.assert_allclose(lorakit.fold(w, parts, [1, -0.5]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_the_result_has_the_dtype_and_shape_of_the_weight_and_is_rounded_once(dtype):
    rng = np.random.default_rng(1)
    w = rng.standard_normal((40, 30, 3, 3)).astype(dtype)
    low = lorakit.LowRank(
        rng.standard_normal((4, 30, 3, 3)), rng.standard_normal((40, 4, 1, 1)), 2.0
    )
    got = lorakit.fold(w, [low])
    exact = w.astype(np.float64) + 2 * np.einsum("orxy,rikl->oikl", low.b, low.a)
    assert (got.dtype, got.shape) == (w.dtype, w.shape)
    wrong = np.count_nonzero(got != exact.astype(np.float32).astype(dtype))
    assert wrong <= (0.9 if dtype is np.float32 else 0.001) * w.size


def test_torch_weights_come_back_as_torch_tensors():
    torch = pytest.importorskip("torch")
    w = torch.randn(8, 6, dtype=torch.bfloat16)
    low = lorakit.LowRank(torch.randn(2, 6), torch.randn(8, 2), 0.5)
    got = lorakit.fold(w, [low])
    expected = (w.float() + 0.5 * (low.b @ low.a)).to(torch.bfloat16)
    assert (got.dtype, got.shape) == (torch.bfloat16, w.shape)
    torch.testing.assert_close(got, expected)


def test_an_update_of_another_shape_is_a_misfit():
    low = lorakit.LowRank(np.ones((1, 3)), np.ones((2, 1)))
    with pytest.raises(MisfitError):
        lorakit.fold(np.ones((3, 2)), [low])
    np.testing.assert_array_equal(lorakit.fold(np.ones((3, 2)), [lorakit.transpose(low)]), 2)
