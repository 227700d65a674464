"""Changed weights of a quantised base, quantised again as they were."""

import json
import signal

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.cli import main
from lorakit.errors import InputError, ResourceError, UsageError
from lorakit.quant.table import codec
from lorakit.verbs.verify import ResultError
from tests.verbs.adapters import drawn, save
from tests.verbs.quantised_scene import (
    CHANGED,
    LAYERS,
    LISTS,
    SHAPES,
    checkpoint,
    config_of,
    experts,
    layouts,
    made,
    same,
    tensors_of,
)
from tests.verbs.test_making import files_up_to

__all__ = ["made"]

SCRATCH = lorakit.RunOptions(sync=False)
F8 = np.dtype(ml_dtypes.float8_e4m3fn)
FILES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NF4 = codec("nf4")


def merged(base, adapter, out, **options):
    """The report of such a merge, and the tensors before and after."""
    run = options.pop("run", SCRATCH)
    report = lorakit.merge(base, adapter, out, quant="requantize", run=run, **options)
    return report, tensors_of(base), tensors_of(out)


def plain(folder, adapter, out):
    """The values of a checkpoint in float32, with nothing added."""
    lorakit.merge(
        folder, adapter, out, quant="dequantize", dtype="float32", weights=0.0, run=SCRATCH
    )
    return tensors_of(out)


def delta(adapter, module):
    """The change of a weight, in float64: alpha is 3, the rank 2."""
    held = load_file(adapter / "adapter_model.safetensors")
    a, b = (held[f"base_model.model.{module}.lora_{x}.weight"].astype("f8") for x in "AB")
    return 1.5 * (b @ a)


@layouts
def test_the_tensors_are_the_bases_own_and_only_what_changes_has_other_bytes(
    layout, made, tmp_path
):
    base, _, adapter = made(layout)
    _, before, after = merged(base, adapter, tmp_path / "out")
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {
        n: (t.dtype, t.shape) for n, t in before.items()
    }
    other = {n for n in before if before[n].tobytes() != after[n].tobytes()}
    assert {n for n in other if not n.startswith(CHANGED)} == set()
    assert all(any(n.startswith(m) for n in other) for m in CHANGED)
    assert config_of(tmp_path / "out") == config_of(base)
    for name in FILES:
        ours, theirs = tmp_path / "out" / name, base / name
        assert ours.stat().st_size == theirs.stat().st_size
        length = 8 + int.from_bytes(theirs.read_bytes()[:8], "little")
        assert ours.read_bytes()[:length] == theirs.read_bytes()[:length]


@layouts
def test_figures_are_what_the_algebra_says(layout, made, tmp_path):
    base, _, adapter = made(layout)
    report, _, _ = merged(base, adapter, tmp_path / "out", weights=0.1)
    old, new = (
        plain(f, adapter, tmp_path / n) for f, n in ((base, "old"), (tmp_path / "out", "new"))
    )
    assert report.requantised["weights"] == len(CHANGED) == len(report.figures)
    for name, figures in report.figures.items():
        (module,) = [m for m in CHANGED if name.startswith(m)]
        before, after = (x[f"{module}.weight"].astype("f8") for x in (old, new))
        change = 0.1 * delta(adapter, module)
        landed, error = after - before, after - before - change
        kept = (landed * change).sum() / (change**2).sum()
        assert figures.retained == pytest.approx(kept, abs=1e-4)
        assert figures.error == pytest.approx(np.linalg.norm(error), rel=1e-4)
        assert figures.delta == pytest.approx(np.linalg.norm(change), rel=1e-4)
        assert figures.max_error == pytest.approx(np.abs(error).max(), rel=1e-3)
    said = json.loads((tmp_path / "out/lorakit.json").read_text())["tensors"]
    assert {"retained", "error", "delta"} <= set.intersection(*(set(t) for t in said.values()))


