"""convert: the same adapter under other names, and its experts in another packing.

Law: for every tensor of the base, the delta of the result is that of the adapter; every tensor of
the adapter is used exactly once, or nothing is written.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.adapter.adapter import Adapter, file_of, open_adapter
from lorakit.store.checkpoint import open_checkpoint
from lorakit.verbs.base.layers import layers_of
from lorakit.verbs.base.placing import base_of
from lorakit.verbs.base.targets import Options
from lorakit.verbs.choices import READING, check_choices, listed
from lorakit.verbs.convert.plan import planned
from lorakit.verbs.convert.renaming import Renaming
from lorakit.verbs.convert.run import Conversion, Converted
from lorakit.verbs.job import RunOptions
from lorakit.verbs.reformat import plan_reformat
from lorakit.verbs.reformat.report import Reformatted

# A new format: an entry here, and how it is written.
CHOICES = {
    "to": ("peft",),
    "names": ("disk", "runtime-v5"),
    "experts": ("auto", "fused", "split"),
    **READING,
}


@dataclass(frozen=True)
class Wanted:
    """What the result is to be. The last three say how to read the adapter, as in a merge."""

    to: str = "peft"
    names: str = "disk"
    experts: str = "auto"
    expert_packing: str = "peft"
    expert_orientation: str = "auto"
    key_map: tuple[str, ...] = ()


def convert(
    adapter: str | Path | Adapter,
    output: str | Path,
    *,
    base: str | Path = "",
    run: RunOptions | None = None,
    **options: Any,
) -> Converted | Reformatted:
    """Write a LoRA file in another format, or an adapter for `base` under other names; what was
    done.

    Without `names`, `options` are those of `lorakit.verbs.reformat.plan_reformat`, and `adapter` is
    a path; with them, those of `plan_convert`. Numbers are moved and not computed, but where the
    report says so.

    Raises:
        InputError, MisfitError, UsageError: as `plan_convert`; or an open adapter is a part of a
            file that has others.
        OutputError: the output exists, lies inside an input, or is being written by another.
    """
    if "names" not in options and ("to" in options or not str(base)):
        return plan_reformat(file_of(adapter), base=base, **options).run(output, run)
    return plan_convert(adapter, base=base, **options).run(output, run)


def plan_convert(
    adapter: str | Path | Adapter,
    *,
    base: str | Path,
    allow_pickle: bool = False,
    **options: Any,
) -> Conversion:
    """The conversion that `convert` runs: the modules of the result, and what each is made of.

    `options` are the fields of `Wanted`: `to` ("peft"), `names` ("disk" or "runtime-v5"), `experts`
    ("auto": as the names have them, "fused" or "split"), `expert_packing`, `expert_orientation` and
    `key_map`. Headers are read, and of modules that are split the factors.

    Raises:
        UsageError: an option is none of its choices.
        MisfitError: a tensor of the adapter has no place in the base, or none under these names.
        InputError: the adapter is of a kind that has no such form, or the names are not known.
    """
    wanted = Wanted(**{**options, "key_map": tuple(listed(options.get("key_map", ())))})
    check_choices(asdict(wanted), CHOICES)
    opened = open_adapter(adapter, allow_pickle=allow_pickle)
    checkpoint = open_checkpoint(str(base), allow_pickle=allow_pickle)
    layers = layers_of(checkpoint.infos, [opened])
    config = {**checkpoint.config, **layers.facts(checkpoint.config)}
    known = base_of(layers.infos(checkpoint.infos), config)
    renaming = Renaming(known, wanted.names, wanted.experts)
    reading = Options(
        (1.0,),
        wanted.key_map,
        base_is_residual=True,
        expert_packing=wanted.expert_packing,
        expert_orientation=wanted.expert_orientation,
    )
    return Conversion(opened, checkpoint, planned(opened, renaming, reading), asdict(wanted))
