"""What stands before the name of a module: which part of the pipeline it is in, and whether the
rest is flattened.

Slots are what a prefix says, before the family is known: "denoiser", "te1" to "te4" (text encoders
by number), "clip_l", "clip_g", "t5", "language model", or a component.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from lorakit.formats.families import FAMILIES
from lorakit.formats.peft import PREFIX


@dataclass(frozen=True)
class Prefix:
    """A prefix: what it means, in which format, and how names go on after it: in `namespace`, where
    that has them.
    """

    text: str
    slot: str
    format: str
    flat: bool = False
    namespace: str = ""


# The longest that fits is taken.
PREFIXES = (
    Prefix("lora_unet_", "denoiser", "kohya", flat=True),
    Prefix("lora_unet__", "denoiser", "videox-fun", flat=True),
    Prefix("Hunyuan_video_I2V_lora_", "denoiser", "tencent", flat=True),
    Prefix("lora_te_", "te1", "kohya", flat=True),
    Prefix("lora_te1_", "te1", "kohya", flat=True),
    Prefix("lora_te2_", "te2", "kohya", flat=True),
    Prefix("lora_te3_", "te3", "kohya", flat=True),
    Prefix("lora_te4_", "te4", "kohya", flat=True),
    Prefix("oft_unet_", "denoiser", "kohya", flat=True),
    Prefix("lora_transformer_", "denoiser", "onetrainer", flat=True, namespace="diffusers"),
    Prefix("lycoris_", "denoiser", "lycoris", flat=True, namespace="diffusers"),
    Prefix("unet.", "denoiser", "diffusers", namespace="diffusers"),
    Prefix("transformer.", "denoiser", "diffusers", namespace="diffusers"),
    Prefix(f"unet.{PREFIX}", "denoiser", "diffusers", namespace="diffusers"),
    Prefix(f"transformer.{PREFIX}", "denoiser", "diffusers", namespace="diffusers"),
    Prefix("text_encoder.", "text_encoder", "diffusers"),
    Prefix("text_encoder_2.", "text_encoder_2", "diffusers"),
    Prefix("text_encoder_3.", "text_encoder_3", "diffusers"),
    Prefix("text_encoder_4.", "text_encoder_4", "diffusers"),
    Prefix("diffusion_model.", "denoiser", "comfyui"),
    Prefix("model.diffusion_model.", "denoiser", "comfyui"),
    Prefix("diffusion_model.decoder.", "denoiser", "comfyui"),
    Prefix("cond_stage_model.transformer.", "te1", "original"),
    Prefix("cond_stage_model.model.", "te1", "original", namespace="open_clip"),
    Prefix("conditioner.embedders.0.transformer.", "te1", "original"),
    Prefix("conditioner.embedders.1.model.", "te2", "original", namespace="open_clip"),
    Prefix("text_encoders.clip_l.transformer.", "clip_l", "comfyui"),
    Prefix("text_encoders.clip_g.transformer.", "clip_g", "comfyui"),
    Prefix("text_encoders.clip_h.transformer.", "te1", "comfyui"),
    Prefix("text_encoders.t5xxl.transformer.", "t5", "comfyui"),
    Prefix("text_encoders.umt5xxl.transformer.", "t5", "comfyui"),
    Prefix("text_encoders.qwen3_06b.transformer.", "language model", "comfyui"),
    Prefix("text_encoders.gemma2_2b.transformer.", "language model", "comfyui"),
    Prefix("text_encoders.llama.transformer.", "language model", "comfyui"),
    Prefix("text_conditioner.", "text_conditioner", "diffusers"),
    Prefix("connectors.", "connectors", "diffusers"),
    Prefix("text_embedding_projection.", "connectors", "comfyui"),
    Prefix("diffusion_model.llm_adapter.", "text_conditioner", "comfyui"),
    Prefix("lora_unet_llm_adapter_", "text_conditioner", "kohya", flat=True),
    Prefix(PREFIX, "denoiser", "peft"),
    Prefix(f"module.{PREFIX}", "denoiser", "peft"),
    Prefix("", "denoiser", "bare"),
)
_BY_LENGTH = sorted(PREFIXES, key=lambda p: len(p.text), reverse=True)
_MODELS = {p.text for p in PREFIXES if p.format == "diffusers"}
COMFY_ENCODERS = {"clip_l": 0, "clip_g": 1}


def prefix_of(module: str) -> tuple[Prefix, str]:
    """The prefix of a module in a file's spelling, and the rest of the name."""
    prefix = next(p for p in _BY_LENGTH if module.startswith(p.text))
    return prefix, module.removeprefix(prefix.text)


def model_of(name: str) -> str:
    """The model of a pipeline that a name begins with, "" where it begins with none."""
    model = name.partition(".")[0]
    return model if f"{model}." in _MODELS else ""


def models_in(names: Iterable[str]) -> list[str]:
    """The models of a pipeline that names begin with, if each begins with one, and they are
    several; else none.
    """
    found = dict.fromkeys(map(model_of, names))
    return [] if "" in found or len(found) < 2 else list(found)


def are_models(prefixes: Iterable[Prefix]) -> bool:
    """Whether prefixes are those of models of a pipeline: of several, or of the denoiser in the
    files of the original code.
    """
    found = set(prefixes)
    if not all(p.text for p in found):
        return False
    return len({p.slot for p in found}) > 1 or all("diffusion_model" in p.text for p in found)


def component_of(slot: str, family: str) -> str:
    """Which component of a family a slot is; "" for one that it has not."""
    known = FAMILIES[family]
    if slot == "denoiser":
        return known.component
    if slot in COMFY_ENCODERS:
        clips = known.of_kind("clip")
        return clips[COMFY_ENCODERS[slot]] if len(clips) > COMFY_ENCODERS[slot] else ""
    if slot == "t5" or (slot == "te3" and len(known.encoders) < 3):
        return next(iter(known.of_kind("t5")), "")
    if slot == "language model":
        return next(iter(known.of_kind(slot)), "")
    if slot.startswith("te") and slot[2:].isdigit():
        number = int(slot[2:]) - 1
        return known.encoders[number].component if number < len(known.encoders) else ""
    return slot if known.encoder(slot) else ""


def kind_of(component: str, family: str) -> str:
    """What kind of text encoder a component is; "" for the denoiser."""
    encoder = FAMILIES[family].encoder(component)
    return encoder.kind if encoder else ""


def kohya_prefix(component: str, family: str) -> str:
    """What kohya's trainers write before the names of a component."""
    known = FAMILIES[family]
    if component == known.component:
        return "lora_unet_"
    encoder = known.encoder(component)
    if encoder and encoder.kohya:
        return encoder.kohya
    if kind_of(component, family) == "t5":
        return "lora_te3_"
    if len(known.encoders) == 1:
        return "lora_te_"
    number = [e.component for e in known.encoders].index(component)
    return f"lora_te{number + 1}_"


def comfy_prefix(component: str, family: str) -> str:
    """What ComfyUI expects before the dotted names of a component."""
    known = FAMILIES[family]
    if component == known.component:
        return known.comfy_front
    encoder = known.encoder(component)
    if encoder and encoder.comfy:
        return encoder.comfy
    if kind_of(component, family) == "t5":
        return "text_encoders.t5xxl.transformer."
    name = ("clip_l", "clip_g")[known.of_kind("clip").index(component)]
    return f"text_encoders.{name}.transformer."
