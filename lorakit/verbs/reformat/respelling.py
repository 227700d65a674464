"""Whether a LoRA file is, name by name, as its format has it; and what to say of one that is made.

A file may be of a format by most of its names, and have others that whoever reads it passes over.
"""

from collections.abc import Iterable, Mapping, Sequence

from lorakit.adapter.delta import Delta, Opened, Values
from lorakit.adapter.files.saving import is_scaled
from lorakit.adapter.files.spelling import Tensors
from lorakit.formats.families import FAMILIES
from lorakit.formats.mlx import in_both
from lorakit.formats.recognise import LANGUAGE, doubt
from lorakit.formats.roles import parse_key
from lorakit.verbs.reformat.formats import FORMATS
from lorakit.verbs.reformat.options import ReformatOptions

Shapes = Mapping[str, tuple[int, ...]]
# Endings of factors that Diffusers, which reads several, has not beside its own names.
KOHYA = (".lora_down.weight", ".lora_up.weight", ".lora_a", ".lora_b", ".lora_a.weight")
PRODUCTS = ("loha", "lokr")  # whose alphas kohya's files have too
KOHYA_READERS = ("kohya", "comfyui")


def shapes_of(deltas: Iterable[Delta]) -> dict[str, tuple[int, ...]]:
    """The tensors of a file that these modules were read from, none of them cut or joined."""
    tensors = [v for d in deltas for v in (*d.tensors.values(), d.alpha) if isinstance(v, Values)]
    return {v.product[0].key if v.product else v.key: v.shape for v in tensors}


def unlike(given: Shapes, made: Sequence[Tensors], to: str) -> str:
    """The first tensor of a file that the format has under another name, in another shape or not at
    all, or that is missing; "" if all are as it has them. An alpha of no effect may be missing.
    """
    wanted = {_means(n, to): v.shape for t in made for n, v in t.values.items()}
    idle = {_means(n, to) for t in made if not is_scaled(t) for n in t.values if _is_alpha(n)}
    for name, shape in given.items():
        if wanted.pop(_means(name, to), None) != shape:
            return name
    return next((name for name in wanted if name not in idle), "")


def _is_alpha(name: str) -> bool:
    return name.endswith(".alpha")


def _means(name: str, to: str) -> str:
    """A name as the readers of a format take it: several endings mean a factor, and both spellings
    of CLIP one module.
    """
    if to == "diffusers":
        name = name.replace(".text_model.", ".")
    key = parse_key(name)
    known = to in KOHYA_READERS or (to == "diffusers" and not name.endswith(KOHYA))
    return f"{key.module} {key.role}" if key and key.role in ("a", "b") and known else name


def unloaded(opened: Opened, deltas: Iterable[Delta]) -> list[str]:
    """Text encoders among the components, of which Diffusers loads no adapters."""
    known = FAMILIES.get(opened.family)
    there = dict.fromkeys(d.component for d in deltas)
    encoders = [e for c in there if known and (e := known.encoder(c))]
    return [e.component for e in encoders if not e.loaded]


def notes_of(opened: Opened, deltas: Sequence[Delta], wanted: ReformatOptions) -> list[str]:
    """What may surprise in the result."""
    notes = []
    products = wanted.to in KOHYA_READERS and any(d.algo in PRODUCTS for d in deltas)
    if wanted.alpha == "fold" and (products or FORMATS[wanted.to].one_scale):
        notes.append("scalings that the factors cannot take stay with them, whatever --alpha says.")
    if "mlx" in (opened.format, wanted.to) and opened.format != wanted.to:
        notes += [in_both(d.module) for d in deltas if d.embedding]
    if wanted.to == "diffusers" and opened.family != LANGUAGE:
        if wanted.alpha != "fold" and any(d.alpha is not None for d in deltas):
            notes.append(
                "scalings are in the metadata, which Diffusers reads and ComfyUI does not; --alpha "
                "fold puts them into the factors."
            )
        if left := unloaded(opened, deltas):
            notes.append(
                f"Diffusers loads no adapters of {' and '.join(left)}; a merge takes them."
            )
    return notes + doubt(opened.family, opened.others)
