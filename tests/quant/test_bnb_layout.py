"""Pre-quantised checkpoints: what is written can be read, what contradicts itself is refused."""

import json

import numpy as np
import pytest

from lorakit.errors import InputError
from lorakit.math.cast import code_of
from lorakit.quant.table import codec

NAME = "model.layers.0.mlp.up_proj.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
CASES = [
    ("nf4", {}),
    ("nf4", {"double": True}),
    ("nf4", {"block": 128, "double": True}),
    ("fp4", {}),
    ("int8", {}),
]
each = pytest.mark.parametrize(("name", "settings"), CASES)
W = np.random.default_rng(0).standard_normal((48, 100), dtype=np.float32)


@each
def test_what_is_written_is_read_back(name, settings):
    found = codec(name, **settings)
    q = found.quantise(W)
    back = found.from_tensors(NAME, found.tensors(NAME, q))
    assert np.array_equal(found.dequantise(back), found.dequantise(q))


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("double", [False, True])
def test_headers_are_known_before_the_weight(storage, double):
    found = codec("nf4", double=double)
    tensors = found.tensors(NAME, found.quantise(W), storage=storage, padded=True)
    told = [(i.name, i.dtype, i.shape) for i in found.infos(NAME, W.shape, storage=storage)]
    assert told == [(n, code_of(t.dtype), t.shape) for n, t in tensors.items()]


def test_headers_of_int8_are_known_before_the_weight():
    found = codec("int8")
    told = [(i.name, i.dtype, i.shape) for i in found.infos(NAME, W.shape)]
    tensors = found.tensors(NAME, found.quantise(W))
    assert told == [(n, code_of(t.dtype), t.shape) for n, t in tensors.items()]


@pytest.mark.parametrize("scale", [1e-40, 1e-5, 0.3, 1e30])
def test_the_padded_state_is_the_state_with_spaces_and_always_as_long(scale):
    found = codec("nf4", double=True)
    q = found.quantise(W * np.float32(scale))
    plain, padded = (found.tensors(NAME, q, padded=p)[STATE].tobytes() for p in (False, True))
    assert padded.rstrip() == plain
    assert len(padded) == found.infos(NAME, W.shape)[-1].shape[0]


def test_blocks_are_read_from_the_file():
    written = codec("nf4", block=256)
    tensors = written.tensors(NAME, written.quantise(W))
    back = codec("nf4").from_tensors(NAME, tensors)
    assert back.meta == {"block": 256, "dtype": "bfloat16"}
    assert np.array_equal(codec("nf4").dequantise(back), written.dequantise(written.quantise(W)))


def test_a_storage_that_the_bytes_do_not_fill_is_refused():
    with pytest.raises(InputError, match="whole number"):
        codec("nf4").infos(NAME, (3, 3), storage="float32")


@pytest.mark.parametrize("missing", ["", ".absmax", ".quant_map", ".nested_absmax", STATE])
def test_a_missing_tensor_is_named(missing):
    found = codec("nf4", double=True)
    tensors = found.tensors(NAME, found.quantise(W))
    del tensors[missing if missing == STATE else NAME + missing]
    with pytest.raises(InputError) as caught:
        found.from_tensors(NAME, tensors)
    assert caught.value.tensor.startswith(NAME)


@pytest.mark.parametrize(
    "state",
    [
        b"\xff",
        b"[]",
        b"{}",
        b'{"blocksize": 0, "shape": [48, 100]}',
        b'{"blocksize": 64, "shape": [48, -100]}',
        b'{"blocksize": 64, "shape": [48, 101]}',
        b'{"blocksize": "64", "shape": [48, 100]}',
        b'{"blocksize": 64, "shape": 4800}',
        b'{"blocksize": 64, "shape": [48, 100], "nested_offset": NaN}',
        b'{"blocksize": 64, "shape": [48, 100], "nested_offset": "x"}',
        b'{"blocksize": 64, "shape": [48, 100], "nested_blocksize": 7}',
    ],
)
def test_a_state_that_makes_no_sense_is_refused(state):
    found = codec("nf4")
    tensors = found.tensors(NAME, found.quantise(W))
    tensors[STATE] = np.frombuffer(state, np.uint8)
    with pytest.raises(InputError):
        found.from_tensors(NAME, tensors)


def test_other_levels_are_refused():
    found = codec("nf4")
    tensors = found.tensors(NAME, found.quantise(W))
    tensors[f"{NAME}.quant_map"] = np.linspace(-1, 1, 16, dtype=np.float32)
    with pytest.raises(InputError, match="levels"):
        found.from_tensors(NAME, tensors)


def test_int8_in_another_layout_is_refused():
    found = codec("int8")
    tensors = found.tensors("up.weight", found.quantise(W))
    tensors["up.weight_format"] = np.array(1, np.uint8)
    with pytest.raises(InputError, match="layout"):
        found.from_tensors("up.weight", tensors)


def test_the_state_says_what_the_weight_was():
    found = codec("nf4")
    tensors = found.tensors(NAME, found.quantise(W), dtype="float16")
    assert json.loads(tensors[STATE].tobytes()) == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float16",
        "shape": [48, 100],
    }
