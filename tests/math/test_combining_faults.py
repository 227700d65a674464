"""What a combination refuses, and the faults of peft 0.21.2 in add_weighted_adapter, done right."""

import numpy as np
import pytest

from lorakit.errors import InputError, MisfitError, UsageError
from lorakit.math.combining.compat import NAMES, compat
from lorakit.math.combining.methods import METHODS, combined
from lorakit.math.combining.setting import Setting
from lorakit.math.lowrank import LowRank, delta
from tests.math.updates import IN, OUT, WEIGHTS, close, dense, three, update, weighted

# What is refused.


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan")])
def test_a_density_outside_0_to_1_is_refused(density):
    with pytest.raises(UsageError, match=r"density is .* above 0 and at most 1"):
        Setting(density=density)


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", 0), ("rank", -3), ("majority", "most"), ("seed", -1), ("gamma", 1.0), ("epsilon", 2)],
)
def test_a_setting_outside_its_range_is_refused(field, value):
    with pytest.raises(UsageError, match=f"{field} is {value!r}"):
        Setting(**{field: value})


def test_weights_and_adapters_have_to_be_equally_many():
    with pytest.raises(UsageError, match="3 adapters and 2 weights"):
        combined("linear", three(), [1.0, 2.0], Setting())


def test_no_adapter_is_refused():
    with pytest.raises(UsageError, match="no adapter"):
        combined("linear", [], [], Setting())


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(weight):
    with pytest.raises(UsageError, match="the weight of adapter 2"):
        combined("linear", three(), [1.0, weight, 1.0], Setting())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_refused(value):
    parts = three()
    parts[1].a[0, 0] = value
    with pytest.raises(InputError, match="adapter 2 holds NaN or infinity"):
        combined("ties", parts, WEIGHTS, Setting())


def test_updates_of_different_shapes_are_refused():
    parts = [update(1), update(2, shape=(OUT, 7))]
    with pytest.raises(MisfitError, match=r"adapter 2 updates .* \(30, 7\), .* \(30, 20\)"):
        combined("svd", parts, [1.0, 1.0], Setting())


def test_factors_that_do_not_multiply_are_refused():
    with pytest.raises(MisfitError, match="no low-rank update"):
        combined("svd", [LowRank(np.ones((2, IN)), np.ones((OUT, 3)))], [1.0], Setting())


def test_an_unknown_method_is_refused_with_the_nearest_one():
    with pytest.raises(UsageError, match="Did you mean 'dare_ties'"):
        combined("dare-ties", three(), WEIGHTS, Setting())
    with pytest.raises(UsageError, match="There are: linear, cat"):
        combined("xyzzy", three(), WEIGHTS, Setting())


def test_cat_to_a_lower_rank_is_refused():
    with pytest.raises(UsageError, match="'cat' gives rank 13, not 6"):
        combined("cat", three(), WEIGHTS, Setting(rank=6))


# The faults of peft 0.21.2 in add_weighted_adapter.


@pytest.mark.parametrize("method", NAMES)
def test_the_scaling_of_the_first_adapter_is_not_applied_again(method):
    parts = [update(i, scaling=8 / 4**0.5) for i in range(2)]
    for found in (combined, compat):
        assert dense(found(method, parts[:1], [1.0], Setting()).low) == pytest.approx(
            dense(parts[0])
        )


@pytest.mark.parametrize("method", NAMES)
def test_no_adapter_is_dropped_for_want_of_a_weight(method):
    for found in (combined, compat):
        with pytest.raises(UsageError, match="2 adapters and 1 weights"):
            found(method, [update(1), update(2)], [1.0], Setting())


@pytest.mark.parametrize("method", sorted(m for m in NAMES if "svd" in m))
def test_a_rank_above_the_smaller_side_is_lowered_to_it(method):
    for found in (combined, compat):
        result = found(method, three(), WEIGHTS, Setting(rank=1000))
        assert result.low.rank <= IN
        assert (result.wanted_rank, result.retained) == (1000, pytest.approx(1))


def test_linear_has_no_terms_between_adapters():
    parts, ws = [update(1), update(2)], [0.7, -0.3]
    close(dense(combined("linear", parts, ws, Setting()).low), sum(weighted(parts, ws)))
    theirs = dense(compat("linear", parts, ws, Setting()).low)
    assert np.linalg.norm(theirs - sum(weighted(parts, ws))) > 1


@pytest.mark.parametrize("method", NAMES)
def test_a_density_that_is_not_given_drops_nothing(method):
    for found in (combined, compat):
        one = found(method, [update(1), update(2)], [1.0, 1.0], Setting())
        assert np.isfinite(dense(one.low)).all()


@pytest.mark.parametrize("method", METHODS)
def test_updates_of_different_ranks_and_scalings_are_combined(method):
    parts = [update(1, 2, scaling=0.5), update(2, 7, scaling=-3)]
    assert combined(method, parts, [1.0, 1.0], Setting()).low.shape == (OUT, IN)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear"])
def test_factors_of_different_ranks_are_refused_where_peft_joins_them_apart(method):
    with pytest.raises(UsageError, match="these have 4, 3, 6"):
        compat(method, three(), WEIGHTS, Setting())


def test_a_rank_that_peft_would_not_heed_is_refused():
    parts = [update(1), update(2)]
    with pytest.raises(UsageError, match="peft gives rank 8 here, not 4"):
        compat("cat", parts, [1.0, 1.0], Setting(rank=4))


def test_a_method_that_peft_does_not_have_is_refused():
    with pytest.raises(UsageError, match="no combination method 'della'"):
        compat("della", three(), WEIGHTS, Setting())


# A chance that float32 takes for none.


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della"])
def test_a_density_that_float32_has_not_keeps_nothing_and_divides_by_no_zero(method):
    parts = [
        LowRank(x.a.astype("float32"), x.b.astype("float32"), x.scaling)
        for x in (update(1), update(2))
    ]
    for found in (combined, compat)[: 1 if method == "della" else 2]:
        assert not delta(found(method, parts, [1.0, 1.0], Setting(density=1e-300)).low).any()
