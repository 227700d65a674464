"""Names of whole models in one file, as their original code saves them: what stands before those of
each component, and which names follow.

Sources: Stability-AI/generative-models, configs (SDXL); CompVis/stable-diffusion (SD 1); the keys
that ComfyUI saves.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from lorakit.formats.components import component_of, kind_of
from lorakit.formats.families import FAMILIES, families_of
from lorakit.formats.templates import Found, denoiser, encoder, open_clip

KNOWN = 2000  # names that are looked at to tell the family


@dataclass(frozen=True)
class Stem:
    """What the names of a component begin with; `slot` as in `lorakit.formats.components`."""

    text: str
    slot: str
    open_clip: bool = False  # the encoder goes by the names of open_clip, not of transformers


STEMS = (
    Stem("model.diffusion_model.decoder.", "denoiser"),
    Stem("diffusion_model.decoder.", "denoiser"),
    Stem("decoder.", "denoiser"),
    Stem("model.diffusion_model.", "denoiser"),
    Stem("diffusion_model.", "denoiser"),
    Stem("net.", "denoiser"),
    Stem("", "denoiser"),
    Stem("text_embedding_projection.", "connectors"),
    Stem("model.diffusion_model.llm_adapter.", "text_conditioner"),
    Stem("diffusion_model.llm_adapter.", "text_conditioner"),
    Stem("net.llm_adapter.", "text_conditioner"),
    Stem("llm_adapter.", "text_conditioner"),
    Stem("cond_stage_model.transformer.", "te1"),
    Stem("cond_stage_model.model.", "te1", open_clip=True),
    Stem("conditioner.embedders.0.transformer.", "te1"),
    Stem("conditioner.embedders.1.model.", "te2", open_clip=True),
    Stem("text_encoders.clip_l.transformer.", "clip_l"),
    Stem("text_encoders.clip_g.transformer.", "clip_g"),
    Stem("text_encoders.clip_h.transformer.", "te1"),
    Stem("text_encoders.t5xxl.transformer.", "t5"),
    Stem("text_encoders.umt5xxl.transformer.", "t5"),
)
COMPONENTS = {f.component for f in FAMILIES.values()}
COMPONENTS |= {e.component for f in FAMILIES.values() for e in f.encoders}
_NAMESPACES = ("original", "comfy")


@dataclass(frozen=True)
class Spot:
    """A module of the file, and where a module of Diffusers lies in it."""

    module: str
    found: Found


def family_of(modules: Collection[str]) -> str:
    """The family whose original code has saved these modules; "" if none has, or if they go by the
    names of Diffusers, or of a language model.
    """
    names = _denoiser_names(modules)
    counts = {f: _count(f, names, *_NAMESPACES) for f in families_of(names)}
    best = max(counts, key=lambda f: counts[f])
    if 2 * counts[best] < len(names) or not names:
        return ""
    plain = max(_count(f, names, "diffusers") for f in FAMILIES)
    return best if counts[best] > plain else ""


def spots(component: str, module: str, family: str) -> Iterator[Spot]:
    """Where a module in Diffusers' names may lie in a file of this family, by falling likelihood.

    `component` "" is for the denoiser.
    """
    known = FAMILIES[family]
    component = component or known.component
    for stem in STEMS:
        if component_of(stem.slot, family) == component:
            for name, found in _spelled(stem, component, module, family):
                yield Spot(stem.text + name, found)


def _spelled(stem: Stem, component: str, module: str, family: str) -> Iterator[tuple[str, Found]]:
    kind = kind_of(component, family)
    if not kind:
        for namespace in _NAMESPACES:
            names = denoiser(family, namespace)
            if found := names.find(module, "diffusers"):
                yield names.fill(found, namespace), found
        return
    names = open_clip() if stem.open_clip else encoder(kind)
    if found := names.find(module, "diffusers"):
        yield names.fill(found, "original"), found


def _denoiser_names(modules: Collection[str]) -> list[str]:
    beside = tuple(s.text for s in STEMS if s.slot != "denoiser")
    modules = [m for m in modules if not m.startswith(beside)]
    stems = [s.text for s in STEMS if s.slot == "denoiser"]
    stem = next((s for s in stems if any(m.startswith(s) for m in modules)), "")
    return [m.removeprefix(stem) for m in modules if m.startswith(stem)][:KNOWN]


def _count(family: str, modules: Collection[str], *namespaces: str) -> int:
    known = [(denoiser(family, n), n) for n in namespaces]
    return sum(any(names.find(m, n) for names, n in known) for m in modules)
