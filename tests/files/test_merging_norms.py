"""DoRA with the norms of inputs, which LyCORIS and OneTrainer write, merged: by its own formula."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.errors import InputError, MisfitError

SCRATCH = lorakit.RunOptions(sync=False)
LINEAR = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
CONV = "down_blocks.0.resnets.0.conv1"
SHAPES = {LINEAR: (10, 24), CONV: (8, 6, 3, 3)}
RANK, ALPHA = 3, 1.5
FUSED = "double_blocks.0.img_attn.qkv"


def drawn(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype("f4")


def file_of(shapes, front):
    """The tensors of a DoRA for weights of these shapes, by the names of the modules in it."""
    found = {}
    for name, (rows, inputs, *kernel) in shapes.items():
        ones = [1] * len(kernel)
        found |= {
            f"{front}{name}.lora_down.weight": drawn(RANK, inputs, *kernel, seed=1),
            f"{front}{name}.lora_up.weight": drawn(rows, RANK, *ones, seed=2),
            f"{front}{name}.alpha": np.array(ALPHA, "f4"),
            f"{front}{name}.dora_scale": abs(drawn(1, inputs, *ones, seed=3)),
        }
    return found


def expected(old, name, tensors, weight):
    """`old + weight * (norms / |V| * V - old)` where V is what plain factors make, in float64."""
    down, up = (tensors[f"{name}.lora_{x}.weight"].astype("f8") for x in ("down", "up"))
    delta = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
    v = old + ALPHA / RANK * delta.reshape(old.shape)
    others = tuple(i for i in range(old.ndim) if i != 1)
    norms = np.sqrt((v**2).sum(axis=others, keepdims=True))
    return old + weight * (tensors[f"{name}.dora_scale"].astype("f8") / norms * v - old)


def merged(tmp_path, base, tensors, **options):
    save_file(tensors, tmp_path / "a.safetensors")
    lorakit.merge(base, tmp_path / "a.safetensors", tmp_path / "out", run=SCRATCH, **options)
    lorakit.verify(tmp_path / "out", full=True)
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    return load_file(weights)


@pytest.fixture
def unet(tmp_path):
    (tmp_path / "unet").mkdir()
    weights = {f"{m}.weight": drawn(*s) for m, s in SHAPES.items()}
    save_file(weights, tmp_path / "unet/diffusion_pytorch_model.safetensors")
    return tmp_path / "unet", weights


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_norms_of_inputs_are_those_of_the_whole_weight(tmp_path, unet, weight):
    base, weights = unet
    tensors = file_of({m.replace(".", "_"): s for m, s in SHAPES.items()}, "lora_unet_")
    found = merged(tmp_path, base, tensors, weights=[weight])
    for module in SHAPES:
        old = weights[f"{module}.weight"].astype("f8")
        wanted = expected(old, f"lora_unet_{module.replace('.', '_')}", tensors, weight)
        np.testing.assert_allclose(found[f"{module}.weight"], wanted, atol=2e-6)
    with pytest.raises(InputError, match="DoRA"):
        lorakit.unmerge(tmp_path / "out", tmp_path / "a.safetensors", tmp_path / "b", run=SCRATCH)


def test_a_fused_projection_has_them_as_a_whole_in_one_file(tmp_path):
    name, weight = f"model.diffusion_model.{FUSED}", drawn(48, 16)
    beside = {"model.diffusion_model.double_blocks.0.img_attn.proj.weight": drawn(16, 16)}
    save_file({f"{name}.weight": weight, **beside}, tmp_path / "flux.safetensors")
    tensors = file_of({FUSED: (48, 16)}, "diffusion_model.")
    found = merged(tmp_path, tmp_path / "flux.safetensors", tensors)
    wanted = expected(weight.astype("f8"), f"diffusion_model.{FUSED}", tensors, 1.0)
    np.testing.assert_allclose(found[f"{name}.weight"], wanted, atol=2e-6)


PARTS = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]


def test_norms_of_a_part_are_of_its_rows_in_the_whole(tmp_path):
    """As OneTrainer's LoRAs of FLUX.1 in a base of one file."""
    weight = drawn(48, 16)
    save_file({f"{FUSED}.weight": weight}, tmp_path / "flux.safetensors")
    tensors = file_of(dict.fromkeys(PARTS, (16, 16)), "transformer.")
    found = merged(tmp_path, tmp_path / "flux.safetensors", tensors, weights=[0.5])
    rows = np.split(weight.astype("f8"), 3)
    wanted = [
        expected(r, f"transformer.{n}", tensors, 0.5) for r, n in zip(rows, PARTS, strict=True)
    ]
    np.testing.assert_allclose(found[f"{FUSED}.weight"], np.concatenate(wanted), atol=2e-6)


def test_norms_of_the_whole_do_not_go_into_parts_nor_into_rows_in_another_order(tmp_path):
    (tmp_path / "flux").mkdir()
    parts = {f"{n}.weight": drawn(16, 16, seed=i) for i, n in enumerate(PARTS)}
    save_file(parts, tmp_path / "flux/diffusion_pytorch_model.safetensors")
    with pytest.raises(MisfitError, match=r"img_attn\.qkv"):
        merged(tmp_path, tmp_path / "flux", file_of({FUSED: (48, 16)}, "diffusion_model."))
    last = "final_layer.adaLN_modulation.1.weight"
    save_file({last: drawn(32, 16), "img_in.weight": drawn(16, 4)}, tmp_path / "flux.safetensors")
    tensors = file_of({"norm_out.linear": (32, 16)}, "transformer.")
    with pytest.raises(MisfitError, match="norms of its inputs"):
        merged(tmp_path, tmp_path / "flux.safetensors", tensors)


def test_only_a_merge_takes_them(tmp_path):
    save_file(file_of({FUSED: (48, 16)}, "diffusion_model."), tmp_path / "a.safetensors")
    with pytest.raises(MisfitError, match="norms run over all of it"):
        lorakit.resize(tmp_path / "a.safetensors", tmp_path / "b", rank=2, run=SCRATCH)
