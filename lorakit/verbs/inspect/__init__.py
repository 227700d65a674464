"""inspect: what a path or hub id is, from headers alone, without NumPy; and an adapter's spectrum,
from its factors, where that is asked for.
"""

from dataclasses import replace
from pathlib import Path

from lorakit.adapter.adapter import Adapter, file_of, open_adapter
from lorakit.adapter.config import NAME
from lorakit.adapter.weight_file import DIFFUSERS, MLX, PEFT_FILES
from lorakit.errors import InputError
from lorakit.store.checkpoint import INDEX, open_checkpoint
from lorakit.store.hub import locate
from lorakit.store.hub_id import PICKLES
from lorakit.store.reading import reading
from lorakit.verbs.choices import READING, check_choices
from lorakit.verbs.inspect.kinds import (
    BARE,
    Inspected,
    of_adapter,
    of_base,
    of_gguf,
    of_index,
    of_loose_adapter,
)

# Files that lie in a checkpoint or adapter folder beside the tensors.
COMPANIONS = (".json", ".txt", ".md", ".model", ".jinja")


def inspect(
    reference: str | Path | Adapter,
    *,
    allow_pickle: bool = False,
    spectrum: bool = False,
    plot: str | Path = "",
    overwrite: bool = False,
    expert_packing: str = "peft",
) -> Inspected:
    """What is at a path or hub id, or an open adapter. With `spectrum`, the singular values of an
    adapter as well; with `plot`, a picture of them in a .png, .svg or .pdf (which takes
    matplotlib), in place of one that exists only with `overwrite`.

    Raises:
        InputError: there is nothing, or it is corrupt, or has no spectrum.
        HubError: the hub does not give it.
        UsageError, OutputError: the picture cannot be made.
    """
    if plot:
        from lorakit.verbs.inspect.plotting import check_plot

        check_plot(Path(plot), overwrite=overwrite)
    reference = file_of(reference)
    found = _inspected(reference, allow_pickle=allow_pickle)
    if not (spectrum or plot):
        return found
    return _with_spectra(found, str(reference), plot, (allow_pickle, expert_packing))


def _with_spectra(
    found: Inspected, reference: str, plot: str | Path, reading: tuple[bool, str]
) -> Inspected:
    """The same with the spectra of an adapter, drawn if that is asked for."""
    from lorakit.verbs.inspect.plotting import draw
    from lorakit.verbs.inspect.spectra import spectra

    allow_pickle, packing = reading
    check_choices({"expert_packing": packing}, READING)
    if found.kind != "adapter" or found.facts.get("format") == BARE:
        raise InputError(
            "is no adapter with its config: it has no spectrum.",
            hint="Leave out --spectrum and --plot.",
            file=found.path,
        )
    adapter = open_adapter(reference, allow_pickle=allow_pickle)
    computed = spectra(adapter, packing=packing)
    if plot:
        draw(computed, Path(plot), reference)
    dora = any("magnitude" in m.roles for m in adapter.modules.values())
    note = ["The spectrum is that of the low-rank parts: DoRA's delta depends on the base."] * dora
    return replace(found, spectra=computed, notes=[*found.notes, *note])


def _inspected(reference: str | Path, *, allow_pickle: bool) -> Inspected:
    """What is told from headers alone."""
    located = locate(str(reference), allow_pickle=allow_pickle)
    with reading(located.path):
        found = _found(located.path, allow_pickle=allow_pickle)
    if located.repo:
        return replace(found, facts={"hub": f"{located.repo}@{located.revision}", **found.facts})
    return found


def _found(path: Path, *, allow_pickle: bool) -> Inspected:
    if path.is_file() and path.name.endswith(INDEX):
        return of_index(path)
    if gguf := _only_gguf(path):
        return of_gguf(gguf)
    if path.is_file() and path.suffix not in (".safetensors", *PICKLES):
        raise InputError(
            "is no file of tensors that this version reads "
            "(.safetensors, .index.json, .bin, .gguf).",
            hint="Name the folder around it." if path.suffix in COMPANIONS else "",
            file=path,
        )
    if path.suffix in PICKLES and not allow_pickle:
        note = "A pickle can run code when it is read. --allow-pickle reads it with a safe loader."
        return Inspected(str(path), "pickle", {"bytes": path.stat().st_size}, notes=[note])
    if _holds_adapter(path):
        return of_adapter(open_adapter(path, allow_pickle=allow_pickle))
    named = (path / name for name in (DIFFUSERS, MLX) if (path / name).is_file())
    checkpoint = open_checkpoint(str(next(named, path)), allow_pickle=allow_pickle)
    return of_loose_adapter(checkpoint) or of_base(checkpoint)


def _holds_adapter(path: Path) -> bool:
    if not path.is_dir():
        return path.name in PEFT_FILES and (path.parent / NAME).exists()
    return any((path / n).exists() for n in PEFT_FILES) or (
        not any(path.glob("*.safetensors")) and len(list(path.glob(f"*/{NAME}"))) > 0
    )


def _only_gguf(path: Path) -> Path | None:
    """A file of GGUF, or the only one in a folder without other weights."""
    if not path.is_dir():
        return path if path.suffix == ".gguf" else None
    files = [p for p in path.iterdir() if p.suffix in (".gguf", ".safetensors", *PICKLES)]
    return files[0] if len(files) == 1 and files[0].suffix == ".gguf" else None
