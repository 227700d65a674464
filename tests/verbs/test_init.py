"""init: which weights get factors, what is written, and what is refused."""

import json
import signal
import subprocess
import sys
import time

import ml_dtypes  # noqa: F401  (bfloat16 for NumPy)
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.errors import InputError, MisfitError, OutputError, ResourceError, UsageError
from lorakit.math.initial import METHODS
from tests.verbs.adapters import bytes_of, config_of, deltas, drawn, tensors_of
from tests.verbs.conftest import SCRATCH

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 40}
Q, DOWN = "model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.down_proj"
Q0, Q1, DOWN0, DOWN1 = Q.format(0), Q.format(1), DOWN.format(0), DOWN.format(1)
WIDTHS = {Q0: 12, Q1: 12, DOWN0: 20, DOWN1: 20}
SHAPES = {
    "model.embed_tokens.weight": (40, 12),
    **{f"{Q.format(i)}.weight": (16, 12) for i in (0, 1)},
    **{f"{DOWN.format(i)}.weight": (12, 20) for i in (0, 1)},
    "model.norm.weight": (12,),
    "lm_head.weight": (40, 12),
}
CHANGING = [name for name, method in METHODS.items() if method.changes_base]
EXPERTS = {
    "model.layers.0.mlp.gate.weight": (4, 12),
    **{f"model.layers.0.mlp.experts.{i}.up_proj.weight": (8, 12) for i in range(4)},
    f"{Q0}.weight": (16, 12),
}


def checkpoint(folder, shapes=SHAPES, config=LLAMA, **given):
    """A base in bfloat16; a dot in the name of a given tensor is written `__`."""
    folder.mkdir()
    tensors = {n: drawn(n, *s).astype("bfloat16") for n, s in shapes.items()}
    tensors |= {n.replace("__", "."): t for n, t in given.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def base(tmp_path):
    return checkpoint(tmp_path / "base")


@pytest.fixture
def stats(tmp_path):
    """Second moments of the inputs of every layer, of two spellings and both shapes."""
    x = {m: drawn(m, 50, width) for m, width in WIDTHS.items()}
    found = {f"{m}.second_moment": x[m].T @ x[m] / 50 for m in (Q0, DOWN0)}
    found[Q1] = x[Q1].T @ x[Q1] / 50
    found[DOWN1] = (x[DOWN1] ** 2).mean(axis=0)
    save_file(found, tmp_path / "stats.safetensors")
    return tmp_path / "stats.safetensors"


def begun(base, out, **options):
    return lorakit.init(base, out, run=options.pop("run", SCRATCH), **{"rank": 4, **options})


def options_of(method, stats):
    return {"stats": stats} if "moments" in METHODS[method].needs else {}


def modules(out):
    return {n.rpartition(".lora_")[0] for n in tensors_of(out)}


def wide(folder, name):
    return load_file(folder / "model.safetensors")[name].astype("f8")


# Which weights.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {Q0, Q1, DOWN0, DOWN1}),
        ({"target_modules": "q_proj"}, {Q0, Q1}),
        ({"target_modules": "q_proj,mlp.down_proj"}, {Q0, Q1, DOWN0, DOWN1}),
        ({"target_modules": Q1}, {Q1}),
        ({"target_modules": r".*\.(q|k)_proj"}, {Q0, Q1}),
        ({"target_modules": "q_proj,lm_head"}, {Q0, Q1, "lm_head"}),
        ({"target_modules": "embed_tokens"}, {"model.embed_tokens"}),
        ({"exclude_modules": "down_proj"}, {Q0, Q1}),
        ({"exclude_modules": r".*\.1\..*"}, {Q0, DOWN0}),
        ({"exclude_modules": "down_proj,lm_head,embed_tokens"}, {Q0, Q1}),
        ({"layers": "1"}, {Q1, DOWN1}),
        ({"layers": "0-1", "target_modules": "q_proj"}, {Q0, Q1}),
        ({"layers": "0,7-9"}, {Q0, DOWN0}),
    ],
)
def test_names_layers_and_patterns_choose_the_modules(base, tmp_path, options, expected):
    begun(base, tmp_path / "out", **options)
    assert modules(tmp_path / "out") == expected
    assert config_of(tmp_path / "out")["target_modules"] == sorted(expected)


