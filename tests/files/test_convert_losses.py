"""What would be lost or mistaken without a word: two modules for one place, norms of inputs, rows
that nothing tells, numbers of several dtypes.
"""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from lorakit.adapter.files.reading import open_file
from lorakit.errors import MisfitError
from tests.files.making_loras import RANK, WIDTH, drawn
from tests.verbs.adapters import save

SCRATCH = lorakit.RunOptions(sync=False)
UP, DOWN = ".lora_up.weight", ".lora_down.weight"
KOHYA = "lora_unet_double_blocks_0_img_attn_"
COMFY = "diffusion_model.double_blocks.0.img_attn."
DIFFUSERS = "transformer.transformer_blocks.0.attn."


def saved(path, tensors, **metadata):
    save_file(tensors, path, metadata={"format": "pt", **metadata})
    return path


def peft(module, rows=WIDTH, width=WIDTH, dtype="f4"):
    a, b = drawn(module + "a", RANK, width), drawn(module + "b", rows, RANK)
    return {f"{module}.lora_A.weight": a.astype(dtype), f"{module}.lora_B.weight": b.astype(dtype)}


def kohya(module, rows=WIDTH, width=WIDTH):
    a, b = drawn(module + "a", RANK, width), drawn(module + "b", rows, RANK)
    return {module + DOWN: a, module + UP: b}


@pytest.mark.parametrize(
    "tensors",
    [
        {**peft(DIFFUSERS + "to_out.0"), **peft(COMFY + "proj")},
        {**peft(DIFFUSERS + "to_k"), **kohya(KOHYA + "qkv", 3 * WIDTH)},
    ],
)
@pytest.mark.parametrize("to", ["diffusers", "comfyui", "kohya", "peft"])
def test_two_modules_for_one_place_are_refused_with_both(tmp_path, tensors, to):
    path = saved(tmp_path / "a.safetensors", tensors)
    with pytest.raises(MisfitError, match="are both for") as caught:
        lorakit.convert(path, tmp_path / "out", to=to, family="flux", run=SCRATCH)
    for name in tensors:
        assert name.rpartition(".lora_")[0] in str(caught.value)


