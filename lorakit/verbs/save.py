"""save_adapter: an open adapter as files.

Law: what is written is the adapter that was given, one model of a pipeline alone if it is that.
"""

from pathlib import Path

from lorakit.adapter.adapter import Adapter, open_adapter
from lorakit.verbs.convert import convert
from lorakit.verbs.convert.run import Converted
from lorakit.verbs.edit import Edited, plan_edit
from lorakit.verbs.job import RunOptions
from lorakit.verbs.reformat.report import Reformatted


def save_adapter(
    adapter: str | Path | Adapter,
    path: str | Path,
    format: str = "peft",
    *,
    base: str | Path = "",
    allow_pickle: bool = False,
    run: RunOptions | None = None,
) -> Edited | Converted | Reformatted:
    """Write an adapter to `path`; what was done.

    format: "peft", a folder that has every tensor as it is, to the byte, and is one of each model
    for a file of several; or what `lorakit.convert` writes: "diffusers", "kohya", "comfyui", "mlx"
    or "gguf", for which `base` is its base.

    Returns the report of `lorakit.edit` for an adapter of PEFT and for one model of a file of
    several, else that of `lorakit.convert`.

    Raises:
        UsageError: there is no such format, or the output is none for it.
        InputError, MisfitError: the adapter is corrupt, or the format cannot hold it.
        OutputError, ResourceError: as of every verb; what was there stays.
    """
    if format != "peft":
        return convert(adapter, path, to=format, base=base, allow_pickle=allow_pickle, run=run)
    opened = open_adapter(adapter, allow_pickle=allow_pickle)
    if opened.parts:
        return convert(opened, path, to=format, run=run)
    return plan_edit(opened, scale=1.0).run(path, run)
