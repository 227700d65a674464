"""Quantised weights as checkpoints store them: every layout of the table, its values those of the
libraries that wrote it, any rows the same as in the whole.
"""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorakit.quant.stored
from lorakit.errors import InputError
from lorakit.quant.stored.mxfp4 import BLOCK, LEVELS
from lorakit.quant.stored.table import LAYOUTS, stored_weights
from lorakit.quant.table import codec
from lorakit.store.memory import MemorySource

F8 = np.dtype(ml_dtypes.float8_e4m3fn)
SHAPES = [(6, 64), (5, 13), (64, 192), (3, 1000)]


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("f4") * np.float32(0.02)


def four_bit(kind, *, double=False, shape=(5, 13), block=64, storage="u1"):
    found = codec(kind, double=double, block=block)
    tensors = found.tensors("m.weight", found.quantise(drawn(*shape)))
    return {**tensors, "m.weight": tensors["m.weight"].reshape(-1).view(storage)[:, None]}


def eight_bit(shape=(6, 64)):
    return codec("int8").tensors("m.weight", codec("int8").quantise(drawn(*shape)))


def scaled(shape=(300, 200), grid=(3, 2), *, scale="weight_scale_inv", dtype="f4", codes=F8):
    rng = np.random.default_rng(1)
    numbers = rng.integers(0, 256, shape).astype(np.uint8)
    numbers[numbers & 0x7F == 0x7F] = 0  # no NaN
    scales = np.exp2(rng.integers(-9, -4, grid)).astype(dtype)
    return {"m.weight": numbers.view(codes), f"m.{scale}": scales}


