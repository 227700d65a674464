"""Of a whole pipeline: which models a merge has written, and whether all else is the base's."""

import filecmp
from collections.abc import Sequence
from pathlib import Path

from lorakit.folder.manifest import NAME
from lorakit.verbs.merge.pipeline import INDEX, kept_files
from lorakit.verbs.verify.files import Tally


def parts_of(output: Path) -> list[Path]:
    """The folders of a pipeline that are results of a merge; none where it is no pipeline."""
    if not (output / INDEX).is_file() or (output / NAME).exists():
        return []
    return sorted(p.parent for p in output.glob(f"*/{NAME}"))


def check_kept(output: Path, base: Path, parts: Sequence[Path], tally: Tally) -> None:
    """Note every file beside these folders that the base has not, or has otherwise."""
    changed = {p.name for p in parts}
    wanted, there = (kept_files(folder, changed) for folder in (base, output))
    tally.differences += [f"{name} is missing." for name in wanted.keys() - there.keys()]
    tally.differences += [
        f"{name} is no file of the base." for name in there.keys() - wanted.keys()
    ]
    for name in sorted(wanted.keys() & there.keys()):
        if filecmp.cmp(wanted[name], there[name], shallow=False):
            tally.copied += wanted[name].stat().st_size
        else:
            tally.differences.append(f"{name} is not that of the base.")
