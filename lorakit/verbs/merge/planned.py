"""The plan of a merging verb for an output: what the command line shows or runs."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.errors import UsageError
from lorakit.store.hub_id import PICKLES
from lorakit.store.output import is_file
from lorakit.verbs.job import Job
from lorakit.verbs.merge import Adapters, plan_merge
from lorakit.verbs.merge.pipeline import PipelineJob, is_pipeline, plan_pipeline
from lorakit.verbs.unmerge import plan_unmerge

PLANS: dict[str, Callable[..., Job]] = {"merge": plan_merge, "unmerge": plan_unmerge}


def plan_for(
    verb: str,
    base: str | Path,
    adapters: Sequence[str | Path | Adapter],
    output: str | Path,
    **options: Any,
) -> Job:
    """The plan of `verb`, named for an output folder or file.

    Raises:
        UsageError: the output is named as a file of another format, or one file has shards.
    """
    alone = Path(output).name if is_file(Path(output)) else ""
    if Path(output).suffix in PICKLES or (alone and not alone.endswith(".safetensors")):
        raise UsageError("a model is written as a folder, or as a file that ends in .safetensors.")
    if alone and options.get("max_shard_size"):
        hint = "Name a folder, or leave --max-shard-size out."
        raise UsageError(f"{alone} is one file, which has no shards.", hint=hint)
    return PLANS[verb](base, list(adapters), alone=alone, **options)


def plan_any(
    verb: str, base: str | Path, adapters: Adapters, output: str | Path, **options: Any
) -> Job | PipelineJob:
    """The same, of a model or of a whole pipeline.

    Raises:
        UsageError: a pipeline cannot be one file.
    """
    listed = [adapters] if isinstance(adapters, str | Path | Adapter) else list(adapters)
    if not is_pipeline(base):
        return plan_for(verb, base, listed, output, **options)
    if is_file(Path(output)):
        raise UsageError("a pipeline is written as a folder; name one with --output.")
    return plan_pipeline(PLANS[verb], base, listed, **options)
