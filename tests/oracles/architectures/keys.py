"""What the keys of an adapter mean: modules, roles, and the parameters behind nested wrappers.

PEFT wraps the parameters of one module in one another and keys tell no more than how deep a wrapper
is: the innermost is the parameter that the module registered first.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tests.oracles.reading import Array, read_tensors

PREFIX = "base_model.model."
EXPERTS = 4  # of every layer that has any
ROLES = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
# In the order in which the classes of transformers register them; every other module that PEFT
# was told a parameter of has a `weight` and, if anything, a `bias`.
REGISTERED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
STACK = re.compile(r"(experts\.(gate_up_proj|down_proj)|(input|output)_linear\.weight)$")

Parts = dict[str, Array]  # role -> tensor, of one module


class Target(NamedTuple):
    """What factors change, by the adapter's own names."""

    parameter: str
    called: str  # in the patterns of the config
    stacked: bool  # whether it holds all experts


def modules(adapter: Path) -> dict[str, Parts]:
    """The tensors of an adapter by module and role; there must be no others."""
    found: dict[str, Parts] = {}
    for key, values in read_tensors(adapter).items():
        (role,) = [role for role in ROLES if key.endswith(f".{role}")]
        module = key.removeprefix(PREFIX).removesuffix(f".{role}")
        found.setdefault(module, {})[role] = values
    return found


def target(module: str, config: Mapping[str, Any]) -> Target:
    """What the factors of a module change."""
    depth, owner = 0, module
    while owner.endswith(".base_layer"):
        depth, owner = depth + 1, owner.removesuffix(".base_layer")
    wanted = tuple(f".{name}" for name in config.get("target_parameters") or [])
    parameters = REGISTERED if owner.endswith("experts") else ("weight",)
    here = [p for p in parameters if f".{owner}.{p}".endswith(wanted)] if wanted else []
    if not here:
        return Target(f"{module}.weight", module, stacked=False)
    name = f"{owner}.{here[-1 - depth]}"
    return Target(name, name, stacked=bool(STACK.search(name)))
