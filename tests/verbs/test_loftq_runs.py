"""Runs of LoftQ: the same bytes whatever the workers and the interruptions, and what is refused."""

import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

import lorakit
from lorakit.errors import InputError, MisfitError, OutputError, ResourceError, UsageError
from tests.verbs.loftq_scene import BIG, LAYERS, base, split, weights
from tests.verbs.test_extract import DOWN, Q, checkpoint
from tests.verbs.test_making import files_up_to

__all__ = ["base"]


def test_the_bytes_are_those_of_any_number_of_workers(base, tmp_path):
    for name, jobs in (("one", 1), ("four", 4)):
        lorakit.loftq(base, tmp_path / name, rank=4, run=lorakit.RunOptions(jobs=jobs))
    for part in ("base/model.safetensors", "adapter/adapter_model.safetensors", "lorakit.json"):
        assert (tmp_path / "one" / part).read_bytes() == (tmp_path / "four" / part).read_bytes()


class StoppedError(Exception):
    """The run ends here."""


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_run_that_stops_anywhere_goes_on_to_the_same_bytes(base, tmp_path, after):
    whole = split(base, tmp_path / "whole")
    seen = []

    def stop(_):
        seen.append(1)
        if len(seen) > after:
            raise StoppedError

    job = lorakit.plan_loftq(base, rank=8)
    try:
        job.run(tmp_path / "out", lorakit.RunOptions(jobs=1, report=stop))
    except StoppedError:
        assert not (tmp_path / "out").exists()
        assert (tmp_path / "out.partial").exists()
    again = split(base, tmp_path / "out") if not (tmp_path / "out").exists() else whole
    assert again.rows == whole.rows
    for part in ("base/model.safetensors", "adapter/adapter_model.safetensors", "lorakit.json"):
        assert (tmp_path / "whole" / part).read_bytes() == (tmp_path / "out" / part).read_bytes()
    assert not (tmp_path / "out.partial").exists()


def test_an_unfinished_run_of_other_options_is_refused(base, tmp_path):
    def stop(_):
        raise StoppedError

    with pytest.raises(StoppedError):
        lorakit.plan_loftq(base, rank=8).run(tmp_path / "out", lorakit.RunOptions(report=stop))
    with pytest.raises(OutputError, match="other inputs or options"):
        split(base, tmp_path / "out", rank=4)


def test_an_unfinished_run_of_other_statistics_is_refused(base, tmp_path):
    def stop(_):
        raise StoppedError

    stats, shapes = tmp_path / "stats.safetensors", {m: BIG[f"{m}.weight"][1] for m in LAYERS}
    save_file({m: np.full(n, 1, "f4") for m, n in shapes.items()}, stats)
    job = lorakit.plan_loftq(base, rank=8, stats=stats)
    with pytest.raises(StoppedError):
        job.run(tmp_path / "out", lorakit.RunOptions(report=stop))
    save_file({m: np.full(n, 2, "f4") for m, n in shapes.items()}, stats)
    with pytest.raises(OutputError, match="other inputs or options"):
        split(base, tmp_path / "out", stats=stats)


def test_what_makes_no_sense_is_refused(base, tmp_path):
    def plan(**options):
        return lorakit.plan_loftq(base, **{"rank": 8, **options})

    for options, said in (
        ({"quant": "nf5"}, "nf4"),
        ({"quant": "uniform", "bits": 3}, "dequantized"),
        ({"quant": "nf4", "bits": 3}, "4 bits"),
        ({"save": "adapter-only", "iters": 2}, "one iteration"),
        ({"save": "adapter-only", "absmax": "search"}, "plain quantisation"),
        ({"save": "whole"}, "none of"),
        ({"rank": 0}, "1 or more"),
        ({"iters": 0}, "once or more"),
        ({"block": 0}, "--block 32, 64"),
        ({"quant": "int8", "double_quant": True}, "Leave --double-quant out"),
        ({"quant": "int8", "absmax": "search"}, "Leave --absmax search out"),
        ({"quant": "uniform", "save": "dequantized", "bits": 5}, "2 or 3 or 4 or 8 bits, not 5"),
        ({"quant": "uniform", "save": "dequantized", "absmax": "search"}, "--quant normal-float"),
    ):
        with pytest.raises(UsageError) as caught:
            split(base, tmp_path / "out", **options)
        assert said in str(caught.value)
        assert not (tmp_path / "out.partial").exists()
    with pytest.raises(MisfitError, match="rank 40 is more"):
        plan(rank=40)
    with pytest.raises(MisfitError, match="no module"):
        plan(target_modules="nothing")
    with pytest.raises(MisfitError, match="no linear layer"):
        plan(target_modules="embed_tokens")
    with pytest.raises(UsageError, match="folder"):
        plan().run(tmp_path / "x.safetensors")
    with pytest.raises(ResourceError, match="memory"):
        plan().run(tmp_path / "out", lorakit.RunOptions(max_memory=1000))


def test_a_base_that_is_quantised_already_is_refused(base, tmp_path):
    split(base, tmp_path / "out")
    with pytest.raises(InputError, match="is quantised"):
        lorakit.plan_loftq(tmp_path / "out/base", rank=4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_no_number_is_named(base, tmp_path, bad):
    tensors = weights(base)
    tensors[f"{DOWN}.weight"][3, 5] = bad
    other = checkpoint(tmp_path / "other", tensors)
    with pytest.raises(InputError, match=r"down_proj\.weight") as error:
        split(other, tmp_path / "out")
    assert error.value.message.endswith("cannot be quantised.")
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_model_are_refused(base, tmp_path):
    save_file({f"{Q}.second_moment": np.ones(7, "f4")}, tmp_path / "stats.safetensors")
    with pytest.raises(MisfitError, match="inputs"):
        lorakit.plan_loftq(base, rank=4, stats=tmp_path / "stats.safetensors")


def test_a_killed_command_goes_on_to_the_same_bytes(base, tmp_path):
    """Whenever it is killed, the output is absent or whole, and the same command finishes it."""
    split(base, tmp_path / "whole")
    for delay in (0.15, 0.25, 0.35, 0.5):
        out = tmp_path / f"out{delay}"
        given = [sys.executable, "-m", "lorakit", "loftq", base, "-o", out, "--rank", "8", "-q"]
        child = subprocess.Popen(given)
        try:
            child.wait(delay)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if not out.exists():
            assert subprocess.run(given, check=False).returncode == 0
        for part in ("base/model.safetensors", "adapter/adapter_model.safetensors"):
            assert (tmp_path / "whole" / part).read_bytes() == (out / part).read_bytes()
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("size", [100, 10_000, 20_000])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(base, tmp_path, size):
    split(base, tmp_path / "whole")
    with files_up_to(size), pytest.raises(ResourceError, match="no space"):
        split(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    split(base, tmp_path / "out")
    for part in ("base/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "whole" / part).read_bytes() == (tmp_path / "out" / part).read_bytes()
