"""`adapter_config.json`: what of it bears on the arithmetic, and what is refused.

Rule: ranks come from the tensors, alpha can come from nowhere but here. A field that is unknown and
set is refused, because a new variant changes the mathematics; unknown and unset is ignored.

Source: huggingface/peft v0.21.2, src/peft/tuners/lora/config.py, and its release tags for the
history.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt
from pathlib import Path
from typing import Any, NoReturn

from lorakit.errors import InputError
from lorakit.formats.embeddings import is_embedding
from lorakit.formats.patterns import lookup, means
from lorakit.store.json_file import read_json

NAME = "adapter_config.json"

# Fields that this reads, or that never change what a merge does.
KNOWN = {
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode"),
    *("auto_mapping", "peft_version"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("use_dora", "fan_in_fan_out", "lora_bias", "bias", "lora_dropout", "use_bdlora"),
    *("target_modules", "exclude_modules", "target_parameters", "layer_replication"),
    *("layers_to_transform", "layers_pattern", "enable_lora", "merge_weights"),
    *("modules_to_save", "trainable_token_indices", "token_indices", "ensure_weight_tying"),
    *("init_weights", "init_lora_weights", "loftq_config", "eva_config", "corda_config"),
    *("lora_ga_config", "kasa_config", "velora_config", "monteclora_config"),
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
# A field that is set -> why a merge is refused, and the way out.
REFUSED = {
    "alora_invocation_tokens": (
        "is an activated LoRA: it acts after its invocation tokens only; no weight holds that.",
        "Serve it as an adapter.",
    ),
    "arrow_config": (
        "routes every token to other adapters (Arrow); no weight holds that.",
        "Serve it with PEFT.",
    ),
    "use_qalora": (
        "is a QA-LoRA of a GPTQ base: its A spans groups of input channels.",
        "Merge it with the tool that trained it.",
    ),
    "megatron_config": (
        "was trained on Megatron's sharded layers.",
        "Convert it to Hugging Face names first.",
    ),
}
LARGEST = 1e30  # of an alpha; well within float32
# Initialisations that took something out of the base that the adapter was trained on; of the first
# two, that can be computed again from the base.
RECOMPUTED = ("pissa", "olora")
MUTATING = (*RECOMPUTED, "pissa_niter", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class AdapterConfig:
    """The fields of `adapter_config.json` that a merge needs; `raw` keeps them all.

    Raises:
        InputError: modules_to_save, which is taken from `raw`, is no list of names.
    """

    raw: Mapping[str, Any] = field(default_factory=dict)
    file: object = ""

    def __post_init__(self) -> None:
        self._strings("modules_to_save")

    @property
    def peft_type(self) -> str:
        """LORA, TRAINABLE_TOKENS, IA3 …"""
        return str(self.raw.get("peft_type", "LORA")).upper()

    @property
    def rslora(self) -> bool:
        """Whether the scaling is alpha over the root of the rank."""
        return bool(self.raw.get("use_rslora"))

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether some layer stores (in, out). Saved configs are unreliable here; shapes decide
        first.
        """
        return bool(self.raw.get("fan_in_fan_out"))

    @property
    def residual(self) -> str:
        """What the training took out of the base and can be computed again: pissa, olora, kasa, or
        "".
        """
        if self.raw.get("kasa_config"):
            return "kasa"
        init = self.init
        return init if init in RECOMPUTED else ""

    @property
    def init(self) -> str:
        """The name of the initialisation, "true" and "false" for the plain ones."""
        return str(self.raw.get("init_lora_weights", True)).lower()

    @property
    def mutation(self) -> str:
        """The initialisation that changed the base that it was trained on, "" for none."""
        return self.residual or (self.init if self.init.startswith(MUTATING) else "")

    @property
    def target_parameters(self) -> list[str]:
        """The bare parameters that are adapted, each a path or its end."""
        return self._strings("target_parameters")

    @property
    def layer_replication(self) -> list[tuple[int, int]]:
        """The ranges of the base's layers that the adapted model is made of; empty for its own."""
        ranges = self.raw.get("layer_replication") or []
        sound = isinstance(ranges, list) and all(
            isinstance(r, list) and len(r) == 2 and all(type(n) is int for n in r) for r in ranges
        )
        if not sound:
            self._refuse(f"has layer_replication {ranges!r}, no list of ranges.", "Mend it.")
        return [(r[0], r[1]) for r in ranges]

    @property
    def enable_lora(self) -> list[bool]:
        """Which row blocks of a fused projection PEFT <= 0.2 adapted; empty for every later one."""
        enabled = self.raw.get("enable_lora") or []
        if not isinstance(enabled, list) or not all(isinstance(e, bool) for e in enabled):
            self._refuse(f"has enable_lora {enabled!r}, no list of booleans.", "Mend the config.")
        return enabled

    @property
    def base(self) -> str:
        """The base that the adapter says it was trained on."""
        return str(self.raw.get("base_model_name_or_path") or "")

    @cached_property
    def version(self) -> tuple[int, ...]:
        """The version of PEFT that saved it, (0,) where it does not say (before 0.18)."""
        return numbers_of(str(self.raw.get("peft_version") or ""))

    def targets(self, module: str) -> bool:
        """Whether the config says that a module is adapted; where it names none, all are."""
        wanted = self.raw.get("target_modules")
        if not wanted:
            return True
        if means(self.raw.get("exclude_modules") or [], module):
            return False
        return means(self._targets if isinstance(wanted, list) else wanted, module)

    @cached_property
    def _targets(self) -> frozenset[str]:
        """The names in target_modules, of which there is one for each expert of a large model."""
        return frozenset(n for n in self.raw["target_modules"] if isinstance(n, str))

    def rank(self, module: str) -> int | None:
        """The rank that the config gives a module; the tensors are what counts."""
        rank = self._pattern("rank_pattern", module, self.raw.get("r"))
        return int(rank) if isinstance(rank, int) else None

    def scaling(self, module: str, rank: int) -> float:
        """alpha / rank of a module, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732).

        Raises:
            InputError: the alpha is missing or no finite number.
        """
        alpha = self._pattern("alpha_pattern", module, self.raw.get("lora_alpha"))
        known = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not known or not abs(alpha) <= LARGEST:  # NaN is not
            raise InputError(
                f"the lora_alpha of {module!r} is {alpha!r}, no finite number.", file=self.file
            )
        return float(alpha / sqrt(rank) if self.rslora else alpha / rank)

    def overlapping(self, module: str) -> list[str]:
        """The alpha patterns that apply to a module and disagree; PEFT takes the first."""
        found = lookup(self._patterns("alpha_pattern"), module)
        return [p for p, _ in found] if any(v != found[0][1] for _, v in found) else []

    def token_rows(self, module: str) -> list[int] | None:
        """The vocabulary indices whose rows the adapter replaces, None if it says none.

        A module without indices of its own has those of the embedding, if there are some for one
        alone: PEFT saves the rows of a tied head too where the vocabulary was resized.

        Raises:
            InputError: they are no list of integers.
        """
        indices = self.raw.get("trainable_token_indices") or self.raw.get("token_indices")
        if isinstance(indices, Mapping):
            own = [v for k, v in indices.items() if module == k or module.endswith("." + k)]
            tables = [v for k, v in indices.items() if is_embedding(k)]
            indices = own[0] if own else tables[0] if len(tables) == 1 else None
        if indices is None:
            return None
        if not isinstance(indices, list) or not all(type(i) is int for i in indices):
            shown = str(indices)[:60]
            self._refuse(f"has token indices that are no list of integers: {shown}.", "")
        return indices

    def _pattern(self, patterns: str, module: str, default: Any) -> Any:
        found = lookup(self._patterns(patterns), module)
        return found[0][1] if found else default

    def _strings(self, name: str) -> list[str]:
        values = self.raw.get(name) or []
        if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
            self._refuse(f"has {name} {values!r}, no list of names.", "Mend the config.")
        return values

    def _patterns(self, name: str) -> Mapping[str, Any]:
        patterns = self.raw.get(name) or {}
        if not isinstance(patterns, Mapping):
            self._refuse(f"has {name} {patterns!r}, no object of patterns.", "Mend the config.")
        return patterns

    def check(self, *, base_is_residual: bool = False, init_adapter: bool = False) -> None:
        """Refuse by name what cannot be folded into a weight, or not yet.

        `base_is_residual` says that the base is the one that the initialisation left,
        `init_adapter` that the adapter as initialised is at hand.

        Raises:
            InputError: naming the field, why, and the way out.
        """
        if self.peft_type not in ("LORA", "TRAINABLE_TOKENS"):
            self._refuse(f"is of type {self.peft_type}, not LoRA.", "Merge it with PEFT.")
        for name, (why, way_out) in REFUSED.items():
            if self.raw.get(name):
                self._refuse(f"has {name}: it {why}", way_out)
        mutated = self.init.startswith(MUTATING) and not self.residual
        known = init_adapter and not self.init.startswith("loftq")
        if mutated and not (base_is_residual or known):
            self._refuse(
                f"was initialised with {self.init!r}, which changed the base it was trained on.",
                "If BASE is that changed (residual) base, pass --base-is-residual; if you have the "
                "adapter as it was before training, pass it with --init-adapter.",
            )
        for name in sorted(self.raw.keys() - KNOWN - REFUSED.keys()):
            if self.raw[name]:
                self._refuse(
                    f"has the field {name!r}, which this version does not know.",
                    "Upgrade lorakit, or remove the field if it does not change the layers.",
                )

    def _refuse(self, message: str, hint: str) -> NoReturn:
        raise InputError(message, hint=hint, file=self.file)


def numbers_of(version: str) -> tuple[int, ...]:
    """The numbers of a release of PEFT, (0,) of ""."""
    numbers = (version or "0").split("@")[0].split(".")
    return tuple(int(n) for n in numbers if n.isdigit())


def read_config(folder: Path) -> AdapterConfig:
    """The config in an adapter's folder.

    Raises:
        InputError: there is none, or it is no config.
    """
    path = folder / NAME
    if not path.exists():
        raise InputError(
            f"has no {NAME} beside its weights; alpha stands nowhere else.",
            hint="Add the file that the training wrote.",
            file=folder,
        )
    return AdapterConfig(read_json(path), path)
