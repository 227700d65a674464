"""PEFT's tuners beside LoRA whose updates have plain factors, by what their configs say.

A new one: a row in TUNERS.

What their tensors are is said by `lorakit.adapter.files.tuned`.

Source: huggingface/peft v0.21.2, src/peft/tuners/{loha,lokr,adalora}/{config,layer,model}.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lorakit.adapter.config import AdapterConfig
from lorakit.adapter.new_config import PLAIN
from lorakit.errors import InputError


@dataclass(frozen=True)
class Tuner:
    """`algo` is that of its tensors, see lorakit.formats.roles; `scaling` what PEFT multiplies the
    product of a module of that rank with, and `fields` those of its config that say nothing of
    plain factors.
    """

    name: str
    algo: str
    scaling: Callable[[AdapterConfig, str, int], float]
    fields: frozenset[str]


def _by_config(config: AdapterConfig, module: str, rank: int) -> float:
    """alpha over the rank that the config says: a Kronecker product may have no factors."""
    alphas = {**config.raw, "lora_alpha": config.raw.get("alpha")}
    return replace(config, raw=alphas).scaling(module, config.rank(module) or rank)


def _by_budget(config: AdapterConfig, module: str, rank: int) -> float:
    """alpha, or the rank where there is none, over the rank that the training began with."""
    start = config.raw.get("init_r")
    if not isinstance(start, int) or start < 1:
        raise InputError(f"has init_r {start!r}, no rank.", hint="Mend it.", file=config.file)
    plain = {"lora_alpha": config.raw.get("lora_alpha")}
    alpha = AdapterConfig(plain, config.file).scaling(module, 1)
    return (alpha if alpha > 0 else rank) / (start + 1e-5)


_PATTERNS = {"r", "rank_pattern", "alpha_pattern"}
_LYCORIS = {"alpha", "rank_dropout", "module_dropout", "use_effective_conv2d", "init_weights"}
_KRONECKER = {"decompose_both", "decompose_factor", "rank_dropout_scale"}
_SCHEDULE = {"target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step"}
TUNERS = {
    "LOHA": Tuner("LoHa", "loha", _by_config, frozenset(_PATTERNS | _LYCORIS)),
    "LOKR": Tuner("LoKr", "lokr", _by_config, frozenset(_PATTERNS | _LYCORIS | _KRONECKER)),
    "ADALORA": Tuner(
        "AdaLoRA", "lora", _by_budget, frozenset(_PATTERNS | _SCHEDULE | {"orth_reg_weight"})
    ),
}


def as_lora_config(config: AdapterConfig) -> dict[str, Any]:
    """What the config of the plain LoRA takes from that of a tuner: its ranks and alphas are told
    by the modules.
    """
    own = TUNERS[config.peft_type].fields
    return {k: v for k, v in config.raw.items() if k not in own} | PLAIN
