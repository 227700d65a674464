"""The same bytes whatever the number of workers, the memory or the interruptions."""

import hashlib
import json
import os
import shutil
import threading
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import lorakit
from lorakit.engine.executor import Inputs
from lorakit.engine.layout import lay_out
from lorakit.engine.plan import Plan
from lorakit.engine.preflight import peak_memory
from lorakit.engine.run import Run
from lorakit.errors import InputError, OutputError
from lorakit.math.recipe import Recipe
from lorakit.store.journal import JOURNAL, read_journal
from lorakit.store.memory import MemorySource
from lorakit.store.workspace import Workspace
from tests.engine.cases import Case, by_column, contents, gaussian, plain, read, save

MIB = 1 << 20


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Three files of 28 MB: many blocks, a survey, casts, copies, odd dtypes, an empty tensor."""
    folder = tmp_path_factory.mktemp("base")
    one = {
        "copied.first": gaussian(0, (700, 900)),
        "folded.many_blocks": gaussian(1, (3000, 700)),
        "folded.half": gaussian(2, (900, 800), np.float16),
        "copied.bytes": np.arange(1000, dtype=np.uint8),
        "folded.by_column": gaussian(3, (2100, 600), ml_dtypes.bfloat16),
        "copied.none": np.zeros((0, 5), np.int64),
        "folded.byte": gaussian(4, (500, 700), ml_dtypes.float8_e4m3fn),
    }
    two = {"copied.only": gaussian(5, (900, 1000)), "copied.scalar": np.array(3)}
    three = {
        "folded.cast": gaussian(6, (800, 900)),
        "folded.double": gaussian(7, (300, 400), np.float64),
    }
    named = {"one": one, "two": two, "three": three}
    shapes = {n: a.shape for tensors in named.values() for n, a in tensors.items()}
    recipes = {n: plain(8, s) for n, s in shapes.items() if n.startswith("folded")}
    recipes["folded.by_column"] = by_column(9, shapes["folded.by_column"])
    del recipes["folded.cast"]
    files = [save(folder / f"{n}.safetensors", t, format="pt") for n, t in named.items()]
    return Case(files, recipes, {"folded.cast": "BF16", "folded.half": "F32"})


@pytest.fixture(scope="module")
def expected(case, tmp_path_factory):
    """The output of a run that nothing disturbed, and what it said."""
    out = tmp_path_factory.mktemp("expected") / "out"
    done = case.run(out, jobs=1)
    return contents(out), done


def test_what_is_copied_is_the_same_and_what_is_folded_is_not(case, expected, tmp_path):
    case.run(tmp_path / "out")
    for file in case.files:
        before, after = read(file.path), read(tmp_path / "out" / file.name)
        assert list(before) == list(after)
        for name, array in before.items():
            same = array.tobytes() == after[name].tobytes()
            assert same == name.startswith("copied")


@pytest.mark.parametrize("jobs", [1, 2, 4, 13])
def test_the_number_of_workers_changes_no_byte_and_no_figure(case, expected, tmp_path, jobs):
    done = case.run(tmp_path / "out", jobs=jobs)
    assert contents(tmp_path / "out") == expected[0]
    assert done == expected[1]


@pytest.mark.parametrize("options", [{"sync": True}, {"checkpoint": MIB}, {"checkpoint": 1}])
def test_how_durable_a_run_is_changes_no_byte(case, expected, tmp_path, options):
    assert case.run(tmp_path / "out", **options) == expected[1]
    assert contents(tmp_path / "out") == expected[0]


def test_a_checksum_is_that_of_the_file(case, expected, tmp_path):
    done = case.run(tmp_path / "out", checksum=True)
    for name, data in expected[0].items():
        assert done[name].sha256 == hashlib.sha256(data).hexdigest()


def test_memory_changes_the_number_of_workers_and_no_byte(tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    save(base / "model.safetensors", {"layer.q_proj.weight": gaussian(0, (2500, 400))})
    module = "base_model.model.layer.q_proj"
    factors = {"A": gaussian(1, (4, 400)), "B": gaussian(2, (2500, 4))}
    factors = {f"{module}.lora_{k}.weight": v for k, v in factors.items()}
    save(adapter / "adapter_model.safetensors", factors)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    plan = lorakit.plan_merge(base, adapter).plan
    found = []
    for limit in (peak_memory(plan, 1), peak_memory(plan, 3), None):
        out = tmp_path / f"out{limit}"
        run = lorakit.RunOptions(jobs=4, max_memory=limit, sync=False)
        lorakit.merge(base, adapter, out, run=run)
        found.append(contents(out))
    assert found[0] == found[1] == found[2]


class StoppedError(Exception):
    pass


class After:
    """A report that stops the run once so many bytes are written."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.calls: list[int] = []
        self._lock = threading.Lock()

    def __call__(self, nbytes: int) -> None:
        with self._lock:
            self.calls.append(nbytes)
            if sum(self.calls) > self.limit:
                raise StoppedError


