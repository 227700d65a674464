"""lorakit on the cases of the zoo."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorakit import RunOptions
from lorakit import merge as lorakit_merge
from tests.oracles.case import Built


def merge(case: Built, output: Path, *others: Built, **options: Any) -> None:
    """Merge the adapter of a case, and those of others for the same base, as a user would."""
    pickled = not case.case.save.get("safe_serialization", True)
    options = {"key_map": case.case.key_map, "allow_pickle": pickled, **options}
    adapters: Sequence[Path] = [one.adapter for one in (case, *others)]
    lorakit_merge(case.base, adapters, output, run=RunOptions(sync=False), **options)
