"""The LoRA of llama.cpp: GGUF with one alpha for all modules.

Law: what is written has the update of every module, its rows in llama.cpp's order. Where alphas
differ the most common one is written, and B has the ratio to it, which is exact for powers of two.

Source: ggml-org/llama.cpp, convert_lora_to_gguf.py and src/llama-adapter.cpp
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorakit.adapter.delta import Delta, Opened, Values
from lorakit.adapter.files.parts import common, computed, times
from lorakit.adapter.files.writing import Step, Tensors
from lorakit.errors import InputError, MisfitError, UsageError
from lorakit.formats.llama_cpp import ARCHITECTURES, HEADS, Architecture, heads_of
from lorakit.formats.recognise import LANGUAGE
from lorakit.math.cast import code_of, widen
from lorakit.math.surgery import halved, interleaved
from lorakit.store.writing import reporting, sync_path

Array = NDArray[Any]
Config = Mapping[str, Any]
ENDINGS = {"a": ".weight.lora_a", "b": ".weight.lora_b"}
ALPHA = "adapter.lora.alpha"
DTYPES = ("F32", "F16")
LAYERS = 10_000  # more than any model has


def read_gguf(path: Path, config: Config) -> Opened:
    """The adapter in such a file, in the names of the base with this config.

    Raises:
        UsageError: the gguf package is not installed.
        InputError: it is no adapter, or of another model.
        MisfitError: a tensor is no part of a linear layer's update, or of another dtype.
    """
    if not config:
        raise InputError(
            "is in GGUF, whose names and order of rows only the base tells.",
            hint="Name the folder of the base with --base.",
            file=path,
        )
    gguf, known = _package(), architecture_of(config)
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise InputError(f"is no GGUF file: {error}.", file=path) from error
    kind, name = (_text(reader, f"general.{key}") for key in ("type", "architecture"))
    if kind != "adapter" or name != known.name:
        raise InputError(
            f"is {kind or 'no adapter'} of {name!r}, and the base is {known.name!r}.", file=path
        )
    modules: dict[str, dict[str, Values]] = {}
    names = {ours: module for module, ours in _names(config).items()}
    for tensor in reader.tensors:
        module, role = _meant(tensor, names, path)
        heads = _heads(module, int(tensor.shape[-1]), config) if role == "b" else 0
        modules.setdefault(module, {})[role] = _values(tensor, heads)
    if any(len(t) < 2 for t in modules.values()):
        raise MisfitError("a module lacks one of its factors.", file=path)
    found = reader.fields.get(ALPHA)
    alpha = float(found.contents()) if found else 0.0
    deltas = tuple(
        Delta("", m, "lora", t, alpha if alpha else None) for m, t in sorted(modules.items())
    )
    return Opened("gguf", LANGUAGE, "disk", deltas)


def _meant(tensor: Any, names: Mapping[str, str], path: Path) -> tuple[str, str]:
    """The module and the role of a tensor in such a file.

    Raises:
        MisfitError: it is no part of a linear layer's update, or of another dtype.
    """
    role = next((r for r, ending in ENDINGS.items() if tensor.name.endswith(ending)), "")
    module = names.get(tensor.name.removesuffix(ENDINGS.get(role, "")))
    if not role or module is None:
        raise MisfitError(
            f"{tensor.name!r} is no update of a linear layer that is known.",
            file=path,
            tensor=tensor.name,
        )
    if (dtype := tensor.tensor_type.name) not in DTYPES:
        raise MisfitError(
            f"{tensor.name!r} is of {dtype}, and {' and '.join(DTYPES)} are read.",
            hint="Convert it again with `convert_lora_to_gguf.py --outtype f16`.",
            file=path,
            tensor=tensor.name,
        )
    return module, role


def gguf_tensors(deltas: Sequence[Delta], config: Config) -> list[Tensors]:
    """The modules of an adapter as llama.cpp has them.

    Raises:
        InputError: lorakit does not know the model's tensors in llama.cpp.
        MisfitError: a module has no place there, or has what llama.cpp does not.
    """
    names = _names(config)
    alpha = common(d.scaling * d.rank for d in deltas)  # 0 would be a scaling of 1
    made = []
    for delta in deltas:
        name = names.get(delta.module)
        if name is None or delta.algo != "lora" or set(delta.tensors) != {"a", "b"}:
            strange = sorted(set(delta.tensors) - {"a", "b"})
            raise MisfitError(
                f"{delta.module!r} has no place in llama.cpp"
                + (f", which takes no {strange[0]}." if strange else "."),
                hint="lorakit merge and convert the result, or leave it out with --drop.",
                tensor=delta.module,
            )
        made.append(
            _of_one(delta, name, alpha, _heads(delta.module, delta.tensors["b"].shape[0], config))
        )
    return made


def write_gguf(path: Path, made: Sequence[Tensors], config: Config, *, sync: bool) -> int:
    """Write them to a file, durably with `sync`; its bytes.

    Raises:
        UsageError: the gguf package is not installed.
        ResourceError, OutputError: the disk is full, or there is no writing.
    """
    with reporting(path):
        _write(path, made, config)
        if sync:
            sync_path(path)
        return path.stat().st_size


def _write(path: Path, made: Sequence[Tensors], config: Config) -> None:
    gguf = _package()
    writer = gguf.GGUFWriter(path, architecture_of(config).name)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    first = made[0].delta
    assert first is not None
    writer.add_float32(ALPHA, float(first.alpha_value or 0.0))
    for tensors in made:
        for name, values in tensors.values.items():
            writer.add_tensor(name, np.ascontiguousarray(values.read()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def architecture_of(config: Config) -> Architecture:
    """What llama.cpp has of a model.

    Raises:
        InputError: lorakit does not know that.
    """
    kind = str(config.get("model_type") or "")
    if kind not in ARCHITECTURES:
        raise InputError(
            f"adapters of {kind or 'a model without config.json'} are not converted to GGUF.",
            hint=f"Known are {', '.join(ARCHITECTURES)}. Name the folder of the base with --base.",
        )
    return ARCHITECTURES[kind]


def _names(config: Config) -> dict[str, str]:
    """llama.cpp's name of every linear layer of a model, by its own; both without `.weight`.

    Raises:
        InputError: the config does not say how many layers there are, or knows no such model.
    """
    gguf = _package()
    wanted = architecture_of(config)
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == wanted.name)
    layers = config.get("num_hidden_layers")
    if type(layers) is not int or not 0 < layers <= LAYERS:
        raise InputError(
            f"the config of the base has num_hidden_layers {layers!r}.",
            hint="Take config.json from where the base came from.",
        )
    known = gguf.get_tensor_name_map(arch, layers)
    found: dict[str, str] = {}
    for layer in range(layers):
        for leaf in wanted.leaves:
            module = f"model.layers.{layer}.{leaf}"
            if name := known.get_name(module):
                found[module] = name
    return found


def _heads(module: str, rows: int, config: Mapping[str, Any]) -> int:
    """The heads whose rows llama.cpp has in another order, 0 where it has not.

    Raises:
        MisfitError: the config of the base does not say how many there are, or other than that.
    """
    known = architecture_of(config)
    heads = heads_of(module, config, known)
    asked = known.permuted and module.rpartition(".")[2] in HEADS
    if asked and (heads < 1 or rows % (2 * heads)):
        raise MisfitError(
            f"{module!r} has {rows} rows, and the config of the base says {heads or 'no'} heads.",
            hint="Give --base the folder of the base that the adapter is for.",
            tensor=module,
        )
    return heads


def _of_one(delta: Delta, name: str, alpha: float, heads: int) -> Tensors:
    ratio = delta.scaling * delta.rank / alpha
    a, b = _plain(delta.tensors["a"]), _plain(delta.tensors["b"])
    b, error = times(b, ratio)
    made = replace(delta, tensors={"a": a, "b": b}, alpha=alpha, rslora=False)
    if heads:
        b = _reordered(b, lambda x: interleaved(x, heads))
    how = "folded" if ratio != 1.0 else "swapped" if heads else "renamed"
    values = {name + ENDINGS["a"]: a, name + ENDINGS["b"]: b}
    return Tensors(Step(name, (delta.module,), how, error), values, made)


def _plain(old: Values) -> Values:
    """A tensor in a dtype that GGUF has: what is neither float16 nor float32 becomes the latter."""
    if old.dtype in ("F16", "F32"):
        return old
    raw = old.read()
    wide = np.empty(raw.shape, np.float32)
    widen(np.ascontiguousarray(raw), wide)
    return computed(wide)


def _values(tensor: Any, heads: int) -> Values:
    data = np.asarray(tensor.data)
    values = Values(code_of(data.dtype), data.shape, lambda: data, tensor.name)
    return _reordered(values, lambda x: halved(x, heads)) if heads else values


def _reordered(old: Values, change: Callable[[Array], Array]) -> Values:
    return Values(old.dtype, old.shape, lambda: np.ascontiguousarray(change(old.read())), old.key)


def _text(reader: Any, key: str) -> str:
    found = reader.fields.get(key)
    return str(found.contents()) if found else ""


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UsageError(
            "GGUF needs the package gguf.", hint="pip install 'lorakit[gguf]'"
        ) from error
    return gguf
