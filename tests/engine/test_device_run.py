"""A run on a device: the same bytes each time, the same journal, resumed by any other device."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import lorakit
from lorakit.engine.device import devices
from lorakit.engine.executor import Cpu
from lorakit.engine.gpu import Gpus
from lorakit.engine.room import Share
from lorakit.store.journal import JOURNAL, read_journal
from tests.bench import synthetic
from tests.engine.cases import Case, by_column, contents, gaussian, plain, read, save
from tests.engine.on_device import assert_near, every_device, gpus
from tests.engine.test_run import After, StoppedError

MIB = 1 << 20
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """Two files of 90 MB: weights of several blocks, a survey, casts, copies, an empty tensor."""
    folder = tmp_path_factory.mktemp("base")
    one = {
        "copied.first": gaussian(0, (700, 900)),
        "folded.many_blocks": gaussian(1, (9000, 1100), ml_dtypes.bfloat16),
        "folded.half": gaussian(2, (900, 800), np.float16),
        "copied.bytes": np.arange(1000, dtype=np.uint8),
        "folded.by_column": gaussian(3, (7000, 700), ml_dtypes.bfloat16),
        "copied.none": np.zeros((0, 5), np.int64),
    }
    two = {
        "folded.byte": gaussian(4, (500, 700), ml_dtypes.float8_e4m3fn),
        "folded.cast": gaussian(6, (800, 900)),
        "folded.last": gaussian(7, (3000, 1000), ml_dtypes.bfloat16),
    }
    shapes = {n: a.shape for tensors in (one, two) for n, a in tensors.items()}
    recipes = {n: plain(8, s) for n, s in shapes.items() if n.startswith("folded")}
    recipes["folded.by_column"] = by_column(9, shapes["folded.by_column"])
    del recipes["folded.cast"]
    named = {"one": one, "two": two}
    files = [save(folder / f"{n}.safetensors", t, format="pt") for n, t in named.items()]
    return Case(files, recipes, {"folded.cast": "BF16", "folded.half": "BF16"})


@pytest.fixture(scope="module")
def by_cpu(case, tmp_path_factory):
    """What the CPU makes of it."""
    out = tmp_path_factory.mktemp("cpu") / "out"
    done = case.run(out)
    return out, done


@pytest.fixture(scope="module")
def expected(case, tmp_path_factory):
    """What a run on a device makes of it that nothing disturbs: its folder and what it said."""
    found = {}

    def once(device: str):
        if device not in found:
            out = tmp_path_factory.mktemp("expected") / "out"
            found[device] = out, case.run(out, executor=gpus(device), jobs=2)
        return found[device]

    return once


def assert_agree(ours: Path, theirs: Path) -> None:
    """Two outputs are the same but for the rare last bit of what was folded."""
    assert sorted(contents(ours)) == sorted(contents(theirs))
    for path in ours.glob("*.safetensors"):
        right = read(theirs / path.name)
        for name, array in read(path).items():
            if name.startswith("folded"):
                assert_near(array, right[name])
            else:
                assert array.tobytes() == right[name].tobytes()


@every_device
def test_a_run_on_a_device_is_that_of_the_cpu(case, by_cpu, expected, device):
    out, done = expected(device)
    assert_agree(out, by_cpu[0])
    (name,) = {d.name for d in devices(device)}
    for file, theirs in by_cpu[1].items():
        assert (done[file].devices, theirs.devices) == ((name,), ("cpu",))
        for tensor, figures in done[file].figures.items():
            right = theirs.figures[tensor]
            assert figures == pytest.approx(right, rel=1e-4), tensor


@every_device
@pytest.mark.parametrize(("jobs", "tiles", "lanes"), [(1, 1, 1), (2, 2, 1), (5, 4, 4), (3, 1, 2)])
def test_workers_blocks_and_lanes_change_no_byte_and_no_figure(
    case, expected, tmp_path, device, jobs, tiles, lanes
):
    out, done = expected(device)
    executor = gpus(device, jobs=jobs, tiles=tiles, lanes=lanes)
    assert case.run(tmp_path / "out", executor=executor, jobs=jobs) == done
    assert contents(tmp_path / "out") == contents(out)


@every_device
def test_blocks_go_to_several_devices_in_turn_and_no_byte_changes(case, expected, tmp_path, device):
    """The same device by several names, so that there are always enough."""
    out, done = expected(device)
    there = [devices(device)[0] for _ in range(3)]
    for number, one in enumerate(there):
        one.place = f"{one.place}, {number}"
    executor = Gpus(there, Share(2, 1, 2))
    assert case.run(tmp_path / "out", executor=executor, jobs=2) == done
    assert contents(tmp_path / "out") == contents(out)


def interrupt(case: Case, out: Path, share: float, **options) -> None:
    with pytest.raises(StoppedError):
        case.run(out, report=After(int(share * case.plan.nbytes)), checkpoint=MIB, **options)
    assert not out.exists()


@every_device
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9])
def test_a_run_that_was_interrupted_goes_on_with_the_same_bytes(
    case, expected, tmp_path, device, share
):
    out, done = expected(device)
    interrupt(case, tmp_path / "out", share, executor=gpus(device))
    assert case.run(tmp_path / "out", executor=gpus(device, tiles=1), checkpoint=MIB) == done
    assert contents(tmp_path / "out") == contents(out)


@every_device
@pytest.mark.parametrize("share", [0.6, 0.8, 0.95])
@pytest.mark.parametrize("cpu_first", [True, False], ids=["cpu first", "device first"])
def test_a_run_goes_on_where_another_device_stopped(
    case, by_cpu, tmp_path, device, share, cpu_first
):
    first, second = (Cpu(), gpus(device)) if cpu_first else (gpus(device), Cpu())
    interrupt(case, tmp_path / "out", share, executor=first, jobs=1)
    steps = sum(r.get("steps", 0) for r in read_journal(tmp_path / "out.partial" / JOURNAL))
    assert steps
    done = case.run(tmp_path / "out", executor=second, jobs=1, checkpoint=MIB)
    assert_agree(tmp_path / "out", by_cpu[0])
    names = {name for d in done.values() for name in d.devices}
    assert names == {first.name, second.name}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base of 40 MB in two shards and an adapter of every linear layer."""
    folder = tmp_path_factory.mktemp("inputs")
    model = synthetic.Model(0, hidden=512, vocabulary=9000, layers=6)
    tensors = synthetic.base(folder / "base", model, 2)
    synthetic.adapter(folder / "all", tensors, "embed", 16)
    return folder


