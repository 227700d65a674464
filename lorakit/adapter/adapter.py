"""An adapter on disk: which tensors it has for which module. Opening it reads headers only.

Law: every tensor of the file belongs to exactly one of `modules`, `full` and `unused`.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from lorakit.adapter.config import NAME, AdapterConfig, read_config
from lorakit.adapter.models import by_model
from lorakit.adapter.module import Module, check_module
from lorakit.adapter.tuners import TUNERS
from lorakit.adapter.weight_file import (
    DIFFUSERS,
    MLX,
    NAMELESS,
    PEFT,
    PEFT_FILES,
    is_mlx,
    no_adapter,
    weight_file,
)
from lorakit.errors import InputError, MisfitError, UsageError
from lorakit.formats.mlx import in_both
from lorakit.formats.peft import Key, parse, saves
from lorakit.store.checkpoint import Part, open_part
from lorakit.store.equal import same_bytes
from lorakit.store.hashing import sha256_of
from lorakit.store.hub import Located, check_promise, locate
from lorakit.store.reading import reading
from lorakit.tensors import TensorInfo

PATTERNS = (  # of what is fetched from a hub
    PEFT,
    DIFFUSERS,
    MLX,
    f"*/{PEFT}",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
)


@dataclass(frozen=True)
class AdapterFile:
    """The weight file of an adapter: what is still needed of it once a plan is made."""

    path: Path
    source: Part

    @property
    def files(self) -> list[Path]:
        """It, and the config beside it."""
        config = self.path.parent / NAME
        return [self.path, *([config] if config.exists() else [])]

    @cached_property
    def sha256(self) -> str:
        """The hash of the file."""
        return sha256_of(self.path)


@dataclass(frozen=True)
class Adapter:
    """An adapter: config, tensors, and the modules that they belong to.

    `parts` are what it is to each model of a pipeline, where its file says so; of several, the
    names of modules begin with theirs. `part` is the one of several that it is itself. With
    `both_sides` the update of an embedding is that of a head that shares it as well, as in MLX.
    `tuner` is the type of PEFT that its config on disk says, if that is not LoRA.
    """

    located: Located
    config: AdapterConfig
    source: Part
    modules: Mapping[str, Module] = field(default_factory=dict)
    full: Mapping[str, TensorInfo] = field(default_factory=dict)  # by the base's name, new values
    unused: tuple[str, ...] = ()  # of use while training only
    parts: Mapping[str, "Adapter"] = field(default_factory=dict)
    part: str = ""
    both_sides: bool = False
    tuner: str = ""

    @property
    def component(self) -> str:
        """The one model that it is for, "" where the names of modules say it, or nothing does."""
        return next(iter(self.parts)) if len(self.parts) == 1 else ""

    @property
    def path(self) -> Path:
        """The weight file."""
        return self.located.path

    @property
    def name(self) -> str:
        """What it is called: its folder, or a weight file that has a name of its own."""
        path = self.path.absolute()
        return path.parent.name if path.name in NAMELESS else path.stem

    def saves(self, name: str) -> bool:
        """Whether its config asks for the module of a tensor to be saved as a whole."""
        asked = self.config.raw.get("modules_to_save") or ()
        return any(saves(m, name) for m in asked)

    @property
    def one_sided(self) -> list[str]:
        """What to say where it becomes PEFT's, which has updates of one side only."""
        embeddings = (m.name for m in self.modules.values() if m.embedding)
        return [in_both(name) for name in embeddings] if self.both_sides else []

    @cached_property
    def file(self) -> AdapterFile:
        """The weight file, without what its tensors are."""
        return AdapterFile(self.path, self.source)

    @property
    def files(self) -> list[Path]:
        """The weight file, and the config beside it."""
        return self.file.files

    @property
    def sha256(self) -> str:
        """The hash of the weight file."""
        return self.file.sha256


def file_of(reference: str | Path | Adapter) -> str | Path:
    """The file of an open adapter; a path or hub id as it is.

    Raises:
        UsageError: the adapter is a part of its file.
    """
    if not isinstance(reference, Adapter):
        return reference
    if reference.part:
        raise UsageError(
            f"is for other models than the {reference.part} as well, and would be taken as a "
            "whole.",
            hint="Write that part with lorakit.save_adapter first.",
            file=reference.path,
        )
    return reference.path


