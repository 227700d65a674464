"""What is told of each kind of thing: an adapter, a checkpoint, an index, a file of GGUF."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.adapter.adapter import Adapter, open_adapter
from lorakit.adapter.config import NAME
from lorakit.errors import InputError, LorakitError, MisfitError
from lorakit.folder.manifest import manifest_path
from lorakit.store.checkpoint import Checkpoint, open_checkpoint, weight_map
from lorakit.tensors import TensorInfo
from lorakit.verbs.inspect.recognising import facts_of

if TYPE_CHECKING:
    from lorakit.verbs.inspect.spectra import Spectrum

BARE = "PEFT names, without a config"  # whose alphas are not known


@dataclass(frozen=True)
class Inspected:
    """What something is: `kind` is "adapter", "base", "tensors", "index", "result" or "pickle".

    `facts` are by name a value, a list, or how many modules have which value; `dtypes` are bytes by
    dtype, `groups` rows of (name with its numbers replaced by *, how many, shapes, dtypes), `notes`
    what may surprise. `spectra` are the singular values of each update of an adapter, None where
    they were not asked for.
    """

    path: str
    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    dtypes: Mapping[str, int] = field(default_factory=dict)
    groups: Sequence[tuple[str, int, str, str]] = ()
    notes: Sequence[str] = ()
    spectra: "Sequence[Spectrum] | None" = None

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain data; without spectra where they were not asked for."""
        found = asdict(self)
        return {k: v for k, v in found.items() if k != "spectra" or v is not None}


def of_adapter(adapter: Adapter) -> Inspected:
    """An adapter with its config."""
    low = [m for m in adapter.modules.values() if m.low_rank]
    config = adapter.config
    ranks = Counter(m.a.shape[0] for m in low)
    facts = {
        "format": f"PEFT, saved by {config.raw.get('peft_version') or 'a version before 0.18'}",
        "type": _variant(adapter),
        "base": config.base or "not said",
        "modules": len(adapter.modules),
        "targets": sorted({m.name.rpartition(".")[2] for m in low}),
        "rank": {str(r): n for r, n in ranks.most_common()},
        "scaling": _scalings(adapter),
        "parameters": sum(i.numel for i in adapter.source.infos.values()),
        "replaced": list(adapter.full),
    }
    notes = []
    try:
        config.check()
    except LorakitError as error:
        notes.append(f"merge refuses it: {error.message} {error.hint}")
    if adapter.unused:
        notes.append(f"{len(adapter.unused)} tensors are of use in training only.")
    infos = adapter.source.infos
    return Inspected(str(adapter.path), "adapter", facts, _dtypes(infos), _groups(infos), notes)


def _variant(adapter: Adapter) -> str:
    roles = {r for m in adapter.modules.values() for r in m.roles}
    parts = [f"{adapter.tuner}, read as plain LoRA" if adapter.tuner else adapter.config.peft_type]
    parts += ["rank-stabilised"] if adapter.config.rslora else []
    parts += ["DoRA"] if "magnitude" in roles else []
    parts += ["with biases"] if "bias" in roles else []
    parts += ["token rows"] if "rows" in roles else []
    return ", ".join(parts)


def _scalings(adapter: Adapter) -> dict[str, int] | str:
    try:
        found = Counter(
            f"{adapter.config.scaling(m.name, m.a.shape[0]):.4g}"
            for m in adapter.modules.values()
            if m.low_rank
        )
    except InputError as error:
        return error.message
    return dict(found.most_common())


def of_gguf(path: Path) -> Inspected:
    """A file of GGUF, of whatever it has."""
    from lorakit.verbs.inspect.gguf import facts_of_gguf

    kind, facts, rows = facts_of_gguf(path)
    dtypes = Counter[str]()
    for _, _, dtype, nbytes in rows:
        dtypes[dtype] += nbytes
    infos = {name: TensorInfo(name, dtype, shape) for name, shape, dtype, _ in rows}
    return Inspected(str(path), kind, facts, dict(dtypes), _groups(infos))


def of_loose_adapter(checkpoint: Checkpoint) -> Inspected | None:
    """An adapter in a file of another name than PEFT's; None for what is no adapter."""
    infos, path = checkpoint.infos, checkpoint.located.path
    folder = path if path.is_dir() else path.parent
    try:
        facts, notes = facts_of(infos, path)
    except MisfitError as error:
        facts, notes = {"tensors": len(infos)}, [f"merge and convert refuse it: {error.message}"]
    if not facts:
        return None
    if facts.get("format") == "peft":
        if (folder / NAME).exists():
            return of_adapter(open_adapter(path))
        facts["format"] = BARE
        notes.append(f"No {NAME} lies beside it, so its alpha is unknown: merge needs that file.")
    return Inspected(str(path), "adapter", facts, _dtypes(infos), _groups(infos), notes)


def of_base(checkpoint: Checkpoint) -> Inspected:
    """A checkpoint, or tensors without a config."""
    infos = checkpoint.infos
    config = checkpoint.config
    merged = manifest_path(checkpoint.folder or checkpoint.located.path).exists()
    facts = {
        "model": config.get("model_type") or "not said",
        "files": len(checkpoint.parts),
        "tensors": len(infos),
        "parameters": sum(i.numel for i in infos.values()),
        "bytes": sum(i.nbytes for i in infos.values()),
    }
    if config.get("quantization_config"):
        facts["quantised"] = str(config["quantization_config"].get("quant_method"))
    notes = [f"{n} is named by no index and is left out." for n in checkpoint.left_out]
    notes += ["It was made by lorakit; `lorakit verify` checks it."] if merged else []
    kind = "result" if merged else ("base" if config else "tensors")
    path = str(checkpoint.located.path)
    return Inspected(path, kind, facts, _dtypes(infos), _groups(infos), notes)


def of_index(path: Path) -> Inspected:
    """An index, and its checkpoint where all shards are there."""
    table = weight_map(path)
    files = sorted(set(table.values()))
    here = sum((path.parent / f).exists() for f in files)
    if here == len(files):
        return of_base(open_checkpoint(str(path)))
    names = Counter(_pattern(n) for n in table)
    groups = [(n, c, "", "") for n, c in names.items()]
    facts = {"tensors": len(table), "files": len(files), "files here": here}
    notes = [f"{len(files) - here} of its shards are not here; shapes and dtypes are unknown."]
    return Inspected(str(path), "index", facts, {}, groups, notes)


def _dtypes(infos: Mapping[str, TensorInfo]) -> dict[str, int]:
    found: dict[str, int] = {}
    for info in infos.values():
        found[info.dtype] = found.get(info.dtype, 0) + info.nbytes
    return found


def _pattern(name: str) -> str:
    return ".".join("*" if s.isdigit() else s for s in name.split("."))


def _groups(infos: Mapping[str, TensorInfo]) -> list[tuple[str, int, str, str]]:
    found: dict[str, list[TensorInfo]] = {}
    for name, info in infos.items():
        found.setdefault(_pattern(name), []).append(info)
    return [
        (n, len(g), _few(i.shape for i in g), _few(i.dtype for i in g)) for n, g in found.items()
    ]


def _few(values: Any) -> str:
    found = list(
        dict.fromkeys("x".join(map(str, v)) if isinstance(v, tuple) else v for v in values)
    )
    return ", ".join(found[:2]) + (" …" if len(found) > 2 else "")
