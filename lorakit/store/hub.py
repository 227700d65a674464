"""Where an input is: a path here, or a hub id `org/name[@revision][/subfolder]` in the hub's cache.

Law: a path that exists wins. A hub id is pinned to one commit before a weight of it is fetched, so
a push in between cannot mix two models; what the cache has is not fetched again, and with
HF_HUB_OFFLINE=1 nothing is. What is returned exists.

The layout of the cache (snapshots/COMMIT, blobs/ETAG, trees/COMMIT.json) is that of huggingface_hub
1.22 and later. Importing it costs a second, so only a function that fetches does.
"""

import difflib
import glob
import json
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import HubError, InputError
from lorakit.store.hub_id import TRAINING, WEIGHTS, HubId, choose_weights, parse_hub_id

# Of the repository as a whole: these come along with a subfolder too.
LINEAGE = ("README.md", "LICENSE*", "NOTICE*")
COMPANIONS = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.yaml", "*.yml", "*.py")
WEIGHTS_AND_COMPANIONS = ("*.safetensors", *COMPANIONS, *LINEAGE)

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Located:
    """Where an input is; `repo` and `revision` (a commit) are None for a path of the user's."""

    path: Path
    repo: str | None = None
    revision: str | None = None

    def to_dict(self) -> dict[str, str | None]:
        """Plain data; of the hub only where it is from there."""
        hub = {"repo": self.repo, "revision": self.revision} if self.repo else {}
        return {"path": str(self.path.absolute()), **hub}


def locate(
    reference: str,
    patterns: Sequence[str] = WEIGHTS_AND_COMPANIONS,
    *,
    allow_pickle: bool = False,
) -> Located:
    """The path of an input, fetched from the hub where it is a hub id.

    `patterns` say which files of a repository are wanted (`*` crosses folders). Where they ask for
    weights and there are none, `allow_pickle` fetches its `*.bin` instead.

    Raises:
        InputError: there is no such path, or the repository has no weights that may be read.
        HubError: the hub does not give it, or the cache does not have it.
        ResourceError: the disk of the cache is full.
    """
    path = Path(os.path.expanduser(reference))
    if reference and os.path.exists(path):
        return Located(path)
    wanted = parse_hub_id(reference)
    if wanted is None:
        raise _missing(path, reference)
    weights = [p for p in patterns if p.endswith(WEIGHTS)]
    small = [glob.escape(wanted.folder) + p for p in patterns if p not in weights]
    snapshot = _fetch(wanted, wanted.revision, [*small, *LINEAGE])
    names = _listing(snapshot)
    if wanted.inside and wanted.inside not in _folders(names):
        raise _absent(wanted, names)
    if weights:
        chosen = choose_weights(wanted, names, weights, allow_pickle=allow_pickle)
        _fetch(wanted, snapshot.name, [glob.escape(n) for n in chosen])
    if not os.path.exists(snapshot / wanted.inside):
        raise _absent(wanted, names)
    return Located(snapshot / wanted.inside, wanted.repo, snapshot.name)


def _missing(path: Path, reference: str) -> InputError:
    """Why a path is not there, or is not to be seen."""
    try:
        os.stat(path)
    except PermissionError as error:
        return InputError(f"cannot be read: {error.strerror}.", file=reference)
    except (OSError, ValueError):
        pass
    return InputError("no such file or folder.", hint=near(path), file=reference or "''")


def expected_sha256(path: Path) -> str | None:
    """The sha256 that the hub promised for a file in its cache; None if none is known here.

    huggingface_hub does not hash what it gets over plain HTTP, so this is worth comparing.
    """
    path = path.absolute()
    for folder in path.parents:
        if folder.parent.name == "snapshots":
            entry = _tree(folder).get(path.relative_to(folder).as_posix())
            promised = entry.get("lfs_sha256") if isinstance(entry, dict) else None
            if isinstance(promised, str) and _SHA256.fullmatch(promised):
                return promised
    # One link, not all: a blob may be a link itself, into a store that names files by other hashes.
    blob = Path(os.readlink(path)) if path.is_symlink() else path
    return blob.name if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name) else None


def check_promise(path: Path, sha256: Callable[[], str]) -> None:
    """Refuse a file in the hub's cache that has another sha256 than the hub promised, if it did.

    Raises:
        InputError: naming the file.
    """
    promised = expected_sha256(path)
    if promised is not None and promised != sha256():
        raise InputError(
            "is not what the hub has: its sha256 differs from the one the hub recorded.",
            hint="Remove it from the cache and fetch it again.",
            file=path,
        )


def near(path: Path) -> str:
    """Names like the first missing one on the way to a path, as a hint; "" if there are none."""
    missing = path
    while missing != missing.parent and not os.path.exists(missing.parent):
        missing = missing.parent
    try:
        return _similar(missing.name, os.listdir(missing.parent))
    except OSError:
        return ""


def _similar(name: str, names: Collection[str]) -> str:
    close = difflib.get_close_matches(name, names, n=3)
    return f"Close to it: {', '.join(map(repr, close))}." if close else ""


def _fetch(wanted: HubId, revision: str | None, patterns: Sequence[str]) -> Path:
    """The snapshot folder of a commit, with the files that match in it."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    from lorakit.store.hub_errors import explained

    # The base of all that httpx raises (or httpx2: it depends on the release).
    network: Any = HfHubHTTPError.__mro__[1]
    try:
        folder = snapshot_download(
            wanted.repo,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=None if wanted.inside else list(TRAINING),
            local_files_only=constants.HF_HUB_OFFLINE,
            tqdm_class=_bars(),
        )
    except (network, EntryNotFoundError, OSError, RuntimeError, ValueError) as e:
        raise explained(e, wanted) from e
    return Path(folder)


def _bars() -> Any:
    """The class of progress bars: none but on a terminal, where huggingface_hub would draw some."""
    if sys.stderr is not None and sys.stderr.isatty():
        return None
    from huggingface_hub import utils

    untyped: Any = utils
    bar = untyped.tqdm

    def hide(self: Any, *args: Any, **kwargs: Any) -> None:
        bar.__init__(self, *args, **{**kwargs, "disable": True})

    return type("Hidden", (bar,), {"__init__": hide})


def _tree(snapshot: Path) -> dict[str, Any]:
    """What the hub said of every file of a commit, by path; empty where that was not kept."""
    try:
        kept = (snapshot.parent.parent / "trees" / f"{snapshot.name}.json").read_bytes()
        files = json.loads(kept)["files"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    return files if isinstance(files, dict) else {}


def _listing(snapshot: Path) -> list[str]:
    """The files of a commit; those that are here, where an older release left no listing."""
    here = (p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if p.is_file())
    return list(_tree(snapshot)) or sorted(here)


def _folders(names: Sequence[str]) -> set[str]:
    """The names, and all folders on the way to them."""
    return {*names, *(n[:i] for n in names for i, c in enumerate(n) if c == "/")}


def _absent(wanted: HubId, names: Sequence[str]) -> HubError:
    what = repr(wanted.inside) if wanted.inside else "file of the kind that is asked for"
    return HubError(f"{wanted.repo} has no {what}.", hint=_similar(wanted.inside, _folders(names)))
