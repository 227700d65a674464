"""Folding is the algebra in float64, rounded once; its figures say what was lost."""

import json
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.engine.executor import fold_whole
from lorakit.engine.figures import Done, Figures, total, unit
from lorakit.engine.fold import Slab, blocks_of, fold_block
from lorakit.engine.plan import Fold
from lorakit.math.cast import storage
from lorakit.math.decomposed import Decomposed
from lorakit.math.recipe import Recipe, Rows
from lorakit.math.updates import Added, Toward
from lorakit.store.memory import MemorySource
from lorakit.tensors import BITS, FOLDABLE, TensorInfo
from tests.engine.cases import by_column, gaussian, low_rank, plain

DTYPES = sorted(FOLDABLE)
PAIRS = [(origin, written) for origin in DTYPES for written in DTYPES]


def fold_of(array: np.ndarray, dtype: str = "") -> tuple[Fold, MemorySource]:
    """A fold of a weight in memory into a dtype, its own by default."""
    source = MemorySource({"w": array})
    info = source.infos["w"]
    return Fold(TensorInfo("w", dtype or info.dtype, info.shape), "base", info), source


def folded(array: np.ndarray, recipe: Recipe, dtype: str = "") -> tuple[np.ndarray, Figures]:
    """The whole result and its figures, block by block as a run does it."""
    fold, source = fold_of(array, dtype)
    slab, parts, rows = Slab(), [], []
    for block in blocks_of(fold):
        out, figures = fold_block(fold, recipe, source, block, slab)
        rows.append(out.copy())
        parts.append(figures)
    return np.concatenate(rows).reshape(array.shape), total(parts)


def exact_delta(recipe: Recipe, shape: tuple[int, int]) -> np.ndarray:
    whole = np.zeros(shape)
    for update in recipe.updates:
        low = update.low
        whole += update.weight * low.scaling * (low.b.astype("f8") @ low.a.astype("f8"))
    return whole


@pytest.mark.parametrize(("origin", "written"), PAIRS, ids=map("-".join, PAIRS))
def test_every_pair_of_dtypes_is_the_float64_sum_rounded_once(origin, written):
    base = (gaussian(0, (37, 50)) / 2).astype(storage(origin))
    recipe = plain(1, base.shape, weight=0.3)
    got, figures = folded(base, recipe, written)
    assert got.dtype == storage(written)
    exact = base.astype("f8") + exact_delta(recipe, base.shape)
    best = exact.astype(storage(written)).astype("f8")
    # The float32 sum of 3 products and a weight is off by a few units of 2^-24 of its terms.
    slack = 1e-5 if "F64" not in (origin, written) else 1e-12
    assert np.all(np.abs(got.astype("f8") - exact) <= np.abs(best - exact) + slack)
    assert figures.overflowed == 0
    assert figures.max_value == pytest.approx(np.abs(got.astype("f8")).max(), rel=1e-6)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_hardly_a_number_is_rounded_wrongly(dtype):
    base = gaussian(0, (600, 1000)).astype(storage(dtype))
    recipe = plain(1, base.shape, rank=16, scaling=0.02)
    got, _ = folded(base, recipe)
    exact = base.astype("f8") + exact_delta(recipe, base.shape)
    wrong = np.count_nonzero(got != exact.astype("f4").astype(storage(dtype)))
    assert wrong <= 1e-4 * base.size


@pytest.mark.parametrize(("origin", "written"), PAIRS, ids=map("-".join, PAIRS))
def test_a_cast_without_an_update_rounds_once(origin, written):
    base = gaussian(0, (37, 50)).astype(storage(origin))
    got, figures = folded(base, Recipe(), written)
    wide = "f8" if "F64" in (origin, written) else "f4"
    expected = base.astype(wide).astype(storage(written))
    wrong = np.count_nonzero(got.view("u1") != expected.view("u1"))
    assert wrong <= (1 if "F64" in (origin, written) else 0)  # ml_dtypes rounds float64 twice
    assert figures.retained == 1.0
    assert figures.overflowed == 0


@pytest.mark.parametrize("code", [c for c in BITS if BITS[c] >= 8])
def test_where_nothing_is_done_the_very_bytes_come_out(code):
    raw = np.random.default_rng(0).integers(0, 2 if code == "BOOL" else 256, 640, np.uint8)
    base = raw.view(storage(code)).reshape(-1, 4)
    got, figures = folded(base, Recipe())
    assert got.tobytes() == raw.tobytes()
    assert figures == Figures()


