"""A LoRA file of another format as an adapter of PEFT, in memory: what a merge takes.

Law: it is what `lorakit convert --to peft` would write.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lorakit.adapter.adapter import Adapter, read_adapter
from lorakit.adapter.config import AdapterConfig
from lorakit.adapter.delta import Opened
from lorakit.adapter.files.direct import direct, only_merged, without_biases
from lorakit.adapter.files.mlx import check_embeddings
from lorakit.adapter.files.named import Naming
from lorakit.adapter.files.reading import check_header, open_file
from lorakit.adapter.files.saving import folders_of, saved_of
from lorakit.adapter.files.spelling import Tensors, spelled
from lorakit.adapter.new_config import PLAIN, WRITTEN, config_of
from lorakit.adapter.weight_file import is_mlx
from lorakit.errors import MisfitError, about
from lorakit.formats.grouping import grouped
from lorakit.formats.peft import PREFIX
from lorakit.formats.recognise import LANGUAGE
from lorakit.formats.spelling import SPELLINGS
from lorakit.store.checkpoint import open_part
from lorakit.store.hub import Located
from lorakit.store.memory import MemorySource


def open_foreign(
    located: Located,
    *,
    dense: bool = False,
    base: str = "",
    tuner: bool = False,
    allow_pickle: bool = False,
) -> Adapter | None:
    """The adapter in a file that is none of PEFT's, or, `tuner`, of PEFT and not LoRA; None where
    it holds none.

    `dense` takes what is no plain factors too: differences of whole weights, IA3, GLoRA, OFT, norms
    of inputs.
    `base` is a checkpoint whose names those of the file may be, flattened.

    Raises:
        MisfitError: tensors belong to no module that is known.
    """
    path = located.path
    if not is_mlx(path) and not tuner and not _is_lora(path):
        return None
    naming = Naming(base) if base else None
    opened = open_file(path, naming=naming, allow_pickle=allow_pickle)
    check_header(opened, path)
    if (opened.extras and not opened.tuner) or not opened.deltas:
        name = next(iter(opened.extras))
        to = "peft" if opened.family == LANGUAGE else "comfyui"
        raise MisfitError(
            f"{len(opened.extras)} tensors belong to no module that is known, such as {name!r}.",
            hint=f"lorakit convert {path} -o OUT --to {to} --drop REGEX leaves them out.",
            file=path,
            tensor=name,
        )
    deltas = list(without_biases(opened.deltas)) if dense else opened.deltas
    apart = [d for d in deltas if dense and only_merged(d)]
    factored = [d for d in deltas if not (dense and only_merged(d))]
    with about(path):
        if opened.format == "mlx":
            check_embeddings(opened.deltas)
        made = [t.kept() for t in spelled(factored, SPELLINGS["peft"], opened.family)]
        made += [direct(d).kept() for d in apart]
    folders = folders_of(made, "peft")
    if len(folders) > 1:
        parts = {c: replace(_adapter(located, s, opened), part=c) for c, s in folders.items()}
        modules = [_in(c, t) for c, some in folders.items() for t in some]
        return replace(_adapter(located, modules, opened), parts=parts)
    adapter, (component,) = _adapter(located, made, opened), {d.component for d in opened.deltas}
    if component:
        return replace(adapter, parts={component: adapter})
    return replace(adapter, both_sides=opened.format == "mlx")


def _adapter(there: Located, made: Sequence[Tensors], opened: Opened) -> Adapter:
    """The adapter of these modules, each in memory as it comes out of a PEFT file; of a tuner of
    PEFT, with what it has beside them.
    """
    deltas = [t.delta for t in made if t.delta is not None]
    raw = {
        **PLAIN,
        "fan_in_fan_out": False,
        **(opened.config if opened.tuner else {}),
        "use_dora": any("magnitude" in d.tensors for d in deltas),
        "lora_bias": any("bias" in d.tensors for d in deltas if d.algo == "lora"),
    }
    config = config_of(raw, saved_of(made), {}, version=WRITTEN)
    values = dict(opened.extras) | {n: v for t in made for n, v in t.values.items()}
    source = MemorySource({n: v.read() for n, v in values.items()}, name=there.path.name)
    cuts = {d.module: d.rows for d in deltas if d.rows}
    known = AdapterConfig(config, there.path)
    return read_adapter(there, known, source, tuner=opened.tuner, cuts=cuts)


def _in(component: str, tensors: Tensors) -> Tensors:
    """A module whose name says which model it is in."""
    values = {f"{PREFIX}{component}.{n.removeprefix(PREFIX)}": v for n, v in tensors.values.items()}
    delta = tensors.delta
    assert delta is not None
    return Tensors(tensors.step, values, replace(delta, module=f"{component}.{delta.module}"))


def _is_lora(path: Path) -> bool:
    """Whether a file has factors in a spelling of its own."""
    if path.suffix != ".safetensors":
        return False
    groups, _ = grouped(open_part(path).infos.values(), path)
    return any(g.algos for g in groups.values())
