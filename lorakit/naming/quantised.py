"""What is called how beside, or in place of, a weight whose numbers are codes on a grid.

Sources (facts): the quantizers of huggingface/transformers v5.23 and of compressed-tensors;
NVIDIA's ModelOpt; ComfyUI's scaled float8 files; the first releases of DeepSeek and Mistral.
"""

from collections.abc import Mapping

from lorakit.naming.canonical import canonical
from lorakit.tensors import FOLDABLE, ONE_BYTE, TensorInfo

# Parameters of a module that scale its weight.
SCALES = (
    *("weight_scale_inv", "weight_scale", "SCB", "weight.absmax", "weight_scale_2"),
    *("scale_weight", "qscale_weight"),
)
BARE_SCALE = "scale"  # which, beside other weights than float8, may be anything
# What follows the name of a stack of experts in that of its scales.
STACK_SCALES = ("_scale_inv", "_scale", "_scales", "_weight_scale", "_weight_scale_inv")
# Names that the tensors of a packed weight have where a plain one has its own.
PACKED = (
    *(".qweight", ".weight_packed", ".weight_blocks", ".weight.absmax", ".W_q", ".codebooks"),
    *("._weight_qdata", ".weight._data", ".weight_qdata", "_proj_blocks", "_proj_packed"),
)

PACKS = ("U8", "I32", "U32", "F4")
READ = ("_proj_blocks", ".qweight", ".weight_packed")  # of PACKED
MARKS = frozenset({"scaled_fp8"})  # tensors that say of a whole file that it is quantised
# What tells, beside them, that codes mean something else.
OTHERS = ("weight_zero_point", "weight_scale_2", "weight_global_scale", "weight_g_idx")


def scale_beside(info: TensorInfo, disk: Mapping[str, TensorInfo]) -> str:
    """The name, without its module, of a tensor that scales the weight `info`; "" for none."""
    module, _, leaf = info.name.rpartition(".")
    found = [*SCALES, *(leaf + end for end in STACK_SCALES)]
    if info.dtype.startswith("F8"):
        found.append(BARE_SCALE)
    return next((s for s in found if f"{module}.{s}" in disk), "")


def is_read(name: str, disk: Mapping[str, TensorInfo]) -> bool:
    """Whether `lorakit.quant.stored` makes values of a tensor of codes."""
    front = f"{name.rpartition('.')[0]}."
    known = name.endswith(READ) or f"{name}.absmax" in disk or disk[name].dtype in ONE_BYTE
    return known and not any(front + o in disk for o in OTHERS)


def beside_codes(disk: Mapping[str, TensorInfo]) -> frozenset[str]:
    """The tensors of modules that have codes, but for biases: scales, tables and the codes."""
    narrow = (i for i in disk.values() if i.dtype in (*ONE_BYTE, *PACKS))
    modules = {_module(i.name) for i in narrow if not _is_plain(i, disk)}
    return frozenset(n for n in disk if _module(n) in modules and not n.endswith("bias"))


def _is_plain(info: TensorInfo, disk: Mapping[str, TensorInfo]) -> bool:
    """Whether numbers of one byte are floats that mean themselves: nothing scales them."""
    front = f"{info.name.rpartition('.')[0]}."
    others = info.name in MARKS or any(front + o in disk for o in OTHERS)
    return info.dtype in FOLDABLE and not others and not scale_beside(info, disk)


def _module(name: str) -> str:
    front, mark, _ = name.partition(".weight.")
    return front if mark else name.rpartition(".")[0]


def packed_for(module: str, disk: Mapping[str, TensorInfo], model_type: str) -> str:
    """A tensor on disk that is a packed weight of a module, or of the experts in it; "" for
    none.
    """
    inside = canonical(f"{module}.weight", model_type).removesuffix("weight")
    packed = (n for n in disk if n.endswith(PACKED))
    return next((n for n in packed if canonical(n, model_type).startswith(inside)), "")