@dataclass(frozen=True)
class Other:
    """The same update, but of a kind that the tuned path does not know."""

    update: Added
    surveys = False

    @property
    def weight(self) -> float:
        return self.update.weight

    def change(self, w: Any, start: int, stop: int) -> Any:
        return self.update.change(w, start, stop)


@given(
    st.integers(1, 300),
    st.integers(1, 300),
    st.integers(1, 40),
    st.floats(-4, 4).filter(bool),
    st.sampled_from(["F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"]),
)
def test_the_tuned_path_equals_the_generic_path_bit_for_bit(rows, cols, rank, scaling, dtype):
    base = gaussian(0, (rows, cols)).astype(storage(dtype))
    added = Added(low_rank(1, base.shape, rank=rank, scaling=scaling))
    tuned = folded(base, Recipe(updates=(added,)))
    generic = folded(base, Recipe(updates=(Other(added),)))
    assert tuned[0].tobytes() == generic[0].tobytes()
    assert tuned[1] == generic[1]


@pytest.mark.parametrize("scaling", [1.0, 2.0, -0.25, 0.7])
@pytest.mark.parametrize("turned", [False, True])
def test_the_tuned_path_equals_the_generic_path_on_many_blocks(scaling, turned):
    shape = (2000, 600)
    low = low_rank(1, shape[::-1] if turned else shape, scaling=scaling)
    if turned:
        from lorakit.math.lowrank import transpose

        low = transpose(low)
    base = gaussian(0, shape).astype(ml_dtypes.bfloat16)
    fold, _ = fold_of(base)
    assert len(list(blocks_of(fold))) > 2
    tuned = folded(base, Recipe(updates=(Added(low),)))
    generic = folded(base, Recipe(updates=(Other(Added(low)),)))
    assert tuned[0].tobytes() == generic[0].tobytes()
    assert tuned[1] == generic[1]


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64"])
def test_column_norms_are_those_of_all_blocks(dtype):
    base = gaussian(0, (2100, 600)).astype(storage(dtype))
    recipe = by_column(1, base.shape)
    fold, source = fold_of(base)
    assert len(list(blocks_of(fold))) == 3
    got = fold_whole(fold, recipe, source).astype("f8")
    (update,) = recipe.updates
    assert isinstance(update, Decomposed)
    v = base.astype("f8") + 0.7 * (update.low.b.astype("f8") @ update.low.a.astype("f8"))
    exact = update.magnitude.astype("f8") / np.linalg.norm(v, axis=0) * v
    relative = {"F32": 1e-6, "BF16": 2.0**-8, "F64": 1e-6}[dtype]  # the magnitude is float32
    np.testing.assert_allclose(got, exact, rtol=relative, atol=1e-6)


def test_new_rows_come_before_updates_wherever_a_block_begins():
    base = gaussian(0, (2000, 600))
    values = gaussian(5, (4, 600))
    indices = np.array([0, 872, 873, 1999])
    recipe = Recipe((Rows(indices, values),), plain(1, base.shape).updates)
    got, _ = folded(base, recipe)
    start = base.copy()
    start[indices] = values
    expected, _ = folded(start, plain(1, base.shape))
    assert got.tobytes() == expected.tobytes()


def test_a_step_towards_other_values_reads_their_rows():
    base, values = gaussian(0, (2000, 600)), gaussian(1, (2000, 600))
    got, _ = folded(base, Recipe(updates=(Toward(values, 0.25),)))
    np.testing.assert_allclose(got, 0.75 * base + 0.25 * values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (0, 3), (3, 0), (2, 3, 4, 5)], ids=str)
def test_any_shape_can_be_folded(shape):
    base = gaussian(0, shape)
    rows, cols = (shape[0] if shape else 1), int(np.prod(shape[1:]))
    fold, source = fold_of(np.asarray(base))
    recipe = plain(1, (rows, cols))
    got = fold_whole(fold, recipe, source)
    exact = base.astype("f8") + exact_delta(recipe, (rows, cols)).reshape(shape)
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-6)
    assert got.shape == shape


def uniform(change: float, shape: tuple[int, int]) -> Recipe:
    """An update that changes every number alike."""
    low = low_rank(0, shape, rank=1, scaling=1.0)
    low.a[:], low.b[:] = 1, change
    return Recipe(updates=(Added(low),))


