"""How each format that is written spells its tensors: prefix, namespace, endings, and what it can
hold beside plain factors.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorakit.formats.components import comfy_prefix, kohya_prefix
from lorakit.formats.families import FAMILIES
from lorakit.formats.roles import ENDINGS
from lorakit.formats.templates import Found, denoiser, encoder

# Algorithms that only files for ComfyUI and the web UIs hold.
LYCORIS = frozenset({"loha", "lokr", "glora", "oft", "ia3", "full", "set", "norm"})


Number = tuple[str, tuple[int, ...]]  # dtype and shape
NUMBER: Number = ("F32", ())


@dataclass(frozen=True)
class Spelling:
    """What a format holds. `alpha`: a tensor a module, `number` is what it is; `algos`: beside
    plain LoRA; `cores`: kernels of their own between the factors.
    """

    name: str
    alpha: bool
    endings: Mapping[str, str]
    algos: frozenset[str] = frozenset()
    cores: bool = False
    number: Number = NUMBER

    def ending(self, algo: str, role: str) -> str:
        """The ending of a tensor's name."""
        if role in self.endings:
            return self.endings[role]
        return next(e for e, known in ENDINGS.items() if known == (algo, role))


_KOHYA = {
    "a": ".lora_down.weight",
    "b": ".lora_up.weight",
    "mid": ".lora_mid.weight",
    "bias": ".diff_b",
    "magnitude": ".dora_scale",
    "alpha": ".alpha",
}
_PEFT = {
    "a": ".lora_A.weight",
    "b": ".lora_B.weight",
    "bias": ".lora_B.bias",
    "magnitude": ".lora_magnitude_vector",
}
SPELLINGS = {
    "kohya": Spelling("kohya", True, _KOHYA, LYCORIS, cores=True),
    "comfyui": Spelling(
        "comfyui",
        True,
        {**_KOHYA, "a": ".lora_A.weight", "b": ".lora_B.weight"},
        LYCORIS,
        cores=True,
    ),
    "diffusers": Spelling("diffusers", False, _PEFT),
    "peft": Spelling("peft", False, _PEFT),
}


@dataclass(frozen=True)
class Place:
    """Where a delta goes: the name of its module in the file, and its place in the templates where
    that is a module of the original code.
    """

    name: str
    found: Found | None = field(default=None)


def place_of(to: str, family: str, component: str, module: str) -> Place | None:
    """Where a module in canonical names goes in a format; None if the family does not have it."""
    known = FAMILIES.get(family)
    if known is None:
        return Place(f"base_model.model.{module}" if to == "peft" else module)
    kind = dict(known.encoders).get(component, "")
    names = encoder(kind) if kind else denoiser(family)
    found = names.find(module, "diffusers")
    if found is None:
        return None
    if to == "peft":
        return Place(f"base_model.model.{module}")
    if to == "diffusers":
        return Place(f"{component}.{module}")
    flat = to == "kohya" or (known.component == "unet" and not kind)
    namespace = "diffusers" if kind else _namespace(to, family)
    name = names.fill(found, namespace, flat=flat)
    prefix = kohya_prefix(component, family) if flat else comfy_prefix(component, family)
    return Place(prefix + name, None if namespace == "diffusers" else found)


def _namespace(to: str, family: str) -> str:
    known = FAMILIES[family]
    if to == "comfyui" and known.component != "unet":
        return "comfy" if known.comfy else "original"
    return known.kohya
