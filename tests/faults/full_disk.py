"""What becomes of a merge on a disk that is full, or fills up while it runs?

Run: python -m tests.faults.full_disk, as root: it mounts a small tmpfs. On a disk that is too
small, the command refuses with exit code 5 before it writes anything. Where somebody else takes the
space while it runs, and where a limit on file sizes stops it, it ends with exit code 5 and one
line; once there is room, the same command ends with the bytes of an undisturbed run.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.bench import synthetic
from tests.faults.scene import Scene, check, check_said, make

MIB = 1 << 20
# Runs a command that may write no file of more bytes than its first argument says.
LIMIT = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
os.execv(sys.argv[2], sys.argv[2:])
"""
MODEL = synthetic.Model(0, hidden=512, vocabulary=4096, layers=4)  # 31 MB, four shards


@contextlib.contextmanager
def disk(folder: Path, size: int) -> Iterator[Path]:
    """A disk of so many bytes, mounted on a new folder.

    Raises:
        PermissionError: this user may not mount, or there is no tmpfs.
    """
    place = folder / "place"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "lorakit-test", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        raise PermissionError("a tmpfs cannot be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def refused(scene: Scene, free: int) -> str:
    """A disk that is too small from the start."""
    check(bool(scene.expected and scene.inputs), "nothing is there")
    with disk(scene.folder, free) as place:
        code, said = scene.run()
        check_said(code, said, [5])
        check("of disk" in said, said)
        check(not any(place.iterdir()), "something was written")
        scene.check_inputs()
    return said


def filled(scene: Scene, *, shard: int) -> str:
    """A disk that somebody else fills once this shard is begun."""
    need = sum(p.stat().st_size for p in scene.base.iterdir())
    check(bool(scene.expected and scene.inputs), "nothing is there")
    code, said = 0, ""
    while code == 0:  # else the merge was too fast for the other one
        with disk(scene.folder, need + 8 * MIB) as place:
            with begun(scene, shard) as child:
                child.send_signal(signal.SIGSTOP)
                take_the_rest(place / "of-somebody-else")
                child.send_signal(signal.SIGCONT)
                _, said = child.communicate(timeout=60)
            if code := child.returncode:
                check_said(code, said, [5])
                check(scene.check_disturbed() == "partial", "no partial output")
                again, _ = scene.run()
                check(again == 5, f"exit code {again} while the disk is still full")
            (place / "of-somebody-else").unlink()
            scene.go_on()
    return said


@contextlib.contextmanager
def begun(scene: Scene, shard: int) -> "Iterator[subprocess.Popen[str]]":
    """A merge by one worker that has begun this shard."""
    folder, name = scene.out.with_name("out.partial"), f"model-{shard:05}-of-00004.safetensors"
    command = [*scene.command(), "--jobs", "1"]
    for _ in range(100):
        with scene.started(command) as child:
            while child.poll() is None:
                if (folder / f"{name}.partial").exists() or (folder / name).exists():
                    yield child
                    return
        scene.clear()
    check(False, f"{name} was never seen")


def take_the_rest(path: Path) -> None:
    """Fill the disk to the last page."""
    with path.open("wb") as f, contextlib.suppress(OSError):
        while True:
            os.write(f.fileno(), bytes(64 << 10))
    with path.open("ab") as f, contextlib.suppress(OSError):
        while True:
            os.write(f.fileno(), bytes(4096))


def limited(scene: Scene, limit: int) -> str:
    """A limit on the size of files (ulimit -f), which needs no disk of its own."""
    check(bool(scene.expected and scene.inputs), "nothing is there")
    scene.clear()
    code, said = scene.run([sys.executable, "-c", LIMIT, str(limit), *scene.command()])
    check_said(code, said, [5])
    check(scene.check_disturbed() in ("partial", "absent"), "an output is there")
    scene.go_on()
    return said


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="lorakit-full-") as tmp:
        folder = make(Path(tmp), MODEL)
        size = sum(p.stat().st_size for p in (folder / "base").iterdir())
        biggest = max(p.stat().st_size for p in (folder / "base").iterdir())
        tried = 0
        for options in ((), ("--no-fsync",)):
            scene = Scene(folder, options, checkpoint=MIB)
            said = [refused(scene, size * share // 8) for share in (1, 4, 7)]
            said += [filled(scene, shard=n) for n in (1, 2, 3, 4)]
            said += [limited(scene, biggest * share // 8) for share in (1, 4, 7)]
            sys.stdout.write("".join(line.replace(str(folder), "DISK") for line in said))
            tried += len(said)
        sys.stdout.write(f"{tried} full disks, every result identical to an undisturbed run\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
