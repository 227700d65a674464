"""Which file of a folder is an adapter, by the names that libraries give their files.

A new library: the name of its file here.
"""

from collections.abc import Sequence
from pathlib import Path

from lorakit.adapter.config import NAME
from lorakit.errors import InputError
from lorakit.store.reading import reading

PEFT = "adapter_model.safetensors"
PEFT_FILES = (PEFT, "adapter_model.bin")
DIFFUSERS = "pytorch_lora_weights.safetensors"
MLX = "adapters.safetensors"
NAMELESS = (*PEFT_FILES, DIFFUSERS, MLX)  # which are called by their folder
OTHERS = ("*.safetensors", "*.gguf")  # which have names of their own


def weight_file(path: Path) -> Path:
    """The weight file of an adapter's folder, or the file itself.

    Where no file has a name that a library gives it, the only other one is taken, or what the only
    subfolder with a config of PEFT has. Whether it is an adapter is not looked at.

    Raises:
        InputError: there is none, it cannot be read, or nothing says which of several.
    """
    with reading(path):
        return _weight_file(path)


def _weight_file(path: Path) -> Path:
    if path.is_file():
        return path
    for name in NAMELESS:
        if (path / name).is_file():
            return path / name
    folders = sorted(p.parent for p in path.glob(f"*/{NAME}"))
    files = sorted(p for pattern in OTHERS for p in path.glob(pattern))
    if len(folders) + len(files) == 1:
        return _weight_file((folders + files)[0])
    raise no_adapter(path, folders, files)


def is_mlx(file: Path) -> bool:
    """Whether a weight file is MLX's, or an earlier save of its training such as
    0000100_adapters.safetensors: beside it lies a config, of the same name as PEFT's.
    """
    return f"_{file.name}".endswith(f"_{MLX}") and (file.parent / NAME).is_file()


def no_adapter(path: Path, folders: Sequence[Path], files: Sequence[Path]) -> InputError:
    """The error of a folder in which these may be adapters, or none is."""
    names = [p.name for p in (*folders, *files)]
    listed = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    if folders and not files:
        return InputError(f"holds {len(names)} adapters.", hint=f"Name one: {listed}.", file=path)
    hint = f"If one of these is the adapter, name it: {listed}." if names else ""
    return InputError(
        f"no adapter is in it: no file is called {PEFT}.",
        hint=hint or "`lorakit inspect` says what is there.",
        file=path,
    )
