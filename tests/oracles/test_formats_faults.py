"""What Diffusers' own readers and writers do wrong, and ours does right: letters a to f of
specs/formats.md, 2.9. Each is held against the algebra in float64; what the installed Diffusers
does is recorded as a property of the suite and fails nothing.
"""

import numpy as np
import pytest

import lorakit
from tests.oracles.faulty import (
    KOHYA,
    PEFT,
    Peer,
    converted,
    drawn,
    folded,
    halves_swapped,
    pair,
    same,
    saved,
    update,
)

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from diffusers.loaders import FluxLoraLoaderMixin, lora_conversion_utils  # noqa: E402
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def peer(record_testsuite_property):
    return Peer(record_testsuite_property)


def tensors_of(arrays):
    return {n: torch.tensor(a) for n, a in arrays.items()}


def read_by_diffusers(arrays):
    """The tensors that Diffusers' pipeline for FLUX.1 makes of a file."""
    found = FluxLoraLoaderMixin.lora_state_dict(tensors_of(arrays))
    return {n: t.float().numpy() for n, t in found.items()}


# The modules of FLUX.1 that are in no block, in the names of kohya and of Diffusers.
OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
    "final_layer_adaLN_modulation_1": "norm_out.linear",
}


def outside(alpha):
    found = {}
    for module in OUTSIDE:
        found |= pair(f"lora_unet_{module}", 16, 8, alpha=alpha)
    return found


def test_modules_of_flux_outside_the_blocks_are_modules_of_the_transformer(tmp_path, peer):
    """a. `_convert_kohya_flux_lora_to_diffusers` writes them without `transformer.`, and the
    loader then leaves them out without a word.
    """
    tensors = outside(alpha=2.0)
    expected = {
        f"transformer.{there}": update(tensors, f"lora_unet_{here}")
        for here, there in OUTSIDE.items()
    }
    name = "transformer.norm_out.linear"
    expected[name] = halves_swapped(expected[name])
    same(folded(saved(tmp_path / "a.safetensors", tensors), tmp_path, family="flux"), expected)
    peer.holds(
        "a", lambda: any(not n.startswith("transformer.") for n in read_by_diffusers(tensors))
    )


@pytest.mark.parametrize("alpha", [0.5, 6.0])
def test_the_alpha_of_the_final_layer_of_flux_is_heard(tmp_path, peer, alpha):
    """b. The same function has the final layer at a scaling of 1, whatever its alpha."""
    modules = {
        "final_layer_linear": "proj_out",
        "final_layer_adaLN_modulation_1": "norm_out.linear",
    }
    tensors = {}
    for module in modules:
        tensors |= pair(f"lora_unet_{module}", 16, 8, alpha=alpha)
    path = saved(tmp_path / "a.safetensors", tensors)
    linear, swapped = (update(tensors, f"lora_unet_{m}") for m in modules)
    expected = {
        "transformer.proj_out": linear,
        "transformer.norm_out.linear": halves_swapped(swapped),
    }
    same(folded(path, tmp_path, family="flux"), expected)
    _, kept = converted(path, tmp_path / "x.safetensors", "comfyui", family="flux")
    assert {float(t) for n, t in kept.items() if n.endswith(".alpha")} == {alpha}

    def wrong():
        found = read_by_diffusers(tensors)
        name = next(n for n in found if "proj_out" in n).partition(".lora")[0]
        return not np.allclose(update(found, name, names=PEFT), linear, rtol=1e-4)

    peer.holds("b", wrong)


MIXTURE = (
    "attn.to_q",
    "attn.to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.2",
    "norm1.linear",
)


def test_every_module_of_a_mixture_of_onetrainer_is_read(tmp_path, peer):
    """c. Diffusers puts all `ff`, `norm` and `proj` modules of a block under the block's name, and
    the last one stays: six become three.
    """
    modules = [f"transformer_blocks.0.{m}" for m in MIXTURE]
    modules += ["single_transformer_blocks.0.proj_mlp", "single_transformer_blocks.0.proj_out"]
    tensors, expected = {}, {}
    for module in modules:
        there = f"lora_transformer_{module.replace('.', '_')}"
        tensors |= pair(there, 12, 8, alpha=1.0)
        expected[f"transformer.{module}"] = update(tensors, there)
    same(folded(saved(tmp_path / "a.safetensors", tensors), tmp_path), expected)
    peer.holds("c", lambda: len(read_by_diffusers(tensors)) < 2 * len(modules))


# Family -> what its files have before the names, and a module beside which it is recognised.
SWAPPED = {
    "flux": ("", "double_blocks.0.img_mod.lin", "transformer_blocks.0.norm1.linear"),
    "hunyuan_video": (
        "diffusion_model.",
        "double_blocks.0.img_mod.linear",
        "transformer_blocks.0.norm1.linear",
    ),
    "flux2": (
        "diffusion_model.",
        "time_in.in_layer",
        "time_guidance_embed.timestep_embedder.linear_1",
    ),
}
FINAL = "final_layer.adaLN_modulation.1"


