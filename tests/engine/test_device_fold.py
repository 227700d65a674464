"""Every kind of update on a device is what the CPU makes of it, but for the rare last bit."""

import ml_dtypes
import numpy as np
import pytest

from lorakit.adapter.load import LazyRows
from lorakit.engine.chunk import tile_rows
from lorakit.engine.executor import Cpu
from lorakit.engine.plan import Fold
from lorakit.math.cast import storage
from lorakit.math.decomposed import Decomposed
from lorakit.math.products import Hadamard, Kronecker, Multiplied
from lorakit.math.recipe import Recipe, Rows
from lorakit.math.stacked import Part, Stacked
from lorakit.math.updates import Added, Toward
from lorakit.store.memory import MemorySource
from lorakit.tensors import BITS, FOLDABLE, TensorInfo
from tests.engine.cases import by_column, gaussian, low_rank, plain
from tests.engine.on_device import (
    assert_near,
    by_cpu,
    every_device,
    figures,
    fold_of,
    folded,
    gpus,
)

DTYPES = sorted(FOLDABLE)
PAIRS = [(origin, written) for origin in DTYPES for written in DTYPES]
SHAPE = (300, 220)
TWO_TILES = (7000, 700)


def transposed(seed: int, shape: tuple[int, int]) -> Recipe:
    low = low_rank(seed, shape[::-1], rank=5)
    return Recipe(updates=(Added(type(low)(low.b.T, low.a.T, low.scaling), 0.3),))


def several(seed: int, shape: tuple[int, int]) -> Recipe:
    """Eight adapters of different ranks, one of them taken away."""
    updates = [Added(low_rank(seed + i, shape, rank=1 + i), 0.4 - 0.1 * i) for i in range(8)]
    return Recipe(updates=tuple(updates)).summed()


def unsummed(seed: int, shape: tuple[int, int]) -> Recipe:
    return Recipe(updates=tuple(Added(low_rank(seed + i, shape), 0.5) for i in range(3)))


def by_row(seed: int, shape: tuple[int, int]) -> Recipe:
    magnitude = np.abs(gaussian(seed + 2, (shape[0],))) + 1
    return Recipe(updates=(Decomposed(low_rank(seed, shape), magnitude, axis=0, weight=0.7),))


def both_axes(seed: int, shape: tuple[int, int]) -> Recipe:
    return Recipe(updates=(*by_row(seed, shape).updates, *by_column(seed, shape).updates))


def toward(seed: int, shape: tuple[int, int]) -> Recipe:
    return Recipe(updates=(Toward(gaussian(seed, shape), 0.25),))


def toward_a_file(seed: int, shape: tuple[int, int]) -> Recipe:
    source = MemorySource({"values": gaussian(seed, shape, np.float16)})
    return Recipe(updates=(Toward(LazyRows(source, "values"), 0.25),))


