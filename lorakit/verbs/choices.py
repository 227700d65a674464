"""Options that are one of a few words, and the check of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.errors import UsageError

# How an adapter of fused experts is read; the first of each is the default.
READING = {
    "expert_packing": ("peft", "unsloth"),
    "expert_orientation": ("auto", "in-out", "out-in"),
}


def check_choices(options: Mapping[str, Any], choices: Mapping[str, Sequence[str]]) -> None:
    """Refuse a word that is none of its choices.

    Raises:
        UsageError: naming the option.
    """
    for name, known in choices.items():
        if options.get(name, known[0]) not in known:
            raise UsageError(f"{name} {options[name]!r} is none of {', '.join(known)}.")
