"""What values of options mean: sizes, patterns, devices."""

import re
from typing import TYPE_CHECKING, Any

import click

from lorakit.errors import UsageError
from lorakit.tensors import bytes_in

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class Size(click.ParamType[int]):
    """A number of bytes: 500MB, 2GB, 1.5GiB, 100000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The bytes that a text like 1.5GiB means."""
        try:
            return bytes_in(value)
        except UsageError as error:
            self.fail(error.message, param, ctx)


class Place(click.ParamType[str]):
    """A path, or a hub id: any text, which a shell completes as a path."""

    name = "place"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> "list[CompletionItem]":
        """That the shell shall look for files."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text."""
        return str(value)


class Word(click.ParamType[str]):
    """One of a few words with blanks between, which a shell completes and the verb checks."""

    name = "word"

    def __init__(self, words: str) -> None:
        self.words = words.split()

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> "list[CompletionItem]":
        """Those that begin so."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(word) for word in self.words if word.startswith(incomplete)]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text."""
        return str(value)


class Pattern(click.ParamType[str]):
    """A regular expression; with `pair`, one with what replaces it: REGEX=REPL."""

    name = "regex"

    def __init__(self, *, pair: bool = False) -> None:
        self.pair = pair

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, once it is known to be what it should."""
        if not (value or self.pair):
            return ""  # as by default
        import regex

        pattern, equals, replacement = str(value).partition("=")
        if self.pair and not equals:
            self.fail(f"{value!r} is not REGEX=REPLACEMENT.", param, ctx)
        try:
            regex.sub(pattern if self.pair else str(value), replacement if self.pair else "", "")
        except regex.error as error:
            self.fail(f"{value!r} is no regular expression: {error}.", param, ctx)
        return str(value)


class Pair(click.ParamType[tuple[str, float]]):
    """REGEX=NUMBER."""

    name = "pair"

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.kind = kind

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float]:
        """The pattern and its number."""
        if isinstance(value, tuple):
            return value
        pattern, _, number = str(value).rpartition("=")
        Pattern().convert(pattern, param, ctx)
        try:
            return pattern, self.kind(number)
        except ValueError:
            self.fail(f"{value!r} is not REGEX=NUMBER.", param, ctx)


class DeviceName(click.ParamType[str]):
    """What folds: cpu, cuda for every GPU there is, or cuda:N. torch is not asked yet."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, once it is the name of something that could be there."""
        if not re.fullmatch(r"cpu|cuda(:\d+)?", str(value)):
            self.fail(f"{value!r} is no device. Write cpu, cuda or cuda:0.", param, ctx)
        return str(value)
