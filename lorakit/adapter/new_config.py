"""The `adapter_config.json` of an adapter that is made, from that of the one it is made of.

Rule: whatever does not bear on names is taken over as it is. Targets are full names, so
that no reader can take them for more. Ranks and alphas that are not the common ones have an entry
by the last segment of a name where all modules of that segment agree, else by full name, so that no
two entries apply to one module: files are sorted by key, and readers take the first.

Source: huggingface/peft v0.21.2, src/peft/config.py and src/peft/utils/other.py.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.formats.peft import saves

# The last release of PEFT whose layout of stacks this writes; readers go by it.
WRITTEN = "0.21.2"
STACKS_SINCE = (0, 19, 1)
# What the config of an adapter says whose factors are plain, and whose scalings are in them.
PLAIN = {
    "peft_type": "LORA",
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "loftq_config": {},
    "inference_mode": True,
}
# Fields of variants, and of releases, that a plain adapter does not have.
VARIANTS = ("kasa_config", "use_bdlora", "eva_config", "corda_config", "lora_ga_config")
GONE = ("enable_lora", "merge_weights", "token_indices", "init_weights")


@dataclass(frozen=True)
class Saved:
    """A module as a config tells of it: its name in patterns, rank and alpha."""

    name: str
    rank: int
    alpha: float
    layer: bool = True  # a module, not a bare parameter


def config_of(
    raw: Mapping[str, Any],
    modules: Sequence[Saved],
    renames: Mapping[str, str],
    *,
    version: str | None,
) -> dict[str, Any]:
    """The config of an adapter that has these modules, from that of the one it was made of.

    `renames` maps old names of modules with full tensors or token rows to new ones; `version` is
    the release of PEFT to name, None for that which the old one names.
    """
    config = dict(raw)
    if modules:
        config |= _numbers(raw, modules)
        config["target_modules"] = sorted({m.name for m in modules if m.layer})
    elif isinstance(raw.get("target_modules"), list):
        config["target_modules"] = _renamed(raw["target_modules"], renames)
    bare = sorted(m.name for m in modules if not m.layer)
    if bare or "target_parameters" in raw:
        config["target_parameters"] = bare or None
    if bare:  # what PEFT does not take beside bare parameters, and what changes nothing when merged
        config |= {"lora_dropout": 0.0, "fan_in_fan_out": False}
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if name in raw:
            config[name] = None
    if isinstance(raw.get("modules_to_save"), list):
        config["modules_to_save"] = _renamed(raw["modules_to_save"], renames)
    indices = raw.get("trainable_token_indices")
    if isinstance(indices, Mapping):
        config["trainable_token_indices"] = {
            new: rows for key, rows in indices.items() for new in _renamed([key], renames)
        }
    return config | ({"peft_version": version} if version else {})


def plain_config(raw: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an adapter of plain factors whose scalings are in them, from that of one it was
    made of, with these `facts`.
    """
    kept = {k: v for k, v in raw.items() if k not in GONE}
    nothing = dict.fromkeys(k for k in VARIANTS if k in raw)
    return kept | nothing | PLAIN | {"peft_version": WRITTEN} | dict(facts)


def format_config(config: Mapping[str, Any]) -> bytes:
    """The text of adapter_config.json, as PEFT writes it."""
    return json.dumps(config, indent=2, sort_keys=True).encode()


def _numbers(raw: Mapping[str, Any], modules: Sequence[Saved]) -> dict[str, Any]:
    """The common rank and alpha, and the patterns of the rest."""
    found: dict[str, Any] = {}
    for field, patterns, value_of in (
        ("r", "rank_pattern", lambda m: m.rank),
        ("lora_alpha", "alpha_pattern", lambda m: _plain(m.alpha)),
    ):
        counts = Counter(value_of(m) for m in modules)
        most = max(counts.values())
        common = [v for v, n in counts.items() if n == most]
        default = raw.get(field) if raw.get(field) in common else common[0]
        found |= {field: default, patterns: _patterns(modules, value_of, default)}
    return found


def _plain(alpha: float) -> float:
    return int(alpha) if alpha == int(alpha) else alpha


def _patterns(
    modules: Sequence[Saved], value_of: Callable[[Saved], Any], default: Any
) -> dict[str, Any]:
    by_leaf: dict[str, set[Any]] = defaultdict(set)
    for module in modules:
        by_leaf[module.name.rpartition(".")[2]].add(value_of(module))
    ends = Counter(end for m in modules for end in _ends(m.name))
    found = {}
    for module in modules:
        leaf, value = module.name.rpartition(".")[2], value_of(module)
        if value == default:
            continue
        if len(by_leaf[leaf]) == 1:
            found[re.escape(leaf) if not leaf.isidentifier() else leaf] = value
        elif ends[module.name] > 1:
            found[f"^{re.escape(module.name)}"] = value
        else:
            found[module.name] = value
    return dict(sorted(found.items()))


def _ends(name: str) -> list[str]:
    """A name and whatever of it follows a dot: what plain patterns can mean it by."""
    segments = name.split(".")
    return [".".join(segments[i:]) for i in range(len(segments))]


def _renamed(names: Sequence[str], renames: Mapping[str, str]) -> list[str]:
    """Names of modules, or ends or parents of some, after the modules are renamed.

    One that still means all that it meant stays; another is replaced by what it meant.
    """
    found: list[str] = []
    for name in names:
        meant = {new for old, new in renames.items() if saves(name, old)}
        stays = not meant or all(saves(name, new) for new in meant)
        found += [name] if stays else sorted(meant)
    return list(dict.fromkeys(found))
