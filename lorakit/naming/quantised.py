"""What is called how beside, or in place of, a weight whose numbers are codes on a grid.

Sources (facts): the quantizers of huggingface/transformers v5.23 and of compressed-tensors;
NVIDIA's ModelOpt; ComfyUI's scaled float8 files; the first releases of DeepSeek and Mistral.
"""

from collections.abc import Mapping

from lorakit.naming.canonical import canonical
from lorakit.tensors import TensorInfo

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


def scale_beside(info: TensorInfo, disk: Mapping[str, TensorInfo]) -> str:
    """The name, without its module, of a tensor that scales the weight `info`; "" for none."""
    module, _, leaf = info.name.rpartition(".")
    found = [*SCALES, *(leaf + end for end in STACK_SCALES)]
    if info.dtype.startswith("F8"):
        found.append(BARE_SCALE)
    return next((s for s in found if f"{module}.{s}" in disk), "")


def packed_for(module: str, disk: Mapping[str, TensorInfo], model_type: str) -> str:
    """A tensor on disk that is a packed weight of a module, or of the experts in it; "" for
    none.
    """
    inside = canonical(f"{module}.weight", model_type).removesuffix("weight")
    packed = (n for n in disk if n.endswith(PACKED))
    return next((n for n in packed if canonical(n, model_type).startswith(inside)), "")
