"""Where the pieces of an adapter go in a live model: matched to its parameters as a merge matches
them to the tensors of a base.

Law: every tensor of the adapter is in a `Fitted`, or in `Adapter.unused`, or fitting fails.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.adapter.adapter import Adapter
from lorakit.engine.layout import Output
from lorakit.errors import InputError, MisfitError
from lorakit.runtime.offloaded import is_offloaded
from lorakit.runtime.quantised import is_quantised
from lorakit.store.checkpoint import Checkpoint
from lorakit.store.hub import Located
from lorakit.store.memory import MemorySource
from lorakit.verbs.base.placing import base_of
from lorakit.verbs.base.planning import Setting, outputs
from lorakit.verbs.base.targets import Options, context_of, match
from lorakit.verbs.base.tying import Tie

SEAT = "lorakit"  # the name of what is added to a layer
COMPILED = "_orig_mod."  # what torch.compile puts into the names of what it is given
ROLES = ("a", "b", "magnitude", "diag", "tensor")  # fields of a plain update that name a tensor
# Layers whose weight the forward around them takes; that of the layer is not called everywhere.
READ = ("dt_proj", "rel_embeddings", "position_embedding", "query_position_embeddings")


@dataclass(frozen=True)
class Fitted:
    """One change of one parameter. `owner` has the parameter, `host` is the module whose forward
    uses it. `action` is "full", "rows", "update" or "residual"; `spec` is what
    `lorakit.adapter.factors` needs. The first `leading` dimensions of the parameter make the rows.
    """

    tensor: str
    host: nn.Module
    inside: str  # the way from the host to the owner
    parameter: str
    action: str
    spec: Mapping[str, Any]
    leading: int = 1

    @property
    def owner(self) -> nn.Module:
        """The module that the parameter is of."""
        return self.host.get_submodule(self.inside)

    @property
    def names(self) -> dict[str, str]:
        """The adapter's tensors that it uses, by role."""
        return {r: self.spec[r] for r in ROLES if self.spec.get(r)}


def parameters_in(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model by all of their names, without those of adapters; as if no layer
    were compiled.
    """
    found = model.named_parameters(remove_duplicate=False)
    return {n.replace(COMPILED, ""): p for n, p in found if SEAT not in n.split(".")}


def fitted(model: nn.Module, adapter: Adapter, options: Options) -> tuple[list[Fitted], list[str]]:
    """The changes that an adapter makes of a model, and what the user should know.

    Raises:
        MisfitError: a tensor of the adapter has no place, or one of another shape.
        InputError: the adapter is of a kind that is refused, or the model has no data (meta).
    """
    there = parameters_in(model)
    bare = _bare(model, adapter)
    if adapter.config.layer_replication:
        raise InputError(
            "is for a stack of layers that is rebuilt (layer_replication).",
            hint="Merge it into the files of the base.",
            file=adapter.config.file,
        )
    looks = {n: _looks(model, n, p) for n, p in there.items()}
    source = MemorySource(looks | bare, name="model")
    base = base_of(source.infos, config_of(model))
    matched = match(base, [adapter], options)
    context = context_of(base, adapter, options)
    checkpoint = Checkpoint(Located(Path("model")), [source])
    setting = Setting(checkpoint, [context], residuals=options.residuals)
    (outs,) = outputs(setting, matched, Tie()).values()
    touched = [o for o in outs if o.recipe or o.source == "adapter0"]
    whole = {o.tensor.name for o in touched if o.source == "adapter0"}
    if new := sorted(whole - there.keys()):
        raise MisfitError(
            f"{new[0]!r} is in the adapter, the model has no such parameter.",
            hint="Load the model with the class that the adapter was trained on.",
            file=adapter.path,
            tensor=new[0],
        )
    changes = [f for o in _with_tied(touched, there | bare) for f in _of(model, o)]
    return changes, list(matched.notes)


def _bare(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """What the biases of layers that have none would be, where the adapter has biases of B."""
    if not any("bias" in module.roles for module in adapter.modules.values()):
        return {}
    found = {}
    for name, layer in model.named_modules():
        if "bias" in layer._parameters and layer.bias is None and SEAT not in name.split("."):
            units = getattr(layer, "out_features", None) or getattr(layer, "out_channels", 0)
            found[f"{name}.bias".replace(COMPILED, "")] = torch.empty(units, device="cpu")
    return found


def _looks(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """A parameter, or something of the shape that a quantised or offloaded one stands for."""
    module, _, parameter = name.rpartition(".")
    layer = model.get_submodule(module)
    if is_quantised(layer) and parameter == "weight":
        empty = torch.empty(1, dtype=torch.bfloat16, device=value.device)
        return empty.expand(layer.out_features, layer.in_features)
    if is_offloaded(layer, parameter):
        return torch.empty(1, dtype=value.dtype, device="cpu").expand(value.shape)
    return value.detach()


def config_of(model: nn.Module) -> dict[str, Any]:
    """The config of a model as plain data; empty where it has none."""
    config = getattr(model, "config", None) or {}
    found = config.to_dict() if hasattr(config, "to_dict") else config
    return dict(found) if isinstance(found, Mapping) else {}


def _with_tied(touched: Sequence[Output], there: Mapping[str, Tensor]) -> Iterator[Output]:
    """What is touched; new token rows also where the same parameter has another name.

    That is as PEFT does it: an embedding and its head share the rows as they share the weight.
    """
    names: dict[int, list[str]] = defaultdict(list)
    for name, value in there.items():
        names[id(value)].append(name)
    asked = {o.tensor.name for o in touched}
    for out in touched:
        yield out
        name = out.tensor.name
        first = names[id(there[name])][0] == name
        if first and out.recipe and not out.recipe["updates"]:
            for other in set(names[id(there[name])]) - asked:
                yield replace(out, tensor=replace(out.tensor, name=other))


def _of(model: nn.Module, out: Output) -> Iterator[Fitted]:
    path, _, parameter = out.tensor.name.rpartition(".")
    leaf, caller = path.rpartition(".")[2], _caller(model, path)
    around = _module(model, caller)
    # Its forward takes the weights of its projection; that is never called.
    inner = leaf == "out_proj" and isinstance(around, nn.MultiheadAttention)
    at = caller if inner or leaf in READ else path

    def one(action: str, spec: Mapping[str, Any], at: str = at) -> Fitted:
        host, inside = _module(model, at), path[len(at) :].lstrip(".")
        return Fitted(out.tensor.name, host, inside, parameter, action, spec, out.leading)

    if out.source == "adapter0":
        for host in dict.fromkeys([caller, at]):  # whoever reads it, or calls the layer
            yield one("full", {"tensor": out.origin.name, "weight": 1.0}, host)
    for rows in out.recipe.get("rows", ()):
        yield one("rows", rows)
    for update in out.recipe.get("updates", ()):
        yield one("residual" if "residual" in update else "update", update)


def _module(model: nn.Module, path: str) -> nn.Module:
    """The module at a path, not compiled."""
    found: nn.Module = model.get_submodule(path)
    return getattr(found, "_orig_mod", found)


def _caller(model: nn.Module, path: str) -> str:
    """The nearest module around another that is more than a list of modules; the other itself where
    there is none.
    """
    above = path
    while above:
        above = above.rpartition(".")[0]
        around = _module(model, above)
        if type(around).forward is not nn.Module.forward and not isinstance(around, nn.Sequential):
            return above
    return path
