"""Where a device is full, less of it is used, and no byte changes; or it is said so."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import pytest

from lorakit.engine.device import devices
from lorakit.engine.gpu import Gpus, Stage
from lorakit.engine.room import Share, device_memory, fitting_share, host_memory
from lorakit.errors import ResourceError
from lorakit.store.safetensors import SafetensorsFile
from tests.bench import synthetic
from tests.engine.cases import gaussian, plain
from tests.engine.on_device import folded, gpus
from tests.engine.test_preflight import plan_of

ROOT = Path(__file__).parent.parent.parent
MIB = 1 << 20
# Threads of libraries take address space of their own, which the limit is on.
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX")
SPARING = dict.fromkeys(THREADS, "1")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A base with an embedding of five tiles, which the adapter changes."""
    folder = tmp_path_factory.mktemp("inputs")
    model = synthetic.Model(0, hidden=2048, vocabulary=9000, layers=0, head=False)
    tensors = synthetic.base(folder / "base", model, 1)
    synthetic.adapter(folder / "embed", tensors, "embed", 8)
    return folder


LIMITED = """
    import json, resource, sys
    import lorakit
    import lorakit.engine.gpu as gpu

    found = []
    begun = gpu.Gpus.__init__

    def noted(self, *args):
        begun(self, *args)
        found.append(self)

    gpu.Gpus.__init__ = noted
    run = lorakit.RunOptions(device="torch:cpu", jobs=2, sync=False)
    lorakit.merge("base", "embed", "first", run=run)  # imports everything
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    limit = used + int(sys.argv[1]) * (1 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    code = 0
    try:
        lorakit.merge("base", "embed", "out", run=run)
    except lorakit.LorakitError as error:
        code = error.exit_code
        print(error, file=sys.stderr)
    share = found[-1].stages[0].share
    print(json.dumps([code, share.tiles, share.lanes]))
"""


def merged_within(inputs: Path, folder: Path, headroom: int) -> tuple[list[int], str]:
    """The exit code, the tiles and lanes that were left, and what was said, with so many MiB."""
    folder.mkdir()
    for name in ("base", "embed"):
        (folder / name).symlink_to(inputs / name)
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(headroom)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **SPARING}
    child = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1]), child.stderr


@pytest.fixture(scope="module")
def infinite(inputs, tmp_path_factory):
    """The same with an infinite number in every tile, for which figures need more memory."""
    folder = tmp_path_factory.mktemp("infinite")
    for name in ("base", "embed"):
        shutil.copytree(inputs / name, folder / name)
    path = folder / "base/model.safetensors"
    info = SafetensorsFile(path).infos["model.embed_tokens.weight"]
    with path.open("r+b") as f:
        for row in range(1000, info.rows, 2000):
            f.seek(info.start + 2 * info.cols * row)
            f.write(b"\x80\x7f")
    return folder


@pytest.mark.parametrize(
    ("made", "headrooms"),
    [("inputs", (2000, 420, 330, 240, 180)), ("infinite", (900, 600, 450, 340, 260, 200))],
)
def test_a_limit_on_memory_makes_blocks_smaller_and_changes_no_byte(
    made, headrooms, tmp_path, request
):
    """A real limit, of the process on torch's CPU: its tensors are what outgrows it."""
    pytest.importorskip("torch")
    inputs, shrunk = request.getfixturevalue(made), 0
    for headroom in headrooms:
        folder = tmp_path / str(headroom)
        (code, tiles, lanes), said = merged_within(inputs, folder, headroom)
        if code == 0:
            first, out = (folder / n / "model.safetensors" for n in ("first", "out"))
            assert out.read_bytes() == first.read_bytes()
            shrunk += (tiles, lanes) < (4, 2)
        else:
            assert code == ResourceError.exit_code, said
            assert not (folder / "out").exists()
    assert shrunk


def test_a_device_without_room_for_a_tile_ends_with_5_and_leaves_no_output(inputs, tmp_path):
    pytest.importorskip("torch")
    (code, *left), said = merged_within(inputs, tmp_path / "none", 110)
    assert (code, left) == (ResourceError.exit_code, [1, 1])
    assert "has no memory left" in said
    assert not (tmp_path / "none" / "out").exists()


@pytest.mark.cuda
def test_a_gpu_with_a_limit_uses_smaller_blocks_and_changes_no_byte():
    base = gaussian(0, (8200, 2048)).astype(ml_dtypes.bfloat16)
    recipe = plain(1, base.shape)
    whole = folded(gpus("cuda:0"), base, recipe)
    tight = Gpus(devices("cuda:0"), Share(2, 4, 2), 320 * MIB)
    assert folded(tight, base, recipe).tobytes() == whole.tobytes()
    assert tight.stages[0].share.tiles < 4


@pytest.mark.cuda
def test_a_gpu_without_room_for_a_tile_says_so():
    base = gaussian(0, (8200, 2048)).astype(ml_dtypes.bfloat16)
    none = Gpus(devices("cuda:0"), Share(2, 4, 2), 30 * MIB)
    with pytest.raises(ResourceError, match="has no memory left"):
        folded(none, base, plain(1, base.shape))
    folded(gpus("cuda:0"), base, plain(1, base.shape))  # the limit is gone with the session


def test_what_is_full_gets_smaller_blocks_then_fewer_and_then_gives_up():
    pytest.importorskip("torch")
    (device,) = devices("torch:cpu")
    stage, tried = Stage(device, Share(8, 4, 4)), []

    def work(share: Share) -> None:
        tried.append((share.tiles, share.lanes))
        device.torch.empty(1 << 50)  # more than any machine has

    with pytest.raises(ResourceError, match="has no memory left"):
        stage.attempt(work)
    assert tried == [(4, 4), (2, 4), (1, 4), (1, 2), (1, 1)]


def test_what_is_not_for_want_of_memory_is_raised_as_it_is():
    pytest.importorskip("torch")
    (device,) = devices("torch:cpu")
    stage = Stage(device, Share(8, 4, 4))
    with pytest.raises(RuntimeError, match="shape"):
        stage.attempt(lambda _: device.torch.ones(2, 3) @ device.torch.ones(2, 3))
    assert stage.share == Share(8, 4, 4)


def test_blocks_shrink_before_workers_become_fewer():
    plan = plan_of((1 << 15, 4096), nbytes=3 << 20)
    shares = [fitting_share(plan, 6, None, None)]
    while shares[-1] != Share(1, 1, 1):
        shares.append(fitting_share(plan, 6, None, device_memory(plan, shares[-1]) - 1))
    assert [(s.jobs, s.tiles) for s in shares[:4]] == [(6, 4), (6, 2), (6, 1), (5, 1)]
    needs = [host_memory(plan, s) for s in shares]
    assert needs == sorted(needs, reverse=True)


def test_too_little_memory_for_one_worker_is_refused():
    plan = plan_of((1 << 15, 4096), nbytes=3 << 20)
    least = Share(1, 1, 1)
    with pytest.raises(ResourceError, match="of device memory, there are"):
        fitting_share(plan, 6, None, device_memory(plan, least) - 1)
    with pytest.raises(ResourceError, match="of memory, there are"):
        fitting_share(plan, 6, host_memory(plan, least) - 1, None)


def test_memory_does_not_grow_with_the_tensor():
    share = Share(4, 4, 4)
    small, large = plan_of((1 << 14, 4096)), plan_of((1 << 20, 4096))
    assert host_memory(small, share) == host_memory(large, share)
    assert device_memory(small, share) == device_memory(large, share)
