"""A file is absent, partial or whole; what the disk says is one clear line."""

import errno
import os
import resource
import stat
import threading

import numpy as np
import pytest

from lorakit.errors import InputError, OutputError, ResourceError
from lorakit.store.header import format_header
from lorakit.store.safetensors import SafetensorsFile, read_exactly
from lorakit.store.writing import (
    CHUNK,
    PartialFile,
    copy_range,
    link_file,
    partial_path,
    reporting,
    write_file,
)
from lorakit.tensors import TensorInfo


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_modes_follow_the_umask(umask, tmp_path):
    write_file(tmp_path / "small", b"x")
    out = PartialFile(tmp_path / "large", 10)
    out.commit(sync=True)
    for name in ("small", "large"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_a_file_has_a_partial_name_until_it_is_committed(tmp_path):
    path = tmp_path / "model.safetensors"
    out = PartialFile(path, 10)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors.partial"]
    assert partial_path(path).stat().st_size == 10
    out.write(b"world", 5)
    out.write(b"hello", 0)
    out.sync()
    out.commit(sync=False)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert path.read_bytes() == b"helloworld"


def test_committing_replaces_the_file_of_that_name_in_one_step(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    old = path.open("rb")
    write_file(path, b"new and longer")
    assert path.read_bytes() == b"new and longer"
    with old:
        assert old.read() == b"old"


def test_the_space_of_a_file_is_taken_at_once(tmp_path):
    out = PartialFile(tmp_path / "large", 1 << 20)
    assert partial_path(out.path).stat().st_blocks * 512 >= 1 << 20
    out.close()


def test_what_an_earlier_run_left_is_kept_or_not_as_asked(tmp_path):
    path = tmp_path / "file"
    partial_path(path).write_bytes(b"0123456789")
    kept = PartialFile(path, 10, keep=True)
    kept.write(b"x", 0)
    kept.close()
    assert partial_path(path).read_bytes() == b"x123456789"
    PartialFile(path, 10).close()
    assert partial_path(path).read_bytes() == bytes(10)


def test_a_file_of_no_bytes_is_a_file(tmp_path):
    write_file(tmp_path / "empty", b"")
    assert (tmp_path / "empty").read_bytes() == b""


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [
        (errno.ENOSPC, ResourceError, 5),
        (errno.EDQUOT, ResourceError, 5),
        (errno.EFBIG, ResourceError, 5),
        (errno.EIO, OutputError, 7),
        (errno.EROFS, OutputError, 7),
        (errno.EACCES, OutputError, 7),
    ],
)
def test_what_the_system_says_becomes_one_line_and_an_exit_code(number, kind, code):
    with pytest.raises(kind) as caught, reporting("out/model.safetensors"):
        raise OSError(number, os.strerror(number))
    assert caught.value.exit_code == code
    assert os.strerror(number) in str(caught.value)
    assert str(caught.value).startswith("out/model.safetensors: ")


def test_a_file_system_that_takes_none_so_large_is_told_from_a_limit():
    with pytest.raises(ResourceError) as caught, reporting("out/model.safetensors"):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))  # as FAT says it beyond 4 GiB
    assert "--max-shard-size" in caught.value.hint


def test_a_limit_on_file_sizes_is_told_before_anything_is_written(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    before = len(os.listdir("/proc/self/fd"))
    try:
        with pytest.raises(ResourceError, match="File too large"):
            PartialFile(tmp_path / "large", 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(OutputError, match="No such file"):
        write_file(tmp_path / "absent" / "file", b"x")


def test_a_small_file_that_fails_leaves_none_of_its_name(tmp_path):
    (tmp_path / "file").mkdir()
    with pytest.raises(OutputError, match="directory"):
        write_file(tmp_path / "file", b"x")
    assert (tmp_path / "file").is_dir()


def source_of(path, data: bytes) -> SafetensorsFile:
    path.write_bytes(format_header([TensorInfo("w", "U8", (len(data),))], {}) + data)
    return SafetensorsFile(path)


@pytest.mark.parametrize("shift", [0, 1, 4096, 12345])
def test_a_range_is_copied_to_any_place(tmp_path, shift):
    data = np.random.default_rng(0).bytes(3 * CHUNK + 17)
    source = source_of(tmp_path / "source", data)
    first, last = source.infos["w"].extent
    out = PartialFile(tmp_path / "out", len(data) + shift)
    copy_range(source, out, first, last, to=shift)
    out.commit(sync=False)
    assert out.path.read_bytes() == bytes(shift) + data


def test_a_range_is_copied_where_the_kernel_cannot(tmp_path):
    """From a file into itself, ranges that overlap: copy_file_range refuses those."""
    data = np.random.default_rng(0).bytes(2 * CHUNK + 5)
    source = source_of(tmp_path / "file.partial", data)
    first, last = source.infos["w"].extent
    out = PartialFile(tmp_path / "file", source.size, keep=True)
    with pytest.raises(OSError, match="Invalid argument"):
        os.copy_file_range(source.fd, out.fd, last - first - 1, first + 1, first)
    copy_range(source, out, first + 1, last, to=first)
    out.close()
    assert out.partial.read_bytes()[first : last - 1] == data[1:]


def test_a_source_that_ends_early_is_the_sources_fault(tmp_path):
    source = source_of(tmp_path / "source", bytes(10_000))
    out = PartialFile(tmp_path / "out", 10_000)
    assert source.fd >= 0
    os.truncate(source.path, 5000)
    with pytest.raises(InputError, match="ended at byte 5,000") as caught:
        copy_range(source, out, 0, 10_000, to=0)
    assert caught.value.file == str(source.path)
    out.close()


def test_a_source_that_cannot_be_read_is_the_sources_fault(tmp_path):
    folder = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_exactly(folder, bytearray(1), 0, "base/model.safetensors")
    os.close(folder)


def test_many_threads_write_one_file_at_their_own_places(tmp_path):
    data = np.random.default_rng(0).bytes(64 * 1000)
    out = PartialFile(tmp_path / "file", len(data))
    write = [
        threading.Thread(target=out.write, args=(data[i : i + 1000], i))
        for i in range(0, len(data), 1000)
    ]
    for thread in write:
        thread.start()
    for thread in write:
        thread.join()
    out.commit(sync=False)
    assert out.path.read_bytes() == data


def test_a_link_leads_to_the_very_file_even_through_symlinks(tmp_path):
    blob = tmp_path / "blob"
    blob.write_bytes(b"weights")
    (tmp_path / "near").symlink_to(blob)
    (tmp_path / "far").symlink_to("near")
    target = tmp_path / "target"
    target.write_bytes(b"left by an earlier run")
    link_file(tmp_path / "far", target)
    assert not target.is_symlink()
    assert target.samefile(blob)
    assert blob.read_bytes() == b"weights"


def test_a_link_across_file_systems_is_told(tmp_path):
    if os.stat("/dev/shm").st_dev == tmp_path.stat().st_dev:
        pytest.skip("one file system only")
    (tmp_path / "source").write_bytes(b"x")
    target = f"/dev/shm/lorakit-link-{os.getpid()}"
    with pytest.raises(OutputError, match="cross-device"):
        link_file(tmp_path / "source", type(tmp_path)(target))
    assert not os.path.lexists(target)
