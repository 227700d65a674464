"""check: will an adapter load there, and completely; and if not, the command that makes it so.

Law: nothing is said to load that has an obstacle of the table; each obstacle has its line.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lorakit.adapter.adapter import Adapter, file_of
from lorakit.adapter.config import AdapterConfig
from lorakit.adapter.delta import Opened
from lorakit.errors import DifferenceError, UsageError
from lorakit.formats.consumers import CONSUMERS, Consumer
from lorakit.formats.families import FAMILIES
from lorakit.formats.recognise import LANGUAGE
from lorakit.verbs.check.obstacles import OBSTACLES, Obstacle
from lorakit.verbs.reformat import located, opened_file


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
    adapter: str | Path | Adapter,
    consumer: str,
    *,
    base: str | Path = "",
    allow_pickle: bool = False,
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
    adapter = file_of(adapter)
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
    found.sort(key=_order)
    checked = Checked(
        str(adapter), consumer, opened.format, family, len(opened.deltas), tuple(found)
    )
    if found:
        raise UnloadableError(checked)
    return checked


def _order(obstacle: Obstacle) -> int:
    """Where an obstacle stands: what `convert` cures comes after what it stops at."""
    if not obstacle.then.startswith("lorakit convert"):
        return 0
    return 1 if "--drop" in obstacle.then or "--names" in obstacle.then else 2


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
