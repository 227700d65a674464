"""An independent witness for names, rows and swaps: Diffusers' converters of whole checkpoints.

They are linear in the rows of a weight. Each weight of the original code is given as one column of
numbers that no other row has; as a LoRA, it is B of rank one. Where every row went must agree.

Source: huggingface/diffusers, src/diffusers/loaders/single_file_utils.py
"""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorakit
from fixtures.models.building import UNETS
from lorakit.formats.templates import denoiser

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
from diffusers.loaders import single_file_utils  # noqa: E402

SCRATCH = lorakit.RunOptions(sync=False)
# Family, and after a colon which of its models -> the model with few layers, and the converter.
WITNESSES = {
    "flux": (
        "FluxTransformer2DModel",
        {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True},
        "convert_flux_transformer_checkpoint_to_diffusers",
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {"num_layers": 3, "dual_attention_layers": (0,), "caption_projection_dim": 1536},
        "convert_sd3_transformer_checkpoint_to_diffusers",
    ),
    "hunyuan_video": (
        "HunyuanVideoTransformer3DModel",
        {"num_layers": 2, "num_single_layers": 2},
        "convert_hunyuan_video_transformer_to_diffusers",
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        {"num_layers": 2, "num_single_layers": 2},
        "convert_flux2_transformer_checkpoint_to_diffusers",
    ),
    "wan": (
        "WanTransformer3DModel",
        {"num_layers": 2, "image_dim": 1280, "added_kv_proj_dim": 5120},
        "convert_wan_transformer_to_diffusers",
    ),
    "wan:animate": (
        "WanAnimateTransformer3DModel",
        {"num_layers": 2, "image_dim": 1280, "added_kv_proj_dim": 5120},
        "convert_wan_transformer_to_diffusers",
    ),
    "z_image": (
        "ZImageTransformer2DModel",
        {"n_layers": 2, "n_refiner_layers": 1},
        "convert_z_image_transformer_checkpoint_to_diffusers",
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {"num_layers": 2, "num_refiner_layers": 1},
        "convert_lumina2_to_diffusers",
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        {"num_layers": 2, "num_single_layers": 2},
        "convert_chroma_transformer_checkpoint_to_diffusers",
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {"num_layers": 2},
        "convert_ltx_transformer_checkpoint_to_diffusers",
    ),
    "aura_flow": (
        "AuraFlowTransformer2DModel",
        {"num_mmdit_layers": 2, "num_single_dit_layers": 2},
        "convert_auraflow_transformer_checkpoint_to_diffusers",
    ),
    "sana": (
        "SanaTransformer2DModel",
        {"num_layers": 2},
        "convert_sana_transformer_to_diffusers",
    ),
    "mochi": (
        "MochiTransformer3DModel",
        {},  # the converter knows one depth
        "convert_mochi_transformer_checkpoint_to_diffusers",
    ),
    "ltx2": (
        "LTX2VideoTransformer3DModel",
        {"num_layers": 2, "gated_attn": True, "audio_gated_attn": True},
        "convert_ltx2_transformer_to_diffusers",
    ),
    "minimax_h3": (
        "MiniMaxH3Transformer3DModel",
        {"num_layers": 2, "num_refiner_layers": 1},
        "convert_minimax_h3_transformer_checkpoint_to_diffusers",
    ),
    "krea2": (
        "Krea2Transformer2DModel",
        {"num_layers": 2},
        "convert_krea2_transformer_checkpoint_to_diffusers",
    ),
    "qwen_image_21": (
        "QwenImage21Transformer2DModel",
        {"num_layers": 2},
        "convert_qwen_image21_transformer_checkpoint_to_diffusers",
    ),
    "flux3": (
        "Flux3Transformer2DModel",
        {"num_layers": 2, "num_single_layers": 2, "flow_map": True},
        "convert_flux3_transformer_checkpoint_to_diffusers",
    ),
}


