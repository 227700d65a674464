"""The weights of a base that may get factors."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.adapter.pieces import CONV1D_LEAVES, CONV1D_MODELS, known_by_looks
from lorakit.adapter.weights import Form
from lorakit.configs import model_type
from lorakit.formats.patterns import search
from lorakit.naming.linear import linear_layers
from lorakit.naming.runtime import called
from lorakit.store.checkpoint import Checkpoint
from lorakit.tensors import TensorInfo
from lorakit.verbs.base.landing import FLAGGED

# Queries, keys and values of open_clip, a parameter of its attention and no layer. PEFT has factors
# for the attention as a whole alone; files for Diffusers, kohya and ComfyUI for each of the three.
PACKED = re.compile(r"\.resblocks\.\d+\.attn\.in_proj_weight$")


@dataclass(frozen=True)
class Weight:
    """A weight that may get factors; `turned` says that it lies (in, out) on disk."""

    form: Form
    tensor: str
    turned: bool = False
    bias: str = ""  # the tensor of the layer's bias, if it has one


def weights_in(
    base: Checkpoint, targets: str = "", exclude: str = "", *, packed: bool = False
) -> list[Weight]:
    """The weights of linear layers, convolutions and stacked experts, by the names on disk.

    `targets` and `exclude` are patterns that a module's name is held against; `packed` takes the
    queries, keys and values of open_clip too.
    """
    infos, config = base.infos, base.config
    model = model_type(config) or known_by_looks(infos)
    linear = set(linear_layers(infos, config))
    found = []
    for name, info in infos.items():
        split = "_" if packed and PACKED.search(name) else "."
        module, _, parameter = name.rpartition(split)
        if (targets and not search(targets, module)) or (exclude and search(exclude, module)):
            continue
        bias = f"{module}{split}bias" if f"{module}{split}bias" in infos else ""
        if split == "_" or (module in linear and parameter == "weight"):
            turned = model in CONV1D_MODELS and module.rpartition(".")[2] in CONV1D_LEAVES
            out, inner = reversed(info.shape) if turned else info.shape
            found.append(Weight(Form(module, parameter, (inner,), out), name, turned, bias))
        elif _is_kernel(info) and not is_grouped(info):
            form = Form(module, parameter, tuple(info.shape[1:]), info.shape[0])
            found.append(Weight(form, name, False, bias))
        elif len(info.shape) == 3 and not name.endswith(".bias") and "experts" in module:
            found.append(_stack(module, parameter, info, turned=model in FLAGGED))
    return found


def called_otherwise(base: Checkpoint, weights: Sequence[Weight]) -> list[str]:
    """What to say of modules that transformers 5 calls otherwise than the disk, so that PEFT does
    not find them there; of experts it knows that itself.
    """
    kind = model_type(base.config)
    pairs = [(w.tensor, called(w.tensor, kind)) for w in weights if ".experts." not in w.tensor]
    names = [[n.rpartition(".")[0] for n in pair] for pair in pairs if len({*pair}) > 1]
    if not names:
        return []
    return [
        f"{len(names)} modules have other names in transformers 5, such as {names[0][1]!r} for "
        f"{names[0][0]!r}: lorakit convert ADAPTER --names runtime-v5 --base BASE -o OUT makes the "
        "adapter that PEFT loads there."
    ]


def _is_kernel(info: TensorInfo) -> bool:
    """Whether a tensor is the weight of a convolution, and not a stack of experts."""
    module, _, parameter = info.name.rpartition(".")
    return parameter == "weight" and len(info.shape) in (3, 4, 5) and "experts" not in module


def is_grouped(info: TensorInfo) -> bool:
    """Whether a kernel has one input for each of several outputs, so that it is one in groups."""
    return _is_kernel(info) and info.shape[1] == 1 and info.shape[0] > 1


def _stack(module: str, parameter: str, info: TensorInfo, *, turned: bool) -> Weight:
    count, rows, cols = info.shape
    out, inner = (cols, rows) if turned else (rows, cols)
    form = Form(module, parameter, (inner,), out, layer=False, experts=count)
    return Weight(form, info.name, turned)


def task_type(config: Mapping[str, Any]) -> str | None:
    """What PEFT calls the task of a model; of one for classes it would want the head as well."""
    named = [str(a) for a in config.get("architectures") or ()]
    return "CAUSAL_LM" if any(a.endswith("ForCausalLM") for a in named) else None
