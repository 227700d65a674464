"""check: will an adapter load there, and completely; and if not, the command that makes it so.

Law: nothing is said to load that has an obstacle of the table; each obstacle has its line.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorakit.adapter.config import NAME, AdapterConfig
from lorakit.adapter.delta import Opened
from lorakit.adapter.files.parts import PEFT_NORMS, by_inputs
from lorakit.adapter.files.reading import METADATA
from lorakit.adapter.weight_file import PEFT, PEFT_FILES, weight_file
from lorakit.errors import DifferenceError, MisfitError, UsageError
from lorakit.formats.consumers import CONSUMERS, VLLM_RANKS, Consumer
from lorakit.formats.families import FAMILIES
from lorakit.formats.recognise import LANGUAGE
from lorakit.verbs.reformat import located, opened_file, told_in_config
from lorakit.verbs.reformat.formats import FOLDERS
from lorakit.verbs.reformat.job import Reformatting
from lorakit.verbs.reformat.options import ReformatOptions
from lorakit.verbs.reformat.respelling import shapes_of, unlike, unloaded


@dataclass(frozen=True)
class Obstacle:
    """What keeps an adapter from loading, or from loading completely, and what to type."""

    what: str
    then: str


@dataclass(frozen=True)
class Checked:
    """What was found: `obstacles` is empty if the adapter loads as it is."""

    path: str
    consumer: str
    format: str
    family: str
    modules: int
    obstacles: Sequence[Obstacle] = ()
    notes: Sequence[str] = ()

    @property
    def loads(self) -> bool:
        """Whether it loads, and completely."""
        return not self.obstacles

    def to_dict(self) -> dict[str, Any]:
        """The findings as plain data."""
        return {**asdict(self), "loads": self.loads}


class UnloadableError(DifferenceError):
    """An adapter does not load there; `checked` says why."""

    def __init__(self, checked: Checked) -> None:
        first = checked.obstacles[0]
        super().__init__(
            f"{checked.consumer} does not load it as it is: {first.what}.",
            hint=first.then,
            file=checked.path,
        )
        self.checked = checked

    def to_dict(self) -> dict[str, Any]:
        """The error with all obstacles."""
        return {**super().to_dict(), **self.checked.to_dict()}


def check(
    adapter: str | Path, consumer: str, *, base: str | Path = "", allow_pickle: bool = False
) -> Checked:
    """Whether `consumer`, a key of `lorakit.formats.consumers.CONSUMERS`, loads an adapter of any
    format as it is, from its headers and config. A file of GGUF or torchtune takes the folder of
    its `base`.

    Raises:
        UsageError: there is no such consumer.
        InputError, MisfitError: it is no adapter, or corrupt.
        HubError: the hub does not give it.
        UnloadableError: it does not; the error's `checked` has every obstacle.
    """
    if consumer not in CONSUMERS:
        raise UsageError(f"{consumer!r} is none of {', '.join(CONSUMERS)}.")
    # Where a file does not say its alpha, any will do: what loads does not depend on it.
    path = located(adapter, allow_pickle=allow_pickle)
    opened = opened_file(path, base=base, allow_pickle=allow_pickle, lora_alpha=1.0)
    wanted = CONSUMERS[consumer]
    config = AdapterConfig(opened.config, path)
    found = list(_of_format(opened, wanted, str(path)))
    if not found or found[0].then.startswith("lorakit convert"):
        for name in wanted.obstacles:
            found += OBSTACLES[name](opened, config, str(path))
    family = FAMILIES[opened.family].title if opened.family in FAMILIES else "a language model"
    checked = Checked(
        str(adapter), consumer, opened.format, family, len(opened.deltas), tuple(found)
    )
    if found:
        raise UnloadableError(checked)
    return checked


def _of_format(opened: Opened, wanted: Consumer, path: str) -> Iterator[Obstacle]:
    language = opened.family == LANGUAGE
    if language != wanted.language and wanted.name != "peft":
        what = "language models" if wanted.language else "images and video"
        yield Obstacle(f"it is for {what}", "Take another consumer.")
        return
    if opened.format not in wanted.formats:
        yield Obstacle(
            f"it is in the format {opened.format!r}",
            f"lorakit convert {path} -o OUT --to {wanted.formats[0]}"
            + (" --base BASE" if "gguf" in wanted.formats or opened.format == "torchtune" else "")
            + (" --lora-alpha A" if opened.format == "torchtune" else ""),
        )
    if (
        opened.extras
        and not opened.format == wanted.name == "mlx"
        and not (wanted.name in ("peft", "vllm", "sglang", "llama.cpp") and opened.config)
    ):
        name = next(iter(opened.extras))
        yield Obstacle(
            f"{len(opened.extras)} tensors belong to no module, such as {name!r}",
            f"lorakit convert {path} -o OUT --to {wanted.formats[0]} --drop REGEX",
        )


Found = Iterator[Obstacle]


def _dora(opened: Opened, config: AdapterConfig, path: str) -> Found:
    if any("magnitude" in d.tensors for d in opened.deltas):
        then = f"lorakit extract BASE --adapter {path} -o OUT --rank R, or merge it"
        yield Obstacle("it is a DoRA", then)


def _patterns(opened: Opened, config: AdapterConfig, path: str) -> Found:
    ranks = {d.rank for d in opened.deltas if d.algo == "lora"}
    if config.raw.get("rank_pattern") or config.raw.get("alpha_pattern") or len(ranks) > 1:
        what = "modules have ranks or alphas of their own, and it takes one of each"
        yield Obstacle(what, f"lorakit edit {path} -o OUT --flatten")


def _bias(opened: Opened, config: AdapterConfig, path: str) -> Found:
    trained = config.raw.get("bias", "none") not in (None, "none")
    if trained or any("bias" in d.tensors for d in opened.deltas):
        yield Obstacle("it has biases", f"lorakit merge BASE {path} -o OUT")


def _saved(opened: Opened, config: AdapterConfig, path: str) -> Found:
    if names := config.raw.get("modules_to_save"):
        what = f"it replaces whole modules ({', '.join(map(str, names))})"
        yield Obstacle(what, f"lorakit merge BASE {path} -o OUT")


def _embeddings(opened: Opened, config: AdapterConfig, path: str) -> Found:
    known = set(config.raw.get("modules_to_save") or ())
    if opened.format == "mlx":  # experts, which it loads
        return
    left = [n for n in opened.extras if not any(m in n for m in known)]
    if left:
        what = f"it has tensors that are no factors, such as {left[0]!r}"
        yield Obstacle(what, f"lorakit merge BASE {path} -o OUT")


def _training(opened: Opened, config: AdapterConfig, path: str) -> Found:
    yield from (Obstacle(f"it {what}", then) for what, then in told_in_config(config, path))


def _rank(opened: Opened, config: AdapterConfig, path: str) -> Found:
    rank = max((d.rank for d in opened.deltas if d.algo == "lora"), default=0)
    if rank > VLLM_RANKS[-1]:
        what = f"its rank is {rank}, and {VLLM_RANKS[-1]} is the most"
        yield Obstacle(what, f"lorakit resize {path} -o OUT --rank {VLLM_RANKS[-1]}")


def _algorithm(opened: Opened, config: AdapterConfig, path: str) -> Found:
    other = sorted({d.algo for d in opened.deltas} - {"lora"})
    if exact := [a for a in other if a in ("loha", "lokr")]:
        yield Obstacle(
            f"modules are of {' and '.join(exact)}",
            f"lorakit convert {path} -o OUT --to diffusers",
        )
    if rest := [a for a in other if a not in ("loha", "lokr")]:
        yield Obstacle(f"modules are of {' and '.join(rest)}", "Leave them out with --drop REGEX.")


def _norms(opened: Opened, config: AdapterConfig, path: str) -> Found:
    if any(map(by_inputs, opened.deltas)):
        yield Obstacle("its DoRA norms are those of inputs", "Use it in ComfyUI.")


def _norms_of_peft(opened: Opened, config: AdapterConfig, path: str) -> Found:
    norms = [d.tensors["magnitude"] for d in opened.deltas if "magnitude" in d.tensors]
    if strange := [v for v in norms if PEFT_NORMS in v.key or len(v.shape) < 2]:
        what = f"its DoRA norms are not as kohya has them, such as {strange[0].key or 'those cut'}"
        yield Obstacle(what, f"lorakit convert {path} -o OUT --to comfyui")


def _spelling(opened: Opened, config: AdapterConfig, path: str) -> Found:
    """Of what is in the format at all, and plain: the other obstacles are said by others."""
    plain = all(d.algo in ("lora", "set") and not by_inputs(d) for d in opened.deltas)
    if opened.format != "diffusers" or not plain or any("mid" in d.tensors for d in opened.deltas):
        return
    try:
        made = Reformatting(Path(path), opened, ReformatOptions(to="diffusers")).made()
    except MisfitError as error:
        yield Obstacle(error.message.rstrip("."), error.hint)
        return
    given = shapes_of(opened.deltas)
    if name := unlike(given, made, "diffusers"):
        what = f"{name!r} is not what it reads" if name in given else f"it lacks {name!r}"
        yield Obstacle(what, f"lorakit convert {path} -o OUT --to diffusers")


def _encoders(opened: Opened, config: AdapterConfig, path: str) -> Found:
    if left := unloaded(opened, opened.deltas):
        what = f"it loads no adapters of {' and '.join(left)}"
        yield Obstacle(what, f"lorakit merge PIPELINE {path} -o OUT")


def _metadata(opened: Opened, config: AdapterConfig, path: str) -> Found:
    if METADATA in opened.metadata:
        what = "its scalings are in the metadata, which it does not read"
        yield Obstacle(what, f"lorakit convert {path} -o OUT --to comfyui")


def _config_beside(to: str, opened: Opened, config: AdapterConfig, path: str) -> Found:
    """For what reads files of the format `to`, and no config."""
    if not config.raw or opened.format in FOLDERS:
        return
    if any(isinstance(d.alpha, int | float) and d.scaling != 1 for d in opened.deltas):
        what = f"its scalings are in {NAME} beside it, which is not read"
        yield Obstacle(what, f"lorakit convert {path} -o OUT --to {to}")


def _config(opened: Opened, config: AdapterConfig, path: str) -> Found:
    if opened.format == "peft" and not config.raw:
        yield Obstacle(f"no {NAME} is beside it", "Add the one that the training wrote.")


def _name(opened: Opened, config: AdapterConfig, path: str) -> Found:
    name = weight_file(Path(path)).name
    if name not in PEFT_FILES:
        yield Obstacle(f"its weight file is called {name!r}", f"Call it {PEFT}.")


OBSTACLES: dict[str, Callable[[Opened, AdapterConfig, str], Found]] = {
    "dora": _dora,
    "patterns": _patterns,
    "bias": _bias,
    "modules_to_save": _saved,
    "embeddings": _embeddings,
    "training": _training,
    "rank": _rank,
    "algorithm": _algorithm,
    "norms of inputs": _norms,
    "norms of PEFT": _norms_of_peft,
    "spelling": _spelling,
    "text encoders": _encoders,
    "config": _config,
    "scaling in metadata": _metadata,
    "scaling in a config, for diffusers": partial(_config_beside, "diffusers"),
    "scaling in a config, for comfyui": partial(_config_beside, "comfyui"),
    "name of the file": _name,
}