def interrupt(case: Case, out: Path, limit: int, **options) -> None:
    with pytest.raises(StoppedError):
        case.run(out, report=After(limit), **options)
    assert not out.exists()


def journal(out: Path) -> list[dict]:
    return read_journal(out.with_name(out.name + ".partial") / JOURNAL)


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.45, 0.6, 0.8, 0.97])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    case, expected, tmp_path, share, jobs
):
    out = tmp_path / "out"
    interrupt(case, out, int(share * case.plan.nbytes), jobs=jobs, checkpoint=MIB)
    assert case.run(out, jobs=jobs) == expected[1]
    assert contents(out) == expected[0]


def test_a_run_interrupted_again_and_again_ends_with_the_same_bytes(case, expected, tmp_path):
    out = tmp_path / "out"
    limits = range(0, case.plan.nbytes - MIB, 3 * MIB)
    for limit in limits:  # what is taken over is reported too
        interrupt(case, out, limit, checkpoint=MIB)
    case.run(out)
    assert contents(out) == expected[0]


def done_bytes(case: Case, out: Path) -> int:
    """What the journal says is done: whole files, and the first steps of others."""
    files = {f.name: f for f in case.plan.files}
    last = {r["file"]: r for r in journal(out) if "file" in r}
    return sum(
        files[n].size if "done" in r else sum(s.nbytes for s in files[n].steps[: r["steps"]])
        for n, r in last.items()
    )


@pytest.mark.parametrize("share", [0.3, 0.6, 0.97])
def test_what_is_done_is_not_done_again(case, tmp_path, share):
    """The second run begins with what the journal has, and writes the rest only."""
    out = tmp_path / "out"
    interrupt(case, out, int(share * case.plan.nbytes), jobs=1, checkpoint=1)
    already = done_bytes(case, out)
    report = After(1 << 62)
    done = case.run(out, jobs=1, report=report, checkpoint=1)
    headers = sum(len(f.header) for f in case.plan.files if not done[f.name].figures)
    steps = sum(s.nbytes for f in case.plan.files for s in f.steps)
    assert steps <= sum(report.calls) <= steps + headers + 3 * 4096
    assert already in accumulate([0, *report.calls])


def test_a_file_that_lost_its_partial_is_never_resumed_as_zeros(case, expected, tmp_path):
    """The journal says that steps are done; the file is made anew; a second kill; a third run."""
    out = tmp_path / "out"
    interrupt(case, out, 15 * MIB, jobs=1, checkpoint=1)
    assert journal(out)[-1]["steps"] > 1
    (tmp_path / "out.partial" / "one.safetensors.partial").unlink()
    interrupt(case, out, 0, jobs=1, checkpoint=MIB)
    assert (tmp_path / "out.partial" / "one.safetensors.partial").stat().st_size
    case.run(out)
    assert contents(out) == expected[0]