def open_adapter(
    reference: str | Path | Adapter,
    *,
    allow_pickle: bool = False,
    dense: bool = False,
    base: str = "",
) -> Adapter:
    """The adapter at a path (folder or weight file) or hub id, from headers alone; one of another
    format as if it had been converted, with its factors in memory. An open one is returned.

    `dense` takes differences of whole weights and biases too, which a merge can. `base` is a
    checkpoint whose names those of the file may be, flattened.

    What a folder means is said by `lorakit.adapter.weight_file`.

    Raises:
        InputError: it is not there, corrupt, not what the hub has, in GGUF, or has no config.
        MisfitError: a module lacks one of its factors.
        HubError: the hub does not give it.
    """
    if isinstance(reference, Adapter):
        return reference
    given = locate(str(reference), PATTERNS, allow_pickle=allow_pickle)
    with reading(given.path):
        located = replace(given, path=weight_file(given.path))
        opened = _opened(given, located, allow_pickle=allow_pickle, dense=dense, base=base)
    check_promise(opened.path, lambda: opened.sha256)
    return opened


def _opened(
    given: Located, located: Located, *, allow_pickle: bool, dense: bool, base: str
) -> Adapter:
    path = located.path
    if path.suffix == ".gguf":
        raise InputError(
            "is in GGUF, whose names and order of rows only the base tells.",
            hint=f"lorakit convert {path} --to peft --base BASE -o OUT",
            file=path,
        )
    plain = path.name in PEFT_FILES or (path.parent / NAME).exists()
    config = read_config(path.parent) if plain and not is_mlx(path) else AdapterConfig()
    tuner = config.peft_type in TUNERS
    if not plain or is_mlx(path) or tuner:
        from lorakit.adapter.files.foreign import open_foreign

        foreign = open_foreign(
            located, dense=dense, base=base, tuner=tuner, allow_pickle=allow_pickle
        )
        if foreign:
            return foreign
        if given.path.is_dir() and not plain:
            raise no_adapter(given.path, [], [path])
    source = open_part(path, allow_pickle=allow_pickle)
    adapter = read_adapter(located, config, source)
    return replace(adapter, parts=by_model(adapter))


def read_adapter(
    located: Located,
    config: AdapterConfig,
    source: Part,
    *,
    tuner: str = "",
    cuts: Mapping[str, tuple[int, int]] = MappingProxyType({}),
) -> Adapter:
    """The adapter whose tensors are in `source`; `tuner` as of the Adapter; `cuts` are the rows
    that are meant of some modules' Kronecker products.

    Raises:
        MisfitError: a module lacks one of its factors, two tensors claim the same place, one was
            not gathered, or the norms of DoRA are missing.
    """
    found: dict[str, Module] = {}
    roles: dict[str, dict[str, TensorInfo]] = {}
    full: dict[str, TensorInfo] = {}
    unused = []
    for name, info in source.infos.items():
        key = parse(name)
        _check_key(key, name, located.path)
        if key.role in ("training", "original"):
            unused.append(name)
            continue
        _check_gathered(info, located.path)
        if key.role == "full":
            place, slot = full, f"{key.module}.{key.parameter}".lstrip(".")
        else:
            wrapped = key.module + ".base_layer" * key.levels
            place, slot = roles.setdefault(wrapped, {}), key.role
            if wrapped not in found:
                cut = cuts.get(key.module)
                found[wrapped] = Module(key.module, place, key.inner, key.levels, cut)
        if slot not in place:
            place[slot] = info
        elif same_bytes(source, place[slot], source, info):
            unused.append(name)  # PEFT writes a saved embedding under two names
        else:
            raise MisfitError(
                f"{name!r} and {place[slot].name!r} claim the same place.", file=located.path
            )
    for module in found.values():
        check_module(module, config, located.path)
    _check_magnitudes(found.values(), config, located.path)
    return Adapter(located, config, source, found, full, tuple(unused), tuner=tuner)


def _check_key(key: Key, name: str, file: object) -> None:
    if key.role == "adalora":
        raise InputError(
            f"{name!r} belongs to AdaLoRA, and its config says that it is LoRA.",
            hint="Add the config that the training wrote.",
            file=file,
            tensor=name,
        )


def _check_magnitudes(modules: Iterable[Module], config: AdapterConfig, file: object) -> None:
    """Refuse an adapter that is DoRA's by its config, and of which no magnitude is left."""
    adapted = [m for m in modules if m.low_rank]
    if config.raw.get("use_dora") and adapted and not any("magnitude" in m.roles for m in adapted):
        raise MisfitError(
            "its config says use_dora, and no module has a lora_magnitude_vector.",
            hint="Save it again, the norms are missing; if it is plain LoRA, set use_dora to false "
            "in adapter_config.json.",
            file=file,
        )


def _check_gathered(info: TensorInfo, file: object) -> None:
    if info.shape == (0,):
        raise MisfitError(
            f"{info.name!r} has no numbers: DeepSpeed's ZeRO-3 had parted it when it was saved.",
            hint="Save it with stage3_gather_16bit_weights_on_model_save, or get the weights out "
            "of its checkpoint with zero_to_fp32.py.",
            file=file,
            tensor=info.name,
        )
