"""Options that are one of a few words, and the check of them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lorakit.errors import UsageError

# How an adapter of fused experts is read; the first of each is the default.
READING = {
    "expert_packing": ("peft", "unsloth"),
    "expert_orientation": ("auto", "in-out", "out-in"),
}


def listed(value: str | Iterable[str]) -> list[str]:
    """Texts, or the one that stands alone."""
    return [value] if isinstance(value, str) else [*value]


def plain(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with numbers of NumPy as Python's, which a config and a journal can hold."""
    return {n: v.item() if _is_number(v) else v for n, v in options.items()}


def _is_number(value: Any) -> bool:
    """Whether something is a scalar of NumPy or torch, told without importing either."""
    return getattr(value, "shape", None) == () and hasattr(value, "item")


def check_choices(options: Mapping[str, Any], choices: Mapping[str, Sequence[str]]) -> None:
    """Refuse a word that is none of its choices.

    Raises:
        UsageError: naming the option.
    """
    for name, known in choices.items():
        if options.get(name, known[0]) not in known:
            raise UsageError(f"{name} {options[name]!r} is none of {', '.join(known)}.")
