"""A picture of an adapter: its singular values, and how strong it is in each layer and module."""

import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from lorakit.errors import OutputError, UsageError
from lorakit.store.writing import write_file
from lorakit.verbs.inspect.spectra import Spectrum

FORMATS = (".png", ".svg", ".pdf")
LINES = 10  # kinds of modules that have a colour of their own
LARGEST = 60.0  # inches
# What would make a file differ from one run to the next.
TIMELESS: dict[str, dict[str, Any]] = {
    ".svg": {"metadata": {"Date": None}},
    ".pdf": {"metadata": {"CreationDate": None}},
}


def check_plot(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a picture that cannot be made.

    Raises:
        UsageError: it is of a format that is none, or matplotlib is not installed.
        OutputError: it exists, or its folder does not.
    """
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--plot {path.name}: a picture ends in {', '.join(FORMATS)}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            "--plot needs matplotlib, which is not installed.",
            hint="Install it: pip install 'lorakit[plot]'",
        )
    if os.path.exists(path) and not overwrite:
        raise OutputError(
            "the picture exists.", hint="Pass --overwrite or another name.", file=path
        )
    if not os.path.isdir(path.parent):
        raise OutputError("there is no such folder.", hint="Make it first.", file=path.parent)


def draw(spectra: Sequence[Spectrum], path: Path, title: str) -> None:
    """Write the picture: singular values by kind of module, norms by layer and kind.

    Raises:
        OutputError: it cannot be written there.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    layers, kinds, norms = _grid(spectra)
    size = (
        min(LARGEST, 9.0 + 0.3 * len(kinds)),
        min(LARGEST, max(4.5, 2.0 + 0.18 * len(layers))),
    )
    suffix = path.suffix.lower()
    with mpl.rc_context({"svg.hashsalt": "lorakit", "font.size": 8}):
        figure = Figure(figsize=size, layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(4, max(4, 0.4 * len(kinds))))
        figure.suptitle(title)
        _draw_values(left, _by_kind(spectra))
        image = _draw_norms(right, layers, kinds, norms)
        figure.colorbar(image, ax=right, label="Frobenius norm of the delta")
        data = io.BytesIO()
        figure.savefig(data, format=suffix[1:], dpi=150, **TIMELESS.get(suffix, {}))
    write_file(path, data.getvalue(), sync=False)


def _draw_values(axes: Any, kinds: Mapping[str, Sequence[Sequence[float]]]) -> None:
    """The singular values over the largest: of each kind the median over its modules."""
    for number, (kind, spectra) in enumerate(kinds.items()):
        count = max(len(s) for s in spectra)
        line = [median([s[i] for s in spectra if len(s) > i]) for i in range(count)]
        style = {"label": kind} if number < LINES else {"color": "0.8", "zorder": 0}
        axes.plot(range(1, count + 1), line, marker=".", linewidth=1, **style)
    axes.set(xlabel="singular value", ylabel="of the largest (median)", yscale="log")
    axes.set_title("singular values")
    axes.legend(fontsize=6, loc="lower left")


def _draw_norms(
    axes: Any, layers: Sequence[str], kinds: Sequence[str], norms: Sequence[Sequence[float]]
) -> Any:
    image = axes.imshow(norms, aspect="auto", interpolation="nearest", vmin=0.0)
    axes.set_xticks(range(len(kinds)), kinds, rotation=90)
    axes.set_yticks(range(len(layers)), layers)
    axes.set(ylabel="layer")
    axes.set_title("norms")
    return image


def _by_kind(spectra: Sequence[Spectrum]) -> dict[str, list[list[float]]]:
    """The spectra of each kind of module, over their largest value; those of zeros are left out."""
    found: dict[str, list[list[float]]] = {}
    for one in spectra:
        *_, kind = _place(one.name)
        for values in one.values:
            if values and values[0] > 0:
                scaled = [v / values[0] for v in values if v > 1e-12 * values[0]]
                found.setdefault(kind, []).append(scaled)
    return found or {"no update but of zeros": [[1.0]]}


def _grid(spectra: Sequence[Spectrum]) -> tuple[list[str], list[str], list[list[float]]]:
    """The layers, the kinds of modules, and the norm at each crossing, NaN where there is none."""
    places = {_place(one.name): one.norm for one in spectra}
    stems = list(dict.fromkeys(stem for stem, *_ in places))
    kinds = list(dict.fromkeys(kind for *_, kind in places))
    layers = sorted({(stems.index(s), numbers) for s, numbers, _ in places})
    labels = [
        " ".join([*([stems[stem]] * (len(stems) > 1)), ".".join(map(str, numbers))])
        for stem, numbers in layers
    ]
    nothing = float("nan")
    norms = [
        [places.get((stems[stem], numbers, kind), nothing) for kind in kinds]
        for stem, numbers in layers
    ]
    return labels, kinds, norms


def _place(name: str) -> tuple[str, tuple[int, ...], str]:
    """What comes before the first number in the name of a module, its numbers, and the rest."""
    segments = name.removesuffix(".weight").split(".")
    at = next((i for i, s in enumerate(segments) if s.isdecimal()), 0)
    numbers = tuple(int(s) for s in segments if s.isdecimal())
    kind = ["*" if s.isdecimal() else s for s in segments[at + bool(numbers) :]]
    return ".".join(segments[:at]), numbers, ".".join(kind)
