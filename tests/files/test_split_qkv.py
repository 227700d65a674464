"""Alphas of fused projections that kohya's `split_qkv` trained in parts, and saved as one."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

import lorakit
from lorakit.adapter.files.reading import open_file
from lorakit.cli import cli
from tests.files.making_loras import dense, updates
from tests.files.test_convert_names import RANK, SCRATCH, WIDTH, drawn, factors, product, saved

ATTENTION = "lora_unet_double_blocks_0_img_attn_qkv"
SINGLE = "lora_unet_single_blocks_0_linear1"
ALPHA = 1.5
SAID = json.dumps({"split_qkv": "True", "train_blocks": "all"})


def trained_in_parts(sizes, *, zero=None):
    """Factors of the parts of a fused projection, and of the whole as sd-scripts saves it."""
    parts = [(drawn(n, RANK, WIDTH), drawn(n + 9, rows, RANK)) for n, rows in enumerate(sizes)]
    if zero is not None:
        parts[zero][1][:] = 0
    whole = np.zeros((sum(sizes), RANK * len(sizes)), "f4")
    row = 0
    for n, (_, b) in enumerate(parts):
        whole[row : row + len(b), n * RANK : (n + 1) * RANK] = b
        row += len(b)
    return parts, np.concatenate([a for a, _ in parts]), whole


def in_parts(path, *, zero=None, dtype="f4", **metadata):
    """A file with fused projections of three parts and of four; and the updates as trained."""
    tensors, expected = {}, {}
    places = {
        ATTENTION: ("transformer_blocks.0", ["attn.to_q", "attn.to_k", "attn.to_v"]),
        SINGLE: (
            "single_transformer_blocks.0",
            ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
        ),
    }
    for name, (block, ends) in places.items():
        sizes = [4 * WIDTH if e == "proj_mlp" else WIDTH for e in ends]
        parts, a, b = trained_in_parts(sizes, zero=zero)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = a, b
        tensors[f"{name}.alpha"] = np.array(ALPHA, dtype)
        for end, (a, b) in zip(ends, parts, strict=True):
            update = ALPHA / RANK * b.astype("f8") @ a.astype("f8")
            expected["transformer", f"{block}.{end}"] = update
    tensors |= factors(["double_blocks.0.img_attn.proj"])
    name = "lora_unet_double_blocks_0_img_attn_proj"
    expected["transformer", "transformer_blocks.0.attn.to_out.0"] = product(tensors, name)
    return saved(path, tensors, **metadata), expected


@pytest.mark.parametrize("zero", [None, 1])
@pytest.mark.parametrize("to", ["diffusers", "kohya", "comfyui"])
def test_alphas_of_split_qkv_are_those_of_the_training(tmp_path, to, zero):
    path, expected = in_parts(tmp_path / "a.safetensors", zero=zero, ss_network_args=SAID)
    out = tmp_path / "out.safetensors"
    options = {"to": to, "family": "flux", "fix_split_qkv_alpha": True, "run": SCRATCH}
    lorakit.convert(path, out, **options)
    found = {(d.component, d.module): dense(d) for d in open_file(out, family="flux").deltas}
    assert {k for k, d in found.items() if d.any()} == {k for k, d in expected.items() if d.any()}
    for key, delta in found.items():
        np.testing.assert_allclose(delta, expected[key], rtol=1e-5, atol=1e-6)
    if to == "kohya":
        again, before = load_file(out), load_file(path)
        assert float(again[f"{ATTENTION}.alpha"]) == 3 * ALPHA
        assert float(again[f"{SINGLE}.alpha"]) == 4 * ALPHA
        factors_of = [n for n in before if not n.endswith(".alpha")]
        if zero is None:
            assert all(again[n].tobytes() == before[n].tobytes() for n in factors_of)
        arguments = json.loads(open_file(out, family="flux").metadata["ss_network_args"])
        assert arguments == {"split_qkv": "False", "train_blocks": "all"}
        with pytest.raises(lorakit.LorakitError, match="split_qkv"):  # once is enough
            lorakit.convert(out, tmp_path / "twice.safetensors", **options)


def test_alphas_of_split_qkv_are_taken_as_they_are_unless_asked_for(tmp_path):
    path, expected = in_parts(tmp_path / "a.safetensors", ss_network_args=SAID)
    lorakit.convert(path, tmp_path / "out", to="diffusers", family="flux", run=SCRATCH)
    found = updates(tmp_path / "out")
    key = "transformer", "transformer_blocks.0.attn.to_k"
    np.testing.assert_allclose(3 * found[key], expected[key], rtol=1e-5)


@pytest.mark.parametrize(
    "metadata",
    [{}, {"ss_network_args": json.dumps({"split_qkv": "False"})}, {"ss_network_args": "no json"}],
)
def test_alphas_of_another_training_are_not_touched(tmp_path, metadata):
    path, _ = in_parts(tmp_path / "a.safetensors", **metadata)
    options = {"to": "diffusers", "family": "flux", "fix_split_qkv_alpha": True, "run": SCRATCH}
    with pytest.raises(lorakit.LorakitError, match="does not say split_qkv") as caught:
        lorakit.convert(path, tmp_path / "out", **options)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_a_dense_projection_is_no_such_one(tmp_path):
    tensors = factors(["double_blocks.0.img_attn.qkv"], rank=3 * RANK, out=3 * WIDTH)
    path = saved(tmp_path / "a.safetensors", tensors, ss_network_args=SAID)
    options = {"to": "diffusers", "family": "flux", "fix_split_qkv_alpha": True, "run": SCRATCH}
    with pytest.raises(lorakit.LorakitError, match="blocks on the diagonal"):
        lorakit.convert(path, tmp_path / "out", **options)


def test_the_command_takes_the_option(tmp_path):
    path, _ = in_parts(tmp_path / "a.safetensors", ss_network_args=SAID)
    out = tmp_path / "b.safetensors"
    options = ("--to", "kohya", "--family", "flux", "--fix-split-qkv-alpha", "--no-fsync")
    done = CliRunner().invoke(cli, ["convert", str(path), "-o", str(out), *options])
    assert done.exit_code == 0, done.output
    assert float(load_file(out)[f"{SINGLE}.alpha"]) == 4 * ALPHA