def test_what_was_not_synced_is_not_relied_on_after_the_machine_went_down(case, expected, tmp_path):
    out = tmp_path / "out"
    case.run(out, commit=False)
    records = [r | ({"boot": "before"} if "boot" in r else {}) for r in journal(out)]
    assert {r.get("boot") for r in records[1:]} == {"before"}
    folder = tmp_path / "out.partial"
    (folder / JOURNAL).write_text("".join(json.dumps(r) + "\n" for r in records))
    for path in folder.glob("*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))  # the power went before the data was on disk
    case.run(out)
    assert contents(out) == expected[0]


def test_what_was_synced_is_relied_on_after_the_machine_went_down(case, expected, tmp_path):
    out = tmp_path / "out"
    case.run(out, commit=False, sync=True)
    assert not any("boot" in r for r in journal(out))
    report = After(1 << 62)
    case.run(out, report=report)
    assert sorted(report.calls) == sorted(f.size for f in case.plan.files)  # in any order
    assert contents(out) == expected[0]


def test_a_durable_run_takes_over_what_another_left_undurable_and_unhashed(
    case, expected, tmp_path
):
    out = tmp_path / "out"
    case.run(out, commit=False)
    done = case.run(out, sync=True, checksum=True)
    for name, data in expected[0].items():
        assert done[name].sha256 == hashlib.sha256(data).hexdigest()
        assert done[name].figures == expected[1][name].figures


def test_a_journal_that_lost_its_last_lines_costs_time_only(case, expected, tmp_path):
    """Each time the same unfinished run: lines of a later one, which may have begun a file anew,
    are durable before that file is there, so they are never lost while it stays.
    """
    interrupt(case, tmp_path / "out", 18 * MIB, jobs=1, checkpoint=1)
    begun = tmp_path / "out.partial"
    for length in range((begun / JOURNAL).stat().st_size, 300, -700):
        out = tmp_path / str(length)
        partial = shutil.copytree(begun, tmp_path / f"{length}.partial")
        os.truncate(partial / JOURNAL, length)
        case.run(out, jobs=2, checkpoint=MIB)
        assert contents(out) == expected[0]


def test_an_error_in_one_worker_stops_them_all_and_is_raised(case, tmp_path):
    files = [replace_file(case, tmp_path, "one.safetensors")]
    broken = replace(case, files=files)
    assert broken.plan.files  # made while the file is whole
    os.truncate(files[0].path, 5000)
    before = threading.active_count()
    with pytest.raises(InputError, match="ended at byte") as caught:
        broken.run(tmp_path / "out", jobs=4)
    assert caught.value.file == str(files[0].path)
    assert threading.active_count() == before
    assert (tmp_path / "out.partial").is_dir()


def replace_file(case: Case, folder: Path, name: str):
    """A copy of one of the case's files, already open."""
    source = next(f for f in case.files if f.name == name)
    (folder / name).write_bytes(source.path.read_bytes())
    copy = type(source)(folder / name)
    assert copy.fd >= 0
    return copy


def test_an_error_of_the_finisher_is_raised(case, tmp_path):
    """A folder stands where the finished file should get its name."""
    space = Workspace(tmp_path / "out", {"plan": case.plan.hash})
    (space.folder / "two.safetensors").mkdir()
    sources = {f.name: f for f in case.files}
    with pytest.raises(OutputError, match=r"two\.safetensors: cannot be written"):
        Run(case.plan, Inputs(sources, case.open_recipe), space, sync=False).run(2)
    space.release()


def test_a_recipe_that_cannot_be_opened_stops_the_run(case, tmp_path):
    def open_recipe(fold):
        raise InputError("the adapter is gone.", file="adapter")

    space = Workspace(tmp_path / "out", {"plan": case.plan.hash})
    sources = {f.name: f for f in case.files}
    with pytest.raises(InputError, match="the adapter is gone"):
        Run(case.plan, Inputs(sources, open_recipe), space, sync=False).run(3)
    space.release()


def test_descriptors_are_given_back(case, tmp_path):
    case.run(tmp_path / "first")  # the sources are open from here on
    before = len(os.listdir("/proc/self/fd"))
    interrupt(case, tmp_path / "out", 10 * MIB)
    case.run(tmp_path / "out")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_file_in_which_nothing_changes_is_linked_on_request(case, tmp_path):
    linked = replace(case, link=True)
    done = linked.run(tmp_path / "out", checksum=True)
    source = next(f for f in case.files if f.name == "two.safetensors")
    target = tmp_path / "out" / "two.safetensors"
    assert target.samefile(source.path)
    assert not (tmp_path / "out" / "one.safetensors").samefile(case.files[0].path)
    assert done["two.safetensors"].sha256 == hashlib.sha256(target.read_bytes()).hexdigest()
    size = sum(len(f.header) + sum(s.nbytes for s in f.steps) for f in linked.plan.files)
    assert linked.plan.nbytes == size - target.stat().st_size


def test_an_interrupted_run_with_links_goes_on(case, expected, tmp_path):
    linked = replace(case, link=True)
    interrupt(linked, tmp_path / "out", 15 * MIB)
    linked.run(tmp_path / "out")
    assert contents(tmp_path / "out") == expected[0]


def test_tensors_in_memory_are_written_as_they_are(tmp_path):
    """What a pickle holds: it has no places on disk, so nothing of it can be copied."""
    tensors = {
        "ids": np.arange(1000),
        "mask": np.array([True, False]),
        "weight": gaussian(0, (600, 1000), np.float16),
        "scalar": np.array(7, np.int32),
    }
    source = MemorySource(tensors, name="pytorch_model.bin")
    case = Case([])
    outs = [replace(case.output(source, i), source="bin") for i in source.infos.values()]
    plan = Plan("test", [], {}, [lay_out("model.safetensors", outs, None, link=False)])
    space = Workspace(tmp_path / "out", {"plan": plan.hash})
    Run(plan, Inputs({"bin": source}, lambda _: Recipe()), space, sync=False).run(2)
    space.commit(sync=False)
    found = read(tmp_path / "out" / "model.safetensors")
    assert {n: (a.dtype, a.tobytes()) for n, a in found.items()} == {
        n: (a.dtype, a.tobytes()) for n, a in tensors.items()
    }


def test_a_plan_without_files_or_tensors_is_run_too(tmp_path):
    empty = save(tmp_path / "empty.safetensors", {})
    assert Case([empty]).run(tmp_path / "out")["empty.safetensors"].figures == {}
    assert contents(tmp_path / "out") == {"empty.safetensors": empty.header}
