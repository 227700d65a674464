"""A LoRA file of another format as an adapter of PEFT, in memory: what a merge takes.

Law: it is what `lorakit convert --to peft` would write.
"""

from pathlib import Path

from lorakit.adapter.adapter import FILES, Adapter, read_adapter
from lorakit.adapter.config import NAME, AdapterConfig
from lorakit.adapter.files.mlx import is_mlx
from lorakit.adapter.files.reading import open_file, weights_of
from lorakit.adapter.files.saving import folders_of, saved_of
from lorakit.adapter.files.writing import spelled
from lorakit.adapter.saving import PLAIN, WRITTEN, config_of
from lorakit.errors import MisfitError
from lorakit.formats.grouping import grouped
from lorakit.store.checkpoint import open_part
from lorakit.store.hub import Located
from lorakit.store.memory import MemorySource


def open_foreign(located: Located) -> Adapter | None:
    """The adapter in a file or folder without PEFT's config; None where there is none.

    Raises:
        MisfitError: tensors belong to no module that is known, or to several models of a pipeline.
    """
    path = located.path
    if not is_mlx(path) and not _is_lora(path):
        return None
    opened = open_file(path)
    if opened.extras or not opened.deltas:
        name = next(iter(opened.extras))
        raise MisfitError(
            f"{len(opened.extras)} tensors belong to no module that is known, such as {name!r}.",
            hint="lorakit convert --to peft --drop REGEX leaves them out.",
            file=path,
            tensor=name,
        )
    folders = folders_of(list(spelled(opened.deltas, "peft", opened.family)), "peft")
    if len(folders) > 1:
        raise MisfitError(
            f"is for {' and '.join(folders)}, and a merge is into one of them.",
            hint="lorakit convert --to peft writes an adapter for each.",
            file=path,
        )
    (made,) = folders.values()
    deltas = [t.delta for t in made if t.delta is not None]
    raw = {
        **PLAIN,
        "fan_in_fan_out": False,
        "use_dora": any("magnitude" in d.tensors for d in deltas),
        "lora_bias": any("bias" in d.tensors for d in deltas),
    }
    config = config_of(raw, saved_of(made), {}, version=WRITTEN)
    arrays = {n: v.read() for t in made for n, v in t.values.items()}
    there = Located(weights_of(path), located.repo, located.revision)
    source = MemorySource(arrays, name=there.path.name)
    return read_adapter(there, AdapterConfig(config, there.path), source)


def _is_lora(path: Path) -> bool:
    """Whether a file has factors in a spelling of its own, and no config beside it."""
    if path.suffix != ".safetensors" or path.name in FILES or (path.parent / NAME).exists():
        return False
    groups, _ = grouped(open_part(path).infos.values(), path)
    return any(g.algos for g in groups.values())
