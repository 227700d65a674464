"""What an adapter wants done to a base, piece by piece, before anyone has looked at the base.

Law: every tensor of the adapter is in exactly one piece, or in `Adapter.unused`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.config import AdapterConfig
from lorakit.adapter.module import Module
from lorakit.adapter.parameters import parameters_of
from lorakit.errors import MisfitError
from lorakit.tensors import TensorInfo

# Transformers' Conv1D layers, which store (in, out), by model type: decides where W is square.
CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
CONV1D_LEAVES = {"c_attn", "c_proj", "c_fc", "q_attn"}
PACKED = ".in_proj"  # what a MultiheadAttention has as parameters of its own: in_proj_weight
# PEFT applied the update of a MultiheadAttention's out_proj twice, in training too (PR #3774 mends
# it).
MHA_TWICE_UNTIL = (0, 21, 2)


@dataclass(frozen=True, slots=True)
class Piece:
    """One change of one tensor of the base.

    `action` is "update", "rows" or "full"; the tensor is `module.parameter` for the first of
    `parameters` that the base has. `spec` is plain data, what `lorakit.adapter.load` needs.
    """

    adapter: int
    module: str
    parameters: tuple[str, ...]
    action: str
    spec: dict[str, Any]
    tensors: tuple[TensorInfo, ...]  # the adapter's tensors that it uses
    source: Module | None = None

    @property
    def target(self) -> str:
        """The name by the adapter's own lights."""
        return self.names[0]

    @property
    def names(self) -> list[str]:
        """The names that would do, the first before the others."""
        packed = "._" if self.module.endswith(PACKED) else "."
        return [f"{self.module}{x}{p}".strip(".") for x in packed for p in self.parameters]


def pieces(
    adapter: Adapter, index: int, *, weight: float = 1.0, mha_factor: int | None = None
) -> Iterator[Piece]:
    """Everything that adapter number `index` does to a base, each tensor of it once.

    `mha_factor` is how often the out_proj of a MultiheadAttention is updated: 2 for adapters from
    PEFT up to 0.21.2 (the default by the config's version), 1 from those that apply it once.
    """
    bare = parameters_of(adapter)
    for key, module in adapter.modules.items():
        if key in bare:
            yield _bare(adapter, index, module, bare[key], weight)
        elif module.low_rank:
            factor = out_proj_factor(adapter.config, mha_factor) if module.inner else 1
            yield from _updates(adapter, index, module, factor * weight)
        yield from _differences(index, module, weight)
        yield from _acting(index, module, weight)
        if "rows" in module.roles:
            yield _rows(adapter, index, module, weight)
    for name, info in adapter.full.items():
        path, _, parameter = name.rpartition(".")
        spec = {"adapter": index, "tensor": info.name, "weight": weight}
        yield Piece(index, path, (parameter,), "full", spec, (info,))


def _updates(adapter: Adapter, index: int, module: Module, weight: float) -> Iterator[Piece]:
    scaling = _scaling(adapter.config, module)
    inputs, diag = module.roles.get("magnitude_inputs"), module.roles.get("diag")
    magnitude = inputs or module.roles.get("magnitude")
    spec = {
        "adapter": index,
        "a": module.a.name,
        "b": module.b.name,
        "scaling": scaling,
        "weight": weight,
        "magnitude": magnitude.name if magnitude else None,
        "enabled": adapter.config.enable_lora or None,
    }
    if inputs:
        spec["inputs"] = True
    if diag:
        spec["diag"] = diag.name
    more: list[TensorInfo] = []
    for name in ("through", "times"):
        pair = [module.roles[r] for r in (f"{name}_a", f"{name}_b") if r in module.roles]
        if pair:
            spec[name] = [t.name for t in pair]
            more += pair
    if "kron" in module.roles:
        spec |= {"kron": True, "cut": module.cut}
    used = (module.a, module.b, *(t for t in (magnitude, diag) if t), *more)
    yield Piece(index, module.name, ("weight", "in_proj_weight"), "update", spec, used, module)
    if bias := module.roles.get("bias"):
        spec = {"adapter": index, "a": None, "b": bias.name, "scaling": scaling, "weight": weight}
        yield Piece(index, module.name, ("bias",), "update", spec, (bias,))


def _scaling(config: AdapterConfig, module: Module) -> float:
    """What the factors of a module are multiplied with; those of a Kronecker product have it."""
    if "kron" in module.roles:
        return 1.0
    rank = module.a.shape[0] // (sum(map(bool, config.enable_lora)) or 1)
    return config.scaling(module.wrapped, rank)


def _differences(index: int, module: Module, weight: float) -> Iterator[Piece]:
    """What is added to the weight and the bias of a module as it is."""
    of_weight = ("weight", "")  # or of the parameter itself that goes by the name of a module
    for role, parameters in (("difference", of_weight), ("bias_difference", ("bias",))):
        if info := module.roles.get(role):
            spec = {"adapter": index, "a": None, "b": info.name, "scaling": 1.0, "weight": weight}
            spec |= {"dense": True, "magnitude": None}
            yield Piece(index, module.name, parameters, "update", spec, (info,))


