"""verify, of a base and an adapter that `loftq` made.

Untouched bytes must equal the base's. Of some weights, or of all, what base and adapter leave is
measured again in float64 on the tensors as they were written, and must be what the manifest says,
up to the rounding of the factors.
"""

import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorakit.adapter.load import read_array
from lorakit.adapter.weight_file import PEFT
from lorakit.adapter.weights import rounded
from lorakit.errors import InputError, UsageError
from lorakit.folder.manifest import manifest_path
from lorakit.formats.peft import factor_key
from lorakit.math.cast import Array
from lorakit.quant.stored.table import stored_weights
from lorakit.store.safetensors import SafetensorsFile
from lorakit.tensors import CODES
from lorakit.verbs.base.sources import sources_of
from lorakit.verbs.init.weight import matrix
from lorakit.verbs.loftq import Quantisation, plan_loftq
from lorakit.verbs.loftq.weight import MODEL, Splitter
from lorakit.verbs.verify.files import Tally, check_copies, opened
from lorakit.verbs.verify.replanned import check_same, place_of

SAMPLES = 3  # weights that are measured again
NEAR = {"F32": 1e-4, "F16": 2e-3, "BF16": 1e-2}  # of what plain quantisation leaves


def check_loftq(
    output: Path,
    manifest: Mapping[str, Any],
    tally: Tally,
    *,
    full: bool = False,
    base: str = "",
    allow_pickle: bool = False,
) -> None:
    """Note in `tally` what was checked of a result, and what differs.

    Raises:
        InputError: the manifest is not of the expected form, or the base is gone or another.
    """
    job = _replanned(output, manifest, base=base, allow_pickle=allow_pickle)
    sources = dict(sources_of(job.splitter.base, ()))
    written: dict[str, SafetensorsFile] = {}
    for file in job.plan.files:
        found = opened(output / file.name, file, manifest["files"].get(file.name, {}), tally)
        if found is not None:
            written[file.name] = found
            check_copies(found, file, sources, tally)
    if len(written) < len(job.plan.files):
        return
    keys = list(job.splitter.weights)
    if not full and len(keys) > SAMPLES:
        keys = random.Random(job.plan.hash).sample(keys, SAMPLES)
    for key in keys:
        _check_weight(key, job.splitter, written, manifest["tensors"].get(key, {}), tally)


def _replanned(
    output: Path, manifest: Mapping[str, Any], *, base: str, allow_pickle: bool
) -> Quantisation:
    said = manifest["inputs"]
    try:
        place = base or place_of(said[0])
        options = dict(manifest["options"])
        for name in ("rank_pattern", "alpha_pattern"):
            options[name] = tuple((str(p), n) for p, n in options.get(name, ()))
        options = {n: v for n, v in options.items() if n not in ("method", "dora")}
        job = plan_loftq(place, **options, allow_pickle=allow_pickle)
    except (TypeError, KeyError, IndexError, ValueError, UsageError) as error:
        raise InputError(
            "is not a manifest that this version reads.",
            hint="Upgrade lorakit.",
            file=manifest_path(output),
        ) from error
    check_same(place, job.plan.inputs[0], said[0], output)
    return job


def _check_weight(
    key: str,
    splitter: Splitter,
    written: Mapping[str, SafetensorsFile],
    said: Mapping[str, Any],
    tally: Tally,
) -> None:
    weight = splitter.weights[key]
    w = np.ascontiguousarray(matrix(splitter.base, weight))
    rest = w - _values(key, splitter, written, w).astype(np.float64)
    adapter = written["adapter/" + PEFT] if "adapter/" + PEFT in written else written[PEFT]
    a, b = (
        read_array(adapter, factor_key(weight.form.module, role), "float64") for role in ("a", "b")
    )
    rest -= splitter.wanted.scaling_of(weight.form.module) * (b @ a)
    left = float(
        np.linalg.norm(rest if splitter.statistics is None else _weighted(rest, key, splitter))
    )
    tally.folded += 1
    tally.numbers += rest.size
    near = NEAR[adapter.infos[factor_key(weight.form.module, "a")].dtype]
    found = (said.get(n) for n in ("norm", "plain"))
    norm, plain = (x if isinstance(x, int | float) else math.nan for x in found)
    if not abs(left - norm) <= near * plain:
        tally.differences.append(
            f"{key!r}: base and adapter leave {left:.6g} of it, the manifest says {norm}."
        )


def _values(
    key: str, splitter: Splitter, written: Mapping[str, SafetensorsFile], w: Array
) -> Array:
    """What the written base makes of a weight, (out, in)."""
    weight, quant = splitter.weights[key], splitter.quant
    dtype = MODEL.get(splitter.base.infos[weight.tensor].dtype, "float32")
    if quant.save == "adapter-only":
        return quant.codec.dequantise(quant.codec.quantise(w), dtype)
    file = next(f for n, f in written.items() if n.startswith("base/") and weight.tensor in f.infos)
    if quant.save == "dequantized":
        values = read_array(file, weight.tensor, "float32")
        return values.T if weight.turned else values
    stored = next(s for s in stored_weights(file, {}) if s.info.name == weight.tensor)
    values = np.empty(weight.form.shape, np.float32)
    stored.values(file, 0, len(values), values)
    return rounded(values, CODES[dtype])


def _weighted(rest: Array, key: str, splitter: Splitter) -> Array:
    assert splitter.statistics is not None
    moments = splitter.statistics.of(splitter.weights[key].form.module)
    if moments.ndim == 1:
        scaled: Array = rest * np.sqrt(moments)
        return scaled
    values, vectors = np.linalg.eigh((moments + moments.T) / 2)
    weighted: Array = rest @ (vectors * np.sqrt(np.maximum(values, 0)))
    return weighted