KILLED = """
    import os, signal, sys
    import lorakit
    from functools import partial
    from pathlib import Path
    from lorakit.engine import run as engine
    from lorakit.store.journal import JOURNAL, read_journal

    engine.Run = partial(engine.Run, checkpoint=1 << 20)
    journal, done = Path("out.partial", JOURNAL), 0

    def report(nbytes):
        global done
        done += nbytes
        if done > int(sys.argv[2]):
            while not any(line.get("figures") for line in read_journal(journal)):
                os.sched_yield()  # the journal is written behind what is done
            os.kill(os.getpid(), signal.SIGKILL)

    run = lorakit.RunOptions(device=sys.argv[1], jobs=2, report=report)
    lorakit.merge("base", "all", "out", run=run)
"""


@every_device
@pytest.mark.parametrize("share", [0.4, 0.8])
@pytest.mark.parametrize("cpu_first", [True, False], ids=["cpu first", "device first"])
def test_a_killed_merge_goes_on_on_another_device_and_is_verified(
    inputs, device, share, cpu_first, tmp_path
):
    pytest.importorskip("torch")
    for name in ("base", "all"):
        (tmp_path / name).symlink_to(inputs / name)
    first, second = ("cpu", device) if cpu_first else (device, "cpu")
    size = sum(p.stat().st_size for p in (inputs / "base").glob("*.safetensors"))
    command = [sys.executable, "-c", textwrap.dedent(KILLED), first, str(int(share * size))]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, timeout=120)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    assert (tmp_path / "out.partial" / JOURNAL).exists()
    run = lorakit.RunOptions(device=second, sync=False)
    report = lorakit.merge(tmp_path / "base", tmp_path / "all", tmp_path / "out", run=run)
    found = lorakit.verify(tmp_path / "out", full=True)
    assert found.wrong_rounded <= 1e-3 * found.checked_numbers
    manifest = json.loads((tmp_path / "out" / "lorakit.json").read_text())
    assert manifest["devices"] == list(report.devices)
    assert len(report.devices) == 2


@every_device
def test_a_merge_in_memory_is_that_of_the_cpu(inputs, device):
    torch = pytest.importorskip("torch")
    shards = (read(path) for path in sorted((inputs / "base").glob("*.safetensors")))
    base = {n: a for shard in shards for n, a in shard.items()}
    run = lorakit.RunOptions(device=device)
    ours = lorakit.merge(base, inputs / "all", run=run)
    theirs = lorakit.merge(base, inputs / "all")
    assert list(ours) == list(theirs)
    for name, array in ours.items():
        assert_near(array, theirs[name])
    half = {n: torch.from_numpy(a.astype(np.float16)) for n, a in base.items()}
    merged = lorakit.merge(half, inputs / "all", run=run)
    assert {t.dtype for t in merged.values()} == {torch.float16}


def test_the_plan_and_so_its_hash_knows_nothing_of_the_device(inputs, tmp_path):
    pytest.importorskip("torch")
    reports = [
        lorakit.merge(
            inputs / "base",
            inputs / "all",
            tmp_path / device.replace(":", "-"),
            run=lorakit.RunOptions(device=device, sync=False),
        )
        for device in ("cpu", "torch:cpu")
    ]
    assert reports[0].plan == reports[1].plan
    assert [r.devices for r in reports] == [("cpu",), ("torch:cpu",)]
