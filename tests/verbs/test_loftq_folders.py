"""loftq on files: what base and adapter leave of each weight, and what stays as it was."""

import functools
import json
from math import sqrt

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.errors import InputError, MisfitError
from lorakit.quant.stored.table import stored_weights
from lorakit.quant.table import codec
from lorakit.store.memory import MemorySource
from lorakit.verbs.verify import ResultError
from tests.store.test_imatrix import plain
from tests.verbs.adapters import config_of, deltas, drawn
from tests.verbs.loftq_scene import BIG, LAYERS, K, base, split, weights
from tests.verbs.test_extract import DOWN, LLAMA, Q, checkpoint

__all__ = ["base"]


def values(folder, module):
    """What a loader makes of a quantised weight, float64."""
    source = MemorySource(weights(folder))
    found = next(w for w in stored_weights(source, {}) if w.info.name == f"{module}.weight")
    out = np.empty(found.info.shape, np.float32)
    found.values(source, 0, len(out), out)
    return out.astype("f8")


def left(base, out, module):
    """The norm of what base and adapter together leave of a weight."""
    delta = deltas(out / "adapter")[f"{module}.weight"][0]
    w = weights(base)[f"{module}.weight"].astype("f8")
    return np.linalg.norm(w - values(out / "base", module) - delta)


@pytest.mark.parametrize("quant", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("alpha", [4, 8, 16])
def test_base_and_adapter_leave_what_the_report_says_and_less_than_quantising(
    base, tmp_path, quant, alpha
):
    done = split(base, tmp_path / "out", quant=quant, alpha=alpha)
    assert config_of(tmp_path / "out/adapter")["lora_alpha"] == alpha
    for row in done.rows:
        module = row.name.removesuffix(".weight")
        assert left(base, tmp_path / "out", module) == pytest.approx(row.norm, rel=1e-4)
        plain = codec(quant)
        w = weights(base)[row.name]
        assert row.plain == pytest.approx(
            np.linalg.norm(w - plain.dequantise(plain.quantise(w), "float32")), rel=1e-4
        )
        assert row.norm < 0.95 * row.plain
    assert 0 < done.ratio < 0.95


def test_factors_that_lose_digits_are_in_what_is_told(tmp_path):
    low = drawn("b", 64, 4) @ drawn("a", 4, 96)
    tensors = {f"{Q}.weight": low + drawn("rest", 64, 96) / 50}
    base, out = checkpoint(tmp_path / "base", tensors), tmp_path / "out"
    (row,) = split(base, out, quant="int8", start="lowrank", dtype="bfloat16").rows
    assert left(base, out, Q) == pytest.approx(row.norm, rel=1e-3)
    lorakit.verify(out)


def test_a_scaling_of_any_kind_gives_the_same_remainder(base, tmp_path):
    ways = {"plain": {}, "half": {"alpha": 4}, "double": {"alpha": 16}, "rslora": {"rslora": True}}
    for name, options in ways.items():
        split(base, tmp_path / name, **options)
    found = {n: left(base, tmp_path / n, Q) for n in ways}
    assert max(found.values()) == pytest.approx(min(found.values()), rel=1e-4)


def test_what_is_not_quantised_has_the_bytes_that_it_had(base, tmp_path):
    split(base, tmp_path / "out", skip="down_proj")
    before, after = weights(base), weights(tmp_path / "out/base")
    for name in set(before) - {f"{Q}.weight", f"{K}.weight"}:
        assert before[name].tobytes() == after[name].tobytes(), name
    config = json.loads((tmp_path / "out/base/config.json").read_text())
    said = config["quantization_config"]
    assert said["load_in_4bit"]
    assert said["bnb_4bit_quant_type"] == "nf4"
    assert said["bnb_4bit_compute_dtype"] == "float32"
    assert set(said["llm_int8_skip_modules"]) == {DOWN, "lm_head", "model.embed_tokens"}
    assert config_of(tmp_path / "out/adapter")["init_lora_weights"] is True
    assert config_of(tmp_path / "out/adapter")["target_modules"] == sorted([Q, K])


def test_modules_that_no_loader_quantises_get_no_codes(tmp_path):
    names = [
        f"encoder.block.0.layer.{n}.weight" for n in ("0.SelfAttention.q", "1.DenseReluDense.wo")
    ]
    tensors = {n: drawn(n, 64, 64) for n in names}
    base = checkpoint(tmp_path / "base", tensors, {"model_type": "t5"})
    done = split(base, tmp_path / "out")
    assert [r.name for r in done.rows] == names[:1]
    assert "1 weights stay plain" in done.notes[-1]
    skipped = json.loads((tmp_path / "out/base/config.json").read_text())["quantization_config"]
    assert names[1].removesuffix(".weight") in skipped["llm_int8_skip_modules"]
    assert len(split(base, tmp_path / "values", save="dequantized").rows) == 2
    with pytest.raises(MisfitError, match="quantises none of the 1 weights"):
        split(base, tmp_path / "none", target_modules="wo")


def test_the_last_layer_of_a_multihead_attention_gets_no_codes(tmp_path):
    tensors = {"attn.in_proj_weight": drawn("in", 96, 32), "fc.weight": drawn("fc", 32, 32)}
    tensors |= {"attn.out_proj.weight": drawn("out", 32, 32)}
    base = checkpoint(tmp_path / "base", tensors)
    assert [r.name for r in split(base, tmp_path / "out").rows] == ["fc.weight"]


def test_a_head_that_is_quantised_is_not_named_among_what_is_not(base, tmp_path):
    split(base, tmp_path / "out", target_modules="lm_head,q_proj")
    config = json.loads((tmp_path / "out/base/config.json").read_text())
    skipped = config["quantization_config"]["llm_int8_skip_modules"]
    assert set(skipped) == {DOWN, K, "model.embed_tokens"}


def test_dequantised_values_are_those_of_the_codes(base, tmp_path):
    split(base, tmp_path / "packed", iters=2)
    split(base, tmp_path / "plain", iters=2, save="dequantized")
    after = weights(tmp_path / "plain/base")
    for module in LAYERS:
        np.testing.assert_array_equal(
            after[f"{module}.weight"], values(tmp_path / "packed/base", module)
        )
    assert "quantization_config" not in (tmp_path / "plain/base/config.json").read_text()


def test_an_adapter_alone_is_right_on_plain_quantisation(base, tmp_path):
    done = split(base, tmp_path / "out", save="adapter-only")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "lorakit.json",
    ]
    grid = codec("nf4")
    for row in done.rows:
        w = weights(base)[row.name]
        rest = w - grid.dequantise(grid.quantise(w), "float32").astype("f8")
        rest -= deltas(tmp_path / "out")[row.name][0]
        assert np.linalg.norm(rest) == pytest.approx(row.norm, rel=1e-4)