def read_final(family, tensors, wanted):
    """Whether Diffusers' converter has the wrong final modulation."""
    name = {
        "flux": "_convert_bfl_flux_control_lora_to_diffusers",
        "hunyuan_video": "_convert_hunyuan_video_lora_to_diffusers",
        "flux2": "_convert_non_diffusers_flux2_lora_to_diffusers",
    }[family]
    found = getattr(lora_conversion_utils, name)(tensors_of(tensors))
    arrays = {n: t.numpy() for n, t in found.items()}
    delta = update(arrays, "transformer.norm_out.linear", names=PEFT)
    return not np.allclose(delta, wanted, rtol=1e-4)


@pytest.mark.parametrize("family", SWAPPED)
def test_scale_and_shift_change_places_in_b_and_never_in_a(tmp_path, peer, family):
    """d. For BFL's control files and HunyuanVideo, Diffusers swaps the halves of A as well; for
    FLUX.2 it swaps neither.
    """
    prefix, module, there = SWAPPED[family]
    tensors = pair(prefix + FINAL, 24, 12, names=PEFT) | pair(prefix + module, 72, 12, names=PEFT)
    path = saved(tmp_path / "a.safetensors", tensors)
    final, plain = (update(tensors, prefix + m, names=PEFT) for m in (FINAL, module))
    expected = {
        "transformer.norm_out.linear": halves_swapped(final),
        f"transformer.{there}": plain,
    }
    same(folded(path, tmp_path, family=family), expected, tolerance=1e-7)
    _, found = converted(path, tmp_path / "x.safetensors", "diffusers", family=family)
    a = found["transformer.norm_out.linear.lora_A.weight"]
    assert a.tobytes() == tensors[f"{prefix}{FINAL}.lora_A.weight"].tobytes()
    peer.holds(f"d {family}", lambda: read_final(family, tensors, halves_swapped(final)))


def test_queries_of_the_refiner_of_hunyuan_video_have_all_of_a(tmp_path, peer):
    """e. Diffusers cuts A of the refiner's fused projection in three, as if it were B."""
    width, rank = 12, 6
    name = "diffusion_model.txt_in.individual_token_refiner.blocks.0.self_attn_qkv"
    tensors = pair(name, 3 * width, width, rank=rank, names=PEFT)
    whole = update(tensors, name, names=PEFT)
    block = "transformer.context_embedder.token_refiner.refiner_blocks.0.attn"
    expected = {f"{block}.to_{x}": whole[i * width : (i + 1) * width] for i, x in enumerate("qkv")}
    path = saved(tmp_path / "a.safetensors", tensors)
    same(folded(path, tmp_path, family="hunyuan_video"), expected, tolerance=1e-7)

    def wrong():
        convert = lora_conversion_utils._convert_hunyuan_video_lora_to_diffusers
        found = {n: t.numpy() for n, t in convert(tensors_of(tensors)).items()}
        return not np.allclose(
            update(found, f"{block}.to_q", names=PEFT), expected[f"{block}.to_q"]
        )

    peer.holds("e", wrong)


UNET = "unet.down_blocks.1.attentions.0.transformer_blocks.0"


def with_norms(module, out, inner, *, seed=0):
    """A DoRA of PEFT: A, B and the norms of the outputs."""
    found = pair(module, out, inner, names=PEFT, seed=seed)
    norms = {f"{module}.lora_magnitude_vector": np.abs(drawn(seed + 5, out)) + 1}
    return found | norms


def test_a_kohya_file_has_the_alpha_the_norms_and_the_metadata_of_its_source(tmp_path, peer):
    """f. `convert_state_dict_to_kohya` writes the rank as alpha, in int64; it leaves DoRA under
    names that nothing reads, and takes no metadata.
    """
    modules = [f"{UNET}.attn1.to_q", f"{UNET}.attn2.to_out.0"]
    tensors = {n: t for m in modules for n, t in with_norms(m, 16, 16).items()}
    known = '{"unet.r": 2, "unet.lora_alpha": 0.5, "unet.target_modules": ["to_q", "to_out.0"]}'
    path = saved(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=known, title="mine")
    out = tmp_path / "x.safetensors"
    report, found = converted(path, out, "kohya", family="sd1")
    assert len(report.steps) == 2
    for module in modules:
        there = "lora_unet_" + module.removeprefix("unet.").replace(".", "_")
        alpha = found[f"{there}.alpha"]
        assert alpha.dtype.kind == "f"
        assert float(alpha) == 0.5
        norms = found[f"{there}.dora_scale"]
        assert norms.shape == (16, 1)
        np.testing.assert_array_equal(norms.ravel(), tensors[f"{module}.lora_magnitude_vector"])
        expected = 0.25 * update(tensors, module, names=PEFT)
        np.testing.assert_allclose(update(found, there, names=KOHYA), expected, rtol=1e-6)
    assert len(found) == 4 * len(modules)
    assert lorakit.open_checkpoint(str(out)).parts[0].metadata["title"] == "mine"

    def wrong():
        theirs = convert_state_dict_to_kohya(tensors_of(tensors))
        there = "lora_unet_" + modules[0].removeprefix("unet.").replace(".", "_")
        return f"{there}.dora_scale" not in theirs or theirs[f"{there}.alpha"].dtype == torch.int64

    peer.holds("f", wrong)
