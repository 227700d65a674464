"""The small files of a base that go along: config, tokenizer, chat template, custom code; never
weights of the model itself. Of sentence-transformers, the weights of the modules behind the model
(`2_Dense/model.safetensors`) go along.

They are copied byte for byte and never imported; `modules.json` alone is parsed.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lorakit.store.reading import read_file, reading

# Weights by their names: of torch, Flax, TensorFlow, Rust, ONNX, Core ML, Paddle, llama.cpp and
# others. They are no small files, and those of the base are not those of the result.
WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|pte|gguf|ggml|h5|hdf5|keras|msgpack|npz|ot|pb|tflite|mlmodel"
    r"|onnx|onnx[._]data(_\d+)?|data-\d+-of-\d+|pdparams|nemo|engine|llamafile)",
    re.DOTALL,
)
INDEX = re.compile(r"\.index(\.\w+)?\.json$")  # of a variant too: .index.fp16.json
# What sentence-transformers lists its modules in, and calls the weights of one.
MODULES = "modules.json"
MODULE = re.compile(r"(model\.safetensors|pytorch_model\.bin)")
CONFIG = "adapter_config.json"
LEFT = frozenset({"README.md", "lorakit.json", CONFIG})
# What an adapter carries of its own when its training added tokens.
TOKENIZER = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
]


def companions(folder: Path) -> dict[str, Path]:
    """The files to copy, by their path relative to the folder, in sorted order.

    Raises:
        InputError: a folder cannot be read.
    """
    with reading(folder):
        files = (*_walk(folder), *_of_modules(folder))
        found = {str(p.relative_to(folder)): p for p in files}
    return dict(sorted(found.items()))


def _of_modules(folder: Path) -> Iterator[Path]:
    """The weights of the modules around a model of sentence-transformers, each in its folder."""
    listed: object = None
    with suppress(OSError, ValueError, RecursionError):
        listed = json.loads((folder / MODULES).read_bytes())
    for entry in listed if isinstance(listed, list) else ():
        name = entry.get("path") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name != Path(name).name or name[:1] in ("", "."):
            continue
        if (folder / name).is_dir():
            yield from (f for f in sorted((folder / name).iterdir()) if MODULE.fullmatch(f.name))


def beside_adapter(folder: Path) -> dict[str, bytes]:
    """What the small files of an adapter's folder hold, its card among them, by name; those in
    folders of their own stay behind. Without a config it is no adapter's folder, and none is its.

    Raises:
        InputError: one cannot be read.
    """
    if not (folder / CONFIG).is_file():
        return {}
    found = {n: p for n, p in companions(folder).items() if "/" not in n}
    if (card := folder / "README.md").is_file():
        found[card.name] = card
    return {name: read_file(path) for name, path in found.items()}


def own_tokenizer(folder: Path) -> dict[str, Path]:
    """The tokenizer and chat template files that an adapter's folder has of its own."""
    return {n: folder / n for n in TOKENIZER if (folder / n).is_file()}


def _walk(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.name in LEFT:
            continue
        if entry.is_dir():
            if not entry.is_symlink() and not entry.name.endswith(".partial"):
                yield from (p for p in _walk(entry) if os.access(p, os.R_OK))
        elif _is_small(entry):
            yield entry


def _is_small(entry: Path) -> bool:
    """Whether it is to go along: no weights, and a file, or a link to what should be one."""
    if WEIGHTS.fullmatch(entry.name) or INDEX.search(entry.name):
        return False
    return not entry.name.endswith(".partial") and (entry.is_file() or not entry.exists())
