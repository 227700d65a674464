"""bitsandbytes on a CPU as the reference: the same bytes in, the same values out."""

import numpy as np
import pytest

from lorakit.quant.nested import dynamic_map, nest, unnest
from lorakit.quant.table import codec

torch = pytest.importorskip("torch")
bnb = pytest.importorskip("bitsandbytes")
functional = pytest.importorskip("bitsandbytes.functional")

SHAPES = [(64, 64), (7, 34), (6, 14), (2, 2), (300, 1000), (2, 1 << 17)]
ODD = [(5, 13), (1, 1), (1000, 777)]  # which bitsandbytes compiles anew: slow
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
kinds = pytest.mark.parametrize("kind", ["nf4", "fp4"])
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def weight(shape, dtype, seed=0):
    """The same numbers twice: hard cases among them, zeros and subnormals."""
    w = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * np.float32(0.02)
    flat = w.reshape(-1)
    flat[:40] = 0
    if flat.size > 5000:
        flat[1000:1100], flat[2000:2200], flat[3000:3200] = 0, flat[:200] * 1e-38, 1e-41
    theirs = torch.from_numpy(w).to(DTYPES[dtype])
    return w.astype(np.dtype(dtype)), theirs


def numpy(x):
    return x.float().numpy()


@kinds
@dtypes
@pytest.mark.parametrize("shape", [*SHAPES, *ODD])
@pytest.mark.parametrize("block", [32, 64, 4096])
def test_bytes_and_scales_are_the_same(kind, dtype, shape, block):
    ours, theirs = weight(shape, dtype)
    packed, state = functional.quantize_4bit(theirs, blocksize=block, quant_type=kind)
    q = codec(kind, block=block).quantise(ours)
    assert np.array_equal(q.arrays["packed"], packed.numpy()[:, 0])
    assert np.array_equal(q.arrays["absmax"].view(np.int32), state.absmax.numpy().view(np.int32))


@kinds
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_the_same(kind, dtype, shape):
    ours, theirs = weight(shape, dtype)
    found = codec(kind, block=32)
    values = found.dequantise(found.quantise(ours), dtype)
    expected = functional.dequantize_4bit(
        *functional.quantize_4bit(theirs, blocksize=32, quant_type=kind)
    )
    assert np.array_equal(values.astype(np.float32), numpy(expected))


@kinds
def test_values_of_rows_of_odd_length_are_the_same(kind):
    ours, theirs = weight((5, 13), "float32")
    found = codec(kind)
    expected = functional.dequantize_4bit(*functional.quantize_4bit(theirs, quant_type=kind))
    assert np.array_equal(found.dequantise(found.quantise(ours)), numpy(expected))


@kinds
def test_every_float16_between_minus_one_and_one_gets_the_same_code(kind):
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    inside = every[np.abs(every) <= 1]
    blocks = np.pad(inside, (0, -inside.size % 63)).reshape(-1, 63)
    w = np.concatenate([np.ones((len(blocks), 1), np.float32), blocks], 1)
    packed, _ = functional.quantize_4bit(torch.from_numpy(w), quant_type=kind)
    assert np.array_equal(codec(kind).quantise(w).arrays["packed"], packed.numpy()[:, 0])


@kinds
def test_values_at_and_beside_the_middles_get_the_same_code(kind):
    levels = np.sort(functional.get_4bit_type(kind, device="cpu").numpy())
    middles = (levels[1:] + levels[:-1]) / np.float32(2)
    near = [np.nextafter(middles, np.float32(s)) for s in (-2, 2)]
    values = np.concatenate([middles, *near, [1], levels]).astype(np.float32)[None]
    packed, _ = functional.quantize_4bit(torch.from_numpy(values), quant_type=kind)
    assert np.array_equal(codec(kind).quantise(values).arrays["packed"], packed.numpy()[:, 0])


def test_the_dynamic_map_is_the_same():
    assert np.array_equal(dynamic_map(), functional.create_dynamic_map().numpy())


