"""How each format that is written spells its tensors: prefix, namespace, endings, and what it can
hold beside plain factors.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from lorakit.formats.components import comfy_prefix, kind_of, kohya_prefix
from lorakit.formats.families import FAMILIES
from lorakit.formats.peft import PREFIX, SUFFIXES
from lorakit.formats.roles import BESIDE, ENDINGS
from lorakit.formats.templates import Found, denoiser, encoder

# Algorithms that only files for ComfyUI and the web UIs hold.
LYCORIS = frozenset({"loha", "lokr", "glora", "oft", "ia3", "full", "set", "norm"})
NORM = re.compile(r"\.norm_(added_)?[qk]$")
Number = tuple[str, tuple[int, ...]]  # dtype and shape
NUMBER: Number = ("F32", ())


@dataclass(frozen=True)
class Spelling:
    """What a format holds. `alpha`: a tensor a module, `number` is what it is; `algos`: beside
    plain LoRA; `cores`: kernels of their own between the factors; `flat_clip`: CLIP in the names of
    transformers 5; `norms`: those of queries and keys that take the place of others.
    """

    name: str
    endings: Mapping[str, str]
    algos: frozenset[str] = frozenset()
    alpha: bool = False
    cores: bool = False
    number: Number = NUMBER
    flat_clip: bool = False
    norms: bool = False

    def holds(self, algo: str, module: str) -> bool:
        """Whether the format has a place for what an algorithm does to a module, as it is."""
        norm = self.norms and algo == "set" and NORM.search(module) is not None
        return algo == "lora" or algo in self.algos or norm

    def ending(self, algo: str, role: str) -> str:
        """The ending of a tensor's name."""
        if role in self.endings:
            return self.endings[role]
        if (algo, role) in BESIDE:
            return BESIDE[algo, role]
        return next(e for e, known in ENDINGS.items() if known == (algo, role))


_KOHYA = {
    "a": ".lora_down.weight",
    "b": ".lora_up.weight",
    "mid": ".lora_mid.weight",
    "bias": ".diff_b",
    "magnitude": ".dora_scale",
    "alpha": ".alpha",
}
_PEFT = {role: f".{ending}" for role, ending in SUFFIXES.items()}
_COMFYUI = {**_KOHYA, "a": _PEFT["a"], "b": _PEFT["b"]}
SPELLINGS = {
    spelling.name: spelling
    for spelling in (
        Spelling("kohya", _KOHYA, LYCORIS, alpha=True, cores=True),
        Spelling("comfyui", _COMFYUI, LYCORIS, alpha=True, cores=True),
        Spelling("diffusers", {**_PEFT, "value": ".weight"}, norms=True),
        Spelling("peft", _PEFT),
    )
}


@dataclass(frozen=True)
class Place:
    """Where a delta goes: the name of its module in the file, and its place in the templates where
    that is a module of the original code.
    """

    name: str
    found: Found | None = field(default=None)


def place_of(
    to: str, family: str, component: str, module: str, *, flat_clip: bool = False
) -> Place | None:
    """Where a module in canonical names goes in a format; None if the family does not have it."""
    known = FAMILIES.get(family)
    if known is None:
        return Place(f"{PREFIX}{module}" if to == "peft" else module)
    kind, namespace = kind_of(component, family), _namespace(to, family)
    names = encoder(kind) if kind else denoiser(family, namespace)
    found = names.find(module, "diffusers")
    if found is None:
        return _whole(to, family, module)
    spelled = clip_name(family, component, module) if flat_clip else module
    if to == "peft":
        return Place(f"{PREFIX}{spelled}")
    if to == "diffusers":
        return Place(f"{component}.{spelled}")
    flat = to == "kohya" or (known.component == "unet" and not kind)
    prefix = kohya_prefix(component, family) if flat else comfy_prefix(component, family)
    if kind:
        own = spelled if flat_clip else names.fill(found, "original")
        return Place(prefix + (own.replace(".", "_") if flat else own))
    name = names.fill(found, namespace, flat=flat)
    return Place(prefix + name, None if namespace == "diffusers" else found)


def _whole(to: str, family: str, module: str) -> Place | None:
    """Where a fused projection goes that cannot be cut."""
    namespace = _namespace(to, family)
    names = denoiser(family, namespace)
    found = names.find(module, "original")
    if found is None or to in ("peft", "diffusers") or namespace == "diffusers":
        return None
    component, flat = FAMILIES[family].component, to == "kohya"
    prefix = kohya_prefix(component, family) if flat else comfy_prefix(component, family)
    return Place(prefix + names.fill(found, namespace, flat=flat))


def clip_name(family: str, component: str, module: str) -> str:
    """A module as transformers 5 names it, whose CLIPTextModel has no `text_model`; its
    CLIPTextModelWithProjection has.
    """
    known = FAMILIES.get(family)
    encoder = known.encoder(component) if known else None
    if encoder is None or encoder.kind != "clip" or encoder.projecting:
        return module
    return module.removeprefix("text_model.")


def place_apart(to: str, family: str, component: str, module: str) -> Place | None:
    """Where a part of a fused projection goes on its own; None if the format has it in one only."""
    known = FAMILIES[family]
    if to == "comfyui" and known.aliased and component == known.component:
        return Place(f"{component}.{module}")
    return None


def _namespace(to: str, family: str) -> str:
    known = FAMILIES[family]
    if to == "comfyui" and known.component != "unet":
        return "comfy" if known.comfy else "original"
    return known.kohya
