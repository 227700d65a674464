"""The families of models whose adapters come in several spellings: a table of templates each."""

from dataclasses import dataclass

from lorakit.formats.families.aura import AURA_FLOW, SANA
from lorakit.formats.families.cosmos import COSMOS
from lorakit.formats.families.flux import CHROMA, FLUX, FLUX2
from lorakit.formats.families.image import LUMINA2, QWEN_IMAGE, SD3, Z_IMAGE
from lorakit.formats.families.text import CLIP, CLIP_FLAT, T5
from lorakit.formats.families.unet import SD, SDXL
from lorakit.formats.families.video import HUNYUAN_COMFY, HUNYUAN_VIDEO, LTX, WAN

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Family:
    """A model's denoiser: what Diffusers calls it, its templates, and what lies beside it.

    `rows`: a line a module, `original = diffusers`, or one name for both; `#` is any number,
    `{a,b}` one line for each, `{a+b}` the parts of a fused projection, one below the other; `@swap`
    says that the two halves of the rows change places, `@swap-last` only where there are two.
    `comfy` are replacements within the original names that other tools make. `kohya` is the
    namespace that kohya's trainers write. `encoders` are text encoders by component.
    """

    name: str
    title: str
    component: str
    rows: str
    encoders: tuple[tuple[str, str], ...] = ()
    comfy: Pairs = ()
    kohya: str = "original"


ENCODERS = {"clip": (CLIP, CLIP_FLAT), "t5": (T5, ())}
_CLIP = ("text_encoder", "clip")
_TWO = (_CLIP, ("text_encoder_2", "clip"))

# A new family: a table in this folder, a row here. Where several fit, the first is taken.
FAMILIES = {
    family.name: family
    for family in (
        Family("sd1", "Stable Diffusion 1", "unet", SD, (_CLIP,), kohya="diffusers"),
        Family("sd2", "Stable Diffusion 2", "unet", SD, (_CLIP,), kohya="diffusers"),
        Family("sdxl", "Stable Diffusion XL", "unet", SDXL, _TWO),
        Family("flux", "FLUX.1", "transformer", FLUX, (_CLIP, ("text_encoder_2", "t5"))),
        Family("sd3", "Stable Diffusion 3", "transformer", SD3, (*_TWO, ("text_encoder_3", "t5"))),
        Family("wan", "Wan 2", "transformer", WAN, (("text_encoder", "t5"),)),
        Family("qwen_image", "Qwen-Image", "transformer", QWEN_IMAGE),
        Family("z_image", "Z-Image", "transformer", Z_IMAGE),
        Family(
            "hunyuan_video",
            "HunyuanVideo",
            "transformer",
            HUNYUAN_VIDEO,
            (("text_encoder_2", "clip"),),
            HUNYUAN_COMFY,
        ),
        Family("flux2", "FLUX.2", "transformer", FLUX2),
        Family("chroma", "Chroma", "transformer", CHROMA, (("text_encoder", "t5"),)),
        Family("ltx", "LTX-Video", "transformer", LTX, (("text_encoder", "t5"),)),
        Family("lumina2", "Lumina 2", "transformer", LUMINA2),
        Family("cosmos", "Cosmos, Anima", "transformer", COSMOS),
        Family("aura_flow", "AuraFlow", "transformer", AURA_FLOW),
        Family("sana", "Sana", "transformer", SANA),
    )
}