@layouts
@pytest.mark.parametrize("weight", [0.0, 0.05, 20.0])
def test_verify_computes_it_again(layout, weight, made, tmp_path):
    base, _, adapter = made(layout)
    merged(base, adapter, tmp_path / "out", weights=weight)
    for full in (False, True):
        found = lorakit.verify(tmp_path / "out", full=full)
        assert found.differences == ()
        assert found.wrong_rounded == 0


@layouts
def test_verify_finds_another_code_and_another_scale(layout, made, tmp_path):
    base, _, adapter = made(layout)
    _, before, after = merged(base, adapter, tmp_path / "out")
    other = [n for n in before if before[n].tobytes() != after[n].tobytes()]
    for name in other:
        folder = tmp_path / f"damaged {name}"
        merged(base, adapter, folder)
        for file in FILES:
            raw = bytearray((folder / file).read_bytes())
            start = 8 + int.from_bytes(raw[:8], "little")
            if found := json.loads(raw[8:start]).get(name):
                raw[start + found["data_offsets"][1] - 1] ^= 0x42
                (folder / file).write_bytes(raw)
        with pytest.raises(ResultError, match="are not the base plus the deltas"):
            lorakit.verify(folder, full=True)


@layouts
def test_the_bytes_are_those_of_any_number_of_workers(layout, made, tmp_path):
    base, _, adapter = made(layout)
    found = {
        jobs: merged(base, adapter, tmp_path / f"{jobs}", run=lorakit.RunOptions(jobs, sync=False))
        for jobs in (1, 2, 4)
    }
    assert found[1][0].figures == found[2][0].figures == found[4][0].figures
    assert same(found[1][2], found[2][2])
    assert same(found[1][2], found[4][2])


def large(tmp_path):
    """A base of codes that no block holds, and an adapter of all of it."""
    name, shape = "model.layers.0.self_attn.q_proj", (3000, 1000)
    q = codec("nf4", double=True).quantise(drawn("w", *shape) / 50)
    tensors = codec("nf4", double=True).tensors(f"{name}.weight", q, dtype="bfloat16")
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": said}
    base = checkpoint(tmp_path / "large", [tensors], config)
    pair = {f"{name}.lora_A.weight": (2, 1000), f"{name}.lora_B.weight": (3000, 2)}
    return base, save(tmp_path / "adapter of it", pair)


def test_a_run_that_failed_goes_on(tmp_path):
    base, adapter = large(tmp_path)
    _, _, expected = merged(base, adapter, tmp_path / "expected")
    job = lorakit.plan_merge(base, adapter, quant="requantize")
    assert signal.getsignal(signal.SIGXFSZ)
    with files_up_to(600_000), pytest.raises(ResourceError, match="no space"):
        job.run(tmp_path / "out", SCRATCH)
    job.run(tmp_path / "out", SCRATCH)
    assert same(tensors_of(tmp_path / "out"), expected)


def test_many_blocks_are_verified_and_have_the_bytes_of_the_whole(tmp_path):
    base, adapter = large(tmp_path)
    outs = [
        merged(base, adapter, tmp_path / f"{n}", run=lorakit.RunOptions(n, sync=False))[2]
        for n in (1, 3)
    ]
    assert same(*outs)
    assert lorakit.verify(tmp_path / "1").differences == ()
    assert lorakit.verify(tmp_path / "1", full=True).wrong_rounded == 0