def new_rows(seed: int, shape: tuple[int, int]) -> Recipe:
    indices = np.array([0, 7, shape[0] // 2, shape[0] - 1])
    values = Rows(indices, gaussian(seed, (4, shape[1])))
    nearer = Rows(indices + np.array([1, 1, 1, -1]), gaussian(seed + 1, (4, shape[1])), 0.5)
    return Recipe((values, nearer), plain(seed, shape).updates)


def experts(seed: int, shape: tuple[int, int]) -> Recipe:
    """Six experts one below the other, one without an update, and two updates of another."""
    height = shape[0] // 6
    starts = [0, 0, *(height * e for e in range(2, 6))]
    parts = [
        Part(s, s + height, Added(low_rank(seed + i, (height, shape[1])), 0.6))
        for i, s in enumerate(starts)
    ]
    return Recipe(updates=(Stacked(tuple(parts)),))


def mixed(seed: int, shape: tuple[int, int]) -> Recipe:
    kinds = (plain, experts, by_row, toward)
    return Recipe(new_rows(seed, shape).rows, tuple(k(seed, shape).updates[0] for k in kinds))


def products(seed: int, shape: tuple[int, int]) -> Recipe:
    """A Hadamard product, and a Kronecker product of which rows are cut off."""
    one, two = low_rank(seed, shape), low_rank(seed + 2, shape, rank=5)
    left = gaussian(seed + 4, (shape[0] // 7 + 2, 4))
    whole = Kronecker(left, gaussian(seed + 5, (7, shape[1] // 4)))
    cut = whole.rows(3, 3 + shape[0])
    return Recipe(updates=(Multiplied(Hadamard(one, two), 0.3), Multiplied(cut, 0.2)))


def nothing(seed: int, shape: tuple[int, int]) -> Recipe:
    return Recipe()


KINDS = [
    *(plain, transposed, several, unsummed, by_row, by_column, both_axes, toward, toward_a_file),
    *(new_rows, experts, mixed, products, nothing),
]
every_kind = pytest.mark.parametrize("make", KINDS)


@every_device
@every_kind
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_update_is_that_of_the_cpu(device, make, dtype):
    base = gaussian(0, SHAPE).astype(storage(dtype))
    recipe = make(1, SHAPE)
    assert_near(folded(gpus(device), base, recipe), by_cpu(base, recipe))


@every_device
@every_kind
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_every_kind_of_update_is_that_of_the_cpu_on_several_tiles(device, make, dtype):
    base = gaussian(0, TWO_TILES).astype(storage(dtype))
    fold, _ = fold_of(base)
    assert fold.rows > tile_rows(fold)
    recipe = make(1, TWO_TILES)
    assert_near(folded(gpus(device), base, recipe), by_cpu(base, recipe))


@every_device
@pytest.mark.parametrize(("origin", "written"), PAIRS, ids=map("-".join, PAIRS))
@pytest.mark.parametrize("make", [plain, by_row, nothing])
def test_every_pair_of_dtypes_is_that_of_the_cpu(device, make, origin, written):
    base = (gaussian(0, SHAPE) / 2).astype(storage(origin))
    recipe = make(1, SHAPE)
    assert_near(folded(gpus(device), base, recipe, written), by_cpu(base, recipe, written))


@every_device
@pytest.mark.parametrize("rank", [1, 64, 1024])
def test_any_rank_is_that_of_the_cpu(device, rank):
    base = gaussian(0, (600, 800)).astype(ml_dtypes.bfloat16)
    recipe = plain(1, base.shape, rank=rank, scaling=1 / rank)
    assert_near(folded(gpus(device), base, recipe), by_cpu(base, recipe))


@every_device
@pytest.mark.parametrize("shape", [(6, 50, 70), (6, 900, 1000)], ids=str)
def test_stacked_experts_are_those_of_the_cpu(device, shape):
    base = gaussian(0, shape).astype(ml_dtypes.bfloat16)
    recipe = experts(1, (shape[0] * shape[1], shape[2]))
    ours = folded(gpus(device), base, recipe, leading=2)
    assert_near(ours, by_cpu(base, recipe, leading=2))


@every_device
@pytest.mark.parametrize("shape", [(), (1,), (5,), (0, 3), (3, 0), (2, 3, 4, 5)], ids=str)
def test_any_shape_can_be_folded(device, shape):
    base = np.asarray(gaussian(0, shape))
    recipe = plain(1, ((shape[0] if shape else 1), int(np.prod(shape[1:]))))
    assert_near(folded(gpus(device), base, recipe), by_cpu(base, recipe))


@every_device
@pytest.mark.parametrize("code", [c for c in BITS if BITS[c] >= 8])
def test_where_nothing_is_done_the_very_bytes_come_out(device, code):
    raw = np.random.default_rng(0).integers(0, 2 if code == "BOOL" else 256, 640, np.uint8)
    base = raw.view(storage(code)).reshape(-1, 4)
    assert folded(gpus(device), base, Recipe()).tobytes() == raw.tobytes()


@every_device
@every_kind
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F64"])
def test_figures_are_those_of_the_cpu(device, make, dtype):
    base = gaussian(0, SHAPE).astype(storage(dtype))
    recipe = make(1, SHAPE)
    written = "F32" if dtype == "F64" else dtype
    ours, theirs = (figures(e, base, recipe, written) for e in (gpus(device), Cpu()))
    assert ours == pytest.approx(theirs, rel=1e-4)


@every_device
@pytest.mark.parametrize(
    ("dtype", "large", "change"),
    [("F16", 60000, 10000), ("F8_E4M3", 448, 100), ("F8_E5M2", 57344, 20000), ("BF16", 3e38, 3e38)],
)
def test_numbers_that_outgrow_their_dtype_are_counted(device, dtype, large, change):
    base = np.ones((10, 10), storage(dtype))
    base[3, :4] = large
    base[7, 7] = -large
    base[9, :3] = (np.nan, 0, 1) if dtype == "F8_E4M3" else (np.inf, -np.inf, np.nan)
    low = low_rank(0, base.shape, rank=1, scaling=1.0)
    low.a[:], low.b[:] = 1, change
    recipe = Recipe(updates=(Added(low),))
    ours, theirs = (figures(e, base, recipe) for e in (gpus(device), Cpu()))
    assert ours.overflowed == theirs.overflowed == 4
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert_near(folded(gpus(device), base, recipe), by_cpu(base, recipe))


@every_device
@pytest.mark.parametrize(
    ("origin", "written", "large"),
    [("F32", "F16", 1e6), ("F64", "F32", 1e300), ("F64", "F16", 1e6), ("F32", "F8_E4M3", 1e3)],
)
def test_numbers_that_a_cast_cannot_hold_are_counted(device, origin, written, large):
    base = np.ones((10, 10), storage(origin))
    base[0, :3] = large, -large, np.inf
    found = figures(gpus(device), base, Recipe(), written)
    assert (found.overflowed, found.max_value) == (2, 1)


@every_device
@pytest.mark.parametrize("change", [1e25, 3e38])
def test_a_delta_whose_square_float32_cannot_hold_has_finite_figures(device, change):
    low = low_rank(0, (10, 10), rank=1, scaling=1.0)
    low.a[:], low.b[:] = 1, change
    found = figures(gpus(device), np.ones((10, 10), np.float32), Recipe(updates=(Added(low),)))
    assert found.retained == pytest.approx(1)
    assert np.isfinite(found).all()


@every_device
@pytest.mark.parametrize("make", [plain, several, by_row, by_column, experts, mixed])
def test_the_size_of_blocks_changes_no_byte(device, make):
    """Products are made tile by tile, however many tiles there are in a block."""
    shape = (2500, 4000)  # three tiles, none of them a whole number of experts
    base = gaussian(0, shape).astype(ml_dtypes.bfloat16)
    recipe = make(1, shape)
    found = [folded(gpus(device, tiles=n), base, recipe).tobytes() for n in (1, 2, 4)]
    assert len(set(found)) == 1


@pytest.mark.parametrize("cols", [1, 3, 333, 700, 4096, 4097, 70_001, 1 << 20])
def test_every_tile_begins_at_a_multiple_of_256_bytes_whatever_the_shape(cols):
    info = TensorInfo("w", "F32", (10_000, cols))
    rows = tile_rows(Fold(info, "base", info))
    assert (rows * cols * 4) % 256 == 0
    assert rows * cols <= max(1 << 22, 64 * cols)
