"""Second moments of the inputs of a model's layers, collected from a few batches: what `loftq`,
`eva` and `corda` weigh by.

Law: what is written is the mean of x xᵀ (or of x², for the diagonal) over all positions of all
batches, summed in float64, for every layer that ran.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from lorakit.errors import UsageError
from lorakit.store.writing import write_file


def collect_moments(
    model: Any,
    batches: Iterable[Any],
    *,
    modules: Iterable[str] = (),
    full: bool = False,
    path: str | Path = "",
) -> dict[str, NDArray[np.float32]]:
    """Second moments by `<module>.second_moment`: (in,), or with `full` (in, in), float32.

    `model` is called with each batch (its items as keywords where it is a mapping, one after the
    other where it is a list or tuple), without gradients. modules: names of linear layers; all but
    the output head by default. path: a safetensors file to write them to, whole or not at all.

    Raises:
        UsageError: a module is no linear layer of the model, or no batch reached one.
        OutputError, ResourceError: the file cannot be written.
    """
    import torch

    wanted = _layers(model, modules)
    sums: dict[str, Any] = {}
    counts: dict[str, int] = {}

    def seen(name: str) -> Any:
        def add(_: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
            given = inputs[0] if inputs else next(iter(options.values()))
            x = given.detach().reshape(-1, given.shape[-1]).double()
            gained = x.T @ x if full else (x * x).sum(0)
            sums[name] = gained if name not in sums else sums[name] + gained
            counts[name] = counts.get(name, 0) + len(x)

        return add

    hooks = [m.register_forward_pre_hook(seen(n), with_kwargs=True) for n, m in wanted.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                _call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    found = _means(sums, counts)
    if str(path):
        write_file(Path(path), save(found))
    return found


def _means(sums: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, NDArray[np.float32]]:
    """By layer, but for those that were given no positions, as an expert may be."""
    if not any(counts.values()):
        raise UsageError("no batch reached any of the layers.")
    return {
        f"{name}.second_moment": (total / counts[name]).float().cpu().numpy()
        for name, total in sums.items()
        if counts[name]
    }


def _call(model: Any, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(*(batch if isinstance(batch, list | tuple) else [batch]))


def _layers(model: Any, modules: Iterable[str]) -> dict[str, Any]:
    """The linear layers of these names, or all but the output head."""
    linear = {n: m for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    names = list(modules)
    if strange := [n for n in names if n not in linear]:
        raise UsageError(f"{strange[0]!r} is no linear layer of the model.")
    if names:
        return {n: linear[n] for n in names}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {n: m for n, m in linear.items() if m is not head}
