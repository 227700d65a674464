"""Bases of a few layers, and adapters that begin on them."""

import json

import ml_dtypes  # noqa: F401  (bfloat16 for NumPy)
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.math.initial import METHODS
from tests.verbs.adapters import deltas, drawn
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


def wide(folder, name):
    return load_file(folder / "model.safetensors")[name].astype("f8")


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
