"""A base checkpoint: one file, or a folder of shards with an index, seen as one `Source`.

The index is held against the shards: a missing shard, a tensor that is elsewhere than it says, or a
tensor that it does not name is an error. Weight files that belong to no index are left out and
named.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any, Protocol

from lorakit.errors import InputError
from lorakit.store.hub import Located, locate
from lorakit.store.hub_id import PICKLES
from lorakit.store.json_file import read_json
from lorakit.store.model_config import read_model_config
from lorakit.store.reading import reading
from lorakit.store.safetensors import SafetensorsFile
from lorakit.tensors import Source, TensorInfo

INDEX = ".index.json"
VARIANT = ".index.*.json"  # of shards that Diffusers has saved as a variant: .index.fp16.json
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.(safetensors|bin)")
WHOLE = ("model", "pytorch_model", "diffusion_pytorch_model")  # of a file that is all there is


class Part(Source, Protocol):
    """One weight file of a checkpoint."""

    @property
    def name(self) -> str:
        """The file's name, without folders."""
        ...


class Checkpoint:
    """Tensors in one or more weight files, and the folder around them.

    `folder` is None for a lone weight file, or tensors in memory; `index` is the one that its files
    were taken from, if any; `left_out` are weight files that it does not name.
    """

    def __init__(
        self,
        located: Located,
        parts: Sequence[Part],
        *,
        folder: Path | None = None,
        left_out: Sequence[str] = (),
        index: Path | None = None,
    ) -> None:
        self.located = located
        self.parts = tuple(parts)
        self.folder = folder
        self.left_out = tuple(left_out)
        self.index = index
        self._home = {name: part for part in self.parts for name in part.infos}
        if len(self._home) < sum(len(p.infos) for p in self.parts):
            _raise_twice(self.parts, located.path)

    def __fspath__(self) -> str:
        """Its path, so that an open one does where a path does."""
        return str(self.located.path)

    __str__ = __fspath__

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """What every tensor is, by name, shard by shard."""
        return {n: i for part in self.parts for n, i in part.infos.items()}

    @property
    def files(self) -> list[Path]:
        """The paths of the weight files."""
        folder = self.folder or self.located.path.parent
        return [folder / p.name for p in self.parts]

    @property
    def places(self) -> list[Path]:
        """The paths that it is read by: what was named, and its weight files."""
        return [self.located.path, *self.files]

    def with_parts(self, parts: Sequence[Part]) -> "Checkpoint":
        """The same with its weight files seen otherwise."""
        return Checkpoint(
            self.located, parts, folder=self.folder, left_out=self.left_out, index=self.index
        )

    def home(self, name: str) -> Part:
        """The weight file that holds a tensor."""
        return self._home[name]

    def read_rows(self, name: str, start: int, stop: int, into: Any, *, leading: int = 1) -> None:
        """Fill `into` with the bytes of rows `start` to `stop` of a tensor."""
        self._home[name].read_rows(name, start, stop, into, leading=leading)

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json` beside the weights; empty where there is none.

        Raises:
            InputError: as `read_model_config`.
        """
        path = self.folder / "config.json" if self.folder else None
        return read_model_config(path) if path and path.exists() else {}


def open_checkpoint(reference: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
    """The checkpoint at a path (weight file, index or folder) or hub id.

    Raises:
        InputError: it is not there, corrupt, or contradicts its index.
        HubError: the hub does not give it.
    """
    located = locate(str(reference), allow_pickle=allow_pickle)
    with reading(located.path):
        return _opened(located, allow_pickle=allow_pickle)


def _opened(located: Located, *, allow_pickle: bool) -> Checkpoint:
    path = located.path
    if path.is_dir():
        names, index = _weight_files(path)
        folder: Path | None = path
    elif path.name.endswith(INDEX):
        folder, index = path.parent, path
        names = _indexed_files(path)
    else:
        folder, index, names = None, None, [path.name]
    root = path if path.is_dir() else path.parent
    parts = [open_part(root / n, allow_pickle=allow_pickle) for n in names]
    if index:
        _check_index(index, parts)
    left_out = sorted(f.name for f in _weights_in(folder) if f.name not in names) if folder else []
    return Checkpoint(located, parts, folder=folder, left_out=left_out, index=index)


def open_part(path: Path, *, allow_pickle: bool = False) -> Part:
    """One weight file: safetensors, or with `allow_pickle` a `.bin` read by torch."""
    if path.suffix not in PICKLES:
        return SafetensorsFile(path)
    from lorakit.store.pickles import open_pickle

    return open_pickle(path, allow=allow_pickle)


def find_index(folder: Path) -> Path | None:
    """The index of a folder's safetensors shards, else of its pickles, if there is one."""
    return _index_called(folder, INDEX)


def _index_called(folder: Path, ending: str) -> Path | None:
    for kind in ("safetensors", "bin"):
        found = sorted(folder.glob(f"[!.]*.{kind}{ending}"))
        if len(found) > 1:
            raise InputError(
                f"has {len(found)} indexes ({', '.join(f.name for f in found[:3])}).",
                hint="Name the one that is meant.",
                file=folder,
            )
        if found:
            return found[0]
    return None


def _weight_files(folder: Path) -> tuple[list[str], Path | None]:
    if index := find_index(folder):
        return _indexed_files(index), index
    found = _weights_in(folder)
    names = [f.name for f in found if f.suffix == ".safetensors"] or [f.name for f in found]
    if not names:
        what, hint = "no weight files are in it.", "Name a checkpoint folder or file."
        if (folder / "adapter_config.json").exists():
            what = "it is an adapter, not a base."
        elif (folder / "model_index.json").exists():
            what, hint = "it is a pipeline of several models.", "Name the folder of one in it."
        raise InputError(what, hint=hint, file=folder)
    if len(names) == 1:
        return names, None
    whole = [n for n in names if n.rpartition(".")[0] in WHOLE]
    if len(whole) == 1:
        return whole, None
    if index := _index_called(folder, VARIANT):
        return _indexed_files(index), index
    return _numbered(names, folder), None


def _numbered(names: list[str], folder: Path) -> list[str]:
    """The shards of a complete numbered set that has lost its index."""
    sets: dict[tuple[str, int], list[str]] = {}
    for name in names:
        if m := SHARD.fullmatch(name):
            sets.setdefault((m["stem"], int(m["count"])), []).append(name)
    if len(sets) != 1:
        raise InputError(
            f"{len(names)} weight files ({', '.join(names[:3])} …) and no index.",
            hint="Name the file that is meant, or add the index.",
            file=folder,
        )
    (stem, count), shards = sets.popitem()
    wanted = {f"{stem}-{n:05}-of-{count:05}" for n in range(1, count + 1)}
    if missing := wanted - {s.rpartition(".")[0] for s in shards}:
        raise InputError(
            f"{len(missing)} of the {count} shards of {stem!r} are missing; the first is "
            f"{min(missing)!r}.",
            hint="Fetch the missing ones.",
            file=folder,
        )
    return sorted(shards)


def _weights_in(folder: Path) -> list[Path]:
    kinds = (".safetensors", *PICKLES)
    return sorted(
        f
        for f in folder.iterdir()
        if f.suffix in kinds and not f.name.startswith((".", "adapter_model.", "training_args."))
    )


def weight_map(index: Path) -> dict[str, str]:
    """The file name of every tensor, as an index gives it.

    Raises:
        InputError: the index is not one, or names a file outside its own folder.
    """
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or {type(v) for v in table.values()} != {str}:
        raise InputError("has no weight_map of file names.", file=index)
    for name, file in table.items():
        if file in ("", ".", "..") or file != Path(file).name or file != PureWindowsPath(file).name:
            raise InputError(
                f"places {name!r} in {file!r}, which is no plain file name; refused.",
                file=index,
                tensor=name,
            )
    return table


def _indexed_files(index: Path) -> list[str]:
    files = sorted(set(weight_map(index).values()))
    missing = [f for f in files if not (index.parent / f).exists()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(files)} shards are missing; the first is {missing[0]!r}.",
            hint="Fetch them again.",
            file=index,
        )
    return files


def _check_index(index: Path, parts: Sequence[Part]) -> None:
    says = weight_map(index)
    holds = {name: part.name for part in parts for name in part.infos}
    wrong = [n for n in says.keys() | holds.keys() if says.get(n) != holds.get(n)]
    if wrong:
        first = min(wrong)
        raise InputError(
            f"contradicts the shards in {len(wrong)} tensors; the first is {first!r}: "
            f"in {says.get(first, 'none')} by the index, in {holds.get(first, 'none')} in fact.",
            hint="A shard is stale: fetch the checkpoint again.",
            file=index,
            tensor=first,
        )


def _raise_twice(parts: Sequence[Part], path: Path) -> None:
    seen: dict[str, str] = {}
    for part in parts:
        for name in part.infos:
            if name in seen:
                raise InputError(
                    f"{name!r} is in both {seen[name]} and {part.name}.",
                    hint="A shard is stale: fetch the checkpoint again.",
                    file=path,
                    tensor=name,
                )
            seen[name] = part.name
