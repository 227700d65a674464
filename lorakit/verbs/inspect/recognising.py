"""What a LoRA file without PEFT's config is, from its headers: format, family, modules, ranks."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from lorakit.formats.families import FAMILIES
from lorakit.formats.grouping import Group, extents, format_of, grouped
from lorakit.formats.mlx import ENDINGS, in_mlx_names
from lorakit.formats.recognise import LANGUAGE, doubt, recognise
from lorakit.tensors import TensorInfo

NORMS = f".{ENDINGS['magnitude']}"


def facts_of(
    infos: Mapping[str, TensorInfo], file: object = ""
) -> tuple[dict[str, Any], list[str]]:
    """Facts by name, and what may surprise; no facts where most of it adapts no module.

    Raises:
        MisfitError: a module lacks one of its factors, or has tensors of two algorithms.
    """
    groups, extras = grouped(infos.values(), file)
    mlx = in_mlx_names(infos)  # whose factors are transposed
    for name in [n for n in extras if mlx and n.removesuffix(NORMS) in groups]:
        groups[name.removesuffix(NORMS)].tensors["magnitude"] = extras.pop(name)
    algos = Counter(g.algo + " with DoRA" * ("magnitude" in g.tensors) for g in groups.values())
    if not groups or 2 * sum(len(g.tensors) for g in groups.values() if g.algos) < len(infos):
        return {}, []
    known = recognise(list(groups), extents(groups))
    ranks = Counter(_rank(g, mlx=mlx) for g in groups.values() if "a" in g.tensors)
    family = FAMILIES.get(known.family)
    components = Counter(p.component for p in known.places.values())
    form = "mlx" if mlx else format_of(infos, groups, known, peft=False)
    facts: dict[str, Any] = {
        "format": form,
        "family": family.title if family else "a language model",
        "names": form if form == "torchtune" else known.namespace if known.places else "unknown",
        "modules": len(groups),
        "kinds": dict(algos.most_common()),
        "parameters": sum(i.numel for i in infos.values()),
    }
    if not known.places:
        facts["family"] = "none that is known"
    if ranks:
        facts["rank"] = {str(r): n for r, n in ranks.most_common()}
    if known.family != LANGUAGE and known.places:
        facts["parts"] = dict(components.most_common())
    notes = []
    if left := [*known.unknown, *extras]:
        notes.append(f"{len(left)} names belong to no known module, such as {left[0]!r}.")
    notes += [text[0].upper() + text[1:] for text in doubt(known.family, known.others)]
    return facts, notes


def _rank(group: Group, *, mlx: bool) -> int:
    """The rank of a module; MLX has A turned, but for the experts of a stack."""
    if not mlx:
        return next(iter(group.tensors["a"].shape), 0)
    b = group.tensors["b"].shape
    return b[0] if len(b) == 2 else b[-1]
