"""The config of a fresh adapter."""

from collections.abc import Sequence
from typing import Any

from lorakit.adapter.new_config import WRITTEN, Saved, config_of
from lorakit.store.checkpoint import Checkpoint
from lorakit.verbs.base.weights import Weight, task_type
from lorakit.verbs.init.weight import Wanted


def fresh_config(
    base: Checkpoint,
    saved: Sequence[Saved],
    wanted: Wanted,
    weights: Sequence[Weight],
    *,
    init: object,
) -> dict[str, Any]:
    """The config of a fresh adapter: rank and alpha as they were asked for; `init` says what PEFT
    shall take its base for.
    """
    name = base.located.repo or str(base.located.path)
    raw = {
        "peft_type": "LORA",
        "base_model_name_or_path": name,
        "task_type": task_type(base.config),
        "r": wanted.rank,
        "lora_alpha": wanted.alpha_of(""),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": wanted.rslora,
        "use_dora": wanted.dora,
        "fan_in_fan_out": any(w.turned and not w.form.embedding for w in weights),
        "init_lora_weights": init,
        "inference_mode": False,
        "modules_to_save": None,
    }
    return config_of(raw, saved, {}, version=WRITTEN)
