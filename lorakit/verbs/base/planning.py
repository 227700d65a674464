"""From targets to a plan: what becomes of every tensor, in the base's order and shards."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lorakit.adapter.pieces import Piece
from lorakit.engine.layout import Old, Output, lay_out, split
from lorakit.engine.plan import OutputFile
from lorakit.errors import MisfitError
from lorakit.folder.index import shard_name
from lorakit.naming.quantised import beside_codes
from lorakit.store.checkpoint import Checkpoint, Part
from lorakit.store.safetensors import SafetensorsFile
from lorakit.tensors import CODES, FOLDABLE, TensorInfo
from lorakit.verbs.base.landing import Context
from lorakit.verbs.base.layers import Layers
from lorakit.verbs.base.placing import landed_in
from lorakit.verbs.base.residual import residual_memory, residuals
from lorakit.verbs.base.sources import adapter_key, base_key
from lorakit.verbs.base.targets import BY_VALUES, Matched, Target, check_foldable
from lorakit.verbs.base.tying import Tie

FLOATS = {"F64", "F32", "BF16", "F16"}


@dataclass(frozen=True)
class Setting:
    """What stays the same while outputs are planned."""

    base: Checkpoint
    contexts: Sequence[Context]  # one an adapter
    dtype: str = "keep"  # or a key of CODES
    residuals: bool = True  # whether to take out what initialisations took out of the base
    layers: Layers = field(default_factory=Layers)

    def written(self, info: TensorInfo) -> str:
        """The dtype in which a tensor is written; scales keep that of their codes' layout."""
        if self.dtype == "keep" or info.name in self._scales:
            return info.dtype
        return _written(info.dtype, self.dtype)

    @cached_property
    def _scales(self) -> frozenset[str]:
        return beside_codes(self.base.infos)

    @property
    def main_dtype(self) -> str:
        """The float dtype that most of the base's bytes have."""
        sizes: dict[str, int] = {}
        for info in self.base.infos.values():
            if info.dtype in FLOATS:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        return max(sizes, key=lambda d: sizes[d], default="F32")


def outputs(setting: Setting, matched: Matched, tie: Tie) -> dict[str, list[Output]]:
    """Every tensor of the result, by the base file in whose place it comes.

    New tensors follow the last tensor of the last file; an untied head follows its embedding.

    Raises:
        MisfitError: an update does not fit its tensor, or two adapters replace the same one.
        InputError: a target is quantised.
    """
    files: dict[str, list[Output]] = {}
    targets = matched.targets
    for part in setting.base.parts:
        there, source = files.setdefault(part.name, []), base_key(part)
        for name, origin in setting.layers.of(part.infos):
            info = origin.but(name=name)
            there.append(_output(setting, info, source, targets.get(name), origin=origin))
            if tie.untied and name == tie.embedding and tie.head not in setting.base.infos:
                head = replace(info, name=tie.head)
                there.append(_output(setting, head, source, targets.get(tie.head), origin=info))
    placed = {o.tensor.name for outs in files.values() for o in outs}
    new = [_new(setting, target) for name, target in targets.items() if name not in placed]
    files[setting.base.parts[-1].name] += new
    return files


def _output(
    setting: Setting,
    info: TensorInfo,
    source: str,
    target: Target | None,
    *,
    origin: TensorInfo,
) -> Output:
    """What becomes of one tensor of the base, or of a copy of one."""
    start = Output(info.but(dtype=setting.written(info)), source, origin)
    if target is None:
        return start
    whole = (p.tensors[0].dtype == info.dtype and p.spec["weight"] == 1.0 for p in target.full)
    if target.rows or target.updates or not all(whole):
        check_foldable(info, setting.base.infos, BY_VALUES)
    return _filled(setting, target, start)


def _new(setting: Setting, target: Target) -> Output:
    """A tensor that the base does not have: a head that the training put on it."""
    (piece,) = target.full if len(target.full) == 1 else (None,)
    if piece is None or piece.spec["weight"] != 1.0:
        raise MisfitError(
            f"{target.name!r} is not in the base, so it has no weight but 1 and one adapter.",
            hint="Merge one adapter with weight 1, or leave it out with --allow-unmatched REGEX.",
            tensor=target.name,
        )
    info = piece.tensors[0]
    dtype = setting.main_dtype if info.dtype in FLOATS else info.dtype
    placed = TensorInfo(target.name, _written(dtype, setting.dtype), info.shape)
    return _filled(setting, target, Output(placed, adapter_key(piece.adapter), info))


def _filled(setting: Setting, target: Target, start: Output) -> Output:
    start, toward = _started(target, start)
    updates = [
        landed_in(here, start.tensor, setting.contexts[here.piece.adapter])
        for here in target.updates
    ]
    updates += residuals(target.updates, updates, setting)
    rows = [_rows(p, start.tensor) for p in target.rows]
    _check_apart(target, rows)
    if not (updates or rows or toward):
        return start
    factors = [t for p in target.pieces if p.action != "full" for t in p.tensors]
    leading = 2 if any("at" in u or u.get("stacked") for u in updates) else 1
    leading = min(leading, max(len(start.tensor.shape) - 1, 1))
    toward = [{**t, "leading": leading, **_replaced(rows)} for t in toward]
    recipe: dict[str, Any] = {"updates": updates + toward, "rows": rows}
    recipe["nbytes"] = sum(3 * 4 * t.numel for t in factors)  # widened, turned, and joined
    residual = any("residual" in u for u in updates)
    if residual:  # whoever folds it decomposes the weight first: one worker, not each
        recipe["nbytes"] += residual_memory(start.tensor)
    whole = residual or any(_sees_all(u) for u in updates)
    return replace(start, recipe=recipe, whole=whole, leading=leading)


