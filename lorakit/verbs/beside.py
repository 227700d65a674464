"""What a merge writes beside the weights: companions, true config facts, index, model card,
manifest.

The index and the config come last, so that nothing loads by accident before everything is there.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit import __version__
from lorakit.adapter.adapter import Adapter
from lorakit.engine.layout import Output
from lorakit.engine.plan import Fold, Plan
from lorakit.folder.card import format_card
from lorakit.folder.companions import companions, own_tokenizer
from lorakit.folder.facts import classifying, edited, fact, labels
from lorakit.folder.index import format_index
from lorakit.folder.manifest import NAME as MANIFEST
from lorakit.folder.manifest import format_manifest
from lorakit.formats.embeddings import EMBEDDINGS
from lorakit.naming.embeddings import embeddings_in, is_classifier, is_head, is_span_head
from lorakit.store.checkpoint import Checkpoint
from lorakit.store.hashing import sha256_of
from lorakit.store.reading import reading
from lorakit.store.writing import copy_file, make_folder, write_file
from lorakit.verbs.base.sources import adapter_number
from lorakit.verbs.base.tying import Tie
from lorakit.verbs.report import Report, tensor_figures

CONFIG = "config.json"
MATRIX = 2  # dimensions
# Files that say of the weights beside them how they are quantised.
QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


@dataclass(frozen=True)
class Beside:
    """Everything in the output that is no weight.

    `copies` are files by their path in the output; `facts` are changes to config.json; `index` is
    the index's name, "" for an output of one unindexed file; `references` are the inputs as they
    were given.
    """

    title: str
    base: str
    adapters: tuple[tuple[str, float], ...]
    references: tuple[Mapping[str, Any], ...]
    copies: Mapping[str, Path] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    index: str = ""
    old_index: Path | None = None
    old_card: Path | None = None
    alone: bool = False  # the output is one file: of all this, only the manifest

    @property
    def nbytes(self) -> int:
        """Bytes that the copies take."""
        return sum(p.stat().st_size for p in self.copies.values())

    def check(self) -> None:
        """Look whether every copy can be made, before hours of work.

        Raises:
            InputError: a file cannot be read.
        """
        for path in self.copies.values():
            with reading(path), path.open("rb") as file:
                file.read(1)

    def to_dict(self) -> dict[str, Any]:
        """What of it belongs in the plan."""
        return {"copies": list(self.copies), "facts": dict(self.facts), "index": self.index}

    def write(self, folder: Path, plan: Plan, report: Report, *, sync: bool) -> None:
        """Write it all into the workspace."""
        copied = {} if self.alone else self._copied(folder, sync=sync)
        made = {} if self.alone else self._made(plan)
        hashes = copied | {n: hashlib.sha256(data).hexdigest() for n, data in made.items()}
        files = {MANIFEST: format_manifest(self._manifest(plan, report, hashes))}
        if not self.alone:
            files["README.md"] = self._card(report)
        for name, data in (files | made).items():
            write_file(folder / name, data, sync=sync)

    def _copied(self, folder: Path, *, sync: bool) -> dict[str, str]:
        """Copy what goes along as it is; the sha256 of each file."""
        found = {}
        for name, path in self.copies.items():
            if name != CONFIG:
                make_folder((folder / name).parent, sync=sync)
                copy_file(path, folder / name, sync=sync)
                found[name] = sha256_of(folder / name)
        return found

    def _made(self, plan: Plan) -> dict[str, bytes]:
        """What a loader reads beside the weights and is not always a copy, the config last."""
        found = {}
        if self.index:
            found[self.index] = self._index(plan)
        if config := self.copies.get(CONFIG):
            found[CONFIG] = edited(config, self.facts)
        return found

    def _index(self, plan: Plan) -> bytes:
        weight_map = {t: f.name for f in plan.files for t in f.tensors}
        total = sum(f.size - len(f.header) for f in plan.files)
        return format_index(weight_map, total, self.old_index)

    def _card(self, report: Report) -> bytes:
        text = (
            f"Made by lorakit {__version__}: "
            f"{report.folded} of {report.tensors} tensors changed, "
            f"{100 * report.retained:.2f} % of the deltas kept after rounding. "
            "`lorakit.json` has the inputs and the figures of every tensor. The adapters:"
        )
        return format_card(
            self.title, base=self.base, adapters=self.adapters, old=self.old_card, text=text
        )

    def _manifest(self, plan: Plan, report: Report, hashes: Mapping[str, str]) -> dict[str, Any]:
        sha256 = report.sha256 or {}
        recipes = {s.tensor.name: s for f in plan.files for s in f.steps if isinstance(s, Fold)}
        return {
            "version": 1,
            "lorakit": __version__,
            "verb": plan.verb,
            "plan": plan.hash,
            "inputs": [{**i, **r} for i, r in zip(plan.inputs, self.references, strict=True)],
            "options": dict(plan.options),
            "notes": list(plan.notes),
            "devices": list(report.devices),
            "files": {
                f.name: {"size": f.size, **({"sha256": sha256[f.name]} if f.name in sha256 else {})}
                for f in plan.files
            },
            "beside": dict(hashes),
            "tensors": {
                n: tensor_figures(report.figures[n]) for n in recipes if n in report.figures
            },
        }


def beside_of(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    facts: Mapping[str, Any],
    *,
    count: int,
    alone: bool,
) -> Beside:
    """What goes beside the weights of a merge into this base, `count` files, or one that stands
    `alone`.

    Where the vocabulary changes, a tokenizer that an adapter brings takes the place of the base's.
    """
    copies = dict(companions(base.folder)) if base.folder else {}
    if facts.get("quantization_config", copies) is None:
        copies = {n: p for n, p in copies.items() if n not in QUANTISED}
    if "vocab_size" in facts:
        for adapter in adapters:
            copies |= own_tokenizer(adapter.path.parent)
    card = base.folder / "README.md" if base.folder else None
    return Beside(
        title=" + ".join([_name(base), *map(_title, adapters)]),
        base=_name(base),
        adapters=tuple((_title(a), w) for a, w in zip(adapters, weights, strict=True)),
        references=(base.located.to_dict(), *(a.located.to_dict() for a in adapters)),
        copies=dict(sorted(copies.items())),
        facts=facts,
        index=index_name(base, count),
        alone=alone,
        old_index=base.index if base.index and "safetensors" in base.index.name else None,
        old_card=card if card and card.is_file() else None,
    )


def changed_facts(
    base: Checkpoint,
    adapters: Sequence[Adapter],
    by_file: Mapping[str, Sequence[Output]],
    tie: Tie,
    dtype: str,
) -> dict[str, Any]:
    """What in config.json is no longer true: dtype, vocabulary, tied embeddings, labels and
    architecture of a new head.
    """
    facts: dict[str, Any] = {}
    if tie.untied:
        facts["tie_word_embeddings"] = False
    if dtype != "keep":
        facts |= {k: dtype for k in ("torch_dtype", "dtype") if fact(base.config, k) is not None}
    tokens = fact(base.config, "vocab_size")
    for out in (o for outs in by_file.values() for o in outs):
        name, rows = out.tensor.name, out.tensor.rows
        old = base.infos.get(name)
        if _is_vocabulary(out, base, tokens) and rows != (old.rows if old else tokens):
            facts["vocab_size"] = rows
        number = adapter_number(out.source)
        if number is None:
            continue
        if not (is_classifier(name) or is_span_head(name)):
            continue
        if len(fact(base.config, "id2label", default={}) or {}) != rows:
            facts |= labels(rows)
            facts |= {"num_labels": rows} if fact(base.config, "num_labels") is not None else {}
        if not old:
            task = adapters[number].config.raw.get("task_type")
            facts |= classifying(base.config, str(task))
    return facts


def _is_vocabulary(out: Output, base: Checkpoint, tokens: object) -> bool:
    """Whether a tensor of the result has a row for each token: an input embedding, in a model
    without one (of speech) the output head, and what had as many rows as the config says.
    """
    name, old = out.tensor.name, base.infos.get(out.tensor.name)
    if name.endswith(EMBEDDINGS):
        return old is not None
    if is_head(name) and tokens is not None:
        return not embeddings_in(base.infos)
    return old is not None and len(old.shape) == MATRIX and old.rows == tokens


def index_name(base: Checkpoint, count: int) -> str:
    """The name of the index of a result with so many weight files, "" where it needs none."""
    if base.index and "safetensors" in base.index.name:
        return base.index.name
    return "model.safetensors.index.json" if count > 1 else ""


def left_out(base: Checkpoint) -> list[str]:
    """A line on weight files of the base that nothing names."""
    if not base.left_out:
        return []
    names = ", ".join(base.left_out[:3]) + (" …" if len(base.left_out) > 3 else "")
    return [f"weight files that no index names are left out ({len(base.left_out)}): {names}."]


def tokenizer_note(beside: Beside, adapters: Sequence[Adapter]) -> list[str]:
    """A line on tokenizer files that an adapter brings because it changed the vocabulary."""
    folders = {a.path.parent for a in adapters}
    own = [n for n, p in beside.copies.items() if p.parent in folders]
    return [f"the vocabulary changes, so {', '.join(own)} come from the adapter."] if own else []


def _name(base: Checkpoint) -> str:
    path = base.located.path
    return base.located.repo or (path.name if path.is_dir() else path.stem)


def _title(adapter: Adapter) -> str:
    return adapter.located.repo or adapter.name