def test_experts_are_a_choice(tmp_path):
    base = checkpoint(tmp_path / "base", EXPERTS, {"model_type": "qwen3_moe"})
    begun(base, tmp_path / "dense")
    assert modules(tmp_path / "dense") == {Q0}
    begun(base, tmp_path / "all", experts=True)
    assert len(modules(tmp_path / "all")) == 5
    with pytest.raises(MisfitError, match="no module is meant by 'up_proj'") as caught:
        begun(base, tmp_path / "out", target_modules="up_proj")
    assert "--experts" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "said", "hint"),
    [
        ({"target_modules": "q_porj"}, "'q_porj'", "'q_proj'"),
        ({"target_modules": "q_proj,k_proj"}, "'k_proj'", "inspect"),
        ({"target_modules": "norm"}, "'norm'", "inspect"),
        ({"target_modules": ".*nothing"}, "nothing", "inspect"),
        ({"layers": "5"}, "in the layers asked for", ""),
        ({"exclude_modules": ".*"}, "that is not excluded", ""),
        ({"exclude_modules": "down_porj"}, "'down_porj', which is to be left out", "'down_proj'"),
        ({"exclude_modules": "down_proj,k_proj"}, "'k_proj'", "inspect"),
        ({"exclude_modules": "down_proj, k_proj"}, "'down_proj, k_proj'", "inspect"),
        ({"exclude_modules": "mlp"}, "'mlp'", r"'.*mlp.*'"),
    ],
)
def test_targets_that_mean_nothing_are_refused(base, tmp_path, options, said, hint):
    with pytest.raises(MisfitError, match=said) as caught:
        begun(base, tmp_path / "out", **options)
    assert hint in caught.value.hint
    assert not (tmp_path / "out").exists()


# What is written.


def test_a_convolution_in_groups_is_refused(tmp_path):
    shapes = {
        "mixer.conv1d.weight": (8, 1, 4),
        "mixer.conv.weight": (8, 3, 4),
        f"{Q0}.weight": (8, 8),
    }
    base = checkpoint(tmp_path / "base", shapes)
    with pytest.raises(MisfitError, match="'conv1d': it is a convolution in groups"):
        begun(base, tmp_path / "out", target_modules="conv1d")
    begun(base, tmp_path / "out", target_modules="conv")


def test_ranks_and_alphas_are_those_asked_for(base, tmp_path):
    report = begun(
        base,
        tmp_path / "out",
        rank=4,
        alpha=16,
        rank_pattern=((r"layers\.1\..*q_proj", 2), ("down_proj", 8)),
        alpha_pattern=(("down_proj", 4.0),),
    )
    found = {r.name.removesuffix(".weight"): (r.rank, r.scaling) for r in report.rows}
    assert found == {Q0: (4, 4.0), Q1: (2, 8.0), DOWN0: (8, 0.5), DOWN1: (8, 0.5)}
    opened = lorakit.open_adapter(tmp_path / "out")
    for module, (rank, scaling) in found.items():
        a, b = opened.modules[module].a, opened.modules[module].b
        assert (a.shape[0], b.shape[1]) == (rank, rank)
        assert opened.config.scaling(module, rank) == scaling


def test_a_plain_pattern_means_whole_segments_of_a_name(tmp_path):
    layers = [f"encoder.block.{n}.layer.0.SelfAttention" for n in (1, 10)]
    shapes = {f"{layer}.{leaf}.weight": (8, 8) for layer in layers for leaf in ("q", "v", "kv")}
    base = checkpoint(tmp_path / "base", shapes)
    patterns = {"rank_pattern": {"v": 2, "block.1": 3}, "alpha_pattern": {"k|q": 5.0}}
    report = begun(base, tmp_path / "out", rank=4, target_modules="q,v,kv", **patterns)
    found = {r.name.removesuffix(".weight"): (r.rank, r.rank * r.scaling) for r in report.rows}
    for layer, rank in zip(layers, (3, 4), strict=True):
        assert found[f"{layer}.v"] == (2, 5.0)  # by the "k" of "block"
        assert found[f"{layer}.q"] == found[f"{layer}.kv"] == (rank, 5.0)