def _sees_all(update: Mapping[str, Any]) -> bool:
    by_columns = update.get("magnitude") and update["transposed"] != update.get("inputs", False)
    return bool(by_columns) or update.get("act") == "oft"


def _started(target: Target, start: Output) -> tuple[Output, list[dict[str, Any]]]:
    """Where the tensor starts from: the base, or an adapter's full copy, or a step towards that."""
    if not target.full:
        return start, []
    if len(target.full) > 1:
        raise MisfitError(
            f"{len(target.full)} adapters replace {target.name!r} as a whole.",
            hint="Merge only one of them, or make one adapter of both first.",
            tensor=target.name,
        )
    (piece,) = target.full
    info, weight = piece.tensors[0], piece.spec["weight"]
    if info.shape[1:] != start.tensor.shape[1:] or len(info.shape) != len(start.tensor.shape):
        raise MisfitError(
            f"{target.name!r} is {list(start.tensor.shape)} in the base, {list(info.shape)} in the "
            "adapter.",
            hint="It was trained on another model: compare both with `lorakit inspect`.",
            tensor=target.name,
        )
    if weight == 1.0:
        placed = replace(start.tensor, shape=info.shape)
        return Output(placed, adapter_key(piece.adapter), info), []
    if info.shape != start.tensor.shape:
        raise MisfitError(
            f"{target.name!r} is replaced by one of another shape, which has no weight but 1.",
            hint="Merge that adapter with weight 1.",
            tensor=target.name,
        )
    return start, [{"adapter": piece.adapter, "toward": info.name, "weight": weight}]


def _rows(piece: Piece, tensor: TensorInfo) -> dict[str, Any]:
    info, indices = piece.tensors[0], piece.spec["indices"]
    count = len(indices) if indices is not None else None
    if count != info.rows or max(indices or [0]) >= tensor.rows or min(indices or [0]) < 0:
        raise MisfitError(
            f"{info.name!r} has {info.rows} token rows, the config gives {count} indices for a "
            f"vocabulary of {tensor.rows}.",
            hint="Look at trainable_token_indices in adapter_config.json.",
            tensor=info.name,
        )
    return piece.spec


def _replaced(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a step towards a whole tensor is told of rows that another adapter replaces."""
    return {"replaced": sorted(i for r in rows for i in r["indices"])} if rows else {}


def _check_apart(target: Target, rows: Sequence[Mapping[str, Any]]) -> None:
    """Refuse two adapters that replace the same row."""
    counts = Counter(i for r in rows for i in r["indices"])
    if twice := sorted(i for i, count in counts.items() if count > 1):
        raise MisfitError(
            f"{len(twice)} rows of {target.name!r} are replaced more than once; the first is row "
            f"{twice[0]}.",
            hint="Merge only one of the adapters, or make one of both first.",
            tensor=target.name,
        )


def _written(dtype: str, wanted: str) -> str:
    return CODES[wanted] if wanted != "keep" and dtype in FOLDABLE else dtype


@dataclass(frozen=True)
class Result:
    """What the result looks like; `alone` is its name if it is one file, `quant` says what becomes
    of quantised weights: "dequantize", "keep-touched", "requantize", or "keep" if none may change.
    """

    dtype: str = "keep"
    max_shard_size: int | None = None
    link: bool = False
    alone: str = ""
    quant: str = "keep"


def files(base: Checkpoint, by_file: Mapping[str, list[Output]], form: Result) -> list[OutputFile]:
    """The weight files of the result: the base's own, new shards, or a single file."""
    if form.alone:
        old = _old(base.parts[0]) if len(base.parts) == 1 else None
        outs = [o for there in by_file.values() for o in there]
        return [lay_out(form.alone, outs, old, link=form.link)]
    if form.max_shard_size is None:
        olds = {p.name: _old(p) for p in base.parts}
        return [lay_out(_safe(n), o, olds[n], link=form.link) for n, o in by_file.items() if o]
    shards = split([o for outs in by_file.values() for o in outs], form.max_shard_size)
    stem = _safe(base.parts[0].name).removesuffix(".safetensors").split("-00")[0]
    names = [shard_name(stem, i + 1, len(shards)) for i in range(len(shards))]
    return [lay_out(n, s, None, link=False) for n, s in zip(names, shards, strict=True)]


def _safe(name: str) -> str:
    """The safetensors name of a weight file; pickles are written as safetensors."""
    if name.endswith(".safetensors"):
        return name
    return name.replace("pytorch_model", "model").rpartition(".")[0] + ".safetensors"


def _old(part: Part) -> Old | None:
    if not isinstance(part, SafetensorsFile):
        return None
    return Old(base_key(part), part.header, part.on_disk, part.metadata)


def identity(part: Part) -> dict[str, Any]:
    """What a weight file is known by: name, size and the hash of its header."""
    if isinstance(part, SafetensorsFile):
        header = hashlib.sha256(part.header).hexdigest()
        return {"name": part.name, "size": part.size, "header_sha256": header}
    infos = [(i.name, i.dtype, i.shape) for i in part.infos.values()]
    total = sum(i.nbytes for i in part.infos.values())
    header = hashlib.sha256(repr(infos).encode()).hexdigest()
    return {"name": part.name, "size": total, "header_sha256": header}
