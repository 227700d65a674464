"""LoRA files of image and language models, and pipelines, that convert and merge refuse."""

import json
from pathlib import Path

from tests.cli.spoil import read, tensor, write

CONVERT = ["convert", "lora.safetensors", "-o", "out"]
INTO_PIPE = ["merge", "pipe", "lora.safetensors", "-o", "merged"]
UNET = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
CLIP = "lora_te_text_model_encoder_layers_0_mlp_fc1"
FLUX = "lora_unet_double_blocks_0_img_attn_qkv"
PLACE = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


def pair(module: str, out: int = 8, inner: int = 768) -> dict[str, object]:
    """The factors of a module, of zeros."""
    down, up = tensor((2, inner)), tensor((out, 2))
    return {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}


def lora(*modules: str, **more: tuple[int, ...]) -> None:
    """A file with pairs for these modules, and other tensors of these shapes."""
    held = {n: t for m in modules for n, t in pair(m).items()}
    write(Path("lora.safetensors"), {**held, **{n: tensor(s) for n, s in more.items()}})


def pipeline(*components: str) -> None:
    """The folder of a pipeline with a UNet, and others."""
    for component in ("unet", *components):
        folder = Path("pipe") / component
        folder.mkdir(parents=True)
        write(folder / "model.safetensors", {f"{PLACE}.weight": tensor((8, 768))})
    Path("pipe/model_index.json").write_text("{}")


def unknown() -> list[str]:
    """A file with a name that no family has."""
    lora(UNET, "lora_unet_some_other_place")
    return CONVERT


def half() -> list[str]:
    """A file that lacks one of two factors."""
    lora(UNET)
    held = read(Path("lora.safetensors"))
    write(Path("lora.safetensors"), {n: t for n, t in held.items() if "lora_up" not in n})
    return CONVERT


def no_product() -> list[str]:
    """Factors of two ranks."""
    write(Path("lora.safetensors"), pair(UNET) | {f"{UNET}.lora_up.weight": tensor((8, 4))})
    return CONVERT


def no_place() -> list[str]:
    """A module that MLX has not."""
    lora(UNET)
    return [*CONVERT, "--to", "mlx"]


def norms_of_a_part() -> list[str]:
    """DoRA norms of inputs of a fused projection."""
    module = "transformer.transformer_blocks.0.attn.to_q"
    write(
        Path("lora.safetensors"),
        {
            f"{module}.lora_A.weight": tensor((2, 64)),
            f"{module}.lora_B.weight": tensor((64, 2)),
            f"{module}.lora_magnitude_vector": tensor((64,)),
        },
    )
    return [*CONVERT, "--to", "kohya", "--family", "flux"]


def norms_of_one() -> list[str]:
    """DoRA norms of one of two modules."""
    other = UNET.replace("to_k", "to_v")
    lora(UNET, other, **{f"{UNET}.dora_scale": (8, 1)})
    return [*CONVERT, "--to", "diffusers"]


def twice() -> list[str]:
    """Two spellings of one module."""
    held = pair(UNET) | pair(f"unet.{PLACE}")
    write(Path("lora.safetensors"), held)
    return [*CONVERT, "--to", "diffusers"]


def parts_untold() -> list[str]:
    """A bias alone of a fused projection whose parts have rows of their own numbers."""
    lora(**{"diffusion_model.single_blocks.0.linear1.diff_b": (448,)})
    return [*CONVERT, "--to", "diffusers", "--family", "flux"]


def edit_of_several() -> list[str]:
    """An adapter of two models, edited."""
    lora(UNET, CLIP)
    return ["edit", "lora.safetensors", "-o", "out", "--scale", "2"]


def split_qkv() -> list[str]:
    """A file that was not trained in parts."""
    write(Path("lora.safetensors"), pair(FLUX, 192, 64))
    return [*CONVERT, "--to", "kohya", "--fix-split-qkv-alpha"]


def gguf_heads() -> list[str]:
    """A base that does not say how many heads it has."""
    text = json.loads(Path("base/config.json").read_text())
    del text["num_attention_heads"], text["num_key_value_heads"]
    Path("base/config.json").write_text(json.dumps(text))
    return ["convert", "style", "-o", "out", "--to", "gguf", "--base", "base"]


def torchtune() -> list[str]:
    """A file of torchtune, which does not say its alpha."""
    module = "layers.0.mlp.w1"
    held = {f"{module}.lora_a.weight": tensor((2, 64)), f"{module}.lora_b.weight": tensor((8, 2))}
    write(Path("lora.safetensors"), held)
    return [*CONVERT, "--base", "base"]


def several() -> list[str]:
    """An adapter of two models for one of them."""
    pipeline()
    lora(UNET, CLIP)
    return ["merge", "pipe/unet", "lora.safetensors", "-o", "merged"]


def no_such_part() -> list[str]:
    """A part that the adapter has not."""
    return [*several(), "--component", "vae"]


def no_such_model() -> list[str]:
    """A pipeline that has only one of two models."""
    pipeline()
    lora(UNET, CLIP)
    return INTO_PIPE


def fits_two() -> list[str]:
    """An adapter of PEFT that does not say for which of two models it is."""
    pipeline("other")
    Path("peft").mkdir()
    front = f"base_model.model.{PLACE}"
    held = {f"{front}.lora_A.weight": tensor((2, 768)), f"{front}.lora_B.weight": tensor((8, 2))}
    write(Path("peft/adapter_model.safetensors"), held)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["to_k"]}
    Path("peft/adapter_config.json").write_text(json.dumps(config))
    return ["merge", "pipe", "peft", "-o", "merged"]


def one_file() -> list[str]:
    """A pipeline into one file."""
    pipeline()
    lora(UNET)
    return [*INTO_PIPE[:-1], "merged.safetensors"]


def multiplied() -> list[str]:
    """IA3, which cannot be taken out."""
    pipeline()
    lora(**{f"{UNET}.weight": (8,), f"{UNET}.on_input": ()})
    return ["unmerge", "pipe/unet", "lora.safetensors", "-o", "back"]


def boft() -> list[str]:
    """BOFT, which is not computed."""
    pipeline()
    lora(**{f"{UNET}.oft_blocks": (2, 2, 4, 4)})
    return ["merge", "pipe/unet", "lora.safetensors", "-o", "merged"]


def differences() -> list[str]:
    """A difference of a whole weight, where factors are worked on."""
    lora(**{f"{UNET}.diff": (8, 768)})
    return ["compare", "lora.safetensors", "lora.safetensors"]