@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_means_nothing_is_refused(base, tmp_path, option):
    said = r"meant by the pattern 'q_prj'. Is it 'q_proj'\? They end in down_proj, q_proj."
    with pytest.raises(MisfitError, match=said):
        begun(base, tmp_path / "out", **{option: (("q_proj", 2), ("q_prj", 2))})
    with pytest.raises(MisfitError, match=said):
        lorakit.loftq(base, tmp_path / "out", rank=4, run=SCRATCH, **{option: (("q_prj", 2),)})


def test_a_pattern_may_name_one_stack_of_experts_as_targets_do(tmp_path):
    experts = "model.layers.0.mlp.experts"
    shapes = {f"{experts}.down_proj": (3, 8, 12), f"{experts}.gate_up_proj": (3, 12, 8)}
    base = checkpoint(tmp_path / "base", shapes)
    patterns = {"rank_pattern": (("experts.down_proj", 2),), "alpha_pattern": ((r"experts$", 3),)}
    begun(base, tmp_path / "out", experts=True, **patterns)
    rows = {n: t.shape for n, t in tensors_of(tmp_path / "out").items() if "lora_A" in n}
    assert sorted(s[0] for s in rows.values()) == [3 * 2, 3 * 4]
    assert config_of(tmp_path / "out")["lora_alpha"] == 3


def test_orthogonal_factors_of_sixteen_bits_are_told_to_change_a_little(base, tmp_path):
    for dtype, notes in (("float32", 0), ("bfloat16", 1)):
        report = begun(base, tmp_path / dtype, method="orthogonal", dtype=dtype)
        assert len(report.notes) == notes


def test_rank_stabilised_scaling_is_over_the_root(base, tmp_path):
    report = begun(base, tmp_path / "out", rank=4, alpha=16, rslora=True)
    assert {r.scaling for r in report.rows} == {8.0}
    opened = lorakit.open_adapter(tmp_path / "out")
    assert opened.config.scaling(Q0, 4) == 8.0


