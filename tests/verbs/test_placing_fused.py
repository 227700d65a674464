"""Updates of some rows of a fused projection, and fused updates of several weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit.errors import MisfitError
from tests.verbs.placing_scene import (
    ATTENTION,
    GATE,
    MLP,
    UP,
    Scene,
    Tensors,
    delta,
    dora,
    draw,
    pair,
)

PARTS = {"q_proj": (0, 8), "k_proj": (8, 12), "v_proj": (12, 16)}
FUSED = f"{ATTENTION}.qkv_proj"


@pytest.mark.parametrize("leaves", [("q_proj", "k_proj", "v_proj"), ("q_proj", "v_proj")], ids=len)
def test_queries_keys_and_values_are_rows_of_a_fused_weight(
    tmp_path: Path, leaves: tuple[str, ...]
) -> None:
    adapter: Tensors = {}
    for leaf in leaves:
        adapter |= pair(f"{ATTENTION}.{leaf}", PARTS[leaf][1] - PARTS[leaf][0], 5)
    scene = Scene(tmp_path, {f"{FUSED}.weight": draw("qkv", 16, 5)}, adapter, model_type="phi3")
    change = np.zeros((16, 5))
    for leaf in leaves:
        change[slice(*PARTS[leaf])] = delta(adapter, f"{ATTENTION}.{leaf}")
    scene.changes({f"{FUSED}.weight": change})


def test_a_fused_update_is_cut_into_the_weights_on_disk(tmp_path: Path) -> None:
    base = {f"{ATTENTION}.{n}.weight": draw(n, j - i, 5) for n, (i, j) in PARTS.items()}
    scene = Scene(tmp_path, base, pair(FUSED, 16, 5), model_type="llama")
    whole = delta(scene.adapter, FUSED)
    scene.changes({f"{ATTENTION}.{n}.weight": whole[slice(*rows)] for n, rows in PARTS.items()})


def test_gate_and_up_are_the_halves_of_a_dense_fused_weight(tmp_path: Path) -> None:
    adapter = {**pair(f"{MLP}.{GATE}", 6, 4), **pair(f"{MLP}.{UP}", 6, 4)}
    base = {f"{MLP}.gate_up_proj.weight": draw("gate_up", 12, 4)}
    scene = Scene(tmp_path, base, adapter, model_type="phi3")
    halves = [delta(adapter, f"{MLP}.{leaf}") for leaf in (GATE, UP)]
    scene.changes({f"{MLP}.gate_up_proj.weight": np.concatenate(halves)})


def test_a_fused_update_that_is_not_as_high_as_its_parts_is_refused(tmp_path: Path) -> None:
    base = {f"{ATTENTION}.{n}.weight": draw(n, j - i, 5) for n, (i, j) in PARTS.items()}
    Scene(tmp_path, base, pair(FUSED, 17, 5), model_type="llama").refused(MisfitError, "qkv_proj")


def decomposed(w: np.ndarray[Any, Any], adapter: Tensors, module: str) -> np.ndarray[Any, Any]:
    v = w.astype(np.float64) + delta(adapter, module)
    magnitude = adapter[f"{module}.lora_magnitude_vector"].astype(np.float64)
    found: np.ndarray[Any, Any] = magnitude[:, None] * v / np.linalg.norm(v, axis=1)[:, None] - w
    return found


@pytest.mark.parametrize("leaf", PARTS)
def test_dora_of_some_rows_takes_the_norms_of_these_rows(tmp_path: Path, leaf: str) -> None:
    module, (start, stop) = f"{ATTENTION}.{leaf}", PARTS[leaf]
    others: Tensors = {}
    for other in set(PARTS) - {leaf}:
        rows = PARTS[other][1] - PARTS[other][0]
        others |= pair(f"{ATTENTION}.{other}", rows, 5)
    adapter = {**dora(pair(module, stop - start, 5), module), **others}
    base = {f"{FUSED}.weight": draw("qkv", 16, 5)}
    scene = Scene(tmp_path, base, adapter, model_type="phi3", use_dora=True)
    change = np.zeros((16, 5))
    for other in set(PARTS) - {leaf}:
        change[slice(*PARTS[other])] = delta(adapter, f"{ATTENTION}.{other}")
    change[start:stop] = decomposed(base[f"{FUSED}.weight"][start:stop], adapter, module)
    scene.changes({f"{FUSED}.weight": change})


def test_dora_of_a_fused_update_is_cut_with_its_magnitude(tmp_path: Path) -> None:
    base = {f"{ATTENTION}.{n}.weight": draw(n, j - i, 5) for n, (i, j) in PARTS.items()}
    adapter = dora(pair(FUSED, 16, 5), FUSED)
    scene = Scene(tmp_path, base, adapter, model_type="llama", use_dora=True)
    whole = np.concatenate([base[f"{ATTENTION}.{n}.weight"] for n in PARTS])
    change = decomposed(whole, adapter, FUSED)
    scene.changes({f"{ATTENTION}.{n}.weight": change[slice(*rows)] for n, rows in PARTS.items()})
