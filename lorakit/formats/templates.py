"""Names of modules by templates, read in every direction: of the original code, of ComfyUI and of
Diffusers; with dots, or flattened to underscores.

Law: `fill` of what `find` gives in the same namespace is the name itself; a name that no template
matches as a whole is not known.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from lorakit.formats.families import ENCODERS, FAMILIES, Pairs
from lorakit.formats.families.text import OPEN_CLIP

NAMESPACES = ("diffusers", "original", "comfy")
_BRACES = re.compile(r"\{([^{}+]*,[^{}+]*)\}")
_FUSED = re.compile(r"\{([^{}]*\+[^{}]*)\}")
_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Row:
    """A module of the original code, and the one or several that Diffusers makes of its rows."""

    original: str
    parts: tuple[str, ...]
    swap: str = ""  # "all", or "last": only where the rows are twice the inputs
    even: bool = False  # the parts have as many rows each
    grouped: bool = False  # keys and values may have fewer rows than queries
    kernel: tuple[int, ...] = ()  # of a convolution
    head: int = 0  # rows of a head, where DiffSynth-Studio has the parts head by head
    turned: bool = False  # a bare parameter, (in, out)
    bare: bool = False  # a bare parameter, as Diffusers has it
    ratio: tuple[int, ...] = ()  # of rows to inputs, where that tells the family

    def sizes(self, height: int, width: int) -> list[int]:
        """The rows of the parts, of a weight of this shape: queries have as many as there are
        inputs, keys and values half of the rest (of three), or as many (of four, the last having
        what is left); or all have as many. Without inputs (0) nothing tells but of three alike.
        """
        count, each = len(self.parts), width
        if self.even or (count == 3 and not self.grouped and not width):
            each = height // count
        elif not width:
            return []
        elif count == 3:
            other = (height - width) // 2
            return [width, other, height - width - other]
        return [each] * (count - 1) + [height - (count - 1) * each]

    def swaps(self, height: int, width: int) -> bool:
        """Whether the halves of the rows of such a weight are the other way round in Diffusers."""
        return self.swap == "all" or (self.swap == "last" and height == 2 * width)


@dataclass(frozen=True)
class Found:
    """A module that a name means: its row, the numbers in it, and which part; None: all of them."""

    row: Row
    numbers: tuple[str, ...]
    part: int | None


@dataclass(frozen=True, eq=False)
class Names:
    """The modules of one component; one object for each, by which its index is found."""

    rows: tuple[Row, ...]
    comfy: Pairs = ()

    def find(self, name: str, namespace: str, *, flat: bool = False) -> Found | None:
        """The module of this name, None if there is none."""
        for spelled, row, part in _index(self, namespace, flat).get(numberless(name), ()):
            if match := _pattern(spelled).fullmatch(name):
                return Found(row, match.groups(), part)
        return None

    def knows(self, shape: str, namespace: str, *, flat: bool = False) -> bool:
        """Whether a module may have a name that is `numberless` so."""
        return shape in _index(self, namespace, flat)

    def fill(self, found: Found, namespace: str, *, flat: bool = False) -> str:
        """The name of a module; in the original names, that of all its parts."""
        if namespace == "diffusers":
            template = found.row.parts[found.part or 0]
        else:
            template = self._spelled(found.row.original, namespace)
        return _flattened(filled(template, found.numbers), flat=flat)

    def templates(self, namespace: str) -> Iterator[tuple[str, Row, int | None]]:
        """Every template of a namespace, with the row and the part that it means."""
        for row in self.rows:
            if namespace == "diffusers":
                yield from ((part, row, number) for number, part in enumerate(row.parts))
            else:
                yield self._spelled(row.original, namespace), row, None

    def _spelled(self, original: str, namespace: str) -> str:
        for old, new in self.comfy if namespace == "comfy" else ():
            original = original.replace(old, new)
        return original


def numberless(name: str) -> str:
    """A name with `#` for every number in it."""
    return _NUMBER.sub("#", name)


def filled(template: str, numbers: tuple[str, ...]) -> str:
    """A template with its numbers."""
    pieces = template.split("#")
    return "".join(a + b for a, b in zip(pieces, (*numbers, ""), strict=True))


@cache
def denoiser(family: str, namespace: str = "") -> Names:
    """The modules of a family's denoiser, as they are in a namespace."""
    known = FAMILIES[family]
    rows = known.comfy_rows if namespace == "comfy" else ""
    return Names(rows_of(rows or known.rows), known.comfy)


@cache
def encoder(kind: str) -> Names:
    """The modules of a text encoder."""
    rows, spelled = ENCODERS[kind]
    return Names(rows_of(rows), spelled)


@cache
def open_clip() -> Names:
    """The modules of a CLIP by the names of open_clip, which are the original ones here."""
    return Names(rows_of(OPEN_CLIP))


@cache
def rows_of(text: str) -> tuple[Row, ...]:
    """The rows of a table."""
    return tuple(row for line in text.split("\n") if line.strip() for row in _rows(line.strip()))


def _rows(line: str) -> Iterator[Row]:
    names, *marks = line.split(" @")
    swap = {"swap": "all", "swap-last": "last"}.get("".join(marks), "")
    head, size = int(_mark(marks, "head-")), int(_mark(marks, "conv-"))
    ratio = tuple(int(x) for x in _mark(marks, "rows-").split("/") if x != "0")
    even, grouped = "even" in marks or bool(head), "grouped" in marks
    left, _, right = names.partition(" = ")
    for one, other in zip(_each(left), _each(right or left), strict=True):
        fused = _FUSED.search(other)
        parts = fused[1].split("+") if fused else [""]
        yield Row(
            one,
            tuple(_FUSED.sub(part, other) for part in parts),
            swap,
            even,
            grouped,
            (size,) * 2 * bool(size),
            head,
            "turned" in marks,
            "bare" in marks,
            ratio,
        )


def _mark(marks: Sequence[str], mark: str) -> str:
    """What a mark says, "0" where there is none."""
    return next((m.removeprefix(mark) for m in marks if m.startswith(mark)), "0")


def _each(template: str) -> list[str]:
    """One template for each alternative: all braces of a line move on together."""
    braces = [m[1].split(",") for m in _BRACES.finditer(template)]
    if not braces:
        return [template]
    found = []
    for i in range(max(map(len, braces))):
        one = template
        for words in braces:
            one = _BRACES.sub(words[i], one, count=1)
        found.append(one)
    return found


def _flattened(name: str, *, flat: bool) -> str:
    return name.replace(".", "_") if flat else name


Index = dict[str, list[tuple[str, Row, int | None]]]


@cache
def _index(names: Names, namespace: str, flat: bool) -> Index:
    found: Index = defaultdict(list)
    for template, row, part in names.templates(namespace):
        spelled = _flattened(template, flat=flat)
        found[numberless(spelled)].append((spelled, row, part))
    return dict(found)


@cache
def _pattern(spelled: str) -> re.Pattern[str]:
    """What a template matches; only few of all are ever asked for."""
    return re.compile(r"(\d+)".join(map(re.escape, spelled.split("#"))))
