"""A module of another tuner of PEFT as what LyCORIS, and LoRA, have of the same update.

Law: the scaling of the result times what its tensors make is the delta that PEFT merges, before
that is rounded.

Source: huggingface/peft v0.21.2, src/peft/tuners/{loha,lokr,adalora}/layer.py.
"""

from dataclasses import replace

import numpy as np

from lorakit.adapter.config import AdapterConfig
from lorakit.adapter.delta import Delta
from lorakit.adapter.files.joints import check_joints
from lorakit.adapter.files.values import computed, widened
from lorakit.adapter.tuners import TUNERS
from lorakit.errors import MisfitError

CONV1D = 3  # dimensions


def scaled(delta: Delta, config: AdapterConfig, module: str) -> Delta:
    """The update of a module with an alpha that says its scaling; `module` is what patterns of the
    config call it.

    Raises:
        InputError: the config has no alpha, or no rank.
        MisfitError: the tensors are of another tuner than the config says, do not fit together, or
            PEFT makes something else of them.
    """
    tuner = TUNERS[config.peft_type]
    if delta.algo != tuner.algo or (tuner.algo == "lora") != ("diag" in delta.tensors):
        raise MisfitError(
            f"{module!r} has no factors of {tuner.name}, which its config says it is of.",
            hint="The file and its config are not of one adapter.",
            tensor=module,
        )
    if "w2" in delta.tensors and len(delta.tensors["w2"].shape) == CONV1D:
        raise MisfitError(
            f"{module!r} is a Conv1d of LoKr, whose kernel PEFT mixes up with its rows.",
            hint="Merge it with PEFT.",
            tensor=module,
        )
    whole = _without_diagonal(delta, module) if "diag" in delta.tensors else delta
    check_joints(whole)
    low = next((whole.tensors[r] for r in ("a", "w2_b", "w1_b") if r in whole.tensors), None)
    scaling = tuner.scaling(config, module, low.shape[0] if low else 0)
    if low:
        return replace(whole, alpha=scaling * low.shape[0])
    left = computed(widened(whole.tensors["w1"]).astype(np.float64) * scaling)
    return replace(whole, tensors={**whole.tensors, "w1": left}, alpha=None)


def _without_diagonal(delta: Delta, module: str) -> Delta:
    """The singular values of AdaLoRA multiplied into A; where none is left, one of zero."""
    tensors = {r: v for r, v in delta.tensors.items() if r != "diag"}
    a, b, diag = (widened(delta.tensors[r]) for r in ("a", "b", "diag"))
    if diag.size != len(a):
        raise MisfitError(
            f"{module!r} has {diag.size} singular values for a rank of {len(a)}.",
            hint="Save the adapter again; this file is damaged.",
            tensor=module,
        )
    if not len(a):
        a, b, diag = np.zeros((1, *a.shape[1:])), np.zeros((len(b), 1)), np.zeros(1)
    made = {"a": (diag.reshape(-1, 1) * a).astype(np.float32), "b": b.astype(np.float32)}
    return replace(delta, tensors={**tensors, **{r: computed(x) for r, x in made.items()}})