def test_shards_of_a_size_and_one_file_hold_the_same(made, tmp_path):
    base, _, adapter = made("nf4 twice")
    _, _, expected = merged(base, adapter, tmp_path / "out")
    _, _, cut = merged(base, adapter, tmp_path / "cut", max_shard_size=40_000)
    _, _, one = merged(base, adapter, tmp_path / "one.safetensors")
    assert same(cut, expected)
    assert same(one, expected)
    for out in ("cut", "one.safetensors"):
        assert lorakit.verify(tmp_path / out, full=True).differences == ()


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_conv1d_is_written_as_it_lies(kind, tmp_path):
    found, name, shape = codec(kind), "h.0.attn.c_attn", (64, 192)
    q = found.quantise(np.ascontiguousarray(drawn("c", *shape).T))
    tensors = found.tensors(f"{name}.weight", q, dtype="float32")
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    config = {"model_type": "gpt2", "dtype": "float32", "quantization_config": said}
    head = {"wte.weight": np.ones((8, 64), "f4")}
    base = checkpoint(tmp_path / "base", [tensors | head], config)
    pair = {f"{name}.lora_A.weight": (2, 64), f"{name}.lora_B.weight": (192, 2)}
    adapter = save(tmp_path / "adapter", pair, target_modules=["c_attn"])
    _, _, after = merged(base, adapter, tmp_path / "out")
    new = found.dequantise(q) + delta(adapter, name).astype("f4")
    expected = found.tensors(f"{name}.weight", found.quantise(new), dtype="float32")
    for part, values in expected.items():
        if values.dtype.kind == "f":
            np.testing.assert_allclose(after[part], values, rtol=1e-6)
        else:
            assert np.count_nonzero(after[part] != values) <= 2  # float32 decides a tie
    assert lorakit.verify(tmp_path / "out", full=True).differences == ()


def test_bytes_are_those_that_bitsandbytes_makes_of_the_merged_weight(made, tmp_path):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    base, _, adapter = made("nf4")
    _, _, after = merged(base, adapter, tmp_path / "out")
    old = plain(base, adapter, tmp_path / "old")
    for module in CHANGED:
        new = (old[f"{module}.weight"] + delta(adapter, module)).astype("f4")
        packed, state = functional.quantize_4bit(torch.from_numpy(new), quant_type="nf4")
        assert np.count_nonzero(after[f"{module}.weight"] != packed.numpy()) <= 2
        np.testing.assert_allclose(after[f"{module}.weight.absmax"], state.absmax, rtol=1e-6)


def test_experts_of_four_bits_stay_in_their_blocks(tmp_path):
    base, adapter = experts(tmp_path)
    front = "model.layers.0.mlp.experts"
    report, before, after = merged(base, adapter, tmp_path / "out", weights=0.01)
    changed = {n for n in before if before[n].tobytes() != after[n].tobytes()}
    assert changed <= {f"{front}.down_proj_blocks", f"{front}.down_proj_scales"}
    assert report.requantised["weights"] == 1
    old, new = (
        plain(f, adapter, tmp_path / n) for f, n in ((base, "old"), (tmp_path / "out", "new"))
    )
    landed = new[f"{front}.down_proj"].astype("f8") - old[f"{front}.down_proj"]
    (figures,) = report.figures.values()
    assert np.abs(landed).max() == pytest.approx(figures.max_change)
    assert lorakit.verify(tmp_path / "out", full=True).differences == ()
    merged(base, adapter, tmp_path / "nothing", weights=0)
    assert np.array_equal(
        plain(tmp_path / "nothing", adapter, tmp_path / "same")[f"{front}.down_proj"],
        old[f"{front}.down_proj"],
    )


@pytest.mark.parametrize("grid", [(2, 2, 1), (2, 1, 1), (2, 130, 1)])
def test_experts_of_float8_in_a_stack(grid, tmp_path):
    name, front = "model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts"
    codes = drawn("codes", 2, 130, 64).astype(F8)
    scales = np.abs(drawn("scales", *grid)) / 50 + 0.01
    base = checkpoint(
        tmp_path / "base",
        [{name: codes, f"{name}_scale_inv": scales.astype("f4")}],
        {"model_type": "qwen3_moe", "quantization_config": {"quant_method": "fp8"}},
    )
    pair = {f"{front}.lora_A.weight": (4, 64), f"{front}.lora_B.weight": (130, 4)}
    chosen = {"target_parameters": ["mlp.experts.down_proj"], "target_modules": []}
    adapter = save(tmp_path / "adapter", pair, **chosen)
    merged(base, adapter, tmp_path / "out", weights=0.01)
    assert lorakit.verify(tmp_path / "out", full=True).differences == ()


