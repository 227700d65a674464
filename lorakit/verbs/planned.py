"""The plan of a merging verb for an output: what the command line shows or runs."""

from pathlib import Path
from typing import Any

from lorakit.store.workspace import is_file
from lorakit.verbs.job import Job
from lorakit.verbs.merge import plan_merge
from lorakit.verbs.unmerge import plan_unmerge


def plan_for(verb: str, base: str, adapters: tuple[str, ...], output: str, **options: Any) -> Job:
    """The plan of `verb`, named for an output folder or file."""
    alone = Path(output).name if is_file(Path(output)) else ""
    plan = plan_unmerge if verb == "unmerge" else plan_merge
    return plan(base, list(adapters), alone=alone, **options)
