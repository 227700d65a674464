"""PEFT's names for adapter tensors, read in every spelling that files are found in, and written in
the plain one.

`base_model.model.<module>.lora_A.weight` is the plain one. Raw dumps keep the adapter's name before
the last segment, and wrappers of the training loop leave segments of their own; both are taken off.

Source: huggingface/peft v0.21.2, src/peft/utils/save_and_load.py and src/peft/tuners/lora/layer.py.
"""

from collections.abc import Iterable
from dataclasses import dataclass

# Segment that says what a tensor is -> its role in the module named before it.
ROLES = {
    "lora_A": "a",
    "lora_B": "b",
    "lora_embedding_A": "embedding_a",
    "lora_embedding_B": "embedding_b",
    "lora_magnitude_vector": "magnitude",
    "trainable_tokens_delta": "rows",
    "lora_velora_embed": "training",  # of use while training only
    "lora_monteclora_sampler": "training",
    "original_module": "original",  # the untouched twin of a module in modules_to_save
    "trainable_tokens_original": "original",
    "modules_to_save": "full",
    "lora_diag": "diag",
    # In memory only: what other formats do to a weight.
    "lora_difference": "difference",
    "lora_bias_difference": "bias_difference",
    "lora_magnitude_inputs": "magnitude_inputs",
    "lora_through_A": "through_a",
    "lora_through_B": "through_b",
    "lora_ia3_rows": "ia3_rows",
    "lora_ia3_inputs": "ia3_inputs",
    "lora_times_A": "times_a",
    "lora_times_B": "times_b",
    "lora_kron": "kron",
    "lora_oft": "oft",
    "lora_oft_rescale": "oft_rescale",
    "lora_E": "adalora",
    "ranknum": "adalora",
}
# Role of a factor -> how its name ends.
SUFFIXES = {
    "a": "lora_A.weight",
    "b": "lora_B.weight",
    "bias": "lora_B.bias",
    "embedding_a": "lora_embedding_A",
    "embedding_b": "lora_embedding_B",
    "magnitude": "lora_magnitude_vector",
    "diag": "lora_diag",
}
# Parameters of modules that have several, in the order in which these register them.
REGISTERED = (
    "gate_up_proj",
    "gate_up_proj_bias",
    "gate_proj",
    "gate_proj_bias",
    "up_proj",
    "up_proj_bias",
    "down_proj",
    "down_proj_bias",
    "weight",
    "bias",
)
# Segments that wrappers of a training loop add anywhere in a name.
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
PREFIX = "base_model.model."  # of all names, as PEFT writes them


@dataclass(frozen=True, slots=True)
class Key:
    """What a tensor of an adapter file is.

    `role` is a value of ROLES, "bias" (of lora_B), or "full": a tensor that replaces the base's
    `module.parameter`. `levels` counts `base_layer` segments between the module and the role (PEFT
    nests one wrapper a parameter there); `inner` says that one stood before an `out_proj`, which is
    how that of a MultiheadAttention is written.
    """

    module: str
    role: str
    parameter: str = ""
    levels: int = 0
    inner: bool = False


def parse(name: str) -> Key:
    """What the adapter tensor of this name is; a name with no known segment is a full tensor."""
    segments = _bare(name).split(".")
    at = next((i for i, s in enumerate(segments) if s in ROLES), None)
    if at is None:
        return _key(segments[:-1], "full", segments[-1])
    module, role, rest = segments[:at], ROLES[segments[at]], segments[at + 1 :]
    if role == "full":
        rest = rest[1:] if len(rest) > 1 else rest  # the adapter's name comes first
        return _key([*module, *rest[:-1]], "full", rest[-1] if rest else "")
    if role == "b" and rest[-1:] == ["bias"]:
        role = "bias"
    return _key(module, role)


def unwrapped(name: str) -> str:
    """A name without the segments of wrappers."""
    return ".".join(s for s in name.split(".") if s not in WRAPPERS)


def _bare(name: str) -> str:
    name = unwrapped(name).removeprefix("module.")
    return name.removeprefix(PREFIX if name.startswith(PREFIX) else "base_model.")


def _key(module: list[str], role: str, parameter: str = "") -> Key:
    levels = 0
    module = [s for s in module if s != "token_adapter"]
    while module and module[-1] == "base_layer":
        module, levels = module[:-1], levels + 1
    path = [s for s in module if s != "base_layer"]
    inner = len(path) < len(module) and path[-1:] == ["out_proj"]
    return Key(".".join(path), role, parameter, levels, inner)


def factor_key(module: str, role: str, *, inner: bool = False, level: int = 0) -> str:
    """The name of a factor. `inner` is the out_proj of a MultiheadAttention; `level` the number of
    wrappers of other parameters around its own.
    """
    if inner:
        parent, _, leaf = module.rpartition(".")
        module = f"{parent}.base_layer.{leaf}".lstrip(".")
    return f"{PREFIX}{module}{'.base_layer' * level}.{SUFFIXES[role]}"


def rows_key(module: str, *, alone: bool) -> str:
    """The name of the token rows of an embedding; `alone` for an adapter of nothing else."""
    return f"{PREFIX}{module}{'' if alone else '.token_adapter'}.trainable_tokens_delta"


def full_key(name: str, *, wrapped: bool) -> str:
    """The name of a tensor that replaces the base's; `wrapped` if its module is adapted as well."""
    module, _, parameter = name.rpartition(".")
    middle = ".base_layer" if wrapped else ""
    return f"{PREFIX}{module}{middle}.{parameter}".replace("..", ".")


def saves(name: str, module: str) -> bool:
    """Whether a module is, or lies in, one that a name of `modules_to_save` means.

    PEFT goes by how a path ends: `classifier` means `pre_classifier` too.
    """
    return bool(name) and f"{name}." in f"{module}."


def levels(parameters: Iterable[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """How many wrappers lie around each (module, parameter): none around the one that its module
    registered last.
    """
    beside: dict[str, list[str]] = {}
    for module, parameter in parameters:
        beside.setdefault(module, []).append(parameter)
    found: dict[tuple[str, str], int] = {}
    for module, names in beside.items():
        known = [p for p in REGISTERED if p in names]
        order = [*known, *(p for p in names if p not in known)]
        found |= {(module, p): len(order) - 1 - i for i, p in enumerate(order)}
    return found
