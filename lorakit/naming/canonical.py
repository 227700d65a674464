"""One spelling for every tensor and module, whichever class, release or checkpoint spelled it.

Law: the canonical name of a canonical name is itself, and the name of a parameter in a model of
transformers v4 or v5 and the name of the tensor on disk that it is loaded from, where that is one
tensor, have the same canonical spelling. Layout is not the matter here: parts of a fused weight
keep names of their own (lorakit.naming.places).

In this spelling the text model has no prefix (`layers.0.self_attn.q_proj.weight`, `lm_head.weight`)
and towers keep theirs (`vision_tower.`, `visual.`); one expert is `experts.3.gate_proj.weight`,
stacked ones are `experts.gate_up_proj`.
"""

import re
from collections.abc import Callable
from functools import cache

from lorakit.naming.families import GENERIC, REFUSED, REFUSED_PARTS, RULES, WRAPPERS

Substitution = tuple[Callable[[str, str, int], str], str, str]  # sub, replacement, a needle

_front = re.compile(WRAPPERS)


def canonical(name: str, model_type: str = "") -> str:
    """The one spelling of a tensor name or module path, by the type of the model it belongs to."""
    name = _front.sub("", name)
    for sub, replacement, needle in _rules(model_type):
        if needle in name:
            name = sub(replacement, name, 1)
    return name


def refused(model_type: str, name: str, *, parts: bool = False) -> str:
    """Why lorakit cannot place a module of this canonical name by name alone, or "".

    With `parts`, why it cannot take a fused weight of this family apart or put one together. It
    matters only for modules that are not on disk under their own name: an adapter in the names of
    the disk is right whatever transformers does to the weights.
    """
    pattern, reason = (REFUSED_PARTS if parts else REFUSED).get(model_type, (None, ""))
    return reason if pattern is not None and re.match(pattern, name) else ""


@cache
def _rules(model_type: str) -> tuple[Substitution, ...]:
    """The rules for a model type, compiled: first those for everyone, then its own."""
    own = (rules for types, rules in RULES.items() if model_type in types.split())
    return tuple(_compiled(rule) for rules in (GENERIC, *own) for rule in rules.split())


def _compiled(rule: str) -> Substitution:
    old, _, new = rule.partition(">")
    start = "^" if old.startswith("^") else r"(?<![^.])"
    old = old.removeprefix("^")
    pattern = re.escape(old).replace(r"\#", r"(\d+)")
    end = r"(?![^.])" if new else r"\."
    already = f"(?!{re.escape(new[len(old) :])})" if new.startswith(f"{old}.") else ""
    needle = max(old.split("#"), key=len)
    return re.compile(start + pattern + end + already).sub, new.replace("#", r"\1"), needle
