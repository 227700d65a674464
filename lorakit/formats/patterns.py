"""Patterns over module names from files that strangers wrote: the same dialect as `re`, with a time
limit.
"""

from collections.abc import Mapping
from typing import Any

from lorakit.errors import InputError

SECONDS = 1.0  # for one match; honest patterns take microseconds
MAX_PATTERN = 1024  # characters


def matches(pattern: str, module: str) -> bool:
    """Whether a rank or alpha pattern of PEFT applies to a module.

    Source: huggingface/peft v0.21.2, src/peft/utils/other.py, get_pattern_key.

    Raises:
        InputError: the pattern is no regular expression, or takes too long.
    """
    return bool(_run("match", rf"(.*\.)?({pattern})$", module, pattern))


def search(pattern: str, text: str) -> bool:
    """Whether a regular expression is found in a text."""
    return bool(_run("search", pattern, text, pattern))


def substitute(pattern: str, replacement: str, text: str) -> str:
    """The text with the matches of a regular expression replaced."""
    return str(_run("sub", pattern, replacement, pattern, text))


def lookup(patterns: Mapping[str, Any], module: str) -> list[tuple[str, Any]]:
    """The entries whose pattern applies to a module, in the order of the file; PEFT takes the
    first.
    """
    return [(p, v) for p, v in patterns.items() if matches(p, module)]


def _run(function: str, compiled: str, argument: str, shown: str, *more: str) -> Any:
    import regex

    if len(shown) > MAX_PATTERN:
        raise InputError(f"a pattern of {len(shown):,} characters is refused: {shown[:60]!r} …")
    try:
        return getattr(regex, function)(compiled, argument, *more, timeout=SECONDS)
    except TimeoutError:
        raise InputError(f"the pattern {shown!r} takes too long on {argument!r}.") from None
    except regex.error as e:
        raise InputError(f"the pattern {shown!r} is no regular expression: {e}.") from None