def test_two_modules_for_one_place_are_not_merged(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    saved(
        base / "diffusion_pytorch_model.safetensors",
        {"transformer_blocks.0.attn.to_out.0.weight": np.zeros((WIDTH, WIDTH), "f4")},
    )
    (base / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    tensors = {**peft(DIFFUSERS + "to_out.0"), **peft(COMFY + "proj")}
    path = saved(tmp_path / "a.safetensors", tensors)
    with pytest.raises(MisfitError, match="are both for"):
        lorakit.merge(base, path, tmp_path / "out", run=SCRATCH)


CONV = "lora_unet_input_blocks_1_0_in_layers_2"
TELLING = kohya("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k", WIDTH, 2048)


def square(norms, shape):
    """A convolution of as many inputs as outputs, with DoRA norms."""
    a, b = drawn("a", RANK, WIDTH, 3, 3), drawn("b", WIDTH, RANK, 1, 1)
    return {CONV + DOWN: a, CONV + UP: b, CONV + norms: np.abs(drawn("m", *shape)), **TELLING}


@pytest.mark.parametrize(
    ("norms", "inputs"), [(".dora_scale", True), (".lora_magnitude_vector", False)]
)
def test_the_name_of_norms_says_whether_they_are_of_inputs(tmp_path, norms, inputs):
    path = saved(tmp_path / "a.safetensors", square(norms, (1, WIDTH, 1, 1)))
    out = tmp_path / "b.safetensors"
    lorakit.convert(path, out, to="comfyui", run=SCRATCH)
    found = load_file(out)[CONV + ".dora_scale"]
    assert found.shape == ((1, WIDTH, 1, 1) if inputs else (WIDTH, 1, 1, 1))
    if inputs:
        with pytest.raises(MisfitError, match="norms of its inputs"):
            lorakit.convert(path, tmp_path / "c", to="peft", run=SCRATCH)


def test_a_bias_alone_of_a_fused_projection_is_cut_evenly(tmp_path):
    bias = drawn("bias", 3 * WIDTH)
    tensors = {COMFY + "qkv.diff_b": bias, **peft(COMFY + "proj")}
    deltas = open_file(saved(tmp_path / "a.safetensors", tensors)).deltas
    found = {d.module.rpartition(".")[2]: d.tensors["bias"] for d in deltas if d.algo == "full"}
    for part, rows in zip(("to_q", "to_k", "to_v"), np.split(bias, 3), strict=True):
        np.testing.assert_array_equal(found[part].read(), rows)


@pytest.mark.parametrize(
    ("family", "module"),
    [("flux", "single_blocks.0.linear1"), ("lumina2", "layers.0.attention.qkv")],
)
def test_a_bias_alone_whose_parts_nothing_tells_is_refused(tmp_path, family, module):
    tensors = {f"diffusion_model.{module}.diff_b": drawn("bias", 7 * WIDTH)}
    path = saved(tmp_path / "a.safetensors", tensors | peft("diffusion_model.final_layer.linear"))
    with pytest.raises(MisfitError, match="how many rows its parts have"):
        open_file(path, family=family)


@pytest.mark.parametrize("trained", [["to_q"], ["to_q", "to_v"]])
def test_queries_alone_do_not_tell_the_rows_of_fewer_keys(tmp_path, trained):
    tensors = {}
    for part in trained:
        rows = WIDTH // 2 if part == "to_v" else WIDTH
        tensors |= peft(f"transformer.layers.0.attn.{part}", rows)
    path, out = saved(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors"
    options = {"to": "comfyui", "family": "lumina2", "run": SCRATCH}
    if trained == ["to_q"]:
        with pytest.raises(MisfitError, match="without its keys and values"):
            lorakit.convert(path, out, **options)
        return
    lorakit.convert(path, out, **options)
    assert load_file(out)["diffusion_model.layers.0.attention.qkv.lora_B.weight"].shape == (
        2 * WIDTH,
        2 * RANK,
    )


@pytest.mark.parametrize("first", [ml_dtypes.bfloat16, "f2"])
@pytest.mark.parametrize("rest", ["f4", ml_dtypes.bfloat16])
def test_parts_of_several_dtypes_are_joined_in_one_that_holds_them(tmp_path, first, rest):
    tensors = peft(DIFFUSERS + "to_q", dtype=first)
    tensors |= peft(DIFFUSERS + "to_k", dtype=rest) | peft(DIFFUSERS + "to_v", dtype=rest)
    path, out = saved(tmp_path / "a.safetensors", tensors), tmp_path / "b.safetensors"
    done = lorakit.convert(path, out, to="kohya", family="flux", run=SCRATCH)
    assert done.error == 0.0
    found = load_file(out)
    a, b = (found[f"{KOHYA}qkv{x}"].astype("f8") for x in (DOWN, UP))
    expected = [
        tensors[f"{DIFFUSERS}{p}.lora_B.weight"].astype("f8")
        @ tensors[f"{DIFFUSERS}{p}.lora_A.weight"].astype("f8")
        for p in ("to_q", "to_k", "to_v")
    ]
    np.testing.assert_allclose(b @ a, np.concatenate(expected), rtol=1e-12)


def of_q(folder, a, b, **config):
    module = "model.layers.0.self_attn.q_proj"
    tensors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    return save(folder, tensors, target_modules=["q_proj"], **config)


@pytest.mark.parametrize("to", ["mlx", "peft"])
def test_numbers_that_are_none_are_the_adapters_fault(tmp_path, to):
    b = np.full((8, 2), 1, np.float16)
    b[0, 0] = np.nan
    adapter = of_q(tmp_path / "a", np.ones((2, 6), np.float16), b)
    with pytest.raises(MisfitError, match=r"q_proj' has NaN or Inf.*diverged") as caught:
        lorakit.plan_reformat(adapter, to=to, alpha="fold").run(tmp_path / "out", SCRATCH)
    assert caught.value.file.endswith("adapter_model.safetensors")
    assert not list(tmp_path.glob("out*"))


def test_a_scaling_that_takes_a_factor_beyond_its_dtype_is_refused(tmp_path):
    a, b = np.full((2, 6), 100, np.float16), np.full((8, 2), 5000, np.float16)
    adapter = of_q(tmp_path / "a", a, b, lora_alpha=2000)
    with pytest.raises(MisfitError, match=r"does not fit float16: its largest number becomes 1e"):
        lorakit.plan_reformat(adapter, to="peft", alpha="fold").run(tmp_path / "out", SCRATCH)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("alpha", [1.0, 2.0])
def test_a_loha_with_an_alpha_is_as_its_format_has_it(tmp_path, alpha):
    name = KOHYA + "proj"
    halves = {"w1_a": (WIDTH, 2), "w1_b": (2, WIDTH), "w2_a": (WIDTH, 2), "w2_b": (2, WIDTH)}
    tensors = {f"{name}.hada_{r}": drawn(r, *shape) for r, shape in halves.items()}
    given = saved(tmp_path / "a.safetensors", {**tensors, f"{name}.alpha": np.array(alpha, "f4")})
    lorakit.convert(given, tmp_path / "out.safetensors", to="kohya", run=SCRATCH)
    assert (tmp_path / "out.safetensors").read_bytes() == given.read_bytes()


@pytest.mark.parametrize("front", ["diffusion_model.double_blocks.0.img_attn.", "lycoris_"])
def test_the_alpha_of_two_whole_matrices_means_nothing_and_may_be_inf(tmp_path, front):
    """AI Toolkit has one of 9999999999 there, which float16 has not."""
    parts = front == "lycoris_"
    names = [f"transformer_blocks_0_attn_to_{x}" for x in "qkv"] if parts else ["qkv"]
    rows, tensors, deltas = 16 if parts else 48, {}, []
    rng = np.random.default_rng(0)
    for name in names:
        w1, w2 = (rng.standard_normal(s).astype("f2") for s in ((4, 4), (rows // 4, 4)))
        tensors |= {f"{front}{name}.lokr_w1": w1, f"{front}{name}.lokr_w2": w2}
        tensors[f"{front}{name}.alpha"] = np.array(np.inf, "f2")
        deltas.append(np.kron(w1.astype("f8"), w2.astype("f8")))
    save_file(tensors, tmp_path / "a.safetensors")
    weight = "double_blocks.0.img_attn.qkv.weight"
    save_file({weight: np.zeros((48, 16), "f4")}, tmp_path / "base.safetensors")
    for to in ("", "comfyui", "kohya", "diffusers"):
        lora = tmp_path / f"a{to}.safetensors"
        if to:
            lorakit.convert(tmp_path / "a.safetensors", lora, to=to, run=SCRATCH)
        out = tmp_path / f"out{to}.safetensors"
        lorakit.merge(tmp_path / "base.safetensors", lora, out, run=SCRATCH)
        np.testing.assert_allclose(load_file(out)[weight], np.concatenate(deltas), atol=1e-5)


@pytest.mark.parametrize("alpha", ["keep", "fold"])
def test_biases_and_scalings_of_factors_in_float64_are_multiplied_too(tmp_path, alpha):
    name = KOHYA + "proj"
    tensors = {n: v.astype("f8") for n, v in kohya(name).items()}
    tensors |= {f"{name}.alpha": np.array(0.3), f"{name}.diff_b": drawn("bias", WIDTH, dtype="f8")}
    path = saved(tmp_path / "a.safetensors", tensors)
    lorakit.convert(path, tmp_path / "b", to="peft", alpha=alpha, family="flux", run=SCRATCH)
    (delta,) = open_file(tmp_path / "b").deltas
    a, b = (delta.tensors[x].read() for x in "ab")
    wanted = 0.3 / RANK * tensors[name + UP] @ tensors[name + DOWN]
    np.testing.assert_allclose(delta.scaling * b @ a, wanted, rtol=1e-12)
    np.testing.assert_allclose(delta.tensors["bias"].read(), tensors[f"{name}.diff_b"], rtol=1e-12)


@pytest.mark.parametrize("rows", [WIDTH - 1, WIDTH, WIDTH + 1])
@pytest.mark.parametrize("to", ["comfyui", "peft"])
def test_a_fused_projection_with_too_few_rows_is_refused_with_both_sizes(tmp_path, rows, to):
    path = saved(tmp_path / "a.safetensors", kohya(KOHYA + "qkv", rows))
    with pytest.raises(MisfitError, match=f"{rows} rows for {WIDTH} inputs are too few"):
        lorakit.convert(path, tmp_path / "b", to=to, family="flux", run=SCRATCH)


def test_a_fused_projection_with_an_alpha_alone_is_told_as_such(tmp_path):
    tensors = {**kohya(KOHYA + "proj"), KOHYA + "qkv.alpha": np.array(1, "f4")}
    path = saved(tmp_path / "a.safetensors", tensors)
    with pytest.raises(MisfitError, match="no factors that tell how many rows"):
        lorakit.convert(path, tmp_path / "b", to="peft", family="flux", run=SCRATCH)
