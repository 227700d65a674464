"""A hub id `org/name[@revision][/subfolder]`, and which files of a repository it asks for.

Law: weights are asked for once: not also in another dtype or layout, not those of training
checkpoints beside the result, and from pickles only on request.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os.path import isdir

from lorakit.errors import InputError

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
WEIGHTS = (".safetensors", ".gguf", ".npz", *PICKLES)
_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>refs/[^/@]+/[^/@]+|[^/@]+))?(?:/(?P<inside>.*))?",
    re.ASCII,
)
# What a trainer leaves beside its result: to be asked for by subfolder, or never weights.
TRAINING = ("checkpoint-*/*", "global_step*/*")
_STATE = re.compile(
    r"(.*/)?(training_args|optimizer|scheduler|scaler|rng_state|random_states)(_\d+)?\.\w+"
)
# The same weights again: diffusers' variants, and Mistral's own layout beside that of transformers.
_VARIANT = re.compile(r"\.(fp16|bf16|fp32|ema|non_ema)(?=[.-])")
_MISTRAL = re.compile(r"(?:^|(?<=/))consolidated(?=\.safetensors)")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")


@dataclass(frozen=True)
class HubId:
    """A reference taken apart; `inside` is the subfolder or file in the repository, or ""."""

    reference: str
    repo: str
    revision: str | None
    inside: str

    @property
    def folder(self) -> str:
        """The folder that is meant, with a slash at its end; "" for the root."""
        is_file = self.inside.endswith((*WEIGHTS, ".json"))
        folder = self.inside.rpartition("/")[0] if is_file else self.inside
        return f"{folder}/" if folder else ""

    @property
    def weight_file(self) -> str:
        """The name of the weight file that is meant; "" if none is named."""
        return self.inside.rpartition("/")[2] if self.inside.endswith(WEIGHTS) else ""


def parse_hub_id(reference: str) -> HubId | None:
    """The hub id that a reference is, or None where it can only have meant a path."""
    found = _HUB_ID.fullmatch(reference)
    if not found or "--" in found["repo"] or ".." in found["repo"]:
        return None
    inside = (found["inside"] or "").rstrip("/")
    parts = inside.split("/") if inside else []
    if any(p in ("", ".", "..") or "\\" in p for p in parts):
        return None
    # `org/name/file.safetensors` may be a file on the hub; `loras/file.safetensors` is not.
    here = not parts or isdir(reference.partition("/")[0])
    if reference.endswith(WEIGHTS) and here and not found["revision"]:
        return None
    return HubId(reference, found["repo"], found["revision"], inside)


def choose_weights(
    wanted: HubId, names: Sequence[str], patterns: Sequence[str], *, allow_pickle: bool
) -> list[str]:
    """The weight files to fetch: the one that is named, else what matches, else `*.bin`.

    `names` are all files of the repository.

    Raises:
        InputError: there are none, or only pickles and these are not allowed.
    """
    if wanted.weight_file:
        found = [wanted.inside]
    else:
        found = _matching(wanted, names, patterns) or _matching(wanted, names, ["*.bin"])
    pickles = [n for n in found if n.endswith(PICKLES)]
    if pickles and not allow_pickle:
        raise InputError(
            f"has its weights only in pickles ({pickles[0]}), which can run code.",
            hint="--allow-pickle reads them with torch's weights-only loader, which runs none.",
            file=wanted.reference,
        )
    if not found:
        others = [n for n in names if n.endswith(WEIGHTS) and not _STATE.fullmatch(n)]
        hint = f"Name one: {', '.join(f'{wanted.repo}/{n}' for n in others[:3])}." if others else ""
        said = f"has no weights ({', '.join(patterns)})."
        raise InputError(said, hint=hint, file=wanted.reference)
    return found


def _matching(wanted: HubId, names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The weight files in the folder that is meant which match, each set of weights once."""
    start = len(wanted.folder)
    left_out = () if wanted.inside else TRAINING
    found = [
        n
        for n in names
        if n.startswith(wanted.folder)
        and any(fnmatchcase(n[start:], p) for p in patterns)
        and not any(fnmatchcase(n, p) for p in left_out)
        and not _STATE.fullmatch(n)
    ]
    stems = {_SHARD.sub("", n) for n in found}
    return [n for n in found if not _is_double(_SHARD.sub("", n), stems)]


def _is_double(stem: str, stems: Collection[str]) -> bool:
    plain = _MISTRAL.sub("model", _VARIANT.sub("", stem))
    return plain != stem and plain in stems