@pytest.mark.parametrize("layout", ["nf4 twice", "fp8", "gptq"])
def test_dora_and_several_adapters(layout, made, tmp_path):
    base, _, adapter = made(layout)
    module, (out, inner) = CHANGED[0], SHAPES["self_attn.q_proj"]
    pair = {f"{module}.lora_A.weight": (2, inner), f"{module}.lora_B.weight": (out, 2)}
    pair[f"{module}.lora_magnitude_vector"] = np.abs(drawn("m", out))
    dora = save(tmp_path / "dora", pair, use_dora=True)
    merged(base, [adapter, dora], tmp_path / "out", weights=[0.5, 0.25])
    found = lorakit.verify(tmp_path / "out", full=True)
    assert found.differences == ()
    assert found.wrong_rounded <= 5  # ties


def test_a_plain_weight_is_merged_as_ever(made, tmp_path):
    base, _, _ = made("nf4")
    pair = {"lm_head.lora_A.weight": (2, 128), "lm_head.lora_B.weight": (48, 2)}
    adapter = save(tmp_path / "of the head", pair)
    report, before, after = merged(base, adapter, tmp_path / "out")
    assert [n for n in before if before[n].tobytes() != after[n].tobytes()] == ["lm_head.weight"]
    assert report.requantised is None


def test_what_is_replaced_as_a_whole_is_refused(made, tmp_path):
    base, _, _ = made("nf4")
    module = f"{LAYERS[0]}.self_attn.q_proj"
    whole = {f"{module}.weight": drawn("w", *SHAPES["self_attn.q_proj"])}
    pair = {"lm_head.lora_A.weight": (2, 128), "lm_head.lora_B.weight": (48, 2)}
    adapter = save(tmp_path / "whole", whole | pair, modules_to_save=["q_proj"])
    with pytest.raises(InputError, match=r"replaced as a whole.*--quant keep-touched"):
        lorakit.plan_merge(base, adapter, quant="requantize")


def test_a_device_is_refused(made, tmp_path):
    base, _, adapter = made("nf4")
    with pytest.raises(UsageError, match="on the CPU only"):
        merged(base, adapter, tmp_path / "out", run=lorakit.RunOptions(device="torch:cpu"))


def test_it_cannot_be_taken_out_again(made, tmp_path):
    base, _, adapter = made("int8")
    merged(base, adapter, tmp_path / "out")
    with pytest.raises(InputError, match=r"quantised again.*Use the base itself"):
        lorakit.unmerge(tmp_path / "out", adapter, tmp_path / "again")


def test_a_delta_that_is_not_finite_is_refused_before_it_is_in_codes(made, tmp_path):
    base, _, adapter = made("fp8")
    with pytest.raises(InputError, match=r"_proj.*NaN or Inf.*--quant keep-touched"):
        merged(base, adapter, tmp_path / "out", weights=1e39)
    assert not (tmp_path / "out").exists()


def said(capsys, *asked):
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, asked)))
    assert ended.value.code in (0, None)
    return capsys.readouterr()


def test_the_command_warns_where_little_is_left(made, tmp_path, capsys):
    base, _, adapter = made("packed integers")
    common = base, adapter, "--quant", "requantize", "--no-fsync"
    little = said(capsys, "merge", *common, "-o", tmp_path / "a", "--weight", "0.01", "-v")
    assert "their codes keep only" in little.err
    assert "--quant keep-touched or --quant dequantize keeps it" in little.err
    assert "error added" in little.out
    much = said(capsys, "merge", *common, "-o", tmp_path / "b", "--json")
    assert "Warning" not in much.err
    assert json.loads(much.out)["requantised"]["retained"] > 0.9
    assert "2 of 14 quantised weights are quantised again" in much.err
    shown = said(capsys, "merge", *common, "-o", tmp_path / "c", "--dry-run", "--json")
    size = sum((base / f).stat().st_size for f in FILES)
    assert json.loads(shown.out)["disk"] == size