def linear_layers(family):
    """(out, in) of every linear layer of the model, which is built without weights."""
    name, options, _ = WITNESSES[family]
    with torch.device("meta"):
        model = getattr(diffusers, name)(**options)
    return {
        n: tuple(m.weight.shape) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)
    }


def originals(family, layers):
    """Rows and inputs of the modules of the original code that these are."""
    names, found = denoiser(family), {}
    for module, (out, inner) in layers.items():
        there = names.find(module, "diffusers")
        assert there is not None, module
        name = names.fill(there, "original")
        rows, _ = found.get(name, (0, inner))
        found[name] = (rows + out, inner)
    return found


def columns(modules):
    """A number for each row, which no other row of any module has."""
    start, found = 1, {}
    for name, (rows, _) in modules.items():
        found[name] = np.arange(start, start + rows, dtype=np.float32)[:, None]
        start += rows
    assert start < 1 << 24
    return found


def witnessed(family, numbers):
    """What the converter makes of them; whatever else it asks for is zeros."""
    convert = getattr(single_file_utils, WITNESSES[family][2])
    zeros = {}
    for name, rows in numbers.items():
        zeros[f"{name}.bias"] = torch.zeros(len(rows))
    for _ in range(300):
        given = {f"{n}.weight": torch.tensor(v) for n, v in numbers.items()}
        try:
            found = convert({**zeros, **given}, config={})
            return {k: v.numpy() for k, v in found.items() if v is not None}
        except KeyError as missing:
            zeros[missing.args[0]] = torch.zeros(1)
    raise AssertionError("it asks for too much")


def ours(family, modules, numbers, folder):
    """Where our conversion puts the rows, by module in Diffusers' names."""
    tensors = {}
    for name, (_, inner) in modules.items():
        tensors[f"diffusion_model.{name}.lora_A.weight"] = np.ones((1, inner), np.float32)
        tensors[f"diffusion_model.{name}.lora_B.weight"] = numbers[name]
    save_file(tensors, folder / "a.safetensors", metadata={"format": "pt"})
    lorakit.convert(
        folder / "a.safetensors",
        folder / "out",
        to="diffusers",
        family=family.partition(":")[0],
        run=SCRATCH,
    )
    found = load_file(folder / "out/pytorch_lora_weights.safetensors")
    ends = (".lora_B.weight", "transformer.")
    return {
        n.removesuffix(ends[0]).removeprefix(ends[1]): v[:, 0]
        for n, v in found.items()
        if n.endswith(ends[0])
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("family", WITNESSES)
def test_every_row_goes_where_the_whole_checkpoint_has_it(family, tmp_path):
    layers = linear_layers(family)
    modules = originals(family.partition(":")[0], layers)
    numbers = columns(modules)
    theirs = witnessed(family, numbers)
    found = ours(family, modules, numbers, tmp_path)
    assert set(found) == set(layers)
    differing = [
        module
        for module, rows in found.items()
        if f"{module}.weight" not in theirs
        or not np.array_equal(theirs[f"{module}.weight"].ravel(), rows)
    ]
    assert not differing


@pytest.mark.parametrize("family", UNETS)
def test_every_name_of_a_unet_is_that_of_the_whole_checkpoint(family):
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(**UNETS[family])
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    layers = [n for n, m in model.named_modules() if isinstance(m, kinds)]
    names = denoiser(family)
    there = {m: names.fill(names.find(m, "diffusers"), "original") for m in layers}
    numbers = {m: torch.full((1,), float(i)) for i, m in enumerate(layers)}
    zeros = {}
    config = {**model.config, "class_embed_type": None}
    for _ in range(300):
        given = {f"model.diffusion_model.{there[m]}.weight": v for m, v in numbers.items()}
        try:
            found = single_file_utils.convert_ldm_unet_checkpoint({**zeros, **given}, config)
            break
        except KeyError as missing:
            zeros[f"model.diffusion_model.{missing.args[0]}"] = torch.zeros(1)
    assert all(torch.equal(found[f"{m}.weight"], v) for m, v in numbers.items())