def test_alpha_is_the_rank_unless_it_is_given(base, tmp_path):
    begun(base, tmp_path / "out", rank=6)
    config = config_of(tmp_path / "out")
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (6, 6, True)
    assert (config["task_type"], config["inference_mode"]) == ("CAUSAL_LM", False)
    assert config["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize("method", ["kaiming", "random"])
def test_magnitudes_of_dora_are_the_norms_of_the_weight_with_its_update(base, tmp_path, method):
    begun(base, tmp_path / "out", dora=True, method=method)
    found, update = tensors_of(tmp_path / "out"), deltas(tmp_path / "out")
    for module in (Q0, DOWN1):
        w = wide(base, f"{module}.weight") + update[f"{module}.weight"][0]
        norms = found[f"{module}.lora_magnitude_vector"]
        np.testing.assert_allclose(norms, np.linalg.norm(w, axis=1), rtol=1e-6)
    assert config_of(tmp_path / "out")["use_dora"]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bytes_on_any_number_of_jobs(base, stats, tmp_path, method):
    options = {"method": method, **options_of(method, stats)}
    outs = []
    for name, jobs in (("one", 1), ("two", 1), ("four", 4)):
        begun(base, tmp_path / name, run=lorakit.RunOptions(jobs=jobs, sync=False), **options)
        pair = (tmp_path / name / "base").exists()
        parts = ("adapter", "base") if pair else (".",)
        folders = [bytes_of(tmp_path / name / part) for part in parts]
        outs.append([f[n] for f in folders for n in sorted(f) if n.endswith("tensors")])
    assert outs[0] == outs[1] == outs[2]
    begun(base, tmp_path / "other", seed=1, **options)
    drawn_from_it = not METHODS[method].needs
    folder = tmp_path / "other" / (parts[0])
    other = (folder / "adapter_model.safetensors").read_bytes()
    assert (other == outs[0][0]) != drawn_from_it


def test_weights_of_one_shape_begin_differently(base, tmp_path):
    begun(base, tmp_path / "out")
    found = tensors_of(tmp_path / "out")
    assert not np.array_equal(found[f"{Q0}.lora_A.weight"], found[f"{Q1}.lora_A.weight"])


@pytest.mark.parametrize("method", [n for n in METHODS if n not in (*CHANGING, "random")])
def test_these_leave_the_model_as_it_is(base, stats, tmp_path, method):
    begun(base, tmp_path / "out", method=method, **options_of(method, stats))
    lorakit.merge(base, tmp_path / "out", tmp_path / "merged", run=SCRATCH)
    one, other = (load_file(f / "model.safetensors") for f in (base, tmp_path / "merged"))
    assert all(np.array_equal(one[n], other[n]) for n in one)


# A base and an adapter.


def assert_together_are(base, out, within=1):
    """Each weight is the original's, up to roundings of what is left of it to bfloat16."""
    found, rest = deltas(out / "adapter"), load_file(out / "base/model.safetensors")
    for name, original in load_file(base / "model.safetensors").items():
        if name not in found:
            assert np.array_equal(rest[name], original)
            continue
        residual = rest[name].astype("f8")
        unit = 2.0 ** (np.floor(np.log2(np.maximum(abs(residual), 1e-30))) - 8)
        assert (
            abs(residual + found[name][0] - original.astype("f8")) <= within * unit + 1e-6
        ).all()


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


def test_a_preview_computes_nothing(base, tmp_path):
    job = lorakit.plan_init(base, rank=4, method="pissa")
    (base / "model.safetensors").write_bytes(b"")  # nothing of it is read any more
    report = job.preview()
    assert [(r.rank, r.scaling) for r in report.rows] == [(4, 1.0)] * 4
    assert report.written == 0


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


def test_what_is_there_is_kept_unless_it_may_be_replaced(base, tmp_path):
    begun(base, tmp_path / "out", method="pissa")
    with pytest.raises(OutputError, match="exists"):
        begun(base, tmp_path / "out", method="olora")
    begun(base, tmp_path / "out", method="olora", run=lorakit.RunOptions(overwrite=True))
    assert_together_are(base, tmp_path / "out")
    with pytest.raises(OutputError, match="input"):
        begun(base, base / "out", method="olora")


# What is refused.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 0}, "rank is 1 or more"),
        ({"rank_pattern": (("q_proj", 0),)}, "rank is 1 or more"),
        ({"alpha": 0.0}, "above 0"),
        ({"alpha": float("nan")}, "above 0"),
        ({"alpha_pattern": (("q", -1.0),)}, "above 0"),
        ({"method": "kaimin"}, "kaimin.* is none of kaiming"),
        ({"method": "loftq", "dora": True}, "does not go with loftq"),
        ({"method": "pissa", "dora": True}, "DoRA"),
        ({"method": "orthogonal", "rank": 3}, "not even"),
        ({"method": "pissa-fast", "adapter_only": True}, "cannot be computed again"),
        ({"method": "corda", "adapter_only": True}, "cannot be computed again"),
        ({"method": "eva"}, "pass --stats"),
        ({"stats": "stats.safetensors"}, "does not look at statistics"),
        ({"dtype": "int8"}, "int8"),
        ({"layers": "0-"}, "write numbers"),
        ({"target_modules": "("}, "no regular expression"),
        ({"exclude_modules": "["}, "no regular expression"),
    ],
)
def test_an_option_that_makes_no_sense(base, tmp_path, options, said):
    with pytest.raises(UsageError, match=said):
        begun(base, tmp_path / "out", **options)


