"""A base that LoftQ splits, and what both parts leave of it."""

import pytest
from safetensors.numpy import load_file

import lorakit
from tests.verbs.adapters import drawn
from tests.verbs.conftest import SCRATCH
from tests.verbs.test_extract import DOWN, SHAPES, Q, checkpoint

K = "model.layers.1.self_attn.k_proj"
BIG = {**SHAPES, f"{Q}.weight": (64, 96), f"{DOWN}.weight": (96, 128), f"{K}.weight": (32, 96)}
LAYERS = (Q, DOWN, K)


@pytest.fixture
def base(tmp_path):
    tensors = {n: drawn(n, *s) / 8 for n, s in BIG.items()}
    return checkpoint(tmp_path / "base", tensors)


def split(base, out, **options):
    return lorakit.loftq(base, out, run=SCRATCH, **{"rank": 8, **options})


def weights(folder):
    return load_file(folder / "model.safetensors")