@pytest.mark.parametrize("size", [1, 255, 256, 257, 5000, 100_000])
def test_nested_scales_about_the_same_offset_are_the_same(size):
    rng = np.random.default_rng(size)
    scales = (rng.random(size, dtype=np.float32) ** 3).astype(np.float32)
    scales[size // 2 :] *= np.float32(1e-3)
    offset = torch.from_numpy(scales).mean()
    codes, state = functional.quantize_blockwise(torch.from_numpy(scales) - offset, blocksize=256)
    found = nest(scales, float(offset))
    assert np.array_equal(found.codes, codes.numpy())
    assert np.array_equal(found.absmax, state.absmax.numpy())
    values = functional.dequantize_blockwise(codes, state) + offset
    assert np.array_equal(unnest(found), values.numpy())


def test_nested_scales_that_are_all_alike_are_the_same():
    scales = np.full(300, 0.5, np.float32)
    codes, _ = functional.quantize_blockwise(torch.zeros(300), blocksize=256)
    found = nest(scales)
    assert np.array_equal(found.codes, codes.numpy())
    assert np.array_equal(unnest(found), scales)


@kinds
def test_the_offset_is_theirs_within_the_rounding_of_a_sum(kind):
    ours, theirs = weight((300, 1000), "float32")
    _, state = functional.quantize_4bit(theirs, quant_type=kind, compress_statistics=True)
    found = codec(kind, double=True).quantise(ours)
    assert found.meta["offset"] == pytest.approx(state.offset.item(), rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_is_the_same(dtype):
    ours, theirs = weight((300, 1000), dtype)
    ours[7] = 0
    theirs[7] = 0
    codes, scales, _ = functional.int8_vectorwise_quant(theirs.to(torch.float16))
    found = codec("int8")
    q = found.quantise(ours)
    assert np.array_equal(q.arrays["scales"], scales.numpy())
    rows = np.arange(300) != 7  # 0 * inf there, of which a CPU may make any byte
    assert np.array_equal(q.arrays["codes"][rows], codes.numpy()[rows])
    values = functional.int8_vectorwise_dequant(codes, scales)
    assert np.array_equal(found.dequantise(q)[rows], values.numpy()[rows])


@kinds
def test_the_tensors_are_those_of_a_linear_layer_of_bitsandbytes(kind):
    ours, theirs = weight((48, 128), "bfloat16")
    layer = bnb.nn.Linear4bit(128, 48, bias=False, quant_type=kind, compress_statistics=False)
    layer.weight.data = theirs
    expected = {f"m.{k}": v for k, v in layer.to("cpu").state_dict().items()}
    found = codec(kind)
    same_tensors(found.tensors("m.weight", found.quantise(ours)), expected)


def test_the_tensors_of_double_quantisation_are_those_of_bitsandbytes():
    theirs = torch.full((64, 128), 0.5)  # their mean is exact in any order of the sum
    layer = bnb.nn.Linear4bit(128, 64, bias=False, quant_type="nf4", compress_statistics=True)
    layer.weight.data = theirs
    expected = {f"m.{k}": v for k, v in layer.to("cpu").state_dict().items()}
    found = codec("nf4", double=True)
    q = found.quantise(theirs.numpy())
    same_tensors(found.tensors("m.weight", q, dtype="float32"), expected)


def test_the_tensors_of_int8_are_those_of_a_linear_layer_of_bitsandbytes():
    ours, theirs = weight((48, 128), "float16")
    layer = bnb.nn.Linear8bitLt(128, 48, bias=False, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(theirs, requires_grad=False, has_fp16_weights=False)
    expected = {f"m.{k}": v for k, v in layer.to("cpu").state_dict().items()}
    found = codec("int8")
    same_tensors(found.tensors("m.weight", found.quantise(ours)), expected)


def same_tensors(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert str(tensor.dtype).split(".")[1] == ours[name].dtype.name, name
        assert tuple(tensor.shape) == ours[name].shape, name
        assert tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() == (
            np.ascontiguousarray(ours[name]).tobytes()
        ), name
