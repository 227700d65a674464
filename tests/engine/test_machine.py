"""What a run may take is what the machine has, within the limits of its control groups."""

import os
from pathlib import Path

import pytest

from lorakit.engine.machine import available_cores, available_memory

GIB = 1 << 30
UNLIMITED = 9223372036854771712  # what the first version writes where there is no limit
CORES = len(os.sched_getaffinity(0))


def machine(root: Path, groups: str, files: dict[str, object]) -> Path:
    """A root with 8 GiB free and these control groups."""
    put(root / "proc/meminfo", f"MemTotal: {16 << 20} kB\nMemAvailable: {8 << 20} kB\n")
    put(root / "proc/self/cgroup", groups)
    for name, value in files.items():
        put(root / "sys/fs/cgroup" / name, f"{value}\n")
    return root


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def stat(active: int, inactive: int, prefix: str = "") -> str:
    return f"anon 5\nactive_file 0\ninactive_file 0\n{prefix}active_file {active}\n" + (
        f"{prefix}inactive_file {inactive}"
    )


def test_this_machine_has_some() -> None:
    assert 0 < available_memory() < 1 << 50
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


def test_without_groups_it_is_all_that_is_free(tmp_path: Path) -> None:
    root = machine(tmp_path, "0::/\n", {})
    assert available_memory(root) == 8 * GIB
    assert available_cores(root) == CORES
    (root / "proc/self/cgroup").unlink()
    assert available_memory(root) == 8 * GIB


def test_the_second_version_gives_back_pages_of_files(tmp_path: Path) -> None:
    files = {
        "job/memory.max": 3 * GIB,
        "job/memory.current": 2 * GIB,
        "job/memory.stat": stat(GIB // 2, GIB // 4),
        "job/cpu.max": "50000 100000",
    }
    root = machine(tmp_path, "0::/job\n", files)
    assert available_memory(root) == GIB + 3 * GIB // 4
    assert available_cores(root) == 1


@pytest.mark.parametrize("above", [1, 2])
def test_a_group_is_bound_by_those_above_it(tmp_path: Path, above: int) -> None:
    files = {
        "pod/memory.max": above * GIB,
        "pod/memory.current": 0,
        "pod/memory.stat": stat(0, 0),
        "pod/job/memory.max": "max",
        "pod/job/memory.current": 0,
        "pod/job/memory.stat": stat(0, 0),
        "pod/job/cpu.max": "max 100000",
    }
    root = machine(tmp_path, "0::/pod/job\n", files)
    assert available_memory(root) == above * GIB
    assert available_cores(root) == CORES


def test_a_group_over_its_limit_leaves_nothing(tmp_path: Path) -> None:
    files = {"memory.max": GIB, "memory.current": 2 * GIB, "memory.stat": stat(0, 0)}
    assert available_memory(machine(tmp_path, "0::/\n", files)) == 0


def test_the_first_version_has_a_tree_for_each_controller(tmp_path: Path) -> None:
    """As in a container: the path is that of the world outside, what is mounted is the group."""
    files = {
        "memory/memory.limit_in_bytes": 2 * GIB,
        "memory/memory.usage_in_bytes": GIB,
        "memory/memory.stat": stat(GIB // 2, 0, "total_"),
        "cpu/cpu.cfs_quota_us": 100_000,
        "cpu/cpu.cfs_period_us": 100_000,
    }
    groups = "4:memory:/docker/45bb\n3:cpu,cpuacct:/docker/45bb\n0::/\n"
    root = machine(tmp_path, groups, files)
    assert available_memory(root) == GIB + GIB // 2
    assert available_cores(root) == 1


def test_the_first_version_without_limits(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": UNLIMITED,
        "memory/memory.usage_in_bytes": GIB,
        "memory/memory.stat": stat(0, 0, "total_"),
        "cpu/cpu.cfs_quota_us": -1,
        "cpu/cpu.cfs_period_us": 100_000,
    }
    root = machine(tmp_path, "4:memory:/\n3:cpu:/\n0::/\n", files)
    assert available_memory(root) == 8 * GIB
    assert available_cores(root) == CORES
