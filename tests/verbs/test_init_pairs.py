"""init of an adapter and of what it leaves of the base: together the original, and written both or
neither.
"""

import signal
import subprocess
import sys
import time

import ml_dtypes  # noqa: F401  (bfloat16 for NumPy)
import numpy as np
import pytest

import lorakit
from lorakit.errors import InputError, OutputError
from tests.verbs.adapters import config_of, deltas
from tests.verbs.conftest import SCRATCH
from tests.verbs.init_scene import (
    CHANGING,
    SHAPES,
    WIDTHS,
    assert_together_are,
    base,
    begun,
    checkpoint,
    options_of,
    stats,
    wide,
)

__all__ = ["base", "stats"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", CHANGING)
def test_base_and_adapter_together_are_the_original(base, stats, tmp_path, method, dtype):
    options = {"method": method, "alpha": 6, "dtype": dtype, **options_of(method, stats)}
    begun(base, tmp_path / "out", **options)
    assert_together_are(base, tmp_path / "out")
    assert sum(abs(d).sum() for d in deltas(tmp_path / "out/adapter").values()) > 1
    config = config_of(tmp_path / "out/adapter")
    assert config["init_lora_weights"] is True
    assert config["base_model_name_or_path"] == str(tmp_path / "out/base")


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_an_adapter_alone_is_read_with_the_original_base(base, tmp_path, method):
    begun(base, tmp_path / "out", method=method, adapter_only=True, rank=4, alpha=8)
    assert config_of(tmp_path / "out")["init_lora_weights"] == method
    lorakit.merge(base, tmp_path / "out", tmp_path / "merged", dtype="float32", run=SCRATCH)
    for name in SHAPES:
        one, other = wide(base, name), wide(tmp_path / "merged", name)
        np.testing.assert_allclose(other, one, atol=1e-5)


def test_weights_that_lie_turned_and_stacks_of_experts_lose_their_part_too(tmp_path):
    for model, name, shape in (
        ("gpt2", "h.0.attn.c_attn.weight", (12, 36)),
        ("gpt_oss", "model.layers.0.mlp.experts.down_proj", (4, 20, 12)),
    ):
        base = checkpoint(tmp_path / model, {name: shape}, {"model_type": model})
        out = tmp_path / f"{model}-out"
        begun(base, out, method="pissa", experts=True)
        lorakit.merge(out / "base", out / "adapter", tmp_path / f"{model}-m", run=SCRATCH)
        one, other = wide(base, name), wide(tmp_path / f"{model}-m", name)
        assert np.linalg.norm(wide(out / "base", name)) < 0.9 * np.linalg.norm(one)
        assert np.linalg.norm(one - other) < 4e-3 * np.linalg.norm(one)


def test_verify_finds_both_where_they_are_and_any_change(base, tmp_path):
    begun(base, tmp_path / "out", method="pissa")
    assert lorakit.verify(tmp_path / "out/base", full=True).folded_tensors == 4
    assert not list((tmp_path / "out").rglob("*partial*"))
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"adapter", "base"}
    begun(base, tmp_path / "other", method="olora")
    with pytest.raises(InputError, match="another adapter"):
        lorakit.verify(tmp_path / "out/base", adapters=[str(tmp_path / "other/adapter")])


# Nothing half done.


class StopError(Exception):
    """Stops a run."""


def test_a_failure_on_the_way_to_the_adapter_leaves_nothing_behind(base, tmp_path):
    def stop(_):
        raise StopError

    before = sorted(tmp_path.iterdir())
    with pytest.raises(StopError):
        begun(base, tmp_path / "out", method="pissa", run=SCRATCH.reporting(stop))
    assert sorted(tmp_path.iterdir()) == before


def test_a_run_that_stopped_at_the_base_goes_on_with_the_adapter_it_has(base, tmp_path):
    begun(base, tmp_path / "expected", method="pissa")
    blocked = tmp_path / "out.partial/base.partial"
    counted = []

    def block(n):
        counted.append(n)
        if len(counted) == len(WIDTHS):
            blocked.mkdir()
            (blocked / "foreign").touch()

    with pytest.raises(OutputError, match="holds something else"):
        begun(base, tmp_path / "out", method="pissa", run=SCRATCH.reporting(block))
    assert not (tmp_path / "out").exists()
    made = (tmp_path / "out.partial/adapter/adapter_model.safetensors").stat().st_mtime_ns
    with pytest.raises(OutputError, match="unfinished run with other"):
        begun(base, tmp_path / "out", method="pissa", seed=1)
    (blocked / "foreign").unlink()
    report = begun(base, tmp_path / "out", method="pissa")
    weights = tmp_path / "out/adapter/adapter_model.safetensors"
    assert weights.stat().st_mtime_ns == made
    assert [r.shape for r in report.rows] == [(12, 20), (16, 12)] * 2
    for part in ("adapter/adapter_model", "base/model"):
        one, other = (tmp_path / f / f"{part}.safetensors" for f in ("expected", "out"))
        assert one.read_bytes() == other.read_bytes()
    lorakit.verify(tmp_path / "out/base", full=True)
    assert not (tmp_path / "out.partial").exists()


def test_a_killed_command_can_be_given_again(made, tmp_path):
    """Whenever it is killed, there is a whole pair, or none and a second run makes it."""
    command = [sys.executable, "-m", "lorakit", "init", made / "base", "-q", "--rank", "4"]
    command += ["--method", "pissa", "-o"]
    start = time.perf_counter()
    subprocess.run([*command, tmp_path / "expected"], check=True)
    whole = time.perf_counter() - start
    for share in (0.5, 0.65, 0.8, 0.95):
        out = tmp_path / f"out{share}"
        child = subprocess.Popen([*command, out])
        try:
            child.wait(share * whole)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
        if not out.exists():
            subprocess.run([*command, out], check=True)
        for path in (tmp_path / "expected").rglob("*.safetensors"):
            again = out / path.relative_to(tmp_path / "expected")
            assert again.read_bytes() == path.read_bytes()
        lorakit.verify(out / "base")
    assert not list(tmp_path.glob("*.partial"))
