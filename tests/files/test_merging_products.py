"""LoHa and LoKr of image models, merged without being multiplied out to plain factors."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from tests.files.test_merging_lycoris import (
    NAMES,
    SCRATCH,
    SHAPES,
    drawn,
    merged,
    unet,
)

QKV = "double_blocks.0.img_attn.qkv"
PARTS = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]

__all__ = ["unet"]


def loha(shape):
    """Its tensors, and what they multiply out to, with the scaling of an alpha of 1."""
    out, inner = shape[0], int(np.prod(shape[1:]))
    factors = [drawn(*s, seed=n) for n, s in enumerate([(out, 2), (2, inner)] * 2)]
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    one, two, three, four = (f.astype("f8") for f in factors)
    return dict(zip(names, factors, strict=True)), ((one @ two) * (three @ four) / 2).reshape(shape)


def lokr(shape, *, low):
    (out, inner), kernel = shape[:2], shape[2:]
    left, c, d = drawn(2, 3, seed=1), out // 2, inner // 3
    if low:
        flat = d * int(np.prod(kernel))
        up, down = drawn(c, 2, seed=2), drawn(2, flat, seed=3)
        right = (up.astype("f8") @ down).reshape(c, d, *kernel) / 2
        tensors = {"lokr_w2_a": up, "lokr_w2_b": down}
    else:
        right = drawn(c, d, *kernel, seed=2)
        tensors = {"lokr_w2": right}
    wide = left.reshape(2, 3, *(1,) * len(kernel)).astype("f8")
    return {"lokr_w1": left, **tensors}, np.kron(wide, right)


MAKERS = {
    "loha": loha,
    "lokr": lambda s: lokr(s, low=False),
    "lokr of low rank": lambda s: lokr(s, low=True),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_product_is_added(unet, tmp_path, kind):
    tensors, dense = {}, {}
    for module, name in NAMES.items():
        made, dense[module] = MAKERS[kind](SHAPES[module])
        tensors |= {f"{name}.{n}": t for n, t in made.items()}
        tensors[f"{name}.alpha"] = np.array(1.0, "f4")
    for module, (old, new) in merged(unet, tensors, tmp_path, weights=[-0.5]).items():
        wanted = old - 0.5 * dense[module]
        np.testing.assert_allclose(new, wanted, atol=2e-5, rtol=1e-5)
    output = tmp_path / "back"
    lorakit.unmerge(
        tmp_path / "out", tmp_path / "a.safetensors", output, weights=[-0.5], run=SCRATCH
    )
    back, base = (load_file(p / "diffusion_pytorch_model.safetensors") for p in (output, unet))
    for name, values in base.items():
        np.testing.assert_allclose(back[name], values, atol=1e-5)


@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("kind", MAKERS)
def test_a_product_has_the_norms_of_dora(unet, tmp_path, kind, inputs):
    tensors, dense, norms = {}, {}, {}
    for module, name in NAMES.items():
        shape = SHAPES[module]
        made, dense[module] = MAKERS[kind](shape)
        kept = (1, shape[1]) if inputs else (shape[0], 1)
        norms[module] = 1 + drawn(*kept, *(1,) * (len(shape) - 2), seed=9) ** 2
        tensors |= {f"{name}.{n}": t for n, t in made.items()}
        tensors |= {f"{name}.alpha": np.array(1.0, "f4"), f"{name}.dora_scale": norms[module]}
    for module, (old, new) in merged(unet, tensors, tmp_path).items():
        v = old + dense[module]
        axes = tuple(a for a in range(v.ndim) if a != int(inputs))
        length = np.sqrt((v**2).sum(axis=axes, keepdims=True))
        np.testing.assert_allclose(new, norms[module] * v / length, rtol=1e-4, atol=1e-4)


@pytest.fixture
def fused(tmp_path):
    """A LoKr of a fused projection of FLUX.1 in kohya's names, and its update."""
    left, right = drawn(4, 3, seed=1), drawn(9, 4, seed=2)  # no part begins at a row of the left
    name = f"lora_unet_{QKV.replace('.', '_')}"
    tensors = {f"{name}.lokr_w1": left, f"{name}.lokr_w2": right, f"{name}.alpha": np.float32(7)}
    tensors = {n: np.asarray(t) for n, t in tensors.items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    return tmp_path / "a.safetensors", np.kron(left.astype("f8"), right)


def test_a_kronecker_product_of_a_fused_projection_is_cut(fused, tmp_path):
    path, dense = fused
    (tmp_path / "base").mkdir()
    old = {f"{p}.weight": drawn(12, 12, seed=n) for n, p in enumerate(PARTS)}
    file = "diffusion_pytorch_model.safetensors"
    save_file(old, tmp_path / "base" / file)
    lorakit.merge(tmp_path / "base", path, tmp_path / "out", run=SCRATCH)
    lorakit.verify(tmp_path / "out", full=True)
    new = load_file(tmp_path / "out" / file)
    for n, part in enumerate(PARTS):
        wanted = old[f"{part}.weight"] + dense[12 * n : 12 * n + 12]
        np.testing.assert_allclose(new[f"{part}.weight"], wanted, atol=1e-5)


def test_a_kronecker_product_of_a_fused_projection_stays_one(fused, tmp_path):
    path, dense = fused
    old = drawn(36, 12)
    save_file({f"{QKV}.weight": old}, tmp_path / "base.safetensors")
    lorakit.merge(tmp_path / "base.safetensors", path, tmp_path / "out.safetensors", run=SCRATCH)
    new = load_file(tmp_path / "out.safetensors")[f"{QKV}.weight"]
    np.testing.assert_allclose(new, old + dense, atol=1e-5)
    options = {"to": "comfyui", "run": SCRATCH}
    lorakit.convert(path, tmp_path / "b.safetensors", **options)
    made, given = load_file(tmp_path / "b.safetensors"), load_file(path)
    for role in ("lokr_w1", "lokr_w2"):
        (left,), (right,) = ([v for n, v in t.items() if n.endswith(role)] for t in (made, given))
        np.testing.assert_array_equal(left, right)


def test_a_large_product_needs_no_more_memory_than_its_sides(tmp_path):
    """As plain factors this one has a rank of 2,048, and 32 MB."""
    (tmp_path / "base").mkdir()
    size, name = 2048, "transformer.transformer_blocks.0.attn.to_q"
    weight = {f"{PARTS[0]}.weight": np.zeros((size, size), "f2")}
    save_file(weight, tmp_path / "base" / "diffusion_pytorch_model.safetensors")
    tensors = {f"{name}.lokr_w1": drawn(32, 32), f"{name}.lokr_w2": drawn(64, 64, seed=1)}
    save_file(tensors, tmp_path / "a.safetensors")
    (fold,) = lorakit.plan_merge(tmp_path / "base", [tmp_path / "a.safetensors"]).plan.folds
    assert fold.recipe["nbytes"] < 1 << 20
