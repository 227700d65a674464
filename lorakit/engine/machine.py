"""What of the machine a run may take: memory and cores, within the limits of the control groups
that containers and schedulers put a process in.

Both versions of control groups are read (cgroups(7)): in the second all limits of a group lie in
one folder, in the first each controller has a tree of its own. A group is bound by those above it.
"""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

ROOT = Path("/")


def available_memory(root: Path = ROOT) -> int:
    """Bytes of memory that new work can take without swapping, and without being killed for it."""
    found = [_free_memory(root)]
    for folder in _groups(root, "memory"):
        with suppress(OSError, ValueError):  # another version's group, or one without a limit
            found.append(_room(folder))
    return max(0, min(found))


def available_cores(root: Path = ROOT) -> int:
    """How many cores new work can keep busy; at least one."""
    found = [float(len(os.sched_getaffinity(0)))]
    for folder in _groups(root, "cpu"):
        with suppress(OSError, ValueError):
            found.append(_quota(folder))
    return max(1, math.ceil(min(found)))


def _free_memory(root: Path) -> int:
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        return int(next(x for x in lines if x.startswith("MemAvailable")).split()[1]) << 10
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's groups that know a controller, and of the groups above them.

    In a container the path may be that of the world outside; what is mounted is then the group.
    """
    mounted = root / "sys/fs/cgroup"
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or controller in controllers.split(","):
                top = mounted / controller if controllers else mounted
                group = top / path.lstrip("/")
                yield from (f for f in (group, *group.parents) if f.is_relative_to(top))


def _room(group: Path) -> int:
    """The limit of a group less what it uses, but for pages of files, which are given back."""
    second = (group / "memory.max").exists()
    limit, used = ("max", "current") if second else ("limit_in_bytes", "usage_in_bytes")
    rows = (line.split() for line in (group / "memory.stat").read_text().splitlines())
    pages = {name.removeprefix("total_"): int(n) for name, n in rows}  # the total comes last
    files = pages["active_file"] + pages["inactive_file"]
    return _number(group / f"memory.{limit}") - _number(group / f"memory.{used}") + files


def _quota(group: Path) -> float:
    """Cores' worth of time of a group."""
    if (group / "cpu.max").exists():
        quota, period = map(int, (group / "cpu.max").read_text().split())
        return quota / period
    quota = _number(group / "cpu.cfs_quota_us")
    return quota / _number(group / "cpu.cfs_period_us") if quota > 0 else math.inf


def _number(file: Path) -> int:
    return int(file.read_text())
