"""The table of codecs. A new one is a file here, and a row below."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any

from lorakit.errors import UsageError
from lorakit.quant.blockwise import count
from lorakit.quant.codec import Codec, Packed
from lorakit.quant.fp4 import FP4
from lorakit.quant.int8 import Int8
from lorakit.quant.nf4 import NF4
from lorakit.quant.normal_float import NormalFloat
from lorakit.quant.uniform import Uniform


@dataclass(frozen=True)
class Row:
    """A codec with the settings it starts from, and what is known of it."""

    codec: Codec
    bits: tuple[int, ...]  # that it can have
    paper: str

    @property
    def packed(self) -> bool:
        """Whether its layout is loaded; otherwise only its values can be written."""
        return isinstance(self.codec, Packed)


CODECS: Mapping[str, Row] = {
    "nf4": Row(NF4, (4,), paper="arXiv 2305.14314"),
    "fp4": Row(FP4, (4,), paper="arXiv 2305.14314"),
    "int8": Row(Int8(), (8,), paper="arXiv 2208.07339"),
    "uniform": Row(Uniform(), (2, 3, 4, 8), paper="arXiv 2310.08659"),
    "normal-float": Row(NormalFloat(), (2, 3, 4, 8), paper="arXiv 2310.08659"),
}

# Settings by what they are called on the command line.
OPTIONS = {"block": "--block", "double": "--double-quant", "search": "--absmax search"}
_FIXED = {"name", "bits", "levels"}


def codec(name: str, *, bits: int | None = None, **settings: Any) -> Codec:
    """The codec of this name with these bits and settings.

    Settings are `block`, `double`, `search` and `symmetric`; one that is False or None is left as
    it is.

    Raises:
        UsageError: there is no such codec, or it has not such a setting.
    """
    if name not in CODECS:
        near = get_close_matches(name, CODECS, 1)
        hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(CODECS)}."
        raise UsageError(f"unknown quantisation {name!r}.", hint=hint)
    row = CODECS[name]
    if bits is not None and bits not in row.bits:
        known = " or ".join(map(str, row.bits))
        others = " or ".join(n for n, r in CODECS.items() if bits in r.bits)
        instead = f", or --quant {others}." if others else "."
        raise UsageError(f"{name} has {known} bits, not {bits}.", hint=f"Leave --bits out{instead}")
    wanted = {k: v for k, v in settings.items() if v is not None and v is not False}  # 0 is told
    found: Any = row.codec
    unknown = wanted.keys() - ({f.name for f in fields(found)} - _FIXED)
    if unknown:
        asked = " and ".join(OPTIONS.get(key, key) for key in sorted(unknown))
        raise UsageError(
            f"{name} has no setting {', '.join(sorted(unknown))}.",
            hint=f"Leave {asked} out, or take another --quant.",
        )
    if "block" in wanted:
        count(1, wanted["block"])
    configured: Codec = replace(found, **wanted, **({} if bits is None else {"bits": bits}))
    return configured
