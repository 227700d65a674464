"""The laws of lorakit.math.residual against a full decomposition in float64, and against PEFT."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.errors import InputError
from lorakit.math import residual
from lorakit.math.lowrank import delta
from lorakit.math.residual import olora, principal, tail

PARTS = {"principal": principal, "olora": olora, "tail": tail}
SHAPES = [(24, 40), (40, 24), (32, 32), (1, 9), (9, 1)]


def weight(shape, spectrum=None, seed=0):
    """A random matrix, with these singular values if any are given."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape)
    if spectrum is None:
        return w
    u, _, v = np.linalg.svd(w, full_matrices=False)
    return (u * spectrum) @ v


def by_svd(w, first, last):
    u, s, v = np.linalg.svd(w.astype(np.float64), full_matrices=False)
    return (u[:, first:last] * s[first:last]) @ v[first:last]


def dense(part):
    return delta(part.low, "float64")


def error(found, expected, w):
    """The largest singular value of the difference, as a share of that of the weight."""
    return np.linalg.norm(found - expected, 2) / np.linalg.norm(w, 2)


@pytest.mark.parametrize("shape", SHAPES)
@given(rank=st.integers(1, 50))
def test_principal_is_the_part_of_the_largest_singular_values(shape, rank):
    w = weight(shape)
    assert error(dense(principal(w, rank)), by_svd(w, 0, rank), w) < 1e-13


@pytest.mark.parametrize("shape", SHAPES[:3])
@given(rank=st.integers(1, 23))
def test_tail_is_the_part_of_the_smallest_singular_values(shape, rank):
    w, size = weight(shape), min(shape)
    assert error(dense(tail(w, rank)), by_svd(w, size - rank, size), w) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@given(rank=st.integers(1, 50))
def test_olora_is_the_start_of_the_qr_decomposition(shape, rank):
    w = weight(shape)
    q, r = np.linalg.qr(w)
    assert error(dense(olora(w, rank)), q[:, :rank] @ r[:rank], w) < 1e-13


@given(st.integers(1, 23))
def test_the_principal_part_and_the_tail_make_up_the_weight(rank):
    w = weight((24, 40))
    both = dense(principal(w, rank)) + dense(tail(w, 24 - rank))
    assert error(both, w, w) < 1e-12


@pytest.mark.parametrize("part", [principal, olora])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("more", [0, 1, 100])
def test_a_rank_as_large_as_the_weight_gives_the_weight_exactly(part, shape, more):
    w = weight(shape).astype(np.float32)
    found = part(w, min(shape) + more)
    assert np.array_equal(dense(found), w)
    assert found.gap == 1


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_a_weight_of_any_float_dtype_is_computed_in_double(name, dtype):
    w = weight((24, 40)).astype(dtype)
    found = PARTS[name](w, 4)
    assert found.low.a.dtype == found.low.b.dtype == np.float64
    assert np.array_equal(dense(found), dense(PARTS[name](w.astype(np.float64), 4)))


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("shape", SHAPES[:3])
def test_the_cut_into_blocks_does_not_matter(name, shape, monkeypatch):
    w = weight(shape)
    whole = dense(PARTS[name](w, 5))
    monkeypatch.setattr(residual, "BLOCK", 70)
    assert error(dense(PARTS[name](w, 5)), whole, w) < 1e-12


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e-30, 1e30, 1e200])
def test_very_large_and_very_small_weights_neither_overflow_nor_vanish(name, scale):
    w = weight((12, 20))
    plain, found = PARTS[name](w, 3), PARTS[name](w * scale, 3)
    np.testing.assert_allclose(dense(found), dense(plain) * scale, atol=1e-12 * scale)
    assert found.gap == pytest.approx(plain.gap)


@pytest.mark.parametrize("name", PARTS)
def test_the_same_weight_gives_the_same_bits(name):
    w = weight((40, 24))
    one, other = PARTS[name](w, 7), PARTS[name](w.copy(), 7)
    assert one.low.a.tobytes() == other.low.a.tobytes()
    assert one.low.b.tobytes() == other.low.b.tobytes()


@pytest.mark.parametrize("rank", [1, 4, 8, 11, 12])
def test_an_ill_conditioned_weight_loses_no_more_than_a_hundred_millionth(rank):
    w = weight((12, 20), 10.0 ** -np.arange(12))
    assert error(dense(principal(w, rank)), by_svd(w, 0, rank), w) < 1e-8
    if rank < 12:
        assert error(dense(tail(w, rank)), by_svd(w, 12 - rank, 12), w) < 1e-8


@pytest.mark.parametrize("rank", [3, 4, 5, 8])
def test_a_rank_deficient_weight_is_all_in_its_principal_part(rank):
    w = weight((12, 20), np.array([4.0, 3, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0]))
    found = principal(w, rank)
    assert error(dense(found), w, w) < 1e-14
    assert found.gap > 1 - 1e-6
    assert error(dense(tail(w, 9)), 0, w) < 1e-8