def _acting(index: int, module: Module, weight: float) -> Iterator[Piece]:
    """What a weight is multiplied with: IA3 and OFT."""
    roles = module.roles
    for role, axis in (("ia3_rows", 0), ("ia3_inputs", 1)):
        if info := roles.get(role):
            spec = {"adapter": index, "b": info.name, "weight": weight, "magnitude": None}
            spec |= {"act": "ia3", "axis": axis}
            yield Piece(index, module.name, ("weight",), "update", spec, (info,))
    if info := roles.get("oft"):
        scale = roles.get("oft_rescale")
        spec = {"adapter": index, "b": info.name, "weight": weight, "magnitude": None}
        spec |= {"act": "oft", "rescale": scale.name if scale else None}
        used = (info, *([scale] if scale else []))
        yield Piece(index, module.name, ("weight",), "update", spec, used)


def _bare(adapter: Adapter, index: int, module: Module, parameter: str, weight: float) -> Piece:
    """The update of a bare parameter, whose rank only the config has: A holds all experts."""
    name = f"{module.name}.{parameter}"
    rank = adapter.config.rank(name) or 0
    if rank < 1 or module.a.shape[0] % rank:
        raise MisfitError(
            f"the factors of {name!r} have {module.a.shape[0]} rows for experts of rank {rank}.",
            hint="The file and its config are not of one adapter, or an expert is missing.",
            file=adapter.path,
            tensor=module.a.name,
        )
    spec = {
        "adapter": index,
        "a": module.a.name,
        "b": module.b.name,
        "scaling": adapter.config.scaling(name, rank),
        "weight": weight,
        "magnitude": None,
        "enabled": None,
        "experts": module.a.shape[0] // rank,
    }
    return Piece(index, module.name, (parameter,), "update", spec, (module.a, module.b), module)


def _rows(adapter: Adapter, index: int, module: Module, weight: float) -> Piece:
    info = module.roles["rows"]
    indices = adapter.config.token_rows(module.name)
    spec = {"adapter": index, "tensor": info.name, "indices": indices, "weight": weight}
    return Piece(index, module.name, ("weight",), "rows", spec, (info,))


def out_proj_factor(config: AdapterConfig, wanted: int | None) -> int:
    """How often the out_proj of a MultiheadAttention is updated: as wanted, or as its PEFT did."""
    if wanted is not None:
        return wanted
    return 2 if config.version <= MHA_TWICE_UNTIL else 1


def fits(piece: Piece, shape: tuple[int, ...]) -> bool:
    """Whether a piece can be applied to a tensor of this shape, in either orientation."""
    if piece.action == "full":
        return True
    if "act" in piece.spec:
        return _acts_on(piece, shape)
    last = piece.tensors[-1]
    if piece.action == "rows":
        return shape[1:] == last.shape[1:]
    if piece.source is None:
        return shape == last.shape  # the bias of lora_B, a difference
    return transposed(piece.source, shape, square=False, enabled=piece.spec["enabled"]) is not None


def _acts_on(piece: Piece, shape: tuple[int, ...]) -> bool:
    """Whether the factors or rotations of a piece are as many as the rows or inputs."""
    info, axis = piece.tensors[0], int(piece.spec.get("axis", 0))
    if piece.spec["act"] == "oft":
        return shape[0] == info.shape[0] * info.shape[1]
    return len(shape) > axis and shape[axis] == info.numel


def transposed(
    module: Module, shape: tuple[int, ...], *, square: bool, enabled: list[bool] | None = None
) -> bool | None:
    """Whether a weight of this shape lies (in, out), None if the module does not fit it.

    Shapes decide; `square` says what holds where they cannot.
    """
    out, inner = module.out, inner_of(module, shape)
    if enabled:
        out = out // sum(map(bool, enabled)) * len(enabled)
    if module.embedding:
        return True if shape == (*inner, out) else None
    if len(inner) == 1 and shape == (out, *inner):
        return square if out == inner[0] else False
    if len(inner) == 1 and shape == (*inner, out):
        return True
    kernel = shape[: 1 + len(inner)] == (out, *inner) and set(shape[1 + len(inner) :]) <= {1}
    return False if kernel and len(shape) > 2 else None


def inner_of(module: Module, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what a module adds to one output of a weight of this shape. Factors of a linear
    layer may have the kernel of one place that those of a convolution have, those of a Conv1d one
    of two places, and those of any its kernel flattened into the inputs.
    """
    inner, places = module.span, len(shape) - 1
    if places > 1 and inner == (prod(shape[1:]),):
        return shape[1:]
    return inner[:places] if places and set(inner[places:]) <= {1} else inner


def square_transposed(module: str, model_type: str, fan_in_fan_out: bool) -> bool:
    """Whether a square weight lies (in, out): by the model's type, else by the adapter's flag."""
    if model_type:
        return model_type in CONV1D_MODELS and module.rpartition(".")[2] in CONV1D_LEAVES
    return fan_in_fan_out


def known_by_looks(disk: Mapping[str, TensorInfo]) -> str:
    """`gpt2` if the fused attention layers of a base store (in, out), else ""."""
    fused = (i.shape for n, i in disk.items() if n.endswith(".c_attn.weight"))
    return "gpt2" if any(len(s) == 2 and s[1] == 3 * s[0] for s in fused) else ""
