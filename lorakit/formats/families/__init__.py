"""The families of models whose adapters come in several spellings: a table of templates each."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from lorakit.formats.families.audio import ACE_STEP, CONNECTORS, LTX2, MINIMAX_H3
from lorakit.formats.families.aura import AURA_FLOW, SANA
from lorakit.formats.families.cosmos import COSMOS, TEXT_CONDITIONER
from lorakit.formats.families.flux import CHROMA, FLUX, FLUX2, FLUX3
from lorakit.formats.families.image import LUMINA2, QWEN_IMAGE, SD3, Z_IMAGE
from lorakit.formats.families.krea import IDEOGRAM4, KREA2, QWEN_IMAGE_21
from lorakit.formats.families.mochi import (
    HUNYUAN_VIDEO_15,
    HUNYUAN_VIDEO_15_COMFY,
    MOCHI,
)
from lorakit.formats.families.pixart import PIXART
from lorakit.formats.families.same import COGVIDEOX, COGVIEW, ERNIE, HIDREAM, KANDINSKY5
from lorakit.formats.families.text import CLIP, CLIP_FLAT, IN_CAUSAL, LANGUAGE_MODEL, T5
from lorakit.formats.families.unet import SD1, SD2, SDXL
from lorakit.formats.families.video import HUNYUAN_COMFY, HUNYUAN_VIDEO, LTX, WAN

Pairs = tuple[tuple[str, str], ...]
Sizes = tuple[tuple[int, int], ...]
COMFYUI = "diffusion_model."  # what its names of a denoiser begin with


@dataclass(frozen=True)
class Encoder:
    """A text encoder beside a denoiser.

    Source of `loaded`: huggingface/diffusers, src/diffusers/loaders/lora_pipeline.py
    (_lora_loadable_modules).
    """

    component: str
    kind: str  # a key of ENCODERS
    projecting: bool = False  # whether it is a CLIPTextModelWithProjection
    loaded: bool = False  # whether Diffusers loads adapters of it
    kohya: str = ""  # what its names begin with in kohya's files, where no rule says it
    comfy: str = ""  # and in ComfyUI's


@dataclass(frozen=True)
class Family:
    """A model's denoiser: what Diffusers calls it, its templates, and what lies beside it.

    `rows`: a line a module, `original = diffusers`, or one name for both; `#` is any number,
    `{a,b}` one line for each, `{a+b}` the parts of a fused projection, one below the other; `@swap`
    says that the two halves of the rows change places, `@swap-last` only where there are two;
    `@even` that the parts have as many rows each, `@grouped` that keys and values may have fewer
    than queries; `@head-128` is as `@even`, and that DiffSynth-Studio has them head by head, of so
    many rows; `@conv-3` that it is a convolution with a kernel of 3 by 3; `@rows-9/1` that it
    has nine times as many rows as inputs; `@turned` that it is a bare parameter, (in, out); `@bare`
    that it is one as it is.

    Source of `aliased`: Comfy-Org/ComfyUI, comfy/lora.py (model_lora_keys_unet); of HunyuanVideo it
    knows `transformer.` before the names of the original code only.
    """

    name: str
    title: str
    component: str
    rows: str
    encoders: tuple[Encoder, ...] = ()
    comfy: Pairs = ()  # replacements within the original names that other tools make
    comfy_rows: str = ""  # `rows` of ComfyUI, where it has other modules than the original code
    comfy_front: str = COMFYUI  # what ComfyUI's names begin with
    kohya: str = "original"  # the namespace that kohya's trainers write
    telling: str = ""  # without it in a name, a file is of another model, whose names are these too
    context: int = 0  # inputs of the keys of cross-attention, where they tell it from others
    sizes: Sizes = ()  # blocks with queries that its models have, and the inputs of these
    aliased: bool = False  # whether ComfyUI knows parts of fused projections by Diffusers' names

    @property
    def renamed(self) -> bool:
        """Whether ComfyUI has its modules under other names than the original code."""
        return bool(self.comfy or self.comfy_rows) or self.comfy_front != COMFYUI

    def encoder(self, component: str) -> Encoder | None:
        """The text encoder that is this component; None for the denoiser, and what it has not."""
        return next((e for e in self.encoders if e.component == component), None)

    def of_kind(self, kind: str) -> list[str]:
        """The components that are text encoders of a kind."""
        return [e.component for e in self.encoders if e.kind == kind]


ENCODERS = {
    "clip": (CLIP, CLIP_FLAT),
    "t5": (T5, ()),
    "language model": (LANGUAGE_MODEL, IN_CAUSAL),
    "conditioner": (TEXT_CONDITIONER, ()),
    "connectors": (CONNECTORS, ()),
}
_CLIP = Encoder("text_encoder", "clip", loaded=True)
_OPEN = replace(_CLIP, comfy="text_encoders.clip_h.transformer.")
_SECOND = Encoder("text_encoder_2", "clip", projecting=True, loaded=True)
_T5 = Encoder("text_encoder", "t5")
_UMT5 = replace(_T5, comfy="text_encoders.umt5xxl.transformer.")
_QWEN3 = Encoder(
    "text_encoder",
    "language model",
    kohya="lora_te_",
    comfy="text_encoders.qwen3_06b.transformer.model.",
)
_LLAMA = replace(_QWEN3, kohya="lora_te1_", comfy="text_encoders.llama.transformer.model.")
_FOURTH = replace(_LLAMA, component="text_encoder_4", kohya="lora_te4_")
_GEMMA2 = replace(_QWEN3, comfy="text_encoders.gemma2_2b.transformer.model.")
_CONDITIONER = Encoder(
    "text_conditioner",
    "conditioner",
    loaded=True,
    kohya="lora_unet_llm_adapter_",
    comfy="diffusion_model.llm_adapter.",
)
_CONNECTORS = Encoder("connectors", "connectors", loaded=True, comfy="text_embedding_projection.")

# A new family: a table in this folder, a row here. Where several fit, the first is taken.
FAMILIES = {
    family.name: family
    for family in (
        Family("sd1", "Stable Diffusion 1", "unet", SD1, (_CLIP,), kohya="diffusers", context=768),
        Family("sd2", "Stable Diffusion 2", "unet", SD2, (_OPEN,), kohya="diffusers", context=1024),
        Family("sdxl", "Stable Diffusion XL", "unet", SDXL, (_CLIP, _SECOND), context=2048),
        Family(
            "flux",
            "FLUX.1",
            "transformer",
            FLUX,
            (_CLIP, Encoder("text_encoder_2", "t5")),
            aliased=True,
            sizes=((19, 3072),),
        ),
        Family(
            "sd3",
            "Stable Diffusion 3",
            "transformer",
            SD3,
            (replace(_CLIP, projecting=True), _SECOND, Encoder("text_encoder_3", "t5")),
            aliased=True,
            sizes=((24, 1536), (38, 2432)),
        ),
        Family("wan", "Wan 2", "transformer", WAN, (_UMT5,)),
        Family("qwen_image", "Qwen-Image", "transformer", QWEN_IMAGE, sizes=((60, 3072),)),
        Family("z_image", "Z-Image", "transformer", Z_IMAGE, aliased=True, sizes=((30, 3840),)),
        Family(
            "hunyuan_video",
            "HunyuanVideo",
            "transformer",
            HUNYUAN_VIDEO,
            (_LLAMA, Encoder("text_encoder_2", "clip")),
            HUNYUAN_COMFY,
            sizes=((20, 3072), (20, 3584)),  # and HunyuanImage 2.1, whose blocks are called so
        ),
        Family("flux2", "FLUX.2", "transformer", FLUX2, sizes=((8, 6144), (5, 3072), (8, 4096))),
        Family("chroma", "Chroma", "transformer", CHROMA, (_T5,), sizes=((19, 3072),)),
        Family("ltx", "LTX-Video", "transformer", LTX, (_T5,), sizes=((28, 2048), (48, 4096))),
        Family("lumina2", "Lumina 2", "transformer", LUMINA2, (_GEMMA2,), sizes=((26, 2304),)),
        Family(
            "cosmos",
            "Cosmos, Anima",
            "transformer",
            COSMOS,
            (_QWEN3, _CONDITIONER),
            sizes=((28, 2048), (28, 4096), (36, 5120)),
        ),
        Family("aura_flow", "AuraFlow", "transformer", AURA_FLOW),
        Family("sana", "Sana", "transformer", SANA, sizes=((20, 2240), (28, 1152), (60, 2240))),
        Family("mochi", "Mochi", "transformer", MOCHI, (_T5,), sizes=((48, 3072),)),
        Family("pixart", "PixArt", "transformer", PIXART, (_T5,), sizes=((28, 1152),)),
        Family(
            "hunyuan_video_15",
            "HunyuanVideo 1.5",
            "transformer",
            HUNYUAN_VIDEO_15,
            comfy=HUNYUAN_COMFY,
            comfy_rows=HUNYUAN_VIDEO_15_COMFY,
            sizes=((54, 2048),),
        ),
        Family("ltx2", "LTX-2", "transformer", LTX2, (_CONNECTORS,), sizes=((48, 4096),)),
        Family("minimax_h3", "MiniMax-H3", "transformer", MINIMAX_H3, sizes=((50, 5376),)),
        Family("krea2", "Krea 2", "transformer", KREA2, sizes=((28, 6144),)),
        Family("ideogram4", "Ideogram 4", "transformer", IDEOGRAM4, sizes=((34, 4608),)),
        Family(
            "qwen_image_21", "Qwen-Image 2.1", "transformer", QWEN_IMAGE_21, sizes=((32, 4096),)
        ),
        Family("flux3", "FLUX.3", "transformer", FLUX3),
        Family(
            "hidream",
            "HiDream",
            "transformer",
            HIDREAM,
            (
                Encoder("text_encoder", "clip", projecting=True),
                Encoder("text_encoder_2", "clip", projecting=True),
                Encoder("text_encoder_3", "t5"),
                _FOURTH,
            ),
        ),
        Family(
            "cogvideox",
            "CogVideoX",
            "transformer",
            COGVIDEOX,
            (_T5,),
            sizes=((30, 1920), (42, 3072)),
        ),
        Family("cogview", "CogView", "transformer", COGVIEW, sizes=((28, 4096), (30, 2560))),
        Family("kandinsky5", "Kandinsky 5", "transformer", KANDINSKY5),
        Family("ernie", "Ernie-Image", "transformer", ERNIE, telling="self_attention"),
        Family(
            "ace_step",
            "ACE-Step",
            "transformer",
            ACE_STEP,
            comfy_front="diffusion_model.decoder.",
            telling="cross_attn",
        ),
    )
}


def families_of(names: Collection[str]) -> list[str]:
    """The families that these names may be of, by what tells them from other models."""
    there = {f: not f.telling or any(f.telling in n for n in names) for f in FAMILIES.values()}
    return [family.name for family, possible in there.items() if possible]