def test_searching_scales_and_starting_low_leave_less(base, tmp_path):
    plain = split(base, tmp_path / "plain").ratio * split(base, tmp_path / "p2").rows[0].plain
    found = split(base, tmp_path / "search", absmax="search", start="lowrank", rank=8)
    assert found.rows[0].norm < plain


def test_statistics_weight_what_is_left(base, tmp_path):
    """Channels that matter more are kept better, and figures are those of outputs."""
    rng = np.random.default_rng(0)
    moments = {m: rng.random(BIG[f"{m}.weight"][1], np.float32) ** 4 for m in LAYERS}
    save_file({f"{m}.second_moment": v for m, v in moments.items()}, tmp_path / "stats.safetensors")
    done = split(base, tmp_path / "out", stats=tmp_path / "stats.safetensors")
    split(base, tmp_path / "without")
    for row in done.rows:
        module = row.name.removesuffix(".weight")
        root = np.sqrt(moments[module].astype("f8"))
        by = {}
        for out in ("out", "without"):
            w = weights(base)[row.name].astype("f8")
            rest = w - values(tmp_path / out / "base", module)
            rest -= deltas(tmp_path / out / "adapter")[row.name][0]
            by[out] = np.linalg.norm(rest * root)
        assert by["out"] == pytest.approx(row.norm, rel=1e-4)
        assert by["out"] < by["without"]
    assert lorakit.verify(tmp_path / "out", full=True).folded_tensors == 3


def test_rms_is_as_good_as_second_moments(base, tmp_path):
    moments = {m: 1 + np.arange(BIG[f"{m}.weight"][1], dtype=np.float32) for m in LAYERS}
    for end, change in ((".second_moment", np.asarray), (".rms", np.sqrt)):
        save_file(
            {m + end: change(v) for m, v in moments.items()}, tmp_path / f"x{end}.safetensors"
        )
    one = split(base, tmp_path / "one", stats=tmp_path / "x.second_moment.safetensors")
    other = split(base, tmp_path / "other", stats=tmp_path / "x.rms.safetensors")
    assert one.ratio == pytest.approx(other.ratio, rel=1e-3)


