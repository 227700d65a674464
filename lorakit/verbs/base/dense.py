"""Deltas that depend on the base: of DoRA, and of adapters whose training took something out of it.

Law: the delta is what `merge` adds to the weight, before it is rounded.
"""

from typing import Any

import numpy as np

from lorakit.adapter.adapter import Adapter
from lorakit.adapter.load import LazyRows
from lorakit.adapter.weights import Adapted
from lorakit.configs import model_type
from lorakit.engine.fold import blocks_of
from lorakit.engine.layout import Output
from lorakit.errors import InputError
from lorakit.math.cast import Array
from lorakit.store.checkpoint import Checkpoint
from lorakit.verbs.base.deciding import decided
from lorakit.verbs.base.landing import FLAGGED
from lorakit.verbs.base.recompute import prepared
from lorakit.verbs.base.sources import adapter_number
from lorakit.verbs.base.targets import Options

PARTIAL = ("at", "rows", "columns", "expert", "stacked")  # of an update in a tensor that it shares


class Against:
    """The deltas of an adapter on its base.

    Raises:
        MisfitError: the adapter does not fit the base.
        InputError: what its initialisation took out of the base cannot be computed again.
    """

    def __init__(
        self, base: Checkpoint, adapter: Adapter, *, base_is_residual: bool = False
    ) -> None:
        self.base, self.adapter = base, adapter
        if not base_is_residual:
            _check_known(adapter)
        options = Options((1.0,), base_is_residual=base_is_residual, untie=True)
        self._outputs: dict[str, list[tuple[Output, dict[str, Any]]]] = {}
        found = decided(base, [adapter], options, "keep")
        for output in (o for outputs in found.outputs.values() for o in outputs):
            for update in output.recipe.get("updates", ()):
                if name := update.get("a"):
                    self._outputs.setdefault(name, []).append((output, update))

    def delta(self, one: Adapted) -> Array:
        """What a weight gains, (out, in) in float32, a kernel flattened.

        Raises:
            InputError: the base holds the weight in another packing than the adapter.
        """
        output, update = self._place(one)
        fold = output.fold(output.tensor)
        of_base = adapter_number(output.source) is None
        source = self.base if of_base else self.adapter.source
        recipe = prepared(fold, source, [self.adapter.source], "float32")
        rows = LazyRows(source, fold.origin.name, "float32", fold.leading)
        found = np.empty((fold.rows, fold.cols), np.float32)
        for start, stop in blocks_of(fold):
            w = rows[start:stop]
            recipe.begin(w, start, stop)
            found[start:stop] = recipe.change(w, start, stop)
        return found.T if update.get("transposed") else found

    def turned(self, one: Adapted) -> bool:
        """Whether a square stack of experts lies the other way round than it is written."""
        updates = [u for _, u in self._outputs.get(one.piece.tensors[0].name, [])]
        (out, inner), model = one.form.shape, model_type(self.base.config)
        return out == inner and any(u["turned"] != (model in FLAGGED) for u in updates)

    def _place(self, one: Adapted) -> tuple[Output, dict[str, Any]]:
        places = self._outputs.get(one.piece.tensors[0].name, [])
        whole = [(o, u) for o, u in places if not any(u.get(p) is not None for p in PARTIAL)]
        origins = {(o.source, o.origin.name) for o, _ in whole}  # one, of tied embeddings too
        if len(origins) == 1 and len(whole) == len(places):
            return whole[0]
        raise InputError(
            f"{one.form.key!r} needs its base, which holds it in another packing.",
            hint="Convert the adapter first: lorakit convert ADAPTER -o OUT --names disk "
            "--base BASE.",
            file=self.adapter.path,
            tensor=one.piece.tensors[0].name,
        )


def _check_known(adapter: Adapter) -> None:
    """Refuse an initialisation that changed the base by what only the first adapter tells."""
    config = adapter.config
    if config.mutation and not config.residual:
        known = not config.init.startswith("loftq")
        raise InputError(
            f"was initialised with {config.init!r}, which changed the base it was trained on.",
            hint="Make it plain with the adapter as it was before training: lorakit combine "
            "TRAINED INITIAL --weight 1 --weight -1 --base-is-residual -o OUT."
            if known
            else "Merge it into that quantised base, with --base-is-residual.",
            file=config.file,
        )
