"""The head over the vocabulary of a model that got the head of a task in its place."""

from collections.abc import Mapping

from lorakit.engine.layout import Output
from lorakit.naming.embeddings import is_head
from lorakit.verbs.base.sources import adapter_number


def without_old_head(
    outputs: Mapping[str, list[Output]],
) -> tuple[dict[str, list[Output]], list[str]]:
    """The outputs without an output head that no adapter changes, and its tensors by name."""
    gone = [o.tensor.name for outs in outputs.values() for o in outs if _is_old(o)]
    kept = {f: [o for o in outs if o.tensor.name not in gone] for f, outs in outputs.items()}
    return kept, gone


def _is_old(out: Output) -> bool:
    module = out.tensor.name.removesuffix(".bias").removesuffix(".weight")
    changed = out.recipe or adapter_number(out.source) is not None
    return is_head(f"{module}.weight") and not changed
