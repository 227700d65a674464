"""`lorakit.json`: what an output is made of. The same run gives the same bytes, so there is no date
in it.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorakit.errors import InputError
from lorakit.folder.companions import CONFIG
from lorakit.store.json_file import read_json

NAME = "lorakit.json"


def format_manifest(content: Mapping[str, Any]) -> bytes:
    """The manifest's bytes: ASCII, because a path in it need not be valid UTF-8."""
    return json.dumps(content, indent=1).encode() + b"\n"


def manifest_path(output: Path) -> Path:
    """Where the manifest of an output lies: in a folder, or beside a lone file."""
    return output / NAME if output.is_dir() else output.with_name(f"{output.stem}.{NAME}")


def read_manifest(output: Path) -> dict[str, Any]:
    """The manifest of an output.

    Raises:
        InputError: there is none, or it is not lorakit's.
    """
    path = manifest_path(output)
    if not path.exists():
        raise _absent(output, path)
    manifest = read_json(path, ascii_only=True)  # as it was written
    tables = [manifest.get(name) for name in ("files", "tensors")]
    sound = all(isinstance(t, dict) and _are_objects(t.values()) for t in tables)
    if not (sound and {"plan", "inputs"} <= manifest.keys()):
        raise InputError("is not a manifest of lorakit.", file=path)
    return manifest


def _are_objects(values: Iterable[Any]) -> bool:
    return all(isinstance(v, dict) for v in values)


def _absent(output: Path, path: Path) -> InputError:
    """Why there is no manifest: adapters have none, a pair has one in its base."""
    if (output / CONFIG).exists():
        why, hint = "adapters have none.", "`lorakit compare` holds two against each other."
    elif (output / "base" / NAME).exists():
        why, hint = "its base has one.", f"`lorakit verify {output / 'base'}`."
    elif (output.parent / NAME).exists() and not output.is_dir():
        why, hint = "it lies in a result.", f"`lorakit verify {output.parent}`."
    else:
        why = "no merge, unmerge or loftq of lorakit wrote it, or the file was lost."
        hint = "Name the output of `lorakit merge`."
    return InputError(f"has no {path.name}: {why}", hint=hint, file=output)
