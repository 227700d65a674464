"""A LoRA file of any format to another, planned from its headers."""

from pathlib import Path
from typing import Any

from lorakit.adapter.delta import Opened
from lorakit.adapter.files.gguf import read_gguf
from lorakit.adapter.files.reading import open_file, weights_of
from lorakit.errors import MisfitError, UsageError
from lorakit.formats.families import FAMILIES
from lorakit.formats.patterns import search
from lorakit.formats.recognise import LANGUAGE
from lorakit.formats.spelling import SPELLINGS
from lorakit.store.checkpoint import read_json
from lorakit.verbs.reformatting import Reformatting

FORMATS = (*SPELLINGS, "mlx", "gguf")
OF_LANGUAGE = ("peft", "mlx", "gguf")


def plan_reformat(
    path: str | Path,
    *,
    to: str = "peft",
    family: str = "",
    alpha: str = "keep",
    drop: str = "",
    keep_unknown: bool = False,
    base: str | Path = "",
    allow_pickle: bool = False,
) -> Reformatting:
    """The conversion of a LoRA file of any format to `to`, one of `FORMATS`.

    family: a key of `lorakit.formats.families.FAMILIES`, where the names are those of several.
    alpha: "keep" carries scalings where the format has a place for them; "fold" multiplies them
    into the factors. drop: a pattern of modules and tensors that are left out. keep_unknown: take
    tensors along that belong to no module. base: the folder of the base, whose config.json GGUF
    needs.

    Raises:
        UsageError: an option is none of its choices.
        InputError: the file is corrupt, or no adapter.
        MisfitError: tensors of the file belong to no module that is known.
    """
    if to not in FORMATS or alpha not in ("keep", "fold"):
        raise UsageError(f"convert to {to!r} with alpha {alpha!r}: there is no such choice.")
    if family and family not in (*FAMILIES, LANGUAGE):
        raise UsageError(f"family {family!r} is none of {', '.join((*FAMILIES, LANGUAGE))}.")
    place, config = weights_of(Path(path)), config_of(base)
    opened = opened_file(path, family=family, base=base, allow_pickle=allow_pickle)
    _check_known(opened, to, place)
    unknown = [n for n in opened.extras if not (drop and search(drop, n))]
    if unknown and not keep_unknown:
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        raise MisfitError(
            f"{len(unknown)} tensors belong to no module that is known: "
            f"{', '.join(map(repr, unknown[:3]))}{more}.",
            hint="Leave them out with --drop REGEX, or take them along with --keep-unknown.",
            file=place,
            tensor=unknown[0],
        )
    dropped = [n for n in opened.extras if n not in unknown]
    dropped += [d.module for d in opened.deltas if drop and search(drop, d.module)]
    carried = unknown if keep_unknown else []
    return Reformatting(place, opened, to, alpha == "fold", drop, dropped, carried, config)


def opened_file(
    path: str | Path, *, family: str = "", base: str | Path = "", allow_pickle: bool = False
) -> Opened:
    """An adapter of any format, from its headers; in GGUF, in the names of its base.

    Raises:
        InputError, MisfitError: as `lorakit.adapter.files.reading.open_file`.
    """
    place = weights_of(Path(path))
    if place.suffix == ".gguf":
        return read_gguf(place, config_of(base))
    return open_file(path, family=family, allow_pickle=allow_pickle)


def config_of(base: str | Path) -> dict[str, Any]:
    """The config.json of a base, a folder or that file; empty where none is named.

    Raises:
        InputError: it is not there, or no JSON object.
    """
    if not str(base):
        return {}
    path = Path(base) / "config.json" if Path(base).is_dir() else Path(base)
    return read_json(path)


def _check_known(opened: Opened, to: str, place: Path) -> None:
    if not opened.deltas:
        name = next(iter(opened.extras))
        raise MisfitError(
            f"has {len(opened.extras)} tensors in names of no family that is known, such as "
            f"{name!r}.",
            hint=f"Known are {', '.join(FAMILIES)} and language models in their own names.",
            file=place,
            tensor=name,
        )
    if opened.family != LANGUAGE and to in ("mlx", "gguf"):
        raise MisfitError(
            f"is an adapter of {FAMILIES[opened.family].title}, and {to} is for language models.",
            hint="Write peft, diffusers, kohya or comfyui.",
            file=place,
        )
    if opened.family == LANGUAGE and to not in OF_LANGUAGE:
        raise MisfitError(
            f"is an adapter of a language model, which {to} has no names for.",
            hint="Pass --family if it is of another.",
            file=place,
        )
