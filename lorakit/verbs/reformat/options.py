"""What a conversion of a LoRA file to another format is asked for."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorakit.adapter.files.named import Naming
from lorakit.errors import UsageError
from lorakit.formats.families import FAMILIES
from lorakit.formats.recognise import LANGUAGE
from lorakit.naming.resolve import renamed
from lorakit.store.json_file import read_json
from lorakit.verbs.choices import listed
from lorakit.verbs.reformat.formats import FORMATS

CLIP_PREFIXES = ("text_model", "flat")


@dataclass(frozen=True)
class ReformatOptions:
    """How the file is read, and what is made of it.

    to: a key of `lorakit.verbs.reformat.formats.FORMATS`. family: one of
    `lorakit.formats.families.FAMILIES`, where the names are those of several. alpha: "keep" carries
    scalings where the format has a place for them; "fold" multiplies them into the factors. drop: a
    pattern of modules and tensors that are left out. keep_unknown: take tensors along that belong
    to no module.

    base: a folder, for GGUF and torchtune that of its config.json; its weights, or a file of them,
    have the names of modules that no family knows. key_map: `REGEX=REPLACEMENT`, for modules of the
    file before they are looked up; key_map_file: a JSON object of whole names, which come first.
    clip_prefix: "text_model", or "flat" for CLIP as transformers 5 names it. fix_split_qkv_alpha:
    multiply alphas of fused projections that were trained in parts. lora_alpha: that of the
    training, for torchtune, which does not store it.
    """

    to: str = "peft"
    family: str = ""
    alpha: str = "keep"
    drop: str = ""
    keep_unknown: bool = False
    base: str | Path = ""
    allow_pickle: bool = False
    lora_alpha: float | None = None
    key_map: Sequence[str] = ()
    key_map_file: str | Path = ""
    clip_prefix: str = "text_model"
    fix_split_qkv_alpha: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "key_map", listed(self.key_map))
        object.__setattr__(self, "base", str(self.base))

    def check(self) -> None:
        """Refuse what is no choice.

        Raises:
            UsageError: saying which.
        """
        to, alpha = self.to, self.alpha
        if to not in FORMATS or alpha not in ("keep", "fold"):
            raise UsageError(f"convert to {to!r} with alpha {alpha!r}: there is no such choice.")
        if self.family and self.family not in (*FAMILIES, LANGUAGE):
            raise UsageError(
                f"family {self.family!r} is none of {', '.join((*FAMILIES, LANGUAGE))}."
            )
        if self.clip_prefix not in CLIP_PREFIXES:
            raise UsageError(f"{self.clip_prefix!r} is none of {', '.join(CLIP_PREFIXES)}.")

    @property
    def naming(self) -> Naming:
        """What is said of names.

        Raises:
            InputError: the JSON file is not there, or none.
            UsageError: it has other things than names.
        """
        rename = partial(renamed, key_map=self.key_map) if self.key_map else None
        return Naming(self.base, _table(self.key_map_file), rename)

    @property
    def inputs(self) -> list[Path]:
        """The files that are read beside the adapter's; of a base those with facts and names."""
        given = [Path(p) for p in (self.base, self.key_map_file) if str(p)]
        files = [p for g in given for p in (g / "config.json", *g.glob("*.safetensors*"))]
        return [p for p in (*given, *files) if p.is_file()]

    @property
    def respells(self) -> bool:
        """Whether a file in the format asked for can be another than it is."""
        asked = (self.drop, self.alpha == "fold", self.key_map, str(self.key_map_file))
        return any(asked) or self.clip_prefix != "text_model" or self.fix_split_qkv_alpha

    def to_dict(self) -> dict[str, Any]:
        """The options as plain data."""
        paths = {"base": str(self.base), "key_map_file": str(self.key_map_file)}
        return {**asdict(self), **paths, "key_map": list(self.key_map)}


def _table(path: str | Path) -> dict[str, str]:
    if not str(path):
        return {}
    table = read_json(Path(path))
    if strange := [k for k, v in table.items() if not (isinstance(v, str) and v)]:
        raise UsageError(f"{Path(path).name} has no name for {strange[0]!r}.")
    return {str(k): str(v) for k, v in table.items()}