def test_lists_of_plain_modules_stay(made, tmp_path):
    base, _, adapter = made("fp8")
    merged(base, adapter, tmp_path / "out", dtype="float16")
    before, after = (config_of(f)["quantization_config"] for f in (base, tmp_path / "out"))
    assert before == after
    assert any(n in before for n in LISTS)
    held = tensors_of(tmp_path / "out")
    assert held["model.norm.weight"].dtype == np.float16
    assert held[f"{CHANGED[0]}.weight_scale_inv"].dtype == np.float32


def test_columns_that_are_no_multiple_of_a_block(tmp_path):
    name, shape = "blocks.0.attn.q_proj", (70, 333)
    q = NF4.quantise(drawn("odd", *shape) / 50)
    save_file(NF4.tensors(f"{name}.weight", q), tmp_path / "base.safetensors")
    pair = {f"{name}.lora_A.weight": (2, 333), f"{name}.lora_B.weight": (70, 2)}
    adapter = save(tmp_path / "adapter", pair)
    out = tmp_path / "out.safetensors"
    _, _, after = merged(tmp_path / "base.safetensors", adapter, out)
    new = NF4.dequantise(q) + delta(adapter, name).astype("f4")
    expected = NF4.tensors(f"{name}.weight", NF4.quantise(new))
    assert np.count_nonzero(after[f"{name}.weight"] != expected[f"{name}.weight"]) <= 2
    assert lorakit.verify(out, full=True).differences == ()


def test_a_convolution_with_one_scale_for_all(tmp_path):
    name, shape = "down_blocks.0.resnets.0.conv1", (40, 24, 3, 3)
    w = drawn("conv", *shape) / 20
    scale = np.array(np.abs(w).max() / 448, "f4")
    tensors = {f"{name}.weight": (w / scale).astype(F8), f"{name}.scale_weight": scale}
    save_file(tensors, tmp_path / "base.safetensors")
    pair = {f"{name}.lora_A.weight": (2, 24, 3, 3), f"{name}.lora_B.weight": (40, 2, 1, 1)}
    adapter = save(tmp_path / "adapter", pair, target_modules=["conv1"])
    out = tmp_path / "out.safetensors"
    report, _, _ = merged(tmp_path / "base.safetensors", adapter, out, weights=0.01)
    assert report.requantised["weights"] == 1
    assert lorakit.verify(out, full=True).differences == ()


@pytest.mark.parametrize("jobs", [1, 3])
def test_one_scale_for_a_large_weight_follows_from_all_of_its_rows(jobs, tmp_path):
    name, shape = "blocks.0.attn.q_proj", (2900, 1500)
    w = drawn("large", *shape) / 20
    scale = np.array(np.abs(w).max() / 448, "f4")
    tensors = {f"{name}.weight": (w / scale).astype(F8), f"{name}.scale_weight": scale}
    save_file(tensors, tmp_path / "base.safetensors")
    b = np.zeros((2900, 1), "f4")
    b[2800] = 1  # an outlier in the last block is seen in the first
    pair = {f"{name}.lora_A.weight": np.ones((1, 1500), "f4"), f"{name}.lora_B.weight": b}
    adapter = save(tmp_path / "adapter", pair, lora_alpha=1, r=1)
    run = lorakit.RunOptions(jobs, sync=False)
    out = tmp_path / "out.safetensors"
    _, _, after = merged(tmp_path / "base.safetensors", adapter, out, run=run)
    held = (w / scale).astype(F8).astype("f4") * scale
    largest = np.abs(held[2800] + 1).max()
    assert after[f"{name}.scale_weight"] == pytest.approx(largest / 448)
    assert lorakit.verify(out, full=True).differences == ()
