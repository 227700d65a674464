"""The plan of a merging verb for an output: what the command line shows or runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.store.workspace import is_file
from lorakit.verbs.job import Job
from lorakit.verbs.merge import Adapters, plan_merge
from lorakit.verbs.pipeline import PipelineJob, is_pipeline, plan_pipeline
from lorakit.verbs.unmerge import plan_unmerge

PLANS: dict[str, Callable[..., Job]] = {"merge": plan_merge, "unmerge": plan_unmerge}


def plan_for(verb: str, base: str, adapters: tuple[str, ...], output: str, **options: Any) -> Job:
    """The plan of `verb`, named for an output folder or file."""
    alone = Path(output).name if is_file(Path(output)) else ""
    return PLANS[verb](base, list(adapters), alone=alone, **options)


def plan_any(
    verb: str, base: str | Path, adapters: Adapters, output: str | Path, **options: Any
) -> Job | PipelineJob:
    """The same, of a model or of a whole pipeline."""
    listed = [adapters] if isinstance(adapters, str | Path | Adapter) else list(adapters)
    alone = Path(output).name if is_file(Path(output)) else ""
    if is_pipeline(base):
        return plan_pipeline(PLANS[verb], base, listed, alone=alone, **options)
    return PLANS[verb](base, listed, alone=alone, **options)
