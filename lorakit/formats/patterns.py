"""Patterns over module names from files that strangers wrote: the same dialect as `re`, with a time
limit.
"""

from collections.abc import Mapping
from functools import cache
from math import prod
from re import findall, fullmatch
from typing import Any

from lorakit.errors import InputError

SECONDS = 1.0  # for one match; honest patterns take microseconds
MAX_PATTERN = 1024  # characters
MAX_REPEATS = 10_000  # the product of all counts in braces


def matches(pattern: str, module: str) -> bool:
    """Whether a rank or alpha pattern of PEFT applies to a module.

    Source: huggingface/peft v0.21.2, src/peft/utils/other.py, get_pattern_key.

    Raises:
        InputError: the pattern is no regular expression, or takes too long.
    """
    before = len(module) - len(pattern)
    if _is_plain(pattern) and (before < 0 or (before and module[before - 1] != ".")):
        return False  # a plain name is as long as what it matches; there may be one a module
    return bool(_run("match", (rf"(.*\.)?({pattern})$", pattern), module))


def search(pattern: str, text: str) -> bool:
    """Whether a regular expression is found in a text."""
    return bool(_run("search", (pattern, pattern), text))


def substitute(pattern: str, replacement: str, text: str) -> str:
    """The text with the matches of a regular expression replaced."""
    return str(_run("sub", (pattern, pattern), replacement, text))


def lookup(patterns: Mapping[str, Any], module: str) -> list[tuple[str, Any]]:
    """The entries whose pattern applies to a module, in the order of the file; PEFT takes the
    first.
    """
    return [(p, v) for p, v in patterns.items() if matches(p, module)]


def means(wanted: Any, module: str) -> bool:
    """Whether a pattern, or a list (or frozen set) of names or of their ends, means a module.

    Source: huggingface/peft v0.21.2, src/peft/tuners/tuners_utils.py, check_target_module_exists.
    """
    if isinstance(wanted, str):
        return wanted == "all-linear" or search(rf"^(?:{wanted})$", module)
    names = wanted if isinstance(wanted, list | frozenset) else ()
    parts = module.split(".")
    return any(".".join(parts[i:]) in names for i in range(len(parts)))


@cache
def _is_plain(pattern: str) -> bool:
    return bool(fullmatch(r"[\w.]+", pattern))


def _run(function: str, pattern: tuple[str, str], *arguments: str) -> Any:
    """What a method of a pattern returns; `pattern` is it as compiled and as the user knows it."""
    import regex

    compiled = _compiled(*pattern)
    try:
        return getattr(compiled, function)(*arguments, timeout=SECONDS)
    except TimeoutError:
        raise InputError(
            f"the pattern {pattern[1]!r} takes too long on {arguments[-1]!r}."
        ) from None
    except (regex.error, IndexError) as e:
        raise InputError(f"{arguments[0]!r} cannot replace {pattern[1]!r}: {e}.") from None


@cache
def _compiled(pattern: str, shown: str) -> Any:
    import regex

    if len(shown) > MAX_PATTERN:
        raise InputError(f"a pattern of {len(shown):,} characters is refused: {shown[:60]!r} …")
    counts = [int(n) for b in findall(r"\{([^{}]*)\}", shown) for n in findall(r"\d+", b)]
    if prod(max(n, 1) for n in counts) > MAX_REPEATS:  # they are written out when compiled
        raise InputError(f"the pattern {shown!r} repeats too much.")
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError) as e:
        raise InputError(f"the pattern {shown!r} is no regular expression: {e}.") from None