@pytest.mark.parametrize("name", PARTS)
def test_of_nothing_every_part_is_nothing(name):
    assert np.array_equal(dense(PARTS[name](np.zeros((5, 7)), 2)), np.zeros((5, 7)))


@pytest.mark.parametrize("gap", [1e-2, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("part", [principal, tail])
def test_the_gap_is_how_far_the_singular_values_at_the_cut_lie_apart(part, gap):
    spectrum = np.array([5, 4, 3, 3 * (1 - gap), 1, 0.5])
    w = weight((6, 9), spectrum)
    found = part(w, 3)
    assert found.gap == pytest.approx(gap, rel=1e-4, abs=1e-13)
    expected = by_svd(w, *((0, 3) if part is principal else (3, 6)))
    assert error(dense(found), expected, w) < 1e-14 / gap


def test_equal_singular_values_at_the_cut_have_no_gap():
    assert principal(np.eye(6), 2).gap < 1e-12
    assert tail(np.eye(6), 2).gap < 1e-12


def test_the_gap_of_olora_tells_dependent_columns():
    w = weight((9, 9))
    w[:, 2] = w[:, 0] + 1e-5 * w[:, 2]
    assert 1e-6 < olora(w, 3).gap < 1e-4
    assert olora(w, 2).gap > 0.1
    w[:, 2] = 0
    assert olora(w, 3).gap == 0


def test_olora_takes_its_part_out_as_often_as_the_scaling_says():
    w = weight((9, 12))
    np.testing.assert_allclose(dense(olora(w, 3, scaling=2.5)), 2.5 * dense(olora(w, 3)))


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rank", [2, 5])
def test_a_weight_that_is_not_finite_is_refused(name, bad, rank):
    w = weight((6, 8))
    w[3, 7] = bad
    with pytest.raises(InputError, match="NaN"):
        PARTS[name](w, rank)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize(("shape", "rank"), [((4, 5), 0), ((4,), 1), ((4, 5, 6), 1), ((0, 4), 1)])
def test_what_has_no_such_part_is_refused(name, shape, rank):
    with pytest.raises(InputError, match="rank"):
        PARTS[name](np.ones(shape), rank)


def test_a_tail_that_is_the_whole_weight_is_refused():
    with pytest.raises(InputError, match="nothing"):
        tail(weight((4, 6)), 4)


def peft_part(method, w, rank, scaling):
    """The base that PEFT leaves of a weight, and the delta that its adapter starts with."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    options = {"init_lora_weights": method} if method != "kasa" else kasa_options()
    base = torch.nn.Sequential(torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype))
    base[0].weight.data = w.clone()
    config = peft.LoraConfig(r=rank, lora_alpha=scaling * rank, target_modules=["0"], **options)
    layer = peft.get_peft_model(base, config).base_model.model[0]
    a, b = (f["default"].weight.detach().double() for f in (layer.lora_A, layer.lora_B))
    return layer.base_layer.weight.detach(), scaling * (b @ a)


def kasa_options():
    config = pytest.importorskip("peft.tuners.lora.config")
    if not hasattr(config, "KasaConfig"):
        pytest.skip("this PEFT has no KaSA")
    return {"kasa_config": config.KasaConfig()}


@pytest.mark.parametrize("shape", SHAPES[:3])
@pytest.mark.parametrize("scaling", [0.5, 1, 3])
@pytest.mark.parametrize("method", ["pissa", "olora", "kasa"])
def test_each_part_is_what_peft_takes_out(method, shape, scaling):
    torch = pytest.importorskip("torch")
    w = torch.from_numpy(weight(shape)).float()
    left, added = peft_part(method, w, 4, scaling)
    parts = {
        "pissa": lambda: principal(w.numpy(), 4),
        "olora": lambda: olora(w.numpy(), 4, scaling=scaling),
        "kasa": lambda: tail(w.numpy(), 4),
    }
    taken = dense(parts[method]())
    assert error(left.double().numpy(), w.double().numpy() - taken, w.numpy()) < 1e-5
    if method != "kasa":
        assert error(added.numpy(), taken, w.numpy()) < 1e-5


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_peft_rounds_what_is_left_to_the_dtype_of_the_base(method):
    torch = pytest.importorskip("torch")
    w = torch.from_numpy(weight((24, 40))).bfloat16()
    left, _ = peft_part(method, w, 4, 1)
    part = {"pissa": principal, "olora": olora}[method](w.float().numpy(), 4)
    expected = torch.from_numpy(w.double().numpy() - dense(part)).bfloat16()
    assert left.dtype == torch.bfloat16
    other = (left != expected) & ((left - expected).abs() > 1e-5)  # where OLoRA leaves nothing
    assert other.float().mean() < 0.01
