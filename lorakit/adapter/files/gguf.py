"""The LoRA of llama.cpp: GGUF with one alpha for all modules.

Law: what is written has the update of every module, its rows in llama.cpp's order. Where alphas
differ the most common one is written, and B has the ratio to it, which is exact for powers of two.

Source: ggml-org/llama.cpp, convert_lora_to_gguf.py and src/llama-adapter.cpp
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.adapter.config import LARGEST
from lorakit.adapter.delta import Delta, Opened, Values
from lorakit.adapter.files.gguf_names import architecture_of, heads_in, names_of
from lorakit.adapter.files.joints import check_joints
from lorakit.adapter.files.spelling import Step, Tensors
from lorakit.adapter.files.stacking import count_of, parted, stacked, uniform
from lorakit.adapter.files.values import common, computed, moved, times
from lorakit.errors import InputError, MisfitError, about
from lorakit.formats.llama_cpp import BESIDE, in_checkpoint, language_in, plain
from lorakit.formats.recognise import LANGUAGE
from lorakit.math.cast import code_of, widen
from lorakit.math.surgery import halved, interleaved
from lorakit.store.gguf import gguf_reader, package
from lorakit.store.writing import reporting, sync_path

Config = Mapping[str, Any]
ENDINGS = {"a": ".weight.lora_a", "b": ".weight.lora_b"}
ALPHA = "adapter.lora.alpha"
STACKED = 3  # dimensions of the factors of all experts
DTYPES = ("F32", "F16", "BF16", "Q8_0")  # what llama.cpp's converter writes


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
    known, reader = architecture_of(config), gguf_reader(path)
    kind, name = (text_of(reader, f"general.{key}") for key in ("type", "architecture"))
    if kind != "adapter" or name != known.name:
        raise InputError(
            f"is {kind or 'no adapter'} of {name!r}, and the base is {known.name!r}.", file=path
        )
    alpha = alpha_of(reader, path)
    deltas = [
        Delta("", in_checkpoint(m, known), "lora", t, alpha or None, embedding=BESIDE.get(m, False))
        for m, t in sorted(_modules(reader, config, path).items())
    ]
    with about(path):
        for delta in deltas:
            if len(delta.tensors) < 2:
                raise MisfitError(f"{delta.module!r} lacks one of its factors.")
            check_joints(delta)
    return Opened("gguf", LANGUAGE, "disk", tuple(deltas))


def _modules(reader: Any, config: Config, path: Path) -> dict[str, dict[str, Values]]:
    """The tensors of every module, by role; of a stack of experts those of each.

    Raises:
        MisfitError: a tensor is no part of a linear layer's update, or of another dtype.
    """
    modules: dict[str, dict[str, Values]] = {}
    names = {ours: module for module, ours in names_of(config).items()}
    for tensor in reader.tensors:
        module, role = _meant(tensor, names, path)
        if len(tensor.shape) == STACKED and ".experts." in module:
            for expert in range(int(tensor.shape[-1])):
                one = module.replace(".experts.", f".experts.{expert}.")
                modules.setdefault(one, {})[role] = _values(tensor, expert)
            continue
        values = _values(tensor)
        if role == "b" and (heads := heads_in(module, values.shape[0], config)):
            values = moved(values, partial(halved, heads=heads), key=values.key)
        if role == "a" and BESIDE.get(module):
            values = _turned(values)
        modules.setdefault(module, {})[role] = values
    return modules


def alpha_of(reader: Any, path: Path) -> float:
    """The alpha of all modules; 0 means a scaling of 1.

    Raises:
        InputError: it is no finite number.
    """
    found = reader.fields.get(ALPHA)
    alpha = found.contents() if found else 0.0
    if not isinstance(alpha, int | float) or not abs(alpha) <= LARGEST:
        raise InputError(f"has {ALPHA} {alpha!r}, no finite number.", file=path)
    return float(alpha)


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


def read_as(module: str, config: Config) -> str:
    """What a module of an adapter is called that is read from such a file."""
    return in_checkpoint(plain(module), architecture_of(config))


def gguf_tensors(deltas: Sequence[Delta], config: Config) -> list[Tensors]:
    """The modules of an adapter as llama.cpp has them.

    Raises:
        InputError: lorakit does not know the model's tensors in llama.cpp.
        MisfitError: a module has no place there, or has what llama.cpp does not.
    """
    names, (rest, stacks) = names_of(config), parted(deltas)
    alpha = common(d.scaling * d.rank for d in deltas)  # 0 would be a scaling of 1
    made = []
    for delta in rest:
        module = plain(delta.module)
        name = _place(delta, module, names)
        made.append(
            _of_one(delta, name, alpha, heads_in(module, delta.tensors["b"].shape[0], config))
        )
    for (block, leaf), experts in stacks.items():
        module = plain(f"{block}.experts.{leaf}")
        (name,) = {_place(d, module, names) for d in experts.values()}
        made.append(_of_experts(experts, name, alpha, count_of(experts, language_in(config))))
    return made


def _place(delta: Delta, module: str, names: Mapping[str, str]) -> str:
    """llama.cpp's name of what a module of an adapter lies in.

    Raises:
        MisfitError: it has none, or the module has what llama.cpp does not.
    """
    name = names.get(module)
    strange = sorted(set(delta.tensors) - {"a", "b"})
    known = delta.algo == "lora" and delta.embedding == BESIDE.get(module, False)
    if name is None or strange or not known:
        head = ", where embedding and head are one" if module in BESIDE else ""
        raise MisfitError(
            f"{delta.module!r} has no place in llama.cpp"
            + (f", which takes no {strange[0]}." if strange else f"{head}."),
            hint="lorakit merge and convert the result, or leave it out with --drop.",
            tensor=delta.module,
        )
    return name


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
    gguf = package()
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


def _of_one(delta: Delta, name: str, alpha: float, heads: int) -> Tensors:
    ratio = delta.scaling * delta.rank / alpha
    a, b = _plain(delta.tensors["a"]), _plain(delta.tensors["b"])
    b, error = times(b, ratio)
    made = replace(delta, tensors={"a": a, "b": b}, alpha=alpha, rslora=False)
    if heads:
        b = moved(b, partial(interleaved, heads=heads), key=b.key)
    how = "folded" if ratio != 1.0 else "swapped" if heads else "renamed"
    values = {name + ENDINGS["a"]: _turned(a) if delta.embedding else a, name + ENDINGS["b"]: b}
    return Tensors(Step(name, (delta.module,), how, error), values, made)


def _of_experts(experts: Mapping[int, Delta], name: str, alpha: float, count: int) -> Tensors:
    """The stack of a projection of experts, all of the rank of the largest."""
    rank = max(d.rank for d in experts.values())
    plain_ones = {
        n: replace(d, tensors={r: _plain(v) for r, v in d.tensors.items()})
        for n, d in experts.items()
    }
    made = {n: uniform(d, rank, alpha / rank) for n, d in plain_ones.items()}
    values = stacked({n: d for n, (d, _) in made.items()}, count)
    modules = tuple(d.module for d in experts.values())
    step = Step(name, modules, "fused", max(error for _, error in made.values()))
    return Tensors(step, {name + ENDINGS[r]: v for r, v in values.items()}, made[min(made)][0])


def _plain(old: Values) -> Values:
    """A tensor in a dtype that GGUF has: what is neither float16 nor float32 becomes the latter."""
    if old.dtype in ("F16", "F32"):
        return old
    raw = old.read()
    wide = np.empty(raw.shape, np.float32)
    widen(np.ascontiguousarray(raw), wide)
    return computed(wide)


def _values(tensor: Any, expert: int | None = None) -> Values:
    """A tensor of the file, or of a stack the slice of one expert; one of a dtype that only GGUF
    has in float32, which is exact.
    """
    data = tensor.data if expert is None else tensor.data[expert]
    if tensor.tensor_type.name in ("F32", "F16"):
        data = np.asarray(data)
        return Values(code_of(data.dtype), data.shape, lambda: data, tensor.name)
    dequantize = package().quants.dequantize
    shape = tuple(int(n) for n in reversed(tensor.shape))[expert is not None :]
    return Values("F32", shape, lambda: dequantize(data, tensor.tensor_type), tensor.name)


def _turned(old: Values) -> Values:
    """The first factor of an embedding, which llama.cpp has a row for each token of."""
    return moved(old, np.transpose, old.shape[::-1], old.key)


def text_of(reader: Any, key: str) -> str:
    """What such a file says under a key, "" if nothing."""
    found = reader.fields.get(key)
    return str(found.contents()) if found else ""
