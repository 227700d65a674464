"""Pre-quantised checkpoints as they are written; tests/quant/test_stored.py reads them."""

import json

import numpy as np
import pytest

from lorakit.math.cast import code_of
from lorakit.quant.table import codec

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
W = np.random.default_rng(0).standard_normal((48, 100), dtype=np.float32)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("nf4", {}), ("nf4", {"block": 128, "double": True}), ("fp4", {}), ("int8", {})],
)
def test_headers_are_known_before_the_weight(name, settings):
    found = codec(name, **settings)
    tensors = found.tensors(NAME, found.quantise(W), padded=True)
    told = [(i.name, i.dtype, i.shape) for i in found.infos(NAME, W.shape)]
    assert told == [(n, code_of(t.dtype), t.shape) for n, t in tensors.items()]


@pytest.mark.parametrize("scale", [1e-40, 1e-5, 0.3, 1e30])
def test_the_padded_state_is_the_state_with_spaces_and_always_as_long(scale):
    found = codec("nf4", double=True)
    q = found.quantise(W * np.float32(scale))
    plain, padded = (found.tensors(NAME, q, padded=p)[STATE].tobytes() for p in (False, True))
    assert padded.rstrip() == plain
    assert len(padded) == found.infos(NAME, W.shape)[-1].shape[0]


def test_the_state_says_what_the_weight_was():
    found = codec("nf4")
    tensors = found.tensors(NAME, found.quantise(W), dtype="float16")
    assert json.loads(tensors[STATE].tobytes()) == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float16",
        "shape": [48, 100],
    }
