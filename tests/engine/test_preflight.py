"""Whether there is room is asked before anything is written."""

import shutil
import tracemalloc

import numpy as np
import pytest

from lorakit.engine.executor import CpuLane, fold_whole
from lorakit.engine.fold import blocks_of
from lorakit.engine.layout import Output, lay_out
from lorakit.engine.plan import BLOCK, Plan
from lorakit.engine.preflight import (
    check_disk,
    fitting_jobs,
    peak_memory,
    size,
)
from lorakit.engine.tasks import Opened
from lorakit.errors import ResourceError
from lorakit.math.cast import storage
from lorakit.tensors import TensorInfo
from tests.engine.cases import Case, by_column, plain, save


def plan_of(shape=(4096, 4096), dtype="BF16", written="", nbytes=0, whole=False) -> Plan:
    info = TensorInfo("w", dtype, shape)
    placed = TensorInfo("w", written or dtype, shape)
    out = Output(placed, "base", info, {"updates": [], "nbytes": nbytes}, whole)
    return Plan("test", [], {}, [lay_out("model.safetensors", [out], None, link=False)])


def test_as_many_workers_run_as_memory_allows():
    plan = plan_of()
    for jobs in (1, 2, 5):
        assert fitting_jobs(plan, 8, peak_memory(plan, jobs)) == jobs
    assert fitting_jobs(plan, 8, 1 << 40) == 8


def test_too_little_memory_for_one_worker_is_refused():
    plan = plan_of()
    with pytest.raises(ResourceError, match=r"needs .* of memory, .* are allowed") as caught:
        fitting_jobs(plan, 8, peak_memory(plan, 1) - 1)
    assert caught.value.exit_code == 5
    assert "--max-memory" in caught.value.hint


def test_more_memory_than_the_machine_has_is_refused():
    row = plan_of(shape=(1, 1 << 45))  # a row is the least that can be folded
    with pytest.raises(ResourceError, match="are available"):
        fitting_jobs(row, 1, None)


def test_memory_does_not_grow_with_the_tensor():
    assert peak_memory(plan_of((1 << 20, 4096)), 4) == peak_memory(plan_of((4096, 4096)), 4)
    assert peak_memory(plan_of(), 4) < 150 << 20


def test_memory_grows_with_rows_factors_dtypes_and_surveys():
    least = peak_memory(plan_of(), 1)
    for more in (
        plan_of((10, 4 * BLOCK)),
        plan_of(nbytes=1 << 20),
        plan_of(written="F32"),
        plan_of(whole=True),
    ):
        assert peak_memory(more, 1) > least


def test_a_plan_of_copies_needs_next_to_nothing():
    copies = Plan("test", [], {}, [])
    assert fitting_jobs(copies, 64, 100 << 20) == 64


def test_an_output_larger_than_the_disk_is_refused_with_both_figures(tmp_path):
    plan = plan_of((1 << 25, 1 << 25))
    with pytest.raises(ResourceError, match=r"needs 2251800 GB of disk, .* are free") as caught:
        check_disk(plan, tmp_path / "deep" / "out", 0)
    assert caught.value.exit_code == 5
    assert caught.value.file == str(tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_what_an_earlier_run_wrote_is_not_needed_again(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    plan = plan_of((free // 2 + (100 << 20), 1))  # a little more than is free
    with pytest.raises(ResourceError):
        check_disk(plan, tmp_path / "out", 0)
    check_disk(plan, tmp_path / "out", 0, there=4 << 30)
    with pytest.raises(ResourceError):
        check_disk(plan, tmp_path / "out", 8 << 30, there=4 << 30)


def test_the_disk_is_asked_on_which_the_output_is_built_whatever_is_there_now(tmp_path):
    (tmp_path / "out").symlink_to("/proc")  # which has no room at all
    check_disk(plan_of((8, 8)), tmp_path / "out", 0)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (640e6, "640 MB"),
        (1.5e9, "1.50 GB"),
        (2e11, "200 GB"),
    ],
)
def test_sizes_are_written_for_people(nbytes, text):
    assert size(nbytes) == text


@pytest.mark.parametrize(("dtype", "written"), [("BF16", "BF16"), ("F16", "F32"), ("F16", "F64")])
@pytest.mark.parametrize("make", [plain, by_column])
@pytest.mark.parametrize("shape", [(50, 20_000), (1000, 600)])
def test_the_memory_that_is_planned_is_enough(tmp_path, dtype, written, make, shape):
    """What one worker allocates, as Python and NumPy account for it."""
    file = save(tmp_path / "base.safetensors", {"w": np.zeros(shape, storage(dtype))})
    case = Case([file], {"w": make(0, shape)}, {"w": written})
    (fold,) = case.plan.folds
    recipe = case.open_recipe(fold)
    opened = Opened(fold, lambda _: recipe, len(list(blocks_of(fold))))
    fold_whole(fold, recipe, file)  # what is made once and kept
    tracemalloc.start()
    lane = CpuLane()
    opened.settle(file, lane, list(blocks_of(fold)))
    for rows in blocks_of(fold):
        lane.fold(fold, opened.recipe(lane), file, rows)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak <= peak_memory(case.plan, 1) - peak_memory(Plan("test", [], {}, []), 1)
