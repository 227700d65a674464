"""Devices by name, numbers there and back, and rounding on them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lorakit
from lorakit.engine.device import Device, devices, full_precision
from lorakit.engine.rounding import narrowed, sum_to_odd
from lorakit.errors import UsageError
from lorakit.math.cast import Scratch, narrow, storage, widen
from lorakit.math.rounding import round_sum
from lorakit.store.memory import MemorySource
from lorakit.tensors import BITS, FOLDABLE
from tests.engine.on_device import every_device

torch = pytest.importorskip("torch")
ROOT = Path(__file__).parent.parent.parent
DTYPES = sorted(FOLDABLE)


def random_bits(count: int, dtype: str) -> np.ndarray:
    bits = np.random.default_rng(0).integers(0, 1 << 63, count, np.uint64) * np.uint64(2)
    return bits.view(np.uint8)[: count * np.dtype(dtype).itemsize].view(dtype)


def on_host(tensor) -> np.ndarray:
    return MemorySource({"x": tensor}).array("x")


def singles() -> np.ndarray:
    """Every upper half of a float32 with lower halves that lie on, beside and between ties."""
    upper = np.arange(1 << 16, dtype=np.uint32) << np.uint32(16)
    lower = (0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
    return np.concatenate([*(upper + np.uint32(n) for n in lower), random_bits(10**5, "u4")]).view(
        "f4"
    )


def doubles() -> np.ndarray:
    """The same in float64, what lies just beside them, and anything at all."""
    with np.errstate(all="ignore"):
        exact = singles().astype("f8")
        beside = [np.nextafter(exact, np.inf), np.nextafter(exact, -np.inf)]
        return np.concatenate([exact, *beside, random_bits(10**5, "f8")])


@every_device
@pytest.mark.parametrize("make", [singles, doubles])
@pytest.mark.parametrize("code", DTYPES)
def test_rounding_on_a_device_is_that_of_the_cpu_bit_for_bit(device, make, code):
    there, x = Device.parse(device), make()
    right = np.empty(x.shape, storage(code))
    narrow(x, right)
    got = on_host(narrowed(there.to_device(x), there.dtype(code)))
    with np.errstate(all="ignore"):
        missing = np.isnan(right.astype("f8"))
        assert np.array_equal(missing, np.isnan(got.astype("f8")))
    bits = f"u{right.dtype.itemsize}"
    assert np.array_equal(got.view(bits)[~missing], right.view(bits)[~missing])


@every_device
@pytest.mark.parametrize("code", DTYPES)
def test_widening_on_a_device_is_exact(device, code):
    there = Device.parse(device)
    raw = random_bits(10**5, "u8").view(storage(code))
    wide = "float64" if code == "F64" else "float32"
    right = np.empty(raw.shape, wide)
    widen(raw, right)
    got = on_host(there.to_device(raw).to(getattr(torch, wide)))
    assert np.array_equal(got, right, equal_nan=True)


@every_device
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_sums_land_in_float16_as_on_the_cpu(device, size):
    there, rng = Device.parse(device), np.random.default_rng(0)
    w = (rng.standard_normal(1 << 18) * size).astype(np.float16).astype(np.float32)
    change = (rng.standard_normal(1 << 18) * 1e-3 * size).astype(np.float32)
    w[:9] = np.inf, -np.inf, np.nan, 0, 1e30, -1e30, 65504, -65504, 1e-7
    right, held = np.empty(w.shape, np.float16), np.empty_like(w)
    round_sum(w, change, right, held, Scratch())
    with np.errstate(all="ignore"):
        total = w + change
        naive = total.astype(np.float16)
    sums = there.to_device(total)
    sum_to_odd(sums, there.to_device(w), there.to_device(change))
    got = on_host(narrowed(sums, torch.float16))
    assert np.array_equal(got, right, equal_nan=True)
    assert np.any((right != naive)[9:])


@every_device
@pytest.mark.parametrize("code", [c for c in BITS if BITS[c] >= 8 and not c.startswith("F6")])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (5, 3)], ids=str)
def test_numbers_come_back_from_a_device_as_they_went(device, code, shape):
    there = Device.parse(device)
    count = int(np.prod(shape))
    raw = random_bits(16 * max(1, count), "u1").view("u1") & np.uint8(1)
    array = raw[: count * BITS[code] // 8].view(storage(code)).reshape(shape)
    back = on_host(there.to_device(array))
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())


@every_device
def test_a_view_goes_to_a_device_in_the_order_of_its_own_rows(device):
    there = Device.parse(device)
    array = np.arange(12.0).reshape(3, 4)
    for view in (array.T, array[:, ::2], array[::-1]):
        assert np.array_equal(on_host(there.to_device(view)), view)


def test_products_are_in_full_float32_within_and_as_they_were_afterwards():
    matmul = torch.backends.cuda.matmul
    new = hasattr(matmul, "fp32_precision")
    setting, loose, full = (
        ("fp32_precision", "tf32", "ieee") if new else ("allow_tf32", True, False)
    )
    before = getattr(matmul, setting)
    setattr(matmul, setting, loose)
    try:
        with full_precision():
            assert getattr(matmul, setting) == full
        assert getattr(matmul, setting) == loose
    finally:
        setattr(matmul, setting, before)


@pytest.mark.parametrize("text", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA", "cpu:0", "cpu"])
def test_what_is_no_device_of_torch_is_refused(text):
    with pytest.raises(UsageError, match="is no device"):
        devices(text)


@pytest.mark.cuda
def test_cuda_is_every_gpu_and_one_that_is_not_there_is_refused_by_number():
    count = torch.cuda.device_count()
    assert [d.place for d in devices("cuda")] == [f"torch:cuda:{n}" for n in range(count)]
    with pytest.raises(UsageError, match=rf"there is no cuda:{count}\. There are: cuda:0"):
        devices(f"cuda:{count}")


def merge(folder: Path, *options: str, start: str = "") -> subprocess.CompletedProcess[str]:
    """`lorakit merge` in a child, after another line of Python."""
    code = f"{start}\nfrom lorakit.cli import main\nmain()"
    command = [sys.executable, "-c", code, "merge", "base", "style", "-o", "out", *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The base and the adapters of the demo."""
    return lorakit.demo(tmp_path_factory.mktemp("demo") / "demo")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_that_is_not_there_ends_with_2_and_names_the_torch_that_is(demo, device):
    ran = merge(demo, "--device", device)
    assert ran.returncode == 2
    assert f"--device {device}: the installed torch {torch.__version__}" in ran.stderr
    assert "leave --device out" in ran.stderr
    assert not list(demo.glob("out*"))


def test_without_torch_the_extra_to_install_is_named(demo):
    ran = merge(demo, "--device", "cuda", start="import sys; sys.modules['torch'] = None")
    assert ran.returncode == 2
    assert 'pip install "lorakit[torch]"' in ran.stderr
    assert not list(demo.glob("out*"))


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "torch:cpu"])
def test_a_device_that_nobody_knows_ends_with_2(demo, device):
    ran = merge(demo, "--device", device)
    assert ran.returncode == 2
    assert "is no device" in ran.stderr


def test_a_dry_run_tells_the_device_and_asks_neither_it_nor_torch(demo):
    start = "import sys; sys.modules['torch'] = None"
    ran = merge(demo, "--device", "cuda:5", "--dry-run", start=start)
    assert ran.returncode == 0, ran.stderr
    assert "folds on cuda:5, in at most" in ran.stdout
    as_json = merge(demo, "--device", "cuda:5", "--dry-run", "--json", start=start)
    assert '"device": "cuda:5"' in as_json.stdout
