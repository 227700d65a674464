"""--device where matrices are decomposed: the same results by the way of torch, each time again."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

import lorakit
from lorakit.errors import UsageError
from lorakit.math.combining.methods import METHODS as COMBINING
from lorakit.math.initial import METHODS
from tests.engine.on_device import every_device
from tests.verbs.adapters import deltas, drawn, pair, save
from tests.verbs.conftest import SCRATCH
from tests.verbs.test_extract import DOWN, LLAMA, Q, checkpoint

WIDTHS = {Q: 192, DOWN: 640}
SHAPES = {f"{Q}.weight": (256, 192), f"{DOWN}.weight": (600, 640), "model.norm.weight": (192,)}


@pytest.fixture
def base(tmp_path):
    return checkpoint(tmp_path / "base", {n: drawn(n, *s) / 8 for n, s in SHAPES.items()})


@pytest.fixture
def stats(tmp_path):
    x = {m: drawn(m, 700, n) for m, n in WIDTHS.items()}
    save_file({m: v.T @ v / len(v) for m, v in x.items()}, tmp_path / "stats.safetensors")
    return tmp_path / "stats.safetensors"


@pytest.fixture
def adapters(tmp_path):
    shapes = {Q: (256, 192), DOWN: (600, 640)}
    found = []
    for n in "one", "two":
        tensors = {}
        for module, (out, inner) in shapes.items():
            tensors |= pair(module, out=out, inner=inner, rank=8)
        found.append(save(tmp_path / n, tensors, r=8, lora_alpha=8))
    return found


def on(device):
    pytest.importorskip("torch")
    return replace(SCRATCH, device=device)


def assert_same(one, other, within=1e-4):
    """The updates of two adapters, up to rounding."""
    one, other = deltas(one), deltas(other)
    assert one.keys() == other.keys()
    for name, values in one.items():
        scale = np.linalg.norm(values) or 1.0
        assert np.linalg.norm(values - other[name]) <= within * scale, name


@every_device
@pytest.mark.parametrize("method", [n for n, m in METHODS.items() if m.needs])
def test_init_on_a_device_is_that_of_the_cpu_and_the_same_each_time(
    base, stats, tmp_path, method, device
):
    options = {"rank": 8, "method": method}
    options |= {"stats": stats} if "moments" in METHODS[method].needs else {}
    for name, run in (("cpu", SCRATCH), ("there", on(device)), ("again", on(device))):
        lorakit.init(base, tmp_path / name, run=run, **options)
    there = "adapter" if METHODS[method].changes_base else ""
    assert_same(tmp_path / "cpu" / there, tmp_path / "there" / there)
    files = [tmp_path / n / there / "adapter_model.safetensors" for n in ("there", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@every_device
@pytest.mark.parametrize("weighted", [False, True])
def test_loftq_on_a_device_leaves_as_little_as_on_the_cpu(base, stats, tmp_path, weighted, device):
    options = {"rank": 8, "stats": stats} if weighted else {"rank": 8}
    one = lorakit.loftq(base, tmp_path / "cpu", run=SCRATCH, **options)
    other = lorakit.loftq(base, tmp_path / "there", run=on(device), **options)
    for here, there in zip(one.rows, other.rows, strict=True):
        assert there.norm == pytest.approx(here.norm, rel=1e-3)
        assert there.norm < there.plain


@every_device
@pytest.mark.parametrize("energy", [None, 0.5])
def test_extract_on_a_device_is_that_of_the_cpu(base, tmp_path, energy, device):
    changed = {n: drawn(n, *s) / 8 for n, s in SHAPES.items()}
    b, a = drawn("b", 600, 8) * np.arange(1, 9), drawn("a", 8, 640)
    changed[f"{DOWN}.weight"] += (b @ a / 100).astype("f4")
    tuned = checkpoint(tmp_path / "tuned", changed, LLAMA)
    for name, run in (("cpu", SCRATCH), ("there", on(device))):
        lorakit.extract(base, tuned, output=tmp_path / name, rank=8, energy=energy, run=run)
    assert_same(tmp_path / "cpu", tmp_path / "there")


@every_device
@pytest.mark.parametrize("method", COMBINING)
def test_combine_on_a_device_is_that_of_the_cpu(adapters, tmp_path, method, device):
    options = {"weights": [0.7, 0.4], "method": method}
    options |= {"density": 0.5} if "density" in COMBINING[method].uses else {}
    for name, run in (("cpu", SCRATCH), ("there", on(device))):
        lorakit.combine(adapters, tmp_path / name, run=run, **options)
    assert_same(tmp_path / "cpu", tmp_path / "there", within=5e-3)


@every_device
def test_resize_on_a_device_is_that_of_the_cpu(adapters, tmp_path, device):
    for name, run in (("cpu", SCRATCH), ("there", on(device))):
        lorakit.resize(adapters[0], tmp_path / name, rank=4, run=run)
    assert_same(tmp_path / "cpu", tmp_path / "there")


def test_a_device_that_is_not_there_leaves_nothing_behind(base, adapters, tmp_path):
    torch = pytest.importorskip("torch")
    run = replace(SCRATCH, device=f"cuda:{torch.cuda.device_count()}")
    out = tmp_path / "out"
    for make in (
        lambda: lorakit.init(base, out, rank=4, method="pissa", run=run),
        lambda: lorakit.loftq(base, out, rank=4, run=run),
        lambda: lorakit.resize(adapters[0], out, rank=4, run=run),
    ):
        with pytest.raises(UsageError, match="cuda"):
            make()
        assert {p.name for p in tmp_path.iterdir()} == {"base", "one", "two"}
