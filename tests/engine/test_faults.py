"""A short version of tests/faults: kills, failing writes and full disks, a few of each."""

import errno
import re
import signal

import pytest

from tests.faults import failing_writes, full_disk, kill
from tests.faults.forks import Forks
from tests.faults.scene import Scene, check_said, make

MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base of 29 MB in four shards, and two adapters."""
    return make(tmp_path_factory.mktemp("scene"), full_disk.MODEL)


@pytest.fixture(scope="module")
def scene(folder):
    """A merge with the usual options."""
    return Scene(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Scenes of a third of a megabyte, between which and the system there is a library."""
    tmp = tmp_path_factory.mktemp("small")
    library = failing_writes.compiled(tmp)
    if library is None:
        pytest.skip("no C compiler")
    with Forks(LD_PRELOAD=str(library)) as forks:
        yield failing_writes.scenes(tmp, forks) | failing_writes.others(tmp, forks)


@pytest.mark.parametrize("options", [(), ("--no-fsync",)], ids=["durable", "no-fsync"])
def test_a_killed_merge_that_is_run_again_ends_as_if_nothing_had_happened(folder, options):
    scene = Scene(folder, options, checkpoint=MIB)
    first, last = 0.7 * kill.seconds(scene, "--dry-run"), kill.seconds(scene)
    for share in (0.15, 0.45, 0.7, 0.9):
        scene.clear()
        kill.kill_after(scene, first + share * (last - first))
        scene.go_on()


def test_an_interrupted_merge_ends_with_130_and_goes_on(scene):
    assert scene.expected
    scene.clear()
    with full_disk.begun(scene, 1) as child:
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=30)
    assert child.returncode == 130
    assert said.strip() == "Interrupted. The same command goes on where it stopped."
    assert scene.check_disturbed() == "partial"
    scene.go_on()


@pytest.mark.parametrize("way", ["killed half-way", "ENOSPC from there on", "EIO"])
@pytest.mark.parametrize("name", ["durable", "one file, --overwrite"])
def test_any_operation_may_be_the_last_or_fail(small, name, way):
    count = len(failing_writes.operations(small[name]))
    for number in range(1, count + 1, count // 6):
        failing_writes.disturb(small[name], number, failing_writes.WAYS[way])


@pytest.mark.parametrize("lacks", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("name", ["durable", "in a new folder", "one file, --overwrite"])
def test_a_file_system_may_lack_what_is_not_needed(small, name, lacks):
    """Space that is reserved, locks, syncs of folders, copies in the kernel."""
    scene = small[name]
    assert scene.expected
    scene.clear()
    code, said = scene.run(FAULT_DIR=str(scene.place), FAULT_LACKS=str(lacks))
    assert (code, said) == (0, "")
    scene.check_complete()


@pytest.mark.parametrize("name", failing_writes.OTHERS)
def test_any_command_may_be_killed_once_a_name_is_given(small, name):
    operations = failing_writes.operations(small[name])
    for number, operation in enumerate(operations, 1):
        if operation.name == "rename":
            failing_writes.disturb(small[name], number + 1, failing_writes.WAYS["killed before"])


@pytest.mark.parametrize("name", ["durable", "in a new folder", *failing_writes.OTHERS])
def test_nothing_gets_its_name_before_it_is_durable(small, name):
    """Every file and every folder is synced after its last change and before it is renamed."""
    unsynced: set[str] = set()
    place = str(small[name].place)
    for operation in failing_writes.operations(small[name]):
        path, folder = operation.path, operation.path.rpartition("/")[0]
        if operation.name in ("fsync", "fdatasync"):
            unsynced.discard(path)
        elif operation.name == "rename":
            assert path not in unsynced
            inside = {p for p in unsynced if p.startswith(f"{path}/")}
            assert all(p.endswith("/.lorakit-journal") for p in inside)
            unsynced.add(operation.to.rpartition("/")[0])
        elif operation.name in ("create", "mkdir"):
            unsynced |= {path, folder}
        elif "write" in operation.name:
            unsynced.add(path)
    assert place not in unsynced


@pytest.mark.parametrize("name", ["in a new folder", "merge into a pipeline", "loftq"])
def test_a_folder_that_cannot_be_made_is_one_line(small, name):
    for number, operation in enumerate(failing_writes.operations(small[name]), 1):
        if operation.name == "mkdir":
            failing_writes.disturb(small[name], number, failing_writes.WAYS["ENOSPC"])


def test_the_index_and_the_config_come_last(small):
    renames = [o.to for o in failing_writes.operations(small["durable"]) if o.name == "rename"]
    names = [to.rpartition("/")[2] for to in renames]
    assert all(n.endswith(".safetensors") for n in names[:4])
    assert names[-3:] == ["model.safetensors.index.json", "config.json", "out"]


def test_a_disk_too_small_is_refused_before_anything_is_written(scene):
    try:
        said = full_disk.refused(scene, 16 * MIB)
    except PermissionError as e:
        pytest.skip(str(e))
    assert re.search(r"needs [\d.]+ MB of disk, 16\.8 MB are free", said)


def test_a_disk_that_fills_up_costs_nothing_but_time(scene):
    try:
        full_disk.filled(scene, shard=2)
    except PermissionError as e:
        pytest.skip(str(e))


def test_a_limit_on_file_sizes_costs_nothing_but_time(scene):
    assert "ulimit -f" in full_disk.limited(scene, 5 * MIB)


def test_a_second_merge_into_the_same_output_is_refused(scene):
    assert scene.expected
    scene.clear()
    with full_disk.begun(scene, 1) as child:
        child.send_signal(signal.SIGSTOP)
        code, said = scene.run()
        child.send_signal(signal.SIGCONT)
        child.communicate(timeout=60)
    check_said(code, said, [7])
    assert "another process is writing this output" in said
    assert child.returncode == 0
    scene.check_complete()