def test_an_importance_matrix_is_as_good_as_second_moments(base, tmp_path):
    names = {Q: "blk.0.attn_q", DOWN: "blk.0.ffn_down", K: "blk.1.attn_k"}
    moments = {m: 1 + np.arange(BIG[f"{m}.weight"][1], dtype=np.float32) for m in LAYERS}
    save_file(dict(moments), tmp_path / "x.safetensors")
    (tmp_path / "x.dat").write_bytes(plain({f"{names[m]}.weight": v for m, v in moments.items()}))
    found = [split(base, tmp_path / e, stats=tmp_path / f"x.{e}") for e in ("safetensors", "dat")]
    assert found[0].ratio == pytest.approx(found[1].ratio, rel=1e-3)
    missing = {f"{names[Q]}.weight": moments[Q]}
    (tmp_path / "other.dat").write_bytes(plain(missing))
    with pytest.raises(MisfitError, match="has nothing of"):
        split(base, tmp_path / "out", stats=tmp_path / "other.dat")


@pytest.mark.parametrize("full", [False, True])
def test_verify_accepts_it_and_finds_a_changed_code(base, tmp_path, full):
    out = tmp_path / "out"
    split(base, out)
    assert lorakit.verify(out, full=full).folded_tensors == 3
    path = out / "base/model.safetensors"
    tensors = load_file(path)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    infos = json.loads(path.read_bytes()[8 : 8 + header])
    start = infos[f"{Q}.weight"]["data_offsets"][0] + 8 + header
    raw = bytearray(path.read_bytes())
    raw[start : start + 200] = bytes(200)
    path.write_bytes(raw)
    assert tensors[f"{Q}.weight"].tobytes()[:200] != bytes(200)
    with pytest.raises(ResultError, match="base and adapter leave"):
        lorakit.verify(out, full=full)


def test_verify_finds_a_changed_byte_of_an_untouched_tensor(base, tmp_path):
    out = tmp_path / "out"
    split(base, out)
    path = out / "base/model.safetensors"
    raw = path.read_bytes()
    at = raw.index(weights(base)["lm_head.weight"].tobytes())
    path.write_bytes(raw[:at] + b"\xff\xff" + raw[at + 2 :])
    with pytest.raises(ResultError, match=r"lm_head\.weight"):
        lorakit.verify(out)


@pytest.mark.parametrize(
    ("place", "kind"),
    [
        (["files"], InputError),
        (["tensors"], InputError),
        (["files", "base/model.safetensors"], InputError),
        (["tensors", f"{Q}.weight", "norm"], ResultError),
    ],
)
@pytest.mark.parametrize("value", [None, 5, "x", []])
def test_a_manifest_that_was_tampered_with_ends_in_one_line(base, tmp_path, place, kind, value):
    out = tmp_path / "out"
    split(base, out)
    manifest = json.loads((out / "lorakit.json").read_text())
    *way, last = place
    inner = functools.reduce(dict.__getitem__, way, manifest)
    inner[last] = value
    (out / "lorakit.json").write_text(json.dumps(manifest))
    with pytest.raises(kind):
        lorakit.verify(out, full=True)


def test_ranks_and_alphas_of_their_own(base, tmp_path):
    done = split(base, tmp_path / "out", rank_pattern=(("down_proj", 16),), rslora=True)
    assert {r.name: r.rank for r in done.rows}[f"{DOWN}.weight"] == 16
    assert left(base, tmp_path / "out", DOWN) == pytest.approx(
        next(r.norm for r in done.rows if r.name == f"{DOWN}.weight"), rel=1e-4
    )
    config = config_of(tmp_path / "out/adapter")
    assert config["rank_pattern"] == {"down_proj": 16} or DOWN in str(config["rank_pattern"])
    assert sqrt(16) == 4


def test_a_model_type_that_turns_its_weights(tmp_path):
    """GPT-2 has its weights (in, out); codes lie as bitsandbytes lays them, (out, in)."""
    name = "h.0.attn.c_attn"
    tensors = {f"{name}.weight": drawn(name, 48, 144) / 8, "wte.weight": drawn("wte", 40, 48)}
    base = checkpoint(tmp_path / "gpt2", tensors, {**LLAMA, "model_type": "gpt2"})
    split(base, tmp_path / "out")
    w = tensors[f"{name}.weight"].astype("f8").T
    rest = w - values(tmp_path / "out/base", name)
    rest -= deltas(tmp_path / "out/adapter")[f"{name}.weight"][0]
    split(base, tmp_path / "plain", save="dequantized")
    np.testing.assert_array_equal(
        weights(tmp_path / "plain/base")[f"{name}.weight"], values(tmp_path / "out/base", name).T
    )
    assert np.linalg.norm(rest) < 0.1 * np.linalg.norm(w)
