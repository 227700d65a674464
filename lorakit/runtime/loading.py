"""Models from folders: with an adapter on them, or folded into the weights as these are read.

Law: what `merge` loads has the bits of the folder that `lorakit.merge` writes.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.config import NAME
from lorakit.adapter.load import check_finite
from lorakit.engine.executor import fold_whole
from lorakit.engine.layout import Output
from lorakit.errors import InputError, UsageError
from lorakit.folder.facts import edited
from lorakit.naming.from_transformers import model_class
from lorakit.runtime.attached import attach
from lorakit.store.checkpoint import Checkpoint, open_checkpoint
from lorakit.store.hub import locate
from lorakit.store.memory import like
from lorakit.store.reading import read_file
from lorakit.tensors import Source
from lorakit.verbs.base.deciding import Decided, decided
from lorakit.verbs.base.sources import recipe_of, sources_of
from lorakit.verbs.base.targets import Options
from lorakit.verbs.beside import changed_facts
from lorakit.verbs.init import PARTS
from lorakit.verbs.merge import Adapters, opened_adapters, weights_for

CONFIG, GENERATION = "config.json", "generation_config.json"
ADAPTER, BASE = PARTS


def load_pretrained(
    folder: str | Path,
    adapter: Adapters = "",
    *,
    merge: bool = False,
    load: Mapping[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    """The transformers model in a folder (or hub id) with an adapter attached, or merged into it.

    adapter: one to attach, or several to merge; by default the one in a folder inside `folder`, if
    there is one, for the base there or in `folder/base` (what `lorakit loftq` and `init` write),
    which it is taken to be trained on as it is. merge: fold it while the weights are being read, as
    `lorakit.merge` would; the peak is the model and one weight for each
    thread. load: what `from_pretrained` is given (dtype, device_map, quantization_config …), and
    `kind`, the class, if it is not the one that config.json names. `options` are those of `attach`,
    or of `lorakit.merge`.

    Raises:
        InputError, MisfitError, HubError: see `lorakit.errors`.
        UsageError: there is no adapter to merge, or several to attach.
    """
    given = dict(load or {})
    if "torch_dtype" not in given:  # the older name of the same
        given.setdefault("dtype", "auto")
    if not adapter:
        folder, adapter = _pair(Path(folder)) if Path(folder).is_dir() else (folder, "")
        options = {"base_is_residual": bool(adapter), **options}
    if merge and not adapter:
        raise UsageError(
            f"there is no adapter in {str(folder)!r} to merge.",
            hint="Name it as the second argument.",
        )
    if adapter and merge:
        return _merged(str(folder), adapter, given, options)
    if not isinstance(adapter, str | Path | Adapter):
        raise UsageError(
            "several adapters are attached one by one.",
            hint="Call attach for each, with a name of its own; or give merge=True.",
        )
    kind = given.pop("kind", None) or _class_of(_config(folder))
    model = kind.from_pretrained(folder, **given)
    if adapter:
        attach(model, adapter, **options)
    return model


def _config(folder: str | Path) -> Any:
    from transformers import AutoConfig

    if (Path(folder) / NAME).is_file() and not (Path(folder) / CONFIG).exists():
        raise InputError(
            "holds an adapter, not a base.",
            hint="Give the base first: load_pretrained(base, adapter).",
            file=Path(folder),
        )
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        located = locate(str(folder), (CONFIG,))  # which says why not, mostly
        said = str(error).strip().splitlines()[0]
        raise InputError(f"transformers does not load it: {said}", file=located.path) from error


def _pair(folder: Path) -> tuple[str, str]:
    """A base and the adapter that a folder holds for it; "" where it holds none."""
    if not (folder / CONFIG).exists() and (folder / BASE / CONFIG).exists():
        return str(folder / BASE), str(folder / ADAPTER)
    found = sorted(p.parent for p in folder.glob(f"*/{NAME}"))
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise InputError(f"holds {len(found)} adapters ({names}).", hint="Name one.", file=folder)
    return str(folder), str(found[0]) if found else ""


def _class_of(config: Any) -> Any:
    found = model_class(config.architectures or (), config)
    if found is None:
        raise InputError("its config names no class.", hint="Give load={'kind': …}.")
    return found


@dataclass(frozen=True)
class Folded:
    """A tensor that is folded when it is asked for: what transformers takes for one on disk."""

    out: Output
    sources: Mapping[str, Source]
    adapters: Sequence[Source]

    def __getitem__(self, index: Any) -> Tensor:
        fold = self.out.fold(self.out.tensor)
        recipe = recipe_of(fold, self.sources, self.adapters)
        array = fold_whole(fold, recipe, self.sources[fold.source])
        return like(torch.empty(0), array, fold.tensor.dtype)[index]

    def get_shape(self) -> list[int]:
        """Its shape."""
        return list(self.out.tensor.shape)

    def get_dtype(self) -> str:
        """Its dtype, as safetensors calls it."""
        return self.out.tensor.dtype


def _merged(folder: str, adapter: Any, given: dict[str, Any], options: dict[str, Any]) -> nn.Module:
    """The model, made of tensors that are folded when transformers asks for them."""
    allow = bool(options.pop("allow_pickle", False))
    base = open_checkpoint(folder, allow_pickle=allow)
    adapters = opened_adapters(adapter, allow_pickle=allow, factors=True)
    for one in adapters:
        check_finite(one.source, one.path)
    weights = weights_for(options.pop("weights", None), len(adapters))
    found = decided(base, adapters, Options(weights, **options), "keep")
    sources, factors = dict(sources_of(base, adapters)), [a.source for a in adapters]
    outs = [o for there in found.outputs.values() for o in there]
    tensors = {o.tensor.name: Folded(o, sources, factors) for o in outs}
    with _configs(base, adapters, found) as scratch, threadpool_limits(1, "blas"):
        from transformers import AutoConfig, GenerationConfig

        config = AutoConfig.from_pretrained(scratch)
        kind = given.pop("kind", None) or _class_of(config)
        model = kind.from_pretrained(None, config=config, state_dict=tensors, **given)
        if (scratch / GENERATION).exists():
            model.generation_config = GenerationConfig.from_pretrained(scratch)
    model.config._name_or_path = folder
    return model


@contextmanager
def _configs(base: Checkpoint, adapters: Sequence[Adapter], found: Decided) -> Iterator[Path]:
    """A folder with the configs of the merged model."""
    facts = changed_facts(base, adapters, found.outputs, found.tie, "keep")
    facts |= found.layers.facts(base.config)
    with tempfile.TemporaryDirectory() as scratch:
        if base.folder is not None:
            (Path(scratch) / CONFIG).write_bytes(edited(base.folder / CONFIG, facts))
            if (base.folder / GENERATION).exists():
                copied = read_file(base.folder / GENERATION)
                (Path(scratch) / GENERATION).write_bytes(copied)
        yield Path(scratch)