def mxfp4(experts=2, outputs=5, groups=3):
    rng = np.random.default_rng(2)
    shape = experts, outputs, groups
    return {
        "m.gate_up_proj_blocks": rng.integers(0, 256, (*shape, BLOCK // 2)).astype(np.uint8),
        "m.gate_up_proj_scales": rng.integers(115, 135, shape).astype(np.uint8),
    }


def packed(codes, bits):
    """Words of codes along the last dimension, the first in the lowest bits."""
    words = np.zeros((*codes.shape[:-1], -(-codes.shape[-1] * bits // 32)), np.uint32)
    for i in range(codes.shape[-1]):
        at = i * bits
        words[..., at // 32] |= codes[..., i].astype(np.uint32) << np.uint32(at % 32)
    return words.view("i4")


def grouped(bits, *, outputs=24, inputs=64, groups=4, seed=3):
    """Codes (outputs, inputs), zeros and scales (outputs, groups), and the group of each input."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 2**bits, (outputs, inputs)).astype("u1")
    zeros = rng.integers(1, 2**bits, (outputs, groups)).astype("u1")
    scales = rng.random((outputs, groups)).astype("f2")
    return codes, zeros, scales, np.arange(inputs) // (inputs // groups)


def gptq(bits=4, *, lacking=1, order=None):
    codes, zeros, scales, groups = grouped(bits)
    tensors = {
        "m.qweight": np.ascontiguousarray(packed(codes, bits).T),
        "m.qzeros": packed(zeros.T - np.uint8(lacking), bits),
        "m.scales": np.ascontiguousarray(scales.T),
    }
    return tensors if order is None else {**tensors, "m.g_idx": groups[order].astype("i4")}


def awq():
    codes, zeros, scales, _ = grouped(4)
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # the outputs of a word, from its lowest bits

    def words(of_outputs):
        rows = of_outputs.T.reshape(of_outputs.shape[1], -1, 8)[:, :, order]
        return packed(rows.reshape(of_outputs.shape[1], -1), 4)

    return {
        "m.qweight": words(codes),
        "m.qzeros": words(zeros),
        "m.scales": np.ascontiguousarray(scales.T),
    }


def packed_ints(bits=4, inputs=64):
    codes, _, scales, _ = grouped(bits, inputs=inputs)
    return {
        "m.weight_packed": packed(codes, bits),
        "m.weight_scale": scales,
        "m.weight_shape": np.array(codes.shape),
    }


CASES = {
    "nf4": four_bit("nf4"),
    "nf4 across rows": four_bit("nf4", shape=(7, 34), block=32),
    "nf4 twice": four_bit("nf4", double=True, shape=(64, 600)),
    "fp4 in float32": four_bit("fp4", shape=(64, 32), storage="f4"),
    "int8": eight_bit(),
    "fp8 blocks": scaled(),
    "fp8 by row": scaled(grid=(300, 1), scale="weight_scale"),
    "fp8 by row, flat": scaled(grid=(300,), scale="weight_scale"),
    "fp8 one scale": scaled(grid=(), scale="scale_weight"),
    "fp8 of Mistral's first": scaled(grid=(), scale="qscale_weight"),
    "fp8 of DeepSeek's first": scaled(scale="scale"),
    "fp8 exponents": scaled(dtype=ml_dtypes.float8_e8m0fnu),
    "fp8 experts": scaled((2, 200, 130), (2, 2, 2)),
    "int8 of compressed-tensors": scaled(grid=(300, 1), scale="weight_scale", codes="i1"),
    "mxfp4": mxfp4(),
    "gptq": gptq(),
    "gptq of eight bits in an order": gptq(8, order=np.arange(64)[::-1]),
    "awq": awq(),
    "packed integers": packed_ints(),
    "packed integers that leave bits": packed_ints(inputs=60),
}


def only(tensors, config=None):
    source = MemorySource(tensors)
    (weight,) = stored_weights(source, config or {})
    return source, weight


def values(source, weight, start=0, stop=None):
    rows = int(np.prod(weight.info.shape[:-1]))
    stop = rows if stop is None else stop
    out = np.empty((stop - start, weight.info.shape[-1]), np.float32)
    weight.values(source, start, stop, out)
    return out


def test_every_file_is_a_layout_of_the_table_or_a_part():
    files = {path.stem for path in Path(lorakit.quant.stored.__path__[0]).glob("*.py")}
    assert files - {"__init__", "grouped", "table", "tensor", "weight"} == set(LAYOUTS)


@pytest.mark.parametrize("tensors", CASES.values(), ids=CASES)
@given(data=st.data())
def test_some_rows_are_those_of_the_whole(tensors, data):
    source, weight = only(tensors)
    whole = values(source, weight)
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    assert np.array_equal(values(source, weight, start, stop), whole[start:stop])


@pytest.mark.parametrize("tensors", CASES.values(), ids=CASES)
def test_a_weight_is_made_of_every_tensor_that_is_there(tensors):
    _, weight = only(tensors)
    assert set(weight.tensors) == set(tensors)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("double", [False, True])
def test_values_are_those_of_the_codec(kind, shape, double):
    found = codec(kind, double=double, block=128) if kind != "int8" else codec(kind)
    q = found.quantise(drawn(*shape))
    source, weight = only(found.tensors("m.weight", q))
    assert weight.info.shape == shape
    assert np.array_equal(values(source, weight), found.dequantise(q))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_values_are_those_of_bitsandbytes(kind):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    w = torch.from_numpy(drawn(64, 128))  # in whole blocks a row, else it is wrong on a CPU
    codes, state = functional.quantize_4bit(w, quant_type=kind, compress_statistics=True)
    named = {f"m.weight.{n}": t.numpy() for n, t in state.as_dict(packed=True).items()}
    source, weight = only({"m.weight": codes.numpy(), **named})
    theirs = functional.dequantize_4bit(codes, state).numpy()
    assert weight.info.dtype == "F32"
    assert np.array_equal(values(source, weight), theirs)


def test_values_of_mxfp4_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.integrations.mxfp4")
    tensors = mxfp4()
    blocks, scales = (torch.from_numpy(t) for t in tensors.values())
    expected = theirs.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    source, weight = only(tensors)
    assert weight.info.shape == tuple(expected.shape)
    assert np.array_equal(values(source, weight), expected.reshape(-1, 5).numpy())


def test_a_number_of_mxfp4_is_its_level_times_a_power_of_two():
    codes = np.zeros((1, 1, 1, BLOCK // 2), np.uint8)
    codes[0, 0, 0, 0] = 0x2F  # -6, then 1: the first in the lower half
    tensors = {"m.w_blocks": codes, "m.w_scales": np.full((1, 1, 1), 128, np.uint8)}
    assert values(*only(tensors))[:3, 0].tolist() == [-2 * LEVELS[7], 2 * LEVELS[2], 0]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_number_of_gptq_is_its_scale_times_code_less_zero(bits, format, shuffled):
    codes, zeros, scales, groups = grouped(bits)
    order = np.random.default_rng(0).permutation(64) if shuffled else None
    if shuffled:
        groups = groups[order]
    tensors = gptq(bits, lacking=1 if format == "gptq" else 0, order=order)
    source, weight = only(tensors, {"checkpoint_format": format})
    expected = (codes - zeros.astype("f8")[:, groups]) * scales.astype("f8")[:, groups]
    assert np.array_equal(values(source, weight), expected)


def test_a_number_of_awq_is_its_scale_times_code_less_zero():
    codes, zeros, scales, groups = grouped(4)
    expected = (codes - zeros.astype("f8")[:, groups]) * scales.astype("f8")[:, groups]
    assert np.array_equal(values(*only(awq(), {"version": "GEMM"})), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("inputs", [60, 64])
def test_a_packed_integer_is_its_code_less_half_times_its_scale(bits, inputs):
    codes, _, scales, groups = grouped(bits, inputs=inputs)
    expected = (codes - 2.0 ** (bits - 1)) * scales.astype("f8")[:, groups]
    assert np.array_equal(values(*only(packed_ints(bits, inputs))), expected)


def test_codes_of_three_bits_and_packed_zero_points_are_left():
    three = {**gptq(), "m.qzeros": np.zeros((4, 9), "i4"), "m.scales": np.zeros((4, 96), "f2")}
    assert not list(stored_weights(MemorySource(three), {}))
    zeros = {**packed_ints(), "m.weight_zero_point": np.zeros((3, 4), "i4")}
    assert not list(stored_weights(MemorySource(zeros), {}))


@pytest.mark.parametrize(
    ("shape", "grid", "size"),
    [((300, 200), (3, 2), None), ((300, 200), (5, 4), [64, 64]), ((2, 200, 130), (2, 2, 2), None)],
)
def test_a_block_that_stands_out_has_its_scale(shape, grid, size):
    tensors = scaled(shape, grid)
    numbers, scales = tensors.values()
    height, width = size or (128, 128)
    i, j = np.arange(shape[-2]) // height, np.arange(shape[-1]) // width
    expected = numbers.astype("f8") * scales.astype("f8")[..., i[:, None], j]
    source, weight = only(tensors, {"weight_block_size": size} if size else None)
    assert np.array_equal(values(source, weight).reshape(shape), expected)


def test_scales_of_inputs_go_with_the_weight():
    tensors = {**scaled(grid=(), scale="weight_scale"), "m.input_scale": np.ones(1, "f4")}
    assert only(tensors)[1].tensors[2:] == ("m.input_scale",)


@pytest.mark.parametrize("beside", ["weight_scale_2", "weight_zero_point"])
def test_numbers_that_mean_something_else_are_left(beside):
    tensors = {**scaled(scale="weight_scale"), f"m.{beside}": np.ones(1, "f4")}
    assert not list(stored_weights(MemorySource(tensors), {}))


def changed(tensors, **parts):
    return {n: parts.get(n.rpartition(".")[2], t) for n, t in tensors.items()}


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (scaled(grid=(2, 2)), r"scales \[2, 2\] for \[300, 200\] numbers"),
        (changed(eight_bit(), SCB=np.ones(5, "f4")), "do not fit each other"),
        (changed(eight_bit(), weight_format=np.ones((), "u1")), "another layout than rows"),
        (changed(four_bit("nf4"), absmax=np.ones(9, "f4")), "its size is not that of a weight"),
        ({n: t for n, t in four_bit("nf4").items() if "map" not in n}, "is missing"),
        ({**gptq(), "m.g_idx": np.zeros(63, "i4")}, "do not fit its codes"),
        ({**awq(), "m.qzeros": np.zeros((3, 3), "i4")}, "do not fit its codes"),
        ({**packed_ints(), "m.weight_shape": np.array([24, 65])}, "do not fit its codes"),
        ({**mxfp4(), "m.gate_up_proj_scales": np.zeros((2, 5, 4), "u1")}, "do not fit its blocks"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(tensors, words):
    with pytest.raises(InputError, match=words) as caught:
        list(stored_weights(MemorySource(tensors), {}))
    assert caught.value.tensor in tensors or "map" in caught.value.tensor


def test_another_version_of_awq_is_refused():
    with pytest.raises(InputError, match="version 'gemv' has it, not gemm"):
        list(stored_weights(MemorySource(awq()), {"version": "gemv"}))


@pytest.mark.parametrize("missing", ["", ".absmax", ".quant_map", ".nested_absmax"])
def test_a_missing_tensor_is_named(missing):
    tensors = four_bit("nf4", double=True)
    del tensors[f"m.weight{missing}"]
    with pytest.raises(InputError, match="is missing") as caught:
        list(stored_weights(MemorySource(tensors), {}))
    assert caught.value.tensor == f"m.weight{missing}"


@pytest.mark.parametrize(
    "state",
    [
        b"\xff",
        b"[]",
        b"{}",
        b'{"blocksize": 0, "shape": [5, 13]}',
        b'{"blocksize": 64, "shape": [5, -13]}',
        b'{"blocksize": 64, "shape": [5, 14]}',
        b'{"blocksize": "64", "shape": [5, 13]}',
        b'{"blocksize": 64, "shape": 65}',
        b'{"blocksize": 64, "shape": [5, 13], "nested_offset": NaN}',
        b'{"blocksize": 64, "shape": [5, 13], "nested_offset": "x"}',
        b'{"blocksize": 64, "shape": [5, 13], "nested_blocksize": 7}',
    ],
)
def test_a_state_that_makes_no_sense_is_refused(state):
    tensors = four_bit("nf4")
    name = next(n for n in tensors if "quant_state" in n)
    with pytest.raises(InputError, match=r"quantisation state|its size"):
        list(stored_weights(MemorySource({**tensors, name: np.frombuffer(state, "u1")}), {}))
