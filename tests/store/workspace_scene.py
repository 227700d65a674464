"""Workspaces that are built, left behind, or held by another process."""

from pathlib import Path

from lorakit.store.workspace import Workspace
from lorakit.store.writing import write_file

PLAN = {"plan": "a", "inputs": [1, 2]}
REPLACED = ".{}.lorakit-replaced"


def built(output: Path, files: dict[str, bytes], **options) -> Workspace:
    """A workspace in which these files lie, ready to be committed."""
    space = Workspace(output, PLAN, **options)
    for name, data in files.items():
        write_file(space.folder / name, data, sync=False)
    return space


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())