@pytest.mark.parametrize(
    ("dtype", "large", "change"),
    [("F16", 60000, 10000), ("F8_E4M3", 448, 100), ("F8_E5M2", 57344, 20000), ("BF16", 3e38, 3e38)],
)
def test_numbers_that_outgrow_their_dtype_are_counted(dtype, large, change):
    base = np.ones((10, 10), storage(dtype))
    base[3, :4] = large
    base[7, 7] = -large
    got, figures = folded(base, uniform(change, base.shape))
    assert figures.overflowed == np.count_nonzero(~np.isfinite(got.astype("f4"))) == 4
    assert np.isfinite(figures).all()
    assert figures.max_value == np.abs(got[np.isfinite(got.astype("f4"))].astype("f4")).max()


@pytest.mark.parametrize(
    ("origin", "written", "large"),
    [("F32", "F16", 1e6), ("F64", "F32", 1e300), ("F64", "F16", 1e6), ("F32", "F8_E4M3", 1e3)],
)
def test_numbers_that_a_cast_cannot_hold_are_counted(origin, written, large):
    base = np.ones((10, 10), storage(origin))
    base[0, :3] = large, -large, np.inf
    _, figures = folded(base, Recipe(), written)
    assert figures.overflowed == 2
    assert figures.max_value == 1


def test_what_was_infinite_or_nan_before_is_not_counted():
    base = np.ones((10, 10), np.float16)
    base[0, :3] = np.inf, -np.inf, np.nan
    got, figures = folded(base, uniform(0.5, base.shape))
    assert figures.overflowed == 0
    assert figures.max_value == 1.5
    assert figures.max_change == 0.5
    assert np.array_equal(got[0, :3], base[0, :3], equal_nan=True)


@pytest.mark.parametrize("change", [1e25, 3e38])
def test_a_delta_whose_square_float32_cannot_hold_has_finite_figures(change):
    _, figures = folded(np.ones((10, 10), np.float32), uniform(change, (10, 10)))
    assert figures.retained == pytest.approx(1)
    assert np.isfinite(figures).all()


def test_figures_are_those_of_the_stored_numbers():
    base = gaussian(0, (500, 300)).astype(ml_dtypes.bfloat16)
    recipe = plain(1, base.shape, scaling=0.001)
    got, figures = folded(base, recipe)
    delta = exact_delta(recipe, base.shape)
    landed = got.astype("f8") - base.astype("f8")
    assert figures.delta_delta == pytest.approx((delta**2).sum(), rel=1e-5)
    assert figures.landed_delta == pytest.approx((landed * delta).sum(), rel=1e-4)
    assert figures.retained == pytest.approx((landed * delta).sum() / (delta**2).sum(), rel=1e-4)
    assert figures.max_change == np.abs(landed).max()
    assert figures.max_value == np.abs(got.astype("f8")).max()


def test_a_grid_too_coarse_for_the_delta_keeps_none_of_it():
    base = np.full((10, 10), 128, ml_dtypes.bfloat16)
    got, figures = folded(base, uniform(0.25, base.shape))
    assert np.array_equal(got, base)
    assert figures.retained == 0


def test_figures_survive_the_journal():
    _, figures = folded(gaussian(0, (20, 30)), plain(1, (20, 30)))
    done = Done({"w": figures}, sha256="0f", devices=("cpu",))
    assert Done.from_dict(json.loads(json.dumps(done.to_dict()))) == done


def test_the_unit_in_the_last_place_is_that_of_the_dtype():
    for code, dtype in (("F32", np.float32), ("F16", np.float16), ("F64", np.float64)):
        for value in (1.0, 1.5, 0.1, 100.0):
            assert unit(code, value) == np.spacing(dtype(value))


def test_buffers_grow_and_are_used_again():
    slab = Slab()
    large = slab.take("w", (100, 10), np.dtype("f4"))
    small = slab.take("w", (3, 7), np.dtype("f8"))
    assert np.shares_memory(large, small)
    assert not np.shares_memory(large, slab.take("read", (100, 10), np.dtype("f4")))


@pytest.mark.parametrize("written", ["F16", "F32"])
def test_finished_rows_lie_where_they_are_to(written):
    base, recipe = gaussian(0, (2000, 600), np.float16), plain(1, (2000, 600))
    fold, source = fold_of(base, written)
    place = np.empty(1 << 22, np.uint8)
    slab = Slab(place)
    for block in blocks_of(fold):
        out, _ = fold_block(fold, recipe, source, block, slab)
        assert out.ctypes.data == place.ctypes.data
        expected, _ = fold_block(fold, recipe, source, block, Slab())
        assert out.tobytes() == expected.tobytes()
