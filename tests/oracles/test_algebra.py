"""The reference is known good: it agrees with PEFT wherever PEFT is right, and rounds once."""

import ml_dtypes
import numpy as np
import pytest

from tests.oracles.algebra import IGNORED, expected, replaced
from tests.oracles.case import CRASHES, ROUNDS_TWICE, Built
from tests.oracles.conftest import Build
from tests.oracles.reading import read_dtypes, read_tensors
from tests.oracles.rounding import rounded, spacing

pytest.importorskip("peft", minversion="0.21")
# A sum of ten products in float32 is off by a few of its units; this is four, of the largest.
SLACK = 2.0**-22


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.dtype.itemsize}")


def needs_peft(case: Built) -> None:
    if case.case.peft_fault == CRASHES:
        pytest.skip("PEFT crashes when it merges this")


def test_peft_merges_to_the_same_within_its_own_rounding(case: Built) -> None:
    needs_peft(case)
    merged, codes = expected(case.base, case.plain), read_dtypes(case.peft)
    base = replaced(case.base, case.plain)
    for name, theirs in read_tensors(case.peft).items():
        ours, before = merged[name], base[name]
        operand = np.maximum(abs(ours), np.maximum(abs(before), abs(ours - before)))
        allowed = spacing(ours, codes[name]) / 2 + SLACK * operand.max()
        if case.case.peft_fault == ROUNDS_TWICE:
            # Half a unit of the delta; and of the sum so far, where the delta is added twice.
            allowed += spacing(operand, codes[name])
        assert (abs(theirs - ours) <= allowed).all(), name


def test_peft_rounds_next_to_nothing_otherwise(case: Built) -> None:
    if case.case.peft_fault or case.case.dtype == "float32":
        pytest.skip("the last bit is not PEFT's strong point here")
    merged, codes = expected(case.base, case.plain), read_dtypes(case.peft)
    theirs = read_tensors(case.peft)
    ours = {name: rounded(merged[name], codes[name]).astype(float) for name in theirs}
    wrong = sum(int((theirs[name] != ours[name]).sum()) for name in theirs)
    assert wrong <= 1e-3 * sum(values.size for values in theirs.values())


def test_peft_knows_the_same_tensors(case: Built) -> None:
    needs_peft(case)
    ours, theirs = expected(case.base, case.plain), read_tensors(case.peft)
    # A backbone or a classifier has no language model's head; the checkpoint keeps its own.
    assert ours.keys() ^ theirs.keys() <= {"lm_head.weight"}
    assert {name: ours[name].shape for name in theirs} == {n: t.shape for n, t in theirs.items()}


def test_no_tensor_of_an_adapter_is_at_its_identity(case: Built) -> None:
    base = read_tensors(case.base)
    for key, values in read_tensors(case.plain).items():
        name = key.removeprefix("base_model.model.")
        if not any(part in key for part in (*IGNORED, ".base_layer.weight")):
            assert values.any()
            assert name not in base or not np.array_equal(values, base[name])


@pytest.mark.parametrize("name", ["linear", "dora", "conv1d", "attention", "conv3d-pointwise"])
def test_weights_multiply_what_adapters_change(built: Build, name: str) -> None:
    case = built(name)
    base, once = read_tensors(case.base), expected(case.base, case.plain)
    parts = expected(case.base, case.plain, case.plain, weights=[2.5, -1.0])
    none = expected(case.base, case.plain, weights=[0.0])
    for tensor, before in base.items():
        delta = once[tensor] - before
        np.testing.assert_allclose(parts[tensor], before + 1.5 * delta, rtol=1e-12, atol=1e-14)
        np.testing.assert_array_equal(none[tensor], before)


def test_adapters_with_the_same_name_in_peft_are_the_same_adapter(built: Build) -> None:
    hub, saved = built("conv1d-hub-names"), built("conv1d")
    ours, theirs = read_tensors(hub.plain), read_tensors(saved.plain)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(("code", "dtype"), [("F32", np.float32), ("F16", np.float16)])
def test_rounding_is_the_cast_of_numpy(code: str, dtype: type) -> None:
    scales = np.exp2(np.linspace(-170, 140, 20_001))
    values = np.random.default_rng(0).normal(size=scales.size) * scales
    edges = [0.0, -0.0, np.inf, -np.inf, 65504.0, 65519.99, 65520.0, 2.0**-24, 2.0**-25, 1e-8]
    values = np.concatenate([values, edges])
    with np.errstate(over="ignore", under="ignore"):
        assert np.array_equal(bits(rounded(values, code)), bits(values.astype(dtype)))


def test_rounding_every_bfloat16_gives_it_back() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    every = every[~np.isnan(every.astype(np.float32))]
    assert np.array_equal(bits(rounded(every.astype(np.float64), "BF16")), bits(every))


def test_rounding_takes_the_nearest_bfloat16_and_the_even_one_of_two() -> None:
    every = np.arange(0x7F7F, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float64)
    low, high, middle = every[:-1], every[1:], (every[:-1] + every[1:]) / 2
    even = np.where(np.arange(low.size) % 2 == 0, low, high)
    assert np.array_equal(rounded(middle, "BF16").astype(np.float64), even)
    just_below, just_above = np.nextafter(middle, 0), np.nextafter(middle, np.inf)
    assert np.array_equal(rounded(just_below, "BF16").astype(np.float64), low)
    assert np.array_equal(rounded(just_above, "BF16").astype(np.float64), high)


def test_rounding_to_bfloat16_does_not_pass_through_float32() -> None:
    barely_above_a_tie = 1 + 2.0**-8 + 2.0**-40
    assert float(rounded(np.array(barely_above_a_tie), "BF16")) == 1 + 2.0**-7