@pytest.mark.parametrize("options", [{"rank": 13}, {"rank_pattern": (("q_proj", 13),)}])
def test_a_rank_that_a_weight_does_not_have_is_refused(base, tmp_path, options):
    with pytest.raises(MisfitError, match=r"rank 13 is more than .* \["):
        begun(base, tmp_path / "out", **options)


def test_kinds_that_a_method_is_not_for_are_refused(tmp_path):
    base = checkpoint(tmp_path / "base", {**SHAPES, "conv.weight": (8, 6, 3)})
    for method in ("pissa", "olora", "mica"):
        for module in ("conv", "embed_tokens"):
            with pytest.raises(MisfitError, match=f"no linear layer, and {method}"):
                begun(base, tmp_path / "out", method=method, target_modules=module)
    gpt2 = checkpoint(
        tmp_path / "gpt2", {"h.0.attn.c_attn.weight": (12, 36)}, {"model_type": "gpt2"}
    )
    with pytest.raises(MisfitError, match="readers do not take olora out"):
        begun(gpt2, tmp_path / "out", method="olora", adapter_only=True)
    stack = {"model.layers.0.mlp.experts.down_proj": (4, 20, 12)}
    oss = checkpoint(tmp_path / "oss", stack, {"model_type": "gpt_oss"})
    for options in ({"dora": True}, {"method": "mica"}):
        with pytest.raises(MisfitError, match="stack of experts"):
            begun(oss, tmp_path / "out", experts=True, **options)


def test_statistics_of_another_model_are_refused(base, stats, tmp_path):
    lacking = {n: t for n, t in load_file(stats).items() if DOWN1 not in n}
    other = {**lacking, DOWN1: np.ones(21, "f4")}
    for tensors, said in ((lacking, "has nothing of"), (other, r"has \[21\] for")):
        save_file(tensors, tmp_path / "other.safetensors")
        with pytest.raises(MisfitError, match=f"{said} .*layers.1.mlp.down_proj"):
            begun(base, tmp_path / "out", method="eva", stats=tmp_path / "other.safetensors")


def test_nan_is_refused_by_name_and_nothing_is_left(tmp_path):
    bad = drawn("x", 16, 12)
    bad[3, 3] = np.nan
    base = checkpoint(tmp_path / "base", **{f"{Q0}.weight".replace(".", "__"): bad})
    for method in ("pissa", "mica"):
        with pytest.raises(InputError, match=r"0\.self_attn\.q_proj\.weight': .*NaN"):
            begun(base, tmp_path / "out", method=method)
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_a_quantised_base_is_refused(tmp_path):
    codes = np.zeros((16, 12), np.int8)
    base = checkpoint(tmp_path / "base", **{f"{Q0}.weight".replace(".", "__"): codes})
    with pytest.raises(InputError, match="quantised"):
        begun(base, tmp_path / "out")


def test_too_little_memory_is_told_before_anything_is_written(base, tmp_path):
    for method in ("kaiming", "pissa"):
        with pytest.raises(ResourceError, match="memory"):
            begun(base, tmp_path / "out", method=method, run=lorakit.RunOptions(max_memory=1000))
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("model_type", "left"), [("mamba", {"in_proj"}), ("jamba", {"in_proj", "out_proj"})]
)
def test_all_linear_layers_are_those_that_an_adapter_acts_on(tmp_path, model_type, left):
    """PEFT refuses out_proj of Mamba; the weight of dt_proj is read around it."""
    mixer = "backbone.layers.0.mixer"
    shapes = {f"{mixer}.{leaf}.weight": (8, 12) for leaf in ("in_proj", "dt_proj", "out_proj")}
    base = checkpoint(tmp_path / "base", shapes, {"model_type": model_type})
    for plan in (lorakit.plan_init, lorakit.plan_loftq):
        found = plan(base, rank=2)
        names = [w.form.key for w in found.weights] if plan is lorakit.plan_loftq else []
        names = names or [row.name for row in found.rows]
        assert {name.split(".")[-2] for name in names} == left
    (asked,) = lorakit.plan_init(base, rank=2, target_modules="dt_proj").rows
    assert asked.name == f"{mixer}.dt_proj.weight"
